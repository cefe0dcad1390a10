"""Merge parameters, and write the merged model's folder (described in `fmn.merge.recipe`)."""

import math
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from fmn.errors import UserError
from fmn.merge import stream
from fmn.merge.inputs import (
    NO_STATISTICS,
    Parameter,
    Plan,
    Statistics,
    coefficients,
    plan_merge,
)
from fmn.merge.methods import METHODS
from fmn.merge.recipe import CARD, RECIPE, MergeSettings, Recipe, card
from fmn.merge.rules import generator
from fmn.merge.stream import DTYPES, NAMES, WORKING_SET, Files, Read, row_slices
from fmn.models import checkpoints, labels
from fmn.models.checkpoints import CONFIG, EMBEDDING_FILES, SMALL_FILES, read_config
from fmn.models.devices import resolve_device, side_by_side
from fmn.models.embedding import leave_out_dense
from fmn.store.artifacts import digest_file, remember_digest, visible
from fmn.store.headers import INDEX, TensorHeader, file_headers, tensor_headers, write_json
from fmn.store.stage import Progress, no_progress, write_record
from fmn.tasks.kinds import KINDS
from fmn.tasks.task import Task, write_task

_FREED = 31 * 2**20  # bytes
_HEAD_SETTINGS = {"id2label", "label2id", "num_labels", "problem_type", "finetuning_task"}
_HEAD_SETTINGS |= {"task_specific_params"}
_LOCAL_SETTINGS = {"_name_or_path", "auto_map", "torch_dtype"}


def write_model(
    folder: Path,
    experts: Mapping[str, Path],
    settings: MergeSettings,
    *,
    base: Path | None = None,
    statistics: Statistics = NO_STATISTICS,
    definitions: Mapping[str, Task] | None = None,
    lineage: Mapping[str, Any] | None = None,
    encoder_tensors: Mapping[str, Tensor] | None = None,
    progress: Progress = no_progress,
    shard_bytes: int = stream.SHARD_BYTES,
) -> Recipe:
    """Merge experts into a folder; the result does not depend on the experts' order.

    Args:
        folder: where to write; it must be empty. After an error it is left incomplete.
        experts: checkpoint folders by task.
        settings: how to merge.
        base: the folder of the model that they were fine-tuned from.
        statistics: the statistics that the method needs.
        definitions: the tasks' definitions. If the outputs of a head have the names of the task's
            labels, they are written as the task spells them; otherwise they keep their names.
        lineage: further entries of the recipe.
        encoder_tensors: the merged encoder by names in the base model, if it is computed already.
        progress: called with the bytes of the encoder that are written, and with all its bytes.
        shard_bytes: a larger encoder is written in several files.

    Raises:
        UserError: the experts cannot be merged with these settings.
    """
    plan = _with_scale(plan_merge(experts, settings, base, statistics))
    first = _first(plan.tasks, experts)
    names = checkpoints.names_in_model(checkpoints.load_config(first), checkpoints.kind_in(first))
    specs = [spec._replace(name=names.get(spec.name, spec.name)) for spec in plan.specs]
    parts = stream.shards(specs, shard_bytes)
    files = dict(zip(stream.shard_names(len(parts)), parts, strict=True))
    encoder = folder / "encoder"
    encoder.mkdir(parents=True)
    with stream.reading() as read:
        merged = merged_pieces(plan, read)
        if encoder_tensors:
            merged = (encoder_tensors[spec.name].flatten() for spec in plan.specs)
        pieces = _counted(plan, merged, progress)
        digests = {
            name: stream.write_file(encoder / name, part, pieces) for name, part in files.items()
        }
    _write_encoder_settings(encoder, experts[plan.widest], first, files, plan.tokens)
    for task in plan.tasks:
        definition = (definitions or {}).get(task)
        target, head = folder / "tasks" / task, plan.heads[task]
        _write_task(target, experts[task], head, definition, files, plan.tokens)
    for name, digest in digests.items():  # after the links, which change the file's status
        remember_digest(encoder / name, digest)
    entries = {**_own_entries(plan), "definitions": dict(definitions or {}), **(lineage or {})}
    return _write_recipe(folder, Recipe(**entries))


def _first(tasks: Sequence[str], experts: Mapping[str, Path]) -> Path:
    """The expert that the encoder's settings come from: an embedding model, if there is one."""
    of_embeddings = (t for t in tasks if checkpoints.kind_in(experts[t]) == "sentence-similarity")
    return experts[next(of_embeddings, tasks[0])]


