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
from dataclasses import replace
from difflib import get_close_matches
from functools import cache, reduce
from pathlib import Path
from typing import Any, NamedTuple, Required, TypedDict, Unpack

import numpy as np
import torch
from torch import Tensor
from transformers.models.auto.modeling_auto import MODEL_MAPPING_NAMES

from fmn.errors import UserError
from fmn.fisher import architectures
from fmn.fisher.architectures import NodeValues, Site
from fmn.merge import stream
from fmn.merge.methods import DAMPING, NEEDS, Needs, Tuning, tuned
from fmn.merge.recipe import CARD, FORMAT, RECIPE, write_recipe
from fmn.merge.rules import (
    LINEAR,
    METHODS,
    Method,
    Settings,
    Sums,
    recombine,
    shares,
    summands,
)
from fmn.merge.stream import DTYPES, Parameter, Progress, Recipe, Slot, StoredRegression
from fmn.models import checkpoints
from fmn.models.checkpoints import CONFIG, TOKENIZER_FILES
from fmn.models.headers import INDEX, TensorHeader, file_headers, tensor_headers
from fmn.store.artifacts import digest_file, whole_folder

HEAD_SETTINGS = (
    "id2label",
    "label2id",
    "num_labels",
    "problem_type",
    "finetuning_task",
    "task_specific_params",
)
LOCAL_SETTINGS = ("_name_or_path", "auto_map", "torch_dtype")


class Options(TypedDict, total=False):
    """How to merge, for `write` and `in_memory`.

    Attributes:
        method: one of `fmn.methods.NEEDS`.
        mapping: "structured" (the default) or "paper": how node weights spread over parameters.
        fisher: the Fisher information of every expert's mask nodes by task, for methods that take it.
        full_fisher: where every expert's full Fisher information lies, by parameter, by task, for methods that take it.
        grams: every expert's Gram matrices by task, for methods that take them.
        normalise, exponent: of the Fisher information of mask nodes (see `fmn.methods.tuned`); "auto" unless given.
        damping: factor of the off-diagonal entries of Gram matrices.
        coefficients: ``lambda_j`` by task, at least zero; one where a task is left out.
        base: the folder of the model that the experts were tuned from, for methods that take it and for ``scale``.
        scale: the merged parameters become ``base + scale * (merged - base)``; "auto": as `fmn.methods.tuned` says.
        density: the part of a task vector that methods which make it sparse keep; None: the method's own default.
        seed: of the methods that draw at random.
    """

    method: Required[str]
    mapping: str
    fisher: Mapping[str, NodeValues] | None
    full_fisher: Mapping[str, Mapping[str, TensorHeader]] | None
    grams: "Mapping[str, StoredGrams] | None"
    normalise: str
    exponent: float | str
    damping: float
    coefficients: Mapping[str, float] | None
    base: Path | None
    scale: float | str
    density: float | None
    seed: int


