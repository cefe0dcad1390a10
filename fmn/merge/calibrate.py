"""A merged encoder calibrated layer by layer: each linear map regressed on what the experts give.

A layer of a merged encoder reads other states than the experts' layers do, and its maps are a
compromise. For task j and the tokens t of texts without labels, let h_t be what a linear map of the
merged encoder reads, and y_t what the expert's map gives in the expert. From the first layer to the
last, and in the order in which a layer computes them, each map W, b becomes the W', b of

    min over W'   sum_j d_j E_t g_t |W' h_t + b - y_t|^2  +  rho |W' - W|^2
    W' = W + (sum_j d_j E_t g_t r_t h_t^T) (sum_j d_j E_t g_t h_t h_t^T + rho I)^-1
    r_t = y_t - W h_t - b

- The states h_t are those above the maps that were calibrated before, so that a map makes up for
  what is still lacking below it.
- g_t says how much the expert's answer depends on what the map gives for the token: the squared
  length of the gradient of v . z with respect to y_t, for the logits z and a random v ~ N(0, I),
  over the variance of z. To first order the sum bounds the error of the logits in units of their
  variance, so tasks count alike and no token counts that no answer depends on.
- d_j says how much the answer depends on the rows of W' that belong to one mask node (a head of a
  query, key or value, a neuron of an up projection), relative to the mean over the map's nodes: the
  same gradients, squared, as a mean over tokens and rows. Each node's rows are solved for with
  weights of their own. With g_t it stands for the curvature, as the two factors of K-FAC do (arXiv
  1503.05671); for other maps it is 1.
- rho is `ridge` times the mean diagonal entry of the sum before it, so that `ridge` has no unit.

Biases, normalisations and embeddings stay as they are. With the target "weights", y_t = W_j h_t + b
and d_j = g_t = 1: the regression of RegMean++ (arXiv 2508.03121), with rho.

The states of all texts before one layer are held at a time, of the merged model and of the experts:
8 bytes times tokens times width.
"""

from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
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
    to_device,
)
from fmn.models.predict import answered_only, tokens_at_once
from fmn.store.stage import Progress, no_progress
from fmn.tasks.batches import IGNORED, Batch, Examples, by_length, select

Key = tuple[int, str]  # number of a layer, and path of a linear map below it
# From an expert, its layers and batches to the weights of tokens by batch, and the shares of nodes.
_Weigh = Callable[
    [PreTrainedModel, Sequence[nn.Module], Sequence[Batch]],
    tuple[list[dict[Key, Tensor]], dict[Key, Tensor]],
]

LINEAR = (nn.Linear, Conv1D)
SYSTEMS = 2**24  # entries of the systems of equations that are solved at a time
OWN_TEXTS = 512  # that own layers are calibrated on


class _Computed(Exception):  # noqa: N818 - no error: the rest of a layer is not needed
    """Ends the forward pass of a layer."""


@dataclass
class _Texts:
    """A batch of texts on its way through a model's layers.

    Attributes:
        states: what the next layer reads, [B, T, width].
        calls: by layer, its other positional and named arguments.
        tokens: int64 [N], which of the B * T positions are no padding; None: all.
    """

    states: Tensor
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]]
    tokens: Tensor | None


