"""Read files of rows as columns.

The files are CSV, TSV, JSON, JSON lines, Parquet, CoNLL text, or what `save_to_disk` wrote.
"""

import csv
import io
import json
import re
import warnings
import zlib
from collections.abc import Iterable, Mapping, Sequence
from itertools import islice
from typing import Any, NamedTuple

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from fmn.errors import UserError, hint
from fmn.rows import images
from fmn.rows.sources import File, class_names, reachable
from fmn.store.records import shortened
from fmn.tasks.task import in_a_line

DAMAGED = (
    *(pa.ArrowException, OSError, EOFError, ValueError, RecursionError, zlib.error),
    KeyError,  # raised for a folder of `save_to_disk`
)
# A file may unpack to this many times its size; a small file to SMALL bytes.
UNPACKED, PARQUET_UNPACKED, SMALL = 200, 1000, 2**26
MOST_COLUMNS = 2000
_DOCUMENT = "-DOCSTART-"  # marks the beginning of a document; not a word
BOM = "utf-8-sig"  # UTF-8, with or without a byte order mark


class Table(NamedTuple):
    """The rows of a split, as read from their files.

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
        """The values of a column as Python objects; UserError if the column does not exist."""
        if name not in self.columns:
            same = [each for each in self.columns if each.lower() == name.lower()]
            near = hint(same[0] if same else name, self.columns)
            raise UserError(
                f"{self.place}: no column {name} for {task};"
                f" there are {in_a_line(self.columns)}{near}"
            )
        values = self.columns[name]
        try:
            plain: list[Any] = values.to_pylist() if hasattr(values, "to_pylist") else list(values)
        except (*DAMAGED, OverflowError) as error:  # not UTF-8, or a date that Python cannot hold
            reason = " ".join(str(error).split())
            problem = f"column {name!r:.60} has a value that cannot be read ({reason:.200})"
            raise UserError(f"{self.place}: {problem}; write it again") from error
        return plain


def read_files(files: Sequence[File]) -> Table:
    """The rows in the files of a split.

    Raises:
        UserError: a file is damaged, empty, or not what its name says.
    """
    tables = [_read(file) for file in files]
    first, names = tables[0], list(tables[0].columns)
    for table in tables:
        if set(table.columns) != set(names):
            raise UserError(
                f"{table.place}: its columns are {in_a_line(table.columns)}, and those of"
                f" {first.place} {in_a_line(names)}; files of one split have the same columns"
            )
    if not any(table.num_rows for table in tables):
        raise UserError(f"{first.place}: there are no rows; write it again")
    if len(tables) == 1:
        return first
    columns = {name: [x for each in tables for x in each.values(name, "")] for name in names}
    return Table(f"{first.place} to {tables[-1].place}", columns, first.classes)


def _read(file: File) -> Table:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            named, classes = READERS[file.format](file)
    except DAMAGED as error:
        if isinstance(error, OSError) and error.errno is not None and file.format != "saved":
            raise
        if isinstance(error, UnicodeDecodeError):
            wrong = f"byte {error.object[error.start]:#x} at position {error.start}"
            raise UserError(f"{file.name}: not UTF-8 ({wrong}); save it as UTF-8") from error
        reason = " ".join(str(error).split()).removeprefix("Error tokenizing data. C error: ")
        if at := re.search(r"EOF inside string starting at row (\d+)", reason):
            reason = f"a quote that begins in line {int(at[1]) + 1} is never closed"
        raise UserError(
            f"{file.name}: not {file.format} ({reason:.200}); write it again"
        ) from error
    columns: dict[str, Any] = {}
    for name, values in named:
        if str(name).strip() in columns:
            named_twice = f"two columns are called {name.strip()!r:.60}"
            raise UserError(f"{file.name}: {named_twice}; rename one")
        columns[str(name).strip()] = values
        if len(columns) > MOST_COLUMNS:
            problem = f"has more than {MOST_COLUMNS} columns"
            raise UserError(f"{file.name}: {problem}; write those that the task needs")
    return Table(file.name, columns, {**classes, **file.classes})


Columns = tuple[Iterable[tuple[Any, Any]], dict[str, list[str]]]  # names and values, and classes


def _content(file: File) -> bytes:
    with reachable(file.name), file.system.open(file.path, "rb", compression="infer") as stream:
        is_packed = file.path.lower().endswith(".gz")
        size = file.system.size(file.path) if is_packed else None  # some servers give no size
        most = None if size is None else max(SMALL, UNPACKED * size)
        content: bytes = stream.read(most + 1 if most else -1)
    if most and len(content) > most:
        raise ValueError(f"it unpacks to more than {UNPACKED} times its size")
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
            (
                frame[n].str.contains("\t", regex=False) & frame[n].str.contains("\n", regex=False)
            ).any()
            for n in frame
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
    if again := [row for row, is_same in enumerate((body == names).all(axis=1)) if is_same]:
        raise UserError(f"{file.name}: row {again[0]} is the header again; remove it")
    return [(name, body[number].tolist()) for number, name in enumerate(names)], {}


def _frame(content: bytes, separator: str, quoted: bool) -> pd.DataFrame:
    """All fields as text. The first row has the names; short rows are filled with ""."""
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
        records = json.loads(text)
        if isinstance(records, dict):  # the records are in "data", or it is a file of one line
            records = records.get("data", [records])
    except json.JSONDecodeError:
        records = [_line(file, number, line) for number, line in enumerate(text.split("\n"), 1)
                   if line.strip()]  # fmt: skip
    if not isinstance(records, list):
        raise ValueError("it is no list of records, such as [{'text': ...}], and no record a line")
    for row, record in enumerate(records):
        if not isinstance(record, dict):
            raise ValueError(f"row {row} is {shortened(record, 40)}, not a record {{NAME: VALUE}}")
    names = dict.fromkeys(name for record in records for name in record)
    # Stop at the first name too many, before memory for all records times names is used.
    names = dict.fromkeys(islice(names, MOST_COLUMNS + 1))
    return ((name, [record.get(name) for record in records]) for name in names), {}


def _line(file: File, number: int, line: str) -> Any:
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        problem = f"line {number} is not JSON ({error.msg}); correct it"
        raise UserError(f"{file.name}: {problem}") from error


def _parquet(file: File) -> Columns:
    content = _content(file)
    source, most = pq.ParquetFile(io.BytesIO(content)), max(SMALL, PARQUET_UNPACKED * len(content))
    batches, size = [], 0
    for batch in source.iter_batches(1024):
        batches.append(batch)
        size += batch.nbytes
        if size > most or 8 * len(batches) * 1024 > most:  # eight bytes a row
            raise ValueError(f"it unpacks to more than {PARQUET_UNPACKED} times its size")
    table = pa.Table.from_batches(batches, source.schema_arrow)
    classes = {}
    if b"huggingface" in (table.schema.metadata or {}):
        from datasets import Features

        try:
            classes = class_names(Features.from_arrow_schema(table.schema))
        except Exception as error:  # the file may hold anything
            raise ValueError(f"its metadata of datasets: {error}") from error
    return zip(table.column_names, table.columns, strict=True), classes


def _saved(folder: File) -> Columns:
    import datasets

    path = folder.path if folder.local else folder.system.unstrip_protocol(folder.path)
    rows = datasets.load_from_disk(path)
    table = rows.with_format("arrow")[:]
    return zip(table.column_names, table.columns, strict=True), class_names(rows.features)


def _images(folder: File) -> Columns:
    with reachable(folder.name):
        columns = images.read_folder(folder.system, folder.path, folder.name)
    return columns.items(), {}


def _conll(file: File) -> Columns:
    """Words and tags from CoNLL: one word per line, and an empty line between sentences.

    Column "tokens" has the first of each line, "label" the last; "column 1" and so on have all.
    In CoNLL-U, whose lines begin with numbers, there are the numbered columns alone.
    """
    lines = [line.strip("\r") for line in _content(file).decode(BOM).split("\n")]
    words = [line for line in lines if line.strip() and not line.startswith(("#", _DOCUMENT))]
    separator = "\t" if words and "\t" in words[0] else " "
    width = len(_fields(words[0], separator)) if words else 2
    if width < 2:
        raise UserError(f"{file.name}: {words[0]!r:.40} is not a word and its tag; correct it")
    sentences: list[list[list[str]]] = [[]]
    for number, line in enumerate(lines, 1):
        fields = _fields(line, separator)
        if not line.strip(" \t") or fields[0] == _DOCUMENT:
            sentences.append([])
        elif line.startswith(("# ", "#\t")) and (
            len(fields) != width or ("\t" in line) != (separator == "\t")
        ):
            continue  # a comment
        elif len(fields) == width:
            sentences[-1].append(fields)
        else:
            raise UserError(
                f"{file.name}: line {number} is {line!r:.40}, of {len(fields)} columns, and the"
                f" lines above have {width}; correct it"
            )
    numbers = re.compile(r"\d+([-.]\d+)?")
    is_numbered = bool(words) and all(numbers.fullmatch(f[0]) for each in sentences for f in each)
    if is_numbered:  # "1-2" and "8.1" are not words
        sentences = [[f for f in each if f[0].isdigit()] for each in sentences]
    columns = {f"column {place + 1}": place for place in range(width)}
    if not is_numbered:
        columns = {"tokens": 0, "label": width - 1, **columns}
    sentences = [each for each in sentences if each]
    return [(n, [[f[at] for f in each] for each in sentences]) for n, at in columns.items()], {}


def _fields(line: str, separator: str) -> list[str]:
    """The columns of a line, divided by plain blanks only: a word may contain other blanks."""
    return line.split("\t") if separator == "\t" else re.split("[ \t]+", line.strip(" \t"))


READERS = {
    **{"csv": _csv, "tsv": _csv, "json": _json, "parquet": _parquet},
    **{"conll": _conll, "saved": _saved, "images": _images},
}
