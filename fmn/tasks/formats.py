"""The content of files of rows, as columns: CSV, TSV, JSON, JSON lines, Parquet, `save_to_disk`."""

import csv
import io
import json
import warnings
import zlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from fmn.errors import UserError, hint
from fmn.tasks.sources import File, class_names, reachable

DAMAGED = (
    pa.ArrowException,
    OSError,
    EOFError,
    ValueError,
    RecursionError,
    zlib.error,
)
BOM = "utf-8-sig"  # UTF-8, with or without a byte order mark


class Table(NamedTuple):
    """The rows of a split, as they are in their files.

    Attributes:
        place: what messages call it.
        columns: values by name; of Parquet files, Arrow's arrays.
        classes: the names of the classes of a column that says them (`datasets.ClassLabel`).
    """

    place: str
    columns: Mapping[str, Any]
    classes: Mapping[str, Sequence[str]]

    @property
    def num_rows(self) -> int:
        return len(next(iter(self.columns.values()), ()))

    def values(self, name: str, task: str) -> list[Any]:
        """The values of a column as Python's own. UserError says which columns there are."""
        if name not in self.columns:
            listed = ", ".join(self.columns)
            same = [each for each in self.columns if each.lower() == name.lower()]
            near = hint(same[0] if same else name, self.columns)
            raise UserError(f"{self.place}: no column {name} for {task}; there are {listed}{near}")
        values = self.columns[name]
        plain: list[Any] = values.to_pylist() if hasattr(values, "to_pylist") else list(values)
        return plain


def read_files(files: Sequence[File]) -> dict[str, Table]:
    """The rows in the files of one split; of a `save_to_disk` folder, of all its splits ("": one).

    Raises:
        UserError: a file is damaged, empty, or not what its name says.
    """
    if files[0].format == "saved":
        return _saved(files[0])
    tables = [_read(file) for file in files]
    if len(tables) == 1:
        return {"": tables[0]}
    names = list(tables[0].columns)
    for table in tables:
        if set(table.columns) != set(names):
            raise UserError(
                f"{table.place}: its columns are {', '.join(table.columns)}, and those of"
                f" {tables[0].place} {', '.join(names)}; files of one split have the same columns"
            )
    columns = {name: [x for each in tables for x in each.values(name, "")] for name in names}
    place = f"{tables[0].place} to {tables[-1].place}"
    return {"": Table(place, columns, tables[0].classes)}


def _read(file: File) -> Table:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            columns, classes = READERS[file.format](file)
    except UnicodeDecodeError as error:
        raise UserError(f"{file.name}: not UTF-8 ({error.reason}); save it as UTF-8") from error
    except DAMAGED as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        reason = " ".join(str(error).split())
        raise UserError(
            f"{file.name}: not {file.format} ({reason:.200}); write it again"
        ) from error
    stripped = [str(name).strip() for name in columns]
    if twice := [name for name in stripped if stripped.count(name) > 1]:
        raise UserError(f"{file.name}: two columns are called {twice[0]!r}; rename one")
    values = columns.values()
    return Table(file.name, dict(zip(stripped, values, strict=True)), {**classes, **file.classes})


Columns = tuple[dict[str, Any], dict[str, list[str]]]


def _content(file: File) -> bytes:
    content: bytes
    with reachable(file.name), file.system.open(file.path, "rb", compression="infer") as stream:
        content = stream.read()
    return content


def _csv(file: File) -> Columns:
    content = _content(file)
    header = content.split(b"\n", 1)[0].decode(BOM)
    separator = "\t" if file.format == "tsv" else ","
    if file.format == "csv" and separator not in header:
        separator = next((each for each in ";\t" if each in header), separator)
    try:
        frame = _frame(content, separator, quoted=True)
        # A field with both a tab and a line's end: a stray quote swallowed lines.
        is_torn = separator == "\t" and any(
            frame[name].str.contains(r"(?s)\t.*\n|\n.*\t", regex=True).any() for name in frame
        )
    except pd.errors.ParserError:
        if separator != "\t":
            raise
        is_torn = True
    if is_torn:  # quotes are part of the text, as in GLUE's own files
        frame = _frame(content, separator, quoted=False)
    if frame.empty:
        raise UserError(f"{file.name}: the file is empty; write it again")
    names, body = frame.iloc[0], frame.iloc[1:]
    return {name: body[number].tolist() for number, name in enumerate(names)}, {}


def _frame(content: bytes, separator: str, quoted: bool) -> pd.DataFrame:
    """All fields as text, the first row being the names. Short rows are filled with ""."""
    if not content.removeprefix(b"\xef\xbb\xbf").strip():
        return pd.DataFrame()
    return pd.read_csv(
        io.BytesIO(content),
        sep=separator,
        header=None,
        dtype=str,
        encoding=BOM,
        keep_default_na=False,
        na_filter=False,
        quoting=csv.QUOTE_MINIMAL if quoted else csv.QUOTE_NONE,
    )


def _json(file: File) -> Columns:
    text = _content(file).decode(BOM)
    try:
        content = json.loads(text)
        # A file of one line may be one record.
        is_record = isinstance(content, dict) and any(isinstance(x, str) for x in content.values())
        records = [content] if is_record else content
    except json.JSONDecodeError:
        records = [_line(file, number, line) for number, line in enumerate(text.split("\n"), 1)
                   if line.strip()]  # fmt: skip
    if isinstance(records, dict):
        if not isinstance(records.get("data"), list):
            raise UserError(
                f"{file.name}: an object with {', '.join(map(str, records))[:100]}; write a list of"
                ' records, such as [{"text": ...}], or a record a line'
            )
        records = records["data"]
    if not isinstance(records, list):
        raise UserError(f"{file.name}: not a list of records, such as [{{'text': ...}}]")
    for row, record in enumerate(records):
        if not isinstance(record, dict):
            raise UserError(
                f"{file.name}: row {row} is {record!r:.40}, not a record {{NAME: VALUE}}"
            )
    names = dict.fromkeys(name for record in records for name in record)
    return {name: [record.get(name) for record in records] for name in names}, {}


def _line(file: File, number: int, line: str) -> Any:
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        raise UserError(f"{file.name}: line {number} is not JSON ({error.msg})") from error


def _parquet(file: File) -> Columns:
    table = pq.ParquetFile(io.BytesIO(_content(file))).read()
    classes = {}
    if b"huggingface" in (table.schema.metadata or {}):
        from datasets import Features

        classes = class_names(Features.from_arrow_schema(table.schema))
    return _arrow(table), classes


def _arrow(table: pa.Table) -> dict[str, Any]:
    if twice := [name for name in table.column_names if table.column_names.count(name) > 1]:
        raise ValueError(f"two columns are called {twice[0]!r}")
    return {name: table[name] for name in table.column_names}


def _saved(folder: File) -> dict[str, Table]:
    import datasets

    url = folder.system.unstrip_protocol(folder.path)
    try:
        saved = datasets.load_from_disk(folder.path if folder.local else url)
    except (OSError, ValueError, KeyError, pa.ArrowException) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{folder.name}: not as save_to_disk writes it ({reason:.200})") from error
    splits = saved if isinstance(saved, datasets.DatasetDict) else {"": saved}
    return {
        split: Table(
            f"{folder.name}/{split}".rstrip("/"),
            _arrow(rows.with_format("arrow")[:]),
            class_names(rows.features),
        )
        for split, rows in splits.items()
    }


READERS = {"csv": _csv, "tsv": _csv, "json": _json, "parquet": _parquet}
