"""A merged encoder calibrated layer by layer: each linear map regressed on what the experts give.

A merged layer reads other states than the expert's layers do, and answers with an average of them.
For texts x without labels let h_j(x) be what a linear map of the merged model reads of task j, and
y_j(x) what the expert's map gives in the expert. From the first layer to the last, and in the order
in which a layer computes its maps, the map W is moved to

    min over W' of   sum_j d_j E_x |W' h_j(x) + b - y_j(x)|^2  +  rho |W' - W|^2
    W' = W + (sum_j d_j E[r_j h_j^T]) (sum_j d_j E[h_j h_j^T] + rho I)^-1,   r_j = y_j - (W h_j + b)

d_j is one over the Frobenius norm of E[h_j h_j^T], so that no task counts for its large states
alone, and rho is `ridge` times the mean diagonal entry of the sum, so that `ridge` has no unit. The
states h_j are those of the maps that were moved before, so that a map makes up for what the maps
below it still lack. Biases, normalisations and embeddings stay.

With the target "weights", r_j = (W_j - W) h_j: that is RegMean++ (arXiv 2508.03121), up to d_j and
rho.

One layer's states of all texts are held at a time: 2 * 4 bytes * tokens * width.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from fmn.errors import UserError
from fmn.fisher.architectures import mask_sites
from fmn.merge.stages import CalibrationSettings
from fmn.models.devices import autocast, placed, resolve_device, resolve_dtype
from fmn.store.stage import Progress, no_progress
from fmn.tasks.batches import Examples, by_length

LINEAR = (nn.Linear, Conv1D)
TOKENS = 2048  # of a batch on a CPU; a GPU takes 16 times as many

Call = tuple[tuple[Any, ...], dict[str, Any]]
"""What a layer is called with, but for the states that it changes."""


class _Reached(Exception):  # noqa: N818 - no error: the rest of a layer is not needed
    """Ends a layer's forward pass once the maps have been computed."""


@dataclass
class _Batch:
    """A batch of one task's texts on its way through a model.

    Attributes:
        states: what the next layer reads, [B, T, width].
        calls: what else each layer is called with.
        is_token: [B * T], the positions that are no padding; None: all.
    """

    states: Tensor
    calls: list[Call]
    is_token: Tensor | None
    weights: Any = None


WEIGHTS = None
NORM = "frobenius"
ALPHA = 1.0


@dataclass(frozen=True)
class _Side:
    """A model, its layers, and the batches of each task on their way through it."""

    model: nn.Module
    layers: list[nn.Module]
    batches: dict[str, list[_Batch]]


def calibrated_encoder(
    experts: Mapping[str, PreTrainedModel],
    encoder: Mapping[str, Tensor],
    examples: Mapping[str, Examples],
    *,
    settings: CalibrationSettings,
    device: str = "auto",
    dtype: str = "auto",
    progress: Progress = no_progress,
) -> tuple[dict[str, Tensor], dict[str, tuple[float, float]]]:
    """Calibrate a merged encoder towards the experts on unlabeled texts.

    Args:
        experts: by task.
        encoder: the merged encoder's tensors by names in the base model.
        examples: texts by task; labels are not read.
        device, dtype: as for `fmn.models.predict.predict`; sums are float32, solved in float64.
        progress: called with the layers done and all of them.

    Returns:
        the encoder's tensors, and by task the mean squared difference of the last layer's states
        from the expert's over the variance of the expert's, before and after.

    Raises:
        UserError: the architecture's layers are not computed one after another, once each.
    """
    target = resolve_device(device)
    compute_dtype = resolve_dtype(dtype, target)
    first = next(iter(experts.values()))
    paths = layer_paths(first)
    merged = deepcopy(first.base_model)
    merged.load_state_dict(dict(encoder), strict=False)
    with ExitStack() as stack:
        for model in (merged, *(expert.base_model for expert in experts.values())):
            model.eval()
            stack.enter_context(placed(model, target, compute_dtype))
        stack.enter_context(torch.inference_mode())
        stack.enter_context(autocast(target, compute_dtype))
        ours = _Side(merged, _layers(merged, paths), {})
        theirs = {}
        for task, expert in experts.items():
            base = expert.base_model
            ours.batches[task] = list(_embedded(merged, ours.layers, examples[task], target))
            layers = _layers(base, paths)
            batches = list(_embedded(base, layers, examples[task], target))
            theirs[task] = _Side(base, layers, {task: batches})
            if WEIGHTS is not None:
                for b, w in zip(
                    batches, WEIGHTS(task, expert, layers, examples[task]), strict=True
                ):
                    b.weights = w
        for number in range(len(paths)):
            _calibrate_layer(number, ours, theirs, settings)
            progress(number + 1, len(paths))
        errors = {
            task: (0.0, _error(ours.batches[task], theirs[task].batches[task])) for task in experts
        }
    state = merged.state_dict()
    return {name: state[name].to(tensor.dtype).cpu() for name, tensor in encoder.items()}, errors


