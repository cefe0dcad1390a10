"""What JSON that stages read of one another must hold: what was made by hand, or by another fmn, is refused by name.

Digests tell that a file is what was written, not who wrote it. Only what is read is stated; more may stand beside it.
"""

import json
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from fmn.errors import UserError

Interval = Annotated[list[float], Field(min_length=2, max_length=2)]


class Record(BaseModel):
    """A JSON object; true is no number in it, and a number no text."""

    model_config = ConfigDict(strict=True)


class Labels(Record):
    """`fmn.labels.Labels`."""

    order: list[int]
    origin: str = Field(alias="from")
    score: float = 0
    as_is: float = 0
    rows: int = 0


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


def fits(content: Mapping[str, Any], form: type[Record]) -> bool:
    """Whether content is as `form` has it."""
    try:
        form.model_validate(content)
    except ValidationError:
        return False
    return True


def check(content: Mapping[str, Any], form: type[Record], place: object, remedy: str) -> None:
    """Raise UserError that names the first entry that is not as `form` has it; `place` and `remedy` go around it."""
    try:
        form.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        what = (
            "is missing"
            if first["type"] == "missing"
            else f"is {first['input']!r:.60}, not as fmn writes it"
        )
        raise UserError(f"{place}: {where} {what}; {remedy}") from error


def pairs(items: list[str], option: str) -> dict[str, str]:
    """``["a=1", "b=2"]`` as a dictionary; UserError for one without ``=`` or said twice."""
    found: dict[str, str] = {}
    for item in items:
        name, equals, value = item.partition("=")
        if not (name and equals and value):
            raise UserError(f"{option} {item}: expected NAME=VALUE")
        if name in found:
            raise UserError(f"{option}: {name} is given twice")
        found[name] = value
    return found


def at_least_one(samples: int | str) -> int | str:
    if isinstance(samples, int) and samples < 1:
        raise ValueError("at least one example is needed")
    return samples


class Settings(BaseModel):
    """A section of the settings; with the same names, the options of a command.

    They do not change once read, and an unknown one is an error.

    Attributes:
        runtime: names of the fields that only say where or how fast to compute. An output does not
            depend on them.
    """

    runtime: ClassVar[set[str]] = {"device", "workers"}
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @field_validator("*")
    @classmethod
    def _fits(cls, value: Any) -> Any:
        if isinstance(value, int) and abs(value) >= 2**63:
            raise ValueError("a number of more than 64 bits")
        if isinstance(value, str) and "\0" in value:
            raise ValueError("holds a NUL character")
        return value
