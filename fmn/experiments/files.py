"""The inputs and outputs of the stages `search` and `compare`."""

from pathlib import Path
from typing import NamedTuple

from pydantic import Field

from fmn.merge.recipe import Auto, SearchedCoefficients
from fmn.store.records import Record
from fmn.tasks.task import Task

TunedOn = tuple[int | None, int]
"""The number of training rows an expert was fine-tuned on (None: all), and their draw's seed."""


class Source(NamedTuple):
    """An expert, the rows that encoders are tried on, and how to compute.

    Attributes:
        checkpoint: the expert's folder.
        task: its task.
        data, split: the folder of the rows, and their split.
        rows: how many of them, drawn by `seed`; None: all. From the training split, only rows that
            the expert was not tuned on, if there are some.
        device, dtype: as for `fmn.models.predict.predict`.
        tuned_on: the rows that the expert was tuned on.
        digests: those of expert and split.
    """

    checkpoint: Path
    task: Task
    data: Path
    split: str
    rows: int | None
    seed: int
    device: str
    dtype: str
    tuned_on: TunedOn = (None, 0)
    digests: tuple[str, ...] = ()


class Trial(Record):
    """A trial: coefficients and scale, shares of the experts' scores by task, and their mean."""

    coefficients: dict[str, float]
    scale: float
    score: float
    tasks: dict[str, float]


class TaskTrials(Record):
    """The score of a task's expert, and the shares of it in the first and in the best trial."""

    expert: float
    uniform: float
    best: float


class SearchResult(SearchedCoefficients):
    """The output of `fmn search`: coefficients for a merge, and the trials.

    Attributes:
        tasks: scores of the first trial, which has equal coefficients, and of the best.
        rows: number of rows of each task that a trial is scored on.
        trials: all trials, in order.
        study: identifies the search; it does not depend on the number of trials.
    """

    tasks: dict[str, TaskTrials]
    rows: dict[str, int]
    trials: list[Trial]
    study: str


Listed = list[float] | list[list[float]]
"""An array of answers (`fmn.evaluate.metrics.Answers`) as JSON has it."""


class CellTask(Record):
    """The merged model's score and answers on N rows of a task, beside the expert's.

    `relative` is the merged model's share of the expert's score (`fmn.evaluate.metrics.relative`).
    Undefined numbers are None. `scores` are empty if no metric of the task needs them.
    """

    definition: Task
    score: float | None
    expert: float | None
    relative: float | None
    labels: Listed
    predictions: Listed
    expert_predictions: Listed
    scores: list[list[float]] = Field(default_factory=list)
    expert_scores: list[list[float]] = Field(default_factory=list)


class Cell(Record):
    """A cell of a comparison: experts merged with one method, and the run time of the merge.

    `auto` has the merges that the method auto tried.
    """

    tasks: dict[str, CellTask]
    seconds: float
    auto: Auto | None = None