def write(
    out: Path,
    experts: Mapping[str, Path],
    *,
    labels: Mapping[str, Sequence[str]] | None = None,
    recipe: Mapping[str, Any] | None = None,
    card: str | None = None,
    progress: Progress | None = None,
    shard_bytes: int = stream.SHARD_BYTES,
    **options: Unpack[Options],
) -> dict[str, Any]:
    """Merge experts into a folder, whole or not at all; the result does not depend on the experts' order.

    Args:
        out: the merged model's folder; an older one is replaced.
        experts: checkpoint folders by task.
        labels: the names of the outputs by task, for its configuration; the expert's own where a task is left out.
        recipe: what else ``merge.json`` is to say, such as the experts' revisions and digests.
        card: the text of the model card.
        progress: called with the bytes of the encoder that are done and that are to be done.
        shard_bytes: a larger encoder is written in several files.
        options: how to merge.

    Returns:
        the content of ``merge.json``.

    Raises:
        UserError: when the experts cannot be merged so; nothing is left behind then.
    """
    plan = _plan(experts, **options)
    settings, tasks, needs = plan.settings, plan.settings.tasks, NEEDS[options["method"]]
    pieces = stream.merge(plan.parameters, plan.recipe)
    with whole_folder(out) as folder:
        encoder = _write_encoder(
            folder / "encoder", experts[tasks[0]], plan.parameters, pieces, shard_bytes, progress
        )
        for task in tasks:
            names, head = (labels or {}).get(task), plan.tensors[task].head
            _write_task(
                folder / "tasks" / task, experts[task], head, names, folder / "encoder", encoder
            )
        if card is not None:
            (folder / CARD).write_text(card)
        content = {
            "format": FORMAT,
            "tasks": list(tasks),
            "method": options["method"],
            "mapping": options.get("mapping", "structured") if needs.fisher == "nodes" else None,
            "normalise": plan.tuning.normalise if needs.fisher == "nodes" else None,
            "exponent": plan.tuning.exponent if needs.fisher == "nodes" else None,
            "damping": settings.damping if needs.gram else None,
            "coefficients": dict(zip(tasks, settings.coefficients, strict=True)),
            "scale": plan.recipe.scale,
            "density": settings.density if needs.density is not None else None,
            "seed": settings.seed if needs.random else None,
            **(recipe or {}),
            "files": _stated_digests(
                folder, {folder / "encoder" / name: file.digest for name, file in encoder.items()}
            ),
        }
        return write_recipe(folder, content)


def with_heads(
    out: Path, model: Path, heads: Mapping[str, Mapping[str, Tensor]], recipe: Mapping[str, Any]
) -> dict[str, Any]:
    """A merged model with other values in some tensors of its heads; all other files are hard links to its own.

    Args:
        out: the new folder; an older one is replaced.
        model: the merged model's folder.
        heads: by task, tensors of the head by name, in the shapes that they have; they take the types that are stored.
        recipe: what ``merge.json`` is to say beside, or instead of, what the model's says.

    Returns:
        the content of ``merge.json``.
    """
    kept = json.loads((model / RECIPE).read_bytes())
    files = dict(kept["files"])
    with whole_folder(out) as folder:
        first: dict[int, Path] = {}  # where a file went that has several names
        for name in files:
            target = folder / name
            target.parent.mkdir(parents=True, exist_ok=True)
            _link(model / name, first.setdefault((model / name).stat().st_ino, target), target)
        for task, changed in heads.items():
            stored = tensor_headers(model / "tasks" / task)
            for file in {stored[name].file for name in changed}:
                name = file.relative_to(model).as_posix()
                files[name] = _write_changed(folder / name, file, changed)
        content = {**kept, **recipe, "files": files}
        return write_recipe(folder, content)


def in_memory(experts: Mapping[str, Path], **options: Unpack[Options]) -> dict[str, Tensor]:
    """The merged encoder's tensors by their names in the base model, as `write` would write them, kept in memory."""
    plan = _plan(experts, **options)
    pieces = stream.merge(plan.parameters, plan.recipe)
    slots = [parameter.slot for parameter in plan.parameters]
    return {slot.name: _assemble(pieces, slot, 1)[0] for slot in slots}


def recombiner(
    experts: Mapping[str, Path], scaled: bool, **options: Unpack[Options]
) -> Callable[[Mapping[str, float], float], dict[str, Tensor]]:
    """A function from coefficients by task, all above zero, and a scale to the merged encoder, as `in_memory` gives it.

    The experts are read once for the methods of `fmn.merge.LINEAR`, at each call for the others.

    Args:
        experts: checkpoint folders by task.
        scaled: whether scales other than 1 will be asked for, which needs the base.
        options: how to merge; coefficients and scale are left out of account.
    """
    if options["method"] in LINEAR:
        equal: Options = {**options, "coefficients": None, "scale": 2.0 if scaled else 1.0}
        sums, tasks = _partial_sums(experts, **equal), sorted(experts)
        return lambda coefficients, scale: recombine(
            sums, [coefficients[task] for task in tasks], scale
        )

    def anew(coefficients: Mapping[str, float], scale: float) -> dict[str, Tensor]:
        tried: Options = {**options, "coefficients": coefficients, "scale": scale}
        return in_memory(experts, **tried)

    return anew


