"""What is in a file comes back, in every format."""

import gzip
import json
from pathlib import Path
from typing import Any

import datasets
import fsspec
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fmn.errors import UserError
from fmn.rows.formats import Table, read_files
from fmn.rows.sources import find_files
from fmn.tasks.task import DatasetSettings

ODD = [
    "plain",
    'say "no"',
    "a\nb",
    "a, b; c\td",
    "NA",
    "null",
    "😀 ünï \u202e",
    " blanks ",
    "007",
    "",
]
SUFFIXES = (".csv", ".tsv", ".json", ".jsonl", ".parquet", ".csv.gz", ".jsonl.gz")


def write(path: Path, texts: list[str]) -> None:
    """Write a column `text` as pandas does, in the format of the file's name."""
    frame = pd.DataFrame({"text": texts, "row": range(len(texts))})
    if ".csv" in path.name or ".tsv" in path.name:
        frame.to_csv(path, index=False, sep="\t" if ".tsv" in path.name else ",")
    elif ".parquet" in path.name:
        frame.to_parquet(path)
    else:
        frame.to_json(path, orient="records", lines=".jsonl" in path.name)


def read(path: object, **rows: Any) -> Table:
    files = find_files(DatasetSettings(path=str(path), **rows))
    return read_files(files["train"])


texts = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0\r"))


@given(st.lists(texts, min_size=1, max_size=5), st.sampled_from(SUFFIXES))
@settings(max_examples=40)
def test_any_text_comes_back(
    tmp_path_factory: pytest.TempPathFactory, rows: list[str], suffix: str
) -> None:
    if suffix == ".tsv":  # a text that is a line break and a tab is torn from its quotes
        rows = [text.replace("\t", " ") for text in rows]
    for column in (rows, ODD):
        path = tmp_path_factory.mktemp("rows") / f"rows{suffix}"
        write(path, column)
        table = read(path)
        assert table.values("text", "t") == column
        assert [int(row) for row in table.values("row", "t")] == list(range(len(column)))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("bom.csv", "\ufeff text , label\r\n\"a, b\",1\r\nc,2\r\n"),
        ("semicolons.csv", "text;label\na, b;1\nc;2\n"),
        ("tabs.csv", "text\tlabel\na, b\t1\nc\t2\n"),
        ("unquoted.tsv", "text\tlabel\na, b\t1\nc\t2"),
        ("bom.json", '\ufeff[{"text": "a, b", "label": 1}, {"text": "c", "label": 2}]'),
        ("data.json", '{"data": [{"text": "a, b", "label": 1},\n {"text": "c", "label": 2}]}'),
        ("lines.json", '{"text": "a, b", "label": 1}\n\n{"text": "c", "label": 2}\n'),
        ("lines.jsonl", '{"text": "a, b", "label": 1}\r\n{"text": "c", "label": 2}'),
    ],
)  # fmt: skip
def test_files_are_as_people_have_them(tmp_path: Path, name: str, content: str) -> None:
    (tmp_path / name).write_bytes(content.encode())
    table = read(tmp_path / name)
    assert table.values("text", "t") == ["a, b", "c"]
    assert list(map(str, table.values("label", "t"))) == ["1", "2"]


def test_quotes_that_are_not_closed_in_a_tsv_are_part_of_the_text(tmp_path: Path) -> None:
    (tmp_path / "a.tsv").write_text('text\tlabel\n"To be\t0\nor "not"\t1\nbe"\t0\n')
    assert read(tmp_path / "a.tsv").values("text", "t") == ['"To be', 'or "not"', 'be"']
    (tmp_path / "b.tsv").write_text('text\tlabel\n"To be\t0\nnot\t1\n')
    assert read(tmp_path / "b.tsv").values("label", "t") == ["0", "1"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", b"", "is empty"),
        ("a.csv", b"text,label\na,b,c\n", "Expected 2 fields in line 2, saw 3"),
        ("a.csv", b"text,label\n\xff,1\n", "not UTF-8"),
        ("a.csv", b"text, text\na,1\n", "two columns are called 'text'"),
        ("a.csv", b'text,label\n"a,1\n', "not csv .*quote that begins in line 2"),
        ("a.csv.gz", b"text", "not csv"),
        ("a.csv.gz", gzip.compress(b"text,label\na,b\n" * 99, mtime=0)[:-20], "not csv"),
        ("a.json", b"[1, 2]", "row 0 is 1, not a record"),
        ("a.json", b"3", "it is no list of records"),
        ("a.jsonl", b'{"text": "a"}\n{"text": \n', "line 2 is not JSON"),
        ("a.jsonl", b"[" * 100_000, "not json|not JSON"),
        ("a.parquet", b"PAR1 nonsense", "not parquet"),
    ],
)
def test_a_damaged_file_is_named(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=rf"a\.\w+.*: .*({message})") as refusal:
        read(tmp_path / name)
    assert "\n" not in str(refusal.value)


