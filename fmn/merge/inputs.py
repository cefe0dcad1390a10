"""Check the inputs of a merge, and plan it, from headers and small files alone."""

from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, field, replace
from functools import reduce
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fmn.errors import UserError
from fmn.fisher import architectures, files, published
from fmn.fisher.architectures import Claim, NodeValues, Site
from fmn.merge.methods import METHODS, Method, Needs, Tuning, tuned
from fmn.merge.recipe import MergeSettings, Statistic
from fmn.merge.stream import DTYPES, TensorSpec
from fmn.models import checkpoints, loading
from fmn.store import artifacts
from fmn.store.headers import TensorHeader, tensor_headers
from fmn.tasks.kinds import KINDS, KindName
from fmn.tasks.task import Task


class StoredGrams(NamedTuple):
    """An expert's Gram matrices.

    Attributes:
        moments: where each matrix lies, by the name of the input.
        inputs: the name of each module's input.
        transposed: the modules whose weights are stored [n, rows].
    """

    moments: Mapping[str, TensorHeader]
    inputs: Mapping[str, str]
    transposed: Sequence[str]


@dataclass(frozen=True)
class Statistics:
    """The statistics that a method needs, by task.

    Attributes:
        fisher: the Fisher information of the mask nodes; or, if the method needs that of all
            parameters, where it lies, by parameter.
        grams: the Gram matrices.
        records: the recipe's entries about them, by "fisher" and "gram".
        definitions: the tasks' definitions that the statistics' files hold.
    """

    fisher: Mapping[str, Any] = field(default_factory=dict)
    grams: Mapping[str, StoredGrams] = field(default_factory=dict)
    records: Mapping[str, Mapping[str, Statistic]] = field(default_factory=dict)
    definitions: Mapping[str, Task | None] = field(default_factory=dict)

    def records_for(self, needs: Needs) -> dict[str, Mapping[str, Statistic]]:
        """The records of the statistics that a method needs, without others."""
        needed = {"fisher": bool(needs.fisher), "gram": needs.gram}
        return {kind: of_tasks for kind, of_tasks in self.records.items() if needed[kind]}


def read_statistics(
    needs: Needs,
    experts: Mapping[str, Path],
    digests: Mapping[str, str],
    fisher: Mapping[str, Path],
    gram: Mapping[str, Path],
) -> Statistics:
    """Read the statistics that a merge needs.

    Args:
        needs: which statistics the merge needs.
        experts, digests: the experts' folders and their digests, by task.
        fisher, gram: files by task.

    Raises:
        UserError: a file is damaged, or of another expert or task.
    """
    values: dict[str, Any] = {}
    grams: dict[str, StoredGrams] = {}
    records: dict[str, dict[str, Statistic]] = {"fisher": {}, "gram": {}}
    definitions: dict[str, Task | None] = {}
    for task, digest in digests.items():
        if needs.gram:
            headers, of_gram = files.read_statistic(gram[task], files.GramMetadata)
            grams[task] = StoredGrams(headers, of_gram.inputs, of_gram.transposed)
            records["gram"][task] = _record(gram[task], of_gram, task, experts[task], digest)
            definitions[task] = of_gram.definition
        if needs.fisher:
            values[task], metadata = _read_fisher(fisher[task], needs)
            records["fisher"][task] = _record(fisher[task], metadata, task, experts[task], digest)
            definitions[task] = metadata.definition
    return Statistics(values, grams, records, definitions)


def _read_fisher(path: Path, needs: Needs) -> tuple[Any, files.Metadata]:
    if needs.fisher == "parameters":
        return files.read_statistic(path, files.StatisticMetadata, needs.statistic)
    values, _, metadata = files.read_fisher(path)
    return values, metadata