def scale(experts: Mapping[str, Path], **options: Unpack[Options]) -> float:
    """The scale of the merged task vector that these options stand for."""
    return _plan(experts, **options).recipe.scale


def _partial_sums(experts: Mapping[str, Path], **options: Unpack[Options]) -> Sums:
    """What a merge with these options, and equal coefficients, adds up, for every expert in order of task."""
    plan = _plan(experts, **options)
    count = len(plan.settings.tasks)
    added = options["method"] == "task-arithmetic"
    ones = torch.ones(count, dtype=torch.float64)
    weights = (lambda name: ones) if added else plan.recipe.shares
    floating = {
        parameter.slot.name: parameter.slot.dtype.is_floating_point for parameter in plan.parameters
    }
    parameters = [
        replace(parameter, slot=parameter.slot._replace(dtype=torch.float32))
        if floating[parameter.slot.name]
        else parameter
        for parameter in plan.parameters
    ]
    recipe = Recipe(Method(lambda part, _: summands(part)), plan.settings, 1.0, weights)
    pieces = stream.merge(parameters, recipe)
    numerators, denominators, base, same = {}, {}, {}, {}
    for parameter in parameters:
        name, based = parameter.slot.name, parameter.base is not None
        if not floating[name]:
            same[name] = _assemble(pieces, parameter.slot, 1)[0]
            continue
        tensors = _assemble(pieces, parameter.slot, count + based)
        numerators[name] = tensors[:count]
        if based:
            base[name] = tensors[count]
        if not added:
            denominators[name] = weights(name)
    return Sums(numerators, denominators, base, same)


def _assemble(pieces: Iterator[Tensor], slot: Slot, count: int) -> Tensor:
    """The next tensor of the pieces, or ``count`` of which every piece has the same elements: [count, *shape]."""
    size = math.prod(slot.shape)
    parts = [torch.empty(count, 0, dtype=slot.dtype)]
    while sum(part.shape[1] for part in parts) < size:
        parts.append(next(pieces).reshape(count, -1))
    return torch.cat(parts, 1).reshape(count, *slot.shape)  # [count, size] -> [count, *shape]


class StoredGrams(NamedTuple):
    """Gram matrices on the disk: `moments` by input, the input by module, and the modules that are transposed."""

    moments: Mapping[str, TensorHeader]
    inputs: Mapping[str, str]
    transposed: Sequence[str]


class _Plan(NamedTuple):
    """A merge that was checked and not yet computed."""

    settings: Settings
    tuning: Tuning
    tensors: "dict[str, _Tensors]"
    parameters: list[Parameter]
    recipe: Recipe


def _plan(experts: Mapping[str, Path], **options: Unpack[Options]) -> _Plan:
    method, mapping, base = (
        options["method"],
        options.get("mapping", "structured"),
        options.get("base"),
    )
    tasks = _tasks(experts)
    needs = _needs(method, base, options.get("scale", "auto"))
    auto = (options.get("normalise", "auto"), options.get("exponent", "auto"))
    tuning = tuned(method, mapping, base is not None, *auto)
    given = options.get("scale", "auto")
    scaled = tuning.growth > 0 if isinstance(given, str) else given != 1
    lambdas = _coefficients(tasks, options.get("coefficients") or {})
    tensors = {task: _tensors(experts[task]) for task in tasks}
    original = _tensors(base).encoder if base is not None and (needs.base or scaled) else None
    parameters = stream.plan({task: tensors[task].encoder for task in tasks}, original)
    scale = given if not isinstance(given, str) else 1.0
    if isinstance(given, str) and scaled:
        scale = tuning.scale(stream.effective_number(parameters))
    weigh = _Weigher(
        needs,
        mapping,
        experts[tasks[0]],
        parameters,
        lambdas,
        tuning,
        options.get("fisher") or {},
        tasks,
    )
    if needs.fisher == "parameters":
        parameters = _with_fisher(parameters, tasks, options.get("full_fisher") or {})
    if needs.gram:
        parameters = _with_grams(parameters, tasks, options.get("grams") or {}, weigh)
    settings = Settings(
        tasks,
        lambdas,
        _density(needs, options.get("density")),
        options.get("seed", 0),
        options.get("damping", DAMPING),
    )
    return _Plan(
        settings,
        tuning,
        tensors,
        parameters,
        Recipe(METHODS[method], settings, scale, weigh.shares),
    )


