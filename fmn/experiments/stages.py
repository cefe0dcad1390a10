"""The stages that try merges in memory: the search for coefficients, and a comparison's cells."""

import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal, NamedTuple

from pydantic import Field, field_validator

from fmn.errors import UserError
from fmn.evaluate.metrics import relative
from fmn.evaluate.stages import EvaluateSettings
from fmn.experiments.files import Cell, SearchResult, Source, TaskTrials
from fmn.fisher.stages import Estimator
from fmn.merge.methods import Needs, needs_of
from fmn.merge.stages import CalibrationSettings, MergeSettings, RefitSettings, statistics_files
from fmn.models import provenance
from fmn.models.provenance import check_common_base, rows_tuned_on
from fmn.store import artifacts
from fmn.store.records import at_least_one
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
from fmn.tasks.task import Task, load_task

if TYPE_CHECKING:
    from torch import Tensor

    from fmn.merge.inputs import Statistics
    from fmn.merge.recipe import Auto
    from fmn.tasks.batches import Examples

SEARCH = 4
COMPARE = 8

SETS = ("pairs", "triples", "all")

Rows = Literal["all"] | Annotated[int, Field(ge=1)]
Files = Mapping[str, Path]
RowsByTask = Mapping[str, tuple[str, int | str]]  # by task: the split, and how many of its rows


class ComparedSettings(MergeSettings):
    estimator: Estimator | None = Field(
        None, description="of the mask Fisher; default: that of the section fisher"
    )
    realign: RefitSettings | None = Field(
        None, description="how to re-align heads with the merged encoder; default: they are not"
    )
    calibrate: CalibrationSettings | None = Field(
        None, description="how to calibrate the merged encoder before that; default: it is not"
    )

    @property
    def reads_texts(self) -> bool:
        """Whether the method reads unlabeled training texts."""
        return self.is_auto or bool(self.realign or self.calibrate)


class CompareSettings(EvaluateSettings):
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

    def rows_of(self, task: str) -> int | Literal["all"]:
        """The number of a task's rows that encoders are tried on."""
        return self.rows.get(task, "all") if isinstance(self.rows, dict) else self.rows


class SearchSettings(EvaluateSettings):
    runtime: ClassVar[set[str]] = {"device", "experiment"}

    trials: int = Field(60, ge=1, description="coefficients tried, the uniform ones among them")
    rows: int | Literal["all"] = Field(
        256, description="training rows of every task that a trial is scored on"
    )
    search_seed: int = Field(0, ge=0, description="seed of the trials and of the rows' draw")
    scale_range: tuple[float, float] | None = Field(
        None, description="LOW HIGH: search the scale of the merged task vector too; needs the base"
    )
    experiment: str = Field("fmn", min_length=1, description="MLflow experiment of the trials")

    _some = field_validator("rows")(at_least_one)

    @field_validator("scale_range")
    @classmethod
    def _range(cls, ends: tuple[float, float] | None) -> tuple[float, float] | None:
        if ends is not None and not (0 <= ends[0] < ends[1] < float("inf")):
            raise ValueError("LOW must be zero or more, and HIGH above it")
        return ends


