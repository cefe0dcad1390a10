"""The definition of a task: the columns of its inputs, its labels, and its metrics.

A task is data, not code. Its definition is stored with its rows, as `task.json` beside the Parquet
files; GLUE's nine tasks are built in (`glue.yaml`).
"""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal, cast

from pydantic import (
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)

from fmn.errors import UserError, hint
from fmn.store.artifacts import absent
from fmn.store.records import Record, Settings, in_words
from fmn.store.stage import read_record, write_record
from fmn.store.yaml_file import read_yaml
from fmn.tasks.kinds import (
    GENERATORS,
    KINDS,
    REGRESSION,
    Kind,
    KindName,
    ProblemType,
)
from fmn.tasks.metrics import METRICS, check_metrics, default_metrics

MAX_LENGTH = 128  # tokens of an example, unless its task says otherwise
UNLIMITED = 2**20  # of embedding models, which say themselves where they cut texts
DEFINITION = "task.json"
# The losses of `fmn.fisher.loss`: of one answer, of an answer for each token, or of an embedding.
LossName = ProblemType | Literal["tokens", "embedding"]


_SPAN = re.compile(r"O|[BIESLU]-.+")


def no_span_tag(labels: Sequence[str]) -> str | None:
    """The first label that seqeval cannot read as a tag of spans; None if it can read all.

    >>> no_span_tag(["O", "B-PER", "I-PER"]), no_span_tag(["O", "NOUN"])
    (None, 'NOUN')
    """
    return next((name for name in labels if not _SPAN.fullmatch(name)), None)


def check_labels(names: Sequence[str]) -> None:
    """Raise a ValueError if a name is empty or occurs twice."""
    if "" in names:
        raise ValueError("a label has no name")
    if twice := [name for name in names if names.count(name) > 1]:
        raise ValueError(f"label {twice[0]!r} is listed twice")


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
            raise ValueError(f"must be a share below 1, or a whole number of rows, not {size:g}")
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
    """The columns of an example by their roles; each kind of task has its own roles."""

    text: str = Field("text", description="the column of the text")
    text_pair: str | None = Field(None, description="the column of the second text of a pair")
    tokens: str = Field("tokens", description="the column of the words, for token-classification")
    image: str = Field("image", description="the column of the image")
    prompt: str | None = Field(
        "prompt", description="the column of what a generated text goes on from; null: nothing"
    )
    completion: str = Field("completion", description="the column of the text to generate")
    label: str | None = Field(
        "label", description="the column of the label; null: there is none; label: if there is one"
    )

    @model_validator(mode="after")
    def _check_columns(self) -> "ColumnSettings":
        names = [name for name in self.model_dump(exclude_unset=True).values() if name is not None]
        if twice := [name for name in names if names.count(name) > 1]:
            raise ValueError(f"column {twice[0]!r} is named twice; name different ones")
        return self

    def of_kind(self, kind: KindName) -> dict[str, str]:
        """The names of the columns of a kind's examples, by key."""
        names = {key: getattr(self, key) for key in KINDS[kind].columns}
        return {key: name for key, name in names.items() if name is not None}


_KIND_BY_COLUMN: Mapping[str, KindName] = {
    "tokens": "token-classification",
    "image": "image-classification",
    "prompt": "text-generation",
    "completion": "text-generation",
}


class ScoringSettings(Settings):
    """Entries about a task that settings and the options of a command share."""

    problem_type: ProblemType | None = Field(
        None, description="default: from the labels; numbers with decimals, lists, or classes"
    )
    max_length: int = Field(MAX_LENGTH, ge=1, description="tokens of an example")
    threshold: float = Field(
        0.5, gt=0, lt=1, description="probability from which on a label of several is predicted"
    )