@dataclass(frozen=True)
class _Task:
    """A task's texts in the merged model and in its expert, batch by batch.

    Attributes:
        layers: of the expert.
        weights: for each batch, g_t [N] by layer number and map; None: all are 1.
        shares: d_j of each node, [nodes] by layer number and map, where it is not 1.
    """

    layers: list[nn.Module]
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
        experts: classifiers by task; their parameters are not changed.
        encoder: the merged encoder's tensors by names in the base model.
        examples: texts by task; labels are not read.
        last: how many of the last layers are calibrated; None: all.
        device, dtype: as for `fmn.models.predict.predict`. Sums are in float32, or float64 where
            models are.
        progress: called with the layers done and all of them.

    Returns:
        the encoder's tensors, and by task the error of the states after the last layer: the mean
        squared difference from the expert's over the variance of the expert's.

    Raises:
        UserError: the layers are no chain in which each has parameters of its own, or a task has no
            texts.
    """
    target = resolve_device(device)
    compute_dtype = resolve_dtype(dtype, target)
    first = next(iter(experts.values()))
    paths = _layer_paths(first)
    merged = _with_encoder(first.base_model, encoder)
    layers = [merged.get_submodule(path) for path in paths]
    start = 0 if last is None else len(layers) - last
    weigh: _Weigh | None = None
    if settings.target == "outputs":
        generator = torch.Generator().manual_seed(settings.seed)
        weigh = partial(
            _weights, start=start, node_rows=_node_rows(first, paths), generator=generator
        )
    with _ready([merged, *experts.values()], target, compute_dtype):
        tasks = {}
        for task, expert in experts.items():
            if not len(examples[task]):
                raise UserError(f"{task}: there are no training texts to calibrate on; add some")
            batches = list(by_length(examples[task], tokens=tokens_at_once(expert, target)))
            tasks[task] = _before_first_layer(expert, merged, paths, batches, weigh)
        with torch.no_grad():
            for number, layer in enumerate(layers):
                if number >= start:
                    with _explained(number):
                        _calibrate_layer(number, layer, list(tasks.values()), settings.ridge)
                _advance(number, layer, list(tasks.values()))
                progress(number + 1, len(layers))
    errors = {name: error for name, task in tasks.items() if (error := _error(task)) is not None}
    return _tensors_of(merged, encoder), errors


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


def own_part(
    expert: PreTrainedModel,
    encoder: Mapping[str, Tensor],
    names: Collection[str],
    layers: int,
    examples: Examples,
    *,
    seed: int,
    device: str = "auto",
    dtype: str = "auto",
) -> dict[str, Tensor]:
    """An expert's own part of a merged encoder; its own layers are calibrated to the layers below.

    Args:
        encoder: the merged encoder's tensors by names in the base model.
        names: of the tensors that are to be the expert's own.
        layers: how many of the last layers are among them.
        examples: unlabeled texts; OWN_TEXTS of them are used, drawn by `seed`.

    Returns:
        the own tensors by names in the base model.
    """
    state = expert.base_model.state_dict()
    names = [name for name in names if name in state]  # a tagger has no pooler
    own = {name: state[name].detach().clone() for name in names}
    if layers:
        texts = examples.take(select(examples.labels, OWN_TEXTS, seed))
        tensors, _ = calibrated_encoder(
            {"": expert}, {**encoder, **own}, {"": texts}, settings=CalibrationSettings(seed=seed),
            last=layers, device=device, dtype=dtype,
        )  # fmt: skip
        own = {name: tensors[name] for name in names}
    return own


def _inputs(model: nn.Module, batch: Batch) -> dict[str, Tensor]:
    """What a model reads of a batch, where the model is."""
    device = next(model.parameters()).device
    return {name: to_device(value, device) for name, value in batch.inputs.items()}


def _places(model: nn.Module, batch: Batch) -> Tensor | None:
    """Which positions of a batch are tokens, int64 [N]; None: all."""
    mask = batch.inputs.get("attention_mask")
    return None if mask is None else places(mask, next(model.parameters()).device)


def _tokens(states: Tensor, tokens: Tensor | None) -> Tensor:
    """The states [N, n] of an activation [B, T, n] that belong to tokens; at least float32."""
    rows = states.flatten(0, -2)  # [B, T, n] -> [B * T, n]
    return _wide(rows if tokens is None else rows.index_select(0, tokens))


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _maps(layer: nn.Module) -> dict[str, nn.Module]:
    """The linear maps of a layer by path below it."""
    return {name: module for name, module in layer.named_modules() if isinstance(module, LINEAR)}


# ---- before the first layer ----


def _with_encoder(model: PreTrainedModel, encoder: Mapping[str, Tensor]) -> PreTrainedModel:
    """A copy of a base model with other tensors."""
    merged = deepcopy(model)
    loading.fit_vocabulary(merged, encoder)
    merged.load_state_dict(dict(encoder), strict=False)
    merged.requires_grad_(False)  # autocast would keep casts of parameters as they were
    return merged


def _tensors_of(model: PreTrainedModel, encoder: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of `encoder` with the values that a model has of them."""
    state = model.state_dict()
    # What is outside the base model, as the map to the vocabulary, stays; a tagger has no pooler.
    return {
        name: state.get(name, tensor).to("cpu", tensor.dtype) for name, tensor in encoder.items()
    }


