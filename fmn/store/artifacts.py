"""Files that are whole or absent, and that say what they were made from.

A *content key* names what an output depends on: the stage, its algorithm version, its settings and the digests of its
inputs. An output that carries the key of today's request and whose bytes still have the digests it was written with
need not be made again. Folders carry both in ``fmn.json``, JSON files in their ``fmn`` entry, the Fisher artifact in
its Parquet metadata.
"""

import hashlib
import json
import math
import os
import shutil
import struct
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import filelock

from fmn.errors import UserError
from fmn.store import machine
from fmn.store import records as formats

if TYPE_CHECKING:
    from fmn.evaluate.bootstrap import Answers, Splits
    from fmn.fisher.architectures import NodeValues

MANIFEST = "fmn.json"
CARD = "README.md"  # which people may edit
COST = ".cost"
FISHER_FORMAT = 1

_digests: dict[tuple[Any, ...], str] = {}


def digest_bytes(data: bytes) -> str:
    """sha256 of ``data``, in hexadecimal."""
    return hashlib.sha256(data).hexdigest()


def canonical(value: Any) -> bytes:
    """JSON bytes that are the same for equal values: sorted keys, no spaces, no NaN."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def agrees(digest: object, compute: Callable[[], str]) -> bool:
    """Whether a digest is what `compute` gives; none is of NaN or infinity, which `canonical` refuses."""
    try:
        return digest == compute()
    except ValueError:
        return False


def digest_file(path: Path, start: int = 0) -> str:
    """sha256 of a file's bytes from ``start`` on, in hexadecimal; read again only when the file was touched since."""
    identity = _identity(path, start)
    if identity not in _digests:
        with path.open("rb") as file:
            file.seek(start)
            _digests[identity] = hashlib.file_digest(file, "sha256").hexdigest()
    return _digests[identity]


def remember_digest(path: Path, digest: str) -> None:
    """Spare `digest_file` reading a file whose sha256 is known from writing it.

    To be called when the file is complete and has all its names: a hard link, or renaming the file
    itself, changes its status, and it would be read again. Renaming its folder does not.
    """
    _digests[_identity(path, 0)] = digest


def _identity(path: Path, start: int) -> tuple[int, ...]:
    status = path.stat()
    times = (status.st_mtime_ns, status.st_ctime_ns)
    return (status.st_dev, status.st_ino, status.st_size, *times, start)


def digest_files(folder: Path) -> dict[str, str]:
    """sha256 of every file below ``folder`` by relative name, in order of name; no manifest, no hidden files."""
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder")
    return {
        name: digest_file(path)
        for name, path in visible(folder).items()
        if name not in (MANIFEST, CARD)
    }


def visible(folder: Path, only: Sequence[str] = ()) -> dict[str, Path]:
    """Every file below a folder, or below the folders `only` in it, by relative name, in order; nothing hidden."""
    files = sorted(
        path for part in only or ("",) for path in (folder / part).rglob("*") if path.is_file()
    )
    names = {path: path.relative_to(folder) for path in files}
    return {
        name.as_posix(): path
        for path, name in names.items()
        if not any(part.startswith(".") for part in name.parts)
    }


def digest_folder(folder: Path) -> str:
    """One digest for all that a folder holds; a folder with a manifest must still agree with it.

    Raises UserError naming the file that is missing, was added, or changed.
    """
    files = digest_files(folder)
    manifest = read_manifest(folder)
    if manifest is not None and (wrong := differing(manifest["files"], files)):
        raise UserError(
            f"{folder / wrong}: not what was written there (see {folder / MANIFEST}); make {folder} again"
        )
    return digest_bytes(canonical(files))


def differing(expected: Mapping[str, str], found: Mapping[str, str]) -> str | None:
    """The first name whose digests differ or that only one side has."""
    return next(
        (name for name in sorted({*expected, *found}) if expected.get(name) != found.get(name)),
        None,
    )


