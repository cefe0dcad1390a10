"""Errors that the user can fix: mistakes, a full disk, a missing permission, or too little memory.

`UserError` is the exception for all of them. The command line and `fmn.store.stage.run_stage` use
`system_error` to recognise problems of the system in the exceptions of libraries.
"""

import difflib
import errno
import os
import re
import shutil
import socket
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from itertools import islice
from pathlib import Path

HIDDEN = "***"
_SECRET_NAME = re.compile(
    r"(TOKEN(?!IZERS)|SECRET|PASSW|API_?KEY|ACCESS_KEY|CREDENTIAL|WEBHOOK)(?!\w*_(FILE|PATH|DIR)$)"
)
_SHORTEST_SECRET = 6  # characters; a shorter value may occur in any text
_USER = re.compile(r"(\w+://)([^/\s'\"@]+(?:@[^/\s'\"@]+)*)@(?=[\w\[*])")
_QUERY = re.compile(r"(?i)([?&][\w-]*(?:token|key|password|secret|signature|sig)=)[^&\s'\"]+")


class UserError(Exception):
    """An error that the user can fix. Its message is one line: ``place: problem; remedy``.

    The command line prints it without a traceback; any other exception is a bug. Secrets are
    removed from the message (`redacted`).
    """

    def __init__(self, message: object = "") -> None:
        super().__init__(visible(redacted(str(message))))


HIDING = {
    *(character for character in range(0xA0) if not chr(character).isprintable()),  # control
    *(0x2028, 0x2029),  # ends of lines and paragraphs
    *(0x202A, 0x202B, 0x202C, 0x202D, 0x202E, 0x2066, 0x2067, 0x2068, 0x2069),  # other direction
    *range(0xD800, 0xE000),  # halves of characters, which no file can hold
} - {ord("\N{NO-BREAK SPACE}")}
"""Characters that end a line, change the order of others, or control a terminal."""
_ESCAPES = {character: ascii(chr(character))[1:-1] for character in HIDING}


def visible(text: str, but: str = "") -> str:
    """Replace invisible characters of a text, such as ESC or a newline, by Python's escapes.

    >>> visible("a name\\nin two lines")
    'a name\\\\nin two lines'

    Args:
        text: any text.
        but: characters that are not replaced.
    """
    return text.translate({key: word for key, word in _ESCAPES.items() if chr(key) not in but})


def redacted(text: str) -> str:
    """Remove secrets from a text.

    These are the values of environment variables with names such as TOKEN or PASSWORD, user names
    and passwords in addresses, and tokens and keys in their queries.

    >>> redacted("postgresql://me:pw@host/mlflow")
    'postgresql://host/mlflow'
    """
    secrets = [value for name, value in os.environ.items() if _SECRET_NAME.search(name.upper())]
    for secret in sorted(secrets, key=len, reverse=True):
        if len(secret) >= _SHORTEST_SECRET:
            text = text.replace(secret, HIDDEN)
    return _QUERY.sub(rf"\1{HIDDEN}", _USER.sub(_without_user, text))


def _without_user(address: re.Match[str]) -> str:
    scheme, user = address.groups()
    is_revision = scheme == "hf://" and ":" not in user  # hf://name@revision
    return address[0] if is_revision else scheme


def hint(name: str, known: Iterable[str]) -> str:
    """The end of a message about an unknown name: the nearest known name, if one is similar."""
    close = difflib.get_close_matches(name[:100], list(islice(known, 1000)), n=1)  # fast enough
    return f"; did you mean {close[0]!r}?" if close else ""


def refuse_taken_port(port: int, setting: str) -> None:
    """Raise UserError if a program listens at a port of loopback; `setting` names another port."""
    with suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
        raise UserError(f"port {port}: is taken by another program; end that, or set {setting}")


_DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
_WRONG_PATH = {
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.ENOTDIR: "a part of this path is a file: choose another path",
    errno.ELOOP: "a link leads back to itself: correct it",
}
_FORBIDDEN = (errno.EACCES, errno.EPERM, errno.EROFS)
# Messages of libraries whose exceptions have no errno: safetensors, SQLite, datasets, PyTorch
# ("iostream error"), C++.
_DISK_FULL_WORDS = re.compile(
    "No space left on device|database or disk is full|Not enough disk space|Disk quota exceeded"
    "|iostream error"
)
_FORBIDDEN_WORDS = re.compile(
    "attempt to write a readonly database|unable to open database file"
    r"|Permission denied \(os error|Read-only file system"
)
_MEMORY_WORDS = re.compile(
    r"DefaultCPUAllocator|CUDA (error: )?out of memory|_STATUS_ALLOC_FAILED"
    r"|Cannot allocate memory|std::bad_alloc"
)
_ALMOST_FULL = 1_000_000  # bytes free
_RETRY = "run again to go on from here"


def causes(error: BaseException | None) -> Iterator[BaseException]:
    """An exception and its causes, the latest first."""
    while error is not None:
        yield error
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)


def system_error(error: BaseException, place: Path | None = None) -> UserError | None:
    """The UserError for a full disk, a missing permission or too little memory.

    Args:
        error: the exception; its causes are examined too.
        place: the output of the failed step, if there is one.

    Returns:
        None if the error has another cause.
    """
    for cause in causes(error):
        if not isinstance(cause, UserError) and (message := _system_message(cause, place)):
            return UserError(message)
    return None


def _system_message(error: BaseException, place: Path | None) -> str | None:
    number = error.errno if isinstance(error, OSError) else None
    file, words = _file_of(error), str(error)
    is_full = number in _DISK_FULL or _DISK_FULL_WORDS.search(words)
    if is_full or "disk I/O error" in words:  # SQLite: no room for its journal
        folder, free = _fullest_disk(file, place)
        if is_full and not (place or file) and free > _ALMOST_FULL:
            return "standard output: no space left on device; write it elsewhere"
        if is_full or free < _ALMOST_FULL:
            disk = f"the disk of {folder} ({free / 1e6:.1f} MB free)"
            return _at(place or file, f"no space left on {disk}; make room there and {_RETRY}")
    if number in _FORBIDDEN or _FORBIDDEN_WORDS.search(words):
        reason = "the file system is read-only" if number == errno.EROFS else "no permission"
        remedy = "give this user the right to read and write there, or name another place"
        return _at(file or place, f"{reason}; {remedy}")
    if type(error).__name__ == "BrokenProcessPool":
        reason = "a process was killed, perhaps for lack of memory"
        return _at(place, f"{reason}; free some memory, and {_RETRY}")
    if file and number in _WRONG_PATH:
        return _at(file, f"{os.strerror(number)}; {_WRONG_PATH[number]}")
    is_out_of_memory = isinstance(error, MemoryError) or number == errno.ENOMEM
    if is_out_of_memory or _MEMORY_WORDS.search(words):
        memory = "the GPU's memory" if "CU" in words else "the memory"
        remedy = "free some, or use a smaller batch_size, fewer workers or another device"
        return _at(place, f"{memory} does not suffice; {remedy}, and {_RETRY}")
    return None


@contextmanager
def system_errors_explained(place: Path | None = None) -> Iterator[None]:
    """Raise UserError in place of an exception that `system_error` can explain."""
    try:
        yield
    except Exception as error:
        if explanation := system_error(error, place):
            raise explanation from error
        raise


def _at(place: Path | None, message: str) -> str:
    return f"{place}: {message}" if place else message


def _file_of(error: BaseException) -> Path | None:
    """The file that an error names; for a copy, the target."""
    name = getattr(error, "filename2", None) or getattr(error, "filename", None)
    return Path(os.fsdecode(name)) if isinstance(name, str | bytes) else None


def _fullest_disk(file: Path | None, place: Path | None) -> tuple[Path, int]:
    """The folder with the least free disk space among those in use, and its free bytes."""
    cache = Path(os.environ.get("HF_HOME") or Path.home() / ".cache" / "huggingface")
    free = {}
    for path in (place, file, Path(tempfile.gettempdir()), cache):
        if path is not None:
            parents = [path.absolute(), *path.absolute().parents]
            folder = next(parent for parent in parents if os.path.isdir(parent))  # noqa: PTH112
            free[folder] = shutil.disk_usage(folder).free
    return min(free.items(), key=lambda item: item[1])
