"""The merged model's folder: one encoder, a head a task, and the recipe they were made by.

::

    merge.json              how it was made, and the sha256 of every other file but the model card
    README.md               the model card
    encoder/                loads with AutoModel.from_pretrained
    tasks/TASK/             loads with AutoModelForSequenceClassification.from_pretrained

A task's folder is a sharded checkpoint whose first shards are hard links to the encoder's files, so the encoder's bytes
are on the disk once; the last shard is the expert's own head, as the expert has it.
"""

import json
import math
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from difflib import get_close_matches
from functools import reduce
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers.models.auto.modeling_auto import MODEL_MAPPING_NAMES

from fmn import architectures, checkpoints, stream
from fmn.architectures import NodeValues, Site
from fmn.artifacts import digest_file, whole_folder
from fmn.checkpoints import CONFIG, TOKENIZER_FILES
from fmn.errors import UserError
from fmn.headers import INDEX, TensorHeader, tensor_headers
from fmn.merge import METHODS, Settings, shares
from fmn.methods import NEEDS, Needs
from fmn.recipe import CARD, FORMAT, RECIPE
from fmn.stream import DTYPES, Parameter, Progress, Recipe, Slot

HEAD_SETTINGS = ("id2label", "label2id", "num_labels", "problem_type", "finetuning_task", "task_specific_params")
LOCAL_SETTINGS = ("_name_or_path", "auto_map", "torch_dtype")


def write(
    out: Path,
    experts: Mapping[str, Path],
    *,
    method: str,
    mapping: str = "structured",
    fisher: Mapping[str, NodeValues] | None = None,
    coefficients: Mapping[str, float] | None = None,
    base: Path | None = None,
    scale: float | None = None,
    density: float | None = None,
    seed: int = 0,
    labels: Mapping[str, Sequence[str]] | None = None,
    recipe: Mapping[str, Any] | None = None,
    card: str | None = None,
    progress: Progress | None = None,
    shard_bytes: int = stream.SHARD_BYTES,
) -> dict[str, Any]:
    """Merge experts into a folder, whole or not at all; the result does not depend on the experts' order.

    Args:
        out: the merged model's folder; an older one is replaced.
        experts: checkpoint folders by task.
        method: one of `fmn.methods.NEEDS`.
        mapping: "structured" or "paper": how node weights spread over parameters, for methods that take Fisher.
        fisher: the Fisher information of every expert's mask nodes by task, for methods that take it.
        coefficients: ``lambda_j`` by task, at least zero; one where a task is left out.
        base: the folder of the model that the experts were tuned from, for methods that take it and for ``scale``.
        scale: the merged parameters become ``base + scale * (merged - base)``.
        density: the part of a task vector that methods which make it sparse keep; None: the method's own default.
        seed: of the methods that draw at random.
        labels: the names of the outputs by task, for its configuration; the expert's own where a task is left out.
        recipe: what else ``merge.json`` is to say, such as the experts' revisions and digests.
        card: the text of the model card.
        progress: called with the bytes of the encoder that are done and that are to be done.
        shard_bytes: a larger encoder is written in several files.

    Returns:
        the content of ``merge.json``.

    Raises:
        UserError: when the experts cannot be merged so; nothing is left behind then.
    """
    tasks = _tasks(experts)
    needs = _needs(method, base, scale)
    lambdas = _coefficients(tasks, coefficients or {})
    tensors = {task: _tensors(experts[task]) for task in tasks}
    original = _tensors(base).encoder if base is not None and (needs.base or scale is not None) else None
    parameters = stream.plan({task: tensors[task].encoder for task in tasks}, original)
    share = _shares(needs, mapping, experts[tasks[0]], parameters, lambdas, {t: (fisher or {}).get(t) for t in tasks})
    settings = Settings(tasks, lambdas, _density(needs, density), seed)
    pieces = stream.merge(parameters, Recipe(METHODS[method], settings, scale, share))
    with whole_folder(out) as folder:
        encoder = _write_encoder(folder / "encoder", experts[tasks[0]], parameters, pieces, shard_bytes, progress)
        for task in tasks:
            names = (labels or {}).get(task)
            _write_task(folder / "tasks" / task, experts[task], tensors[task].head, names, folder / "encoder", encoder)
        if card is not None:
            (folder / CARD).write_text(card)
        content = {
            "format": FORMAT,
            "tasks": list(tasks),
            "method": method,
            "mapping": mapping if needs.fisher else None,
            "coefficients": dict(zip(tasks, lambdas, strict=True)),
            "scale": scale,
            "density": settings.density if needs.density is not None else None,
            "seed": seed if needs.random else None,
            **(recipe or {}),
            "files": _stated_digests(
                folder, {folder / "encoder" / name: file.digest for name, file in encoder.items()}
            ),
        }
        (folder / RECIPE).write_text(json.dumps(content, indent=1) + "\n")
    return content


