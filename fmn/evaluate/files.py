"""The files of an evaluation: metrics as JSON, and predictions beside them as Parquet."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from pydantic import ConfigDict, Field

from fmn.errors import UserError
from fmn.evaluate.bootstrap import Interval
from fmn.evaluate.metrics import Answers, TaskAnswers, listed_answers
from fmn.models.labels import Labels
from fmn.store.records import Record
from fmn.store.stage import check_intact, read_record
from fmn.tasks.kinds import REGRESSION
from fmn.tasks.task import Task


class TaskScores(Record):
    """A task's scores. Its metrics are further entries, with a suffix from the second split on.

    Undefined scores are None.

    Attributes:
        score: the mean over splits of the mean over metrics.
        examples: rows of the first split.
        interval: 95 % bootstrap interval by metric, and of the score.
    """

    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: dict[str, int | float | None]

    score: float | None
    examples: int
    interval: dict[str, Interval | None]


class TaskRows(Record):
    """The evaluated rows of a task: digest by split, and their origin."""

    splits: dict[str, str]
    source: str = "a folder"
    revision: str | None = None
    seed: int | None = None


class Metrics(Record):
    """The content of a metrics file.

    Attributes:
        model: digest of the model's folder.
        tasks: scores by task.
        score: the mean over the tasks where more is better and the score is defined.
        interval: its 95 % bootstrap interval.
        unlabeled: tasks of the model without scores, as their rows have no labels.
        labels: by task, the model's outputs and the labels that they stand for.
        data: the evaluated rows by task.
        definitions: the tasks' definitions.
    """

    model: str
    tasks: Annotated[dict[str, TaskScores], Field(min_length=1)]
    score: float | None
    interval: Interval | None
    unlabeled: list[str] = Field(default_factory=list)
    labels: dict[str, Labels] = Field(default_factory=dict)
    data: dict[str, TaskRows] = Field(default_factory=dict)
    definitions: dict[str, Task] = Field(default_factory=dict)


def read_metrics(path: Path) -> Metrics:
    """Read a metrics file; UserError if it is missing, changed, or another kind of file."""
    return read_record(path, Metrics, "make it with `fmn evaluate`")


def predictions_path(metrics: Path) -> Path:
    """The path of the predictions, beside their metrics file."""
    return metrics.with_suffix(".predictions.parquet")


def write_predictions(path: Path, predictions: Mapping[str, TaskAnswers]) -> None:
    """Write a model's answers: a row per example, in the order of the data.

    Columns: task, split (string); row (int32, within its split); prediction and label (float64: a
    class id in the task's order, or a value), or of multi-label classification and of tags
    predictions and labels (list of int32 ids; -1: a word that was cut off, where there is no tag
    O); scores (list of float32: probabilities by label, the value, or of tags how many spans are
    right, predicted and there).
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    text, number, ids = pa.string(), pa.float64(), pa.list_(pa.int32())
    schema = pa.schema([
        ("task", text), ("split", text), ("row", pa.int32()),
        ("prediction", number), ("label", number), ("predictions", ids), ("labels", ids),
        ("scores", pa.list_(pa.float32())),
    ])  # fmt: skip
    tables = []
    for name, (task, splits) in predictions.items():
        for split, answers in splits.items():
            count = len(answers.labels)
            columns = {
                "task": [name] * count,
                "split": [split] * count,
                "row": np.arange(count),
                "scores": list(answers.scores.astype(np.float32)),
            }
            sides = {"prediction": answers.predicted, "label": answers.labels}
            for side, values in sides.items():
                columns |= {side: pa.nulls(count), f"{side}s": pa.nulls(count)}
                if task.task == "token-classification":
                    columns[f"{side}s"] = list(values)
                elif task.multi_label:
                    columns[f"{side}s"] = [np.flatnonzero(row) for row in values]
                else:
                    columns[side] = values.astype(np.float64)
            tables.append(pa.table(columns, schema=schema))
    pq.write_table(pa.concat_tables(tables).combine_chunks(), path)


def read_predictions(metrics: Path) -> dict[str, TaskAnswers]:
    """Read the predictions beside a metrics file, by task.

    Raises:
        UserError: they are missing, or were changed.
    """
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    path = predictions_path(metrics)
    check_intact(metrics)
    definitions = read_metrics(metrics).definitions
    if not path.is_file():
        raise UserError(f"{path}: no such file; make it and {metrics} with `fmn evaluate`")
    table = pq.read_table(path)
    predictions: dict[str, dict[str, Answers]] = {}
    for key in table.group_by(["task", "split"], use_threads=False).aggregate([]).to_pylist():
        name, split = key["task"], key["split"]
        rows = table.filter((pc.field("task") == name) & (pc.field("split") == split))
        if definitions[name].task == "token-classification":
            sides = (rows[side].to_pylist() for side in ("predictions", "labels"))
            predictions.setdefault(name, {})[split] = listed_answers(definitions[name], *sides)
            continue
        scores = pc.list_flatten(rows["scores"]).to_numpy().reshape(len(rows), -1)
        predicted, labels = (
            _read_side(definitions[name], rows, side, scores.shape)
            for side in ("prediction", "label")
        )
        predictions.setdefault(name, {})[split] = Answers(predicted, labels, scores)
    return {name: TaskAnswers(definitions[name], splits) for name, splits in predictions.items()}


def _read_side(task: Task, rows: Any, side: str, shape: tuple[int, ...]) -> np.ndarray:
    """Read predictions or labels: [N], or zeros and ones of `shape`, [N, C]."""
    if not task.multi_label:
        values: np.ndarray = rows[side].to_numpy()
        return values if task.problem_type == REGRESSION else values.astype(np.int64)
    indicators = np.zeros(shape, dtype=np.int64)
    for row, ids in zip(indicators, rows[f"{side}s"].to_pylist(), strict=True):
        row[ids] = 1
    return indicators
