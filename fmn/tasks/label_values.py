"""From the values of a label column to class ids, numbers, or lists of ids."""

import ast
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from decimal import Decimal
from typing import Any, NamedTuple

from fmn.errors import UserError, hint
from fmn.tasks.task import METRICS, MULTI, REGRESSION, SINGLE, TaskSettings, plain_text

_NUMBER = re.compile(r"[+-]?(\d{1,18}(\.\d*)?|\.\d+)([eE][+-]?\d{1,3})?")
_TRUTH = {"true": True, "false": False}
_SHOWN = 12  # labels that a message lists


class Labels(NamedTuple):
    """What the values of a label column mean.

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


def plain_values(values: Sequence[Any], classes: Sequence[str] = ()) -> list[Any]:
    """Values as truth values, numbers, texts, lists of them, or None where there is none.

    A column of texts that are all numbers, or all "true" and "false", holds these. With `classes`,
    numbers are the ids of these names (`datasets.ClassLabel`), and -1 is none.
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
    """The kind of problem that plain values are of, unless the definition says it.

    Lists are of several labels, numbers with decimals are of a regression; so are numbers of which
    the definition asks for a regression's metrics.
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
    """The labels of a cell that may hold several: a list, a list as text, or a,b or a;b.

    >>> items('["a", "b"]'), items("a; b"), items(3)
    (['a', 'b'], ['a', 'b'], [3])
    """
    if isinstance(value, list):
        return value
    if value is None:
        return []
    if not isinstance(value, str):
        return [value]
    if _is_list(value):
        for parse in (json.loads, ast.literal_eval):
            try:
                content = parse(value)
            except (ValueError, SyntaxError, RecursionError):
                continue
            return list(content)
    separator = ";" if ";" in value else ","
    parts = [item.strip() for item in value.split(separator) if item.strip()]
    return [int(part) for part in parts] if set(parts) <= {"0", "1"} else parts


def read_labels(
    values: Sequence[Any], classes: Sequence[str], definition: TaskSettings, place: str
) -> Labels:
    """What the plain values of the training rows, or of all rows, say of the labels.

    Raises:
        UserError: the definition's labels do not fit them, or they are of one class alone.
    """
    kind = problem_type(values, definition)
    if kind == REGRESSION:
        return Labels(kind, (), {})
    width = 0
    if kind == MULTI:
        lists = [items(value) for value in values if value is not None]
        width = _multi_hot_width(lists)
        values = (
            range(width) if width else plain_values([x for each in lists for x in each], classes)
        )
    present = _in_order(
        {value for value in values if isinstance(value, str | int | float)}, classes
    )
    if isinstance(definition.labels, dict):
        names = tuple(definition.label_names)
        named = {value: names.index(name) for value, name in definition.labels.items()}
        named |= {value.lower(): each for value, each in named.items() if value.lower() in _TRUTH}
        by_class = {each: named[str(i)] for i, each in enumerate(classes) if str(i) in named}
        ids: Mapping[str, int] = by_class | named
    elif definition.labels:
        names = tuple(definition.labels)
        ids = _ids_of_list(names, values, present, classes, place)
    else:
        names = tuple(classes) or present
        ids = {name: label for label, name in enumerate(names)}
    if len(names) < (1 if kind == MULTI else 2):
        only = f"{names[0]!r} in every row" if names else "nowhere told"
        raise UserError(
            f"{place}: the label is {only}; list all the labels, such as labels:"
            f" [{', '.join([*names, 'OTHER'])}], or say columns.label: null"
        )
    return Labels(kind, names, ids, width)


def _multi_hot_width(lists: Sequence[Sequence[Any]]) -> int:
    """The length of lists that are all of zeros and ones, one for each label; 0 for other lists."""
    lengths = {len(each) for each in lists}
    is_binary = all(_is_binary(value) for each in lists for value in each)
    width = lengths.pop() if len(lengths) == 1 and is_binary else 0
    return width if width > 1 else 0


def _is_binary(value: Any) -> bool:
    return isinstance(value, int | float) and value in (0, 1)


def _in_order(values: Iterable[Any], classes: Sequence[str]) -> tuple[str, ...]:
    """Different values as text: in the order of the classes, numbers by size, texts by letter."""
    present = set(values)
    if classes:
        return tuple(name for name in classes if name in present)
    numbers = sorted(value for value in present if not isinstance(value, str))
    texts = sorted(value for value in present if isinstance(value, str))
    return tuple(dict.fromkeys(map(plain_text, [*numbers, *texts])))


def _ids_of_list(
    names: Sequence[str],
    values: Iterable[Any],
    present: Sequence[str],
    classes: Sequence[str],
    place: str,
) -> dict[str, int]:
    """The ids of values, where the definition lists the names in the order of ids.

    The values are these names; or numbers, truth values or classes, of which the n-th has the n-th
    name.
    """
    by_name = {name: label for label, name in enumerate(names)}
    if set(present) <= set(names):
        return by_name
    if classes:
        numbered = list(classes)
    elif all(isinstance(value, bool) for value in values):
        numbered = ["false", "true"]
    elif all(isinstance(value, int | float) for value in values):
        numbered = [str(label) for label in range(len(names))]
    else:
        return by_name  # the row with another name is refused
    if len(numbered) == len(names) and set(present) <= set(numbered):
        return {value: label for label, value in enumerate(numbered)}
    shown = _shown(present)
    example = ", ".join(f"{value}: NAME" for value in present[:2])
    raise UserError(
        f"{place}: the values {shown} are not the {len(names)} labels {_shown(names)}, nor their"
        f" ids from 0; say which is which, labels: {{{example}, ...}}"
    )


def refuse_missing(values: Sequence[Any], place: str, column: str) -> None:
    """Raise UserError if a row has no label; says how many and which is the first."""
    missing = [row for row, value in enumerate(values) if value is None]
    if missing:
        raise UserError(
            f"{place}: {column} has no value in {len(missing)} of {len(values)} rows, the first is"
            f" row {missing[0]}; fill it in, drop these rows, or say columns.label: null if no row"
            " has labels"
        )


def encode(values: Sequence[Any], labels: Labels, place: str, column: str) -> list[Any]:
    """The class id, number or ascending ids of each row.

    Raises:
        UserError: a row has another label than those; says which.
    """
    encode_value = {REGRESSION: _number_of, SINGLE: _id_of, MULTI: _ids_of}[labels.problem_type]
    encoded = []
    for row, value in enumerate(values):
        try:
            encoded.append(encode_value(value, labels))
        except ValueError as error:
            raise UserError(f"{place}: {column} is {value!r:.60} in row {row}; {error}") from error
    return encoded


def _number_of(value: Any, labels: Labels) -> float:
    # Beyond that a float32 is infinite.
    if isinstance(value, int | float) and abs(value) < 3.4e38:
        return float(value)
    raise ValueError("the labels of a regression are finite numbers")


def _id_of(value: Any, labels: Labels) -> int:
    text = plain_text(value)
    if isinstance(text, str) and text in labels.ids:
        return labels.ids[text]
    known = _shown(list(labels.ids))
    near = hint(str(text), labels.ids)
    raise ValueError(f"the labels are {known}{near}; list it under `labels`, or drop its rows")


def _ids_of(value: Any, labels: Labels) -> list[int]:
    members = items(value)
    if labels.width:
        if len(members) != labels.width or not all(map(_is_binary, members)):
            raise ValueError(f"the labels are {labels.width} zeros and ones")
        members = [label for label, is_on in enumerate(members) if is_on]
    return sorted({_id_of(each, labels) for each in members})


def _shown(names: Sequence[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (", ..." if len(names) > _SHOWN else "")
