"""Layer by layer, fit the linear maps of a merged encoder to the outputs of the experts' maps.

A layer of a merged encoder reads other states than the experts' layers do, and its maps are a
compromise. For task j and the tokens t of texts without labels, let h_t be the input of a linear
map of the merged encoder, and y_t the output of the expert's map in the expert. From the first
layer to the last, and in the order in which a layer computes them, each map W, b becomes the W', b
that solves

    min over W'   sum_j d_j E_t g_t |W' h_t + b - y_t|^2  +  rho |W' - W|^2
    W' = W + (sum_j d_j E_t g_t r_t h_t^T) (sum_j d_j E_t g_t h_t h_t^T + rho I)^-1
    r_t = y_t - W h_t - b

- The states h_t come from maps that are already calibrated, so each map also corrects the errors
  that remain below it.
- g_t is the weight of a token: how much the expert's answer depends on the map's output there. It
  is the squared length of the gradient of v . z with respect to y_t, for the logits z and a random
  v ~ N(0, I), divided by the variance of z. To first order the sum bounds the error of the logits
  in units of their variance, so all tasks have equal weight and padding has none.
- d_j is the weight of one mask node (the rows of W' that belong to a head of a query, key or value,
  or to a neuron of an up projection): the same squared gradients, averaged over tokens and rows,
  divided by their mean over the map's nodes. Each node's rows are solved for separately. g_t and
  d_j approximate the curvature as the two factors of K-FAC do (arXiv 1503.05671). d_j is 1 for
  maps without mask nodes.
- rho is `ridge` times the mean diagonal entry of the sum before it, so that `ridge` has no unit.

Biases, normalisations and embeddings do not change. With the target "weights", y_t = W_j h_t + b
and d_j = g_t = 1: the regression of RegMean++ (arXiv 2508.03121), with rho.

Memory: the states of all texts before one layer, in the merged model and in the experts, which are
8 bytes times tokens times width.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from fmn.errors import UserError
from fmn.fisher import architectures
from fmn.merge.recipe import CalibrationSettings
from fmn.models import loading
from fmn.models.devices import (
    autocast,
    known_padding,
    placed,
    places,
    resolve_device,
    resolve_dtype,
    side_by_side,
    to_device,
)
from fmn.models.predict import answered_only, tokens_at_once
from fmn.store.stage import Progress, no_progress
from fmn.tasks.batches import IGNORED, Batch, Examples, by_length

Key = tuple[int, str]  # number of a layer, and path of a linear map below it

LINEAR = (nn.Linear, Conv1D)
BLOCK = 384  # rows of a symmetric product that are computed together
SYSTEMS = 2**24  # entries of the systems of equations that are solved at a time


class _Computed(Exception):  # noqa: N818 - not an error
    """Stops a forward pass: the rest of the layer is not needed."""


@dataclass
class _Texts:
    """A batch of texts on its way through a model's layers.

    Attributes:
        states: the input of the next layer, [B, T, width].
        calls: by layer, its other positional and named arguments.
        tokens: int64 [N], the positions among B * T that are not padding; None: all.
    """

    states: Tensor
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]]
    tokens: Tensor | None


@dataclass(frozen=True)
class _Task:
    """A task's texts in the merged model and in its expert, batch by batch.

    Attributes:
        layers: the expert's layers.
        merged_layers: the merged model's layers, as modules of the task's own (so that tasks can
            run in several threads) with parameters that all tasks share.
        merged, own: the batches in the merged model and in the expert.
        weights: for each batch, g_t [N] by layer number and map; None: all are 1.
        shares: d_j of each node, [nodes] by layer number and map, where it is not 1.
    """

    layers: list[nn.Module]
    merged_layers: list[nn.Module]
    merged: list[_Texts]
    own: list[_Texts]
    weights: list[dict[Key, Tensor]] | None
    shares: dict[Key, Tensor]


@dataclass
class _Moments:
    """Weighted means over tokens: of h h^T, [n, n], and by map of r h^T, [rows, n]."""

    reads: Tensor
    residuals: dict[str, Tensor]


def calibrated_encoder(
    experts: Mapping[str, PreTrainedModel],
    encoder: Mapping[str, Tensor],
    examples: Mapping[str, Examples],
    *,
    settings: CalibrationSettings,
    last: int | None = None,
    device: str = "auto",
    dtype: str = "auto",
    progress: Progress = no_progress,
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Calibrate a merged encoder towards its experts on unlabeled texts.

    Args:
        experts: models by task; their parameters are not changed.
        encoder: the merged encoder's tensors by names in the base model.
        examples: texts by task; labels are not read.
        last: how many of the last layers are calibrated; None: all.
        device, dtype: as for `fmn.models.predict.predict`. Sums are at least float32.
        progress: called with the number of calibrated layers and of all layers.

    Returns:
        the encoder's tensors, and by task the error of the states after the last layer: their mean
        squared difference from the expert's states, divided by the variance of those.

    Raises:
        UserError: layers share parameters or are not a chain, or a task has no texts.
    """
    target = resolve_device(device)
    first = next(iter(experts.values()))
    paths = _layer_paths(first)
    merged = _with_encoder(first.base_model, encoder)
    start = 0 if last is None else len(paths) - last

    def start_task(name: str) -> _Task:
        expert, model = experts[name], _shared_copy(merged)
        batches = list(by_length(examples[name], tokens=tokens_at_once(expert, target)))
        layers, own = ([m.get_submodule(p) for p in paths] for m in (model, expert.base_model))
        weights, shares = None, dict[Key, Tensor]()
        if settings.target == "outputs":
            rows = _node_rows(first, paths)
            weights, shares = _weights(expert, own, batches, start, rows, settings.seed)
        in_merged = [_before_layers(model, layers, batch) for batch in batches]
        in_own = [_before_layers(expert.base_model, own, batch) for batch in batches]
        return _Task(own, layers, in_merged, in_own, weights, shares)

    for name in experts:
        if not len(examples[name]):
            raise UserError(f"{name}: there are no training texts to calibrate on; add some")
    with _ready([merged, *experts.values()], target, resolve_dtype(dtype, target)):
        tasks = list(side_by_side(start_task, experts, target))
        with torch.no_grad():
            for number in range(len(paths)):
                if number >= start:
                    with _explained(number):
                        _calibrate_layer(number, tasks, settings.ridge, target)
                list(side_by_side(partial(_advance, number), tasks, target))
                progress(number + 1, len(paths))
    errors = zip(experts, map(_error, tasks), strict=True)
    return _tensors_of(merged, encoder), {name: e for name, e in errors if e is not None}