def content_key(
    stage: str, algorithm: int, settings: Mapping[str, Any], inputs: Mapping[str, str]
) -> str:
    """The digest of everything that an output depends on."""
    parts = {
        "stage": stage,
        "algorithm": algorithm,
        "settings": dict(settings),
        "inputs": dict(inputs),
    }
    return digest_bytes(canonical(parts))


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def check_replaceable(out: Path) -> None:
    """Refuse an output that would replace what fmn did not make: UserError that names it.

    A folder must be empty or hold a manifest or a recipe. A file must be empty, or Parquet, JSON or safetensors as its
    name says, and JSON that can be read, and safetensors, must carry fmn's mark; or have the note beside it that
    `write_cost` left, as the mark may be what was damaged.
    """
    if out.name in ("", ".."):
        raise UserError(f"--out {out}: name a folder or file of its own")
    made = not out.exists()
    if out.is_dir():
        made = (
            (out / MANIFEST).is_file() or (out / "merge.json").is_file() or not any(out.iterdir())
        )
    elif out.is_file():
        content = _read_json(out)
        made = out.suffix in (".parquet", ".json") and (content is None or "fmn" in content)
        if out.suffix == ".safetensors":
            with out.open("rb") as file:
                made = b'{"__metadata__":{"fmn":' in file.read(64)
        made = made or not out.stat().st_size or _cost(out).is_file()
    if not made:
        raise UserError(
            f"--out {out}: something that fmn did not make is there; choose another --out, or remove it"
        )


@contextmanager
def locked(out: Path) -> Iterator[None]:
    """Hold ``out`` against other processes of this machine; the lock of a process that dies is free.

    Lock files lie in the system's temporary folder, so none is left in a user's folder.
    """
    folder = Path(tempfile.gettempdir()) / f"fmn-locks-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    with filelock.FileLock(folder / digest_bytes(str(out.resolve()).encode())):
        yield


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A place to write a file beside ``path``; it takes its name when the block ends well, and vanishes otherwise."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    _remove(partial)
    try:
        yield partial
        _flush(partial)
        partial.replace(path)
        _flush(path.parent)
    finally:
        _remove(partial)


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """An empty folder beside ``path``; it takes its name, in place of an older one, when the block ends well."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial, old = (path.with_name(f".{path.name}.{word}") for word in ("partial", "old"))
    _remove(partial)
    _remove(old)
    partial.mkdir()
    try:
        yield partial
        with (
            ThreadPoolExecutor() as threads
        ):  # at the same time, so that the file system's journal commits once
            list(
                threads.map(
                    _flush, {item.stat().st_ino: item for item in partial.rglob("*")}.values()
                )
            )
        _flush(partial)
        if path.exists():
            path.rename(old)
        partial.rename(path)
        _flush(path.parent)
    finally:
        _remove(partial)
        _remove(old)


@contextmanager
def scratch_folder(out: Path) -> Iterator[Path]:
    """An empty folder beside an output, to write it in; it is removed at the end."""
    out.parent.mkdir(parents=True, exist_ok=True)
    scratch = out.with_name(f".{out.name}.partial")
    _remove(scratch)
    scratch.mkdir()
    try:
        yield scratch
    finally:
        _remove(scratch)


def publish_folder(scratch: Path, out: Path) -> None:
    """Give a scratch folder its name, in place of an older folder; its files are on the disk then."""
    _flush_all(scratch)
    old = out.with_name(f".{out.name}.old")
    _remove(old)
    if out.exists():
        out.rename(old)
    scratch.rename(out)
    _flush(out.parent)
    _remove(old)


def publish_files(scratch: Path, folder: Path, last: str) -> None:
    """Move a scratch folder's files into a folder, the file named `last` after all others."""
    _flush_all(scratch)
    for path in sorted(scratch.iterdir(), key=lambda path: path.name == last):
        path.replace(folder / path.name)
    _flush(folder)


def _flush_all(folder: Path) -> None:
    # At the same time, so that the file system's journal commits once.
    with ThreadPoolExecutor() as threads:
        list(threads.map(_flush, {item.stat().st_ino: item for item in folder.rglob("*")}.values()))
    _flush(folder)