def _layer_paths(model: PreTrainedModel) -> Sequence[str]:
    """The paths of the layers in the base model; UserError if they are no chain."""
    shapes = {name: tuple(value.shape) for name, value in model.base_model.named_parameters()}
    remedy = "leave it out (`calibrate: null` in the settings)"
    return architectures.layer_chain(model.config, shapes, "calibrate", remedy)


@contextmanager
def _ready(
    models: Sequence[PreTrainedModel], device: torch.device, dtype: torch.dtype
) -> Iterator[None]:
    """Within it models compute on a device in a dtype; decoders store no keys and values."""
    with ExitStack() as stack:
        for model in models:
            stack.enter_context(placed(model.eval(), device, dtype))
            if getattr(model.config, "use_cache", False):
                stack.callback(setattr, model.config, "use_cache", True)
                model.config.use_cache = False
        stack.enter_context(autocast(device, dtype))
        yield


def _before_first_layer(
    expert: PreTrainedModel,
    merged: PreTrainedModel,
    paths: Sequence[str],
    batches: Sequence[Batch],
    weigh: _Weigh | None,
) -> _Task:
    """A task whose texts have not entered the first layer, with the weights of their tokens."""
    layers, own = ([m.get_submodule(p) for p in paths] for m in (merged, expert.base_model))
    weights, shares = weigh(expert, own, batches) if weigh else (None, {})
    with torch.no_grad():
        in_merged = [_before_layers(merged, layers, batch) for batch in batches]
        in_own = [_before_layers(expert.base_model, own, batch) for batch in batches]
    return _Task(own, in_merged, in_own, weights, shares)


def _node_rows(model: PreTrainedModel, paths: Sequence[str]) -> dict[Key, int]:
    """How many rows of a map belong to each of its mask nodes, for the maps that compute nodes."""
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
    *,
    start: int,
    node_rows: Mapping[Key, int],
    generator: torch.Generator,
) -> tuple[list[dict[Key, Tensor]], dict[Key, Tensor]]:
    """g_t of every token by batch, and d_j of every node, both by map; at least float32.

    Only for the layers from number `start` on, where the backward pass then ends.
    """
    of_logits: list[Tensor] = []
    of_squares: list[Tensor] = []
    count = 0
    weights: list[dict[Key, Tensor]] = []
    by_row: dict[Key, list[Tensor]] = defaultdict(list)
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
                _add(by_row[key], squares.sum(0))
        z, count = z.detach().double(), count + len(z)
        _add(of_logits, z.sum(0))
        _add(of_squares, z.square().sum(0))
    # A text of many answers counts as much as one of a single answer.
    per_text = count / sum(len(batch.rows) for batch in batches)
    variance = float((of_squares[0] / count - (of_logits[0] / count).square()).mean())
    variance = variance * per_text if variance > 0 else 1.0
    shares = {}
    for key, (total,) in by_row.items():
        nodes = total.view(-1, node_rows[key]).mean(1)  # [rows] -> [nodes]
        shares[key] = nodes / nodes.mean()
    return [{key: g / variance for key, g in each.items()} for each in weights], shares


def _store(outputs: dict[Key, Tensor], key: Key, mask: Tensor | None) -> Callable[..., None]:
    """A hook that keeps what a map gives for tokens; some maps read embeddings of positions."""

    def hook(_module: nn.Module, _args: Any, output: Tensor) -> None:
        if mask is None or output.shape[:-1].numel() == mask.numel():
            outputs.setdefault(key, output)

    return hook


