"""The stages that merge experts, calibrate encoders and re-align heads."""

import re
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from pydantic import Field

from fmn.errors import UserError
from fmn.merge import recipe as records
from fmn.merge.methods import METHODS, Needs, needs_of
from fmn.merge.recipe import (
    CalibrationSettings,
    MergeSettings,
    Recipe,
    RefitSettings,
    read_recipe,
    task_folder,
)
from fmn.models import checkpoints, labels, loading, provenance
from fmn.models.stages import Device, Dtype
from fmn.store import artifacts, stage
from fmn.store.headers import tensor_headers
from fmn.store.stage import Job, Outcome, Progress, no_progress, run_stage
from fmn.tasks import dataset
from fmn.tasks.task import Task, in_a_line, load_task, read_task

if TYPE_CHECKING:
    from torch import Tensor

    from fmn.merge.auto import Choice
    from fmn.merge.inputs import Statistics

    Tensors = dict[str, Tensor]

__all__ = [
    "CalibrateSettings",
    "CalibrationSettings",
    "MergeSettings",
    "RealignSettings",
    "RefitSettings",
    "calibrate",
    "merge",
    "realign",
]

Reads = dict[str, Path | list[Path] | None]  # what a stage reads, by name

SPEED = 1e9  # bytes a second that a disk reads or writes: an assumption, for estimates
MERGE = 13
CALIBRATE = 4
REALIGN = 8


class CalibrateSettings(CalibrationSettings):
    device: Device = Field("auto", description="auto, cpu, cuda, cuda:1, ...")
    dtype: Dtype = Field("auto", description="of matrix products; auto: bfloat16 if it pays")


class RealignSettings(RefitSettings):
    device: Device = Field("auto", description="auto, cpu, cuda, cuda:1, ...")
    dtype: Dtype = Field("auto", description="of matrix products; auto: bfloat16 if it pays")


class Cost(NamedTuple):
    """The approximate bytes that a merge reads and writes, and the free bytes of the disk.

    Inputs are read twice: once for their digests.
    """

    read: int
    written: int
    free: int

    @property
    def in_words(self) -> str:
        """The amounts and the time in words."""
        read, written, free = map(_size, (self.read, self.written, self.free))
        minutes = (2 * self.read + self.written) / SPEED / 60
        return (
            f"reads {read} and writes {written} of {free} free; about {minutes:.0f} minutes at"
            f" {SPEED / 1e9:.0f} GB/s"
        )


def _size(count: int) -> str:
    """A number of bytes.

    >>> _size(1_500_000_000), _size(250_000)
    ('1.5 GB', '0.2 MB')
    """
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


def cost(
    experts: Mapping[str, Path],
    out: Path,
    base: Path | None = None,
    files: Iterable[Path] = (),
) -> Cost:
    """The cost of merging experts into the folder `out`, from headers alone.

    Args:
        experts: checkpoint folders by task.
        out: the new folder.
        base: the base's folder, if the merge reads it.
        files: the statistics that the merge reads.
    """
    folders = [*experts.values(), *([base] if base else [])]
    sizes = [
        sum(header.end - header.start for header in tensor_headers(folder).values())
        for folder in folders
    ]
    read = sum(sizes) + sum(file.stat().st_size for file in files)
    parent = next(folder for folder in out.absolute().parents if folder.is_dir())
    return Cost(read, max(sizes[: len(experts)], default=0), shutil.disk_usage(parent).free)


def _check_room(experts: Mapping[str, Path], out: Path) -> None:
    """Refuse a new merge that does not fit on the disk, before anything is read."""
    if not out.exists() and all(folder.is_dir() for folder in experts.values()):
        needed = cost(experts, out)
        if needed.written > needed.free:
            raise UserError(f"{out}: the merge {needed.in_words}; make room, or name another disk")


