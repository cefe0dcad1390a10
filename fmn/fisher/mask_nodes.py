"""The Fisher information of mask nodes, from one forward and half a backward pass.

A mask node is 1 and multiplies a head's context vector before the attention output projection, or
an intermediate activation before the feed-forward down projection (arXiv 2403.09891, section 3;
Kwon et al., arXiv 2204.09656). So no mask is ever applied: with `a` the input of the projection,
the chain rule gives

    dL/dm = sum over positions (and the channels of the head) of a * dL/da,

for every example of a batch separately, from one backward pass without weight gradients, which
stops at the lowest layer's attention output projection.

`fmn.fisher.loss` defines the losses L. For the estimator "batch", L is the mean loss of 32
consecutive examples, and the squares are summed over such batches, as in the paper's released code;
for the other estimators the squares are averaged over examples.
"""

import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from fmn.errors import UserError
from fmn.fisher.architectures import MaskSite, NodeValues, mask_sites
from fmn.fisher.loss import Loss
from fmn.fisher.runner import (
    Runner,
    backward_passes,
    float_dtype,
    outputs_of,
    prepared,
    recomputed,
    shared_casts,
)
from fmn.models.devices import free_memory, resolve_device, resolve_dtype, to_device
from fmn.models.predict import first_token_only, hooked, max_batch_tokens, multiple_of_widths
from fmn.tasks.batches import IGNORED, Batch, Examples, by_length, halved, select
from fmn.tasks.task import LossName

BATCH_SIZE = 32  # examples in a batch of the estimator "batch", as in the released code
HEAVIEST = 32  # examples of a run in bfloat16 whose terms float32 replaces
CHUNK = 4096  # examples that are sorted by length together; a multiple of BATCH_SIZE


@dataclass(frozen=True)
class Estimate:
    """The Fisher information of every mask node and its standard error.

    Attributes:
        fisher: mean over examples of the squared mask gradient; for "batch" the sum over batches.
        stderr: standard error of that mean; None for "batch", and for a single example.
        samples: examples that it was estimated from.
        rounding: mean relative error of `fisher` due to bfloat16, where it is known.
    """

    fisher: NodeValues
    stderr: NodeValues | None
    samples: int
    rounding: float | None = None

    @property
    def relative_error(self) -> float | None:
        """The mean of stderr / fisher over the nodes; None where it is undefined."""
        if self.stderr is None:
            return None
        fisher, stderr = (np.concatenate(list(v.values())) for v in (self.fisher, self.stderr))
        positive = fisher > 0
        return float(np.mean(stderr[positive] / fisher[positive])) if positive.any() else None


@dataclass
class PartialSums:
    """Float64 sums over the examples of a run so far, for P mask nodes.

    Attributes:
        total: [P], of the squared gradients.
        squares: [P], of their squares.
        pending: [G, P], for "batch" the gradients of the mean losses of the chunk's G batches.
        heavy: [H, P], the terms of the H examples with the largest sums of terms; zeros at first.
        heavy_rows: [H], their rows; -1 at first.
        done: examples summed up.
        batch_tokens: tokens of the largest batch that is computed at once.
    """

    total: Tensor
    squares: Tensor
    pending: Tensor
    heavy: Tensor
    heavy_rows: Tensor
    done: int
    batch_tokens: int

    def copy_to(self, device: torch.device | str) -> "PartialSums":
        tensors = {name: each for name, each in vars(self).items() if isinstance(each, Tensor)}
        copies = {name: each.to(device, copy=True) for name, each in tensors.items()}
        return replace(self, **copies)  # type: ignore[arg-type]

    def add(self, terms: Tensor, rows: np.ndarray, places: np.ndarray, chunk: int) -> None:
        """Add the terms [B, P] of the examples `rows` [B], at `places` [B] of a chunk of so many.

        All is computed before anything is changed, so that running out of memory leaves the sums
        as they were.
        """
        heavy, heavy_rows = self.heavy, self.heavy_rows
        if len(heavy):
            every = torch.cat([heavy, terms])
            every_row = torch.cat([heavy_rows, to_device(torch.from_numpy(rows), terms.device)])
            heaviest = every.sum(1).topk(len(heavy)).indices
            heavy, heavy_rows = every[heaviest], every_row[heaviest]
        terms = terms.double()
        if len(self.pending):
            batches = places // BATCH_SIZE
            sizes = np.minimum(BATCH_SIZE, chunk - batches * BATCH_SIZE)
            shares = (np.arange(len(self.pending))[:, None] == batches) / sizes  # of the mean loss
            self.pending += to_device(torch.from_numpy(shares), terms.device) @ terms
        else:
            total, squares = terms.sum(0), terms.square_().sum(0)
            self.total += total
            self.squares += squares
        self.heavy, self.heavy_rows = heavy, heavy_rows
        self.done += len(places)

    def complete_batches(self) -> None:
        """Square and sum up the pending gradients, at the end of a chunk."""
        self.total += self.pending.square().sum(0)
        self.pending.zero_()


