"""A task: which columns hold its texts, what its labels mean, how it is scored.

A task is data, not code. Its definition travels with its rows, as `task.json` beside the Parquet
files; GLUE's nine tasks are built in (`glue.yaml`).
"""

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, model_validator

from fmn.errors import UserError, hint
from fmn.store.records import Record, Settings, parse_record
from fmn.store.stage import read_record, write_record

TASKS: Mapping[str, "Task"]  # GLUE's nine tasks by name, read at first use

MAX_LENGTH = 128  # tokens of an example, unless its task says otherwise
DEFINITION = "task.json"
ProblemType = Literal[
    "single_label_classification", "multi_label_classification", "regression"
]  # the words of Transformers' configurations


class SplitSettings(Settings):
    train: str | None = Field("train", description="the split that experts are tuned on")
    validation: str | list[str] = Field(
        "validation", description="the split, or splits, that models are scored on"
    )


class DatasetSettings(Settings):
    """Where a task's rows come from, in the words of `datasets.load_dataset`."""

    path: str = Field(
        ...,
        description="a file (csv, tsv, json, jsonl, parquet; also .gz), a folder of such files, a"
        " folder of `save_to_disk`, a data set on the Hub (org/name), or a URL",
    )
    name: str | None = Field(None, description="configuration of a data set on the Hub")
    revision: str = Field("main", description="revision of a data set on the Hub")
    data_files: str | list[str] | dict[str, str | list[str]] | None = Field(
        None, description="the files, or SPLIT: the files, relative to `path`"
    )
    data_dir: str | None = Field(None, description="a folder in `path`")
    splits: SplitSettings = SplitSettings()
    validation_size: float | int | None = Field(
        None, gt=0, description="rows to split off for validation: a share below 1, or a number"
    )
    seed: int = Field(0, ge=0, description="seed of that split")


class ColumnSettings(Settings):
    text: str = Field("text", description="the column of the text")
    text_pair: str | None = Field(None, description="the column of the second text of a pair")
    label: str | None = Field("label", description="the column of the label; null: there is none")


class TaskSettings(Settings):
    """A task as its user describes it; what is left out, data and expert tell."""

    task: Literal["text-classification"] | None = Field(None, description="the Hub's task name")
    problem_type: ProblemType | None = Field(
        None, description="default: from the labels; numbers with decimals, lists, or classes"
    )
    dataset: DatasetSettings | None = Field(
        None, description="where the rows come from; default: as the section `data` says"
    )
    columns: ColumnSettings = ColumnSettings()
    labels: list[str] | dict[str, str] = Field(
        default_factory=list, description="names in the order of ids, or VALUE IN THE DATA: name"
    )
    metrics: list[str] = Field(
        default_factory=list, description="the score of the task is their mean"
    )
    max_length: int = Field(MAX_LENGTH, ge=1, description="tokens of an example")
    threshold: float = Field(
        0.5, gt=0, lt=1, description="probability from which on a label of several is predicted"
    )


