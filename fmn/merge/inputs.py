"""What a merge needs, checked before it is computed: only headers and small files are read."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import reduce
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fmn.errors import UserError
from fmn.fisher import architectures, files
from fmn.fisher.architectures import Claim, NodeValues, Site
from fmn.merge.methods import METHODS, Method, Tuning, tuned
from fmn.merge.recipe import MergeSettings, Statistic
from fmn.merge.stream import DTYPES, TensorSpec
from fmn.models import checkpoints, labels
from fmn.models.headers import TensorHeader, tensor_headers
from fmn.store import artifacts
from fmn.tasks.task import get_task


class StoredGrams(NamedTuple):
    """An expert's Gram matrices by input, the input of each module, and the modules whose weights
    are stored [n, rows]."""

    moments: Mapping[str, TensorHeader]
    inputs: Mapping[str, str]
    transposed: Sequence[str]


@dataclass(frozen=True)
class Statistics:
    """The statistics that a method takes, by task.

    Attributes:
        fisher: of the mask nodes, or, for a method that takes the Fisher information of all
            parameters, where that lies by parameter.
        records: what the recipe says of them, by "fisher" and "gram".
    """

    fisher: Mapping[str, Any] = field(default_factory=dict)
    grams: Mapping[str, StoredGrams] = field(default_factory=dict)
    records: Mapping[str, Mapping[str, Statistic]] = field(default_factory=dict)


def read_statistics(
    method: Method, digests: Mapping[str, str], fisher: Mapping[str, Path], gram: Mapping[str, Path]
) -> Statistics:
    """The statistics that a method takes, each of the very expert and task that it is given for.

    Args:
        digests: of the experts, by task.
        fisher, gram: files by task.

    Raises:
        UserError: one is damaged, or of another expert or task.
    """
    values: dict[str, Any] = {}
    grams: dict[str, StoredGrams] = {}
    records: dict[str, dict[str, Statistic]] = {"fisher": {}, "gram": {}}
    for task, digest in digests.items():
        metadata: files.Metadata
        if method.fisher == "nodes":
            values[task], _, metadata = files.read_fisher(fisher[task])
            records["fisher"][task] = _record(fisher[task], metadata, task, digest)
        if method.fisher == "parameters":
            record = files.StatisticMetadata
            values[task], metadata = files.read_statistic(fisher[task], record)
            records["fisher"][task] = _record(fisher[task], metadata, task, digest)
        if method.gram:
            moments, metadata = files.read_statistic(gram[task], files.GramMetadata)
            records["gram"][task] = _record(gram[task], metadata, task, digest)
            grams[task] = StoredGrams(moments, metadata.inputs, metadata.transposed)
    return Statistics(values, grams, records)


def _record(path: Path, metadata: files.Metadata, task: str, digest: str) -> Statistic:
    """A statistic for the recipe; it must be of this task and expert."""
    if metadata.task != task:
        raise UserError(f"{path}: of task {metadata.task}, given for {task}; give that of {task}")
    if metadata.checkpoint.digest != digest:
        raise UserError(f"{path}: of another checkpoint than the expert of {task}; make it again")
    entries = metadata.model_dump(include=set(Statistic.model_fields))
    values = files.digest_values(path)
    return Statistic(**{**entries, "digest": artifacts.digest_file(path), "values": values})


def read_labels(path: Path, task: str, digest: str) -> labels.Labels:
    """How an expert's outputs stand for the labels, as its Fisher information says."""
    metadata: files.Metadata
    if path.suffix == ".safetensors":
        metadata = files.read_statistic(path, files.StatisticMetadata)[1]
    else:
        metadata = files.read_fisher(path)[2]
    _record(path, metadata, task, digest)
    return metadata.labels.get(task) or labels.as_they_stand(get_task(task))


@dataclass(frozen=True)
class Parameter:
    """A parameter to merge, and where its inputs lie; tuples have an item for each expert.

    Attributes:
        base: the base's tensor, if it is needed.
        fisher: the Fisher information of each entry, if the method takes that.
        grams: Gram matrices, if the method takes them and this is the matrix of a linear map.
        is_transposed: such a matrix is stored [n, rows].
    """

    spec: TensorSpec
    experts: tuple[TensorHeader, ...]
    base: TensorHeader | None
    fisher: tuple[TensorHeader, ...] = ()
    grams: tuple[TensorHeader, ...] = ()
    is_transposed: bool = False


