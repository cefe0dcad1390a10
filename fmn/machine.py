"""What the machine refuses: room on a disk, memory, a permission. Every library says it in its own words."""

import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fmn.errors import UserError

_FULL = (errno.ENOSPC, errno.EDQUOT)
_FORBIDDEN = (errno.EACCES, errno.EPERM, errno.EROFS)
# What libraries say that give no number: Rust's safetensors, SQLite, datasets; PyTorch, PyArrow, C++, SciPy.
_FULL_SAID = ("No space left on device", "database or disk is full", "Not enough disk space", "Disk quota exceeded")
_FORBIDDEN_SAID = (
    "attempt to write a readonly database", "unable to open database file", "Permission denied (os error",
    "Read-only file system",
)  # fmt: skip
_MEMORY_SAID = (
    "DefaultCPUAllocator", "CUDA out of memory", "CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED", "Cannot allocate memory", "std::bad_alloc",
)  # fmt: skip
_LITTLE = 1_000_000  # bytes
_REMEDY = "run again to go on from here"


def origins(error: BaseException | None) -> Iterator[BaseException]:
    """The error, and what it was raised from."""
    while error is not None:
        yield error
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)


def refusal(error: BaseException, place: Path | None = None) -> UserError | None:
    """What to tell of an error that comes of a full disk, a missing permission or want of memory; None for any other.

    A UserError tells it itself, so it is one of the others.

    Args:
        error: as it was raised.
        place: what was to be written.
    """
    for one in origins(None if isinstance(error, UserError) else error):
        number = one.errno if isinstance(one, OSError) else None
        full = number in _FULL or _says(one, _FULL_SAID)
        if full or _says(one, ("disk I/O error",)):  # SQLite's, where its journal finds no room
            folder, room = _fullest(one, place)
            if full or room < _LITTLE:
                disk = f"the disk of {folder} ({room / 1e6:.1f} MB free)"
                return _told(place or _file(one), f"no space left on {disk}; make room there and {_REMEDY}")
        if number == errno.EFBIG:
            return _told(
                place or _file(one), "a file larger than the disk's file system, or a limit, takes; name another place"
            )
        if number in _FORBIDDEN or _says(one, _FORBIDDEN_SAID):
            reason = "the file system is read-only" if number == errno.EROFS else "no permission"
            remedy = "give this user the right to read and write there, or name another place"
            return _told(_file(one) or place, f"{reason}; {remedy}")
        if type(one).__name__ == "BrokenProcessPool":
            return _told(place, f"a process was killed, perhaps for want of memory; free some, and {_REMEDY}")
        if isinstance(one, MemoryError) or number == errno.ENOMEM or _says(one, _MEMORY_SAID):
            whose = "the GPU's memory" if "CU" in str(one) else "the memory"
            remedy = "end what else takes it, or take a smaller batch_size, fewer workers or another device"
            return _told(place, f"{whose} does not suffice; {remedy}, and {_REMEDY}")
    return None


@contextmanager
def refusals_told(place: Path | None = None) -> Iterator[None]:
    """What the machine refuses within becomes a UserError; UserErrors stay as they are."""
    try:
        yield
    except Exception as error:
        if told := refusal(error, place):
            raise told from error
        raise


def _says(error: BaseException, words: tuple[str, ...]) -> bool:
    return not isinstance(error, UserError) and any(word in str(error) for word in words)


def _told(place: Path | None, what: str) -> UserError:
    return UserError(f"{place}: {what}" if place else what)


def _file(error: BaseException) -> Path | None:
    """The file that an error names: of a copy, the one that was to be written."""
    name = getattr(error, "filename2", None) or getattr(error, "filename", None)
    return Path(os.fsdecode(name)) if isinstance(name, str | bytes) else None


def _fullest(error: BaseException, place: Path | None) -> tuple[Path, int]:
    """Of the disks that it may have been, a folder on the one with the least room, and that; the output's of equals."""
    cache = Path(os.environ.get("HF_HOME") or Path.home() / ".cache" / "huggingface")
    folders = [_existing(path) for path in (place, _file(error), Path(tempfile.gettempdir()), cache) if path]
    room = {folder: shutil.disk_usage(folder).free for folder in folders}
    folder = min(room, key=room.__getitem__)
    return folder, room[folder]


def _existing(path: Path) -> Path:
    """The folder itself, or the nearest one above it that is there."""
    path = path.absolute()
    while not os.path.isdir(path) and path != path.parent:  # noqa: PTH112 - where this process may not look, too
        path = path.parent
    return path
