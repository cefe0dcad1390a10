"""Gram matrices of the inputs of an encoder's linear maps: what RegMean needs of every expert.

For a linear map y = W x + b, the second moment E[x x^T] over all tokens that are no padding (Jin et
al. 2023, arXiv 2212.09849, section 3). Maps that read the same input (query, key, value) share one.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from fmn.errors import UserError
from fmn.fisher.runner import LINEAR, max_batch_tokens, prepared
from fmn.models.devices import resolve_device, resolve_dtype
from fmn.tasks.batches import Examples, by_length, select


@dataclass(frozen=True)
class Grams:
    """Gram matrices and the modules that they belong to; modules by path in the base model.

    Attributes:
        moments: by input, float32 [n, n]: the mean of x x^T over tokens. An input has the name of
            the first module that reads it.
        inputs: by module, the input that it reads.
        transposed: the modules whose weights are stored [in, out].
    """

    moments: dict[str, Tensor]
    inputs: dict[str, str]
    transposed: frozenset[str]


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
    """The Gram matrices of a Transformer with a classification head on a sample of examples.

    Arguments as for `fmn.fisher.estimate`; labels are not read. It does not depend on batch size,
    but for rounding. Costs a forward pass and about one and a half times its matrix products.
    """
    on = resolve_device(device)
    sample = examples.take(select(examples.labels, samples, seed))
    if not len(sample):
        raise UserError("there are no examples to compute Gram matrices from")
    prefix = f"{model.base_model_prefix}."
    linear = {
        name.removeprefix(prefix): module
        for name, module in model.named_modules()
        if name.startswith(prefix) and isinstance(module, LINEAR)
    }
    inputs: dict[str, str] = {}
    sums: dict[str, Tensor] = {}
    tokens: dict[str, int] = defaultdict(int)
    done = 0
    with prepared(model, sample, on, resolve_dtype(dtype, on)) as runner, torch.no_grad():
        for batch in by_length(sample, tokens=max_batch_tokens(on)):
            with _inputs_recorded(linear) as reads:
                runner.logits(batch)
            if not inputs:
                first: dict[int, str] = {}
                inputs = {name: first.setdefault(id(x[0]), name) for name, x in reads.items()}
            mask = batch.inputs.get("attention_mask")  # [B, T]
            for name in set(inputs.values()):
                for read in reads[name]:
                    rows = _without_padding(read, mask)  # [N, n]
                    product = rows.new_zeros(rows.shape[1], rows.shape[1])
                    sums.setdefault(name, product).addmm_(rows.T, rows)
                    tokens[name] += len(rows)
            done += len(batch.rows)
            if progress:
                progress(done, len(sample))
    return Grams(
        {name: sums[name].div(tokens[name]).cpu() for name in inputs if name in sums},
        inputs,
        frozenset(name for name in inputs if isinstance(linear[name], Conv1D)),
    )


def _without_padding(read: Tensor, mask: Tensor | None) -> Tensor:
    """The vectors [N, n] of an activation [..., n] that belong to tokens."""
    rows = read.flatten(0, -2)  # [B, T, n] -> [B * T, n]
    if mask is not None and read.shape[:-1] == mask.shape:
        rows = rows[mask.bool().flatten().to(read.device)]
    return rows.to(torch.promote_types(rows.dtype, torch.float32))


@contextmanager
def _inputs_recorded(modules: Mapping[str, nn.Module]) -> Iterator[dict[str, list[Tensor]]]:
    """What the modules read in a forward pass, by name; a shared module reads several times."""
    reads: dict[str, list[Tensor]] = defaultdict(list)
    with ExitStack() as hooks:
        for name, module in modules.items():
            handle = module.register_forward_pre_hook(
                lambda _, args, name=name: reads[name].append(args[0])
            )
            hooks.callback(handle.remove)
        yield reads
