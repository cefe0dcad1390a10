"""The Fisher information of mask nodes, exact for every example, for a forward pass and half a backward pass.

A mask node is 1 and multiplies a head's context vector before the attention output projection, or an intermediate
activation before the feed-forward down projection (arXiv 2403.09891, section 3; Kwon et al., arXiv 2204.09656).
So no mask is ever applied: with `a` the input of the projection, the chain rule gives

    dL/dm = sum over positions (and the channels of the head) of a * dL/da,

for every example of a batch separately, from one backward pass without weight gradients, which stops at the lowest
layer's attention output projection.
"""

import hashlib
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, fields
from functools import partial
from itertools import chain, pairwise
from typing import Any, Literal

import numpy as np
import torch
from scipy.stats import spearmanr
from torch import Tensor, nn
from torch.func import functional_call
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from fmn.errors import UserError
from fmn.fisher.architectures import MaskSite, NodeValues, Site, mask_sites
from fmn.models.devices import autocast, free_memory, resolve_device, resolve_dtype
from fmn.tasks.batches import Batch, Examples, by_length, halved, random_order, select

ESTIMATORS = ("empirical", "expected", "sampled", "batch")

GROUP = 32
"""Examples in a batch of the `batch` estimator, as in the released code."""

ENOUGH_CORRELATION, ENOUGH_ERROR = 0.95, 0.10
"""`samples="auto"` stops when the Fisher information of the two halves of the sample ranks the nodes alike (Spearman's
correlation, the least over the kinds of nodes, is at least the first) and the standard error of a node is, in the mean
over nodes, at most the second part of its value. `batch` has no standard error: there the first suffices."""

_FIRST_LOOK = (
    256  # examples before `auto` first asks whether that holds; then whenever they have doubled
)
_CHUNK = 4096  # examples that are sorted by length together; a multiple of GROUP
_MOST_TOKENS = {"cpu": 2048, "cuda": 32768}  # of a batch: larger ones are no faster


@dataclass(frozen=True)
class State:
    """The partial sums of a run over P nodes: `numpy.savez(file, **state.arrays())` keeps it whole."""

    settings: str  # JSON: what the run was asked for; only the same run continues a state
    sums: (
        np.ndarray
    )  # float64 [2, P]: of the squared gradients, over the even and the odd places of the sample
    squares: np.ndarray  # float64 [P]: of the squares of the squared gradients
    pending: (
        np.ndarray
    )  # float64 [G, P]: gradients of the batches that are not whole yet; [0, P] but for `batch`
    done: np.ndarray  # int64 []: examples taken in
    tokens: np.ndarray  # int64 []: of a batch, at most

    def arrays(self) -> dict[str, Any]:
        return {field.name: np.asarray(getattr(self, field.name)) for field in fields(self)}

    @staticmethod
    def from_arrays(arrays: Mapping[str, np.ndarray]) -> "State":
        found: dict[str, Any] = {field.name: arrays[field.name] for field in fields(State)}
        return State(**{**found, "settings": str(found["settings"])})


@dataclass(frozen=True)
class Estimate:
    """The Fisher information of every mask node and how certain it is.

    `fisher`: mean over examples of the squared mask gradient; for `batch` the sum over batches.
    `stderr`: standard error of that mean (NaN for a single example); None for `batch`.
    `relative_error`: mean of stderr / fisher over the nodes.
    `correlation`: Spearman's, between the Fisher information of the even and of the odd examples (for `batch`: batches)
    of the sample, the least over the kinds of nodes. Both are None where undefined.
    `converged`: the rule of `samples="auto"` holds.
    """

    fisher: NodeValues
    stderr: NodeValues | None
    samples: int
    relative_error: float | None
    correlation: float | None
    converged: bool
    device: str
    dtype: str


