"""What a person at a terminal sees: lines, tables, progress bars."""

import os
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from fmn.errors import UserError, redacted

_terminal: TextIO | None = None  # where our own messages go while standard error goes to a file


def errors() -> TextIO:
    """Where messages to the person at the terminal go that are no results."""
    return _terminal or sys.stderr


@contextmanager
def only_ours(log: Path) -> Iterator[None]:
    """Send to a file what libraries and other processes write on standard error.

    Only our own lines reach the terminal. That lasts until this process ends, because libraries
    write at exit too; only an unforeseen exception ends it.
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


def complain(message: str) -> None:
    """Say what went wrong, in one line."""
    print(f"fmn: {redacted(message)}", file=errors(), flush=True)


def say(*lines: object, wrap: bool = False) -> None:
    """Print lines as they are, without colouring them; `wrap`: sentences, at the terminal's end."""
    console = Console(highlight=False, soft_wrap=not wrap, markup=False)
    for line in lines:
        console.print(line)


def show_table(header: Sequence[str], body: Sequence[Sequence[str]], words: int = 1) -> None:
    """Print a table; the first columns, `words` of them, are text, the others numbers."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for number, name in enumerate(header):
        table.add_column(name, justify="left" if number < words else "right")
    for row in body:
        table.add_row(*row)
    # A narrow terminal wraps the lines, which reads better than wrapped cells.
    natural = Console(width=10_000).measure(table).maximum
    Console(highlight=False, soft_wrap=True, markup=False, width=natural).print(table)


_bars = Progress(console=Console(stderr=True), transient=True)
_changing = threading.Lock()


@contextmanager
def progress_bar(title: str) -> Iterator[Callable[[int, int], None]]:
    """A progress bar, if there is a terminal; yields a function that takes (done, total)."""
    if not _bars.console.is_terminal:
        yield lambda done, total: None
        return
    with _changing:
        task = _bars.add_task(title, total=None)
        _bars.start()
    try:
        yield lambda done, total: _bars.update(task, completed=done, total=total)
    finally:
        with _changing:
            _bars.remove_task(task)
            if not _bars.task_ids:
                _bars.stop()