class Columns(Record):
    """The columns of a task's one or two texts, and of its label; None: the rows have no label."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    text: str
    text_pair: str | None = None
    label: str | None = "label"


class Task(Record):
    """The definition of a task, as it travels with the task's rows.

    >>> get_task("mrpc").text_columns
    ('sentence1', 'sentence2')

    Attributes:
        name: what the task is called in settings, folders and metrics.
        task: the Hub's name for this kind of task.
        problem_type: the loss of the head; None: the rows have no labels, so that the expert tells.
        columns: where the texts and the labels are.
        labels: the name of each class id, in order; none for regression, or if the expert tells.
        metrics: the score of the task is their mean (GLUE's rule).
        validation: the splits on which the task is scored.
        max_length: tokens of an example, special tokens included; longer texts are cut.
        threshold: probability from which on a label is predicted, in multi-label classification.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    task: Literal["text-classification"] = "text-classification"
    problem_type: ProblemType | None = "single_label_classification"
    columns: Columns
    labels: tuple[str, ...] = ()
    metrics: tuple[str, ...] = ("accuracy",)
    validation: tuple[str, ...] = ("validation",)
    max_length: Annotated[int, Field(ge=1)] = MAX_LENGTH
    threshold: Annotated[float, Field(gt=0, lt=1)] = 0.5

    @model_validator(mode="after")
    def _check_labels(self) -> "Task":
        if self.regression and self.labels:
            raise ValueError("a regression task has no labels")
        least = 1 if self.multi_label else 2
        is_needed = self.has_labels and not self.regression
        if is_needed and len(set(self.labels)) < max(least, len(self.labels)):
            raise ValueError("a classification task needs two or more different labels")
        if self.has_labels and not (self.metrics and self.problem_type):
            raise ValueError("a task with labels needs a problem type and a metric")
        return self

    @property
    def regression(self) -> bool:
        """Whether the task predicts a number instead of a class."""
        return self.problem_type == "regression"

    @property
    def multi_label(self) -> bool:
        """Whether an example may have several labels, or none."""
        return self.problem_type == "multi_label_classification"

    @property
    def has_labels(self) -> bool:
        """Whether the task's rows have labels; without, it can be merged, but not scored."""
        return self.columns.label is not None

    @property
    def text_columns(self) -> tuple[str, ...]:
        """The columns of the one or two texts of an example."""
        return tuple(name for name in (self.columns.text, self.columns.text_pair) if name)

    @property
    def num_outputs(self) -> int:
        """The width of the head: a logit for each label, or one number."""
        return len(self.labels) or 1

    def suffix(self, split: str) -> str:
        """What is appended to the names of a validation split's metrics; "" for the first split."""
        if split == self.validation[0]:
            return ""
        rest = split.removeprefix("validation").lstrip("_")
        return f"_{rest}" if rest else "_validation"


def get_task(name: str) -> Task:
    """One of GLUE's tasks. UserError with the nearest name if there is no such task."""
    tasks = _glue()
    if name in tasks:
        return tasks[name]
    known = f"GLUE's tasks are {', '.join(tasks)}"
    raise UserError(f"task {name}: there is no such task; {known}{hint(name.lower(), tasks)}")


def task_settings(name: str) -> TaskSettings | None:
    """One of GLUE's tasks as settings describe it; None if there is no such task."""
    task = _glue().get(name)
    if task is None:
        return None
    fields = set(TaskSettings.model_fields) - {"dataset"}
    return TaskSettings.model_validate(task.model_dump(mode="json", include=fields))


def load_task(data: Path, name: str) -> Task:
    """The definition beside a task's rows; without one, GLUE's task of that name.

    Raises:
        UserError: the definition is damaged or of another task, or there is none.
    """
    folder = task_folder(data, name)
    task = read_task(folder)
    if task is None:
        return get_task(name)
    if task.name != name:
        place = folder / DEFINITION
        raise UserError(f"{place}: defines the task {task.name}, not {name}; check --data")
    return task


def read_task(folder: Path) -> Task | None:
    """The definition in a folder of rows or in an expert's; None if there is none.

    Raises:
        UserError: the definition is damaged.
    """
    path = folder / DEFINITION
    return read_record(path, Task, "write it again with `fmn data`") if path.is_file() else None


def write_task(folder: Path, task: Task) -> None:
    """Write a definition into a folder, as `task.json`."""
    write_record(folder / DEFINITION, task)


def task_folder(data: Path, name: str) -> Path:
    """The folder of one task's files: `data/NAME` if it exists, else `data` itself."""
    return data / name if (data / name).is_dir() else data


@cache
def _glue() -> dict[str, Task]:
    from ruamel.yaml import YAML

    path = Path(__file__).with_name("glue.yaml")
    definitions: dict[str, dict[str, Any]] = YAML(typ="safe").load(path)
    return {
        name: parse_record({"name": name, **definition}, Task, path)
        for name, definition in definitions.items()
    }


def __getattr__(name: str) -> Any:
    if name == "TASKS":
        return _glue()
    raise AttributeError(f"module {__name__} has no attribute {name}")