@dataclass(frozen=True)
class Plan:
    """A merge that was checked and not yet computed.

    Attributes:
        tasks: in order of name, the order of all that has an item for each expert.
        coefficients: ``lambda_j``.
        scale: of the merged task vector; "auto" until it is known.
        parameters: the encoder's, in the order of the output file.
        heads: where each task's head lies, by tensor.
        claims, nodes: which mask nodes weigh each parameter, and each expert's Fisher information.
    """

    settings: MergeSettings
    tuning: Tuning
    tasks: tuple[str, ...]
    coefficients: tuple[float, ...]
    scale: float | str
    parameters: list[Parameter]
    heads: Mapping[str, Mapping[str, TensorHeader]]
    claims: Mapping[str, Claim]
    nodes: Sequence[NodeValues]

    @property
    def stored(self) -> set[TensorHeader]:
        """Everything that the merge reads."""
        groups = ((*p.experts, *p.fisher, *p.grams, p.base) for p in self.parameters)
        return {header for group in groups for header in group if header}

    def fisher(self, name: str) -> list[Tensor]:
        """The mask nodes' Fisher information for a parameter, broadcastable against it."""
        claim = self.claims[name]
        return [torch.from_numpy(architectures.weights(claim, nodes)) for nodes in self.nodes]


NO_STATISTICS = Statistics()


def plan(
    experts: Mapping[str, Path],
    settings: MergeSettings,
    base: Path | None = None,
    statistics: Statistics = NO_STATISTICS,
) -> Plan:
    """Check that experts can be merged in this way.

    Args:
        experts: checkpoint folders by task.
        base: the folder of the model that they were fine-tuned from.

    Raises:
        UserError: names what is wrong, and where.
    """
    tasks, method = tuple(sorted(experts)), METHODS[settings.method]
    has_base = base is not None
    tuning = tuned(method.name, settings.mapping, has_base, settings.normalise, settings.exponent)
    scale = 1.0 if settings.scale == "auto" and not tuning.growth else settings.scale
    needs_base = method.base or scale != 1
    if needs_base and not has_base:
        what = f"method {method.name}" if method.base else "--scale"
        raise UserError(f"{what} needs the model that the experts were tuned from; give --base DIR")
    stored = {task: _stored(experts[task]) for task in tasks}
    encoders = {f"expert {task}": encoder for task, (encoder, _) in stored.items()}
    based = _stored(base)[0] if base and needs_base else None
    parameters = matching(encoders, based)
    if method.fisher == "parameters":
        parameters = [_with_fisher(each, tasks, statistics.fisher) for each in parameters]
    if method.gram:
        parameters = [_with_grams(each, tasks, statistics.grams) for each in parameters]
    claims, nodes = {}, []
    if method.fisher == "nodes":
        config = checkpoints.load_config(experts[tasks[0]])
        shapes = {each.spec.name: each.spec.shape for each in parameters}
        claims = architectures.claims(config, shapes, settings.mapping)
        counts = architectures.node_counts(config, shapes)
        for task in tasks:
            fisher = _check_nodes(task, statistics.fisher, counts)
            nodes.append(architectures.tempered(fisher, tuning.normalise, tuning.exponent))
    lambdas = coefficients(tasks, settings.coefficients)
    heads = {task: head for task, (_, head) in stored.items()}
    return Plan(settings, tuning, tasks, lambdas, scale, parameters, heads, claims, nodes)


def coefficients(tasks: Sequence[str], by_task: Mapping[str, float]) -> tuple[float, ...]:
    """The coefficients in the order of the tasks; one for a task that is left out."""
    if unknown := sorted(set(by_task) - set(tasks)):
        raise UserError(f"--coefficient {unknown[0]}: no such expert; there are {', '.join(tasks)}")
    lambdas = tuple(float(by_task.get(task, 1.0)) for task in tasks)
    if not any(lambdas):
        raise UserError("--coefficient: all are zero; at least one expert must count")
    return lambdas


def _stored(folder: Path) -> tuple[dict[str, TensorHeader], dict[str, TensorHeader]]:
    """Where a checkpoint's encoder lies, by names in the base model, and where its head."""
    headers = tensor_headers(folder)
    names = checkpoints.encoder_names(checkpoints.load_config(folder), headers)
    encoder = {name: headers[stored] for name, stored in names.encoder.items()}
    return encoder, {name: headers[stored] for name, stored in names.head.items()}


