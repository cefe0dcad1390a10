"""What a person at a terminal sees: lines, tables, progress bars."""

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table


def say(*lines: object) -> None:
    """Print lines as they are, without wrapping or colouring them."""
    console = Console(highlight=False, soft_wrap=True, markup=False)
    for line in lines:
        console.print(line)


def show_table(header: Sequence[str], body: Sequence[Sequence[str]], words: int = 1) -> None:
    """Print a table: its first columns are words, so many, the others are aligned as numbers."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for place, name in enumerate(header):
        table.add_column(name, justify="left" if place < words else "right")
    for row in body:
        table.add_row(*row)
    say(table)


_bars = Progress(
    TextColumn("{task.description}"),
    BarColumn(),
    MofNCompleteColumn(),
    TimeElapsedColumn(),
    TimeRemainingColumn(),
    console=Console(stderr=True),
    transient=True,
)
_changing = threading.Lock()


@contextmanager
def progress_bar(title: str) -> Iterator[Callable[[int, int], None]]:
    """A progress bar on a terminal, beside those that are there; nothing elsewhere. Yields what takes (done, total)."""
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