def estimate(
    model: PreTrainedModel,
    examples: Examples,
    *,
    estimator: str,
    regression: bool,
    samples: int | Literal["auto"] | None = None,
    stratified: bool = False,
    seed: int = 0,
    part: tuple[int, int] = (0, 1),
    device: str = "auto",
    dtype: str = "auto",
    progress: Callable[[int, int], None] | None = None,
    state: State | None = None,
    save: Callable[[State], None] | None = None,
    save_seconds: float = 30.0,
) -> Estimate:
    """The diagonal Fisher information of the mask nodes of `model`, a Transformer with a classification head.

    `estimator`, with m the masks and p the model's distribution over the classes:
    - "empirical": (dL/dm)^2, L the cross entropy of the label, or the squared error under `regression`.
    - "expected": sum_c p_c (d log p_c/dm)^2, exact; under `regression` that of a unit-variance Gaussian, (dy/dm)^2.
    - "sampled": (d log p_c/dm)^2 for one c drawn from p by `seed` and the example's row.
    - "batch": the squared gradient of the mean loss of GROUP consecutive examples, summed: the released code's.

    `samples`: how many examples, drawn without replacement by `seed` (`stratified`: by label); None or at least N:
    every row once, in file order; "auto": in random order until the result is certain enough (see ENOUGH_ERROR) or
    the rows run out.
    `part` (i, n): only the i-th of n parts of the sample; `combine` adds the states that the parts end with.
    `device`: "auto" (CUDA where there is a GPU), "cpu", "cuda", "cuda:1".
    `dtype`: "auto" (bfloat16 on GPUs and on CPUs with instructions for it, else float32), "float32", "bfloat16",
    "float64". bfloat16 is that of autocast: sums, normalisations and residuals stay in float32.
    `save` gets the state every `save_seconds` and at the end; with such a `state` the run goes on from there, and on a
    CPU gives the same bits as a run without a break. A state of other settings or another sample is left unused; that
    model and texts are the same is the caller's to see to.
    `progress` gets the number of examples taken in and to be taken in.

    The result does not depend on batch size, device or number of parts, but for rounding. Batches are as large as free
    memory allows; running out of it halves them. The model is left as it was.
    Raises UserError for settings and architectures that are unknown, and where memory does not suffice for one example.
    """
    if estimator not in ESTIMATORS:
        raise UserError(
            f"estimator {estimator!r} is unknown: choose one of {', '.join(ESTIMATORS)}"
        )
    if samples == "auto" and part != (0, 1):
        raise UserError(
            'samples="auto" cannot be split into parts: the number of examples is not known beforehand'
        )
    sites = mask_sites(model)
    where = resolve_device(device)
    precision = resolve_dtype(dtype, where)
    _check_labels(model, examples, estimator, regression)
    if auto := samples == "auto":
        rows = random_order(examples.labels, seed, stratified)
    else:
        rows = select(examples.labels, None if samples is None else samples, seed, stratified)
    first, last = _share(len(rows), part)
    settings = json.dumps(
        {
            "sites": [(*site.site, site.nodes) for site in sites],
            "estimator": estimator,
            "regression": regression,
            "seed": seed,
            "auto": auto,
            "device": where.type,
            "dtype": str(precision).removeprefix("torch."),
            "samples": len(rows),
            "sample": _digest(rows, examples.labels, examples.lengths),
            "part": part,
        }
    )
    if state is None or state.settings != settings:
        state = _nothing_yet(
            settings,
            sites,
            estimator,
            _token_budget(sites, examples.lengths[rows], where, precision),
        )
    sums = _Sums(state, where)
    saved = time.monotonic()
    with prepared(model, examples, where, precision) as runner:
        for start, stop in pairwise(_cuts(first, last, auto)):
            if first + sums.done >= stop:
                continue
            if auto and 0 < sums.done == start and summarise(sums.state()).converged:
                break
            chunk = examples.take(rows[start:stop])
            while first + sums.done < stop:
                batch = next(by_length(chunk, tokens=sums.tokens, start=first + sums.done - start))
                draws = draws_of(seed, rows[start + batch.rows]) if estimator == "sampled" else None
                try:
                    found = _per_example(runner, sites, batch, draws, estimator, regression)
                    sums.add(found, batch.rows, stop - start)
                except (MemoryError, RuntimeError) as error:
                    sums.tokens = halved(batch, error)
                    continue
                if first + sums.done == stop:
                    sums.close()
                if progress:
                    progress(sums.done, last - first)
                if save and time.monotonic() - saved >= save_seconds:
                    save(sums.state())
                    saved = time.monotonic()
        end = sums.state()
    if save:
        save(end)
    return summarise(end)