def _before_layers(model: nn.Module, layers: Sequence[nn.Module], batch: Batch) -> _Texts:
    """A batch before the first layer, with everything that layers are called with.

    The model runs with layers that give back what they read, which shows what it calls them with.
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
    """How many items a layer gives as a tuple; 0 where it gives the states alone."""
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
    """What a layer gives for a batch, [B, T, width]."""
    args, kwargs = texts.calls[number]
    output = layer(texts.states, *args, **kwargs)
    states: Tensor = output[0] if isinstance(output, tuple) else output
    return states


def _calibrate_layer(number: int, layer: nn.Module, tasks: Sequence[_Task], ridge: float) -> None:
    """Calibrate the maps of a layer."""
    for names in _groups(number, layer, tasks[0].merged[0]):
        moments = [_moments(number, layer, task, names) for task in tasks]
        for name in names:
            shares = [task.shares[number, name] for task in tasks if (number, name) in task.shares]
            _move(layer, name, moments, torch.stack(shares) if shares else None, ridge)


def _advance(number: int, layer: nn.Module, tasks: Sequence[_Task]) -> None:
    """Move all texts through a layer."""
    for task in tasks:
        for texts in task.merged:
            texts.states = _run(layer, number, texts)
        for texts in task.own:
            texts.states = _run(task.layers[number], number, texts)


def _groups(number: int, layer: nn.Module, texts: _Texts) -> list[list[str]]:
    """A layer's maps of tokens in the order of computation; groups read the same input."""
    readers: dict[int, list[str]] = {}
    held = []  # so that no other input gets the id of one
    with ExitStack() as hooks:
        for name, module in _maps(layer).items():

            def hook(_module: nn.Module, args: tuple[Tensor, ...], name: str = name) -> None:
                if args[0].shape[:-1] == texts.states.shape[:-1]:
                    held.append(args[0])
                    readers.setdefault(id(args[0]), []).append(name)

            hooks.callback(module.register_forward_pre_hook(hook).remove)
        _run(layer, number, texts)
    return list(readers.values())


def _moments(number: int, layer: nn.Module, task: _Task, names: Sequence[str]) -> _Moments:
    """The moments of one task for a group of maps."""
    of_reads: list[Tensor] = []
    of_residuals: dict[str, list[Tensor]] = {name: [] for name in names}
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
        _add(of_reads, _product(read.T, weighted))
        for name in names:
            _add(of_residuals[name], _product(residuals[name].T, weighted))
    return _Moments(
        of_reads[0] / count, {name: total / count for name, (total,) in of_residuals.items()}
    )


def _add(total: list[Tensor], term: Tensor) -> None:
    """Add to a sum, the only item of a list, which is empty before the first term."""
    if total:
        total[0].add_(term)
    else:
        total.append(term)


def _product(left: Tensor, right: Tensor) -> Tensor:
    """A matrix product in the dtype of its factors, whatever layers compute in."""
    with torch.autocast(left.device.type, enabled=False):
        return left @ right


def _computed(
    number: int, layer: nn.Module, texts: _Texts, names: Sequence[str]
) -> tuple[Tensor, dict[str, Tensor]]:
    """What a group of maps reads, [N, n], and what each gives, [N, rows], for a batch's N tokens.

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
    """Solve for a map, and change it in place.

    Args:
        shares: d_j, [tasks, nodes]; None: all are 1, and one system of equations serves all rows.
    """
    matrix, reads = _matrix(layer, name), torch.stack([each.reads for each in moments])  # [m, n, n]
    if shares is None:
        reads, shares = reads.double(), reads.new_ones(len(reads), 1, dtype=torch.float64)
    pulls = torch.stack([each.residuals[name] for each in moments]).to(reads)
    nodes, width = shares.shape[1], reads.shape[-1]
    pulls = pulls.view(
        len(pulls), nodes, -1, width
    )  # [m, rows, n] -> [m, nodes, rows of a node, n]
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