def _tasks(experts: Mapping[str, Path]) -> tuple[str, ...]:
    """The tasks in order of name, which is the order of everything below."""
    if not experts:
        raise UserError("no experts to merge; give at least one as --expert TASK=DIR")
    for task in experts:
        if not task or task.startswith(".") or Path(task).name != task:
            raise UserError(f"task {task!r} cannot be the name of a folder; rename it")
    return tuple(sorted(experts))


def _needs(method: str, base: Path | None, scale: float | None) -> Needs:
    if method not in NEEDS:
        close = get_close_matches(method, NEEDS, 1)
        hint = f"did you mean {close[0]}?" if close else f"choose one of {', '.join(NEEDS)}"
        raise UserError(f"merge method {method!r} is unknown; {hint}")
    if scale is not None and not math.isfinite(scale):
        raise UserError(f"--scale {scale} is not a finite number")
    for wanted, what in ((NEEDS[method].base, f"method {method}"), (scale is not None, "--scale")):
        if wanted and base is None:
            raise UserError(f"{what} needs the model that the experts were tuned from; give --base DIR")
    return NEEDS[method]


def _coefficients(tasks: Sequence[str], given: Mapping[str, float]) -> tuple[float, ...]:
    for task, value in given.items():
        if task not in tasks:
            raise UserError(f"--coefficient {task}: no such expert; there are {', '.join(tasks)}")
        if not (math.isfinite(value) and value >= 0):
            raise UserError(f"--coefficient {task}={value}: must be a finite number, zero or more")
    coefficients = tuple(float(given.get(task, 1.0)) for task in tasks)
    if not any(coefficients):
        raise UserError("--coefficient: all are zero; at least one expert must count")
    return coefficients


def _density(needs: Needs, given: float | None) -> float:
    density = needs.density if given is None else given
    if density is None:
        return 1.0
    if not 0 < density <= 1:
        raise UserError(f"density {density}: must be above 0 and at most 1")
    return density


class _Tensors(NamedTuple):
    """Where a checkpoint's tensors lie: the encoder's by their names in the base model, the head's by their own."""

    encoder: dict[str, TensorHeader]
    head: dict[str, TensorHeader]


def _tensors(folder: Path) -> _Tensors:
    headers = tensor_headers(folder)
    names = checkpoints.encoder_names(checkpoints.load_config(folder), headers)
    encoder, head = ({name: headers[stored] for name, stored in part.items()} for part in names)
    return _Tensors(encoder, head)


def _shares(
    needs: Needs,
    mapping: str,
    folder: Path,
    parameters: Sequence[Parameter],
    coefficients: Sequence[float],
    fisher: Mapping[str, NodeValues | None],
) -> Callable[[str], Sequence[Tensor]]:
    """A parameter's name to the experts' shares of it; the Fisher information is checked against the model first."""
    if not needs.fisher:
        ones = torch.ones((), dtype=torch.float64)
        uniform = shares([ones] * len(coefficients), coefficients)
        return lambda name: uniform
    config = checkpoints.load_config(folder)
    shapes = {parameter.slot.name: parameter.slot.shape for parameter in parameters}
    claims = architectures.claims(config, shapes, mapping)
    counts = architectures.node_counts(config, shapes)
    values = {task: _checked(task, nodes, counts) for task, nodes in fisher.items()}
    return lambda name: shares(
        [torch.from_numpy(architectures.weights(claims[name], nodes)) for nodes in values.values()], coefficients
    )


def _checked(task: str, values: NodeValues | None, counts: Mapping[Site, int]) -> NodeValues:
    if values is None:
        raise UserError(f"expert {task}: no Fisher information; give --fisher {task}=FILE, made by `fmn fisher`")
    found = {Site(*site): np.asarray(nodes, np.float64) for site, nodes in values.items()}
    for site in sorted({*counts, *found}):
        expected, got = counts.get(site, 0), len(found.get(site, ()))
        if expected != got:
            raise UserError(
                f"expert {task}: the Fisher information has {got} {site.node} nodes in layer {site.layer}, the model"
                f" {expected}; give that of this checkpoint"
            )
        if not (np.isfinite(found[site]).all() and (found[site] >= 0).all()):
            raise UserError(
                f"expert {task}: the Fisher information of layer {site.layer}, {site.node}, has a value that is"
                " negative, NaN or infinite; make it again with `fmn fisher`"
            )
    return found


