"""Output for a person at a terminal: lines, tables, progress bars."""

import codecs
import os
import sys
import threading
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from fmn.errors import UserError, redacted, visible

_terminal: TextIO | None = None  # where our own messages go while standard error goes to a file
_is_loading = False
_LOADING = "loading ..."
_PLAIN = str.maketrans({"±": "+-", "−": "-", "–": "-", "—": "-", "…": "...", "×": "x", "≤": "<="})


def errors() -> TextIO:
    """The stream for messages that are not results."""
    return _terminal or sys.stderr


@contextmanager
def only_ours(log: Path) -> Iterator[None]:
    """Redirect standard error of libraries and other processes to a file.

    Only our own lines reach the terminal. This lasts until the process ends, because libraries
    write at exit too; only an unexpected exception ends it before.
    """
    global _terminal
    log.parent.mkdir(parents=True, exist_ok=True)
    if _terminal is None:
        _terminal = os.fdopen(os.dup(2), "w", buffering=1)
    _bars.console.file = _terminal
    with log.open("w") as file:
        os.dup2(file.fileno(), 2)
    try:
        yield
    except (UserError, KeyboardInterrupt):
        raise
    except Exception:
        os.dup2(_terminal.fileno(), 2)
        raise


def plain_characters() -> None:
    """Replace characters that the encoding of standard output or error does not have."""
    codecs.register_error("fmn.plain", _plain)
    for stream in (sys.stdout, sys.stderr):
        encoding = (getattr(stream, "encoding", None) or "utf-8").lower().replace("-", "")
        if encoding != "utf8" and hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="fmn.plain")


def _plain(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    lacking = error.object[error.start].translate(_PLAIN)
    plain = unicodedata.normalize("NFKD", lacking).encode("ascii", "ignore").decode()
    return plain or "?", error.start + 1


def loading() -> None:
    """Show "loading ..." on a terminal, until something else is printed."""
    global _is_loading
    if not _is_loading and errors().isatty():
        _is_loading = True
        print(_LOADING, end="", file=errors(), flush=True)


def loaded() -> None:
    """Remove the text of `loading`; called before anything else is printed."""
    global _is_loading
    if _is_loading:
        _is_loading = False
        print("\r" + " " * len(_LOADING) + "\r", end="", file=errors(), flush=True)


def complain(message: str) -> None:
    """Print an error message in one line."""
    loaded()
    print(f"fmn: {visible(redacted(message))}", file=errors(), flush=True)


def say(*lines: object, wrap: bool = False) -> None:
    """Print lines without colours.

    Args:
        lines: the lines.
        wrap: whether to break long lines between words.
    """
    loaded()
    console = Console(highlight=False, soft_wrap=not wrap, markup=False, emoji=False)
    for line in lines:
        console.print(visible(str(line), but="\n\t"))


def show_table(header: Sequence[str], body: Sequence[Sequence[str]], words: int = 1) -> None:
    """Print a table, if it has rows; the first `words` columns are text, the others numbers."""
    if not body:
        return
    loaded()
    table = Table(box=None, pad_edge=False, header_style="bold")
    for number, name in enumerate(header):
        table.add_column(name, justify="left" if number < words else "right")
    for row in body:
        table.add_row(*map(visible, row))
    # A narrow terminal wraps whole lines, not cells.
    natural = Console(width=10_000).measure(table).maximum
    console = Console(highlight=False, soft_wrap=True, markup=False, emoji=False, width=natural)
    console.print(table)


_bars = Progress(console=Console(stderr=True), transient=True)
_changing = threading.Lock()


@contextmanager
def progress_bar(title: str) -> Iterator[Callable[[int, int], None]]:
    """Show a progress bar on a terminal; yields a function of (done, total)."""
    with _bar(title) as update:
        yield lambda done, total: update(completed=done, total=total)


@contextmanager
def status_line(title: str) -> Iterator[Callable[[str], None]]:
    """Show a line below the others on a terminal; yields a function that changes its text."""
    with _bar(title) as update:
        yield lambda text: update(description=text)


@contextmanager
def _bar(title: str) -> Iterator[Callable[..., None]]:
    if not _bars.console.is_terminal:
        yield lambda **changes: None
        return
    with _changing:
        loaded()
        task = _bars.add_task(title, total=None)
        _bars.start()
    try:
        yield lambda **changes: _bars.update(task, **changes)
    finally:
        with _changing:
            _bars.remove_task(task)
            if not _bars.task_ids:
                _bars.stop()
