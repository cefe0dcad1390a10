"""Compute the Gram matrices of the inputs of an encoder's linear maps, which RegMean needs.

For a linear map y = W x + b, it is the second moment E[x x^T] over all tokens except padding (Jin
et al. 2023, arXiv 2212.09849, section 3). Maps with the same input (query, key, value) share one.
"""

from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from fmn.errors import UserError
from fmn.fisher.runner import Runner, prepared
from fmn.models.checkpoints import names_in_base
from fmn.models.devices import places, resolve_device, resolve_dtype
from fmn.models.predict import LINEAR, hooked, max_batch_tokens, multiple_of_widths
from fmn.tasks.batches import Batch, Examples, by_length, select


@dataclass(frozen=True)
class Grams:
    """Gram matrices and the linear maps that they belong to; maps by path in the base model.

    Attributes:
        moments: by input, float32 [n, n]: the mean of x x^T over tokens. An input is named after
            the first map that reads it.
        inputs: by map, the input that it reads.
        transposed: the maps whose weights are stored [in, out].
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

    Arguments as for `fmn.fisher.estimate`; labels are not read. Costs a forward pass and about one
    and a half times its matrix products.
    """
    target = resolve_device(device)
    sample = examples.take(select(examples.labels, samples, seed))
    if not len(sample):
        raise UserError("there are no examples to compute Gram matrices from")
    modules = dict(model.named_modules())
    linear = {
        name: modules[path]
        for path, name in names_in_base(model, modules).items()
        if isinstance(modules[path], LINEAR)
    }
    inputs: dict[str, str] = {}
    sums: dict[str, Tensor] = {}
    tokens: dict[str, int] = defaultdict(int)
    done = 0
    with prepared(model, sample, target, resolve_dtype(dtype, target)) as runner, torch.no_grad():
        multiple = multiple_of_widths(target)
        for batch in by_length(sample, max_batch_tokens(target), multiple=multiple):
            reads = _reads(runner, batch, linear)
            if not inputs:
                first: dict[int, str] = {}
                inputs = {name: first.setdefault(id(x[0]), name) for name, x in reads.items()}
            for name in set(inputs.values()):
                for read in reads[name]:
                    rows = _without_padding(read, batch)  # [N, n]
                    zeros = rows.new_zeros(rows.shape[1], rows.shape[1])
                    sums.setdefault(name, zeros).addmm_(rows.T, rows)
                    tokens[name] += len(rows)
            done += len(batch.rows)
            if progress:
                progress(done, len(sample))
    return Grams(
        {name: total.div(tokens[name]).cpu() for name, total in sums.items()},
        inputs,
        frozenset(name for name in inputs if isinstance(linear[name], Conv1D)),
    )


def _reads(
    runner: Runner, batch: Batch, linear: Mapping[str, nn.Module]
) -> dict[str, list[Tensor]]:
    """The inputs of every linear map in a forward pass; several if layers share the map."""
    reads: dict[str, list[Tensor]] = defaultdict(list)
    hooks = {name: lambda _, args, own=name: reads[own].append(args[0]) for name in linear}
    with hooked((linear[name], hook) for name, hook in hooks.items()):
        runner.logits(batch)
    return reads


def _without_padding(read: Tensor, batch: Batch) -> Tensor:
    """The vectors [N, n] of an activation [..., n] that belong to tokens."""
    rows = read.flatten(0, -2)  # [B, T, n] -> [B * T, n]
    for name, mask in batch.inputs.items():  # the encoder's or the decoder's mask: their T differs
        if name.endswith("attention_mask") and read.shape[:-1] == mask.shape:
            rows = rows[places(mask != 0, read.device)]
    return rows.to(torch.promote_types(rows.dtype, torch.float32))
