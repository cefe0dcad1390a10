"""The stages that try many merges in memory: searching coefficients, comparing methods."""

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, field_validator

from fmn.errors import UserError
from fmn.experiments.files import Cell, CellTask, SearchResult, Source, TaskTrials, tuned_on
from fmn.fisher.stages import Estimator
<<<<<<< HEAD
from fmn.merge.stages import MergeSettings, RefitSettings, _described, _Inputs, _inputs
=======
from fmn.merge.methods import NEEDS
from fmn.merge.stages import MergeSettings, RefitSettings, statistics_files
>>>>>>> room-merge
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
from fmn.tasks.task import task as get_task

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
    inputs = _inputs(experts, fisher or {}, gram or {}, base, merging)
    rows = dict.fromkeys(sorted(experts), ("train", settings.rows))
    described = {
        "merge": _described(merging, "coefficient"),
        "search": settings.model_dump(mode="json", exclude={*settings.runtime, "trials"}),
        "tuned on": {task: tuned_on(experts[task]) for task in rows},
    }

    def compute(job: Job) -> None:
        sources = _sources(job, experts, data, rows, settings.search_seed, settings)
        study = artifacts.content_key("study", SEARCH, described, job.inputs)
        file = out.with_suffix(".trials.db")
        result = _search(experts, base, merging, settings, inputs, sources, study, file, progress)
        write_record(job.path, result)

    return run_stage(
        "search",
        SEARCH,
        out,
        compute,
        reads=_reads(experts, base, data, rows, inputs),
        settings={**described, "trials": settings.trials},
        summary=lambda out: read_record(out, SearchResult),
    )


def _search(
    experts: Files,
    base: Path | None,
    merging: MergeSettings,
    settings: SearchSettings,
    inputs: _Inputs,
    sources: Mapping[str, Source],
    study: str,
    file: Path,
    progress: Progress,
) -> SearchResult:
    from fmn.experiments import search, trial
    from fmn.merge import model as merged

    checkpoints.check_experts(experts, base)
    options = {**inputs.options, **merging.model_dump(exclude={"coefficient"}), "base": base}
    scale = merged.scale(experts, **options)
    is_scaled = scale != 1 or settings.scale_range is not None
    merge = merged.recombiner(experts, is_scaled, **options)
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
        experts=dict(inputs.experts),
        rows={task: len(expert.examples) for task, expert in loaded.items()},
        merge=_described(merging, "coefficient", "scale"),
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
<<<<<<< HEAD
=======
    method = NEEDS[merging.method]
    digests = {task: artifacts.digest_folder(path) for task, path in sorted(experts.items())}
    files = statistics_files(method, digests, fisher_files, gram_files)
    read = {f"expert {task}": digest for task, digest in digests.items()}
    read |= {name: artifacts.digest_file(path) for name, path in files.items()}
    read |= {"base": artifacts.digest_folder(base)} if base else {}
    found = {task: tasks.task(task) for task in sorted(experts)}
    tuned_on = {task: rows_tuned_on(path) for task, path in sorted(experts.items())}
    described = {
        "merge": merging.used("coefficient"),
        **settings.model_dump(exclude={"trials", "experiment", "device"}),
        "tuned on": {task: list(rows) for task, rows in tuned_on.items()},
    }
    rows = {
        f"data {name}": data.digests(folder, task, ["train"])["train"]
        for name, task in found.items()
    }
    study = artifacts.content_key("search", SEARCH, described, {**read, **rows})
    key = artifacts.content_key("search", SEARCH, {"study": study, "trials": settings.trials}, {})

    def compute() -> Mapping[str, Any]:
        from fmn.experiments import search, trial
        from fmn.merge import model as merged
        from fmn.registry import tracking as registry

        checkpoints.check_experts(experts, base)
        from fmn.merge.inputs import read_statistics

        statistics = read_statistics(method, digests, fisher_files, gram_files)
        scale = merged.scale(experts, merging, base, statistics)
        encoder = merged.merger(experts, merging, base, statistics)
        limit = (stage.limit(settings.rows), settings.search_seed, settings.device, settings.dtype)
        contenders = {
            name: trial.contender(experts[name], task, folder, "train", *limit, tuned_on[name])
            for name, task in found.items()
        }
        for name, one in contenders.items():
            if one.score <= 0:
                raise UserError(
                    f"expert {name}: scores {one.score:.3f} on {len(one.examples)} rows of its training data, which no"
                    " merge can be compared with; give more --rows, or a better expert"
                )

        def attempt(coefficients: Mapping[str, float], scale: float) -> dict[str, float]:
            return trial.relative_scores(
                contenders, encoder(coefficients, scale), settings.device, settings.dtype
            )

        params = {
            **described["merge"],
            **settings.model_dump(exclude={"trials", "experiment"}),
            "scale": scale,
        }

        def log(done: "Sequence[Trial]") -> None:
            registry.log_trials(
                [_metrics(one) for one in done],
                name=f"search {', '.join(found)}",
                experiment=settings.experiment,
                key=study,
                params={**params, "tasks": ", ".join(found)},
            )
            if progress:
                progress(len(done), settings.trials)

        trials = search.search(
            attempt, list(found), settings.scale_range, scale=scale, trials=settings.trials,
            seed=settings.search_seed, file=out.with_name(f".{out.name}.trials"), name=study, report=log,
        )  # fmt: skip
        best, uniform = max(trials, key=lambda one: one.score), trials[0]
        return {
            "coefficients": best.coefficients,
            "scale": best.scale,
            "score": best.score,
            "uniform": uniform.score,
            "tasks": {
                name: {
                    "expert": one.score,
                    "uniform": uniform.scores[name],
                    "found": best.scores[name],
                }
                for name, one in contenders.items()
            },
            "rows": {name: len(one.examples) for name, one in contenders.items()},
            "experts": digests,
            "merge": merging.used("coefficient", "scale"),
            "trials": [
                {
                    "coefficients": one.coefficients,
                    "scale": one.scale,
                    "score": one.score,
                    "tasks": one.scores,
                }
                for one in trials
            ],
        }

    return stage.run_json("search", out, key, compute)


