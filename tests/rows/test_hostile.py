"""Files that are broken or hostile: they are read, or refused in one line that names them."""

import gzip
import io
import json
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fmn.errors import UserError
from fmn.rows.formats import read_files
from fmn.rows.sources import find_files
from fmn.tasks.task import DatasetSettings
from tests import readers
from tests.conftest import ROOT

SEEDS = {path.name: path.read_bytes() for path in sorted((ROOT / "tests/corpus").iterdir())}
FRAGMENTS = (
    *(b"\0", b"\xff\xfe", b"\xef\xbb\xbf", b'"', b"'", b"\n", b"\r", b"\t", b",", b";", b"\n\n"),
    *(b"[", b"]", b"{", b"}", b"\\ud800", b"NaN", b"1e999", b"-1", b"null", b"true", b"[{[1]}]"),
    *(b"9" * 5000, b"[" * 5000, b"x" * 70_000, "\u2028\x1b[31m".encode(), b"\x80"),
)


@given(st.sampled_from(sorted(SEEDS)), st.data())
@settings(max_examples=400, derandomize=True)
def test_what_is_changed_in_any_place_is_read_or_refused(
    tmp_path_factory: pytest.TempPathFactory, seed: str, data: Any
) -> None:
    number, content = SEEDS[seed][0], SEEDS[seed][1:]
    for _ in range(data.draw(st.integers(1, 4))):
        start = data.draw(st.integers(0, len(content)))
        length = data.draw(st.sampled_from([0, 0, 1, 4, len(content)]))
        new = data.draw(st.sampled_from(FRAGMENTS) | st.binary(max_size=4))
        content = content[:start] + new + content[start + length :]
    readers.attempt(number, content, tmp_path_factory.getbasetemp())


def column(array: pa.Array, **others: object) -> bytes:
    """A Parquet file with a column `label`."""
    stream = io.BytesIO()
    pq.write_table(pa.table({"text": ["a"] * len(array), "label": array, **others}), stream)
    return stream.getvalue()


def no_text() -> pa.Array:
    """Bytes that are no UTF-8, in a column of texts."""
    return pa.Array.from_buffers(pa.string(), 2, pa.array([b"\xff", b"a"]).buffers())


def packed(unit: bytes, count: int) -> bytes:
    return gzip.compress(b"text,label\n" + unit * count, mtime=0)


def described(metadata: str) -> bytes:
    """A Parquet file with something else than `datasets` writes into its metadata."""
    table = pa.table({"text": ["a", "b"], "label": [0, 1]})
    stream = io.BytesIO()
    pq.write_table(table.replace_schema_metadata({"huggingface": metadata}), stream)
    return stream.getvalue()


SPARSE = "\n".join(json.dumps({f"key {row}": row}) for row in range(2500)).encode()
REPEATED = pa.array(["b" * 500] * 400_000)
CLASS_LABEL = '{"info": {"features": {"label": {"names": 5, "_type": "ClassLabel"}}}}'


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("bomb.csv.gz", packed(bytes(1000), 100_000), "unpacks to more than 200 times its size"),
        ("bomb.parquet", column(REPEATED), "unpacks to more than 1000 times its size"),
        ("bytes.parquet", column(no_text()), "column 'label' .*cannot be read .*'utf-8'"),
        ("late.parquet", column(pa.array([2**30] * 2, pa.int32()).view("date32")),
         "column 'label' has a value that cannot be read"),
        ("classes.parquet", described(CLASS_LABEL), "metadata of datasets: .*names as a list"),
        ("no.parquet", described("{"), "not parquet .its metadata of datasets"),
        ("wide.csv", b",".join(b"c%d" % n for n in range(3000)) + b"\n", "more than 2000 columns"),
        ("sparse.jsonl", SPARSE, "more than 2000 columns"),
        ("lines.csv", b'"a\nb",label\nx,1\ny,2\n', "no column text for t; there are a b, label"),
        ("names.csv", b"x" * 9999 + b",label\nx,1\ny,2\n", "there are x{100}, label"),
        ("half.jsonl", b'{"text": "a", "label": "\\ud800"}\n{"text": "b", "label": "c"}',
         "'.ud800' has a NUL, or half a character"),
    ],
)  # fmt: skip
def test_bombs_and_values_that_nothing_holds_are_refused(
    name: str, content: bytes, message: str, tmp_path: Path
) -> None:
    (tmp_path / name).write_bytes(content)
    began = time.monotonic()
    with pytest.raises(UserError, match=f"{name}: .*{message}") as refusal:
        readers.read_rows(tmp_path / name)
    readers.check(refusal.value, tmp_path)
    assert time.monotonic() - began < 30


@pytest.mark.parametrize(
    "cell",
    [
        *("[{[1]}]", "[{[]: 1}]", "[1j]", "[...]", "['a' 'b']", "[None]", "[[1], [2]]"),
        *(f"[{'-' * 10_000}1]", f"[1{'+1' * 50_000}]", "[" * 500 + "]" * 500),
        *(f"[0x{'f' * 5000}]", f"[{'9' * 5000}]", "[1e999]", '["\\ud800"]'),
    ],
)
def test_a_cell_that_looks_like_a_list_is_read_or_refused(cell: str, tmp_path: Path) -> None:
    cells = json.dumps([cell, "[1]", cell]).encode()
    readers.attempt(readers.number("labels.json"), cells, tmp_path)
    rows = [json.dumps({"tokens": each, "label": each}) for each in (cell, '["a"]')]
    readers.attempt(readers.number("rows.tagged.jsonl"), "\n".join(rows).encode(), tmp_path)


def test_quotes_and_lines_take_linear_time(tmp_path: Path) -> None:
    text = "a\n" * 200_000
    (tmp_path / "rows.tsv").write_text(f'text\tlabel\n"{text}"\tx\nb\ty\n')
    began = time.monotonic()
    table = read_files(find_files(DatasetSettings(path=str(tmp_path / "rows.tsv")))["train"])
    assert table.values("text", "t") == [text, "b"]
    assert time.monotonic() - began < 30