def _tasks(experts: Mapping[str, Path]) -> tuple[str, ...]:
    """The tasks in order of name, which is the order of everything below."""
    if not experts:
        raise UserError("no experts to merge; give at least one as --expert TASK=DIR")
    for task in experts:
        if not task or task.startswith(".") or Path(task).name != task:
            raise UserError(f"task {task!r} cannot be the name of a folder; rename it")
    return tuple(sorted(experts))


def _needs(method: str, base: Path | None, scale: float | str) -> Needs:
    if method not in NEEDS:
        close = get_close_matches(method, NEEDS, 1)
        hint = f"did you mean {close[0]}?" if close else f"choose one of {', '.join(NEEDS)}"
        raise UserError(f"merge method {method!r} is unknown; {hint}")
    factor = 1.0 if isinstance(scale, str) else scale
    if not math.isfinite(factor):
        raise UserError(f"--scale {scale} is not a finite number")
    for wanted, what in ((NEEDS[method].base, f"method {method}"), (factor != 1, "--scale")):
        if wanted and base is None:
            raise UserError(
                f"{what} needs the model that the experts were tuned from; give --base DIR"
            )
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


class _Weigher:
    """What weighs the experts: their coefficients and, where the method takes it, the Fisher of their mask nodes.

    The Fisher information is checked against the model first.
    """

    def __init__(
        self,
        needs: Needs,
        mapping: str,
        folder: Path,
        parameters: Sequence[Parameter],
        coefficients: Sequence[float],
        tuning: Tuning,
        fisher: Mapping[str, NodeValues],
        tasks: Sequence[str],
    ) -> None:
        self.coefficients = coefficients
        self.values: list[NodeValues] = []
        self.claimed = cache(self._claimed)  # most parameters of a model share a claim
        ones = torch.ones((), dtype=torch.float64)
        self.even = shares([ones] * len(coefficients), coefficients)
        if needs.fisher != "nodes":
            return
        config = checkpoints.load_config(folder)
        shapes = {parameter.slot.name: parameter.slot.shape for parameter in parameters}
        self.claims = architectures.claims(config, shapes, mapping)
        counts = architectures.node_counts(config, shapes)
        self.values = [
            architectures.tempered(nodes, tuning.normalise, tuning.exponent)
            for nodes in (_checked(task, fisher.get(task), counts) for task in tasks)
        ]

    def shares(self, name: str) -> Tensor:
        """The experts' shares of a parameter, [experts, ...], broadcastable against it."""
        if not self.values:
            return self.even
        return self.claimed(self.claims[name])

    def _claimed(self, claim: architectures.Claim) -> Tensor:
        fisher = [torch.from_numpy(architectures.weights(claim, nodes)) for nodes in self.values]
        return shares(fisher, self.coefficients)

    def rows(self, name: str, transposed: bool) -> Tensor:
        """The experts' weights of a matrix's output rows, float64 [experts, rows] or [experts, 1]."""
        lambdas = torch.tensor(self.coefficients, dtype=torch.float64)[:, None]
        if not self.values:
            return lambdas
        claim = self.claims[name]
        found = [architectures.output_weights(claim, nodes, transposed) for nodes in self.values]
        return lambdas * torch.from_numpy(np.stack(found))


