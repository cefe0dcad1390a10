"""Read the first rows of a data set, without the rest of it, for `fmn check`."""

import io
import json
import tempfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet as pq

from fmn.errors import UserError
from fmn.rows import sources
from fmn.rows.formats import DAMAGED, Table, read_files
from fmn.rows.sources import File, Splits
from fmn.store import hub
from fmn.tasks.task import DatasetSettings

ROWS = 100  # rows read from a Parquet file
BYTES = 1 << 18  # bytes read from a file of another format


def first_rows(dataset: DatasetSettings) -> tuple[dict[str, Table], int]:
    """The first rows of each split that a run reads, and the bytes that it downloads for all rows.

    Of the Hub only the list of files, the card and the beginning of one file of each split are
    read. The bytes are an estimate: the files of a split count like its first one.

    Raises:
        UserError: there is no such data set, file or split, or a file is not what its name says.
    """
    with tempfile.TemporaryDirectory() as scratch:
        name, size = sources.hub_name(dataset), 0
        if name is None:
            files, commit = sources.find_files(dataset), ""
        else:
            files, commit = _listed(dataset, name, Path(scratch))
        _, used = sources.used_splits(dataset, files, dataset.path)
        tables = {}
        for number, (split, parts) in enumerate(used.items()):
            file = parts[0]
            if file.format in ("saved", "images"):  # folders
                tables[split] = read_files([file])
                continue
            with _opened(file, name, commit, Path(scratch)) as stream:
                size += len(parts) * (
                    stream.seek(0, io.SEEK_END) if "://" in file.name or name else 0
                )
                stream.seek(0)
                ending = f".{'jsonl' if file.format == 'json' else file.format}"
                path = Path(scratch) / f"beginning-{number}{ending}"
                with _explained(file):
                    path.write_bytes(_beginning(stream, file))
            local = File(file.name, str(path), sources.local_system(), file.format, file.classes)
            tables[split] = read_files([local])
        return tables, size


def _listed(dataset: DatasetSettings, name: str, folder: Path) -> tuple[Splits, str]:
    """The files of each split of a data set on the Hub, and its commit.

    The folder gets the data set's card, and an empty file in place of every file of rows:
    `datasets` goes by their names.
    """
    commit, names = hub.list_files(name, dataset.revision, "dataset")
    snapshot = sources.download_card(name, commit)
    for card in snapshot.glob("README.md"):
        (folder / card.name).write_bytes(card.read_bytes())
    for each in sources.matching_names(dataset, snapshot, names):
        (folder / each).parent.mkdir(parents=True, exist_ok=True)
        (folder / each).touch()
    return sources.hub_files(dataset, folder), commit


@contextmanager
def _opened(file: File, name: str | None, commit: str, folder: Path) -> Iterator[IO[bytes]]:
    if name is None:
        with sources.reachable(file.name), file.system.open(file.path, "rb") as stream:
            yield stream
    else:
        inside = Path(file.path).relative_to(folder.resolve()).as_posix()
        with hub.open_file(name, inside, commit, "dataset") as remote:
            yield remote


@contextmanager
def _explained(file: File) -> Iterator[None]:
    try:
        yield
    except DAMAGED as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        reason = " ".join(str(error).split())
        raise UserError(
            f"{file.name}: not {file.format} ({reason:.200}); write it again"
        ) from error


def _beginning(stream: IO[bytes], file: File) -> bytes:
    """A file of the first rows of another, in the same format; JSON as a record a line."""
    if file.format == "parquet":
        parquet, out = pq.ParquetFile(stream), io.BytesIO()
        batches = parquet.iter_batches(
            batch_size=ROWS, row_groups=range(parquet.num_row_groups)[:1]
        )
        batch = next(batches, None)
        rows = pa.Table.from_batches([batch] if batch else [], parquet.schema_arrow)
        pq.write_table(rows, out)
        return out.getvalue()
    content = stream.read(BYTES)
    is_whole = len(content) < BYTES
    if file.path.split("?")[0].endswith(".gz"):
        content = zlib.decompressobj(wbits=31).decompress(content)
    if file.format == "json":
        return _records(content.decode(errors="ignore"), is_whole)
    return content if is_whole else content[: content.rfind(b"\n") + 1]


def _records(text: str, is_whole: bool) -> bytes:
    """The whole records at the beginning of JSON or of JSON lines, a line each."""
    text = text.removeprefix("\ufeff")
    if is_whole and not text.lstrip().startswith("["):
        return text.encode()
    decoder, records, place = json.JSONDecoder(), list[Any](), text.find("{")
    while place >= 0 and len(records) < ROWS:
        try:
            record, end = decoder.raw_decode(text, place)
        except json.JSONDecodeError:  # the record that the beginning ends in
            if is_whole:
                raise
            break
        records.append(record)
        place = text.find("{", end)
    return "\n".join(map(json.dumps, records)).encode()