def merge(
    *,
    experts: Mapping[str, Path],
    out: Path,
    fisher: Mapping[str, Path] | None = None,
    gram: Mapping[str, Path] | None = None,
    base: Path | None = None,
    coefficients: Path | None = None,
    data: Path | None = None,
    settings: MergeSettings = MergeSettings(),  # noqa: B008
    progress: Progress = no_progress,
) -> Outcome[Recipe]:
    """Merge experts into one model: one encoder, with a head for each task.

    Args:
        experts: TASK=DIR for each expert
        out: the merged model's folder
        fisher: TASK=FILE for each expert, of `fmn fisher`, or `fmn full-fisher` for method fisher
        gram: TASK=FILE for each expert, of `fmn gram`, for regmean and fisher-regmean
        base: the folder of the model that the experts were fine-tuned from
        coefficients: a file of `fmn search`, which gives coefficients and scale
        data: the folder of the tasks' data, for auto, which measures merges on training texts

    Raises:
        UserError: the experts do not fit one another or their tasks, or a statistic or the
            coefficients belong to others.
    """
    fisher, gram, experts = dict(fisher or {}), dict(gram or {}), dict(sorted(experts.items()))
    needs, is_auto = needs_of(settings.method, bool(fisher), bool(gram)), settings.is_auto
    reads = _named_experts(experts, experts) | statistics_files(needs, experts, fisher, gram)
    reads |= {"base": base, "coefficients": coefficients}
    _check_room(experts, out)
    texts, of_texts = _texts_of_auto(experts, data, coefficients, settings) if is_auto else ({}, {})

    def compute(job: Job) -> None:
        from fmn.merge.inputs import read_statistics
        from fmn.merge.model import write_model

        digests = {task: job.inputs[f"expert {task}"] for task in experts}
        statistics = read_statistics(needs, experts, digests, fisher, gram)
        tasks, notes = _checked_tasks(experts, base, statistics.definitions)
        chosen, search = _searched(coefficients, job, digests, settings)
        lineage: dict[str, Any] = {"search": search, "notes": notes}
        encoder = None
        if data and is_auto:
            auto, encoder = _auto(job, experts, data, settings, base, statistics, progress)
            lineage["auto"], chosen = auto, auto.applied(settings)
        lineage |= statistics.records_for(METHODS[chosen.method])
        lineage["experts"] = {task: _checkpoint(experts[task], digests[task]) for task in experts}
        lineage["base"] = _checkpoint(base, job.inputs["base"]) if base else None
        write_model(
            job.path, experts, chosen, base=base, statistics=statistics, definitions=tasks,
            lineage=lineage, encoder_tensors=encoder, progress=progress,
        )  # fmt: skip

    return run_stage(
        "merge", MERGE, out, compute,
        reads=reads | texts, settings=settings.used() | of_texts, summary=read_recipe,
        is_folder=True,
    )  # fmt: skip


def _checked_tasks(
    experts: Mapping[str, Path], base: Path | None, by_statistics: Mapping[str, Task | None]
) -> tuple[dict[str, Task], list[str]]:
    """The experts' tasks, and what is doubtful about them; UserError if they do not fit."""
    for name in experts:  # also the name of a folder
        if not re.fullmatch(r"\w[\w-]{0,99}", name) or name == "mean":
            raise UserError(f"--expert {name!r}: a task's name is of letters, digits, _ and -")
    tasks = {task: _definition(task, experts[task], by_statistics) for task in experts}
    notes = provenance.check_experts(experts, tasks, base)
    notes += provenance.check_common_base(experts, base)
    for name, folder in experts.items():
        stored, config = tensor_headers(folder), checkpoints.load_config(folder)
        head = checkpoints.stored_names(folder, config, tasks[name].task).head.values()
        checkpoints.check_finite({each: stored[each] for each in head}, f"expert {name} ({folder})")
    return tasks, notes + _about_statistics(tasks, by_statistics)


def _definition(name: str, expert: Path, by_statistics: Mapping[str, Task | None]) -> Task:
    """The definition of an expert's task, from its folder or from its statistics."""
    known = None if read_task(expert) else by_statistics.get(name)
    return known or labels.expert_task(expert, name)


