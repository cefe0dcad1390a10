"""From a definition and files to checked rows."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fmn.errors import UserError
from fmn.rows.prepare import Prepared, prepare
from fmn.rows.sources import find_files
from fmn.tasks.rows import check_rows
from fmn.tasks.task import TaskSettings

ROW = {"text": "a", "label": "x"}


def write(folder: Path, **splits: list[dict[str, Any]]) -> None:
    for split, rows in splits.items():
        (folder / f"{split}.json").write_text(json.dumps(rows))


def prepared(folder: Path, **fields: Any) -> Prepared:
    dataset = {"path": str(folder), **fields.pop("dataset", {})}
    definition = TaskSettings.model_validate({"dataset": dataset, **fields})
    assert definition.dataset
    result = prepare("mine", definition, find_files(definition.dataset), str(folder))
    for split, table in result.tables.items():  # what is written can be read
        assert check_rows(table, result.task, split) == table
    return result


def rows_of(*labels: Any) -> list[dict[str, Any]]:
    return [{"text": f"text {row}", "label": label} for row, label in enumerate(labels)]


def test_rows_keep_their_order_and_a_definition_without_gaps(tmp_path: Path) -> None:
    write(
        tmp_path,
        train=[{"a": "x", "b": "y", "label": "no"}, {"a": "z", "b": "", "label": "yes"}],
        dev=[{"a": "u", "b": "v", "label": "yes"}],
        test=[{"a": "s", "b": "t", "label": None}],
    )
    columns = {"text": "a", "text_pair": "b"}
    result = prepared(tmp_path, columns=columns, max_length=7, threshold=0.3, metrics=["f1"])
    assert {split: table.to_pydict() for split, table in result.tables.items()} == {
        "train": {"a": ["x", "z"], "b": ["y", ""], "label": [0, 1], "idx": [0, 1]},
        "dev": {"a": ["u"], "b": ["v"], "label": [1], "idx": [0]},
    }
    task = result.task
    assert (task.text_columns, task.labels, task.validation) == (
        ("a", "b"),
        ("no", "yes"),
        ("dev",),
    )
    assert (task.max_length, task.threshold, task.metrics) == (7, 0.3, ("f1",))
    assert result.notes[1] == f"dev: 1 rows of {tmp_path}/dev.json"
    assert "train: 1 of 2 rows have an empty text" in result.warnings
    assert "dev: there is one row alone" in result.warnings


def test_text_columns_with_the_names_of_the_rows_own_columns_are_renamed(tmp_path: Path) -> None:
    write(
        tmp_path, train=[{"label": "a", "text": "b", "y": 0}, {"label": "c", "text": "d", "y": 1}]
    )
    columns = {"text": "label", "text_pair": "text", "label": "y"}
    table = prepared(tmp_path, columns=columns, dataset={"validation_size": 1}).tables
    both = table["train"].to_pylist() + table["validation"].to_pylist()
    assert sorted(both, key=lambda row: int(row["idx"])) == [
        {"text": "a", "text_pair": "b", "label": 0, "idx": 0},
        {"text": "c", "text_pair": "d", "label": 1, "idx": 1},
    ]


@pytest.mark.parametrize("fields", [{}, {"columns": {"label": None}}, {"labels": ["x", "y"]}])
def test_rows_without_labels(tmp_path: Path, fields: Any) -> None:
    write(tmp_path, train=[{"text": "a"}, {"text": "b"}])
    result = prepared(tmp_path, **fields)
    task = result.task
    assert (task.has_labels, task.metrics, task.validation) == (False, (), ())
    assert task.labels == tuple(fields.get("labels", ()))
    assert result.tables["train"].column_names == ["text", "idx"]
    is_told = any(note.startswith("no labels: there is no column label") for note in result.notes)
    assert is_told == ("columns" not in fields)
    split_off = prepared(tmp_path, dataset={"validation_size": 0.5}, **fields)
    assert split_off.task.validation == ("validation",)


@pytest.mark.parametrize(
    ("fields", "column"),
    [
        ({"columns": {"label": "stars"}}, "stars"),
        ({"metrics": ["accuracy"]}, "label"),
        ({"columns": {"text": "body"}}, "body"),
    ],
)
def test_a_column_that_is_named_or_needed_must_be_there(
    tmp_path: Path, fields: Any, column: str
) -> None:
    write(tmp_path, train=[{"text": "a"}, {"text": "b"}])
    with pytest.raises(UserError, match=f"no column {column} for mine; there are text"):
        prepared(tmp_path, **fields)


@given(
    counts=st.lists(st.integers(1, 30), min_size=2, max_size=6),
    share=st.floats(0.05, 0.5),
    seed=st.integers(0, 3),
)
@settings(max_examples=30)
def test_validation_is_split_off_by_class(
    tmp_path_factory: pytest.TempPathFactory, counts: list[int], share: float, seed: int
) -> None:
    folder = tmp_path_factory.mktemp("rows")
    labels = [f"class {label}" for label, count in enumerate(counts) for _ in range(count)]
    np.random.default_rng(seed).shuffle(labels)
    write(folder, rows=rows_of(*labels))
    dataset = {"validation_size": share, "seed": seed}
    size = max(1, round(share * len(labels)))
    tables = prepared(folder, dataset=dataset).tables
    train, validation = tables["train"], tables["validation"]
    assert validation.num_rows == size
    both = train["idx"].to_pylist(), validation["idx"].to_pylist()
    assert sorted(both[0] + both[1]) == list(range(len(labels)))
    assert all(rows == sorted(rows) for rows in both), "in the order of the file"
    remaining = Counter(train["label"].to_pylist())
    if len(labels) - size >= len(counts):
        assert len(remaining) == len(counts), "every class is in training"
    for label, count in enumerate(counts):
        assert abs(count - remaining[label] - share * count) <= 2 + share * len(counts)
    assert tables == prepared(folder, dataset=dataset).tables


def test_how_many_rows_are_split_off(tmp_path: Path) -> None:
    write(tmp_path, rows=rows_of(*[0.5, 1.5, 2.0] * 10))
    for fields, count in (({"validation_size": 0.2}, 6), ({"validation_size": 7}, 7), ({}, 3)):
        result = prepared(tmp_path, dataset=fields)
        assert result.tables["validation"].num_rows == count
        assert "split off" in result.notes[1]
        other = prepared(tmp_path, dataset={"seed": 1, **fields})
        assert other.tables["validation"] != result.tables["validation"]
    with pytest.raises(UserError, match="validation_size 30 of 30 rows is 30, and at most 29"):
        prepared(tmp_path, dataset={"validation_size": 30})


def test_several_validation_splits_or_validation_alone(tmp_path: Path) -> None:
    write(tmp_path, train=rows_of("x", "y"), dev=rows_of("y"), test=rows_of("x", "x"))
    splits = {"splits": {"validation": ["test", "dev"]}}
    result = prepared(tmp_path, dataset=splits)
    assert result.task.validation == ("test", "dev")
    assert list(result.tables) == ["train", "test", "dev"]
    assert "test: every row has the same label x" in result.warnings
    alone = prepared(tmp_path, dataset={"splits": {"train": None, "validation": ["test", "dev"]}})
    assert list(alone.tables) == ["test", "dev"]
    assert alone.task.labels == ("x", "y")
    only = {"splits": {"train": None}}
    assert list(prepared(tmp_path / "train.json", dataset=only).tables) == ["validation"]


def test_what_is_odd_is_a_warning(tmp_path: Path) -> None:
    train = [*rows_of("x", "y", "z"), {"text": " ", "label": "x"}]
    write(tmp_path, train=train, validation=rows_of("x", "x"))
    assert prepared(tmp_path).warnings == [
        "train: 1 of 4 rows have an empty text",
        "validation: every row has the same label x",
        "validation: 2 of 2 texts are also in training",
    ]
    write(tmp_path, train=rows_of("x", "y"), validation=rows_of("z", "x"))
    labels = ["x", "y", "z"]
    assert "train: no row has the label z" in prepared(tmp_path, labels=labels).warnings
    with pytest.raises(
        UserError, match=r"validation\.json: column label is 'z' in row 0; the labels"
    ):
        prepared(tmp_path)
    write(tmp_path, train=rows_of(1.5), validation=rows_of(2, 2))
    assert prepared(tmp_path).warnings[-2:] == [
        "validation: every row has the same label",
        "validation: 1 of 2 texts are also in training",
    ]
    (tmp_path / "validation.json").unlink()
    assert "no model can be scored" in prepared(tmp_path).warnings[-1]
    write(tmp_path, train=rows_of(*range(100)))
    assert "there are 100 labels" in prepared(tmp_path).warnings[-1]


@pytest.mark.parametrize(
    ("rows", "fields", "message"),
    [
        ([], {}, "there are no rows"),
        ([ROW, {"text": None, "label": "y"}], {}, "is null in row 1, not a text .* drop the row"),
        ([ROW, *[{"text": 5, "label": "y"}] * 2], {}, r"is 5 in row 1, not a text \(2 of 3"),
        ([ROW, {"text": "a\0b", "label": "y"}], {}, r"column text is .a.x00b. in row 1"),
        ([ROW, {"text": "\ud800", "label": "y"}], {}, r"is .\\ud800. in row 1"),
        ([*rows_of("x", "y"), {"text": "b"}], {}, "no value in 1 of 3 rows, the first is row 2"),
        ([ROW, {"text": "b", "label": "y"}], {"metrics": ["pearson"]}, "pearson is not for single"),
        ([*rows_of(*"xyz")], {"metrics": ["f1"]}, "f1 is of class 1 of two classes"),
    ],
)  # fmt: skip
def test_rows_that_cannot_be_used_are_refused(
    tmp_path: Path, rows: list[Any], fields: Any, message: str
) -> None:
    write(tmp_path, train=rows, validation=[ROW])
    with pytest.raises(UserError, match=message) as refusal:
        prepared(tmp_path, **fields)
    assert "\n" not in str(refusal.value)


def test_generated_texts_have_prompts_where_the_rows_have_and_no_labels(tmp_path: Path) -> None:
    rows = [{"prompt": "", "completion": f"b {row}"} for row in range(20)]
    write(tmp_path, train=rows)
    result = prepared(tmp_path, columns={"completion": "completion"})
    task = result.task
    assert (task.task, task.loss, task.metrics) == ("text-generation", "tokens", ("perplexity",))
    assert task.input_columns == {"prompt": "prompt", "completion": "completion"}
    assert {split: table.num_rows for split, table in result.tables.items()} == {
        "train": 18,
        "validation": 2,
    }
    assert not any("label" in warning or "empty" in warning for warning in result.warnings)
    plain = [{"label": f"b {row}"} for row in range(20)]  # a name of the rows' own columns
    write(tmp_path, train=plain)
    result = prepared(tmp_path, columns={"completion": "label"})
    assert result.task.input_columns == {"completion": "completion"}
    assert any("no prompts" in note for note in result.notes)
    with pytest.raises(UserError, match="no column prompt"):
        prepared(tmp_path, task="text2text-generation", columns={"completion": "label"})
    with pytest.raises(UserError, match="no column own"):
        prepared(tmp_path, columns={"completion": "label", "prompt": "own"})


HELLO = {"role": "user", "content": "hello"}
ANSWER = {"role": "assistant", "content": "bye"}


def test_messages_are_prompts_and_their_last_answers(tmp_path: Path) -> None:
    rows = [{"id": n, "messages": [HELLO, ANSWER, {**HELLO, "name": None}, ANSWER]} for n in "ab"]
    write(tmp_path, train=rows, validation=rows[:1])
    result = prepared(tmp_path, task="text-generation")
    assert result.task.chat
    row = result.tables["train"].to_pylist()[0]
    assert json.loads(row["prompt"]) == [HELLO, ANSWER, HELLO]
    assert row["completion"] == "bye"


@pytest.mark.parametrize(
    ("messages", "kind", "message"),
    [
        ([HELLO], "text-generation", "in row 1, not two or more messages"),
        ([ANSWER], "text-generation", "in row 1"),
        ([HELLO, ANSWER, HELLO], "text-generation", "the last of the role assistant; write it so"),
        ([HELLO, {**ANSWER, "tool_calls": [{"name": "f"}]}], "text-generation", "in row 1"),
        ([{**HELLO, "content": [{"type": "text"}]}, ANSWER], "text-generation", "in row 1"),
        ("hello", "text-generation", "column messages is 'hello' in row 1"),
        (None, "text-generation", "in row 1"),
        ([HELLO, ANSWER], "text2text-generation", "not read for text2text-generation; write the"),
    ],
)
def test_other_messages_are_refused_with_what_to_do(
    messages: Any, kind: str, message: str, tmp_path: Path
) -> None:
    write(tmp_path, train=[{"messages": [HELLO, ANSWER]}, {"messages": messages}])
    with pytest.raises(UserError, match=message):
        prepared(tmp_path, task=kind)
