"""The stages that try many merges in memory: searching coefficients, comparing methods."""

import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field, field_validator

from fmn.errors import UserError
from fmn.experiments.files import Cell, CellTask, SearchResult, Source, TaskTrials
from fmn.fisher.stages import Estimator
from fmn.merge.methods import METHODS
from fmn.merge.stages import MergeSettings, RefitSettings, statistics_files
from fmn.models import checkpoints
from fmn.models.provenance import rows_tuned_on
from fmn.models.stages import Device, Dtype
from fmn.store import artifacts
from fmn.store.records import Settings, at_least_one
from fmn.store.stage import (
    Job,
    Outcome,
    Progress,
    no_progress,
    read_record,
    run_stage,
    write_record,
)
from fmn.tasks import dataset
from fmn.tasks.task import get_task

if TYPE_CHECKING:
    from fmn.merge.inputs import Statistics

SEARCH = 3
COMPARE = 4

SETS = ("pairs", "triples", "all")

Rows = Literal["all"] | Annotated[int, Field(ge=1)]
Files = Mapping[str, Path]


class ComparedSettings(MergeSettings):
    estimator: Estimator | None = Field(
        None, description="of the mask Fisher; default: that of the section fisher"
    )
    realign: RefitSettings | None = Field(
        None, description="how to re-align heads with the merged encoder; default: they are not"
    )


class CompareSettings(Settings):
    sets: list[str] = Field(
        ["pairs", "all"],
        min_length=1,
        description="experts merged with one another: pairs, triples, all, or TASK+TASK",
    )
    split: Literal["validation", "train"] = Field(
        "validation",
        description="what to score on; train: rows that the expert was not fine-tuned on, if any;"
        " choose settings there, and keep the validation split for the final table",
    )
    rows: Rows | dict[str, Rows] = Field(
        "all", description="rows of a task at most, or TASK: rows; all of a task left out"
    )
    seed: int = Field(0, ge=0, description="seed of the draw")
    methods: dict[str, ComparedSettings] = Field(
        ..., min_length=1, description="NAME: how to merge"
    )
    device: Device = Field("auto", description="auto, cpu, cuda, cuda:1, ...")
    dtype: Dtype = Field(
        "float32", description="precision of the matrix products; auto: bfloat16 where it pays"
    )

    def rows_of(self, task: str) -> int | Literal["all"]:
        """How many rows of a task are tried."""
        return self.rows.get(task, "all") if isinstance(self.rows, dict) else self.rows


class SearchSettings(Settings):
    runtime: ClassVar[set[str]] = {"device", "experiment"}

    trials: int = Field(60, ge=1, description="coefficients tried, the uniform ones among them")
    rows: int | Literal["all"] = Field(
        256, description="training rows of every task that a trial is scored on"
    )
    search_seed: int = Field(0, ge=0, description="seed of the trials and of the rows' draw")
    scale_range: tuple[float, float] | None = Field(
        None, description="LOW HIGH: search the scale of the merged task vector too; needs the base"
    )
    experiment: str = Field("fmn", description="MLflow experiment of the trials")
    device: Device = Field("auto", description="auto, cpu, cuda, cuda:1, ...")
    dtype: Dtype = Field(
        "float32", description="precision of the matrix products; auto: bfloat16 where it pays"
    )

    _some = field_validator("rows")(at_least_one)

    @field_validator("scale_range")
    @classmethod
    def _range(cls, ends: tuple[float, float] | None) -> tuple[float, float] | None:
        if ends is not None and not (0 <= ends[0] < ends[1] < float("inf")):
            raise ValueError("LOW must be zero or more, and HIGH above it")
        return ends


