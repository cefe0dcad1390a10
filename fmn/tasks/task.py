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
from fmn.store.records import Record, parse_record
from fmn.store.stage import read_record

MAX_LENGTH = 128  # tokens of an example, unless its task says otherwise
DEFINITION = "task.json"
TASKS: Mapping[str, "Task"]  # GLUE's nine tasks by name, read at first use


class Columns(Record):
    """The columns of a task's one or two texts, and of its label: a class id, or a number."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    text: str
    text_pair: str | None = None
    label: str = "label"


class Task(Record):
    """The definition of a task.

    >>> get_task("mrpc").text_columns
    ('sentence1', 'sentence2')

    Attributes:
        name: what the task is called in settings, folders and metrics.
        task: the Hub's name for this kind of task.
        problem_type: the loss of the head, in the words of Transformers' configurations.
        labels: the name of each class id, in order; none for regression.
        metrics: the score of the task is their mean (GLUE's rule).
        validation: the splits on which the task is scored.
        max_length: tokens of an example, special tokens included; longer texts are cut.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    task: Literal["text-classification"] = "text-classification"
    problem_type: Literal["single_label_classification", "regression"] = (
        "single_label_classification"
    )
    columns: Columns
    labels: tuple[str, ...] = ()
    metrics: Annotated[tuple[str, ...], Field(min_length=1)] = ("accuracy",)
    validation: Annotated[tuple[str, ...], Field(min_length=1)] = ("validation",)
    max_length: Annotated[int, Field(ge=1)] = MAX_LENGTH

    @model_validator(mode="after")
    def _check_labels(self) -> "Task":
        if self.regression and self.labels:
            raise ValueError("a regression task has no labels")
        if not self.regression and len(set(self.labels)) < max(2, len(self.labels)):
            raise ValueError("a classification task needs two or more different labels")
        return self

    @property
    def regression(self) -> bool:
        """Whether the task predicts a number instead of a class."""
        return self.problem_type == "regression"

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
        return "" if split == self.validation[0] else split.removeprefix("validation")


def get_task(name: str) -> Task:
    """One of GLUE's tasks. UserError with the nearest name if there is no such task."""
    tasks = _glue()
    if name in tasks:
        return tasks[name]
    known = f"GLUE's tasks are {', '.join(tasks)}"
    raise UserError(f"task {name}: there is no such task; {known}{hint(name.lower(), tasks)}")


def load_task(data: Path, name: str) -> Task:
    """The definition beside a task's rows; without one, GLUE's task of that name.

    Raises:
        UserError: the definition is damaged or of another task, or there is none.
    """
    path = task_folder(data, name) / DEFINITION
    if not path.is_file():
        return get_task(name)
    task = read_record(path, Task, f"write it again with `fmn data {name}`")
    if task.name != name:
        raise UserError(f"{path}: defines the task {task.name}, not {name}; check --data")
    return task


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
