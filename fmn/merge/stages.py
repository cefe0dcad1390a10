"""The stages that merge experts and re-align heads."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator

from fmn.errors import UserError
from fmn.merge.methods import METHODS, Method
from fmn.merge.recipe import (
    Checkpoint,
    Fit,
    MergeSettings,
    Realigned,
    Recipe,
    Search,
    SearchedCoefficients,
    read_recipe,
    task_folder,
)
from fmn.models import checkpoints, labels, provenance
from fmn.models.stages import Device, Dtype
from fmn.store import artifacts
from fmn.store.records import Settings, at_least_one
from fmn.store.stage import (
    Job,
    Outcome,
    Progress,
    check_output,
    no_progress,
    read_record,
    run_stage,
)
from fmn.tasks import dataset
from fmn.tasks import task as tasks

__all__ = ["MergeSettings", "RealignSettings", "RefitSettings", "merge", "realign"]

MERGE = 5
REALIGN = 3


class RefitSettings(Settings):
    texts: int | Literal["all"] = Field(
        256, description="unlabeled training texts; those that the expert was not tuned on first"
    )
    ridge: Annotated[float, Field(ge=0)] | Literal["auto"] = Field(
        "auto", description="how firmly a head is held where it was; auto: by leave-one-out"
    )
    seed: int = Field(0, ge=0, description="seed of the texts' draw")

    _at_least_one = field_validator("texts")(at_least_one)


class RealignSettings(RefitSettings):
    device: Device = Field("auto", description="auto, cpu, cuda, cuda:1, ...")
    dtype: Dtype = Field("float32", description="of matrix products; auto: bfloat16 if it pays")


def merge(
    *,
    experts: Mapping[str, Path],
    out: Path,
    fisher: Mapping[str, Path] | None = None,
    gram: Mapping[str, Path] | None = None,
    base: Path | None = None,
    coefficients: Path | None = None,
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

    Raises:
        UserError: the experts do not fit one another or their tasks, or a statistic or the
            coefficients belong to others.
    """
    method, fisher, gram = METHODS[settings.method], dict(fisher or {}), dict(gram or {})
    experts = dict(sorted(experts.items()))
    reads = {f"expert {task}": folder for task, folder in experts.items()}
    reads |= statistics_files(method, experts, fisher, gram)
    named = {t: labels.by_names(tasks.task(t), labels.output_names(experts[t])) for t in experts}
    # How an expert's outputs stand for the labels may have been found with its Fisher information.
    unnamed = [task for task in experts if named[task] is None and task in fisher]
    reads |= {f"fisher {task}": fisher[task] for task in unnamed}

    def compute(job: Job) -> None:
        from fmn.merge.inputs import read_labels, read_statistics
        from fmn.merge.model import write_model

        checkpoints.check_experts(experts, base)
        digests = {task: job.inputs[f"expert {task}"] for task in experts}
        statistics = read_statistics(method, digests, fisher, gram)
        aligned = {t: named[t] or labels.as_they_stand(tasks.task(t)) for t in experts}
        aligned |= {task: read_labels(fisher[task], task, digests[task]) for task in unnamed}
        lineage: dict[str, Any] = {
            **statistics.records,
            "experts": {task: _checkpoint(experts[task], digests[task]) for task in experts},
            "base": _checkpoint(base, job.inputs["base"]) if base else None,
            "labels": aligned,
        }
        chosen = settings
        if coefficients:
            chosen, search = _searched(coefficients, digests, settings)
            lineage["search"] = Search(digest=job.inputs["coefficients"], **search)
        write_model(
            job.path,
            experts,
            chosen,
            base=base,
            statistics=statistics,
            labels={t: labels.names_by_output(tasks.task(t), aligned[t]) for t in experts},
            lineage=lineage,
            progress=progress,
        )

    return run_stage(
        "merge",
        MERGE,
        out,
        compute,
        reads={**reads, "base": base, "coefficients": coefficients},
        settings=settings.used(),
        summary=read_recipe,
        is_folder=True,
    )


def statistics_files(
    method: Method, experts: Iterable[str], fisher: Mapping[str, Path], gram: Mapping[str, Path]
) -> dict[str, Path]:
    """The files that a method takes, by "fisher TASK" and "gram TASK"; UserError if one is missing."""
    files = {}
    for kind, is_needed, by_task in (
        ("fisher", method.fisher, fisher),
        ("gram", method.gram, gram),
    ):
        for task in experts if is_needed else ():
            if task not in by_task:
                command = method.statistic if is_needed == "parameters" else kind
                raise UserError(
                    f"--{kind} {task}=FILE is missing: the method {method.name} takes it;"
                    f" `fmn {command}` makes it"
                )
            files[f"{kind} {task}"] = by_task[task]
    return files