def _with_fisher(
    parameters: Sequence[Parameter],
    tasks: Sequence[str],
    fisher: Mapping[str, Mapping[str, TensorHeader]],
) -> list[Parameter]:
    """The parameters with every expert's full Fisher information of them."""
    _all_there(
        tasks, fisher, "full Fisher information; give --fisher {}=FILE, made by `fmn full-fisher`"
    )
    found = []
    for parameter in parameters:
        name, dtype, shape = parameter.slot
        stored = {task: fisher[task].get(name) for task in tasks} if dtype.is_floating_point else {}
        for task, header in stored.items():
            if header is None or header.shape != shape:
                raise UserError(
                    f"expert {task}: its full Fisher has no {name} of shape {list(shape)}; make it again"
                )
        found.append(
            replace(
                parameter, fisher=tuple(header for header in stored.values() if header is not None)
            )
        )
    return found


def _all_there(tasks: Sequence[str], given: Mapping[str, Any], what: str) -> None:
    for task in tasks:
        if task not in given:
            raise UserError(f"expert {task}: no {what.format(task)}")


def _with_grams(
    parameters: Sequence[Parameter],
    tasks: Sequence[str],
    grams: Mapping[str, StoredGrams],
    weigh: _Weigher,
) -> list[Parameter]:
    """The parameters, matrices of linear maps with the Gram matrices of their inputs and the weights of their rows."""
    _all_there(tasks, grams, "Gram matrices; give --gram {}=FILE, made by `fmn gram`")
    first = grams[tasks[0]]
    found = []
    for parameter in parameters:
        name, _, shape = parameter.slot
        module = name.removesuffix(".weight")
        if module == name or module not in first.inputs:
            found.append(parameter)
            continue
        transposed = module in first.transposed
        size = shape[0 if transposed else 1]
        moments = []
        for task in tasks:
            stored = grams[task].moments.get(grams[task].inputs.get(module, ""))
            if stored is None or stored.shape != (size, size):
                raise UserError(
                    f"expert {task}: its Gram matrices are not those of {name}; make them again with `fmn gram`"
                )
            moments.append(stored)
        regression = StoredRegression(tuple(moments), weigh.rows(name, transposed), transposed)
        found.append(replace(parameter, regression=regression))
    return found


def _checked(task: str, values: NodeValues | None, counts: Mapping[Site, int]) -> NodeValues:
    if values is None:
        raise UserError(
            f"expert {task}: no Fisher information; give --fisher {task}=FILE, made by `fmn fisher`"
        )
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
        name: _File(part, stream.write_file(folder / name, part, pieces, advance))
        for name, part in files.items()
    }
    if len(files) > 1:
        _write_json(folder / INDEX, stream.index(files))
    config = {
        key: value for key, value in _config(expert, slots).items() if key not in HEAD_SETTINGS
    }
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


def _write_changed(out: Path, file: Path, changed: Mapping[str, Tensor]) -> str:
    """Write a safetensors file anew with other values in some of its tensors; returns its sha256."""
    stored = file_headers(file)
    slots = [Slot(name, DTYPES[one.dtype], one.shape) for name, one in stored.items()]

    def pieces() -> Iterator[Tensor]:
        for slot in slots:
            if slot.name in changed:
                yield changed[slot.name].to(slot.dtype).flatten()
            else:
                yield from stream.copy({slot.name: stored[slot.name]})

    out.unlink(missing_ok=True)
    return stream.write_file(out, slots, pieces())


def _link(source: Path, first: Path, target: Path) -> None:
    """A hard link to `source`, or, where another file system gives none, a copy as `first` and links to that."""
    try:
        os.link(source if target == first else first, target)
    except OSError:
        shutil.copyfile(source, target)


def _config(expert: Path, slots: Sequence[Slot]) -> dict[str, Any]:
    """An expert's configuration with the dtype of the merged encoder, and without what holds only where it was."""
    config = json.loads((expert / CONFIG).read_bytes())
    dtype = reduce(
        torch.promote_types, (slot.dtype for slot in slots if slot.dtype.is_floating_point)
    )
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
    return {
        path.relative_to(folder).as_posix(): same.get(path.stat().st_ino) or digest_file(path)
        for path in files
    }


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")
