"""What every picture has: its style, its size, its markers, and words for whoever cannot see it.

Every picture can be read without colours: by position, by the shape of a marker, or by numbers in it. The colours are
those of Okabe and Ito (2008), and for maps cividis (Nunez, Anderton and Renslow 2018), which colour-blind readers see
as others do, and which print in grey in the right order.
"""

import io
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from fmn.report.results import EXPERT

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, SOFT, FAINT = "#1f2328", "#59636e", "#d1d6dc"
MARKERS: Mapping[str, tuple[str, str]] = {
    "base": ("v", "#8c959f"),
    "average": ("o", "#E69F00"),
    EXPERT: ("s", INK),
}
HEADLINE = ("D", "#0072B2")
OTHERS = (("^", "#009E73"), ("P", "#CC79A7"), ("X", "#D55E00"), ("<", "#56B4E9"), (">", "#000000"))
INCHES = 9.2  # width of a picture: that of a page's text at its natural size
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "fmn",  # the same picture is the same file
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],  # wide, so that what a reader has instead fits too
    "font.size": 9,
    "text.color": INK,
    "axes.labelcolor": SOFT,
    "axes.edgecolor": FAINT,
    "axes.titlesize": 9.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "xtick.color": FAINT,
    "ytick.color": FAINT,
    "xtick.labelcolor": SOFT,
    "ytick.labelcolor": INK,
    "grid.color": "#e6e9ed",
    "legend.frameon": False,
    "hatch.linewidth": 0.6,
}


class Picture(NamedTuple):
    """A picture: its file's name, what it is of, what it shows in words, how to read it, and the SVG itself."""

    name: str
    title: str
    finding: str
    reading: str
    svg: str


def write(folder: Path, drawn: Sequence[Picture]) -> None:
    """Write every picture as NAME.svg into a new folder."""
    folder.mkdir(parents=True)
    for picture in drawn:
        (folder / f"{picture.name}.svg").write_text(picture.svg + "\n")


@contextmanager
def style() -> Iterator[None]:
    import matplotlib as mpl

    with mpl.rc_context(STYLE):
        yield


def figure(
    height: float, rows: int = 1, columns: int = 1, **options: Any
) -> "tuple[Figure, np.ndarray]":
    """A figure of a page's width, and its axes [rows, columns]."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(INCHES, height), layout="constrained")
    axes: np.ndarray = figure.subplots(rows, columns, squeeze=False, **options)
    return figure, axes


def panels(count: int, height: float, **options: Any) -> "tuple[Figure, list[Axes], int]":
    """A figure of small panels, its axes, and how many stand in a row; `height`: of a row, in inches."""
    rows = -(-count // 4)
    columns = max(2, -(-count // rows))
    paper, axes = figure(rows * height + 0.2, rows, columns, **options)
    for axis in axes.flat[count:]:
        axis.set_axis_off()
    return paper, list(axes.flat[:count]), columns


def picture(
    figure: "Figure", name: str, title: str, finding: str, reading: str, details: str = ""
) -> Picture:
    """The figure as SVG for a screen reader too, with ids that no other picture of a page has.

    `details`: what a screen reader says beside the finding.
    """
    file = io.StringIO()
    figure.savefig(
        file, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type"))
    )
    svg = file.getvalue()
    svg = svg[svg.index("<svg") :].strip()
    svg = re.sub(r"(\d\.\d\d)\d+", r"\1", svg)  # hundredths of a point are enough
    svg = re.sub(r'(\bid="|xlink:href="#|url\(#)', rf"\g<1>{name}-", svg)
    said = f"{finding} {details}".strip()
    words = f'<title id="{name}-title">{escape(title)}</title><desc id="{name}-desc">{escape(said)}</desc>'
    start = svg.index(">")
    attributes = f' role="img" aria-labelledby="{name}-title {name}-desc"'
    return Picture(
        name, title, finding, reading, f"{svg[:start]}{attributes}>{words}{svg[start + 1 :]}"
    )


def look(names: Sequence[str], headline: str) -> dict[str, tuple[str, str]]:
    """The marker and the colour of every column."""
    others = iter(OTHERS * len(names))
    return {
        name: HEADLINE if name == headline else MARKERS.get(name) or next(others) for name in names
    }


def legend(figure: "Figure", look: Mapping[str, tuple[str, str]]) -> None:
    from matplotlib.lines import Line2D

    lines = [
        Line2D([], [], marker=marker, color=colour, linewidth=1.2, markersize=5.5)
        for marker, colour in look.values()
    ]
    figure.legend(
        lines, list(look), loc="outside upper left", ncols=len(look), fontsize=9.5, handlelength=2.2
    )


def listed(words: Sequence[str]) -> str:
    """ "a", "a and b", "a, b and c"."""
    *first, last = words
    return f"{', '.join(first)} and {last}" if first else last