@contextmanager
def _explained(layer: int) -> Iterator[None]:
    """Explain equations of a layer that have no solution."""
    try:
        yield
    except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]
        problem = "an expert's states there are not finite, or all the same"
        raise UserError(
            f"layer {layer} cannot be calibrated, as {problem}; leave `calibrate` out"
        ) from error


def _inputs(model: nn.Module, batch: Batch) -> dict[str, Tensor]:
    """A batch's inputs, on the model's device."""
    device = next(model.parameters()).device
    return {name: to_device(value, device) for name, value in batch.inputs.items()}


def _places(model: nn.Module, batch: Batch) -> Tensor | None:
    """The positions of a batch that are not padding, int64 [N]; None: all."""
    mask = batch.inputs.get("attention_mask")
    return None if mask is None else places(mask, next(model.parameters()).device)


def _tokens(states: Tensor, tokens: Tensor | None) -> Tensor:
    """An activation [B, T, n] at the tokens alone, [N, n]; at least float32."""
    rows = states.flatten(0, -2)  # [B, T, n] -> [B * T, n]
    return _wide(rows if tokens is None else rows.index_select(0, tokens))


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _maps(layer: nn.Module) -> dict[str, nn.Module]:
    """The linear maps of a layer by path below it."""
    return {name: module for name, module in layer.named_modules() if isinstance(module, LINEAR)}


# ---- before the first layer ----


def _with_encoder(model: PreTrainedModel, encoder: Mapping[str, Tensor]) -> PreTrainedModel:
    """A copy of a base model with the tensors of a merged encoder."""
    merged = deepcopy(model)
    loading.fit_vocabulary(merged, encoder)
    merged.load_state_dict(dict(encoder), strict=False)
    merged.requires_grad_(False)  # autocast would cache casts of parameters that change later
    return merged


def _shared_copy(model: PreTrainedModel) -> PreTrainedModel:
    """A copy of a model that shares its parameters and buffers but can have other hooks."""
    tensors = [*model.parameters(), *model.buffers()]
    return deepcopy(model, {id(tensor): tensor for tensor in tensors})


