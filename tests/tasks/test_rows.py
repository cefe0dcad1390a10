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


def topics() -> Task:
    return Task(
        name="topics",
        problem_type="multi_label_classification",
        columns=Columns(text="sentence1"),
        labels=("x", "y"),
    )


MRPC, STSB = get_task("mrpc"), get_task("stsb")


@pytest.mark.parametrize(
    ("task", "changed", "message"),
    [
        (MRPC, {"sentence2": None}, "no column sentence2; mrpc needs sentence1, sentence2, label"),
        (MRPC, {"sentence1": [1, 2]}, "column sentence1 is of type int64; it must hold text"),
        (MRPC, {"sentence1": [["a"], ["b"]]}, "not rows of mrpc"),
        (MRPC, {"sentence2": ["a", None]}, "column sentence2 has no value in row 1"),
        (MRPC, {"label": ["no", "yes"]}, r"is of type string; it must hold the ids 0 \(not_equiv"),
        (MRPC, {"label": [0.0, 1.0]}, "is of type double"),
        (MRPC, {"label": [0, 2]}, r"is 2 in row 1; .* are the ids 0 \(not_equivalent\), 1 \(equi"),
        (MRPC, {"label": [-1, -1]}, "-1 in every row, as in GLUE's test splits"),
        (MRPC, {"idx": ["a", "b"]}, "not rows of mrpc"),
        (MRPC, {"sentence1": [], "sentence2": [], "label": [], "idx": []}, "no rows"),
        (STSB, {"label": [1.0, np.nan]}, "finite numbers"),
        (STSB, {"label": [1.0, np.inf]}, "finite numbers"),
        (topics(), {}, r"of type int64; it must hold lists of the ids 0 \(x\), 1 \(y\)"),
        (topics(), {"label": [["x"], []]}, "it must hold the ids 0"),
        (topics(), {"label": [[], [0, 2]]}, "is 2 in row 1; the labels of topics are the ids"),
        (topics(), {"label": [[0], None]}, "no value in row 1"),
    ],
)
def test_rows_of_something_else_are_refused_with_their_place(
    task: Task, changed: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=rf"^here: .*{message}") as refusal:
        check_rows(pa.table(mrpc_columns(**changed)), task, "here")
    assert "\n" not in str(refusal.value)


def test_texts_that_are_not_utf_8_are_refused() -> None:
    offsets = pa.array([0, 2, 4], pa.int32()).buffers()[1]
    texts = pa.Array.from_buffers(pa.string(), 2, [None, offsets, pa.py_buffer(b"ok\xff\xfe")])
    with pytest.raises(UserError, match=r"^here: .*UTF8"):
        check_rows(pa.table({"sentence": texts, "label": [0, 1]}), get_task("sst2"), "here")


def test_rows_are_read_in_the_schema_of_any_task() -> None:
    rows = check_rows(pa.table(mrpc_columns(label=[5, 0])), STSB, "here")
    assert rows["label"].to_pylist() == [5.0, 0.0]
    columns = Columns(text="sentence1", label="stars")  # a column of another name becomes label
    task = MRPC.model_copy(update={"columns": columns})
    stars = check_rows(pa.table(mrpc_columns(label=None, stars=[1, 0])), task, "here")
    assert stars.to_pydict() == mrpc_columns(sentence2=None, label=[1, 0])
    several: list[Any] = [[[0, 1], []], [[], []]]
    for labels in several:
        for kind in (pa.list_(pa.int64()), pa.large_list(pa.int8())):
            table = pa.table(mrpc_columns(label=pa.array(labels, kind)))
            lists = check_rows(table, topics(), "here")
            assert (lists.schema, lists["label"].to_pylist()) == (schema(topics()), labels)
    plain = Task(name="plain", columns=Columns(text="sentence1", label=None))
    texts = check_rows(pa.table(mrpc_columns()), plain, "here")
    assert texts.to_pydict() == mrpc_columns(sentence2=None, label=None)


def test_without_labels_the_texts_alone_are_checked() -> None:
    for label in (None, [-7, -7]):
        table = pa.table(mrpc_columns(label=label))
        texts = check_rows(table, MRPC, "here", labelled=False)
        assert texts.to_pydict() == mrpc_columns(label=None, idx=None)
    table = pa.table(mrpc_columns(sentence2=None))
    with pytest.raises(UserError, match="mrpc needs sentence1, sentence2 and here are"):
        check_rows(table, MRPC, "here", labelled=False)