def write_manifest(folder: Path, stage: str, key: str, info: Mapping[str, Any]) -> None:
    """Write ``fmn.json``: the stage, its content key, every file's digest, and ``info``."""
    manifest = {
        "format": 1,
        "stage": stage,
        "key": key,
        "files": digest_files(folder),
        "info": dict(info),
    }
    with whole_file(folder / MANIFEST) as file:
        file.write_text(json.dumps(manifest, indent=1, sort_keys=True) + "\n")


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """What ``fmn.json`` in a folder says, or None when there is none that can be read."""
    manifest = _read_json(folder / MANIFEST)
    kinds = {"files": dict, "info": dict, "stage": str, "key": str}
    whole = manifest is not None and all(
        isinstance(manifest.get(name), kind) for name, kind in kinds.items()
    )
    if manifest is None or not whole:
        return None
    # It comes with a checkpoint, from wherever that is.
    form = formats.MANIFESTS.get(manifest["stage"])
    return manifest if form is None or formats.fits(manifest["info"], form) else None


def folder_is_current(folder: Path, key: str) -> bool:
    """Whether a folder was made for this content key and is still what was written."""
    manifest = read_manifest(folder)
    return (
        manifest is not None
        and manifest.get("key") == key
        and differing(manifest["files"], digest_files(folder)) is None
    )


def _read_json(path: Path) -> dict[str, Any] | None:
    with suppress(OSError, ValueError, RecursionError):
        content = json.loads(path.read_bytes())
        if isinstance(content, dict):
            return content
    return None


def write_json(path: Path, stage: str, key: str, content: Mapping[str, Any]) -> None:
    """Write a JSON file that carries its stage, content key and digest under ``fmn``."""
    mark = {"stage": stage, "key": key, "digest": digest_bytes(canonical(content))}
    with whole_file(path) as file:
        file.write_text(json.dumps({**content, "fmn": mark}, indent=1) + "\n")


def read_json(
    path: Path, form: type[formats.Record] | None = None, remedy: str = "make it again"
) -> dict[str, Any]:
    """The content of a file that `write_json` wrote, without its mark.

    Raises UserError when it is not that any more, or does not hold what `form` asks for; `remedy` then says what to do.
    """
    content = _read_json(path)
    if content is None:
        raise UserError(f"{path}: no such file, or not JSON")
    mark = _mark(content)
    if not agrees(mark.get("digest"), lambda: digest_bytes(canonical(content))):
        raise UserError(f"{path}: its content is not what was written; make it again")
    if form is not None:
        formats.check(content, form, path, remedy)
    return content


def json_is_current(path: Path, key: str) -> bool:
    """Whether a JSON file was made for this content key and is still what was written."""
    content = _read_json(path)
    if content is None:
        return False
    mark = _mark(content)
    return mark.get("key") == key and agrees(
        mark.get("digest"), lambda: digest_bytes(canonical(content))
    )


def _mark(content: dict[str, Any]) -> dict[str, Any]:
    """Take out of a JSON file's content what `write_json` put there; empty where that is missing or damaged."""
    mark = content.pop("fmn", None)
    return mark if isinstance(mark, dict) else {}


def _cost(out: Path) -> Path:
    return out.with_name(f".{out.name}{COST}")


def write_cost(out: Path, stage: str, seconds: float) -> None:
    """Keep, beside an output, how long the run of `stage` took that made it.

    A file of its own, hidden from digests and from DVC: a clock is no part of what an output is.
    """
    with whole_file(_cost(out)) as file:
        file.write_text(json.dumps({"stage": stage, "seconds": round(seconds, 3)}) + "\n")


def read_costs(folder: Path) -> dict[Path, tuple[str, float]]:
    """What made each output below a folder, as (stage, seconds) by its path; of outputs that are there."""
    found = {}
    for path in sorted(folder.rglob(f".*{COST}")):
        out, kept = path.with_name(path.name[1 : -len(COST)]), _read_json(path)
        if kept is not None and out.exists():
            found[out] = (str(kept["stage"]), float(kept["seconds"]))
    return found


def predictions_file(metrics: Path) -> Path:
    """Where the predictions lie that a metrics file was computed from: beside it."""
    return metrics.with_suffix(".predictions.parquet")


