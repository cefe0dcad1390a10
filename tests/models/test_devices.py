"""One rule for where to compute and in which precision."""

import os
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.func import functional_call
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fmn.errors import UserError
from fmn.fisher import gram, mask_nodes, parameters
from fmn.fisher.architectures import mask_sites
from fmn.models import predict
from fmn.models.devices import (
    autocast,
    known_padding,
    passing_on,
    placed,
    resolve_device,
    resolve_dtype,
    side_by_side,
    split,
)
from fmn.tasks.batches import Examples, pad_batch
from tests.tiny import tiny_examples, tiny_generator, tiny_model, tiny_texts

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


class NoMasks(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Refuses to index by a mask, which on a GPU waits for the number of its places."""

    def __torch_dispatch__(
        self, function: Any, _types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        tensors = [item for item in tree_leaves(args[1:]) if isinstance(item, torch.Tensor)]
        is_index = function.overloadpacket in (torch.ops.aten.index, torch.ops.aten.index_put)
        if is_index and any(each.dtype == torch.bool and each.is_meta for each in tensors):
            raise AssertionError(f"{function} by a mask")
        return function(*args, **(kwargs or {}))


def runs_without_waiting(
    monkeypatch: pytest.MonkeyPatch, compute: Callable[..., Any], model: Any, examples: Examples,
    **options: Any,
) -> None:  # fmt: skip
    """A tensor on "meta" has no values: reading one, or copying one back, raises an error."""
    for module in (mask_nodes, gram, parameters, predict):
        monkeypatch.setattr(module, "resolve_device", torch.device)
    done = []
    mode: Any = NoMasks
    with mode(), pytest.raises(NotImplementedError, match="Cannot copy out of meta tensor"):
        compute(
            model.float(), examples, device="meta", dtype="float32",
            progress=lambda count, _: done.append(count), **options,
        )  # fmt: skip
    assert done[-1] == len(examples)  # only the result was copied back


@pytest.mark.parametrize("estimator", ["empirical", "expected", "sampled", "batch"])
def test_the_mask_fisher_of_a_classifier_waits_for_no_batch(
    estimator: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"estimator": estimator, "problem_type": "single_label_classification"}
    for name in ("bert", "llama", "deberta-v2", "vit"):
        examples = tiny_examples(name, 40)
        runs_without_waiting(
            monkeypatch, mask_nodes.estimate, tiny_model(name), examples, **options
        )


@pytest.mark.parametrize("estimator", ["empirical", "sampled", "batch"])
@pytest.mark.parametrize("name", ["llama", "t5", "bart"])
def test_the_mask_fisher_of_a_generator_waits_for_no_batch(
    name: str, estimator: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"estimator": estimator, "problem_type": "tokens"}
    model, texts = tiny_generator(name), tiny_texts(name, 40)
    runs_without_waiting(monkeypatch, mask_nodes.estimate, model, texts, **options)


def test_other_statistics_and_predictions_wait_for_no_batch(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    options = {"estimator": "empirical", "problem_type": "single_label_classification"}
    for compute, own in (
        (parameters.estimate, options),
        (gram.estimate, {}),
        (predict.predict, {}),
    ):
        examples = tiny_examples("llama", 5)
        runs_without_waiting(monkeypatch, compute, tiny_model("llama"), examples, **own)
    texts = tiny_texts("llama", 5)
    runs_without_waiting(monkeypatch, predict.predict, tiny_generator("llama"), texts)


@pytest.mark.parametrize("name", ["bert", "llama", "mistral", "t5"])
def test_padding_that_the_host_knows_changes_no_output(name: str) -> None:
    is_pair = name == "t5"
    model = tiny_generator(name) if is_pair else tiny_model(name)
    examples = tiny_texts(name, 6) if is_pair else tiny_examples(name, 6)
    model.set_attn_implementation("sdpa")
    for rows in (np.arange(6), np.arange(1)):  # one has no padding
        batch = pad_batch(examples, rows)
        with torch.no_grad():
            expected = model(**batch.inputs).logits
            with known_padding(batch.inputs):
                assert torch.equal(model(**batch.inputs).logits, expected)


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="one core computes one at a time")
def test_threads_compute_in_order_and_in_the_callers_modes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    both = threading.Barrier(2)

    def call(item: int) -> tuple[int, bool, bool]:
        both.wait(60)  # ends when two calls run at a time
        return item, torch.is_grad_enabled(), torch.is_autocast_enabled("cpu")

    with torch.no_grad(), autocast(CPU, torch.bfloat16):
        results = list(side_by_side(call, range(8), CPU))
    assert results == [(item, False, True) for item in range(8)]
    with pytest.raises(UserError, match="no device 'tpu'"):
        list(side_by_side(resolve_device, ["cpu", "tpu", "cpu"], CPU))


def test_a_gpu_computes_one_at_a_time() -> None:
    own = threading.get_ident()
    idents = side_by_side(lambda _: threading.get_ident(), range(3), torch.device("cuda"))
    assert list(idents) == [own] * 3


def test_float32_is_plain_within_a_program_that_allows_less() -> None:
    backend: Any = torch.backends.cuda.matmul
    before = backend.fp32_precision
    try:
        backend.fp32_precision = "tf32"
        with placed(tiny_model("bert"), CPU, torch.float32):
            cudnn: Any = torch.backends.cudnn
            assert backend.fp32_precision == cudnn.conv.fp32_precision == "ieee"
        assert backend.fp32_precision == "tf32"
    finally:
        backend.fp32_precision = before


class Places(TorchFunctionMode):
    """Marks what is moved to "cpu:N", and refuses to compute with what lies in two places."""

    def __torch_function__(
        self, function: Any, _types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor) and x.ndim]
        places = {x.place for x in tensors if hasattr(x, "place")}
        target = next((x for x in args[1:] if isinstance(x, torch.device)), None)
        is_move = function is torch.Tensor.to and target is not None and target.index is not None
        assert is_move or len(places) < 2, f"{function} of tensors in {places}"
        result = function(*args, **(kwargs or {}))
        if is_move and target:
            result, places = args[0].view_as(args[0]), {target.index}
        for tensor in tree_leaves(result) if places else ():
            if isinstance(tensor, torch.Tensor):
                tensor.place = next(iter(places))  # type: ignore[attr-defined]
        return result


@pytest.mark.parametrize("name", ["bert", "llama", "albert", "t5", "bart"])
def test_layers_on_several_devices_compute_the_same(name: str) -> None:
    is_pair = name in ("t5", "bart")
    model = tiny_generator(name) if is_pair else tiny_model(name)
    examples = tiny_texts(name, 4) if is_pair else tiny_examples(name, 4)
    inputs = pad_batch(examples, np.arange(4)).inputs
    layers = list(dict.fromkeys(site.layer for site in mask_sites(model)))
    where = {path: torch.device("cpu", number) for number, path in enumerate(layers)}
    tensors: dict[str, Any] = {}
    for key, tensor in (*model.named_parameters(), *model.named_buffers()):
        own = next((place for path, place in where.items() if key.startswith(f"{path}.")), None)
        tensors[key] = tensor.detach().clone()
        tensors[key].place = own.index if own else 0
    for value in inputs.values():
        value.place = 0  # type: ignore[attr-defined]
    with torch.no_grad():
        expected = model(**inputs).logits
        with passing_on(model, where, torch.device("cpu", 0)), Places():
            output = functional_call(model, tensors, (), inputs).logits
    assert output.place == 0
    assert torch.equal(output, expected)


@given(
    layers=st.lists(st.integers(1, 100), min_size=1, max_size=40),
    rest=st.integers(0, 200),
    free=st.lists(st.integers(0, 1500), min_size=1, max_size=5),
)
def test_a_split_model_fits_or_is_refused(layers: list[int], rest: int, free: list[int]) -> None:
    try:
        numbers = split(layers, rest, free)
    except UserError:
        # A share that is rounded to whole layers may lack room for one.
        assert any(sum(layers) + rest + len(free) * max(layers) > sum(free) for _ in free)
        return
    assert numbers == sorted(numbers)
    for number, room in enumerate(free):
        own = sum(size for size, place in zip(layers, numbers, strict=True) if place == number)
        assert own + (rest if number == 0 else 0) * bool(own) <= room
