"""The merge itself, and the merged model's folder (`fmn.merge.recipe` describes it).

A task's folder is a sharded checkpoint whose first shards are hard links to the encoder's files, so
that the encoder's bytes are on the disk once; the last shard is the expert's own head.
"""

import json
import math
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import replace
from functools import reduce
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers.models.auto.modeling_auto import MODEL_MAPPING_NAMES

from fmn.errors import UserError
from fmn.merge import stream
from fmn.merge.inputs import NO_STATISTICS, Parameter, Plan, Statistics, coefficients, plan
from fmn.merge.methods import METHODS
from fmn.merge.recipe import CARD, RECIPE, MergeSettings, Recipe, card
from fmn.merge.rules import generator, rescale
from fmn.merge.stream import NAMES, Read, TensorSpec, row_slices
from fmn.models.checkpoints import CONFIG, TOKENIZER_FILES
from fmn.models.headers import INDEX
from fmn.store.artifacts import digest_file, remember_digest, visible
from fmn.store.stage import Progress, no_progress, write_record

WORKING_SET = 12 * 2**20  # bytes, in float64, of all that is held of one piece of a parameter
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
    labels: Mapping[str, Sequence[str]] | None = None,
    lineage: Mapping[str, Any] | None = None,
    progress: Progress = no_progress,
    shard_bytes: int = stream.SHARD_BYTES,
) -> Recipe:
    """Merge experts into a folder; the result does not depend on the experts' order.

    Args:
        folder: where to write; it must be empty. After an error it is left incomplete.
        experts: checkpoint folders by task.
        base: the folder of the model that they were fine-tuned from.
        statistics: those that the method takes.
        labels: by task, the names of the outputs; else they are as in the expert's configuration.
        lineage: further entries of the recipe.
        progress: called with the bytes of the encoder that are done and that are to be done.
        shard_bytes: a larger encoder is written in several files.

    Raises:
        UserError: the experts cannot be merged so.
    """
    checked = _with_scale(plan(experts, settings, base, statistics))
    specs = [parameter.spec for parameter in checked.parameters]
    parts = stream.shards(specs, shard_bytes)
    files = dict(zip(stream.shard_names(len(parts)), parts, strict=True))
    encoder = folder / "encoder"
    encoder.mkdir(parents=True)
    with stream.reading(checked.stored) as read:
        pieces = _counted(merged_pieces(checked, read), specs, progress)
        digests = {
            name: stream.write_file(encoder / name, part, pieces) for name, part in files.items()
        }
    _write_encoder_settings(encoder, experts[checked.tasks[0]], files)
    for task in checked.tasks:
        _write_task(folder, task, experts[task], checked, (labels or {}).get(task), files)
    for name, digest in digests.items():  # after the links, which change the file's status
        remember_digest(encoder / name, digest)
    used = {name: value for name, value in settings.used("coefficient").items() if value != "auto"}
    if METHODS[settings.method].fisher == "nodes":
        used |= {"normalise": checked.tuning.normalise, "exponent": checked.tuning.exponent}
    if METHODS[settings.method].density:
        used["density"] = settings.density or METHODS[settings.method].density
    lambdas = dict(zip(checked.tasks, checked.coefficients, strict=True))
    own = {"tasks": list(checked.tasks), "coefficients": lambdas, "scale": checked.scale}
    return _write_recipe(folder, Recipe(**{**used, **own, **(lineage or {})}))


def write_realigned(
    folder: Path, model: Path, heads: Mapping[str, Mapping[str, Tensor]], recipe: Recipe
) -> Recipe:
    """Write a merged model with other values in some tensors of its heads.

    All other files are hard links to the model's own, or copies on another file system.

    Args:
        folder: where to write; it must be empty.
        model: the merged model's folder.
        heads: by task, the new tensors by name; they take the dtypes that are stored.
        recipe: of the new model.
    """
    for name, source in visible(model, ("encoder", "tasks")).items():
        target, digest = folder / name, digest_file(source)
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(source, target)
        except OSError:
            shutil.copyfile(source, target)
        remember_digest(target, digest)  # a link changed the file's status
    for task, tensors in heads.items():
        last = max((folder / "tasks" / task).glob("*.safetensors"))
        stored = load_file(last)
        last.unlink()  # it is a link to the model's own file
        changed = {name: tensor.to(stored[name].dtype) for name, tensor in tensors.items()}
        save_file(stored | changed, last, {"format": "pt"})
    return _write_recipe(folder, recipe)