def _metrics(one: "Trial") -> dict[str, float]:
    """A trial as MLflow shows it."""
    return {
        "score": one.score,
        "scale": one.scale,
        **{f"coefficient.{name}": value for name, value in one.coefficients.items()},
        **{f"relative.{name}": value for name, value in one.scores.items()},
    }


@lru_cache(maxsize=16)
def _contender(_expert: str, _data: str, checkpoint: Path, task: str, *rest: Any) -> "Contender":
    """`trial.contender`, once a process for the cells that share it; the digests see to it that it is the same."""
    from fmn.experiments import trial

    return trial.contender(checkpoint, tasks.task(task), *rest)


@lru_cache(maxsize=16)
def _unlabeled(
    _train: str, contender: tuple[Any, ...], texts: int | None, seed: int
) -> "tuple[Examples, np.ndarray]":
    """`trial.unlabeled` and what the expert's head reads of them, once a process; never the rows that it is tried on.

    Args:
        contender: the arguments of `_contender`.
    """
    from fmn.merge import heads

    _, _, checkpoint, _, folder, split, _, _, device, dtype, tuned_on = contender
    one = _contender(*contender)
    without = one.rows if split == "train" else ()
    examples = heads.unlabeled(checkpoint, one.task, folder, texts, seed, tuned_on, without)
    return examples, heads.features(one.model, examples, device=device, dtype=dtype)
>>>>>>> room-merge


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
<<<<<<< HEAD
    inputs = _inputs(experts, fisher or {}, gram or {}, base, merging)
    is_train, realign = settings.split == "train", merging.realign
    rows = {}
    for task in sorted(experts):
        split = "train" if is_train else dataset.validation_splits(data, get_task(task))[0]
        rows[task] = split, settings.rows_of(task)
    reads = _reads(experts, base, data, rows, inputs)
    for task in rows if realign else ():
        reads[f"texts {task}"] = dataset.digests(data, get_task(task), ["train"])["train"]