class _File(NamedTuple):
    """A file of weights as it was written."""

    slots: list[Slot]
    digest: str


def _write_encoder(
    folder: Path,
    expert: Path,
    parameters: Sequence[Parameter],
    pieces: Iterator[Tensor],
    shard_bytes: int,
    progress: Progress | None,
) -> dict[str, _File]:
    """Write the encoder; returns its files of weights, in order. Configuration and tokenizer are those of `expert`."""
    folder.mkdir()
    slots = [parameter.slot for parameter in parameters]
    parts = stream.shards(slots, shard_bytes)
    files = dict(zip(stream.shard_names(len(parts)), parts, strict=True))
    advance = _counter(sum(slot.bytes for slot in slots), progress)
    written = {
        name: _File(part, stream.write_file(folder / name, part, pieces, advance)) for name, part in files.items()
    }
    if len(files) > 1:
        _write_json(folder / INDEX, stream.index(files))
    config = {key: value for key, value in _config(expert, slots).items() if key not in HEAD_SETTINGS}
    architecture = MODEL_MAPPING_NAMES.get(config["model_type"])
    if isinstance(architecture, str):
        config["architectures"] = [architecture]
    _write_json(folder / CONFIG, config)
    for source in _tokenizer_files(expert):
        shutil.copyfile(source, folder / source.name)
    return written


def _write_task(
    folder: Path,
    expert: Path,
    head: Mapping[str, TensorHeader],
    labels: Sequence[str] | None,
    encoder: Path,
    files: Mapping[str, _File],
) -> None:
    """Write a task's checkpoint: links to the encoder's files, and the expert's head, configuration and tokenizer.

    The configuration calls the outputs by `labels`, where they are given.
    """
    folder.mkdir(parents=True)
    *names, last = stream.shard_names(len(files) + 1)
    for source, name in zip(files, names, strict=True):
        os.link(encoder / source, folder / name)
    slots = [Slot(name, DTYPES[stored.dtype], stored.shape) for name, stored in head.items()]
    stream.write_file(folder / last, slots, stream.copy(head))
    shards = {name: file.slots for name, file in zip(names, files.values(), strict=True)}
    _write_json(folder / INDEX, stream.index(shards | {last: slots}))
    config = _config(expert, [slot for file in files.values() for slot in file.slots])
    if labels is not None:
        config["id2label"] = {str(output): name for output, name in enumerate(labels)}
        config["label2id"] = {name: output for output, name in enumerate(labels)}
    _write_json(folder / CONFIG, config)
    for file in _tokenizer_files(expert):
        shared = encoder / file.name
        if shared.is_file() and shared.read_bytes() == file.read_bytes():
            os.link(shared, folder / file.name)
        else:
            shutil.copyfile(file, folder / file.name)


def _config(expert: Path, slots: Sequence[Slot]) -> dict[str, Any]:
    """An expert's configuration with the dtype of the merged encoder, and without what holds only where it was."""
    config = json.loads((expert / CONFIG).read_bytes())
    dtype = reduce(torch.promote_types, (slot.dtype for slot in slots if slot.dtype.is_floating_point))
    kept = {key: value for key, value in config.items() if key not in LOCAL_SETTINGS}
    return {**kept, "dtype": str(dtype).removeprefix("torch.")}


def _tokenizer_files(folder: Path) -> list[Path]:
    return [folder / name for name in TOKENIZER_FILES if (folder / name).is_file()]


def _counter(total: int, progress: Progress | None) -> Callable[[int], None]:
    done = 0

    def advance(size: int) -> None:
        nonlocal done
        done += size
        if progress is not None:
            progress(done, total)

    return advance


def _stated_digests(folder: Path, known: Mapping[Path, str]) -> dict[str, str]:
    """sha256 by name of every file but the model card, which people may edit; links to a known file are not read."""
    same = {path.stat().st_ino: digest for path, digest in known.items()}
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path != folder / CARD)
    return {path.relative_to(folder).as_posix(): same.get(path.stat().st_ino) or digest_file(path) for path in files}


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")