def write_predictions(path: Path, predictions: "Mapping[str, Splits]") -> None:
    """Write a model's answers by task and split: a row an example, in the order of the data.

    Columns: task, split (string), row (int32, within its split), prediction and label (float64: a class id in the
    task's order, or the value of a regression task).
    """
    import numpy as np
    import pyarrow as pa
    import pyarrow.parquet as pq

    columns: dict[str, list[Any]] = {
        name: [] for name in ("task", "split", "row", "prediction", "label")
    }
    for task, splits in predictions.items():
        for split, answers in splits.items():
            count = len(answers.labels)
            columns["task"].append(np.repeat(task, count))
            columns["split"].append(np.repeat(split, count))
            columns["row"].append(np.arange(count, dtype=np.int32))
            columns["prediction"].append(answers.predicted.astype(np.float64))
            columns["label"].append(answers.labels.astype(np.float64))
    with whole_file(path) as file:
        pq.write_table(
            pa.table({name: np.concatenate(parts) for name, parts in columns.items()}), file
        )


def read_predictions(metrics: Path) -> "dict[str, dict[str, Answers]]":
    """The answers, by task and split, that a metrics file was computed from.

    Raises UserError when they are not beside it, or not those any more.
    """
    import pyarrow.parquet as pq

    from fmn.evaluate.bootstrap import Answers

    path = predictions_file(metrics)
    if not path.is_file() or digest_file(path) != read_json(metrics).get("predictions"):
        raise UserError(
            f"{path}: not there, or not the predictions that {metrics} is of; make both with `fmn evaluate`"
        )
    table = pq.read_table(path, columns=["task", "split", "prediction", "label"])
    names = list(zip(table["task"].to_pylist(), table["split"].to_pylist(), strict=True))
    starts = [row for row in range(len(names)) if row == 0 or names[row] != names[row - 1]]
    found: dict[str, dict[str, Answers]] = {}
    for start, end in zip(starts, [*starts[1:], len(names)], strict=True):
        task, split = names[start]
        answers = Answers(
            *(table[name].slice(start, end - start).to_numpy() for name in ("prediction", "label"))
        )
        found.setdefault(task, {})[split] = answers
    return found


def digest_values(path: Path) -> str:
    """sha256 of the numbers in a file of statistics, in hexadecimal; the same whatever its metadata say.

    Args:
        path: a Fisher artifact, or statistics in safetensors.
    """
    if path.suffix == ".safetensors":
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
        return digest_file(path, 8 + length)
    digest = hashlib.sha256()
    for values in read_fisher(path)[:2]:
        for site in sorted(values or {}):
            digest.update(repr(tuple(site)).encode())
            digest.update((values or {})[site].tobytes())
    return digest.hexdigest()


def _fisher_digest(columns: Mapping[str, Any], metadata: Mapping[str, Any]) -> str:
    digest = hashlib.sha256(canonical(metadata))
    for name in sorted(columns):
        digest.update(columns[name].tobytes())
    return digest.hexdigest()


def write_fisher(
    path: Path, fisher: "NodeValues", stderr: "NodeValues | None", metadata: Mapping[str, Any]
) -> None:
    """Write a Fisher artifact: a row per mask node, sorted by (layer, node, index).

    Args:
        path: the Parquet file.
        fisher: float64 [nodes] for each (layer, node kind).
        stderr: the same for the standard errors, or None where the estimator has none.
        metadata: what goes, as JSON, into the schema metadata under ``fmn`` beside the format and the digest.
    """
    import numpy as np
    import pyarrow as pa

    sites = sorted(fisher)
    rows = [len(fisher[site]) for site in sites]
    columns = {
        "layer": np.repeat(np.array([site[0] for site in sites], np.int16), rows),
        "node": np.repeat(np.array([site[1] for site in sites]), rows),
        "index": np.concatenate([np.arange(count, dtype=np.int32) for count in rows]),
        "fisher": np.concatenate([np.asarray(fisher[site], np.float64) for site in sites]),
    }
    if stderr is not None:
        columns["stderr"] = np.concatenate([np.asarray(stderr[site], np.float64) for site in sites])
    stated = {**metadata, "format": FISHER_FORMAT, "pyarrow": pa.__version__}
    stated["digest"] = _fisher_digest(columns, stated)
    with whole_file(path) as file:
        file.write_bytes(_fisher_bytes(columns, stated))