def matching(
    experts: Mapping[str, Mapping[str, TensorHeader]], base: Mapping[str, TensorHeader] | None
) -> list[Parameter]:
    """The parameters to merge, in the order of the output file; all experts must have the same.

    The output's dtype is the widest of the experts' (float16 with bfloat16 gives float32).
    Parameters are ordered as safetensors does, by falling size of their dtype, then by name.

    Args:
        experts: tensors by name, by "expert TASK".
        base: the same of the base model, which may have more tensors.

    Raises:
        UserError: names the expert and the tensor that is missing, or has another shape or dtype.
    """
    parameters = []
    for name in sorted({name for tensors in experts.values() for name in tensors}):
        headers = {source: tensors.get(name) for source, tensors in experts.items()}
        stored = [header for header in headers.values() if header]
        dtypes = [DTYPES.get(header.dtype) for header in stored]
        is_floating = all(dtype is not None and dtype.is_floating_point for dtype in dtypes)
        if base is not None and is_floating:
            headers["base"] = base.get(name)
        other = next(source for source, header in headers.items() if header)
        for source, header in headers.items():
            if header is None:
                raise UserError(
                    f"{source}: lacks tensor {name}, which {other} has; merge like with like"
                )
            _check_same(f"{source}: tensor {name}", header, other, stored[0], is_floating)
        dtype = reduce(torch.promote_types, (dtype for dtype in dtypes if dtype))
        spec = TensorSpec(name, dtype, stored[0].shape)
        parameters.append(Parameter(spec, tuple(stored), headers.get("base")))
    return sorted(parameters, key=lambda each: (-each.spec.dtype.itemsize, each.spec.name))


def _check_same(
    place: str, header: TensorHeader, other: str, expected: TensorHeader, is_floating: bool
) -> None:
    if header.dtype not in DTYPES:
        raise UserError(f"{place} has dtype {header.dtype}; convert it")
    if header.shape != expected.shape or not (is_floating or header.dtype == expected.dtype):
        raise UserError(
            f"{place} is {list(header.shape)} of {header.dtype}, in {other} {list(expected.shape)}"
            f" of {expected.dtype}; merge experts of one base model"
        )


def _with_fisher(
    parameter: Parameter, tasks: Sequence[str], fisher: Mapping[str, Mapping[str, TensorHeader]]
) -> Parameter:
    """The parameter with every expert's Fisher information of each entry."""
    name, dtype, shape = parameter.spec
    if not dtype.is_floating_point:
        return parameter
    stored = [
        _of_shape(fisher.get(task, {}).get(name), shape, f"expert {task}: no full Fisher of {name}")
        for task in tasks
    ]
    return replace(parameter, fisher=tuple(stored))


def _with_grams(
    parameter: Parameter, tasks: Sequence[str], grams: Mapping[str, StoredGrams]
) -> Parameter:
    """The parameter; if it is the matrix of a linear map, with the Gram matrices of its inputs."""
    name, _, shape = parameter.spec
    module = name.removesuffix(".weight")
    if module == name or not any(module in each.inputs for each in grams.values()):
        return parameter
    is_transposed = any(module in each.transposed for each in grams.values())
    size = shape[0 if is_transposed else 1]
    stored = []
    for task in tasks:
        each = grams.get(task, StoredGrams({}, {}, ()))
        header = each.moments.get(each.inputs.get(module, ""))
        place = f"expert {task}: no Gram matrices of {name}"
        stored.append(_of_shape(header, (size, size), place))
    return replace(parameter, grams=tuple(stored), is_transposed=is_transposed)


def _of_shape(header: TensorHeader | None, shape: tuple[int, ...], problem: str) -> TensorHeader:
    if header is None or header.shape != shape:
        raise UserError(f"{problem} of shape {list(shape)}; compute its statistics again")
    return header


def _check_nodes(
    task: str, fisher: Mapping[str, NodeValues], counts: Mapping[Site, int]
) -> NodeValues:
    """An expert's Fisher information, which must have the model's nodes and be finite and >= 0."""
    if task not in fisher:
        raise UserError(f"expert {task}: no Fisher information; give --fisher {task}=FILE")
    values = fisher[task]
    for site in sorted({*counts, *values}):
        nodes = values.get(site, np.empty(0))
        if len(nodes) != counts.get(site, 0):
            raise UserError(
                f"expert {task}: the Fisher information has {len(nodes)} {site.node} nodes in layer"
                f" {site.layer}, the model {counts.get(site, 0)}; give that of this checkpoint"
            )
        if not (np.isfinite(nodes).all() and (nodes >= 0).all()):
            raise UserError(
                f"expert {task}: the Fisher information of layer {site.layer}, {site.node}, is"
                " negative, NaN or infinite; make it again with `fmn fisher`"
            )
    return values