def _about_statistics(
    tasks: Mapping[str, Task], of_statistics: Mapping[str, Task | None]
) -> list[str]:
    """Notes about statistics of shorter or longer texts; UserError if they have other labels."""
    notes = []
    for name, other in of_statistics.items():
        if other is None:
            continue
        own = tasks[name]
        labels_of = [in_a_line(sorted(each.labels)) for each in (other, own)]
        for what, value, expected in (
            ("kind", other.task, own.task),
            ("problem_type", other.problem_type, own.problem_type),
            ("labels", *labels_of),
        ):
            if value and expected and value != expected:
                raise UserError(
                    f"{name}: its statistics are of the {what} {value}, its expert is of"
                    f" {expected}; compute them again"
                )
        if other.labels and own.labels and other.labels != own.labels:
            orders = f"{in_a_line(other.labels)}, the expert's are {in_a_line(own.labels)}"
            notes.append(f"{name}: its statistics' labels are {orders}: by name")
        if other.max_length != own.max_length:
            lengths = f"{other.max_length} tokens, the expert's task has {own.max_length}"
            notes.append(f"{name}: its statistics are of texts of at most {lengths}")
    return notes


def _texts_of_auto(
    experts: Mapping[str, Path],
    data: Path | None,
    coefficients: Path | None,
    settings: MergeSettings,
) -> tuple[Reads, dict[str, Any]]:
    """The files of the texts that auto measures merges on, and the settings of their choice."""
    if data is None:
        raise UserError(
            "--data DIR is missing: method auto measures merges on training texts; give it, or"
            " another --method"
        )
    if coefficients or settings.scale != "auto":
        option = "--coefficients" if coefficients else "--scale"
        raise UserError(f"{option}: method auto finds the scale; leave it out, or name a --method")
    tasks, rows, files = _texts(experts, experts, data)
    return files, {"tasks": tasks, "tuned on": rows}


def _texts(
    experts: Mapping[str, Path], tasks: Iterable[str], data: Path
) -> tuple[dict[str, Task], dict[str, tuple[int | None, int]], Reads]:
    """The definitions, the rows that experts were tuned on, and the training files, by task."""
    definitions = {task: load_task(data, task) for task in tasks}
    rows = {task: provenance.rows_tuned_on(experts[task]) for task in definitions}
    files: Reads = {
        f"data {name}": dataset.split_files(data, definition, "train")
        for name, definition in definitions.items()
    }
    return definitions, rows, files


def _auto(
    job: Job,
    experts: Mapping[str, Path],
    data: Path,
    settings: MergeSettings,
    base: Path | None,
    statistics: "Statistics",
    progress: Progress,
) -> "Choice":
    """Choose a merge on unlabeled training texts."""
    from fmn.merge.auto import TEXTS, choose
    from fmn.merge.heads import unlabeled

    examples = {}
    for task, folder in experts.items():
        rows = provenance.rows_tuned_on(folder)
        examples[task] = unlabeled(folder, load_task(data, task), data, TEXTS, settings.seed, rows)
    choice = choose(
        experts, examples, settings, base=base, statistics=statistics, progress=progress
    )
    digests = {task: job.inputs[f"data {task}"] for task in experts}
    return choice._replace(auto=choice.auto.model_copy(update={"data": digests}))


def statistics_files(
    needs: Needs, experts: Iterable[str], fisher: Mapping[str, Path], gram: Mapping[str, Path]
) -> dict[str, Path]:
    """The files that a method needs, by "fisher TASK" and "gram TASK"; UserError if one is
    missing."""
    fisher_command = needs.statistic if needs.fisher == "parameters" else "fisher"
    needed = [("fisher", fisher_command, fisher)] if needs.fisher else []
    needed += [("gram", "gram", gram)] if needs.gram else []
    files = {}
    for kind, command, by_task in needed:
        for task in experts:
            if task not in by_task:
                raise UserError(
                    f"--{kind} {task}=FILE is missing: the method {needs.name} takes it;"
                    f" `fmn {command}` makes it"
                )
            files[f"{kind} {task}"] = by_task[task]
    return files