def _own_entries(plan: Plan) -> dict[str, Any]:
    """The recipe's entries about the merge itself, with every "auto" replaced."""
    used = {**plan.settings.used("coefficient"), "tasks": list(plan.tasks), "scale": plan.scale}
    used["coefficients"] = dict(zip(plan.tasks, plan.coefficients, strict=True))
    if plan.method.fisher == "nodes":
        used |= {"normalise": plan.tuning.normalise, "exponent": plan.tuning.exponent}
    if plan.method.density:
        used["density"] = plan.settings.density or plan.method.density
    return used


def read_encoder(model: Path) -> dict[str, Tensor]:
    """The tensors of a merged model's encoder, by names in the base model."""
    tensors: dict[str, Tensor] = {}
    names = _names_in_base(model / "encoder")
    for file in sorted((model / "encoder").glob("*.safetensors")):
        tensors |= {names.get(name, name): tensor for name, tensor in load_file(file).items()}
    return tensors


def _names_in_base(encoder: Path) -> dict[str, str]:
    """Names in the base model by stored name, for the tensors of an encoder that have two names."""
    config = checkpoints.load_config(encoder)
    names = checkpoints.names_in_model(config, checkpoints.kind_of(config))
    return {stored: name for name, stored in names.items()}


def write_calibrated(
    folder: Path, model: Path, encoder: Mapping[str, Tensor], recipe: Recipe
) -> Recipe:
    """Write a merged model with other values in its encoder; heads are hard links to the model's.

    Args:
        folder: where to write; it must be empty.
        model: the merged model's folder; its tasks share the whole encoder.
        encoder: all of the encoder's tensors, by names in the base model.
        recipe: the new model's recipe.
    """
    names = sorted(file.name for file in (model / "encoder").glob("*.safetensors"))
    shards = stream.shard_names(len(names) + 1)[:-1]  # their names in a task's folder
    for name, source in visible(model, ("encoder", "tasks")).items():
        is_inner = len(Path(name).parts) > (
            2 if name.startswith("encoder/") else 3
        )  # a dense layer
        if is_inner or source.name not in (*names, *shards):
            digest = digest_file(source)
            stream.link(source, folder / name)
            remember_digest(folder / name, digest)  # a link changes the file's status
    (folder / "encoder").mkdir(exist_ok=True)
    in_base = _names_in_base(model / "encoder")
    for name, shard in zip(names, shards, strict=True):
        stored = file_headers(model / "encoder" / name)
        tensors = {
            key: encoder[in_base.get(key, key)].to(DTYPES[header.dtype])
            for key, header in stored.items()
        }
        save_file(tensors, folder / "encoder" / name, {"format": "pt"})
        for task in recipe.tasks:  # a task without a head has only the encoder's files
            is_headed = (model / "tasks" / task / shard).exists()
            own_name = shard if is_headed else name
            os.link(folder / "encoder" / name, folder / "tasks" / task / own_name)
    return _write_recipe(folder, recipe)


def write_realigned(
    folder: Path,
    model: Path,
    heads: Mapping[str, Mapping[str, Tensor]],
    recipe: Recipe,
    own: Mapping[str, Mapping[str, Tensor]],
) -> Recipe:
    """Write a merged model with new tensors in its heads, and with its tasks' own parts.

    Files that do not change are hard links to the model's, or copies on another file system.

    Args:
        folder: where to write; it must be empty.
        model: the merged model's folder.
        heads: by task, the new tensors by name; they are stored in the old tensors' dtypes.
        recipe: the new model's recipe.
        own: by task, the tensors that it has in place of the encoder's, by names in the base model;
            they are stored in the encoder's dtypes.
    """
    for name, source in visible(model, ("encoder", "tasks")).items():
        _, place, *_ = [*Path(name).parts, ""]
        is_headless = name.startswith("tasks/") and place not in heads
        if is_headless or ".safetensors" not in source.name:
            stream.link(source, folder / name)
    encoder = tensor_headers(model / "encoder")
    own_parts = list(dict.fromkeys(name for parts in own.values() for name in parts))
    shared, digests = stream.write_split(folder / "encoder", encoder, own_parts)
    for task, tensors in heads.items():
        stored = load_file(max((model / "tasks" / task).glob("*.safetensors")))
        changed = {name: tensor.to(stored[name].dtype) for name, tensor in tensors.items()}
        parts = {name: part.to(DTYPES[encoder[name].dtype]) for name, part in own[task].items()}
        stream.write_task(folder / "tasks" / task, shared, {**stored, **changed, **parts})
    for path, digest in digests.items():  # after the links, which change the file's status
        remember_digest(path, digest)
    return _write_recipe(folder, recipe)