def _record(
    path: Path, metadata: files.Metadata, task: str, expert: Path, digest: str
) -> Statistic:
    """The recipe's entry about a statistic; UserError if it is of another task or expert."""
    if metadata.task != task:
        raise UserError(f"{path}: of task {metadata.task}, not {task}; give that of {task}")
    checkpoint = metadata.checkpoint
    if digest != checkpoint.digest and published.identity(expert) != checkpoint.identity:
        raise UserError(f"{path}: of another checkpoint than the expert of {task}; make it again")
    entries = metadata.model_dump(include=set(Statistic.model_fields))
    entries |= {"digest": artifacts.digest_file(path), "values": files.digest_values(path)}
    return Statistic(**entries)


@dataclass(frozen=True)
class Parameter:
    """A parameter to merge, and where its inputs lie; tuples have an item for each expert.

    Attributes:
        places: numbers of the plan's tasks whose experts have it. Only a pooler may be missing:
            taggers and embedding models have none.
        base: the base's tensor, if it is needed.
        fisher: the Fisher information of each entry, if the method needs it.
        grams: Gram matrices, if the method needs them and this is the matrix of a linear map.
        first_row: if this is a range of rows whose tokens only some experts have, its first row in
            the parameter; such rows are averaged over the experts that have them.
        is_part: whether this is a range of a parameter's rows.
        is_linear_map: whether this is the matrix of a linear map; set only if the method needs it.
        is_transposed: whether such a matrix is stored [n, rows].
    """

    spec: TensorSpec
    places: tuple[int, ...]
    experts: tuple[TensorHeader, ...]
    base: TensorHeader | None
    fisher: tuple[TensorHeader, ...] = ()
    grams: tuple[TensorHeader, ...] = ()
    first_row: int = 0
    is_part: bool = False
    is_linear_map: bool = False
    is_transposed: bool = False


@dataclass(frozen=True)
class Plan:
    """A merge that is checked and not yet computed.

    Attributes:
        settings: how to merge.
        tuning: the method's settings with every "auto" replaced.
        tasks: in order of name, which is the order of the experts in every sequence.
        coefficients: ``lambda_j``.
        scale: the scale of the merged task vector; "auto" until it is known.
        parameters: the encoder's parameters, in the order of the output file.
        heads: where each task's head lies, by tensor.
        claims, nodes: which mask nodes weigh each parameter, and each expert's Fisher information.
        widest: the task whose expert has all tokens.
    """

    settings: MergeSettings
    tuning: Tuning
    tasks: tuple[str, ...]
    coefficients: tuple[float, ...]
    scale: float | str
    parameters: list[Parameter]
    heads: Mapping[str, Mapping[str, TensorHeader]] = field(default_factory=dict)
    claims: Mapping[str, Claim] = field(default_factory=dict)
    nodes: Sequence[NodeValues] = ()
    widest: str = ""

    @property
    def specs(self) -> list[TensorSpec]:
        """The tensors of the output files in order; ranges of a parameter's rows are joined."""
        specs: dict[str, TensorSpec] = {}
        for name, dtype, shape in (each.spec for each in self.parameters):
            rows = specs[name].shape[0] + shape[0] if name in specs else 0
            specs[name] = TensorSpec(name, dtype, (rows, *shape[1:]) if rows else shape)
        return list(specs.values())

    @property
    def tokens(self) -> int | None:
        """The number of embeddings, if the experts' numbers differ; otherwise None."""
        ends = [each.first_row + each.spec.shape[0] for each in self.parameters if each.first_row]
        return max(ends, default=None)

    @property
    def method(self) -> Method:
        """The merge method."""
        return METHODS[self.settings.method]

    @property
    def stored(self) -> set[TensorHeader]:
        """All stored tensors that the merge reads."""
        groups = ((*p.experts, *p.fisher, *p.grams, p.base) for p in self.parameters)
        return {header for group in groups for header in group if header}

    def fisher(self, parameter: Parameter) -> list[Tensor]:
        """The mask nodes' Fisher information for a parameter, broadcastable against it."""
        claim = self.claims[parameter.spec.name]
        nodes = [self.nodes[place] for place in parameter.places]
        return [torch.from_numpy(architectures.weights(claim, each)) for each in nodes]

    def coefficients_of(self, parameter: Parameter) -> list[float]:
        """``lambda_j`` of the experts that have a parameter; all 1 if all are zero."""
        lambdas = [self.coefficients[place] for place in parameter.places]
        return lambdas if any(lambdas) else [1.0] * len(lambdas)