def search(
    *,
    experts: Files,
    data: Path,
    out: Path,
    fisher: Files | None = None,
    gram: Files | None = None,
    base: Path | None = None,
    merging: MergeSettings = MergeSettings(),  # noqa: B008
    settings: SearchSettings = SearchSettings(),  # noqa: B008
    progress: Progress = no_progress,
) -> Outcome[SearchResult]:
    """Search the coefficients of a merge, on rows of the training data.

    The best have the highest mean, over tasks, of the score relative to the expert's, on rows that
    the experts were not fine-tuned on, where there are some. Trials are kept beside the output: a
    search that was killed, or is run again with more trials, goes on from them.

    Args:
        experts: checkpoint folders by task
        data: folder of the tasks' rows
        out: the file of coefficients, JSON, for `fmn merge --coefficients`
        fisher: Fisher files by task, for a method that takes them
        gram: files of Gram matrices by task, for a method that takes them
        base: the folder of the model that the experts were fine-tuned from
        merging: how to merge
        settings: how to search
        progress: called with the finished trials and all of them

    Raises:
        UserError: as `merge` does, and where an expert scores zero, to which nothing is relative.
    """
    _check_searchable(experts, base, merging, settings)
    statistics = fisher or {}, gram or {}
    rows = dict.fromkeys(sorted(experts), ("train", settings.rows))
    described = {
        "merge": merging.used("coefficient"),
        "search": settings.model_dump(mode="json", exclude={*settings.runtime, "trials"}),
        "tuned on": {task: rows_tuned_on(experts[task]) for task in rows},
    }

    def compute(job: Job) -> None:
        sources = _sources(job, experts, data, rows, settings.search_seed, settings)
        read = _read_statistics(job, experts, merging, statistics)
        study = artifacts.content_key("study", SEARCH, described, job.inputs)
        file = out.with_suffix(".trials.db")
        result = _search(experts, base, merging, settings, read, sources, study, file, progress)
        write_record(job.path, result)

    return run_stage(
        "search",
        SEARCH,
        out,
        compute,
        reads=_reads(experts, base, data, rows, merging, statistics),
        settings={**described, "trials": settings.trials},
        summary=lambda out: read_record(out, SearchResult),
    )


def _search(
    experts: Files,
    base: Path | None,
    merging: MergeSettings,
    settings: SearchSettings,
    statistics: "Statistics",
    sources: Mapping[str, Source],
    study: str,
    file: Path,
    progress: Progress,
) -> SearchResult:
    from fmn.experiments import search, trial
    from fmn.merge import model as merged

    checkpoints.check_experts(experts, base)
    scale = merged.scale(experts, merging, base, statistics)
    merge = merged.merger(experts, merging, base, statistics)
    loaded = {task: trial.load_expert(source) for task, source in sources.items()}
    for task, expert in loaded.items():
        if expert.score <= 0:
            raise UserError(
                f"expert {task}: scores {expert.score:.3f} on {len(expert.examples)} rows of its"
                " training data, to which no merge is relative; give more --rows or a better expert"
            )

    def attempt(coefficients: Mapping[str, float], scale: float) -> dict[str, float]:
        encoder = merge(coefficients, scale)
        return {
            task: trial.score(expert.task, trial.try_encoder(expert, encoder)) / expert.score
            for task, expert in loaded.items()
        }

    trials = search.search(
        attempt, list(loaded), settings.scale_range, scale=scale, trials=settings.trials,
        seed=settings.search_seed, file=file, name=study, progress=progress,
    )  # fmt: skip
    uniform, best = trials[0], max(trials, key=lambda trial: trial.score)
    return SearchResult(
        coefficients=best.coefficients,
        scale=best.scale,
        score=best.score,
        uniform=uniform.score,
        tasks={
            task: TaskTrials(
                expert=expert.score, uniform=uniform.tasks[task], best=best.tasks[task]
            )
            for task, expert in loaded.items()
        },
        experts={task: source.digests[0] for task, source in sources.items()},
        rows={task: len(expert.examples) for task, expert in loaded.items()},
        merge=merging.used("coefficient", "scale"),
        trials=trials,
        study=study,
    )


def _check_searchable(
    experts: Files, base: Path | None, merging: MergeSettings, settings: SearchSettings
) -> None:
    is_scale_searched = settings.scale_range is not None
    if merging.coefficient:
        raise UserError("--coefficient: the search is to find it; leave it out")
    if is_scale_searched and merging.scale != "auto":
        raise UserError("--scale: the search is to find it; leave it out")
    if len(experts) < 2 and not is_scale_searched:
        raise UserError(
            "one expert has no coefficients to search; give more --expert TASK=DIR or --scale-range"
        )
    if is_scale_searched and base is None:
        raise UserError(
            "--scale-range needs the model that the experts were tuned from; give --base DIR"
        )


