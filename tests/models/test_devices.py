"""One rule for where to compute and in which precision."""

import pytest
import torch

from fmn.errors import UserError
from fmn.models.devices import autocast, placed, resolve_device, resolve_dtype
from tests.tiny import tiny_model

CPU = torch.device("cpu")


def test_auto_is_a_device_that_is_here() -> None:
    assert resolve_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
    assert resolve_device("cpu") == CPU


@pytest.mark.parametrize("name", ["gpu", "cuda:99", "mps", "meta", ""])
def test_a_device_that_is_not_here_is_a_users_mistake(name: str) -> None:
    with pytest.raises(UserError, match=f"no device '{name}'"):
        resolve_device(name)


def test_auto_is_bfloat16_only_where_the_hardware_has_it() -> None:
    able = torch.cpu.get_capabilities()
    native = bool(able.get("avx512_bf16") or able.get("amx_bf16"))
    assert resolve_dtype("auto", CPU) == (torch.bfloat16 if native else torch.float32)
    assert resolve_dtype("float64", CPU) == torch.float64
    with pytest.raises(UserError, match="float16"):
        resolve_dtype("float16", CPU)


def test_a_placed_model_keeps_its_attention_implementation() -> None:
    model = tiny_model("bert")
    before = model.config._attn_implementation
    with placed(model, CPU, torch.float32), autocast(CPU, torch.bfloat16):
        assert model.dtype == torch.float32
        assert model(torch.tensor([[1, 5, 2]])).logits.dtype == torch.bfloat16
    assert model.config._attn_implementation == before