NO_STATISTICS = Statistics()


def plan_merge(
    experts: Mapping[str, Path],
    settings: MergeSettings,
    base: Path | None = None,
    statistics: Statistics = NO_STATISTICS,
) -> Plan:
    """Plan a merge: check that the experts, the base and the statistics fit together.

    Args:
        experts: checkpoint folders by task.
        settings: how to merge.
        base: the folder of the model that they were fine-tuned from.
        statistics: the statistics that the method needs, of every expert.

    Raises:
        UserError: names what is wrong, and where.
    """
    tasks, method, has_base = tuple(sorted(experts)), METHODS[settings.method], base is not None
    tuning = tuned(method.name, settings.mapping, has_base, settings.normalise, settings.exponent)
    scale = 1.0 if settings.scale == "auto" and not tuning.growth else settings.scale
    needs_base = method.base or scale != 1
    if needs_base and not has_base:
        what = f"method {method.name}" if method.base else "--scale"
        raise UserError(f"{what} needs the model that the experts were tuned from; give --base DIR")
    stored = {task: stored_tensors(experts[task]) for task in tasks}
    encoders = {f"expert {task}": encoder for task, (encoder, _) in stored.items()}
    config = checkpoints.load_config(experts[tasks[0]])
    kind = checkpoints.kind_in(experts[tasks[0]], config)
    based = _base_tensors(base, kind) if base and needs_base else None
    _drop_zero_bias([*encoders.values(), *([based] if based else [])])
    tokens = {f"expert {task}": _tokens(experts[task]) for task in tasks}
    tokens |= {"base": _tokens(base)} if base and needs_base else {}
    is_same = len(set(tokens.values())) == 1
    by_token = set[str]() if is_same else checkpoints.token_parameters(config, kind)
    parameters = matching(encoders, based, tokens, by_token)
    if method.fisher == "parameters":
        parameters = [_with_fisher(each, tasks, statistics.fisher) for each in parameters]
    if method.gram:
        parameters = [_with_grams(each, tasks, statistics.grams) for each in parameters]
    claims, nodes = {}, []
    if "is_linear_map" in method.arguments:
        maps = checkpoints.linear_maps(config, kind)
        parameters = [
            replace(each, is_linear_map=True, is_transposed=maps[each.spec.name])
            if each.spec.name in maps
            else each
            for each in parameters
        ]
    if method.fisher == "nodes":
        shapes = {each.spec.name: each.spec.shape for each in parameters if not each.first_row}
        claims = architectures.claims(config, shapes, settings.mapping)
        counts = architectures.node_counts(config, shapes)
        for task in tasks:
            values = statistics.fisher[task]
            _check_counts(task, values, counts)
            nodes.append(architectures.tempered(values, tuning.normalise, tuning.exponent))
    lambdas = coefficients(tasks, settings.coefficients)
    heads = {task: head for task, (_, head) in stored.items()}
    widest = max(tasks, key=lambda task: tokens[f"expert {task}"].used)
    return Plan(settings, tuning, tasks, lambdas, scale, parameters, heads, claims, nodes, widest)


def _base_tensors(base: Path, kind: KindName) -> dict[str, TensorHeader]:
    """The stored tensors of the base of models of a kind, by names in the base model.

    If the models have heads, it is read as its own kind: it may have a pooler or not.
    """
    return stored_tensors(base, None if KINDS[kind].has_head else kind)[0]


def _drop_zero_bias(encoders: Sequence[dict[str, TensorHeader]]) -> None:
    """Drop a bias that is zero from encoders where some of them have none, as BartModel has."""
    if not all(checkpoints.ZERO_BIAS in encoder for encoder in encoders):
        for encoder in encoders:
            bias = encoder.get(checkpoints.ZERO_BIAS)
            if bias and checkpoints.is_zero(bias):
                del encoder[checkpoints.ZERO_BIAS]


