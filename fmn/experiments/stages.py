"""The stages that try many merges in memory: searching coefficients, comparing methods."""

import time
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, field_validator

from fmn.errors import UserError
from fmn.fisher.stages import Estimator
from fmn.merge.methods import NEEDS
from fmn.merge.stages import MergeSettings, RefitSettings, statistics_files
from fmn.models import checkpoints
from fmn.models.provenance import rows_tuned_on
from fmn.models.stages import Device, Dtype
from fmn.store import artifacts, stage
from fmn.store.records import Settings, at_least_one
from fmn.store.stage import Outcome, Progress
from fmn.tasks import dataset as data
from fmn.tasks import task as tasks

if TYPE_CHECKING:
    import numpy as np

    from fmn.experiments.search import Trial
    from fmn.experiments.trial import Contender
    from fmn.tasks.batches import Examples


SEARCH = 2
COMPARE = 3

SETS = ("pairs", "triples", "all")

Rows = Literal["all"] | Annotated[int, Field(ge=1)]


class ComparedSettings(MergeSettings):
    estimator: Estimator | None = Field(
        None, description="of the mask Fisher; default: that of the section fisher"
    )
    realign: RefitSettings | None = Field(
        None,
        description="re-align every head with the merged encoder, and how; default: heads stay the experts'",
    )


class CompareSettings(Settings):
    sets: list[str] = Field(
        ["pairs", "all"],
        min_length=1,
        description="experts merged with one another: pairs, triples, all, or TASK+TASK",
    )
    split: Literal["validation", "train"] = Field(
        "validation",
        description="train: rows of the training split that the expert was not fine-tuned on, where there are some;"
        " that is where settings are chosen, the validation split is for the final table alone",
    )
    rows: Rows | dict[str, Rows] = Field(
        "all",
        description="rows of a task at most, drawn by the seed; or TASK: rows, and all of the tasks left out",
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
        """How many rows of a task are taken."""
        return self.rows.get(task, "all") if isinstance(self.rows, dict) else self.rows


class SearchSettings(Settings):
    trials: int = Field(60, ge=1, description="coefficients tried, the uniform ones among them")
    rows: int | Literal["all"] = Field(
        256, description="training rows of every task that a trial is scored on"
    )
    search_seed: int = Field(0, ge=0, description="seed of the trials and of the rows' draw")
    scale_range: tuple[float, float] | None = Field(
        None,
        description="LOW HIGH: where the scale of the merged task vector is searched too; needs the base",
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
    experts: Mapping[str, Path],
    fisher_files: Mapping[str, Path],
    gram_files: Mapping[str, Path],
    base: Path | None,
    folder: Path,
    out: Path,
    merging: MergeSettings,
    settings: SearchSettings,
    progress: Progress | None = None,
) -> Outcome:
    """Coefficients for a merge, found by search, as a JSON file that `merge` takes.

    They are chosen by the mean over tasks of the score relative to the expert's, on rows of the training splits below
    ``folder``, those that the expert was not fine-tuned on where there are some; equal coefficients are the first
    trial. Trials are logged to MLflow, and kept beside ``out``: a search that was killed, or is given a larger budget,
    goes on from them.

    Raises UserError as `merge` does, and where an expert scores nothing that others could be compared with.
    """
    stage.apart(
        out, [*experts.values(), *fisher_files.values(), *gram_files.values(), base, folder]
    )
    searched = settings.scale_range is not None
    for option, given in (
        ("coefficient", merging.coefficient),
        ("scale", searched and merging.scale != "auto"),
    ):
        if given:
            raise UserError(f"--{option}: the search is to find it; leave it out")
    if len(experts) < 2 and not searched:
        raise UserError(
            "one expert has no coefficients to search; give more as --expert TASK=DIR, or --scale-range"
        )
    if searched and base is None:
        raise UserError(
            "--scale-range needs the model that the experts were tuned from; give --base DIR"
        )
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


def compare(
    experts: Mapping[str, Path],
    fisher_files: Mapping[str, Path],
    gram_files: Mapping[str, Path],
    base: Path,
    folder: Path,
    out: Path,
    merging: ComparedSettings,
    settings: CompareSettings,
    tuned_on: Mapping[str, tuple[int | None, int]],
) -> Outcome:
    """A cell of a comparison: some experts merged in one way, in memory, and tried on their tasks.

    Args:
        tuned_on: by task, how many training rows the expert was fine-tuned on and the seed that drew them.
    """
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
    described = {
        "merge": merging.model_dump(exclude=set() if realign else {"realign"}),
        "rows": {
            **settings.model_dump(include={"split", "seed", "dtype"}),
            "rows": {task: settings.rows_of(task) for task in digests},
        },
        "tuned on": {task: list(tuned_on[task]) for task in digests}
        if realign or settings.split == "train"
        else None,
    }
    key = artifacts.content_key("compare", COMPARE, described, inputs)

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

    return stage.run_json("compare", out, key, compute)