def layer_paths(model: PreTrainedModel) -> list[str]:
    """The paths of a model's layers below its base model, in the order of computation.

    Raises:
        UserError: layers are shared or are those of an encoder and a decoder.
    """
    prefix = f"{model.base_model_prefix}."
    sites = mask_sites(model)
    if getattr(model.config, "is_encoder_decoder", False) or model.config.model_type == "albert":
        raise UserError(
            f"a {model.config.model_type} cannot be calibrated: its layers are not computed one"
            " after another, once each; leave out `calibrate`"
        )
    return list(dict.fromkeys(site.layer.removeprefix(prefix) for site in sites))


def _layers(model: nn.Module, paths: Sequence[str]) -> list[nn.Module]:
    return [model.get_submodule(path) for path in paths]


def _embedded(
    model: nn.Module, layers: Sequence[nn.Module], examples: Examples, device: torch.device
) -> Iterator[_Batch]:
    """The batches of some texts before the first layer."""
    tokens = TOKENS if device.type == "cpu" else 16 * TOKENS
    lengths: list[int] = []
    for batch in by_length(examples, tokens=tokens):
        inputs = {name: value.to(device) for name, value in batch.inputs.items()}
        if not lengths:
            lengths = _output_lengths(model, layers, {n: v[:1] for n, v in inputs.items()})
        calls: list[Call] = []
        states: list[Tensor] = []
        with ExitStack() as restored:
            for layer, length in zip(layers, lengths, strict=True):

                def forward(
                    *args: Any, length: int = length, **kwargs: Any
                ) -> Tensor | tuple[Any, ...]:
                    hidden, call = _split(args, kwargs)
                    states.append(hidden)
                    calls.append(call)
                    return (hidden, *[None] * (length - 1)) if length else hidden

                layer.forward = forward  # type: ignore[method-assign]
                restored.callback(delattr, layer, "forward")
            model(**inputs)
        mask = inputs.get("attention_mask")
        is_token = None if mask is None else mask.flatten().bool()
        yield _Batch(states[0], calls, is_token)


def _output_lengths(
    model: nn.Module, layers: Sequence[nn.Module], inputs: Mapping[str, Tensor]
) -> list[int]:
    """How many items each layer gives as a tuple; 0 where it gives the states alone."""
    lengths: dict[nn.Module, int] = {}

    def record(layer: nn.Module, _args: Any, output: Any) -> None:
        lengths[layer] = len(output) if isinstance(output, tuple) else 0

    with ExitStack() as removed:
        for layer in layers:
            removed.callback(layer.register_forward_hook(record).remove)
        model(**inputs)
    return [lengths[layer] for layer in layers]


def _split(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, Call]:
    """The states that a layer is called with, and everything else."""
    if args:
        return args[0], (args[1:], kwargs)
    rest = dict(kwargs)
    return rest.pop("hidden_states"), ((), rest)


def _run(layer: nn.Module, number: int, batch: _Batch) -> Tensor:
    args, kwargs = batch.calls[number]
    output = layer(batch.states, *args, **kwargs)
    states: Tensor = output[0] if isinstance(output, tuple) else output
    return states


def _calibrate_layer(
    number: int, ours: _Side, theirs: Mapping[str, _Side], settings: CalibrationSettings
) -> None:
    """Move the maps of a layer, and all batches through it."""
    layer = ours.layers[number]
    groups = _groups(layer, number, next(iter(ours.batches.values()))[0])
    for names in groups:
        sums = {}
        is_last = names == groups[-1]
        for task, side in theirs.items():
            moments = _Moments()
            for mine, own in zip(ours.batches[task], side.batches[task], strict=True):
                reads, gives = _passing(layer, number, mine, names)
                expected: dict[str, Tensor] = {}
                if settings.target == "outputs":
                    _, expected = _passing(side.layers[number], number, own, names)
                with torch.autocast(reads.device.type, enabled=False):
                    w = None
                    if own.weights is not None:
                        w = torch.stack([own.weights[number, name] for name in names]).sum(0)[
                            :, None
                        ]
                    for name in names:
                        if settings.target == "weights":
                            change = _weight(side.layers[number], name) - _weight(layer, name)
                            lacking = reads @ change.T
                        else:
                            lacking = expected[name] - gives[name]
                            if ALPHA != 1:
                                change = _weight(side.layers[number], name) - _weight(layer, name)
                                lacking = ALPHA * lacking + (1 - ALPHA) * (reads @ change.T)
                        if w is not None:
                            lacking = lacking * w
                        moments.add(name, reads, lacking, w)
            sums[task] = moments
        for name in names:
            _move(layer.get_submodule(name), name, list(sums.values()), settings.ridge)
        del is_last
    for task, side in theirs.items():
        for mine, own in zip(ours.batches[task], side.batches[task], strict=True):
            mine.states = _run(layer, number, mine)
            own.states = _run(side.layers[number], number, own)


