"""The files of an evaluation: the metrics as JSON, and the predictions beside them as Parquet."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

from pydantic import ConfigDict, Field

from fmn.errors import UserError
from fmn.evaluate.metrics import Answers, Splits
from fmn.models.labels import Labels
from fmn.store.records import Record
from fmn.store.stage import check_intact, read_record
from fmn.tasks.task import Task

Interval = tuple[float, float]


class TaskScores(Record):
    """A task's scores; its metrics are further entries, with a suffix from the second split on.

    Attributes:
        score: the mean over splits of the mean over metrics.
        examples: rows of the first split.
        interval: 95 % bootstrap interval by metric, and of the score.
    """

    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: dict[str, int | float]

    score: float
    examples: int
    interval: dict[str, Interval]


class TaskRows(Record):
    """The rows that a task's metrics are of: digest by split, and where they come from."""

    splits: dict[str, str]
    source: str = "a folder"
    revision: str | None = None
    seed: int | None = None


class Metrics(Record):
    """What `fmn evaluate` writes.

    Attributes:
        model: digest of the model's folder.
        tasks: scores by task.
        score: the mean over tasks.
        interval: its 95 % bootstrap interval.
        labels: by task, which output of the model stands for which label.
        data: rows by task.
        definitions: what the tasks are.
    """

    model: str
    tasks: Annotated[dict[str, TaskScores], Field(min_length=1)]
    score: float
    interval: Interval
    labels: dict[str, Labels] = Field(default_factory=dict)
    data: dict[str, TaskRows] = Field(default_factory=dict)
    definitions: dict[str, Task] = Field(default_factory=dict)


def read_metrics(path: Path) -> Metrics:
    """The content of a metrics file; UserError if it is missing, changed, or something else."""
    return read_record(path, Metrics, "make it with `fmn evaluate`")


def predictions_path(metrics: Path) -> Path:
    """Where the predictions of a metrics file lie: beside it."""
    return metrics.with_suffix(".predictions.parquet")


def write_predictions(path: Path, predictions: Mapping[str, Splits]) -> None:
    """Write a model's answers by task and split: a row per example, in the order of the data.

    Columns: task, split (string), row (int32, within its split), prediction and label (float64: a
    class id in the task's order, or the value of a regression task).
    """
    import numpy as np
    import pyarrow as pa
    import pyarrow.parquet as pq

    tables = [
        pa.table(
            {
                "task": [task] * len(answers.labels),
                "split": [split] * len(answers.labels),
                "row": np.arange(len(answers.labels), dtype=np.int32),
                "prediction": answers.predicted.astype(np.float64),
                "label": answers.labels.astype(np.float64),
            }
        )
        for task, splits in predictions.items()
        for split, answers in splits.items()
    ]
    pq.write_table(pa.concat_tables(tables).combine_chunks(), path)


def read_predictions(metrics: Path) -> dict[str, dict[str, Answers]]:
    """The answers by task and split that a metrics file was computed from.

    Raises:
        UserError: they are not beside it, or were changed.
    """
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    path = predictions_path(metrics)
    check_intact(metrics)
    if not path.is_file():
        raise UserError(f"{path}: no such file; make it and {metrics} with `fmn evaluate`")
    table = pq.read_table(path)
    predictions: dict[str, dict[str, Answers]] = {}
    for key in table.group_by(["task", "split"], use_threads=False).aggregate([]).to_pylist():
        rows = table.filter((pc.field("task") == key["task"]) & (pc.field("split") == key["split"]))
        answers = Answers(rows["prediction"].to_numpy(), rows["label"].to_numpy())
        predictions.setdefault(key["task"], {})[key["split"]] = answers
    return predictions