class Tokens(NamedTuple):
    """The number of a checkpoint's tokens, and of its rows of embeddings, of which some may be
    padding."""

    used: int
    rows: int


def _tokens(folder: Path) -> Tokens:
    rows = getattr(checkpoints.load_config(folder), "vocab_size", None) or 0
    if not any((folder / name).is_file() for name in checkpoints.VOCABULARY_FILES):
        return Tokens(rows, rows)
    return Tokens(max(loading.vocabulary(folder).values(), default=-1) + 1, rows)


def coefficients(tasks: Sequence[str], by_task: Mapping[str, float]) -> tuple[float, ...]:
    """The coefficients in the order of the tasks; 1 for a task without a coefficient."""
    if unknown := sorted(set(by_task) - set(tasks)):
        raise UserError(f"--coefficient {unknown[0]}: no such expert; there are {', '.join(tasks)}")
    lambdas = tuple(float(by_task.get(task, 1.0)) for task in tasks)
    if not any(lambdas):
        raise UserError("--coefficient: all are zero; at least one expert must count")
    return lambdas


def stored_tensors(
    folder: Path, kind: KindName | None = None
) -> tuple[dict[str, TensorHeader], dict[str, TensorHeader]]:
    """The stored tensors of a checkpoint's encoder, by names in the base model, and of its head.

    Args:
        folder: the checkpoint.
        kind: the kind of task that it is read for; default: its own.
    """
    headers, config = tensor_headers(folder), checkpoints.load_config(folder)
    names = checkpoints.stored_names(folder, config, kind or checkpoints.kind_in(folder, config))
    for stored in (*names.encoder.values(), *names.head.values()):
        if (dtype := headers[stored].dtype) not in DTYPES:
            raise UserError(f"{folder}: tensor {stored} has dtype {dtype}; convert it to float32")
    encoder = {name: headers[stored] for name, stored in names.encoder.items()}
    return encoder, {name: headers[stored] for name, stored in names.head.items()}


def matching(
    experts: Mapping[str, Mapping[str, TensorHeader]],
    base: Mapping[str, TensorHeader] | None,
    tokens: Mapping[str, Tokens] = MappingProxyType({}),
    by_token: Set[str] = frozenset(),
) -> list[Parameter]:
    """The parameters to merge, in the order of the output file.

    All experts must have the same parameters, except for a pooler and for rows of tokens that only
    some of them have.

    The output's dtype is the widest of the experts' (float16 with bfloat16 gives float32).
    Parameters are ordered as safetensors orders them: by falling size of the dtype, then by name.

    Args:
        experts: tensors by name, by "expert TASK".
        base: the base model's tensors by name; it may have more of them.
        tokens: numbers of tokens, by "expert TASK" and "base".
        by_token: the parameters with a row for each token, if the numbers of tokens differ.

    Raises:
        UserError: names the expert and the tensor that is missing or has another shape.
    """
    parameters = []
    for name in sorted({name for tensors in experts.values() for name in tensors}):
        headers = {source: tensors.get(name) for source, tensors in experts.items()}
        if name.startswith("pooler."):
            headers = {source: header for source, header in headers.items() if header}
        stored = [header for header in headers.values() if header]
        if base is not None:
            headers["base"] = base.get(name)
        dtype = reduce(torch.promote_types, (DTYPES[header.dtype] for header in stored))
        parts = _parts(headers, tokens) if name in by_token else [(0, headers)]
        for first_row, part in parts:
            shape = next(header.shape for header in part.values() if header)
            for source, header in part.items():
                if header is None or header.shape != shape:
                    problem = f"has shape {list(header.shape)}" if header else "is missing"
                    raise UserError(
                        f"{source}: tensor {name} {problem}, another expert's has shape"
                        f" {list(shape)}; merge experts of one base model"
                    )
            places = tuple(place for place, source in enumerate(experts) if part.get(source))
            own = tuple(header for source in experts if (header := part.get(source)))
            spec = TensorSpec(name, dtype, shape)
            based = None if first_row else part.get("base")
            parameter = Parameter(spec, places, own, based, first_row=first_row)
            parameters.append(replace(parameter, is_part=len(parts) > 1))
    order = [(-each.spec.dtype.itemsize, each.spec.name, each.first_row) for each in parameters]
    return [parameters[number] for number in sorted(range(len(order)), key=order.__getitem__)]