def in_memory(
    experts: Mapping[str, Path],
    settings: MergeSettings,
    base: Path | None = None,
    statistics: Statistics = NO_STATISTICS,
) -> dict[str, Tensor]:
    """Merge experts in memory; returns the encoder's tensors by names in the base model.

    Values are those that `write_model` writes.
    """
    plan = _with_scale(plan_merge(experts, settings, base, statistics))

    def merged(parameter: Parameter) -> list[Tensor]:
        with stream.reading() as read:
            return list(merged_pieces(replace(plan, parameters=[parameter]), read))

    if plan.method.element_wise:  # limited by memory: more threads would not help
        with stream.reading() as read:
            return merged_tensors(plan, merged_pieces(plan, read))
    device = resolve_device(settings.device)
    return merged_tensors(plan, chain.from_iterable(side_by_side(merged, plan.parameters, device)))


def merger(
    experts: Mapping[str, Path],
    settings: MergeSettings,
    base: Path | None = None,
    statistics: Statistics = NO_STATISTICS,
) -> Callable[[Mapping[str, float], float], dict[str, Tensor]]:
    """Return a function from coefficients by task and a scale to the merged encoder.

    Everything that the merge reads stays in memory, so that many merges can be tried.

    Args:
        experts: checkpoint folders by task.
        settings: how to merge; their coefficients and scale are ignored.
        base: needed for scales other than 1.
        statistics: the statistics that the method needs.
    """
    scale = 1.0 if base is None else 2.0  # 2: the base is read
    settings = settings.model_copy(update={"coefficient": [], "scale": scale})
    plan = plan_merge(experts, settings, base, statistics)
    read = stream.held(plan.stored)

    def merge(by_task: Mapping[str, float], scale: float) -> dict[str, Tensor]:
        lambdas = coefficients(plan.tasks, by_task)
        tuned = replace(plan, coefficients=lambdas, scale=scale)
        return merged_tensors(tuned, merged_pieces(tuned, read))

    return merge


def scale(
    experts: Mapping[str, Path],
    settings: MergeSettings,
    base: Path | None = None,
    statistics: Statistics = NO_STATISTICS,
) -> float:
    """The scale of the merged task vector, with "auto" replaced by a number."""
    return float(_with_scale(plan_merge(experts, settings, base, statistics)).scale)


def effective_number_of(experts: Mapping[str, Path], base: Path) -> float:
    """The effective number of the experts' task vectors (see `effective_number`)."""
    plan = plan_merge(experts, MergeSettings(method="average", scale=0.0), base)
    with stream.reading() as read:
        return effective_number(plan.parameters, read)


# ---- merging parameters ----


def _with_scale(plan: Plan) -> Plan:
    if plan.scale != "auto":
        return plan
    with stream.reading() as read:
        return replace(plan, scale=plan.tuning.scale(effective_number(plan.parameters, read)))