def in_memory(
    experts: Mapping[str, Path],
    settings: MergeSettings,
    base: Path | None = None,
    statistics: Statistics = NO_STATISTICS,
) -> dict[str, Tensor]:
    """The merged encoder's tensors by names in the base model, as `write_model` writes them."""
    checked = _with_scale(plan(experts, settings, base, statistics))
    with stream.reading(checked.stored) as read:
        return _tensors(checked, read)


def merger(
    experts: Mapping[str, Path],
    settings: MergeSettings,
    base: Path | None = None,
    statistics: Statistics = NO_STATISTICS,
) -> Callable[[Mapping[str, float], float], dict[str, Tensor]]:
    """A function from coefficients by task and a scale to the merged encoder.

    Everything that the merge reads is held in memory, so that many merges can be tried.

    Args:
        settings: how to merge; their coefficients and scale are ignored.
        base: needed for scales other than 1.
    """
    scale = 1.0 if base is None else 2.0  # 2: the base is read
    settings = settings.model_copy(update={"coefficient": [], "scale": scale})
    checked = plan(experts, settings, base, statistics)
    read = stream.held(checked.stored)

    def merge(by_task: Mapping[str, float], scale: float) -> dict[str, Tensor]:
        lambdas = coefficients(checked.tasks, by_task)
        return _tensors(replace(checked, coefficients=lambdas, scale=scale), read)

    return merge


def scale(
    experts: Mapping[str, Path],
    settings: MergeSettings,
    base: Path | None = None,
    statistics: Statistics = NO_STATISTICS,
) -> float:
    """The scale of the merged task vector that the settings stand for."""
    return float(_with_scale(plan(experts, settings, base, statistics)).scale)


# ---------------------------------------------------------------------------------------------
# Merging parameters


def _with_scale(checked: Plan) -> Plan:
    if checked.scale != "auto":
        return checked
    with stream.reading(checked.stored) as read:
        effective = effective_number(checked.parameters, read)
    return replace(checked, scale=checked.tuning.scale(effective))


