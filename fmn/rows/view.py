"""List the known tasks, and show one of them with its first example."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import Field

from fmn.errors import UserError
from fmn.rows.stages import MINIATURE, DataSettings, find_source
from fmn.store.records import Record
from fmn.tasks import dataset
from fmn.tasks.images import decoded
from fmn.tasks.kinds import REGRESSION
from fmn.tasks.metrics import default_metrics
from fmn.tasks.task import (
    TASKS,
    Task,
    TaskSettings,
    in_a_line,
    load_task,
    read_task,
    task_folder,
    task_settings,
)


class KnownTask(Record):
    """A line of the list of tasks, as settings describe them."""

    name: str
    kind: str
    labels: str
    metrics: str
    source: str


class TaskView(Record):
    """A task with the defaults that apply to it.

    Attributes:
        task: its definition.
        source: where the rows are.
        notes: what was inferred from the rows, and what is odd in them.
        example: the texts and the label of the first training row; empty without rows.
    """

    task: Task
    source: str
    notes: list[str] = Field(default_factory=list)
    example: dict[str, Any] = Field(default_factory=dict)


def known_tasks(own: Mapping[str, TaskSettings]) -> list[KnownTask]:
    """GLUE's tasks and those in the settings; of two with the same name, that in the settings."""
    glue = {name: task_settings(name) or TaskSettings() for name in TASKS}
    return [_known(name, settings) for name, settings in {**glue, **own}.items()]


def _known(name: str, settings: TaskSettings) -> KnownTask:
    is_glue = settings == task_settings(name)
    kind: str | None = TASKS[name].problem_type if is_glue else settings.problem_type
    generates = settings.kind in ("text-generation", "text2text-generation")
    labels = in_a_line(settings.label_names, 6)
    unnamed = "a number" if kind == "regression" else "from the data"
    return KnownTask(
        name=name,
        kind=(kind or (settings.kind if generates else "from the data")).replace("_", " "),
        labels="none" if generates or settings.columns.label is None else labels or unnamed,
        metrics=", ".join(settings.metrics or default_metrics(settings.kind, kind)) or "by kind",
        source=settings.dataset.path if settings.dataset else "section data",
    )


def describe(
    name: str, definition: TaskSettings | None, settings: DataSettings | None, data: Path | None
) -> TaskView:
    """A task's whole definition and its first training example.

    Args:
        name: the task.
        definition: what the settings say of it.
        settings: where its rows come from, if its definition does not say it.
        data: the folder of rows that were written already, of the task or of several.

    Raises:
        UserError: there is no such task, or its rows cannot be read.
    """
    if data and read_task(task_folder(data, name)):
        task = load_task(data, name)
        split = "train" if dataset.has_split(data, task, "train") else task.validation[0]
        rows = dataset.read_split(data, task, split)
        return TaskView(
            task=task, source=str(task_folder(data, name)), example=_example(task, rows)
        )
    if settings is None and name in TASKS:  # viewing rows must not need the network
        settings = DataSettings(source="embedded")
        try:
            source = find_source(name, settings, definition)
        except UserError:
            note = f"no rows are here; `fmn data {name}` fetches them ({MINIATURE} has other tasks)"
            return TaskView(task=TASKS[name], source=dataset.HUB, notes=[note])
    else:
        source = find_source(name, settings or DataSettings(), definition)
    rows_read = source.read()
    table = next(iter(rows_read.tables.values()))
    return TaskView(
        task=rows_read.task,
        source=source.name,
        notes=[*rows_read.notes, *(f"warning: {line}" for line in rows_read.warnings)],
        example=_example(rows_read.task, table),
    )


def _example(task: Task, table: Any) -> dict[str, Any]:
    """The first row of a table: its texts or the size of its image, and the name of its label."""
    row: dict[str, Any] = table.slice(0, 1).to_pylist()[0]
    example = {name: row[name] for name in task.text_columns}
    if name := task.columns.image:
        image = decoded(row[name])
        example[name] = f"an image of {image.width} x {image.height} pixels"
    if not task.columns.label:
        return example
    label = row["label"]
    if task.multi_label or task.task == "token-classification":
        return {**example, "label": [task.labels[each] for each in label]}
    return {**example, "label": label if task.problem_type == REGRESSION else task.labels[label]}
