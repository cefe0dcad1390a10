"""Gram matrices of the inputs of an encoder's linear maps: what RegMean needs of every expert.

For a linear map y = W x + b, the second moment E[x x^T] over all tokens that are no padding (Jin et al. 2023, arXiv
2212.09849, section 3). Maps that read the same input (query, key, value) share one.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from fmn.errors import UserError
from fmn.fisher.mask_nodes import prepared
from fmn.models.devices import resolve_device, resolve_dtype
from fmn.tasks.batches import Examples, by_length, select

TOKENS = {"cpu": 2048, "cuda": 32768}  # of a batch


@dataclass(frozen=True)
class Grams:
    """What `estimate` finds.

    `moments`: by input, float32 [n, n]: the mean of x x^T over tokens.
    `inputs`: by module path in the base model, the input that it reads.
    `transposed`: the modules whose weights are stored [in, out].
    """

    moments: dict[str, Tensor]
    inputs: dict[str, str]
    transposed: frozenset[str]


class _Sums:
    """Of one input, over the tokens so far."""

    def __init__(self) -> None:
        self.total: Tensor | None = None
        self.tokens = 0

    def add(self, tokens: Tensor) -> None:
        """Takes in tokens [N, n]."""
        wide = tokens.to(torch.promote_types(tokens.dtype, torch.float32))
        if self.total is None:
            self.total = wide.new_zeros(wide.shape[1], wide.shape[1])
        self.total.addmm_(wide.T, wide)
        self.tokens += len(wide)


def estimate(
    model: PreTrainedModel,
    examples: Examples,
    *,
    samples: int | None = None,
    seed: int = 0,
    device: str = "auto",
    dtype: str = "float32",
    progress: Callable[[int, int], None] | None = None,
) -> Grams:
    """The Gram matrices of `model`, a Transformer with a classification head, on a sample of examples.

    `samples`, `seed`, `device` and `dtype` as for `fmn.fisher.estimate`; labels are not looked at. The result does not
    depend on the size of batches, but for rounding. Costs a forward pass and about one and a half times its products.
    """
    where = resolve_device(device)
    chosen = examples.take(select(examples.labels, samples, seed))
    if not len(chosen):
        raise UserError("there are no examples to compute Gram matrices from")
    prefix = f"{model.base_model_prefix}."
    linear = {
        name.removeprefix(prefix): module
        for name, module in model.named_modules()
        if name.startswith(prefix) and isinstance(module, (nn.Linear, Conv1D))
    }
    sums: dict[str, _Sums] = {}
    inputs: dict[str, str] = {}
    done = 0
    with prepared(model, chosen, where, resolve_dtype(dtype, where)) as runner, torch.no_grad():
        for batch in by_length(chosen, tokens=TOKENS.get(where.type, TOKENS["cpu"])):
            mask = batch.inputs.get("attention_mask")
            mask = None if mask is None else mask.bool().to(where)  # [B, T]
            with _watched(linear, mask, sums, inputs):
                runner.logits(batch)
            done += len(batch.rows)
            if progress:
                progress(done, len(chosen))
    return Grams(
        {
            name: total.total.div(total.tokens).cpu()
            for name, total in sums.items()
            if total.total is not None
        },
        inputs,
        frozenset(
            name for name, module in linear.items() if isinstance(module, Conv1D) and name in inputs
        ),
    )


@contextmanager
def _watched(
    linear: dict[str, nn.Module],
    mask: Tensor | None,
    sums: dict[str, _Sums],
    inputs: dict[str, str],
) -> Iterator[None]:
    """Adds what the modules read in a forward pass to `sums`. Which modules read one and the same tensor is found in
    the first pass, and noted in `inputs`."""
    first = not inputs
    seen: list[
        tuple[Tensor, str]
    ] = []  # keeps the tensors alive, so that no other takes their place

    def watch(name: str, read: Tensor) -> None:
        if first and name not in inputs:
            inputs[name] = next((other for tensor, other in seen if tensor is read), name)
            seen.append((read, name))
        if inputs.get(name) != name:
            return
        rows = read.flatten(0, -2)  # [B, T, n] -> [B * T, n]
        if mask is not None and read.ndim == 3 and read.shape[:2] == mask.shape:
            rows = rows[mask.flatten()]
        sums.setdefault(name, _Sums()).add(rows)

    handles = [
        module.register_forward_pre_hook(lambda _, args, name=name: watch(name, args[0]))
        for name, module in linear.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