def _fisher_bytes(columns: Mapping[str, Any], stated: Mapping[str, Any]) -> bytes:
    """The Parquet file of a Fisher artifact, which depends on nothing but what it holds and PyArrow's version."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    errors = (
        pa.array(columns["stderr"])
        if "stderr" in columns
        else pa.nulls(len(columns["layer"]), pa.float64())
    )
    node = pa.array(columns["node"].tolist()).dictionary_encode()
    table = pa.table(
        {name: columns[name] for name in ("layer",)}
        | {"node": node}
        | {name: columns[name] for name in ("index", "fisher")}
        | {"stderr": errors}
    ).replace_schema_metadata({"fmn": json.dumps(stated, sort_keys=True)})
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd")
    return bytes(sink.getvalue().to_pybytes())


def read_fisher(path: Path) -> "tuple[NodeValues, NodeValues | None, dict[str, Any]]":
    """Read a Fisher artifact: (fisher, stderr or None, metadata); arrays are float64 [nodes] by (layer, node kind).

    Raises UserError for a file that is not a Fisher artifact, was damaged, or holds a value that cannot be a Fisher
    information (negative, NaN or infinite), naming its node.
    """
    import numpy as np
    import pyarrow as pa
    import pyarrow.parquet as pq

    from fmn.fisher.architectures import Site

    if not path.is_file():
        raise UserError(f"{path}: no such Fisher artifact; `fmn fisher` makes one")
    try:
        table = pq.read_table(path)
        metadata = json.loads((table.schema.metadata or {})[b"fmn"])
        columns = {
            "layer": table["layer"].to_numpy().astype(np.int16, casting="safe"),
            "node": np.array(table["node"].to_pylist(), dtype=str),
            "index": table["index"].to_numpy().astype(np.int32, casting="safe"),
            "fisher": table["fisher"].to_numpy().astype(np.float64, casting="safe"),
        }
        if not table["stderr"].null_count:
            columns["stderr"] = table["stderr"].to_numpy().astype(np.float64, casting="safe")
        digest = metadata.pop("digest")
    except (
        pa.ArrowException,
        OSError,
        KeyError,
        ValueError,
        TypeError,
        AttributeError,
        RecursionError,
    ) as error:
        told = f"{path}: not a Fisher artifact, or damaged; make it again with `fmn fisher`"
        raise machine.refusal(error, path) or UserError(told) from error
    if metadata.get("format") != FISHER_FORMAT:
        raise UserError(
            f"{path}: Fisher format {metadata.get('format')}, this fmn reads {FISHER_FORMAT}; make it again"
        )
    # A bit that decodes to nothing, in statistics or padding, must not go unnoticed: digests of the file depend on it.
    exact = metadata.get("pyarrow") != pa.__version__ or (
        path.read_bytes() == _fisher_bytes(columns, {**metadata, "digest": digest})
    )
    if not exact or not agrees(digest, lambda: _fisher_digest(columns, metadata)):
        raise UserError(
            f"{path}: its content is not what was written; make it again with `fmn fisher`"
        )

    sites = [
        Site(*site)
        for site in zip(columns["layer"].tolist(), columns["node"].tolist(), strict=True)
    ]
    for site, index, value in zip(sites, columns["index"], columns["fisher"], strict=True):
        if not (math.isfinite(value) and value >= 0):
            raise UserError(
                f"{path}: the Fisher of layer {site.layer}, {site.node} {index} is {value}; make it again"
            )
    starts = [row for row in range(len(sites)) if row == 0 or sites[row] != sites[row - 1]]
    spans = {
        sites[start]: slice(start, end)
        for start, end in zip(starts, [*starts[1:], len(sites)], strict=True)
    }
    for site, span in spans.items():
        if columns["index"][span].tolist() != list(range(span.stop - span.start)):
            raise UserError(
                f"{path}: the rows of layer {site.layer}, {site.node} are not numbered 0, 1, 2, ..."
            )
    fisher = {site: columns["fisher"][span] for site, span in spans.items()}
    stderr = (
        {site: columns["stderr"][span] for site, span in spans.items()}
        if "stderr" in columns
        else None
    )
    return fisher, stderr, metadata


def fisher_is_current(path: Path, key: str) -> bool:
    """Whether a Fisher artifact was made for this content key and is still what was written."""
    try:
        return bool(read_fisher(path)[2].get("key") == key)
    except UserError:
        return False
