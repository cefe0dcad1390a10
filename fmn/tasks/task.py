"""A task: which columns hold its texts, what its labels mean, how it is scored.

A task is data, not code. Its definition travels with its rows, as `task.json` beside the Parquet
files; GLUE's nine tasks are built in (`glue.yaml`).
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import (
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)

from fmn.errors import UserError, hint
from fmn.store.records import Record, Settings
from fmn.store.stage import read_record, write_record
from fmn.store.yaml_file import read_yaml

MAX_LENGTH = 128  # tokens of an example, unless its task says otherwise
DEFINITION = "task.json"
# Transformers' words.
ProblemType = Literal["single_label_classification", "multi_label_classification", "regression"]
SINGLE, MULTI, REGRESSION = (
    "single_label_classification",
    "multi_label_classification",
    "regression",
)


class MetricFacts(NamedTuple):
    """What a metric is for.

    Attributes:
        problem_types: the tasks that it scores.
        higher_is_better: its direction.
        is_binary: whether it is the score of class 1 of two classes.
    """

    problem_types: tuple[str, ...]
    higher_is_better: bool = True
    is_binary: bool = False


METRICS: Mapping[str, MetricFacts] = {
    "accuracy": MetricFacts((SINGLE, MULTI)),
    "balanced_accuracy": MetricFacts((SINGLE,)),
    "f1": MetricFacts((SINGLE,), is_binary=True),
    "f1_micro": MetricFacts((SINGLE, MULTI)),
    "f1_macro": MetricFacts((SINGLE, MULTI)),
    "f1_weighted": MetricFacts((SINGLE, MULTI)),
    "precision": MetricFacts((SINGLE,), is_binary=True),
    "recall": MetricFacts((SINGLE,), is_binary=True),
    "matthews_correlation": MetricFacts((SINGLE,)),
    "roc_auc": MetricFacts((SINGLE, MULTI)),
    "mse": MetricFacts((REGRESSION,), higher_is_better=False),
    "mae": MetricFacts((REGRESSION,), higher_is_better=False),
    "r2": MetricFacts((REGRESSION,)),
    "pearson": MetricFacts((REGRESSION,)),
    "spearmanr": MetricFacts((REGRESSION,)),
}
"""Every metric, in the words of scikit-learn and SciPy; `fmn.evaluate.metrics` computes them."""

DEFAULT_METRICS: Mapping[str | None, tuple[str, ...]] = {
    SINGLE: ("accuracy",),
    MULTI: ("f1_micro",),
    REGRESSION: ("pearson", "spearmanr"),
    None: (),
}


def check_labels(names: Sequence[str]) -> None:
    """Refuse names that are empty or the same. ValueError says which."""
    if "" in names:
        raise ValueError("a label has no name")
    if twice := [name for name in names if names.count(name) > 1]:
        raise ValueError(f"label {twice[0]!r} is listed twice")


def check_metrics(metrics: Sequence[str], problem_type: str | None, labels: int) -> None:
    """Refuse metrics that are unknown, do not fit a task, or differ in direction.

    Args:
        metrics: their names.
        problem_type: the task's; None: it is not known yet.
        labels: how many labels the task has; 0: it is not known yet.

    Raises:
        ValueError: names the metric and what fits.
    """
    for name in metrics:
        if name not in METRICS:
            raise ValueError(
                f"unknown metric {name!r}{hint(name, METRICS)}; {_known(problem_type)}"
            )
        if problem_type and problem_type not in METRICS[name].problem_types:
            raise ValueError(f"metric {name} is not for {problem_type}; {_known(problem_type)}")
        if METRICS[name].is_binary and labels > 2:
            raise ValueError(
                f"metric {name} is of class 1 of two classes, and here are {labels}; say"
                f" {'f1_macro' if name == 'f1' else 'f1_macro or balanced_accuracy'}"
            )
    if len({METRICS[name].higher_is_better for name in metrics}) > 1:
        less = [name for name in metrics if not METRICS[name].higher_is_better]
        raise ValueError(
            f"less is better of {', '.join(less)}, and more of the other metrics, so that their"
            " mean would mean nothing; choose metrics of one direction"
        )
    if len(set(metrics)) < len(metrics):
        raise ValueError(f"metrics {', '.join(metrics)}: one is listed twice")


def _known(problem_type: str | None) -> str:
    fitting = [
        name for name, facts in METRICS.items() if problem_type in (None, *facts.problem_types)
    ]
    return f"choose from {', '.join(fitting)}"


class SplitSettings(Settings):
    train: str | None = Field("train", description="the split that experts are tuned on")
    validation: str | list[str] = Field(
        "validation", description="the split, or splits, that models are scored on"
    )

    @property
    def validations(self) -> list[str]:
        """The splits that models are scored on, each once."""
        names = self.validation
        return [names] if isinstance(names, str) else list(dict.fromkeys(names))


class DatasetSettings(Settings):
    """Where a task's rows come from, in the words of `datasets.load_dataset`."""

    path: str = Field(
        ...,
        min_length=1,
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

    @field_validator("validation_size")
    @classmethod
    def _check_size(cls, size: float | None) -> float | None:
        if size is not None and size > 1 and size != int(size):
            raise ValueError("a share below 1, or a whole number of rows")
        return size

    @model_validator(mode="after")
    def _check_validation(self) -> "DatasetSettings":
        names_rows = isinstance(self.data_files, dict) and len(self.data_files) > 1
        if self.validation_size is not None and (
            names_rows or self.splits.validation != "validation"
        ):
            raise ValueError("validation_size and rows for validation contradict each other")
        return self


class ColumnSettings(Settings):
    text: str = Field("text", description="the column of the text")
    text_pair: str | None = Field(None, description="the column of the second text of a pair")
    label: str | None = Field(
        "label", description="the column of the label; null: there is none; label: if there is one"
    )

    @model_validator(mode="after")
    def _check_columns(self) -> "ColumnSettings":
        names = [name for name in (self.text, self.text_pair, self.label) if name is not None]
        if twice := [name for name in names if names.count(name) > 1]:
            raise ValueError(f"column {twice[0]!r} is named twice; name different ones")
        return self


class ScoringSettings(Settings):
    """What settings and the options of a command say of a task in the same words."""

    problem_type: ProblemType | None = Field(
        None, description="default: from the labels; numbers with decimals, lists, or classes"
    )
    max_length: int = Field(MAX_LENGTH, ge=1, description="tokens of an example")
    threshold: float = Field(
        0.5, gt=0, lt=1, description="probability from which on a label of several is predicted"
    )


class TaskSettings(ScoringSettings):
    """A task as its user describes it; what is left out, data and expert tell."""

    task: Literal["text-classification"] | None = Field(None, description="the Hub's task name")
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

    @field_validator("labels", mode="before")
    @classmethod
    def _as_texts(cls, labels: Any) -> Any:
        """YAML reads `[1, 2]` as numbers and `true: yes` as a truth value."""
        if isinstance(labels, Mapping):
            return {plain_text(value): plain_text(name) for value, name in labels.items()}
        return [plain_text(name) for name in labels] if isinstance(labels, list | tuple) else labels

    @model_validator(mode="after")
    def _check(self) -> "TaskSettings":
        if self.metrics and self.columns.label is None:
            raise ValueError("metrics need labels, and columns.label says that there are none")
        check_labels(self.labels if isinstance(self.labels, list) else self.label_names)
        check_metrics(self.metrics, self.problem_type, len(self.label_names))
        return self

    @property
    def label_names(self) -> list[str]:
        """The names of the labels in the order of ids, as far as they were named."""
        names = self.labels.values() if isinstance(self.labels, dict) else self.labels
        return list(dict.fromkeys(names))


def plain_text(value: Any) -> Any:
    """A label in the data as text: true, 3 for 3.0, and a text without blanks around it.

    >>> [plain_text(value) for value in (True, 3.0, 0.5, " good ")]
    ['true', '3', '0.5', 'good']
    """
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return str(value).strip() if isinstance(value, str | int | float) else value


def in_a_line(names: Sequence[str], most: int = 12) -> str:
    """Names for a message, of many the first ones.

    >>> in_a_line(["a", "b", "c"], most=2)
    'a, b, ...'
    """
    return ", ".join(names[:most]) + ", ..." * (len(names) > most)


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

    name: Annotated[str, Field(pattern=r"^\w[\w.-]*$")]  # also of folders and files
    task: Literal["text-classification"] = "text-classification"
    problem_type: ProblemType | None = "single_label_classification"
    columns: Columns
    labels: tuple[str, ...] = ()
    metrics: tuple[str, ...] = Field(
        default_factory=lambda fields: DEFAULT_METRICS[
            fields["problem_type"] if fields["columns"].label else None
        ]
    )
    validation: tuple[Annotated[str, Field(pattern=r"^[\w. -]+$")], ...] = ("validation",)
    max_length: Annotated[int, Field(ge=1)] = MAX_LENGTH
    threshold: Annotated[float, Field(gt=0, lt=1)] = 0.5

    @model_validator(mode="after")
    def _check(self) -> "Task":
        if self.regression and self.labels:
            raise ValueError("a regression task has no labels")
        least = 0 if self.regression or not self.has_labels else 1 if self.multi_label else 2
        if len(self.labels) < least:
            raise ValueError("a classification task needs two or more labels")
        if self.has_labels and not self.problem_type:
            raise ValueError("a task with labels needs a problem type")
        if bool(self.metrics) != self.has_labels:
            raise ValueError("a task has metrics if it has labels, and only then")
        check_labels(self.labels)
        check_metrics(self.metrics, self.problem_type, len(self.labels))
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
    if name in TASKS:
        return TASKS[name]
    known = f"GLUE's tasks are {', '.join(TASKS)}{hint(name.lower(), TASKS)}"
    remedy = "describe one of your own by --dataset, --text and --label, or under `tasks:`"
    raise UserError(f"task {name}: nothing says what it is; {remedy}; {known}")


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


def make_task(name: str, **fields: Any) -> Task:
    """A task of these fields. UserError says what does not fit."""
    with problems_explained(f"task {name}"):
        return Task.model_validate({"name": name, **fields}, strict=False)  # lists are tuples too


@contextmanager
def problems_explained(place: str) -> Iterator[None]:
    """Raise UserError with the first problem of a definition in place of ValidationError."""
    try:
        yield
    except ValidationError as error:
        first = error.errors()[0]
        setting = ".".join(map(str, first["loc"])) + ": " * bool(first["loc"])
        message = first["msg"].removeprefix("Value error, ")
        raise UserError(f"{place}: {setting}{message}") from error


def task_settings(name: str) -> TaskSettings | None:
    """How one of GLUE's tasks is described, in the words of settings; None for another name."""
    return _GLUE.get(name)


_GLUE = {
    name: TaskSettings(**definition)
    for name, definition in read_yaml(Path(__file__).with_name("glue.yaml")).items()
}
TASKS: Mapping[str, Task] = {
    name: make_task(
        name,
        columns=Columns(**settings.columns.model_dump()),
        validation=settings.dataset.splits.validations,
        **settings.model_dump(exclude_defaults=True, include={"problem_type", "labels", "metrics"}),
    )
    for name, settings in _GLUE.items()
    if settings.dataset
}
"""GLUE's nine tasks by name."""