def _tensors_of(model: PreTrainedModel, encoder: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of `encoder`, with the values that they have in a model."""
    state = model.state_dict()
    # Tensors outside the base model, such as the map to the vocabulary, stay as they are.
    return {
        name: state.get(name, tensor).to("cpu", tensor.dtype) for name, tensor in encoder.items()
    }


def _layer_paths(model: PreTrainedModel) -> Sequence[str]:
    """The paths of the layers in the base model; UserError if they are not a chain."""
    shapes = {name: tuple(value.shape) for name, value in model.base_model.named_parameters()}
    remedy = "leave it out (`calibrate: null` in the settings)"
    return architectures.layer_chain(model.config, shapes, "calibrate", remedy)


@contextmanager
def _ready(
    models: Sequence[PreTrainedModel], device: torch.device, dtype: torch.dtype
) -> Iterator[None]:
    """Place models on a device and compute in a dtype; decoders do not cache keys and values."""
    with ExitStack() as stack:
        for model in models:
            stack.enter_context(placed(model.eval(), device, dtype))
            if getattr(model.config, "use_cache", False):
                stack.callback(setattr, model.config, "use_cache", True)
                model.config.use_cache = False
        stack.enter_context(autocast(device, dtype))
        yield


def _node_rows(model: PreTrainedModel, paths: Sequence[str]) -> dict[Key, int]:
    """The number of rows that belong to each mask node of a map, for maps that have mask nodes."""
    prefix = f"{model.base_model_prefix}."
    return {
        (paths.index(site.layer.removeprefix(prefix)), module): site.channels
        for site in architectures.mask_sites(model)
        for _, module in site.block.inputs
    }


def _weights(
    expert: PreTrainedModel,
    layers: Sequence[nn.Module],
    batches: Sequence[Batch],
    start: int,
    node_rows: Mapping[Key, int],
    seed: int,
) -> tuple[list[dict[Key, Tensor]], dict[Key, Tensor]]:
    """g_t of every token by batch, and d_j of every node, both by map; at least float32.

    Only the layers from number `start` on have weights; the backward pass ends there.
    """
    logit_sum: Any = 0  # the sums are tensors after the first term
    square_sum: Any = 0
    count = 0
    generator = torch.Generator().manual_seed(seed)
    weights: list[dict[Key, Tensor]] = []
    row_sums: dict[Key, Any] = defaultdict(int)
    for batch in batches:
        outputs: dict[Key, Tensor] = {}
        tokens = _places(expert, batch)
        mask = batch.inputs.get("attention_mask")
        with ExitStack() as hooks, answered_only(expert, batch.labels):
            for number in range(start, len(layers)):
                for name, module in _maps(layers[number]).items():
                    hook = _store(outputs, (number, name), mask)
                    hooks.callback(module.register_forward_hook(hook).remove)
            hooks.enter_context(known_padding(batch.inputs))
            # [B, C]; of generated text [M, C]
            z = _wide(expert(**_inputs(expert, batch)).logits)
        if z.ndim == 3:  # of tokens, those that answer: [B, T, C] -> [N, C]
            z = z.flatten(0, 1).index_select(0, places(batch.labels != IGNORED, z.device))
        v = to_device(torch.randn(z.shape, generator=generator), z.device, z.dtype)
        gradients = torch.autograd.grad((v * z).sum(), list(outputs.values()))
        weights.append({})
        for key, gradient in zip(outputs, gradients, strict=True):
            squares = _tokens(gradient, tokens).square()  # [N, rows]
            weights[-1][key] = squares.sum(-1)
            if key in node_rows:
                row_sums[key] = row_sums[key] + squares.sum(0)
        z, count = z.detach().double(), count + len(z)
        logit_sum, square_sum = logit_sum + z.sum(0), square_sum + z.square().sum(0)
    # A text with many answers has the same weight as a text with one.
    per_text = count / sum(len(batch.rows) for batch in batches)
    variance = float((square_sum / count - (logit_sum / count).square()).mean())
    variance = variance * per_text if variance > 0 else 1.0
    shares = {}
    for key, total in row_sums.items():
        nodes = total.view(-1, node_rows[key]).mean(1)  # [rows] -> [nodes]
        shares[key] = nodes / nodes.mean()
    return [{key: g / variance for key, g in each.items()} for each in weights], shares


def _store(outputs: dict[Key, Tensor], key: Key, mask: Tensor | None) -> Callable[..., None]:
    """A hook that stores a map's output for tokens; it skips maps that read position embeddings."""

    def hook(_module: nn.Module, _args: Any, output: Tensor) -> None:
        if mask is None or output.shape[:-1].numel() == mask.numel():
            outputs.setdefault(key, output)

    return hook


@torch.no_grad()
def _before_layers(model: nn.Module, layers: Sequence[nn.Module], batch: Batch) -> _Texts:
    """A batch before the first layer, with the arguments that the model calls its layers with.

    To record these, the model runs once with layers that return their input.
    """
    inputs = _inputs(model, batch)
    items = _tuple_length(model, layers[0], {name: value[:1] for name, value in inputs.items()})
    states: list[Tensor] = []
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def forward(*args: Any, **kwargs: Any) -> Tensor | tuple[Any, ...]:
        named = dict(kwargs)
        hidden = args[0] if args else named.pop("hidden_states")
        states.append(hidden)
        calls.append((args[1:], named))
        return (hidden, *[None] * (items - 1)) if items else hidden

    with ExitStack() as restored, known_padding(batch.inputs):
        for layer in layers:
            layer.forward = forward
            restored.callback(delattr, layer, "forward")
        model(**inputs)
    return _Texts(states[0], calls, _places(model, batch))


def _tuple_length(model: nn.Module, layer: nn.Module, inputs: Mapping[str, Tensor]) -> int:
    """The number of items in the tuple that a layer returns; 0 if it returns the states alone."""
    lengths = []

    def hook(_module: nn.Module, _args: Any, output: Any) -> None:
        lengths.append(len(output) if isinstance(output, tuple) else 0)
        raise _Computed

    with ExitStack() as hooks, suppress(_Computed):
        hooks.callback(layer.register_forward_hook(hook).remove)
        model(**inputs)
    return lengths[0]


# ---- a layer ----


def _run(layer: nn.Module, number: int, texts: _Texts) -> Tensor:
    """A layer's output for a batch, [B, T, width]."""
    args, kwargs = texts.calls[number]
    output = layer(texts.states, *args, **kwargs)
    states: Tensor = output[0] if isinstance(output, tuple) else output
    return states


def _calibrate_layer(
    number: int, tasks: Sequence[_Task], ridge: float, device: torch.device
) -> None:
    """Calibrate the maps of a layer."""
    layer = tasks[0].merged_layers[number]
    for names in _groups(number, layer, tasks[0].merged[0]):
        moments = list(side_by_side(partial(_moments, number, names), tasks, device))
        for name in names:
            shares = [task.shares[number, name] for task in tasks if (number, name) in task.shares]
            # With one task, the weights cancel out.
            together = torch.stack(shares) if len(shares) > 1 else None
            _move(layer, name, moments, together, ridge)


def _advance(number: int, task: _Task) -> None:
    """Move a task's texts through a layer."""
    for texts in task.merged:
        texts.states = _run(task.merged_layers[number], number, texts)
    for texts in task.own:
        texts.states = _run(task.layers[number], number, texts)


def _groups(number: int, layer: nn.Module, texts: _Texts) -> list[list[str]]:
    """A layer's maps in the order of computation, grouped by the input that they share."""
    readers: dict[int, list[str]] = {}
    held = []  # so that no two inputs have the same id
    with ExitStack() as hooks:
        for name, module in _maps(layer).items():

            def hook(_module: nn.Module, args: tuple[Tensor, ...], name: str = name) -> None:
                if args[0].shape[:-1] == texts.states.shape[:-1]:
                    held.append(args[0])
                    readers.setdefault(id(args[0]), []).append(name)

            hooks.callback(module.register_forward_pre_hook(hook).remove)
        _run(layer, number, texts)
    return list(readers.values())


def _moments(number: int, names: Sequence[str], task: _Task) -> _Moments:
    """The moments of one task for a group of maps."""
    layer = task.merged_layers[number]
    read_sum: Any = 0  # the sums are tensors after the first term
    residual_sums: dict[str, Any] = dict.fromkeys(names, 0)
    count = 0
    for place, (merged, own) in enumerate(zip(task.merged, task.own, strict=True)):
        read, outputs = _computed(number, layer, merged, names)
        weighted, count = read, count + len(read)
        if task.weights is None:
            pairs = {
                name: (_matrix(task.layers[number], name), _matrix(layer, name)) for name in names
            }
            residuals = {name: _product(read, (w - v).T) for name, (w, v) in pairs.items()}
        else:
            _, targets = _computed(number, task.layers[number], own, names)
            residuals = {name: targets[name] - outputs[name] for name in names}
            weights = torch.stack([task.weights[place][number, name] for name in names])
            weighted = read * weights.sum(0)[:, None]  # [N, n]
        read_sum = read_sum + _upper_product(read, weighted)
        for name in names:
            residual_sums[name] += _product(residuals[name].T, weighted)
    means = {name: total / count for name, total in residual_sums.items()}
    return _Moments((read_sum.triu() + read_sum.triu(1).T) / count, means)


def _product(left: Tensor, right: Tensor) -> Tensor:
    """A matrix product in the dtype of its factors, without autocast."""
    with torch.autocast(left.device.type, enabled=False):
        return left @ right


def _upper_product(read: Tensor, weighted: Tensor) -> Tensor:
    """The upper triangle of ``read^T weighted``, [n, n], a symmetric matrix; the rest is unset.

    For wide maps, whose products take most of the time, this is up to half of the work.
    """
    width = read.shape[1]
    total = read.new_empty(width, width)
    for start in range(0, width, BLOCK):
        rows = slice(start, start + BLOCK)
        total[rows, start:] = _product(read[:, rows].T, weighted[:, start:])
    return total


def _computed(
    number: int, layer: nn.Module, texts: _Texts, names: Sequence[str]
) -> tuple[Tensor, dict[str, Tensor]]:
    """The input of a group of maps, [N, n], and each map's output, [N, rows], at N tokens.

    The rest of the layer is not computed.
    """
    reads: list[Tensor] = []
    outputs: dict[str, Tensor] = {}
    with ExitStack() as hooks:
        for name in names:

            def hook(
                _m: nn.Module, args: tuple[Tensor, ...], out: Tensor, name: str = name
            ) -> None:
                outputs[name] = _tokens(out, texts.tokens)
                if len(outputs) == len(names):
                    reads.append(_tokens(args[0], texts.tokens))
                    raise _Computed

            hooks.callback(layer.get_submodule(name).register_forward_hook(hook).remove)
        with suppress(_Computed):
            _run(layer, number, texts)
    return reads[0], outputs


def _matrix(layer: nn.Module, name: str) -> Tensor:
    """A map's matrix, [rows, n]."""
    module, weight = layer.get_submodule(name), layer.get_parameter(f"{name}.weight")
    return weight.T if isinstance(module, Conv1D) else weight


def _move(
    layer: nn.Module, name: str, moments: Sequence[_Moments], shares: Tensor | None, ridge: float
) -> None:
    """Solve for a map's new matrix, and write it in place.

    Args:
        shares: d_j, [tasks, nodes]; None: all are 1, and all rows share one system of equations.
    """
    matrix, reads = _matrix(layer, name), torch.stack([each.reads for each in moments])  # [m, n, n]
    if shares is None:
        reads, shares = reads.double(), reads.new_ones(len(reads), 1, dtype=torch.float64)
    pulls = torch.stack([each.residuals[name] for each in moments]).to(reads)
    nodes, width = shares.shape[1], reads.shape[-1]
    # [m, rows, n] -> [m, nodes, rows of a node, n]
    pulls = pulls.view(len(pulls), nodes, -1, width)
    steps = []
    for start in range(0, nodes, count := max(1, SYSTEMS // width**2)):
        d = shares[:, start : start + count].to(reads)
        total = torch.einsum("mk,mij->kij", d, reads)
        pull = torch.einsum("mk,mkri->kir", d, pulls[:, start : start + count])
        diagonal = total.diagonal(dim1=1, dim2=2)
        rho = ridge * diagonal.mean(1, keepdim=True)
        diagonal += torch.where(rho > 0, rho, 1.0)
        steps.append(torch.cholesky_solve(pull, torch.linalg.cholesky(total)).mT)
    matrix.add_(torch.cat(steps).flatten(0, 1))  # [nodes, rows of a node, n] -> [rows, n]


def _error(task: _Task) -> float | None:
    """The mean squared difference over the variance; None where the expert's states are equal."""
    merged = torch.cat([_tokens(texts.states, texts.tokens) for texts in task.merged])
    own = torch.cat([_tokens(texts.states, texts.tokens) for texts in task.own])
    variance = float(own.var(0, correction=0).mean())
    return float((merged - own).square().mean()) / variance if variance else None