Part = Mapping[str, TensorHeader | None]


def _parts(headers: Part, tokens: Mapping[str, Tokens]) -> list[tuple[int, Part]]:
    """Divide a parameter's rows: those whose tokens all sources have, and those that some have.

    Rows of padding, for which no source has a token, come from all sources that have them.
    """
    own = {source: tokens[source] for source in headers}
    for source, header in headers.items():
        if header is None or header.shape[0] != own[source].rows:
            return [(0, headers)]  # `matching` refuses it
    parts: list[tuple[int, Part]] = []
    start = 0
    for stop in sorted({size for each in own.values() for size in each if size}):
        having = [source for source, each in own.items() if each.used >= stop]
        having = having or [source for source, each in own.items() if each.rows >= stop]
        if having != ["base"]:
            parts.append((start, {s: _rows(h, start, stop) for s in having if (h := headers[s])}))
            start = stop
    return parts


def _rows(header: TensorHeader, start: int, stop: int) -> TensorHeader:
    """The header of a range of a stored tensor's rows."""
    size = (header.end - header.start) // header.shape[0]
    begin = header.start + start * size
    shape = (stop - start, *header.shape[1:])
    return header._replace(shape=shape, start=begin, end=begin + shape[0] * size)


def _with_fisher(
    parameter: Parameter, tasks: Sequence[str], fisher: Mapping[str, Mapping[str, TensorHeader]]
) -> Parameter:
    """Add every expert's Fisher information of each entry to a parameter."""
    name, _, shape = parameter.spec
    if parameter.first_row:
        return parameter
    headers = {task: fisher[task].get(name) for task in (tasks[n] for n in parameter.places)}
    if parameter.is_part:
        headers = {task: _rows(each, 0, shape[0]) for task, each in headers.items() if each}
    return replace(parameter, fisher=_of_shape(headers, shape, f"full Fisher of {name}"))


def _with_grams(
    parameter: Parameter, tasks: Sequence[str], grams: Mapping[str, StoredGrams]
) -> Parameter:
    """Add the Gram matrices of the inputs to a parameter that is the matrix of a linear map."""
    name, _, shape = parameter.spec
    module = name.removesuffix(".weight")
    if module == name or not any(module in each.inputs for each in grams.values()):
        return parameter
    is_transposed = any(module in each.transposed for each in grams.values())
    size = shape[0 if is_transposed else 1]
    own = [tasks[place] for place in parameter.places]
    headers = {task: grams[task].moments.get(grams[task].inputs.get(module, "")) for task in own}
    stored = _of_shape(headers, (size, size), f"Gram matrix of {name}")
    return replace(parameter, grams=stored, is_transposed=is_transposed)


def _of_shape(
    headers: Mapping[str, TensorHeader | None], shape: tuple[int, ...], what: str
) -> tuple[TensorHeader, ...]:
    for task, header in headers.items():
        if header is None or header.shape != shape:
            raise UserError(
                f"expert {task}: no {what} of shape {list(shape)}; compute its statistics again"
            )
    return tuple(header for header in headers.values() if header)


def _check_counts(task: str, fisher: Mapping[Site, np.ndarray], counts: Mapping[Site, int]) -> None:
    """Refuse Fisher information whose nodes are not the model's."""
    for site in sorted({*counts, *fisher}):
        number, expected = len(fisher.get(site, ())), counts.get(site, 0)
        if number != expected:
            raise UserError(
                f"expert {task}: the Fisher information has {number} {site.node} nodes in layer"
                f" {site.layer}, the model {expected}; give that of this checkpoint"
            )
