"""Records and settings refuse what is not theirs, in one line that names the entry."""

from typing import Any

import pytest
from pydantic import Field, ValidationError, field_validator

from fmn.errors import UserError
from fmn.store.records import Record, Settings, at_least_one, pairs, parse_record


class Score(Record):
    value: float
    rows: int


class Scores(Record):
    model: str
    tasks: dict[str, Score]
    order: list[int] = Field(default_factory=list)


class Options(Settings):
    rows: int | str = 1
    name: str = "a"
    rate: float = 0.5

    _counts = field_validator("rows")(at_least_one)


CONTENT: dict[str, Any] = {"model": "m", "tasks": {"rte": {"value": 0.5, "rows": 3}}}


def test_a_record_is_read_and_unknown_entries_are_ignored() -> None:
    scores = parse_record({**CONTENT, "new": 1}, Scores, "m.json")
    assert scores == Scores(model="m", tasks={"rte": Score(value=0.5, rows=3)})
    assert parse_record(scores.model_dump(), Scores, "m.json") == scores
    assert parse_record({"value": 1, "rows": 1}, Score, "m.json").value == 1.0
    with pytest.raises(ValidationError):
        scores.model = "other"  # type: ignore[misc]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (CONTENT | {"model": None}, "model is null, not as fmn writes it"),
        (CONTENT | {"model": 1}, "model is 1, not"),
        (CONTENT | {"tasks": []}, r"tasks is \[\], not"),
        (CONTENT | {"tasks": {"rte": {"value": 0.5}}}, "tasks.rte.rows is missing"),
        (CONTENT | {"tasks": {"rte": {"value": True, "rows": 1}}}, "tasks.rte.value is true"),
        (CONTENT | {"tasks": {"rte": {"value": 1, "rows": 1.5}}}, "tasks.rte.rows is 1.5"),
        (CONTENT | {"order": [0, "1"]}, "order.1 is '1'"),
        (CONTENT | {"model": ["x" * 1000, "\n"]}, "model is .{60}, not"),
        (None, "it is "),
        ([], "it is "),
        ("text", "it is "),
    ],
)
def test_a_wrong_entry_is_named(content: Any, message: str) -> None:
    with pytest.raises(UserError, match=f"^m.json: {message}.*; evaluate again$"):
        parse_record(content, Scores, "m.json", remedy="evaluate again")


@pytest.mark.parametrize(
    "values",
    [
        {"rows": 0},
        {"rows": 2**63},
        {"name": "a\0b"},
        {"rate": float("nan")},
        {"rate": float("inf")},
        {"unknown": 1},
    ],
)
def test_settings_refuse_impossible_values(values: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        Options(**values)
    assert Options(rows="all").rows == "all"


def test_pairs_are_names_and_values() -> None:
    assert pairs(["a=1", "b=x=y"], "--option") == {"a": "1", "b": "x=y"}
    for item in ("a", "a=", "=1"):
        with pytest.raises(UserError, match=f"--option {item}: expected NAME=VALUE"):
            pairs([item], "--option")
    with pytest.raises(UserError, match="--option: a is given twice"):
        pairs(["a=1", "a=2"], "--option")