def compare(
    *,
    experts: Files,
    base: Path,
    data: Path,
    out: Path,
    fisher: Files | None = None,
    gram: Files | None = None,
    merging: ComparedSettings,
    settings: CompareSettings,
    progress: Progress = no_progress,
) -> Outcome[Cell]:
    """Compute a cell of a comparison: merge experts in one way, in memory, and score them.

    Args:
        experts: checkpoint folders by task
        base: the folder of the model that the experts were fine-tuned from
        data: folder of the tasks' rows
        out: the cell, JSON
        fisher: Fisher files by task, for a method that takes them
        gram: files of Gram matrices by task, for a method that takes them
        merging: how to merge
        settings: what to score on
        progress: called with the finished tasks and all of them
    """
    statistics = fisher or {}, gram or {}
    is_train, realign = settings.split == "train", merging.realign
    rows = {}
    for task in sorted(experts):
        split = "train" if is_train else dataset.validation_splits(data, get_task(task))[0]
        rows[task] = split, settings.rows_of(task)
    reads = _reads(experts, base, data, rows, merging, statistics)
    for task in rows if realign else ():
        reads[f"texts {task}"] = dataset.split_files(data, get_task(task), "train")
    described = {
        "merge": merging.model_dump(exclude=set() if realign else {"realign"}),
        "rows": {**settings.model_dump(include={"seed", "dtype"}), "tasks": rows},
        "tuned on": [rows_tuned_on(experts[task]) for task in rows]
        if is_train or realign
        else None,
    }

    def compute(job: Job) -> None:
        sources = _sources(job, experts, data, rows, settings.seed, settings)
        read = _read_statistics(job, experts, merging, statistics)
        write_record(job.path, _cell(job, experts, base, merging, read, sources, progress))

    return run_stage(
        "compare",
        COMPARE,
        out,
        compute,
        reads=reads,
        settings=described,
        summary=lambda out: read_record(out, Cell),
    )


def _cell(
    job: Job,
    experts: Files,
    base: Path,
    merging: ComparedSettings,
    statistics: "Statistics",
    sources: Mapping[str, Source],
    progress: Progress,
) -> Cell:
    from fmn.experiments import trial
    from fmn.merge import model as merged

    started = time.monotonic()
    encoder = merged.in_memory(experts, merging, base, statistics)
    seconds = time.monotonic() - started
    tasks = {}
    for task, source in sources.items():
        expert, head = trial.load_expert(source), None
        if realign := merging.realign:
            limit = _limit(realign.texts)
            texts = trial.texts_for_head(source, limit, realign.seed, job.inputs[f"texts {task}"])
            started = time.monotonic()
            head = trial.realigned_head(expert, encoder, *texts, realign.ridge)
            seconds += time.monotonic() - started
        answers = trial.try_encoder(expert, encoder, head)
        score = trial.score(expert.task, answers)
        tasks[task] = CellTask(
            score=score,
            expert=expert.score,
            relative=score / expert.score if expert.score > 0 else None,
            labels=answers.labels.tolist(),
            predictions=answers.predicted.tolist(),
            expert_predictions=expert.answers.predicted.tolist(),
        )
        progress(len(tasks), len(sources))
    return Cell(tasks=tasks, seconds=seconds)


def _sources(
    job: Job,
    experts: Files,
    data: Path,
    rows: Mapping[str, tuple[str, int | str]],
    seed: int,
    settings: SearchSettings | CompareSettings,
) -> dict[str, Source]:
    """The experts by task, with the split and the number of rows that encoders are tried on."""
    return {
        task: Source(
            experts[task],
            task,
            data,
            split,
            rows=_limit(count),
            seed=seed,
            device=settings.device,
            dtype=settings.dtype,
            tuned_on=rows_tuned_on(experts[task]),
            digests=(job.inputs[f"expert {task}"], job.inputs[f"data {task}"]),
        )
        for task, (split, count) in rows.items()
    }


def _reads(
    experts: Files,
    base: Path | None,
    data: Path,
    rows: Mapping[str, tuple[str, Any]],
    merging: MergeSettings,
    statistics: tuple[Files, Files],
) -> dict[str, Path | list[Path] | None]:
    """What a stage reads, by name: experts, base, the method's statistics, rows."""
    method = METHODS[merging.method]
    reads: dict[str, Path | list[Path] | None] = {"base": base}
    reads |= statistics_files(method, sorted(experts), *statistics)
    for task, (split, _) in rows.items():
        reads[f"expert {task}"] = experts[task]
        reads[f"data {task}"] = dataset.split_files(data, get_task(task), split)
    return reads


def _read_statistics(
    job: Job, experts: Files, merging: MergeSettings, statistics: tuple[Files, Files]
) -> "Statistics":
    from fmn.merge.inputs import read_statistics

    digests = {task: job.inputs[f"expert {task}"] for task in sorted(experts)}
    return read_statistics(METHODS[merging.method], digests, *statistics)


def _limit(number: int | str) -> int | None:
    return None if isinstance(number, str) else number
