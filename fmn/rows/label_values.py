"""Convert the values of a label column to class ids, numbers, or lists of ids."""

import ast
import json
import math
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from decimal import Decimal
from typing import Any, NamedTuple

from fmn.errors import UserError, hint
from fmn.store.records import shortened
from fmn.tasks.kinds import MULTI, REGRESSION, SINGLE
from fmn.tasks.metrics import METRICS
from fmn.tasks.task import TaskSettings, in_a_line, plain_text

_NUMBER = re.compile(r"[+-]?(\d{1,18}(\.\d*)?|\.\d+)([eE][+-]?\d{1,3})?")
# Errors of parsers; a MemoryError if a text is nested too deeply for Python's parser.
_NO_LIST = (ValueError, SyntaxError, TypeError, RecursionError, MemoryError)
_TRUTH = {"true": True, "false": False}


class Labels(NamedTuple):
    """The meaning of the values of a label column.

    Attributes:
        problem_type: of the task.
        names: the labels' names in the order of ids; none for regression.
        ids: the id by value, as `plain_text` writes it.
        width: the length of lists of zeros and ones (multi-hot); 0 if labels are not such lists.
    """

    problem_type: Any
    names: tuple[str, ...]
    ids: Mapping[str, int]
    width: int = 0


def is_missing(value: Any) -> bool:
    """Whether a cell is empty: null, not a number, or a blank text."""
    if isinstance(value, float):
        return math.isnan(value)
    return value is None or (isinstance(value, str) and not value.strip())


def is_text(value: Any) -> bool:
    """Whether a value is a text that files can hold: without surrogates and NUL."""
    try:
        value.encode()
    except (AttributeError, UnicodeEncodeError):
        return False
    return "\0" not in value


def plain_values(values: Sequence[Any], classes: Sequence[str] = ()) -> list[Any]:
    """Values as bool, int, float, str, lists of these, or None for missing ones.

    If all texts of a column are numbers, or "true" and "false", they are converted. With `classes`,
    numbers are the ids of these names (`datasets.ClassLabel`), and -1 becomes None.
    """
    plain: list[Any] = [float(each) if isinstance(each, Decimal) else each for each in values]
    plain = [None if is_missing(value) else value for value in plain]
    plain = [value.strip() if isinstance(value, str) else value for value in plain]
    present = [value for value in plain if value is not None]
    if all(isinstance(value, str) for value in present):
        if all(text.lower() in _TRUTH for text in present):
            plain = [None if value is None else _TRUTH[value.lower()] for value in plain]
        elif all(map(_NUMBER.fullmatch, present)):
            plain = [None if value is None else _number(value) for value in plain]
    return [_class_name(value, classes) for value in plain] if classes else plain


def _number(text: str) -> int | float:
    return float(text) if re.search("[.eE]", text) else int(text)


def _class_name(value: Any, classes: Sequence[str]) -> Any:
    if isinstance(value, list):
        return [_class_name(each, classes) for each in value]
    if isinstance(value, int | float) and not isinstance(value, bool):
        if value == -1:
            return None
        if value in range(len(classes)):
            return classes[int(value)]
    return value


def problem_type(values: Sequence[Any], definition: TaskSettings) -> str:
    """The problem type: the definition's, or else the one that plain values look like.

    Lists mean several labels at once. Numbers mean regression if they have decimals, or if the
    definition's metrics are metrics of regression.
    """
    if definition.problem_type:
        return definition.problem_type
    present = [value for value in values if value is not None]
    if present and all(isinstance(value, list) or _is_list(value) for value in present):
        return MULTI
    is_numeric = all(type(value) in (int, float) for value in present)
    kinds = {kind for name in definition.metrics for kind in METRICS[name].problem_types}
    has_decimals = any(isinstance(value, float) and not value.is_integer() for value in present)
    if is_numeric and not definition.labels and (has_decimals or kinds == {REGRESSION}):
        return REGRESSION
    return SINGLE


def _is_list(value: Any) -> bool:
    return isinstance(value, str) and value.startswith("[") and value.endswith("]")


def items(value: Any) -> list[Any]:
    """The labels in a cell that may hold several: a list, a list as text, "a;b" or "a,b".

    >>> items('["a", "b"]'), items("a; b"), items(3)
    (['a', 'b'], ['a', 'b'], [3])
    """
    if not isinstance(value, str):
        return value if isinstance(value, list) else [] if value is None else [value]
    if _is_list(value):
        for parse in (json.loads, ast.literal_eval):  # JSON's form, then pandas' form
            with suppress(*_NO_LIST):
                parsed = list(parse(value))
                str(parsed)  # raises a ValueError for a number of thousands of digits
                return parsed
    parts = value.split(";" if ";" in value else ",")
    return [part.strip() for part in parts if part.strip()]


