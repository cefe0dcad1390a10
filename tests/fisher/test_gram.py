"""Gram matrices of the inputs of linear maps, against hooks without batching or padding."""

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from fmn.errors import UserError
from fmn.fisher import gram
from tests.tiny import tiny_examples, tiny_model


def by_hand(name: str, count: int) -> dict[str, torch.Tensor]:
    """E[x x^T] of what every linear map of the encoder reads, one unpadded example at a time."""
    model, examples = tiny_model(name), tiny_examples(name, count)
    read: dict[str, list[torch.Tensor]] = {}
    for path, module in model.base_model.named_modules():
        if isinstance(module, (nn.Linear, Conv1D)):
            module.register_forward_pre_hook(
                lambda _, args, path=path: read.setdefault(path, []).append(
                    args[0].detach().flatten(0, -2)
                )
            )
    for tokens in examples.inputs["input_ids"]:
        model(input_ids=torch.tensor([tokens]))
    found = {}
    for path, parts in read.items():
        x = torch.cat(parts)
        found[path] = x.T @ x / len(x)
    return found


@pytest.mark.parametrize("name", ["bert", "distilbert", "albert", "gpt2", "modernbert", "llama"])
def test_every_linear_map_has_the_moments_of_what_it_reads_without_padding(name: str) -> None:
    found = gram.estimate(tiny_model(name), tiny_examples(name, 7), device="cpu", dtype="float64")
    expected = by_hand(name, 7)
    assert found.inputs.keys() == expected.keys()
    for path, moments in expected.items():
        torch.testing.assert_close(
            found.moments[found.inputs[path]], moments, rtol=1e-5, atol=1e-6
        )  # rotary tables are float32


def test_maps_that_read_the_same_share_one_matrix() -> None:
    found = gram.estimate(tiny_model("bert"), tiny_examples("bert", 3), device="cpu")
    attention = "encoder.layer.1.attention.self"
    assert {found.inputs[f"{attention}.{name}"] for name in ("query", "key", "value")} == {
        f"{attention}.query"
    }
    assert found.inputs["pooler.dense"] == "pooler.dense"
    assert not found.transposed
    assert (
        "h.0.mlp.c_fc"
        in gram.estimate(tiny_model("gpt2"), tiny_examples("gpt2", 3), device="cpu").transposed
    )


def test_it_does_not_depend_on_the_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    model, examples = tiny_model("bert"), tiny_examples("bert", 20)
    whole = gram.estimate(model, examples, device="cpu", dtype="float64")
    monkeypatch.setitem(gram.TOKENS, "cpu", 16)
    parts = gram.estimate(model, examples, device="cpu", dtype="float64")
    for name, moments in whole.moments.items():
        torch.testing.assert_close(parts.moments[name], moments, rtol=1e-10, atol=1e-12)


def test_there_must_be_examples() -> None:
    with pytest.raises(UserError, match="no examples"):
        gram.estimate(tiny_model("bert"), tiny_examples("bert", 0), device="cpu")
