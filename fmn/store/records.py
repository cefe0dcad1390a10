"""Records and settings: the pydantic models that rooms build theirs on."""

import json
<<<<<<< HEAD
from typing import Any, ClassVar, TypeVar
=======
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, TypeVar
>>>>>>> room-merge

from pydantic import BaseModel, ConfigDict, ValidationError, field_validator

from fmn.errors import UserError
<<<<<<< HEAD
=======

Interval = Annotated[list[float], Field(min_length=2, max_length=2)]
>>>>>>> room-merge


class Record(BaseModel):
    """What one stage writes as JSON and others read; further entries are ignored.

    Types are strict: true is no number in it, and a number no text.
    """

    model_config = ConfigDict(strict=True, frozen=True)


class Settings(BaseModel):
    """A section of the settings; with the same names, the options of a command.

    They do not change once read, and an unknown one is an error.

    Attributes:
        runtime: names of the fields that only say where or how fast to compute. An output does not
            depend on them.
    """

<<<<<<< HEAD
    runtime: ClassVar[set[str]] = {"device"}
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @field_validator("*")
    @classmethod
    def _check_value(cls, value: Any) -> Any:
        if isinstance(value, int) and abs(value) >= 2**63:
            raise ValueError("a number of more than 64 bits")
        if isinstance(value, str) and "\0" in value:
            raise ValueError("has a NUL character")
        return value
=======
class Sampled(Record):
    """How a statistic was made."""

    samples: int
    key: str = ""
    estimator: str = ""
    stratified: bool = False
    seed: int = 0
    dtype: str = ""
    data_digest: str = ""
    threads: int = 1


class Scores(Record):
    """A task's metrics."""

    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: dict[str, float]

    score: float
    examples: int
    interval: dict[str, Interval]


class Rows(Record):
    """The rows that a task's metrics are of."""

    splits: dict[str, str]
    source: str = ""
    revision: str = ""
    seed: str = ""


class Metrics(Record):
    """What `fmn evaluate` writes."""

    model: str
    tasks: Annotated[dict[str, Scores], Field(min_length=1)]
    score: float
    interval: Interval
    predictions: str
    labels: dict[str, Labels] = {}
    data: dict[str, Rows] = {}


class Measured(Record):
    """A checkpoint that a statistic is of."""

    digest: str


class Statistic(Sampled):
    """What the metadata of a mask Fisher, a full Fisher or Gram matrices say."""

    task: str
    checkpoint: Measured
    labels: dict[str, Labels] = {}


class GramMatrices(Statistic):
    """Of which the metadata also say which map reads which input."""

    inputs: dict[str, str]
    transposed: list[str]


class Tried(Record):
    """What a merged model and the expert say of a task's rows."""

    score: float
    expert: float
    relative: float | None
    labels: list[float]
    predictions: list[float]
    alone: list[float] = Field(alias="expert predictions")


class Cell(Record):
    """What a comparison found of a method and a set of experts."""

    tasks: dict[str, Tried]
    seconds: float


class Found(Record):
    """What `fmn search` writes."""

    coefficients: dict[str, float]
    scale: float
    score: float
    uniform: float
    experts: dict[str, str]
    merge: dict[str, Any]


class Prepared(Record):
    """What the manifest of a task's data says."""

    source: str
    rows: dict[str, int]
    revision: str = ""
    seed: str = "0"


class Finetuned(Record):
    """What the manifest of an expert that was fine-tuned here says."""

    epochs: float
    learning_rate: float
    batch_size: int
    examples: int
    seed: int
    dtype: str


MANIFESTS: Mapping[str, type[Record]] = {"finetune": Finetuned, "data": Prepared}
"""By stage, what is read of a manifest."""
>>>>>>> room-merge


R = TypeVar("R", bound=Record)


def parse_record(content: Any, record: type[R], place: object, remedy: str = "make it again") -> R:
    """Plain data as a record.

    Raises:
        UserError: names the first entry that is missing or wrong; `place` and `remedy` frame it.
    """
    try:
        return record.model_validate_json(json.dumps(content))
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(map(str, first["loc"])) or "it"
        is_missing = first["type"] == "missing"
        problem = "is missing" if is_missing else f"is {first['input']!r:.60}, not as fmn writes it"
        raise UserError(f"{place}: {name} {problem}; {remedy}") from error


def pairs(items: list[str], option: str) -> dict[str, str]:
    """``["a=1", "b=2"]`` as a dictionary; UserError for an item without ``=`` or given twice."""
    values: dict[str, str] = {}
    for item in items:
        name, _, value = item.partition("=")
        if not (name and value):
            raise UserError(f"{option} {item}: expected NAME=VALUE")
        if name in values:
            raise UserError(f"{option}: {name} is given twice")
        values[name] = value
    return values


def at_least_one(number: int | str) -> int | str:
    """A validator of settings that count: a number is at least one, a word is as it is."""
    if isinstance(number, int) and number < 1:
        raise ValueError("at least one example is needed")
    return number