class TaskSettings(ScoringSettings):
    """A user's description of a task; missing entries come from the data and the expert."""

    task: KindName | None = Field(
        None, description="the Hub's name of the kind of task; default: as the columns say"
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

    @field_validator("labels", mode="before")
    @classmethod
    def _as_texts(cls, labels: Any) -> Any:
        """Convert labels to texts: YAML reads `[1, 2]` as numbers, and `true` as a boolean."""
        if isinstance(labels, Mapping):
            return {plain_text(value): plain_text(name) for value, name in labels.items()}
        return [plain_text(name) for name in labels] if isinstance(labels, list | tuple) else labels

    @model_validator(mode="after")
    def _check(self) -> "TaskSettings":
        if self.metrics and self.columns.label is None:
            raise ValueError("metrics need labels, and columns.label says that there are none")
        kind, own = self.kind, KINDS[self.kind].columns
        if foreign := sorted(self.columns.model_fields_set - {*own, "label"}):
            raise ValueError(
                f"columns.{foreign[0]} is not of {kind}, which has {', '.join(own)}; correct task"
            )
        if self.problem_type and self.problem_type not in KINDS[kind].problem_types:
            raise ValueError(f"problem_type {self.problem_type} is not of {kind}; leave it out")
        check_labels(self.labels if isinstance(self.labels, list) else self.label_names)
        check_metrics(self.metrics, self.problem_type, len(self.label_names), kind)
        return self

    @property
    def kind(self) -> KindName:
        """The kind of task: `task`, or the kind that the columns belong to."""
        if self.task:
            return self.task
        for key, kind in _KIND_BY_COLUMN.items():
            if key in self.columns.model_fields_set:
                return kind
        return "text-classification"

    @property
    def label_names(self) -> list[str]:
        """The names of the labels in the order of ids; empty if the user names none."""
        names = self.labels.values() if isinstance(self.labels, dict) else self.labels
        return list(dict.fromkeys(names))


def plain_text(value: Any) -> Any:
    """Convert a label in the data to text: true, 3 for 3.0, and a text without outer blanks.

    >>> [plain_text(value) for value in (True, 3.0, 0.5, " good ")]
    ['true', '3', '0.5', 'good']
    """
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return str(value).strip() if isinstance(value, str | int | float) else value


def in_a_line(names: Iterable[str], most: int = 12) -> str:
    """Join names for a message; a long list is cut.

    >>> in_a_line(["a", "b", "c"], most=2)
    'a, b, ...'
    """
    names = list(names)
    words = [f"{' '.join(str(name).split()):.100}" for name in names[:most]]
    return ", ".join(words) + ", ..." * (len(names) > most)


class Columns(Record):
    """The columns of a task's examples and of its label; None: there is no such column."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    text: str | None = None
    text_pair: str | None = None
    tokens: str | None = None
    image: str | None = None
    prompt: str | None = None
    completion: str | None = None
    label: str | None = "label"


class Task(Record):
    """The definition of a task, stored with the task's rows.

    >>> get_task("mrpc").text_columns
    ('sentence1', 'sentence2')

    Attributes:
        name: the task's name in settings, folders and metrics.
        task: the kind of task, by the Hub's name (`fmn.tasks.kinds`).
        problem_type: the loss of the head; None for rows without labels: it is the expert's.
        columns: the columns of the examples and of the labels.
        labels: the name of each class id, in order; empty for regression, or if the expert has the
            names.
        metrics: the score of the task is their mean (GLUE's rule).
        validation: the splits on which the task is scored.
        max_length: most tokens of an example, special tokens included; longer texts are cut.
            Embedding models may have a lower limit.
        threshold: probability from which on a label is predicted, in multi-label classification.
        chat: whether prompts are lists of messages, as JSON; the chat template of the checkpoint's
            tokenizer makes texts of them.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: Annotated[str, Field(pattern=r"^\w[\w.-]*$")]  # also of folders and files
    task: KindName = "text-classification"
    problem_type: ProblemType | None = Field(
        default_factory=lambda fields: next(iter(KINDS[fields["task"]].problem_types), None)
    )
    columns: Columns
    labels: tuple[str, ...] = ()
    metrics: tuple[str, ...] = Field(
        default_factory=lambda fields: (
            default_metrics(fields["task"], fields["problem_type"])
            if fields["columns"].label or fields["task"] in GENERATORS
            else ()
        )
    )
    validation: tuple[Annotated[str, Field(pattern=r"^[\w. -]+$")], ...] = ("validation",)
    max_length: Annotated[int, Field(ge=1)] = Field(
        default_factory=lambda fields: (
            UNLIMITED if fields["task"] == "sentence-similarity" else MAX_LENGTH
        )
    )
    threshold: Annotated[float, Field(gt=0, lt=1)] = 0.5
    chat: bool = False

    @model_validator(mode="after")
    def _check(self) -> "Task":
        required = {*self.kind.columns} - {*self.kind.optional}
        named = {key for key, name in self.columns.model_dump().items() if name} - {"label"}
        if not required <= named <= {*self.kind.columns}:
            raise ValueError(f"{self.task} has the columns {', '.join(self.kind.columns)}")
        if self.problem_type not in (None, *self.kind.problem_types):
            raise ValueError(f"{self.task} is no {self.problem_type}")
        has_number = self.problem_type == REGRESSION
        if has_number and self.labels:
            raise ValueError("a regression task has no labels")
        least = 0 if has_number or not self.columns.label else 1 if self.multi_label else 2
        if len(self.labels) < least:
            raise ValueError("a classification task needs two or more labels")
        if self.task == "sentence-similarity" and self.columns.label and not self.columns.text_pair:
            raise ValueError(
                "the labels of sentence-similarity are of pairs; say columns.text_pair, or"
                " columns.label: null"
            )
        if self.columns.label and not self.problem_type:
            raise ValueError("a task with labels needs a problem type")
        if bool(self.metrics) != self.has_labels:
            raise ValueError("a task has metrics if it has labels, and only then")
        check_labels(self.labels)
        check_metrics(self.metrics, self.problem_type, len(self.labels), self.task)
        return self

    @property
    def kind(self) -> Kind:
        """The properties of its kind of task."""
        return KINDS[self.task]

    @property
    def loss(self) -> LossName:
        """The loss whose gradients its Fisher information squares (`fmn.fisher.loss`)."""
        if self.task == "sentence-similarity":
            return "embedding"
        if self.task in ("token-classification", *GENERATORS):
            return "tokens"
        return cast("ProblemType", self.problem_type)

    @property
    def score_metrics(self) -> tuple[str, ...]:
        """The metrics whose mean is the score: those with the direction of the first."""
        better = [METRICS[name].higher_is_better for name in self.metrics]
        return tuple(n for n, is_so in zip(self.metrics, better, strict=True) if is_so == better[0])

    @property
    def regression(self) -> bool:
        """Whether a head predicts a number instead of a class."""
        return self.problem_type == REGRESSION and self.kind.has_head

    @property
    def multi_label(self) -> bool:
        """Whether an example may have several labels, or none."""
        return self.problem_type == "multi_label_classification"

    @property
    def generates(self) -> bool:
        """Whether its answers are generated texts."""
        return self.task in GENERATORS

    @property
    def has_labels(self) -> bool:
        """Whether the task's rows have labels; without labels it can be merged, but not scored.

        For generated text, the label is the text itself.
        """
        return self.columns.label is not None or self.task in GENERATORS

    @property
    def input_columns(self) -> dict[str, str]:
        """The columns of an example by role, such as "text", without the label's."""
        names = {key: getattr(self.columns, key) for key in self.kind.columns}
        return {key: name for key, name in names.items() if name is not None}

    @property
    def text_columns(self) -> tuple[str, ...]:
        """The names of the columns of an example."""
        return tuple(self.input_columns.values())

    @property
    def num_outputs(self) -> int:
        """The width of the head: a logit for each label, or one number."""
        return len(self.labels) or 1

    def suffix(self, split: str) -> str:
        """The suffix of the names of a validation split's metrics; "" for the first split."""
        if split == self.validation[0]:
            return ""
        rest = split.removeprefix("validation").lstrip("_")
        return f"_{rest}" if rest else "_validation"


def get_task(name: str) -> Task:
    """One of GLUE's tasks; UserError, with the most similar name, if there is no such task."""
    if name in TASKS:
        return TASKS[name]
    known = f"GLUE's tasks are {', '.join(TASKS)}{hint(name.lower(), TASKS)}"
    remedy = "describe one of your own by --dataset, --text and --label, or under `tasks:`"
    raise UserError(f"task {name}: nothing says what it is; {remedy}; {known}")


def load_task(data: Path, name: str) -> Task:
    """Read the definition beside a task's rows; without one, it is GLUE's task of that name.

    Raises:
        UserError: the definition is missing, damaged or of another task.
    """
    folder = task_folder(data, name)
    task = read_task(folder)
    if task is None and name in TASKS:
        return TASKS[name]
    if task is None:
        problem = f"has no task {name}" if data.is_dir() else absent(data)
        remedy = f"let `fmn data {name} --out {data / name}` write its rows there"
        raise UserError(f"--data {data}: {problem}; {remedy}")
    if task.name != name:
        place = folder / DEFINITION
        raise UserError(f"{place}: defines the task {task.name}, not {name}; check --data")
    return task


def read_task(folder: Path) -> Task | None:
    """Read the definition in a folder of rows or in an expert's folder; None if there is none.

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
    """Make a task from its fields; UserError if they do not fit together."""
    with problems_explained(f"task {name}"):
        return Task.model_validate({"name": name, **fields}, strict=False)  # lists are tuples too


@contextmanager
def problems_explained(place: str) -> Iterator[None]:
    """Convert a ValidationError to a UserError with the first problem of a definition."""
    try:
        yield
    except ValidationError as error:
        first = error.errors()[0]
        setting = ".".join(map(str, first["loc"])) + ": " * bool(first["loc"])
        raise UserError(f"{place}: {setting}{in_words(first)}") from error


def task_settings(name: str) -> TaskSettings | None:
    """The settings of one of GLUE's tasks; None for another name."""
    return _GLUE.get(name)


_GLUE = {
    name: TaskSettings(**definition)
    for name, definition in read_yaml(Path(__file__).with_name("glue.yaml")).items()
}
TASKS: Mapping[str, Task] = {
    name: make_task(
        name,
        columns=Columns(**settings.columns.of_kind(settings.kind), label=settings.columns.label),
        validation=settings.dataset.splits.validations,
        **settings.model_dump(exclude_defaults=True, include={"problem_type", "labels", "metrics"}),
    )
    for name, settings in _GLUE.items()
    if settings.dataset
}
"""GLUE's nine tasks by name."""