def combine(states: Sequence[State]) -> State:
    """The state of the whole sample from those of all its parts, in any order. Raises UserError if one is missing."""
    asked = [json.loads(state.settings) for state in states]
    parts = sorted(tuple(settings.pop("part")) for settings in asked)
    whole = parts == [(i, len(parts)) for i in range(len(parts))] and all(
        other == asked[0] for other in asked
    )
    if not states or not whole or sum(int(state.done) for state in states) != asked[0]["samples"]:
        raise UserError(
            f"parts {parts} are not all the parts of one run: estimate every part (i, n), to its end and alike"
        )
    first = states[0]
    return State(
        settings=json.dumps({**asked[0], "part": (0, 1)}),
        sums=np.sum([state.sums for state in states], axis=0),
        squares=np.sum([state.squares for state in states], axis=0),
        pending=np.zeros_like(first.pending),
        done=np.sum([state.done for state in states]),
        tokens=first.tokens,
    )


def summarise(state: State) -> Estimate:
    """The estimate that partial sums amount to."""
    settings = json.loads(state.settings)
    layout = [(Site(layer, node), nodes) for layer, node, nodes in settings["sites"]]
    samples = int(state.done)
    total = state.sums.sum(axis=0)
    correlation = _half_correlation(state.sums, layout)
    stderr = relative_error = None
    if settings["estimator"] == "batch":
        fisher = total
        certain = correlation is not None
    else:
        fisher = total / max(samples, 1)  # a part of a small sample may be empty
        spread = np.maximum(state.squares - samples * fisher**2, 0)
        stderr = (
            np.sqrt(spread / (samples - 1) / samples)
            if samples > 1
            else np.full_like(fisher, np.nan)
        )
        positive = fisher > 0
        relative_error = (
            float(np.mean(stderr[positive] / fisher[positive]))
            if samples > 1 and positive.any()
            else None
        )
        certain = relative_error is not None and relative_error <= ENOUGH_ERROR
    return Estimate(
        fisher=_by_site(fisher, layout),
        stderr=None if stderr is None else _by_site(stderr, layout),
        samples=samples,
        relative_error=relative_error,
        correlation=correlation,
        converged=certain and correlation is not None and correlation >= ENOUGH_CORRELATION,
        device=settings["device"],
        dtype=settings["dtype"],
    )


@dataclass(frozen=True)
class Runner:
    """A model made ready to run: `tensors` stand in for its parameters and buffers."""

    model: PreTrainedModel
    tensors: Mapping[str, Tensor]
    where: torch.device
    precision: torch.dtype

    def logits(self, batch: Batch) -> Tensor:
        """[B, C]."""
        floats = _float(self.precision)
        inputs = {
            name: _place(tensor, self.where, floats if tensor.is_floating_point() else tensor.dtype)
            for name, tensor in batch.inputs.items()
        }
        with autocast(self.where, self.precision):
            found: Tensor = functional_call(self.model, dict(self.tensors), (), inputs).logits
        return found


@contextmanager
def prepared(
    model: PreTrainedModel, examples: Examples, where: torch.device, precision: torch.dtype
) -> Iterator[Runner]:
    """The model in evaluation mode, without a cache, with its tensors on the device; afterwards as it was.

    For bfloat16 the encoder's matrices are cast here, once: autocast would cast them again in every pass. The head
    stays in float32, as logits rounded to bfloat16 would blur the probabilities of confident models.
    """
    linear = {
        path: module
        for path, module in model.named_modules()
        if isinstance(module, (nn.Linear, Conv1D))
    }
    encoder = {path for path in linear if path.startswith(f"{model.base_model_prefix}.")}
    matrices = {
        f"{path}.{name}"
        for path in encoder
        if precision == torch.bfloat16
        for name, _ in linear[path].named_parameters(recurse=False)
    }
    tensors = {}
    for name, tensor in chain(model.named_parameters(), model.named_buffers()):
        kind = torch.bfloat16 if name in matrices else _float(precision)
        tensors[name] = tensor.detach().to(
            where, kind if tensor.is_floating_point() else tensor.dtype
        )
    training = [module for module in model.modules() if module.training]
    config = model.config
    attention = config._attn_implementation
    settings = {
        name: getattr(config, name)
        for name in ("use_cache", "pad_token_id")
        if hasattr(config, name)
    }
    model.eval()
    try:
        if (
            where.type == "cpu" and attention == "sdpa"
        ):  # whose backward pass is slow there: half the speed in bfloat16
            model.set_attn_implementation("eager")
        if settings.get("use_cache"):
            config.use_cache = False
        if (
            settings.get("pad_token_id", 0) is None
        ):  # decoders look for the last token that is no padding
            config.pad_token_id = examples.pad.get("input_ids")
        with ExitStack() as hooks:
            for path in linear.keys() - encoder:
                hooks.enter_context(_without_autocast(linear[path], where))
            yield Runner(model, tensors, where, precision)
    finally:
        if config._attn_implementation != attention:
            model.set_attn_implementation(attention)
        for name, value in settings.items():
            setattr(config, name, value)
        for module in training:
            module.training = True


