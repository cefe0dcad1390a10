"""The check of a task's rows."""

from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from fmn.errors import UserError
from fmn.tasks.rows import check_rows, schema
from fmn.tasks.task import Columns, Task, get_task
from tests.tasks.rows import mrpc_columns


def test_other_columns_are_left_out_and_types_become_those_of_the_schema() -> None:
    columns = mrpc_columns(
        sentence1=pa.array(["a", "b"], pa.large_string()),
        sentence2=pa.array(["c", "d"]).dictionary_encode(),
        label=pa.array([1, 0], pa.int8()),
        idx=None,
        genre=["x", "y"],
    )
    rows = check_rows(pa.table(columns), get_task("mrpc"), "here")
    assert rows.schema == schema(get_task("mrpc"))
    assert rows.to_pydict() == mrpc_columns(label=[1, 0], idx=[0, 1])


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (
            {"sentence2": None},
            "no column sentence2; mrpc needs sentence1, sentence2, label and here",
        ),
        ({"sentence1": [1, 2]}, "column sentence1 is of type int64; it must hold text"),
        ({"sentence1": [["a"], ["b"]]}, "not rows of mrpc"),
        ({"sentence2": ["a", None]}, "column sentence2 has no value in row 1"),
        ({"label": ["no", "yes"]}, r"is of type string; it must hold the ids 0 \(not_equivalent\)"),
        ({"label": [0.0, 1.0]}, "is of type double"),
        ({"label": [0, 2]}, r"label is 2 in row 1; .* are the ids 0 \(not_equivalent\), 1 \(equi"),
        ({"label": [-1, -1]}, "-1 in every row, as in GLUE's test splits"),
        ({"idx": ["a", "b"]}, "not rows of mrpc"),
        ({"sentence1": [], "sentence2": [], "label": [], "idx": []}, "no rows"),
    ],
)
def test_rows_of_something_else_are_refused_with_their_place(
    changed: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=rf"^here: .*{message}") as refusal:
        check_rows(pa.table(mrpc_columns(**changed)), get_task("mrpc"), "here")
    assert "\n" not in str(refusal.value)


def test_texts_that_are_not_utf_8_are_refused() -> None:
    offsets = pa.array([0, 2, 4], pa.int32()).buffers()[1]
    texts = pa.Array.from_buffers(pa.string(), 2, [None, offsets, pa.py_buffer(b"ok\xff\xfe")])
    with pytest.raises(UserError, match=r"^here: .*UTF8"):
        check_rows(pa.table({"sentence": texts, "label": [0, 1]}), get_task("sst2"), "here")


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_the_labels_of_a_regression_task_are_finite_numbers(value: float) -> None:
    stsb = get_task("stsb")
    with pytest.raises(UserError, match="finite numbers"):
        check_rows(pa.table(mrpc_columns(label=[1.0, value])), stsb, "here")
    rows = check_rows(pa.table(mrpc_columns(label=[5, 0])), stsb, "here")
    assert rows["label"].to_pylist() == [5.0, 0.0]


def test_a_label_column_of_another_name_becomes_label() -> None:
    task = get_task("sst2")
    columns = task.columns.model_copy(update={"text": "review", "label": "stars"})
    task = task.model_copy(update={"columns": columns})
    rows = check_rows(pa.table({"review": ["good"], "stars": [1]}), task, "here")
    assert rows.to_pydict() == {"review": ["good"], "label": [1], "idx": [0]}


def topics() -> Task:
    return Task(
        name="topics",
        problem_type="multi_label_classification",
        columns=Columns(text="text"),
        labels=("x", "y"),
    )


def test_rows_of_several_labels_hold_lists_of_ids() -> None:
    labels = [[0, 1], [], [1]]
    for kind in (pa.list_(pa.int64()), pa.large_list(pa.int8())):
        table = pa.table({"text": ["a", "b", "c"], "label": pa.array(labels, kind)})
        rows = check_rows(table, topics(), "here")
        assert rows.schema == schema(topics())
        assert rows["label"].to_pylist() == labels
    none = pa.table({"text": ["a"], "label": [[]]})
    assert check_rows(none, topics(), "here")["label"].to_pylist() == [[]]


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([0, 1], r"of type int64; it must hold lists of the ids 0 \(x\), 1 \(y\)"),
        ([["x"], []], "it must hold the ids 0"),
        ([[], [0, 2]], "label is 2 in row 1; the labels of topics are the ids"),
        ([[0], None], "no value in row 1"),
    ],
)
def test_lists_of_something_else_are_refused(labels: Any, message: str) -> None:
    with pytest.raises(UserError, match=f"^here: column .*{message}"):
        check_rows(pa.table({"text": ["a", "b"], "label": labels}), topics(), "here")


def test_rows_of_a_task_without_labels_have_no_column_for_them() -> None:
    task = Task(name="plain", columns=Columns(text="text", label=None))
    assert check_rows(pa.table({"text": ["a"], "label": [7]}), task, "here").to_pydict() == {
        "text": ["a"],
        "idx": [0],
    }
    assert schema(task).names == ["text", "idx"]


def test_without_labels_the_texts_alone_are_checked() -> None:
    for label in (None, [-7, -7]):
        table = pa.table(mrpc_columns(label=label))
        texts = check_rows(table, get_task("mrpc"), "here", labelled=False)
        assert texts.to_pydict() == mrpc_columns(label=None, idx=None)
    table = pa.table(mrpc_columns(sentence2=None))
    with pytest.raises(UserError, match="mrpc needs sentence1, sentence2 and here are"):
        check_rows(table, get_task("mrpc"), "here", labelled=False)