def _groups(layer: nn.Module, number: int, batch: _Batch) -> list[list[str]]:
    """The linear maps of a layer in the order of computation; those that read the same together."""
    reads: dict[str, int] = {}
    with ExitStack() as removed:
        for name, module in layer.named_modules():
            if isinstance(module, LINEAR):

                def record(_module: Any, args: Any, name: str = name) -> None:
                    reads[name] = id(args[0])

                removed.callback(module.register_forward_pre_hook(record).remove)
        _run(layer, number, batch)
    groups: dict[int, list[str]] = {}
    for name, read in reads.items():
        groups.setdefault(read, []).append(name)
    return list(groups.values())


def _passing(
    layer: nn.Module, number: int, batch: _Batch, names: Sequence[str]
) -> tuple[Tensor, dict[str, Tensor]]:
    """What maps of a layer read, [N, n], and what they give, [N, rows], of a batch's N tokens."""
    reads: list[Tensor] = []
    gives: dict[str, Tensor] = {}

    def record(_module: Any, args: Any, output: Tensor, name: str) -> None:
        gives[name] = _tokens(output, batch.is_token)
        if len(gives) == len(names):
            reads.append(_tokens(args[0], batch.is_token))
            raise _Reached

    with ExitStack() as removed:
        for name in names:

            def hook(module: Any, args: Any, output: Tensor, name: str = name) -> None:
                record(module, args, output, name)

            removed.callback(layer.get_submodule(name).register_forward_hook(hook).remove)
        try:
            _run(layer, number, batch)
        except _Reached:
            pass
    return reads[0], gives


def _tokens(states: Tensor, is_token: Tensor | None) -> Tensor:
    """The states [N, n] of tokens that are no padding; float32."""
    rows = states.flatten(0, -2)  # [B, T, n] -> [B * T, n]
    return (rows if is_token is None else rows[is_token]).float()


class _Moments:
    """Of one task: E[h h^T] and for each map E[r h^T]."""

    def __init__(self) -> None:
        self.reads: Tensor | None = None
        self.lacking: dict[str, Tensor] = {}
        self.first = ""

    def add(self, name: str, reads: Tensor, lacking: Tensor, w=None) -> None:
        self.count = getattr(self, "count", 0) + len(reads)
        self.first = self.first or name
        with torch.autocast(reads.device.type, enabled=False):
            if name == self.first:
                product = reads.T @ (reads if w is None else reads * w)
                self.reads = product if self.reads is None else self.reads.add_(product)
            product = lacking.T @ reads
            self.lacking[name] = (
                self.lacking[name].add_(product) if name in self.lacking else product
            )


def _weight(layer: nn.Module, name: str) -> Tensor:
    """A map's matrix as [rows, n]."""
    module = layer.get_submodule(name)
    weight: Tensor = module.weight
    return weight.T if isinstance(module, Conv1D) else weight


def _move(module: nn.Module, name: str, moments: Sequence[_Moments], ridge: float) -> None:
    norms = (
        [float(each.reads.norm()) or 1.0 for each in moments]
        if NORM == "frobenius"
        else [float(m.count) for m in moments]
    )
    total = sum(each.reads.double() / norm for each, norm in zip(moments, norms, strict=True))
    pull = sum(
        each.lacking[name].double() / norm for each, norm in zip(moments, norms, strict=True)
    )
    rho = ridge * float(total.diagonal().mean())
    total = total + rho * torch.eye(len(total), dtype=total.dtype, device=total.device)
    step = torch.cholesky_solve(pull.T, torch.linalg.cholesky(total)).T  # [rows, n]
    step = step.T if isinstance(module, Conv1D) else step
    module.weight.add_(step.to(module.weight.dtype))


def _error(ours: Sequence[_Batch], theirs: Sequence[_Batch]) -> float:
    mine = torch.cat([_tokens(batch.states, batch.is_token) for batch in ours])
    own = torch.cat([_tokens(batch.states, batch.is_token) for batch in theirs])
    return float((mine - own).square().mean() / own.var(0).mean())