def test_a_missing_column_is_told_with_those_that_there_are() -> None:
    table = Table("rows.csv", {"Review": ["a"], "stars": ["1"]}, {})
    message = r"rows\.csv: no column review for t; there are Review, stars; did you mean 'Review'"
    with pytest.raises(UserError, match=message):
        table.values("review", "t")


def test_files_elsewhere_are_read_too(tmp_path: Path) -> None:
    write(tmp_path / "rows.csv", ODD)
    content = (tmp_path / "rows.csv").read_bytes()
    memory = fsspec.filesystem("memory")
    memory.pipe("/own/rows.csv", content)
    memory.pipe("/own/packed.csv.gz", gzip.compress(content))
    for url in (
        f"file://{tmp_path}/rows.csv",
        "memory://own/rows.csv",
        "memory://own/packed.csv.gz",
    ):
        assert read(url).values("text", "t") == ODD
    assert read(".", data_files="memory://own/rows.csv").values("text", "t") == ODD
    with pytest.raises(UserError, match=r"memory://own/row\.csv: not there, or not to be reached"):
        read("memory://own/row.csv")
    with pytest.raises(UserError, match="nonsense://x: Protocol not known"):
        read("nonsense://x")


def test_shards_are_one_split_and_have_the_same_columns(tmp_path: Path) -> None:
    for shard in range(2):
        write(tmp_path / f"train-0000{shard}-of-00002.parquet", [f"row {shard}"])
    assert read(tmp_path).values("text", "t") == ["row 0", "row 1"]
    (tmp_path / "more.jsonl").write_text(json.dumps({"sentence": "a"}))
    with pytest.raises(UserError, match=r"more\.jsonl: its columns are sentence, and those of"):
        read(tmp_path, data_files=["train-*.parquet", "more.jsonl"])


def test_saved_data_sets_and_class_labels_are_read(tmp_path: Path) -> None:
    features = datasets.Features(
        {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["neg", "pos"]),
         "tags": datasets.List(datasets.ClassLabel(names=["x", "y"]))}
    )  # fmt: skip
    rows = {"text": ["a", "b", "c"], "label": [1, 0, 1], "tags": [[0], [], [0, 1]]}
    train = datasets.Dataset.from_dict(rows, features=features)
    train.to_parquet(tmp_path / "rows.parquet")
    train.select([2, 0]).save_to_disk(tmp_path / "one")
    datasets.DatasetDict(train=train, dev=train.select([1])).save_to_disk(tmp_path / "both")
    classes = {"label": ["neg", "pos"], "tags": ["x", "y"]}
    assert read(tmp_path / "rows.parquet").classes == classes
    saved = read(tmp_path / "one")
    assert (saved.values("text", "t"), saved.classes) == (["c", "a"], classes)
    both = find_files(DatasetSettings(path=str(tmp_path / "both")))
    assert {split: read_files(files).values("tags", "t") for split, files in both.items()} == {
        "train": [[0], [], [0, 1]],
        "dev": [[]],
    }
    (tmp_path / "one" / "dataset_info.json").write_text("{")
    with pytest.raises(UserError, match="one: not saved"):
        read(tmp_path / "one")


def test_a_parquet_file_with_a_column_twice_is_refused(tmp_path: Path) -> None:
    texts = pa.array(["a"])
    pq.write_table(pa.Table.from_arrays([texts, texts], names=["x", "x"]), tmp_path / "a.parquet")
    with pytest.raises(UserError, match="two columns are called 'x'"):
        read(tmp_path / "a.parquet")
