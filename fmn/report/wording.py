"""Numbers, names and tables of a report as text."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from fmn.errors import redacted
from fmn.evaluate.bootstrap import Difference
from fmn.evaluate.files import TaskRows
from fmn.evaluate.metrics import higher_is_better
from fmn.tasks.dataset import HUB
from fmn.tasks.task import Task

MINUS = "\N{MINUS SIGN}"
UNDEFINED = "undefined"
DATA_SETS = {"hub": (HUB, "GLUE"), "embedded": ("fmn/miniature-glue", "miniature GLUE")}
"""By source of the rows: their id in a model card, and a title."""
TextTable = tuple[list[str], list[list[str]]]
"""Header and rows."""


def shown(value: float | None, is_percent: bool = True, digits: int = 1) -> str:
    """A share in percent, or an error as a plain number; "undefined" for None."""
    if value is None:
        return UNDEFINED
    plain = f"{value:,.0f}" if abs(value) >= 1e4 else f"{value:.4g}"
    text = f"{100 * value:z.{digits}f}" if is_percent else plain
    return text.replace("-", MINUS)


def span(interval: Sequence[float] | None, is_percent: bool = True) -> str:
    """An interval, "LOW to HIGH"; "" for None."""
    return " to ".join(shown(end, is_percent) for end in interval or ())


def points(value: float | None, is_percent: bool = True) -> str:
    """A difference in percent points, or of errors, with its sign."""
    sign = "+" if value is not None and value >= 0 else ""
    return sign + shown(value, is_percent)


def difference_span(difference: Difference) -> str:
    """The interval of a difference as text; "" for a difference without an interval."""
    ends = difference.interval or ()
    return " to ".join(points(end, difference.higher_is_better) for end in ends)


def p_value(difference: Difference) -> str:
    """A p-value; with "≤" if no resample has the other sign."""
    return f"p {'≤' if difference.is_floor else '='} {difference.p_value:.3f}"


def plain(value: float) -> str:
    """A number of the settings, with a minus sign."""
    return f"{value:.4g}".replace("-", MINUS)


def seconds(value: float) -> str:
    """A run time: "0.4 s", "75 s", "13 min"."""
    if value >= 600:
        return f"{value / 60:.0f} min"
    return f"{value:.1f} s" if value < 10 else f"{value:.0f} s"


def listed(words: Sequence[str]) -> str:
    """ "a", "a and b", "a, b and c"; "nothing"."""
    *first, last = words or ["nothing"]
    return f"{', '.join(first)} and {last}" if first else last


def metric_words(task: Task) -> str:
    """The names of the metrics whose mean is a task's score."""
    names = " + ".join(metric.replace("_", " ") for metric in task.score_metrics)
    return names if not task.metrics or higher_is_better(task) else f"{names} (less is better)"


def task_table(tasks: Mapping[str, Task], data: Mapping[str, TaskRows]) -> TextTable:
    """Header and rows: the tasks' kinds, labels, scores and lengths, and the origin of the rows."""
    body = [
        [
            name,
            (task.problem_type or task.task * task.generates).replace("_", " "),
            short_list(task.labels),
            metric_words(task),
            str(task.max_length),
            origin(data[name]) if name in data else "",
        ]
        for name, task in tasks.items()
    ]
    return ["task", "kind", "labels", "score", "tokens at most", "rows"], body


def origin(rows: TaskRows) -> str:
    """The origin of a task's rows in words, without folders of this machine."""
    source = redacted(rows.source)
    name = DATA_SETS[source][1] if source in DATA_SETS else source
    words = [Path(name).name if Path(name).is_absolute() else name]
    words += [f"revision {rows.revision}"] if rows.revision else []
    words += [f"seed {rows.seed}"] if rows.seed is not None else []
    return ", ".join(words)


def task_titles(tasks: Mapping[str, Task]) -> dict[str, str]:
    """A short description of each task: its problem type and its labels."""
    titles = {}
    for name, task in tasks.items():
        words = [(task.problem_type or task.task).replace("_", " "), short_list(task.labels)]
        titles[name] = ": ".join(filter(None, words))
    return titles


def short_list(names: Sequence[str], most: int = 8, length: int = 32) -> str:
    """Names with commas; long lists and long names are cut."""
    words = [name if len(name) <= length else f"{name[: length - 1]}…" for name in names[:most]]
    return ", ".join(words) + (f", ... ({len(names)} labels)" if len(names) > most else "")


def markdown(header: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    """A Markdown table of cells without markup."""
    rule = ["---"] * len(header)
    lines = [[escaped(cell) for cell in header], rule, *([*map(escaped, line)] for line in body)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def escaped(text: str) -> str:
    """Escape a text so that Markdown shows it unchanged, in one line and in tables too."""
    marks = r"([\\`*~<\[|&$]|(?<![^\W_])_|_(?![^\W_]))"  # not an underscore within a word
    return re.sub(marks, r"\\\1", " ".join(text.split()))


def code(text: str) -> str:
    """A text in one line as Markdown's code, in a table too.

    >>> code("a`b")
    '``a`b``'
    """
    line = " ".join(text.split()).replace("|", "\\|")
    ticks = "`" * (1 + max(map(len, re.findall("`+", line)), default=0))
    pad = " " * (line.startswith("`") or line.endswith("`"))
    return f"{ticks}{pad}{line}{pad}{ticks}"