def _checkpoint(folder: Path, digest: str) -> records.Checkpoint:
    training = provenance.training_metadata(folder)
    metadata = training.model_dump(include={"data_digest", "threads"}) if training else {}
    origin = provenance.lineage(folder).model_dump()
    return records.Checkpoint(
        **origin, **metadata, digest=digest, settings=provenance.tuning(folder)
    )


def _searched(
    file: Path | None, job: Job, digests: Mapping[str, str], settings: MergeSettings
) -> tuple[MergeSettings, records.Search | None]:
    """Put the coefficients of a search into the settings; UserError if its merge was another."""
    if file is None:
        return settings, None
    searched = stage.read_record(
        file, records.SearchedCoefficients, "`fmn search` makes coefficients"
    )
    if settings.coefficient or settings.scale != "auto":
        raise UserError(
            f"{file}: gives coefficients and scale; leave out --coefficient and --scale"
        )
    if name := artifacts.differing(searched.experts, digests):
        raise UserError(f"{file}: of other experts than these (see {name}); search again")
    if searched.merge != settings.used("coefficient", "scale"):
        raise UserError(f"{file}: of a merge with other settings than these; search again")
    coefficient = [f"{task}={value!r}" for task, value in searched.coefficients.items()]
    chosen = settings.model_copy(update={"coefficient": coefficient, "scale": searched.scale})
    digest = job.inputs["coefficients"]
    return chosen, records.Search(digest=digest, score=searched.score, uniform=searched.uniform)


def realign(
    model: Path,
    *,
    experts: Mapping[str, Path],
    data: Path,
    out: Path,
    settings: RealignSettings = RealignSettings(),  # noqa: B008
    progress: Progress = no_progress,
) -> Outcome[Recipe]:
    """Re-align a merged model's heads with its encoder, on unlabeled training texts.

    Each task may have its expert's own pooler and last layers. Tasks without a head do not change.
    The result is a new merged model; files that do not change are hard links.

    Args:
        model: the merged model's folder
        experts: TASK=DIR for each expert that was merged
        data: the folder of the tasks' data
        out: the new model's folder

    Raises:
        UserError: an expert is missing or was not merged, or the encoder has fewer layers.
    """
    merged = read_recipe(model)
    definitions, rows, reads = _fit_inputs(model, merged, experts, data, out)
    headed = [task for task in merged.tasks if definitions[task].kind.has_head]

    def compute(job: Job) -> None:
        from fmn.merge.heads import realigned_head, unlabeled
        from fmn.merge.model import write_realigned
        from fmn.models.devices import resolve_device, side_by_side

        own_parts = _own_parts(model / "encoder", settings) if headed else []
        texts = None if settings.texts == "all" else settings.texts
        tensors, own, fits = {}, {}, {}

        def realigned_task(task: str) -> "tuple[Tensors, Tensors, records.Fit]":
            expert, folder = experts[task], task_folder(model, task)
            examples = unlabeled(expert, definitions[task], data, texts, settings.seed, rows[task])
            options = settings, settings.device, settings.dtype
            return realigned_head(expert, folder, own_parts, examples, *options)

        results = side_by_side(realigned_task, headed, resolve_device(settings.device))
        for task, result in zip(headed, results, strict=True):
            tensors[task], own[task], fits[task] = result
            progress(len(fits), len(headed))
        realigned = records.Realigned(
            merged=job.inputs["model"],
            **settings.model_dump(exclude=settings.runtime),
            data={task: job.inputs[f"data {task}"] for task in headed},
            tasks=fits,
        )
        recipe = merged.model_copy(update={"realign": realigned})
        write_realigned(job.path, model, tensors, recipe, own)

    described = {"realign": settings, "tuned on": rows, "tasks": definitions}
    return run_stage(
        "realign", REALIGN, out, compute,
        reads=reads, settings=described, summary=read_recipe, is_folder=True,
    )  # fmt: skip