=======
    needs = NEEDS[merging.method]
    digests = {task: artifacts.digest_folder(path) for task, path in sorted(experts.items())}
    files = statistics_files(needs, digests, fisher_files, gram_files)
    splits = {
        task: data.validation_splits(folder, tasks.task(task))[0]
        if settings.split == "validation"
        else "train"
        for task in digests
    }
    inputs = {f"expert {task}": digest for task, digest in digests.items()} | {
        "base": artifacts.digest_folder(base)
    }
    inputs |= {name: artifacts.digest_file(path) for name, path in files.items()}
    inputs |= {
        task: data.digests(folder, tasks.task(task), [split])[split]
        for task, split in splits.items()
    }
    realign = merging.realign
    train = (
        {task: data.digests(folder, tasks.task(task), ["train"])["train"] for task in digests}
        if realign
        else {}
    )
    inputs |= {f"train {task}": digest for task, digest in train.items()}
>>>>>>> room-merge
    described = {
        "merge": merging.model_dump(exclude=set() if realign else {"realign"}),
        "rows": {**settings.model_dump(include={"seed", "dtype"}), "tasks": rows},
        "tuned on": [tuned_on(experts[task]) for task in rows] if is_train or realign else None,
    }

<<<<<<< HEAD
    def compute(job: Job) -> None:
        sources = _sources(job, experts, data, rows, settings.seed, settings)
        write_record(job.path, _cell(job, experts, base, merging, inputs, sources, progress))

    return run_stage(
        "compare",
        COMPARE,
        out,
        compute,
        reads=reads,
        settings=described,
        summary=lambda out: read_record(out, Cell),
    )
=======
    def compute() -> Mapping[str, Any]:
        from fmn.experiments import trial
        from fmn.merge import model as merged
        from fmn.merge.inputs import read_statistics
        from fmn.models.predict import answers, score

        started = time.monotonic()
        statistics = read_statistics(needs, digests, fisher_files, gram_files)
        encoder = merged.in_memory(experts, merging, base, statistics)
        seconds = time.monotonic() - started
        entries = {}
        for task, split in splits.items():
            where = (settings.device, settings.dtype)
            drawn = (stage.limit(settings.rows_of(task)), settings.seed)
            asked = (
                digests[task],
                inputs[task],
                experts[task],
                task,
                folder,
                split,
                *drawn,
                *where,
                tuned_on[task],
            )
            one, head = _contender(*asked), None
            if realign:
                texts = _unlabeled(train[task], asked, stage.limit(realign.texts), realign.seed)
                started = time.monotonic()
                head = trial.realigned(one, encoder, *texts, realign.ridge, *where)
                seconds += time.monotonic() - started
            outputs = trial.logits(one, encoder, *where, head)
            reached = score(one.task, outputs, one.examples.labels)["score"]
            entries[task] = {
                "score": reached,
                "expert": one.score,
                "relative": reached / one.score if one.score > 0 else None,
                "labels": one.examples.labels.tolist(),
                "predictions": answers(one.task, outputs, one.examples.labels).predicted.tolist(),
                "expert predictions": answers(
                    one.task, one.logits, one.examples.labels
                ).predicted.tolist(),
            }
        return {"tasks": entries, "seconds": seconds}
>>>>>>> room-merge


def _cell(
    job: Job,
    experts: Files,
    base: Path,
    merging: ComparedSettings,
    inputs: _Inputs,
    sources: Mapping[str, Source],
    progress: Progress,
) -> Cell:
    from fmn.experiments import trial
    from fmn.merge import model as merged

    started = time.monotonic()
    options = merging.model_dump(exclude={"coefficient", "estimator", "realign"})
    options |= {**inputs.options, "coefficients": merging.coefficients, "base": base}
    encoder = merged.in_memory(experts, **options)
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
            tuned_on=tuned_on(experts[task]),
            digests=(job.inputs[f"expert {task}"], job.inputs[f"data {task}"]),
        )
        for task, (split, count) in rows.items()
    }


def _reads(
    experts: Files,
    base: Path | None,
    data: Path,
    rows: Mapping[str, tuple[str, Any]],
    inputs: _Inputs,
) -> dict[str, Path | str | None]:
    """What a stage reads, by name: experts, base, the method's statistics, rows."""
    reads: dict[str, Path | str | None] = {**inputs.digests, "base": base}
    for task, (split, _) in rows.items():
        reads[f"expert {task}"] = experts[task]
        reads[f"data {task}"] = dataset.digests(data, get_task(task), [split])[split]
    return reads


def _limit(number: int | str) -> int | None:
    return None if isinstance(number, str) else number