class Merge(NamedTuple):
    """A merge to try: experts, base, settings, files of statistics, and definitions, by task."""

    experts: Files
    base: Path | None
    settings: MergeSettings
    fisher: Files
    gram: Files
    tasks: Mapping[str, Task]

    @property
    def needs(self) -> Needs:
        """What the merge takes."""
        return needs_of(self.settings.method, bool(self.fisher), bool(self.gram))


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

    The best coefficients have the highest mean, over tasks, of the score relative to the expert's.
    Rows that an expert was not fine-tuned on are used if there are some. Trials are stored beside
    the output: a search that was killed, or is run again with more trials, continues from them.

    Args:
        experts: TASK=DIR for each expert, or one folder of them
        data: folder of the tasks' rows
        out: the file of coefficients, JSON, for `fmn merge --coefficients`
        fisher: TASK=FILE for each expert, or one folder, for a method that takes them
        gram: TASK=FILE for each expert, or one folder, for a method that takes them
        base: the folder of the model that the experts were fine-tuned from
        merging: how to merge
        settings: how to search
        progress: called with the finished trials and all of them

    Raises:
        UserError: as `merge` does, and where an expert's score is nothing to take a share of.
    """
    merge = Merge(experts, base, merging, fisher or {}, gram or {}, _tasks(experts, data))
    _check_searchable(merge, settings)
    rows = dict.fromkeys(sorted(experts), ("train", settings.rows))
    described = {
        "merge": merging.used("coefficient"),
        "tasks": {name: task.model_dump(mode="json") for name, task in merge.tasks.items()},
        "search": settings.model_dump(mode="json", exclude={*settings.runtime, "trials"}),
        "tuned on": {task: rows_tuned_on(experts[task]) for task in rows},
    }

    def compute(job: Job) -> None:
        study = artifacts.content_key("study", SEARCH, described, job.inputs)
        file = out.with_suffix(".trials.db")
        sources = _sources(job, merge, data, rows, settings.search_seed, settings)
        write_record(job.path, _search(job, merge, sources, settings, file, study, progress))

    return run_stage(
        "search", SEARCH, out, compute,
        reads=_reads(merge, data, rows),
        settings={**described, "trials": settings.trials},
        summary=lambda out: read_record(out, SearchResult),
    )  # fmt: skip


def _tasks(experts: Files, data: Path) -> dict[str, Task]:
    """The definitions of the experts' tasks; UserError if a task's rows have no labels."""
    tasks = {name: load_task(data, name) for name in sorted(experts)}
    for name, task in tasks.items():
        if not task.has_labels:
            raise UserError(
                f"{data}: the rows of {name} have no labels to score by; leave it out, or add some"
            )
    return tasks


def _check_searchable(merge: Merge, settings: SearchSettings) -> None:
    is_scale_searched = settings.scale_range is not None
    if merge.settings.is_auto:
        raise UserError("--method auto: coefficients are of one method; name it")
    if merge.settings.coefficient:
        raise UserError("--coefficient: the search is to find it; leave it out")
    if is_scale_searched and merge.settings.scale != "auto":
        raise UserError("--scale: the search is to find it; leave it out")
    if len(merge.experts) < 2 and not is_scale_searched:
        raise UserError(
            "one expert has no coefficients to search; give more --expert TASK=DIR or --scale-range"
        )
    if is_scale_searched and merge.base is None:
        raise UserError(
            "--scale-range needs the model that the experts were tuned from; give --base DIR"
        )


def _search(
    job: Job,
    merge: Merge,
    sources: Mapping[str, Source],
    settings: SearchSettings,
    file: Path,
    study: str,
    progress: Progress,
) -> SearchResult:
    from fmn.experiments import search, trial
    from fmn.merge import model as merged

    experts, base, merging, _, _, tasks = merge
    provenance.check_experts(experts, tasks, base)
    check_common_base(experts, base)
    statistics = _read_statistics(job, merge)
    encoder_of = merged.merger(experts, merging, base, statistics)
    loaded = {task: trial.load_expert(source) for task, source in sources.items()}
    scores = {}
    for task, expert in loaded.items():
        score = expert.score
        if score is None or score <= 0:
            shown = "is undefined" if score is None else f"is {score:.3f}"
            raise UserError(
                f"expert {task}: its score {shown} on {len(expert.examples)} rows of its training"
                " data: no merge has a share of that; give more --rows or a better expert"
            )
        scores[task] = score

    def attempt(coefficients: Mapping[str, float], scale: float) -> dict[str, float]:
        encoder = encoder_of(coefficients, scale)
        shares = {}
        for task, expert in loaded.items():
            score = trial.score(expert.task, trial.try_encoder(expert, encoder))
            # If the labels define the expert's score, they define this one.
            shares[task] = relative(expert.task, score, scores[task]) or 0.0
        return shares

    trials = search.search(
        attempt, list(loaded), settings.scale_range,
        scale=merged.scale(experts, merging, base, statistics), trials=settings.trials,
        seed=settings.search_seed, file=file, name=study, progress=progress,
    )  # fmt: skip
    uniform, best = trials[0], max(trials, key=lambda trial: trial.score)
    return SearchResult(
        **best.model_dump(include={"coefficients", "scale", "score"}),
        uniform=uniform.score,
        tasks={
            task: TaskTrials(expert=score, uniform=uniform.tasks[task], best=best.tasks[task])
            for task, score in scores.items()
        },
        experts={task: source.digests[0] for task, source in sources.items()},
        rows={task: len(expert.examples) for task, expert in loaded.items()},
        merge=merging.used("coefficient", "scale"),
        trials=trials,
        study=study,
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
    """Compute a cell of a comparison: merge experts with one method in memory, and score them.

    The arguments are those of `search`, but `out` is the cell, and `progress` counts tasks.
    """
    merge = Merge(experts, base, merging, fisher or {}, gram or {}, _tasks(experts, data))
    is_train = settings.split == "train"
    rows = {}
    for name, task in merge.tasks.items():
        split = "train" if is_train else dataset.validation_splits(data, task)[0]
        rows[name] = split, settings.rows_of(name)
    reads = _reads(merge, data, rows)
    for name in rows if merging.reads_texts else ():
        reads[f"texts {name}"] = dataset.split_files(data, merge.tasks[name], "train")
    is_tuning_used = is_train or merging.reads_texts
    described = {
        "merge": merging.used(),
        "tasks": merge.tasks,
        "rows": {**settings.model_dump(include={"seed", "dtype"}), "tasks": rows},
        "tuned on": [rows_tuned_on(experts[task]) for task in rows] if is_tuning_used else None,
    }

    def compute(job: Job) -> None:
        sources = _sources(job, merge, data, rows, settings.seed, settings)
        write_record(job.path, _cell(job, merge, merging, sources, progress))

    return run_stage(
        "compare", COMPARE, out, compute,
        reads=reads, settings=described, summary=lambda out: read_record(out, Cell),
    )  # fmt: skip


def _cell(
    job: Job,
    merge: Merge,
    merging: ComparedSettings,
    sources: Mapping[str, Source],
    progress: Progress,
) -> Cell:
    from fmn.experiments import trial

    started = time.monotonic()
    encoder, choice = _merged_encoder(job, merge, merging, sources)
    seconds = time.monotonic() - started
    tasks, realign = {}, merging.realign
    for task, source in sources.items():
        expert, head, tried = trial.load_expert(source), None, encoder
        if realign:
            limit = None if realign.texts == "all" else realign.texts
            digest = job.inputs[f"texts {task}"]
            texts = trial.texts_for_head(source, limit, realign.seed, digest)
            started = time.monotonic()
            tried = trial.with_own_parts(encoder, expert, texts, realign)
            head = trial.realigned_head(expert, tried, texts, realign.ridge)
            seconds += time.monotonic() - started
        tasks[task] = trial.cell_task(expert, tried, head)
        progress(len(tasks), len(sources))
    return Cell(tasks=tasks, seconds=seconds, auto=choice)


def _merged_encoder(
    job: Job, merge: Merge, merging: ComparedSettings, sources: Mapping[str, Source]
) -> "tuple[Mapping[str, Tensor], Auto | None]":
    """Merge and calibrate the encoder in memory; also returns the merges that auto tried."""
    from fmn.experiments import trial
    from fmn.merge import model as merged
    from fmn.merge.auto import TEXTS, choose

    def texts(count: int, seed: int) -> "dict[str, Examples]":
        return {
            task: trial.texts_for_head(source, count, seed, job.inputs[f"texts {task}"]).examples
            for task, source in sources.items()
        }

    experts, base, how, choice = merge.experts, merge.base, merge.settings, None
    encoder: Mapping[str, Tensor]
    statistics = _read_statistics(job, merge)
    if how.is_auto:
        examples = texts(TEXTS, how.seed)
        choice, encoder = choose(experts, examples, how, base=base, statistics=statistics)
    else:
        encoder = merged.in_memory(experts, how, base, statistics)
    if calibrate := merging.calibrate:
        from fmn.merge.calibrate import calibrated_encoder

        first = next(iter(sources.values()))
        encoder, _ = calibrated_encoder(
            {task: trial.load_expert(source).model for task, source in sources.items()},
            encoder,
            texts(calibrate.texts, calibrate.seed),
            settings=calibrate,
            device=first.device,
            dtype=first.dtype,
        )
    return encoder, choice


def _sources(
    job: Job,
    merge: Merge,
    data: Path,
    rows: RowsByTask,
    seed: int,
    settings: SearchSettings | CompareSettings,
) -> dict[str, Source]:
    """The sources of the experts by task; `rows` has the split and number of rows to try."""
    return {
        task: Source(
            merge.experts[task],
            merge.tasks[task],
            data,
            split,
            rows=count if isinstance(count, int) else None,
            seed=seed,
            device=settings.device,
            dtype=settings.dtype,
            tuned_on=rows_tuned_on(merge.experts[task]),
            digests=(job.inputs[f"expert {task}"], job.inputs[f"data {task}"]),
        )
        for task, (split, count) in rows.items()
    }


def _reads(merge: Merge, data: Path, rows: RowsByTask) -> dict[str, Path | list[Path] | None]:
    """The inputs of a stage by name: experts, base, the method's statistics, rows."""
    reads: dict[str, Path | list[Path] | None] = {"base": merge.base}
    reads |= statistics_files(merge.needs, sorted(merge.experts), merge.fisher, merge.gram)
    for task, (split, _) in rows.items():
        reads[f"expert {task}"] = merge.experts[task]
        reads[f"data {task}"] = dataset.split_files(data, merge.tasks[task], split)
    return reads


def _read_statistics(job: Job, merge: Merge) -> "Statistics":
    from fmn.merge.inputs import read_statistics

    digests = {task: job.inputs[f"expert {task}"] for task in sorted(merge.experts)}
    return read_statistics(merge.needs, merge.experts, digests, merge.fisher, merge.gram)
