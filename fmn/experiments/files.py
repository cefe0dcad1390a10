"""What the stages of this room read of an expert, and what they write."""

from pathlib import Path
from typing import NamedTuple

from pydantic import Field

from fmn.merge.recipe import Auto, SearchedCoefficients
from fmn.store.records import Record
from fmn.tasks.task import Task

TunedOn = tuple[int | None, int]
"""How many training rows an expert was fine-tuned on (None: all), and the seed that drew them."""


class Source(NamedTuple):
    """An expert, the rows that encoders are tried on, and how to compute.

    `rows` of the split are drawn by `seed`, all where it is None; of the training split only those
    that the expert was not tuned on, while there are some. `digests` are of expert and split.
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
    """What was tried: `tasks` are the shares of the experts' scores, `score` is their mean."""

    coefficients: dict[str, float]
    scale: float
    score: float
    tasks: dict[str, float]


class TaskTrials(Record):
    """The score of a task's expert, and its shares that the first and the best trial have."""

    expert: float
    uniform: float
    best: float


class SearchResult(SearchedCoefficients):
    """What `fmn search` writes: what a merge reads of it, and how it was found.

    Attributes:
        tasks: scores of the first trial, which has equal coefficients, and of the best.
        rows: how many rows of each task a trial is scored on.
        study: names the search, whatever its number of trials.
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
    What is undefined is None. `scores` are empty where no metric of the task needs them.
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
    """A cell of a comparison: experts merged in one way, and the run time of the merge.

    `auto` is what the method auto tried.
    """

    tasks: dict[str, CellTask]
    seconds: float
    auto: Auto | None = None