def effective_number(parameters: Sequence[Parameter], read: Read) -> float:
    """The effective number of task vectors, ``mean_j |tau_j|^2 / |mean_j tau_j|^2``.

    Averaging divides their mean squared length by this number. It is the number of experts if the
    task vectors are orthogonal and equally long, and 1 if they are equal.
    """
    single = together = 0.0
    count = max(len(parameter.experts) for parameter in parameters)
    with _one_thread():
        for parameter in parameters:
            if len(parameter.experts) < count or parameter.first_row:
                continue
            for rows in row_slices(parameter.spec.shape, WORKING_SET // 8 // (count + 3)):
                *vectors, base = _read_all((*parameter.experts, parameter.base), rows, read)
                base = base.float().flatten()
                total = torch.zeros_like(base)
                for tensor in vectors:
                    vector = tensor.float().flatten() - base
                    single += float(vector.dot(vector))
                    total += vector
                together += float(total.dot(total))
    return count * single / together if together else 1.0


def merged_tensors(plan: Plan, pieces: Iterator[Tensor]) -> dict[str, Tensor]:
    """The merged encoder's tensors by names in the base model, from their pieces."""
    tensors = {}
    for name, dtype, shape in plan.specs:
        parts = [torch.empty(0, dtype=dtype)]
        while sum(map(len, parts)) < math.prod(shape):
            parts.append(next(pieces))
        tensors[name] = torch.cat(parts).view(shape)
    return tensors


def merged_pieces(plan: Plan, read: Read) -> Iterator[Tensor]:
    """The merged parameters one after another, as consecutive flat pieces in their output dtype.

    Raises:
        UserError: an expert or the base holds NaN or Inf; merged values do not fit the output's
            dtype.
    """
    # New pages cost more time than the sums. After a block of this size was freed, glibc no longer
    # returns smaller ones to the system (mallopt(3), M_MMAP_THRESHOLD, "dynamic").
    torch.empty(_FREED, dtype=torch.uint8)
    is_cut = plan.method.element_wise
    with _one_thread() if is_cut else nullcontext():
        for parameter in plan.parameters:
            shape = parameter.spec.shape
            count = len(parameter.experts) + len(parameter.fisher) + 2
            limit = WORKING_SET // 8 // count if is_cut else math.prod(shape)
            nodes = plan.fisher(parameter) if plan.nodes else []
            for rows in row_slices(shape, limit):
                yield _merged_rows(plan, parameter, nodes, rows, read).flatten()


def _merged_rows(
    plan: Plan, parameter: Parameter, nodes: list[Tensor], rows: slice | None, read: Read
) -> Tensor:
    """Some rows of a merged parameter, in its dtype."""
    settings, name = plan.settings, parameter.spec.name
    method = METHODS["average"] if parameter.first_row else plan.method
    tasks = [plan.tasks[place] for place in parameter.places]
    sources = {f"expert {task}": s for task, s in zip(tasks, parameter.experts, strict=True)}
    if parameter.fisher:
        pairs = zip(tasks, parameter.fisher, strict=True)
        sources |= {f"the full Fisher of {task}": stored for task, stored in pairs}
    if parameter.base:
        sources["base"] = parameter.base
    inputs = dict(zip(sources, _read_all(sources.values(), rows, read), strict=True))
    if parameter.fisher or not method.element_wise:
        _refuse_not_finite(inputs, name)
    base, tensors = inputs.get("base"), list(inputs.values())
    experts = tensors[: len(tasks)]
    fisher = tensors[len(tasks) :][: len(parameter.fisher)]
    fisher = fisher or [_rows_of(each, rows) for each in nodes]
    turned = base
    if parameter.is_transposed:  # to [rows, n]
        experts, fisher = [[t.mT if t.ndim else t for t in each] for each in (experts, fisher)]
        turned = None if base is None else base.mT
    grams = [read(stored, None, None) for stored in parameter.grams]
    device = _device(plan, parameter)
    if device.type != "cpu":
        experts, fisher, grams = [[t.to(device) for t in each] for each in (experts, fisher, grams)]
        turned = turned if turned is None else turned.to(device)
    merged = method(
        experts=experts,
        base=turned,
        coefficients=plan.coefficients_of(parameter),
        fisher=fisher,
        is_linear_map=parameter.is_linear_map,
        grams=[gram.double() for gram in grams] or None,
        generators=[generator(settings.seed, t, name) for t in tasks if method.random],
        density=settings.density or method.density,
        damping=settings.damping,
    )
    merged = (merged.mT if parameter.is_transposed else merged).cpu()
    if plan.scale != 1 and base is not None:
        merged = torch.lerp(base.to(merged.dtype), merged, float(plan.scale))
    merged = merged.to(parameter.spec.dtype)
    if not checkpoints.finite(merged):
        _refuse_not_finite(inputs, name)
        dtype = NAMES[parameter.spec.dtype]
        raise UserError(f"tensor {name}: merged values do not fit {dtype}; use a smaller --scale")
    return merged


def _device(plan: Plan, parameter: Parameter) -> torch.device:
    """The device to merge a parameter on: a GPU for systems of equations and singular values."""
    is_mean = plan.method.element_wise or len(parameter.spec.shape) != 2 or parameter.first_row
    if is_mean or plan.method.random:  # random numbers are drawn on the CPU
        return torch.device("cpu")
    return resolve_device(plan.settings.device)


def _read_all(
    headers: Iterable[TensorHeader | None], rows: slice | None, read: Read
) -> list[Tensor]:
    """Rows of several tensors, each in a buffer of its own."""
    return [read(header, rows, number) for number, header in enumerate(headers) if header]


def _rows_of(fisher: Tensor, rows: slice | None) -> Tensor:
    """Those rows of Fisher information that is broadcastable against a parameter."""
    is_same_for_all = rows is None or fisher.ndim == 0 or len(fisher) == 1
    return fisher if is_same_for_all else fisher[rows]


def _refuse_not_finite(inputs: Mapping[str, Tensor], name: str) -> None:
    for source, tensor in inputs.items():
        if not checkpoints.finite(tensor):
            raise UserError(f"{source}: tensor {name} holds NaN or Inf; it cannot be merged")


@contextmanager
def _one_thread() -> Iterator[None]:
    """Compute with one thread: for pieces that fit the cache, more threads only cost time."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


# ---- writing the folder ----


def _counted(plan: Plan, pieces: Iterator[Tensor], progress: Progress) -> Iterator[Tensor]:
    """Pass pieces on, and report their bytes."""
    done, total = 0, sum(parameter.spec.bytes for parameter in plan.parameters)
    for piece in pieces:
        done += piece.nbytes
        progress(done, total)
        yield piece


def _write_encoder_settings(
    encoder: Path, expert: Path, first: Path, files: Files, tokens: int | None
) -> None:
    """Write an encoder's small files: of the expert with all tokens, and of the first expert those
    that make it an embedding model."""
    config = {k: v for k, v in _config(expert, files, tokens).items() if k not in _HEAD_SETTINGS}
    kind = KINDS[checkpoints.kind_in(expert)]
    auto = getattr(transformers, "AutoModel" if kind.has_head else kind.auto_class)
    architecture = auto._model_mapping.get(type(checkpoints.load_config(expert)), None)
    if isinstance(architecture, type):
        config["architectures"] = [architecture.__name__]
    write_json(encoder / CONFIG, config)
    _copy_files(expert, encoder, [name for name in SMALL_FILES if name not in EMBEDDING_FILES])
    _copy_files(first, encoder, EMBEDDING_FILES)
    leave_out_dense(encoder)  # each task has its own
    if len(files) > 1:
        write_json(encoder / INDEX, stream.index(files))


def _write_task(
    folder: Path,
    expert: Path,
    head: Mapping[str, TensorHeader],
    definition: Task | None,
    files: Files,
    tokens: int | None,
) -> None:
    """Write a task's checkpoint: links to the encoder's files, and the expert's head."""
    folder.mkdir(parents=True)
    with stream.reading() as read:
        tensors = {name: read(stored, None, None) for name, stored in head.items()}
    stream.write_task(folder, files, tensors)
    config = _config(expert, files, tokens)
    if definition:
        write_task(folder, definition)
        config |= _head_settings(expert, definition)
    _write_settings(folder, expert, config)


def _head_settings(expert: Path, task: Task) -> dict[str, Any]:
    """Entries of config.json about a task's head: its problem type and its outputs' names."""
    own = labels.output_names(expert)
    if len(own) not in (0, task.num_outputs):
        return {}  # one logit for two classes; config.json has no entry for that
    has_problem_type = task.problem_type and task.task == "text-classification"
    settings: dict[str, Any] = {"problem_type": task.problem_type} if has_problem_type else {}
    if aligned := labels.by_names(task, own):
        names = dict(enumerate(labels.names_by_output(task, aligned)))
        settings["id2label"] = {str(output): name for output, name in names.items()}
        settings["label2id"] = {name: output for output, name in names.items()}
    return settings


def _config(expert: Path, files: Files, tokens: int | None) -> dict[str, Any]:
    """An expert's configuration with the encoder's dtype, without entries about its old place.

    `tokens` is the encoder's number of embeddings, if the experts' numbers differ.
    """
    dtype = next(iter(files.values()))[0].dtype  # the widest comes first
    config = {k: v for k, v in read_config(expert).items() if k not in _LOCAL_SETTINGS}
    config |= {"vocab_size": tokens} if tokens else {}
    return {**config, "dtype": str(dtype).removeprefix("torch.")}


def _write_settings(folder: Path, expert: Path, config: Mapping[str, Any]) -> None:
    """Write a checkpoint's configuration, and copy its other small files."""
    write_json(folder / CONFIG, config)
    _copy_files(expert, folder, SMALL_FILES)


def _copy_files(source: Path, folder: Path, names: Iterable[str]) -> None:
    """Copy files by name, as far as they exist."""
    for name in names:
        if (source / name).is_file():
            (folder / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(source / name, folder / name)


def _write_recipe(folder: Path, recipe: Recipe) -> Recipe:
    write_record(folder / RECIPE, recipe)
    (folder / CARD).write_text(card(recipe))
    return recipe
