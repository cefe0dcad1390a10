"""Write files whole or not at all, and compute the digests that identify their content."""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import filelock

from fmn.errors import UserError

SIDECAR = "fmn.json"  # in a folder; beside a file NAME it is NAME.fmn.json (`fmn.store.stage`)
CARD = "README.md"  # people may edit it, so it is not part of a folder's digest

_digests: dict[tuple[int, ...], str] = {}  # by `_identity`


def digest_bytes(content: bytes) -> str:
    """sha256 of bytes, in hexadecimal."""
    return hashlib.sha256(content).hexdigest()


def canonical(value: Any) -> bytes:
    """JSON bytes that are the same for equal values: sorted keys, no spaces, no NaN."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def digest_file(path: Path) -> str:
    """sha256 of a file, in hexadecimal; an unchanged file is read only once in a process."""
    identity = _identity(path)
    if identity not in _digests:
        with path.open("rb") as file:
            _digests[identity] = hashlib.file_digest(file, "sha256").hexdigest()
    return _digests[identity]


def remember_digest(path: Path, digest: str) -> None:
    """Tell `digest_file` the sha256 of a file that was just written, so that it is not read.

    Call it after the last hard link and renaming of the file, as these change its status. Renaming
    its folder does not.
    """
    _digests[_identity(path)] = digest


def _identity(path: Path) -> tuple[int, ...]:
    status = path.stat()
    times = (status.st_mtime_ns, status.st_ctime_ns)
    return (status.st_dev, status.st_ino, status.st_size, *times)


def visible(folder: Path, only: Sequence[str] = ()) -> dict[str, Path]:
    """The files below a folder by relative name, in order, without hidden ones.

    Args:
        folder: the folder.
        only: names of folders in it; default: everything.
    """
    paths: list[Path] = []
    for part in only or [""]:
        for parent, folders, names in os.walk(folder / part):
            folders[:] = [name for name in folders if not name.startswith(".")]
            paths += [Path(parent, name) for name in names if not name.startswith(".")]
    files = (path for path in sorted(paths) if path.is_file())
    return {path.relative_to(folder).as_posix(): path for path in files}


def check_folder(folder: Path) -> None:
    """Raise a `UserError` if a folder does not exist."""
    if not folder.is_dir():
        problem = (
            "is a file; give the folder of it"
            if folder.is_file()
            else f"{absent(folder)}; check the path"
        )
        raise UserError(f"{folder}: {problem}")


def absent(path: Path, what: str = "folder") -> str:
    """What to say of a path that leads nowhere: that it is a link, if it is one.

    >>> absent(Path("nowhere"))
    'no such folder'
    """
    if path.is_symlink():
        return f"a symbolic link to {path.readlink()}, which is not there"
    return f"no such {what}"


def digest_files(folder: Path) -> dict[str, str]:
    """sha256 of every file below a folder by relative name, without sidecar and card."""
    check_folder(folder)
    files = visible(folder).items()
    return {name: digest_file(path) for name, path in files if name not in (SIDECAR, CARD)}


def digest_folder(folder: Path) -> str:
    """One sha256 for all files below a folder, without sidecar and card."""
    return digest_bytes(canonical(digest_files(folder)))


def differing(expected: Mapping[str, str], actual: Mapping[str, str]) -> str | None:
    """The first name whose digests differ, or that is only on one side; None if there is none."""
    names = sorted({*expected, *actual})
    return next((name for name in names if expected.get(name) != actual.get(name)), None)


def content_key(
    stage: str, version: int, settings: Mapping[str, Any], inputs: Mapping[str, str]
) -> str:
    """The digest of everything that the output of a stage depends on."""
    parts = {"stage": stage, "version": version, "settings": settings, "inputs": inputs}
    return digest_bytes(canonical(parts))


@contextmanager
def locked(out: Path) -> Iterator[None]:
    """Lock an output for the other processes of this user and machine.

    The lock ends with the process. Lock files are in the system's temporary folder.
    """
    folder = Path(tempfile.gettempdir()) / f"fmn-locks-{os.geteuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    with filelock.FileLock(folder / digest_bytes(str(out.resolve()).encode())):
        yield


@contextmanager
def scratch_folder(out: Path) -> Iterator[Path]:
    """Make an empty folder beside an output, to write it in; it is removed at the end."""
    scratch = out.with_name(f".{out.name}.partial")
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    try:
        yield scratch
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def discard(path: Path) -> None:
    """Remove a file of `atomic_file`, and the scratch folder that a killed process left."""
    path.unlink(missing_ok=True)
    shutil.rmtree(path.with_name(f".{path.name}.partial"), ignore_errors=True)


def publish_folder(scratch: Path, out: Path) -> None:
    """Flush a scratch folder to the disk, then move it to `out`, replacing a folder there."""
    _flush_all(scratch)
    old = out.with_name(f".{out.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if out.exists():
        out.rename(old)
    scratch.rename(out)
    _flush(out.parent)
    shutil.rmtree(old, ignore_errors=True)


def publish_files(scratch: Path, folder: Path, first: str = "") -> None:
    """Move the files of a scratch folder into a folder; the one named `first` before the others."""
    _flush_all(scratch)
    for path in sorted(scratch.iterdir(), key=lambda path: path.name != first):
        path.replace(folder / path.name)
    _flush(folder)


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """A path to write a file to; the file moves to `path` if the block ends without an error."""
    with scratch_folder(path) as scratch:
        yield scratch / path.name
        publish_files(scratch, path.parent)


def _flush_all(folder: Path) -> None:
    # In parallel, so that the file system's journal commits once.
    with ThreadPoolExecutor() as threads:
        list(threads.map(_flush, {path.stat().st_ino: path for path in folder.rglob("*")}.values()))
    _flush(folder)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
