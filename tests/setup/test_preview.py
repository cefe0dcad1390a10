"""The first rows of a data set, whatever its form, without the rest of it."""

import gzip
import json
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fmn.errors import UserError
from fmn.setup.preview import BYTES, first_rows
from fmn.tasks.task import DatasetSettings
from tests.hub_server import Hub

COUNT = 20_000
RECORDS = [{"text": f'a "word", {row} {{', "label": row % 2} for row in range(COUNT)]
LINES = "".join(json.dumps(record) + "\n" for record in RECORDS)
TABLE = pa.table({"text": [each["text"] for each in RECORDS], "label": [0, 1] * (COUNT // 2)})


def write(folder: Path, name: str) -> Path:
    """The records in the form that the file's name tells."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name
    if name.endswith(".parquet"):
        features = {
            "text": datasets.Value("string"),
            "label": datasets.ClassLabel(names=["n", "p"]),
        }
        schema = datasets.Features(features).arrow_schema
        pq.write_table(TABLE.cast(schema), path, row_group_size=100, compression=None)
    elif name.endswith(".csv"):
        TABLE.to_pandas().to_csv(path, index=False)
    elif name.endswith(".gz"):
        path.write_bytes(gzip.compress(LINES.encode()))
    else:
        path.write_text(LINES if name.endswith(".jsonl") else json.dumps(RECORDS))
    return path


def check_beginning(tables: dict[str, Any]) -> None:
    for table in tables.values():
        assert list(table.columns) == ["text", "label"]
        assert 10 < table.num_rows < COUNT or table.place.endswith(".gz")
        expected = [record["text"] for record in RECORDS[: table.num_rows]]
        assert table.values("text", "x") == expected


@pytest.mark.parametrize("name", ["a.csv", "a.jsonl", "a.json", "a.parquet", "a.jsonl.gz"])
def test_files_on_this_machine(name: str, tmp_path: Path) -> None:
    tables, download = first_rows(DatasetSettings(path=str(write(tmp_path, name))))
    check_beginning(tables)
    assert download == 0
    if name == "a.parquet":
        assert tables["train"].classes == {"label": ["n", "p"]}


@pytest.mark.parametrize("form", ["csv", "jsonl", "parquet"])
def test_of_the_hub_only_the_beginning_is_transferred(form: str, hub: Hub, tmp_path: Path) -> None:
    file = write(tmp_path, f"train.{form}")
    write(tmp_path, f"validation.{form}")
    hub.add("datasets", "org/rows", tmp_path)
    tables, download = first_rows(DatasetSettings(path="org/rows"))
    check_beginning(tables)
    assert list(tables) == ["train", "validation"]
    assert download == 2 * file.stat().st_size
    assert hub.sent < 3 * BYTES
    with pytest.raises(UserError, match="no split nothing"):
        first_rows(DatasetSettings(path="org/rows", splits={"validation": "nothing"}))
    with pytest.raises(UserError, match="no such revision"):
        first_rows(DatasetSettings(path="org/rows", revision="nothing"))


def test_small_and_damaged_files(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text("text,label\nx,1\ny,2")
    tables, _ = first_rows(DatasetSettings(path=str(tmp_path / "rows.csv")))
    assert tables["train"].values("label", "x") == ["1", "2"]
    for name, content in {"a.parquet": b"PAR1", "b.json": b"[{]", "c.jsonl.gz": b"no"}.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=rf"{name}: not "):
            first_rows(DatasetSettings(path=str(tmp_path / name)))
    with pytest.raises(UserError, match="no such file"):
        first_rows(DatasetSettings(path=str(tmp_path / "none.csv")))