@contextmanager
def _without_autocast(module: nn.Module, where: torch.device) -> Iterator[None]:
    """The module computes in the number format of its weights."""
    off = ExitStack()

    def enter(_module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        off.enter_context(torch.autocast(where.type, enabled=False))
        return tuple(
            tensor.float() if tensor.dtype == torch.bfloat16 else tensor for tensor in args
        )

    def leave(_module: nn.Module, _args: object, _output: object) -> None:
        off.close()

    handles = (
        module.register_forward_pre_hook(enter),
        module.register_forward_hook(leave, always_call=True),
    )
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _place(tensor: Tensor, where: torch.device, dtype: torch.dtype) -> Tensor:
    """The tensor on the device; the copy does not wait for the work that is queued there."""
    if where.type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(where, dtype, non_blocking=True)


def _per_example(
    runner: Runner,
    sites: Sequence[MaskSite],
    batch: Batch,
    draws: np.ndarray | None,
    estimator: str,
    regression: bool,
) -> Tensor:
    """The estimator's term of every example, [B, P]: squared gradients; for `batch` the gradients themselves."""
    kind = _float(runner.precision)
    gradients = torch.zeros(len(batch.rows), _nodes(sites), dtype=kind, device=runner.where)
    with torch.enable_grad(), _tapped(runner.model, sites, gradients) as leaves:
        logits = runner.logits(batch)
        directions = directions_of(runner, logits, batch, draws, estimator, regression)
        found = torch.zeros_like(gradients)
        for i, direction in enumerate(directions):
            gradients.zero_()
            torch.autograd.grad(
                logits, leaves, direction.to(logits.dtype), retain_graph=i + 1 < len(directions)
            )
            if estimator == "batch":
                return gradients
            found.addcmul_(gradients, gradients)
    return found


@contextmanager
def _tapped(
    model: PreTrainedModel, sites: Sequence[MaskSite], gradients: Tensor
) -> Iterator[list[Tensor]]:
    """Hooks that add dL/dm of every example to `gradients` [B, P] in a backward pass to the leaves that it yields.

    The leaves are the lowest activations: nothing below them is differentiated. They are known after the forward pass.
    A shared module adds up the gradients of its repeats.
    """
    leaves: list[Tensor] = []

    def tap(
        column: int, site: MaskSite, module: nn.Module, args: tuple[Any, ...]
    ) -> tuple[Any, ...]:
        activation = args[0]
        if activation.ndim != 3 or len(activation) != len(gradients):
            raise UserError(
                f"{site.module} gets {list(activation.shape)} activations, not [examples, positions, channels]: "
                "load the model with attn_implementation sdpa or eager, which do not pack examples together"
            )
        if not activation.requires_grad:
            activation = activation.detach().requires_grad_()
            leaves.append(activation)
        value = activation.detach()  # holding the activation itself would be a reference cycle
        target = gradients[:, column : column + site.nodes]

        def add(gradient: Tensor) -> None:
            summed = (value * gradient).sum(
                1, dtype=gradients.dtype
            )  # [B, T, nodes * channels] -> [B, nodes * channels]
            target.add_(summed.view(-1, site.nodes, site.channels).sum(2))

        activation.register_hook(add)
        return (activation, *args[1:])

    column = 0
    handles = []
    for site in sites:
        hook = partial(tap, column, site)
        handles.append(model.get_submodule(site.module).register_forward_pre_hook(hook))
        column += site.nodes
    try:
        yield leaves
    finally:
        for handle in handles:
            handle.remove()


def directions_of(
    runner: Runner,
    logits: Tensor,
    batch: Batch,
    draws: np.ndarray | None,
    estimator: str,
    regression: bool,
) -> list[Tensor]:
    """Vectors [B, C] at the logits of a batch: the estimator sums the squares of the gradients of direction . logits.

    `draws` [B], of "sampled" alone: from `draws_of`.
    """
    kind = _float(runner.precision)
    labels = _place(batch.labels, runner.where, kind if regression else torch.int64)
    uniform = None if draws is None else _place(torch.from_numpy(draws), runner.where, kind)
    return _directions(logits.detach().to(kind), labels, uniform, estimator, regression)


def _directions(
    logits: Tensor, labels: Tensor, uniform: Tensor | None, estimator: str, regression: bool
) -> list[Tensor]:
    """Vectors [B, C]: the estimator sums the squares of the gradients of direction . logits over them.

    For classes d log p_c / d logits = e_c - p, and `expected` needs vectors v_k with
    sum_k v_k v_k^T = diag(p) - p p^T: the columns of its Cholesky factor. With the tails s_k = p_k + ... + p_C,
    v_k[k] = sqrt(p_k s_{k+1} / s_k) and v_k[j] = -v_k[k] p_j / s_{k+1} for j > k. In logarithms nothing cancels.
    """
    if regression:
        if estimator == "expected":
            return [torch.ones_like(logits)]
        if uniform is not None:  # the label is drawn from N(y, 1), and log p = -(label - y)^2 / 2
            return [torch.special.ndtri(uniform)[:, None]]
        return [2 * (logits - labels[:, None])]
    log_p = logits.log_softmax(1)
    if estimator == "expected":
        tails = log_p.flip(1).logcumsumexp(1).flip(1)  # [B, C]: log s_k
        directions = []
        for k in range(log_p.shape[1] - 1):
            pivot = (0.5 * (log_p[:, k] + tails[:, k + 1] - tails[:, k])).exp()[:, None]  # [B, 1]
            rest = -pivot * (log_p[:, k + 1 :] - tails[:, k + 1, None]).exp()  # [B, C - k - 1]
            directions.append(torch.cat([torch.zeros_like(log_p[:, :k]), pivot, rest], 1))
        return directions
    p = log_p.exp()
    if uniform is not None:
        labels = (p.cumsum(1) < uniform[:, None]).sum(1).clamp(max=p.shape[1] - 1)
    return [p.scatter_add(1, labels[:, None], -torch.ones_like(p[:, :1]))]


def draws_of(seed: int, rows: np.ndarray) -> np.ndarray:
    """A number in (0, 1) for each row, float64 [B], that depends on nothing else but the seed (SplitMix64)."""
    z = rows.astype(np.uint64) + np.uint64(1)
    for salt in (np.uint64(seed % 2**64), np.uint64(0)):
        z = (z ^ salt) * np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        z = z ^ (z >> np.uint64(31))
    return (z >> np.uint64(11)).astype(np.float64) * 2.0**-53 + 2.0**-54


class _Sums:
    """A state on the device that adds to itself, in float64. Nothing is copied back until `state` is called."""

    def __init__(self, state: State, where: torch.device) -> None:
        self.settings = state.settings
        self.sums = torch.tensor(state.sums, device=where)
        self.squares = torch.tensor(state.squares, device=where)
        self.pending = torch.tensor(state.pending, device=where)
        self.done = int(state.done)
        self.tokens = int(state.tokens)

    def add(self, found: Tensor, places: np.ndarray, chunk: int) -> None:
        """Takes in the terms [B, P] of the examples at `places` of a chunk of so many examples.

        Sums over examples are products with a matrix of few rows: unlike scattered additions always in the same order.
        All is computed before anything is changed, so that running out of memory leaves the sums whole.
        """
        terms = found.double()
        if len(self.pending):
            groups = places // GROUP
            share = np.zeros((len(self.pending), len(places)))
            share[groups, np.arange(len(places))] = 1 / np.minimum(
                GROUP, chunk - groups * GROUP
            )  # of the mean loss
            self.pending += (
                _place(torch.from_numpy(share), found.device, torch.float64) @ terms
            )  # [G, B] @ [B, P]
        else:
            halves = np.stack([places % 2 == 0, places % 2 == 1]).astype(np.float64)
            sums = (
                _place(torch.from_numpy(halves), found.device, torch.float64) @ terms
            )  # [2, B] @ [B, P]
            squares = terms.square_().sum(0)
            self.sums += sums
            self.squares += squares
        self.done += len(places)

    def close(self) -> None:
        """At the end of a chunk its batches of GROUP are whole: their squares are summed."""
        for group, gradients in enumerate(self.pending):
            self.sums[group % 2] += gradients.square()
        self.pending.zero_()

    def state(self) -> State:
        sums, squares, pending = (
            tensor.cpu().numpy().copy() for tensor in (self.sums, self.squares, self.pending)
        )
        return State(
            self.settings, sums, squares, pending, np.asarray(self.done), np.asarray(self.tokens)
        )


# ---- settings ----


def _nodes(sites: Sequence[MaskSite]) -> int:
    return sum(site.nodes for site in sites)


def _float(precision: torch.dtype) -> torch.dtype:
    """Of weights, sums and logits; the matrix products of bfloat16 alone are narrower."""
    return torch.float64 if precision == torch.float64 else torch.float32


def _check_labels(
    model: PreTrainedModel, examples: Examples, estimator: str, regression: bool
) -> None:
    """Finds at once what would otherwise fail, or be nonsense, after hours."""
    outputs = int(model.config.num_labels)
    if not len(examples):
        raise UserError("there are no examples to estimate the Fisher information from")
    if regression != (outputs == 1):
        kind = (
            "regression needs one output"
            if regression
            else "classification needs two outputs or more"
        )
        raise UserError(f"the model's head has {outputs} outputs, but {kind}")
    if estimator in ("empirical", "batch") and not regression:
        labels = examples.labels
        if labels.min() < 0 or labels.max() >= outputs:
            raise UserError(
                f"labels run from {labels.min()} to {labels.max()}, but the model has {outputs} classes: "
                f"estimator {estimator!r} needs labelled examples (the train or validation split)"
            )


def _share(total: int, part: tuple[int, int]) -> tuple[int, int]:
    """The places of a part of the sample; every part but the last has whole batches of GROUP."""
    index, parts = part
    if not 0 <= index < parts:
        raise UserError(f"part {index} of {parts} does not exist: the parts are 0 to {parts - 1}")
    groups = -(-total // GROUP)
    return min(total, groups * index // parts * GROUP), min(
        total, groups * (index + 1) // parts * GROUP
    )


def _cuts(first: int, last: int, auto: bool) -> list[int]:
    """The places where chunks begin and end; under `auto` the sample doubles up to a chunk, from a small start."""
    cuts = [first]
    while cuts[-1] < last:
        step = min(max(cuts[-1], _FIRST_LOOK), _CHUNK) if auto else _CHUNK
        cuts.append(min(cuts[-1] + step, last))
    return cuts


def _nothing_yet(settings: str, sites: Sequence[MaskSite], estimator: str, tokens: int) -> State:
    groups = _CHUNK // GROUP if estimator == "batch" else 0
    nodes = _nodes(sites)
    return State(
        settings,
        np.zeros((2, nodes)),
        np.zeros(nodes),
        np.zeros((groups, nodes)),
        np.asarray(0),
        np.asarray(tokens),
    )


def _digest(*arrays: np.ndarray) -> str:
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


def _by_site(values: np.ndarray, layout: Sequence[tuple[Site, int]]) -> NodeValues:
    ends = np.cumsum([nodes for _, nodes in layout])
    return dict(zip((site for site, _ in layout), np.split(values, ends[:-1]), strict=True))


def _half_correlation(halves: np.ndarray, layout: Sequence[tuple[Site, int]]) -> float | None:
    """Spearman's between the halves [2, P], the least over the kinds of nodes; None where it is not defined."""
    kinds = np.concatenate([np.full(nodes, site.node) for site, nodes in layout])
    found = []
    for kind in np.unique(kinds):
        one, other = halves[:, kinds == kind]
        if np.ptp(one) == 0 or np.ptp(other) == 0:
            return None
        found.append(float(spearmanr(one, other).statistic))
    return min(found)


# ---- memory ----


def _token_budget(
    sites: Sequence[MaskSite], lengths: np.ndarray, where: torch.device, precision: torch.dtype
) -> int:
    """Tokens of a batch (padding included) that surely fit the free memory: a power of two, so that it seldom changes.

    For each token an attention keeps up to 8 values a channel and 2 a head and position, a feed-forward block 3 a
    neuron; the terms of an example take 6 values a node.
    """
    size = _float(precision).itemsize  # bfloat16 too: its activations are kept beside their casts
    floats = 0.0
    for site in sites:
        if site.site.node == "neuron":
            floats += 3 * site.nodes
        else:
            floats += 8 * site.nodes * site.channels + 2 * site.nodes * int(lengths.max())
    floats += 6 * _nodes(sites) / max(float(lengths.mean()), 1)
    fitting = max(int(free_memory(where) / 2 / (size * floats)), 1)
    return min(1 << (fitting.bit_length() - 1), _MOST_TOKENS.get(where.type, _MOST_TOKENS["cpu"]))