def _own_parts(encoder: Path, settings: RefitSettings) -> list[str]:
    """The names of the encoder's tensors that each task has from its own expert."""
    from fmn.fisher import architectures
    from fmn.store.headers import tensor_headers

    config = checkpoints.load_config(encoder)
    shapes = {name: header.shape for name, header in tensor_headers(encoder).items()}
    pooler, layers = settings.own_pooler, settings.own_layers
    return architectures.own_parts(config, shapes, pooler=pooler, layers=layers)


def calibrate(
    model: Path,
    *,
    experts: Mapping[str, Path],
    data: Path,
    out: Path,
    settings: CalibrateSettings = CalibrateSettings(),  # noqa: B008
    progress: Progress = no_progress,
) -> Outcome[Recipe]:
    """Calibrate a merged model's encoder, layer by layer, on unlabeled training texts.

    Every linear map is fitted by regression to the outputs of the experts' maps. The result is a
    new merged model with the same heads.

    Args:
        model: the merged model's folder
        experts: TASK=DIR for each expert that was merged
        data: the folder of the tasks' data
        out: the new model's folder

    Raises:
        UserError: an expert is missing, or is not the one that was merged.
    """
    merged = read_recipe(model)
    if merged.calibrate:
        raise UserError(f"{model}: it is calibrated already; give the model before that")
    definitions, rows, reads = _fit_inputs(model, merged, experts, data, out)

    def compute(job: Job) -> None:
        from fmn.merge.calibrate import calibrated_encoder
        from fmn.merge.heads import unlabeled
        from fmn.merge.model import read_encoder, write_calibrated

        examples = {
            task: unlabeled(
                experts[task], definitions[task], data, settings.texts, settings.seed, rows[task]
            )
            for task in merged.tasks
        }
        tensors, errors = calibrated_encoder(
            {task: loading.load_model(experts[task]) for task in merged.tasks},
            read_encoder(model), examples, settings=settings, device=settings.device,
            dtype=settings.dtype, progress=progress,
        )  # fmt: skip
        calibrated = records.Calibrated(
            merged=job.inputs["model"],
            **settings.model_dump(exclude=settings.runtime),
            data={task: job.inputs[f"data {task}"] for task in merged.tasks},
            errors=errors,
        )
        recipe = merged.model_copy(update={"calibrate": calibrated})
        write_calibrated(job.path, model, tensors, recipe)

    described = {"calibrate": settings, "tuned on": rows, "tasks": definitions}
    return run_stage(
        "calibrate", CALIBRATE, out, compute,
        reads=reads, settings=described, summary=read_recipe, is_folder=True,
    )  # fmt: skip


def _fit_inputs(
    model: Path, merged: Recipe, experts: Mapping[str, Path], data: Path, out: Path
) -> tuple[dict[str, Task], dict[str, tuple[int | None, int]], Reads]:
    """The inputs of calibration or re-alignment: tasks, rows that experts were tuned on, files."""
    stage.check_output(out, [data])
    _check_experts(model, merged, experts)
    definitions, rows, files = _texts(experts, merged.tasks, data)
    return definitions, rows, {"model": model, **_named_experts(experts, merged.tasks), **files}


def _named_experts(experts: Mapping[str, Path], tasks: Iterable[str]) -> Reads:
    return {f"expert {task}": experts[task] for task in tasks}


def _check_experts(model: Path, merged: Recipe, experts: Mapping[str, Path]) -> None:
    if merged.realign:
        raise UserError(f"{model}: its heads are re-aligned already; give the model before that")
    for task in merged.tasks:
        if task not in experts:
            raise UserError(f"--expert {task}=DIR is missing: the model is fitted to its answers")
        digest = artifacts.digest_folder(experts[task])
        if task not in merged.experts or merged.experts[task].digest != digest:
            raise UserError(
                f"expert {task}: {experts[task]} is not what {model} was merged from; give that one"
            )
