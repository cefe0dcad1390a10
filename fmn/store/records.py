"""Records and settings: the base classes of all pydantic models in fmn."""

import json
import re
from collections.abc import Iterator, Mapping
from datetime import date
from typing import Any, ClassVar, TypeVar

from pydantic import BaseModel, ConfigDict, SecretStr, ValidationError, field_validator

from fmn.errors import HIDING, UserError, hint


class Record(BaseModel):
    """JSON that one stage writes and others read; unknown entries are ignored.

    Types are strict: true is not a number, and a number is not a text.
    """

    model_config = ConfigDict(strict=True, frozen=True)


class Settings(BaseModel):
    """A section of the settings, and the options of a command with the same names.

    Instances are immutable, and an unknown name is an error.

    Attributes:
        runtime: names of the fields that the output does not depend on, such as the device.
    """

    runtime: ClassVar[set[str]] = {"device"}
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @field_validator("*")
    @classmethod
    def _check_value(cls, value: Any) -> Any:
        if isinstance(value, int) and abs(value) >= 2**63:
            raise ValueError("a number of more than 64 bits")
        for text in _texts(value):
            if hidden := next((each for each in text if ord(each) in HIDING), None):
                raise ValueError(f"{shortened(text)} has the character {hidden!a}; leave it out")
        return value


def _texts(value: Any) -> Iterator[str]:
    """All texts in a value of the settings, keys included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, SecretStr):
        if any(ord(character) in HIDING for character in value.get_secret_value()):
            raise ValueError("has a line's end or another control character; leave it out")
    elif isinstance(value, Mapping):
        for name, item in value.items():
            yield from (*_texts(name), *_texts(item))
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _texts(item)


_MUST_BE: Mapping[str, str] = {
    **dict.fromkeys(("int_parsing", "int_type", "int_from_float"), "a whole number"),
    **dict.fromkeys(("float_parsing", "float_type"), "a number"),
    "finite_number": "a finite number",
    **dict.fromkeys(("bool_parsing", "bool_type"), "true or false"),
    "string_type": "a text, in quotes",
    "string_too_short": "a text that is not empty",
    "list_type": "a list, [A, B]",
    **dict.fromkeys(("dict_type", "model_type"), "a section of settings, NAME: VALUE"),
    "greater_than": "above {gt:g}",
    "greater_than_equal": "{ge:g} or more",
    "less_than": "below {lt:g}",
    "less_than_equal": "at most {le:g}",
    "too_short": "a list of at least {min_length}",
    "string_too_long": "of at most {max_length} characters",
    "too_long": "a list of at most {max_length}",
    "literal_error": "one of {expected}",
    "string_pattern_mismatch": "a name of letters, digits, dots, dashes and underscores",
}
"""What a value must be, by pydantic's type of error."""


def in_words(problem: Mapping[str, Any]) -> str:
    """Describe an error of pydantic: what the value must be, and what it is.

    >>> in_words({"type": "int_parsing", "input": "many"})
    "must be a whole number, not 'many'"
    """
    wanted = _MUST_BE.get(problem["type"])
    if problem["type"] == "extra_forbidden":
        return "there is no such setting"
    if wanted is None:
        return str(problem["msg"]).removeprefix("Value error, ")
    value, context = problem["input"], problem.get("ctx", {})
    near = ""
    if problem["type"] == "literal_error" and isinstance(value, str):
        near = hint(value, re.findall(r"'([^']*)'", context["expected"]))
    if problem["type"] == "literal_error" and " or " not in context["expected"]:
        wanted = "{expected}"
    return f"must be {wanted.format(**context)}, not {shortened(value)}{near}"


def shortened(value: Any, most: int = 60) -> str:
    """A value as in YAML, cut if it is long.

    >>> shortened("many words", 8), shortened(None), shortened(date(2026, 1, 2))
    ("'many...", 'null', '2026-01-02')
    """
    is_word = value is None or isinstance(value, bool)
    is_date = isinstance(value, date)
    text = json.dumps(value) if is_word else str(value) if is_date else repr(value)
    return text if len(text) <= most else f"{text[: most - 3]}..."


R = TypeVar("R", bound=Record)


def parse_record(content: Any, record: type[R], place: object, remedy: str = "make it again") -> R:
    """Convert plain data to a record.

    Raises:
        UserError: an entry is missing or wrong; the message begins with `place` and ends with
            `remedy`.
    """
    try:
        return record.model_validate_json(json.dumps(content))
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(map(str, first["loc"])) or "it"
        problem = "is missing"
        if first["type"] != "missing":
            problem = f"is {shortened(first['input'])}, not as fmn writes it"
        raise UserError(f"{place}: {name} {problem}; {remedy}") from error


def pairs(items: list[str], option: str) -> dict[str, str]:
    """Convert ``["a=1", "b=2"]`` to a dictionary.

    Raises:
        UserError: an item has no ``=``, or a name occurs twice.
    """
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
    """Validate a number of examples: at least one, or a word such as "all"."""
    if isinstance(number, int) and number < 1:
        raise ValueError(f"at least one example is needed, not {number}")
    return number