def effective_number(parameters: Sequence[Parameter], read: Read) -> float:
    """The effective number of task vectors, ``mean_j |tau_j|^2 / |mean_j tau_j|^2``.

    So many times averaging shrinks their squared length: the number of experts where the task
    vectors are orthogonal and equally long, 1 where they are the same.
    """
    single = together = 0.0
    count = len(parameters[0].experts)
    with _one_thread():
        for parameter in parameters:
            if parameter.base is None:
                continue
            for rows in row_slices(parameter.spec.shape, WORKING_SET // 8 // (count + 3)):
                base = read(parameter.base, rows, count).float().flatten()
                added = torch.zeros_like(base)
                for number, stored in enumerate(parameter.experts):
                    vector = read(stored, rows, number).float().flatten() - base
                    single += float(vector.dot(vector))
                    added += vector
                together += float(added.dot(added))
    return count * single / together if together else 1.0


def _tensors(checked: Plan, read: Read) -> dict[str, Tensor]:
    pieces = merged_pieces(checked, read)
    tensors = {}
    for name, dtype, shape in (parameter.spec for parameter in checked.parameters):
        parts = [torch.empty(0, dtype=dtype)]
        while sum(map(len, parts)) < math.prod(shape):
            parts.append(next(pieces))
        tensors[name] = torch.cat(parts).view(shape)
    return tensors


def merged_pieces(checked: Plan, read: Read) -> Iterator[Tensor]:
    """The merged parameters one after another, as consecutive flat pieces in their output dtype.

    Raises:
        UserError: an expert or the base holds NaN or Inf; merged values do not fit the output's
            dtype; experts differ in a tensor of integers.
    """
    # Fresh pages cost more than the sums. Having freed a block of this size, glibc no longer gives
    # smaller ones back to the system (mallopt(3), M_MMAP_THRESHOLD, "dynamic").
    torch.empty(_FREED, dtype=torch.uint8)
    is_cut = METHODS[checked.settings.method].element_wise
    with _one_thread() if is_cut else nullcontext():
        for parameter in checked.parameters:
            name, dtype, shape = parameter.spec
            count = len(parameter.experts) + len(parameter.fisher) + 2
            limit = WORKING_SET // 8 // count if is_cut else math.prod(shape)
            nodes = checked.fisher(name) if checked.nodes and dtype.is_floating_point else None
            for rows in row_slices(shape, limit):
                if dtype.is_floating_point:
                    yield _merged_rows(checked, parameter, nodes, rows, read).flatten()
                else:
                    yield _equal_integers(checked, parameter, rows, read).flatten()


def _merged_rows(
    checked: Plan, parameter: Parameter, nodes: list[Tensor] | None, rows: slice | None, read: Read
) -> Tensor:
    """Some rows of a merged parameter, in its dtype."""
    method, settings, count = METHODS[checked.settings.method], checked.settings, len(checked.tasks)
    experts = [read(stored, rows, number) for number, stored in enumerate(parameter.experts)]
    base = read(parameter.base, rows, count) if parameter.base else None
    full = [read(stored, rows, count + n) for n, stored in enumerate(parameter.fisher, 1)]
    names = [f"expert {task}" for task in checked.tasks]
    names += [f"the full Fisher of {task}" for task in checked.tasks if full]
    inputs = list(zip(names, [*experts, *full], strict=True))
    inputs += [("base", base)] if base is not None else []
    if full or not method.element_wise:
        _refuse_not_finite(inputs, parameter)
    fisher = full or [_rows_of(each, rows) for each in nodes or ()]
    if parameter.is_transposed:  # to [rows, n]
        experts, fisher = [[t.mT if t.ndim else t for t in each] for each in (experts, fisher)]
    merged = method(
        experts=experts,
        base=base,
        coefficients=checked.coefficients,
        fisher=fisher,
        grams=[read(stored, None, None).double() for stored in parameter.grams] or None,
        generators=[
            generator(settings.seed, task, parameter.spec.name)
            for task in checked.tasks
            if method.random
        ],
        density=settings.density or method.density,
        damping=settings.damping,
    )
    merged = merged.mT if parameter.is_transposed else merged
    if checked.scale != 1 and base is not None:
        merged = rescale(merged, base, float(checked.scale))
    merged = merged.to(parameter.spec.dtype)
    if not finite(merged):
        _refuse_not_finite(inputs, parameter)
        raise UserError(
            f"tensor {parameter.spec.name}: merged values do not fit"
            f" {NAMES[parameter.spec.dtype]}; use a smaller --scale"
        )
    return merged


def _rows_of(fisher: Tensor, rows: slice | None) -> Tensor:
    """Those rows of Fisher information that is broadcastable against a parameter."""
    is_same_for_all = rows is None or fisher.ndim == 0 or len(fisher) == 1
    return fisher if is_same_for_all else fisher[rows]


def finite(tensor: Tensor) -> bool:
    """Whether no element is NaN or Inf; one pass unless a sum of finite numbers overflows."""
    accumulator = torch.float32 if tensor.dtype.itemsize < 4 else tensor.dtype
    return bool(tensor.sum(dtype=accumulator).isfinite()) or bool(tensor.isfinite().all())


def _refuse_not_finite(inputs: Sequence[tuple[str, Tensor]], parameter: Parameter) -> None:
    for source, tensor in inputs:
        if not finite(tensor):
            name = parameter.spec.name
            raise UserError(f"{source}: tensor {name} holds NaN or Inf; it cannot be merged")


def _equal_integers(checked: Plan, parameter: Parameter, rows: slice | None, read: Read) -> Tensor:
    """Some rows of a tensor of integers, such as positions, which all experts must have alike."""
    first = read(parameter.experts[0], rows, None)
    for task, stored in zip(checked.tasks, parameter.experts, strict=True):
        if not torch.equal(first, read(stored, rows, 0)):
            raise UserError(
                f"expert {task}: tensor {parameter.spec.name} of integers differs from expert"
                f" {checked.tasks[0]}'s; merge experts of one base model"
            )
    return first


@contextmanager
def _one_thread() -> Iterator[None]:
    """Sums over pieces that fit the cache gain nothing from threads, and wait long for them."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


# ---------------------------------------------------------------------------------------------
# Writing the folder


def _counted(
    pieces: Iterator[Tensor], specs: Sequence[TensorSpec], progress: Progress
) -> Iterator[Tensor]:
    """The pieces, with the bytes so far reported."""
    done, total = 0, sum(spec.bytes for spec in specs)
    for piece in pieces:
        done += piece.nbytes
        progress(done, total)
        yield piece


def _write_encoder_settings(
    encoder: Path, expert: Path, files: Mapping[str, list[TensorSpec]]
) -> None:
    if len(files) > 1:
        _write_json(encoder / INDEX, stream.index(files))
    config = {k: value for k, value in _config(expert, files).items() if k not in _HEAD_SETTINGS}
    architecture = MODEL_MAPPING_NAMES.get(config["model_type"])
    if isinstance(architecture, str):
        config["architectures"] = [architecture]
    _write_json(encoder / CONFIG, config)
    _copy_tokenizer(expert, encoder)


def _write_task(
    model: Path,
    task: str,
    expert: Path,
    checked: Plan,
    labels: Sequence[str] | None,
    files: Mapping[str, list[TensorSpec]],
) -> None:
    """Write a task's checkpoint: links to the encoder's files, and what is the expert's own."""
    folder = model / "tasks" / task
    folder.mkdir(parents=True)
    *names, last = stream.shard_names(len(files) + 1)
    for source, name in zip(files, names, strict=True):
        os.link(model / "encoder" / source, folder / name)
    with stream.reading(checked.heads[task].values()) as read:
        head = {name: read(stored, None, None) for name, stored in checked.heads[task].items()}
    save_file(head, folder / last, {"format": "pt"})
    specs = [TensorSpec(name, each.dtype, tuple(each.shape)) for name, each in head.items()]
    parts = dict(zip(names, files.values(), strict=True))
    _write_json(folder / INDEX, stream.index({**parts, last: specs}))
    config = _config(expert, files)
    if labels is not None:
        config["id2label"] = {str(output): name for output, name in enumerate(labels)}
        config["label2id"] = {name: output for output, name in enumerate(labels)}
    _write_json(folder / CONFIG, config)
    _copy_tokenizer(expert, folder)


def _write_recipe(folder: Path, recipe: Recipe) -> Recipe:
    write_record(folder / RECIPE, recipe)
    (folder / CARD).write_text(card(recipe))
    return recipe


def _config(expert: Path, files: Mapping[str, list[TensorSpec]]) -> dict[str, Any]:
    """An expert's configuration with the encoder's dtype, without what holds only where it was."""
    config = json.loads((expert / CONFIG).read_bytes())
    dtypes = (spec.dtype for specs in files.values() for spec in specs)
    dtype = reduce(torch.promote_types, (each for each in dtypes if each.is_floating_point))
    portable = {name: value for name, value in config.items() if name not in _LOCAL_SETTINGS}
    return {**portable, "dtype": str(dtype).removeprefix("torch.")}


def _copy_tokenizer(source: Path, target: Path) -> None:
    for name in TOKENIZER_FILES:
        with suppress(FileNotFoundError):
            shutil.copyfile(source / name, target / name)


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")