@dataclass(frozen=True)
class _Run:
    """The computation of a run: the terms of the examples `rows`, int64 [N], in this order."""

    sites: tuple[MaskSite, ...]
    loss: Loss
    rows: np.ndarray
    device: torch.device
    dtype: torch.dtype
    logits: int = 0  # logits of each labelled token, for generated texts
    recompute: bool = False
    heaviest: int = 0  # examples whose terms are held

    @property
    def layers(self) -> list[str]:
        """The paths of the layers that are computed again in the backward pass."""
        return sorted({site.layer for site in self.sites}) if self.recompute else []

    @property
    def nodes(self) -> int:
        return sum(site.nodes for site in self.sites)


def estimate(
    model: PreTrainedModel,
    examples: Examples,
    *,
    estimator: str,
    problem_type: LossName,
    samples: int | None = None,
    stratified: bool = False,
    seed: int = 0,
    part: tuple[int, int] = (1, 1),
    device: str = "auto",
    dtype: str = "auto",
    heaviest: int = 0,
    recompute: bool = False,
    progress: Callable[[int, int], None] | None = None,
    resume: PartialSums | None = None,
    save: Callable[[PartialSums], None] | None = None,
    save_seconds: float = 30.0,
) -> Estimate:
    """The diagonal Fisher information of the mask nodes of a Transformer with a classifier's head.

    Except for rounding, it does not depend on batch size or device. Batches are as large as memory
    allows. The model does not change.

    Args:
        estimator: one of `fmn.fisher.loss.ESTIMATORS`.
        samples: examples, drawn without replacement by `seed` (`stratified`: every label in its
            share); None or at least N: all, in file order.
        part: (i, n): the i-th of n parts of these examples alone (see `combined`).
        dtype: "float32", "float64", "bfloat16" (of matrix products; sums, normalisations and
            residuals stay in float32), "auto" (bfloat16 where the hardware multiplies it).
        heaviest: so many examples, those with the largest gradients, are computed again in float32.
            A few examples make up most of the sum of an expert that is sure of its answers.
            Not for the estimator "batch", nor for labels of tokens that are drawn.
        recompute: save memory at the price of time (`fmn.fisher.runner.recomputed`).
        progress: gets the number of examples done, and to do.
        resume: sums of a killed run with the same arguments, to go on from; on a CPU to the same
            bits as without a break.
        save: gets the sums every `save_seconds`.

    Raises:
        UserError: settings or labels that do not fit the model, an unknown architecture, or memory
            that does not suffice for one example.
    """
    loss = Loss(estimator, problem_type, seed)
    loss.check(examples.labels, outputs_of(model))
    rows = _part(select(examples.labels, samples, seed, stratified), part, estimator)
    target = resolve_device(device)
    logits = outputs_of(model) if model.can_generate() else 0
    compute_dtype = resolve_dtype(dtype, target)
    run = _Run(mask_sites(model), loss, rows, target, compute_dtype, logits, recompute, heaviest)
    sums, saved = resume.copy_to(target) if resume else _no_sums(run, examples), time.monotonic()
    for _ in _steps(model, examples, run, sums):
        if progress:
            progress(sums.done, len(rows))
        if save and time.monotonic() - saved >= save_seconds:
            save(sums.copy_to("cpu"))
            saved = time.monotonic()
    rounding = _replace_heaviest(model, examples, run, sums) if heaviest else None
    return replace(_summary(run, sums), rounding=rounding)


def _replace_heaviest(
    model: PreTrainedModel, examples: Examples, run: _Run, sums: PartialSums
) -> float | None:
    """Replace the terms of the heaviest examples by their terms in float32.

    Returns:
        the mean relative error that the other examples leave, if theirs is like that of the
        heaviest; None where it is unknown, as labels are drawn, and other logits draw other ones.
    """
    is_row = (sums.heavy_rows >= 0).cpu()
    rows, rough = sums.heavy_rows.cpu()[is_row].numpy(), sums.heavy[is_row].double()
    again = replace(run, rows=rows, dtype=torch.float32, heaviest=0)
    exact = _no_sums(again, examples)
    for _ in _steps(model, examples, again, exact):
        pass
    # The difference of sums may be a rounding error below zero.
    sums.total += exact.total - rough.sum(0)
    sums.total.clamp_(min=0)
    sums.squares += exact.squares - rough.square().sum(0)
    if run.loss.estimator == "sampled" and run.loss.problem_type != "embedding":
        return None
    positive = exact.total > 0
    if not positive.any():
        return 0.0
    error = (rough.sum(0)[positive] / exact.total[positive] - 1).abs().mean()
    return float(error * (1 - exact.total.sum() / sums.total.sum()).clamp(min=0))


