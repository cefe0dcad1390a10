"""Labels as people write them become ids, numbers, or lists of ids."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fmn.errors import UserError
from fmn.rows.label_values import (
    encode,
    plain_values,
    problem_type,
    read_labels,
)
from fmn.tasks.kinds import MULTI, REGRESSION, SINGLE
from fmn.tasks.task import TaskSettings

SIGNS = ("neg", "pos")


def encoded(
    values: list[Any], classes: tuple[str, ...] = (), more: list[Any] | None = None, **fields: Any
) -> tuple[tuple[str, ...], list[Any]]:
    """The names of the labels, and the ids of the rows; those of `more` if there are other rows."""
    definition = TaskSettings(**fields)
    plain = plain_values(values, classes)
    rows = plain if more is None else plain_values(more, classes)
    labels = read_labels(plain, classes, definition, "here")
    return labels.names, encode(rows, labels, "here", "column label")


@pytest.mark.parametrize(
    ("values", "fields", "names", "ids"),
    [
        (["b", "a", " b "], {}, ("a", "b"), [1, 0, 1]),
        ([10, 2, 10], {}, ("2", "10"), [1, 0, 1]),
        ([1.0, 0.0, 1.0], {}, ("0", "1"), [1, 0, 1]),
        (["1.0", "0", "1"], {}, ("0", "1"), [1, 0, 1]),
        ([True, False], {}, ("false", "true"), [1, 0]),
        (["True", "FALSE"], {}, ("false", "true"), [1, 0]),
        (["1", "a", "10"], {}, ("1", "10", "a"), [0, 2, 1]),
        ([0.5, 1.5], {"problem_type": SINGLE}, ("0.5", "1.5"), [0, 1]),
        (["b", "a"], {"labels": ["b", "a", "c"]}, ("b", "a", "c"), [0, 1]),
        ([0, 1], {"labels": ["bad", "good"]}, ("bad", "good"), [0, 1]),
        ([True, False], {"labels": ["no", "yes"]}, ("no", "yes"), [1, 0]),
        (
            [1, 2, 3, 4],
            {"labels": {1: "bad", 2: "bad", 4: "good", 3: "fair"}},
            ("bad", "good", "fair"),
            [0, 0, 2, 1],
        ),
        (["True", "False"], {"labels": {True: "y", False: "n"}}, ("y", "n"), [0, 1]),
        (
            ["[unclosed", "[no list]"],
            {"problem_type": MULTI},
            ("[no list]", "[unclosed"),
            [[1], [0]],
        ),
        ([1, 0, 1], {"classes": SIGNS}, ("neg", "pos"), [1, 0, 1]),
        (["1", "0"], {"classes": SIGNS}, ("neg", "pos"), [1, 0]),
        (["pos", "neg"], {"classes": SIGNS}, ("neg", "pos"), [1, 0]),
        ([1, 0], {"classes": SIGNS, "labels": ["pos", "neg"]}, ("pos", "neg"), [0, 1]),
        ([1, 0], {"classes": SIGNS, "labels": ["bad", "good"]}, ("bad", "good"), [1, 0]),
        (
            [1, 0],
            {"classes": SIGNS, "labels": {"pos": "good", "neg": "bad"}},
            ("good", "bad"),
            [0, 1],
        ),
        ([1, 0], {"classes": SIGNS, "labels": {1: "good", 0: "bad"}}, ("good", "bad"), [0, 1]),
        ([[1], [0, 1], []], {"classes": SIGNS}, ("neg", "pos"), [[1], [0, 1], []]),
        ([["b"], ["a", "b"], []], {}, ("a", "b"), [[1], [0, 1], []]),
        ([[2, 0], [1]], {}, ("0", "1", "2"), [[0, 2], [1]]),
        ([[2, 0], [1]], {"labels": ["x", "y", "z"]}, ("x", "y", "z"), [[0, 2], [1]]),
        ([[0, 1, 1], [0, 0, 0]], {}, ("0", "1", "2"), [[1, 2], []]),
        ([[0, 1], [1.0, 1]], {"labels": ["x", "y"]}, ("x", "y"), [[1], [0, 1]]),
        ([[0, 1], [1, 1]], {"labels": {1: "x", 0: "y"}}, ("x", "y"), [[0], [0, 1]]),
        (['["a"]', '["b", "a"]', "[]"], {}, ("a", "b"), [[0], [0, 1], []]),
        (["['a']", "['b', 'a']"], {}, ("a", "b"), [[0], [0, 1]]),
        (["a, b", "c", ""], {"problem_type": MULTI}, ("a", "b", "c"), [[0, 1], [2], []]),
        (["a;b, c", "d"], {"problem_type": MULTI}, ("a", "b, c", "d"), [[0, 1], [2]]),
        (["a", "a"], {"problem_type": MULTI}, ("a",), [[0], [0]]),
    ],
)
def test_labels_are_names_ids_or_lists_as_people_have_them(
    values: list[Any], fields: Any, names: tuple[str, ...], ids: list[Any]
) -> None:
    assert encoded(values, **fields) == (names, ids)


@pytest.mark.parametrize(
    ("values", "fields", "kind"),
    [
        ([1, 2], {}, SINGLE),
        ([1, 2.5], {}, REGRESSION),
        (["1", "-2.5e-3"], {}, REGRESSION),
        ([1, 2], {"metrics": ["pearson"]}, REGRESSION),
        ([0.5, 1], {"labels": {0.5: "low", 1: "high"}}, SINGLE),
        ([["a"], []], {}, MULTI),
        (["1e999", "2"], {}, REGRESSION),
        ([10**400, 1], {}, SINGLE),
        (["9" * 5000, "1"], {}, SINGLE),
    ],
)
def test_the_kind_of_problem_is_inferred(values: list[Any], fields: Any, kind: str) -> None:
    assert problem_type(plain_values(values), TaskSettings(**fields)) == kind


def test_the_labels_of_a_regression_are_any_finite_numbers() -> None:
    fields: dict[str, Any] = {"problem_type": REGRESSION}
    assert encoded(["-1", "1000", "0.5"], **fields) == ((), [-1.0, 1000.0, 0.5])
    for value in ("good", float("inf"), 1e39, 10**400, [1]):
        with pytest.raises(UserError, match="in row 1; the labels of a regression are finite"):
            encoded([1.0, value], **fields)


@pytest.mark.parametrize(
    ("values", "fields", "message"),
    [
        (["a", None, "b", ""], {}, "no value in 2 of 4 rows, the first is row 1"),
        ([1.5, float("nan")], {}, "no value in 1 of 2 rows, the first is row 1"),
        (["a", "a"], {}, r"the label is 'a' in every row; .* labels: \[a, OTHER\]"),
        (["good", "god"], {"labels": ["good", "bad"]}, "'god' in row 1; .*did you mean 'good'"),
        ([1, 3], {"labels": {1: "x", 2: "y"}}, "is 3 in row 1; the labels are 1, 2"),
        ([1, 2], {"labels": ["x", "y"]}, r"is 1 in row 0; the labels are x, y; .* \(VALUE: NAME\)"),
        ([[0, 2], [1]], {"labels": ["x", "y"]}, "in row 0; the labels are x, y"),
        ([["a"], ["a", None]], {}, "in row 1"),
    ],
)
def test_a_wrong_label_is_told_with_its_row(values: list[Any], fields: Any, message: str) -> None:
    with pytest.raises(UserError, match=message) as refusal:
        encoded(values, **fields)
    assert "\n" not in str(refusal.value)


def test_other_rows_have_the_training_rows_labels() -> None:
    assert encoded(["1", "2"], more=["2.0", "1"])[1] == [1, 0]
    assert encoded(["a", "b"], more=["a", "a"])[1] == [0, 0]
    with pytest.raises(UserError, match="here: column label is 'c' in row 1; the labels are a, b;"):
        encoded(["a", "b"], more=["b", "c"])
    with pytest.raises(UserError, match="3 zeros and ones"):
        encoded([[0, 1, 1], [1, 1, 1]], more=[[0, 1]])
    with pytest.raises(UserError, match="no value in 1 of 1 rows"):  # as in the Hub's test splits
        encoded([0, 1], ("neg", "pos"), more=[-1])


names = st.lists(
    st.text("abc xyz", min_size=1).map(str.strip).filter(bool), min_size=2, unique=True
)


@given(names, st.data())
def test_names_in_any_order_and_their_ids_say_the_same(names: list[str], data: Any) -> None:
    rows = data.draw(st.lists(st.sampled_from(names), min_size=1)) + names
    order = data.draw(st.permutations(names))
    assert encoded(rows)[0] == tuple(sorted(names))
    in_order, ids = encoded(rows, labels=order)
    assert [in_order[each] for each in ids] == rows
    numbers = [order.index(row) for row in rows]
    assert encoded(numbers, labels=order) == (in_order, ids) == encoded(numbers, tuple(order))
    mapping = {str(label): name for label, name in enumerate(order)}
    assert encoded(numbers, labels=mapping) == (in_order, ids)


@given(st.lists(st.sets(st.integers(0, 4)), min_size=3))
def test_sets_of_labels_come_back_however_they_are_written(sets: list[set[int]]) -> None:
    rows = [sorted(each) for each in [*sets, {0, 1, 2, 3, 4}]]
    letters = [["abcde"[label] for label in row] for row in rows]
    hot = [[int(label in row) for label in range(5)] for row in rows]
    settings: dict[str, Any] = {"problem_type": MULTI, "labels": list("abcde")}
    for values in (
        rows,
        letters,
        hot,
        [", ".join(row) for row in letters],
        list(map(str, letters)),
    ):
        assert encoded(values, **settings) == (tuple("abcde"), rows)