def _checkpoint(folder: Path, digest: str) -> Checkpoint:
    training = provenance.training_metadata(folder)
    metadata = training.model_dump(include={"data_digest", "threads"}) if training else {}
    origin = provenance.lineage(folder).model_dump()
    return Checkpoint(**origin, **metadata, digest=digest, settings=provenance.tuning(folder))


def _searched(
    file: Path, digests: Mapping[str, str], settings: MergeSettings
) -> tuple[MergeSettings, dict[str, float]]:
    """The settings with the coefficients of a search, which must be of such a merge; its scores."""
    searched = read_record(file, SearchedCoefficients, "`fmn search` makes coefficients")
    if settings.coefficient or settings.scale != "auto":
        raise UserError(
            f"{file}: gives coefficients and scale; leave out --coefficient and --scale"
        )
    if name := artifacts.differing(searched.experts, digests):
        raise UserError(f"{file}: of other experts than these (see {name}); search again")
    wanted = settings.used("coefficient", "scale")
    for name in {**wanted, **searched.merge}:
        if wanted.get(name) != searched.merge.get(name):
            raise UserError(f"{file}: of a merge with another {name}; search again")
    coefficient = [f"{task}={value!r}" for task, value in searched.coefficients.items()]
    chosen = settings.model_copy(update={"coefficient": coefficient, "scale": searched.scale})
    return chosen, {"score": searched.score, "uniform": searched.uniform}


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

    The result is a merged model of its own; its other files are hard links to the model's.

    Args:
        model: the merged model's folder
        experts: TASK=DIR for each expert that was merged
        data: the folder of the tasks' data
        out: the new model's folder

    Raises:
        UserError: an expert is missing, or is not the one that was merged.
    """
    check_output(out, [data])
    merged = read_recipe(model)
    _check_experts(model, merged, experts)
    rows = {task: provenance.rows_tuned_on(experts[task]) for task in merged.tasks}
    reads: dict[str, Path | str] = {"model": model}
    for task in merged.tasks:
        reads[f"expert {task}"] = experts[task]
        reads[f"data {task}"] = dataset.digests(data, tasks.task(task), ["train"])["train"]

    def compute(job: Job) -> None:
        from fmn.merge import heads
        from fmn.merge.model import write_realigned

        texts = None if settings.texts == "all" else settings.texts
        where = {"device": settings.device, "dtype": settings.dtype}
        tensors, fits = {}, {}
        for task in merged.tasks:
            examples = heads.unlabeled(
                experts[task], tasks.task(task), data, texts, settings.seed, rows[task]
            )
            expert = checkpoints.load_classifier(experts[task])
            above_merged = checkpoints.load_classifier(task_folder(model, task))
            own = heads.features(expert, examples, **where)
            read = heads.features(above_merged, examples, **where)
            fit = heads.refit(own, read, *heads.last_map(expert), settings.ridge)
            tensors[task] = heads.tensors(expert, fit)
            fits[task] = Fit(
                texts=len(examples), ridge=fit.ridge, before=fit.before, after=fit.after
            )
            progress(len(fits), len(merged.tasks))
        realigned = Realigned(
            merged=job.inputs["model"],
            **settings.model_dump(exclude=settings.runtime),
            data={task: job.inputs[f"data {task}"] for task in merged.tasks},
            tasks=fits,
        )
        recipe = merged.model_copy(update={"realign": realigned})
        write_realigned(job.path, model, tensors, recipe)

    return run_stage(
        "realign",
        REALIGN,
        out,
        compute,
        reads=reads,
        settings={"realign": settings, "tuned on": {task: list(n) for task, n in rows.items()}},
        summary=read_recipe,
        is_folder=True,
    )


def _check_experts(model: Path, merged: Recipe, experts: Mapping[str, Path]) -> None:
    if merged.realign:
        raise UserError(f"{model}: its heads are re-aligned already; give the model before that")
    for task in merged.tasks:
        if task not in experts:
            raise UserError(f"--expert {task}=DIR is missing: its head is fitted to its answers")
        digest = artifacts.digest_folder(experts[task])
        if task not in merged.experts or merged.experts[task].digest != digest:
            raise UserError(
                f"expert {task}: {experts[task]} is not what {model} was merged from; give that one"
            )