def _steps(
    model: PreTrainedModel, examples: Examples, run: _Run, sums: PartialSums
) -> Iterator[None]:
    """Prepare the model, and add the examples that `sums` lacks; yields after every batch."""
    with (
        prepared(model, examples, run.device, run.dtype) as runner,
        shared_casts(runner),
        first_token_only(model, runner.logits, examples),
        recomputed(runner, run.layers),
    ):
        yield from _add_batches(runner, run, examples, sums)


def _part(rows: np.ndarray, part: tuple[int, int], estimator: str) -> np.ndarray:
    """The rows of a part, possibly none; batches of the estimator "batch" stay whole."""
    size = BATCH_SIZE if estimator == "batch" else 1
    number, parts = part
    start, end = (-(-len(rows) // size) * each // parts * size for each in (number - 1, number))
    return rows[start:end]


def combined(parts: Sequence[Estimate], estimator: str) -> Estimate:
    """The estimate from all examples, of the estimates from every part of them.

    Squared deviations from the mean add up as in Chan, Golub and LeVeque (1979), equation 2.1.
    """
    counts = [part.samples for part in parts]
    count, fisher, stderr = sum(counts), NodeValues(), NodeValues()
    for site in parts[0].fisher:
        values = np.array([part.fisher[site] for part in parts])  # [parts, nodes]
        if estimator == "batch":
            fisher[site] = values.sum(0)
            continue
        fisher[site] = mean = np.average(values, 0, counts)
        deviations = np.array(counts) @ (values - mean) ** 2
        for part in parts:
            if part.stderr:
                deviations += part.samples * (part.samples - 1) * part.stderr[site] ** 2
        stderr[site] = np.sqrt(deviations / max(count - 1, 1) / count)
    return Estimate(fisher, stderr if stderr and count > 1 else None, count)


def _add_batches(
    runner: Runner, run: _Run, examples: Examples, sums: PartialSums
) -> Iterator[None]:
    """Add the examples that `sums` does not have yet; yields after every batch."""
    for start in range(sums.done // CHUNK * CHUNK, len(run.rows), CHUNK):
        rows = run.rows[start : start + CHUNK]
        chunk = examples.take(rows)
        while (done := sums.done - start) < len(rows):
            multiple = multiple_of_widths(run.device)
            batch = next(by_length(chunk, sums.batch_tokens, done, multiple))
            try:
                terms = _terms(runner, run, batch, rows[batch.rows])
                sums.add(terms, rows[batch.rows], batch.rows, len(rows))
            except (MemoryError, RuntimeError) as error:
                sums.batch_tokens = halved(batch, error)
                continue
            if sums.done == start + len(rows):
                sums.complete_batches()
            yield


def _terms(runner: Runner, run: _Run, batch: Batch, rows: np.ndarray) -> Tensor:
    """The squared mask gradients of every example, [B, P], summed over the loss's directions; for
    "batch" the gradients themselves."""
    gradients = torch.zeros(len(rows), run.nodes, dtype=float_dtype(run.dtype), device=run.device)
    terms, tokens = torch.zeros_like(gradients), batch.tokens
    with torch.enable_grad(), _mask_gradients(runner.model, run.sites, gradients, tokens) as leaves:
        logits = runner.logits(batch)
        if not leaves:  # MRA without its kernels
            config = runner.model.config
            raise UserError(
                f"{config.name_or_path}: the attention of this {config.model_type} computes nothing"
                " on this device; take another, or a model of another architecture"
            )
        directions = run.loss.directions(logits, batch.labels, rows)
        # A copy of `leaves`: with `recompute`, the backward pass appends to it.
        for _ in backward_passes(logits, tuple(leaves), directions):
            if run.loss.estimator == "batch":
                return gradients
            terms.addcmul_(gradients, gradients)
            gradients.zero_()
    return terms


class _Watched(torch.autograd.Function):
    """The identity; the backward pass calls a function with the activation and its gradient.

    Autograd saves the activation, so with `recompute` it is not held between the passes.
    """

    @staticmethod
    def forward(ctx: Any, activation: Tensor, function: Callable[[Tensor, Tensor], None]) -> Tensor:
        ctx.save_for_backward(activation)
        ctx.function = function
        return activation.view_as(activation)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        ctx.function(*ctx.saved_tensors, gradient)
        return gradient, None


@contextmanager
def _mask_gradients(
    model: PreTrainedModel, sites: Sequence[MaskSite], gradients: Tensor, tokens: int
) -> Iterator[list[Tensor]]:
    """Add dL/dm of every example to `gradients` [B, P] in a backward pass to the leaves.

    Args:
        tokens: of each example of the batch, T.

    The leaves, which are known after the forward pass, are the lowest activations: nothing below
    them is differentiated. A module that several layers share adds up its gradients.
    """
    leaves: list[Tensor] = []

    def watch(
        site: MaskSite, columns: Tensor, _module: nn.Module, args: tuple[Any, ...]
    ) -> tuple[Any, ...]:
        activation = args[0]  # [B, T, nodes * channels]; of OPT's neurons [B * T, nodes]
        is_flat = activation.shape[:-1] == (len(gradients) * tokens,)
        if not is_flat and (activation.ndim != 3 or len(activation) != len(gradients)):
            raise UserError(
                f"{site.module} gets {list(activation.shape)} activations, not [examples, "
                "positions, channels]; load the model with attn_implementation sdpa or eager, "
                "which do not pack examples together"
            )
        if not activation.requires_grad:
            activation = activation.detach().requires_grad_()
            leaves.append(activation)

        def add(activation: Tensor, gradient: Tensor) -> None:
            # [B, T, nodes * channels] -> [B, nodes * channels] -> [B, nodes]
            product = activation * gradient
            product = product.reshape(len(gradients), -1, site.nodes * site.channels)
            summed = product.sum(1).view(-1, site.nodes, site.channels)
            of_nodes = summed.sum(2, dtype=gradients.dtype)
            columns.add_(of_nodes.to(columns.device, non_blocking=True))  # maybe another device

        watched: Tensor = _Watched.apply(activation, add)  # type: ignore[no-untyped-call]
        return (watched, *args[1:])

    columns = torch.split(gradients, [site.nodes for site in sites], dim=1)
    with hooked(
        (model.get_submodule(site.module), partial(watch, site, own))
        for site, own in zip(sites, columns, strict=True)
    ):
        yield leaves


def _no_sums(run: _Run, examples: Examples) -> PartialSums:
    batches = CHUNK // BATCH_SIZE if run.loss.estimator == "batch" else 0
    zeros = partial(torch.zeros, dtype=torch.float64, device=run.device)
    tokens = _tokens_that_fit(run, examples)
    heavy = torch.zeros(run.heaviest, run.nodes, dtype=float_dtype(run.dtype), device=run.device)
    none = torch.full((run.heaviest,), -1, device=run.device)
    sums = (zeros(run.nodes), zeros(run.nodes), zeros(batches, run.nodes), heavy, none)
    return PartialSums(*sums, 0, tokens)


def _tokens_that_fit(run: _Run, examples: Examples) -> int:
    """Tokens of a batch that fit the free memory: a power of two, so that it rarely changes.

    For each token, an attention keeps up to 8 values per channel and 2 per head and position, a
    feed-forward block 3 per neuron, and the loss of generated text 3 per logit.
    """
    lengths = examples.lengths[run.rows]
    longest, by_layer, read = int(lengths.max(initial=1)), defaultdict[str, int](int), 0
    for site in run.sites:
        is_neuron = site.site.node == "neuron"
        positions = 2 * longest if run.device.type == "cpu" else 0  # sdpa keeps no products
        by_layer[site.layer] += site.nodes * (3 if is_neuron else 8 * site.channels + positions)
        read += (
            0 if is_neuron else site.nodes * site.channels
        )  # about as wide as what a layer reads
    values = float(max(by_layer.values()) + read if run.recompute else sum(by_layer.values()))
    if run.logits:
        labelled = (examples.labels[run.rows] != IGNORED).sum(1)
        values += 3 * run.logits * float((labelled / np.maximum(lengths, 1)).max(initial=0))
    # For bfloat16 too: its activations are kept beside their casts.
    fitting = free_memory(run.device) / 2 / (float_dtype(run.dtype).itemsize * values)
    return min(1 << (max(int(fitting), 1).bit_length() - 1), max_batch_tokens(run.device))


def _summary(run: _Run, sums: PartialSums) -> Estimate:
    ends = np.cumsum([site.nodes for site in run.sites])[:-1]

    def by_site(values: np.ndarray) -> NodeValues:
        return dict(zip((s.site for s in run.sites), np.split(values, ends), strict=True))

    total, squares, count = sums.total.cpu().numpy(), sums.squares.cpu().numpy(), sums.done
    if run.loss.estimator == "batch":
        return Estimate(by_site(total), None, count)
    mean = total / max(count, 1)
    if count < 2:
        return Estimate(by_site(mean), None, count)
    stderr = np.sqrt(np.maximum(squares - count * mean**2, 0) / (count - 1) / count)
    return Estimate(by_site(mean), by_site(stderr), count)