def read_labels(
    values: Sequence[Any], classes: Sequence[str], definition: TaskSettings, place: str
) -> Labels:
    """The meaning of a label column, from the plain values of the training rows or of all rows.

    Raises:
        UserError: they are of one class alone, and the definition names no other.
    """
    kind, width = problem_type(values, definition), 0
    if kind == REGRESSION:
        return Labels(kind, (), {})
    if kind == MULTI:
        lists = [items(value) for value in values if value is not None]
        values = [member for each in lists for member in each]
        widths = {len(each) for each in lists}
        if len(widths) == 1 and max(widths) > 1 and all(member in (0, 1) for member in values):
            width = widths.pop()
        values = range(width) if width else plain_values(values, classes)
    different = {value for value in values if isinstance(value, str | int | float)}
    in_order = sorted(different, key=lambda value: (isinstance(value, str), value))
    present = tuple(dict.fromkeys(map(plain_text, in_order)))
    names = tuple(definition.label_names or classes or present)
    if odd := [name for name in names if not is_text(name)]:
        problem = f"the label {odd[0]!r:.60} has a NUL, or half a character (a surrogate)"
        raise UserError(f"{place}: {problem}; write it again, or drop its rows")
    if isinstance(definition.labels, list) and len(names) < min(2, len(present)):
        raise UserError(
            f"{place}: labels has {', '.join(names)}, and the rows have {in_a_line(present)}; list"
            " a name for each"
        )
    if len(names) < (1 if kind == MULTI else 2):
        only = f"{names[0]!r} in every row" if names else "empty in every row"
        raise UserError(
            f"{place}: the label is {only}; list all the labels, such as labels:"
            f" [{in_a_line([*names, 'OTHER'])}], or say columns.label: null"
        )
    if definition.labels and isinstance(definition.labels, dict):
        ids = {value: names.index(name) for value, name in definition.labels.items()}
        ids |= {value.lower(): each for value, each in ids.items() if value.lower() in _TRUTH}
        ids |= {each: ids[str(i)] for i, each in enumerate(classes) if str(i) in ids}
        return Labels(kind, names, ids, width)
    # The values are the names; or classes, ids or truth values, of which the n-th has the n-th
    # name.
    ids_as_text = tuple(map(str, range(len(names))))
    for order in (names, tuple(classes), ids_as_text, tuple(sorted(_TRUTH))):
        if len(order) == len(names) and set(present) <= set(order):
            return Labels(kind, names, {value: label for label, value in enumerate(order)}, width)
    # `encode` refuses the row with another name.
    return Labels(kind, names, {name: label for label, name in enumerate(names)}, width)


def tags(
    values: Sequence[Any], words: Sequence[Sequence[str]], place: str, column: str
) -> list[list[Any]]:
    """The tags of each row's words, as they are in the data.

    Args:
        values: the cells of the column of tags.
        words: each row's words.

    Raises:
        UserError: a row has no list of tags, or not one for each word; says which row.
    """
    lists = []
    for row, (value, own) in enumerate(zip(values, words, strict=True)):
        cell = word_list(value)
        if cell is None:
            problem = f"is {shortened(value, 40)} in row {row}, not a list of tags"
            raise UserError(f"{place}: {column} {problem}; give one for each word")
        if len(cell) != len(own):
            raise UserError(
                f"{place}: row {row} has {len(own)} words and {len(cell)} tags in {column}; give"
                " each word one tag, or drop the row"
            )
        lists.append(cell)
    return lists


def word_list(value: Any) -> list[Any] | None:
    """The list in a cell, which may be written as text; None if the cell holds no list.

    >>> word_list('["a", "b"]'), word_list("['a', 'b']"), word_list("a b")
    (['a', 'b'], ['a', 'b'], None)
    """
    if isinstance(value, str) and _is_list(value):
        with suppress(*_NO_LIST):
            return list(json.loads(value))
        with suppress(*_NO_LIST):
            parsed = ast.literal_eval(value)
            return parsed if str(parsed) == value else None  # NumPy's "['a' 'b']" has no commas
    return value if isinstance(value, list) else None


def encode_tags(
    values: Sequence[Sequence[Any]], labels: Labels, place: str, column: str
) -> list[list[int]]:
    """The ids of each row's tags. UserError names the row of a tag that is none of the labels."""
    encoded = []
    for row, tags in enumerate(values):
        try:
            encoded.append([_id_of(tag, labels) for tag in tags])
        except ValueError as error:
            raise UserError(f"{place}: {column} has another tag in row {row}; {error}") from error
    return encoded


def encode(values: Sequence[Any], labels: Labels, place: str, column: str) -> list[Any]:
    """The class id, number or ascending ids of each row.

    Raises:
        UserError: a row has no label, or another label than those; says which.
    """
    missing = [row for row, value in enumerate(values) if value is None]
    if missing and labels.problem_type != MULTI:
        raise UserError(
            f"{place}: {column} has no value in {len(missing)} of {len(values)} rows, the first is"
            f" row {missing[0]}; fill it in, drop these rows, or say columns.label: null if no row"
            " has labels"
        )
    encode_value = {REGRESSION: _number_of, SINGLE: _id_of, MULTI: _ids_of}[labels.problem_type]
    encoded = []
    for row, value in enumerate(values):
        try:
            encoded.append(encode_value(value, labels))
        except ValueError as error:
            raise UserError(
                f"{place}: {column} is {shortened(value)} in row {row}; {error}"
            ) from error
    return encoded


def _number_of(value: Any, labels: Labels) -> float:
    if isinstance(value, str) and _NUMBER.fullmatch(value.strip()):  # other values are not numbers
        value = float(value)
    # Beyond that a float32 is infinite.
    if isinstance(value, int | float) and abs(value) < 3.4e38:
        return float(value)
    raise ValueError("the labels of a regression are finite numbers; correct it")


def _id_of(value: Any, labels: Labels) -> int:
    text = plain_text(value)
    if isinstance(text, str) and text in labels.ids:
        return labels.ids[text]
    raise ValueError(
        f"the labels are {in_a_line(list(labels.ids))}{hint(str(text), labels.ids)}; list it under"
        " `labels`, say which value has which name (VALUE: NAME), or drop its rows"
    )


def _ids_of(value: Any, labels: Labels) -> list[int]:
    members = items(value)
    if labels.width:
        if len(members) != labels.width or not all(member in (0, 1) for member in members):
            raise ValueError(f"the labels are {labels.width} zeros and ones")
        members = [label for label, is_on in enumerate(members) if is_on]
    return sorted({_id_of(each, labels) for each in members})
