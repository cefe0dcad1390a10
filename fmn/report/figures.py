"""The pictures of a report: SVG, each with a sentence that states its finding.

To add a picture, write a function and enter it in a table at the end. The first line of its
docstring is the picture's title, the rest explains to the reader how to read it. The function
returns the figure and its finding, or None if there are no data for it.

Every picture can be read without colours: by position, by the shape of a marker, or by numbers.
The colours are those of Okabe and Ito (2008), and for maps cividis (Nunez, Anderton and Renslow
2018): colour-blind readers can tell them apart, and in grey they keep their order.
"""

import inspect
import io
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from html import escape
from itertools import product
from pathlib import Path
from textwrap import fill
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import numpy as np

from fmn.fisher.architectures import NodeValues, Site
from fmn.report import wording
from fmn.report.comparison import Comparison
from fmn.report.results import AVERAGE, EXPERT, MACRO, Estimate, Report
from fmn.report.wording import seconds, shown

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, SOFT, FAINT, BLUE, RED = "#1f2328", "#59636e", "#d1d6dc", "#0072B2", "#D55E00"
HEADLINE = ("D", BLUE)
"""Marker and colour of the headline; then those of the bounds, and of all other columns."""
BOUNDS = {"base": ("v", "#8c959f"), AVERAGE: ("o", "#E69F00"), EXPERT: ("s", INK)}
OTHERS = (("^", "#009E73"), ("P", "#CC79A7"), ("X", RED), ("<", "#56B4E9"), (">", SOFT))
WHITE, BAR = "#fefefe", "#9cc4e4"  # a white that `THEMED` does not replace; bars behind names
THEMED = {
    "#ffffff": "paper", INK: "ink", SOFT: "soft", FAINT: "line", "#e6e9ed": "grid",
    BLUE.lower(): "blue", BAR: "bar", "#8c959f": "dim", "#eceff2": "faint",
}  # fmt: skip
"""Colours that a page replaces by its own, for light and dark pages."""
INCHES, NARROW = 9.2, 4.2  # width of a picture on a page, and on a phone
DARK = 0.55  # numbers are white in cells below this part of a colour scale
STYLE = Path(__file__).parent / "templates" / "pictures.mplstyle"

T = TypeVar("T")
Drawn = tuple["Figure", str] | None
"""A figure and its finding."""


class Picture(NamedTuple):
    """A picture of a page.

    Attributes:
        name: the file's name without suffix.
        title: the title.
        finding: a sentence about the result that it shows.
        reading: how to read it.
        svg: the picture.
        narrow: the picture for a phone; "" for a map, which readers scroll.
    """

    name: str
    title: str
    finding: str
    reading: str
    svg: str
    narrow: str = ""


def draw(pictures: Mapping[Callable[[T], Drawn], str], content: T) -> dict[str, list[Picture]]:
    """Draw the pictures of a report or a comparison, by section of its page."""
    import matplotlib as mpl

    sections: dict[str, list[Picture]] = {section: [] for section in pictures.values()}
    with mpl.rc_context({"figure.figsize": (INCHES, 1)}, STYLE):
        for make, section in pictures.items():
            if drawn := make(content):
                name = make.__name__.replace("_", "-")
                title, _, reading = (inspect.getdoc(make) or "").partition(".\n\n")
                svg = _svg(drawn[0], name, title, drawn[1])
                narrow = ""
                if make in FOR_PHONES:
                    with mpl.rc_context({"figure.figsize": (NARROW, 1)}):
                        small = make(content)
                    narrow = _svg(small[0], f"{name}-narrow", title, drawn[1]) if small else ""
                reading = " ".join(reading.split())
                sections[section].append(Picture(name, title, drawn[1], reading, svg, narrow))
    return sections


def _svg(figure: "Figure", name: str, title: str, finding: str) -> str:
    """A figure as SVG, with a description for screen readers, and ids that are unique on a page."""
    file = io.StringIO()
    metadata = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    figure.savefig(file, format="svg", metadata=metadata)
    svg = re.sub(r"(\d\.\d\d)\d+", r"\1", file.getvalue())  # hundredths of a point are enough
    svg = re.sub(r'(\bid="|xlink:href="#|url\(#)', rf"\g<1>{name}-", svg)
    head, body = svg[svg.index("<svg") :].strip().split(">", 1)
    label = f'role="img" aria-labelledby="{name}-title {name}-desc"'
    words = f'<title id="{name}-title">{escape(title)}</title>'
    words += f'<desc id="{name}-desc">{escape(finding)}</desc>'
    return f"{head} {label}>{words}{_with_tips(body, figure, name)}"


def _with_tips(svg: str, figure: "Figure", name: str) -> str:
    """Add a tooltip to each cell of a figure's maps."""
    for mesh in (mesh for axis in figure.axes for mesh in axis.collections):
        start = svg.find(f'<g id="{name}-{mesh.get_gid()}">')
        if start >= 0:
            end = svg.index("</g>", start)
            first, *cells = svg[start:end].split("/>")
            tips = str(mesh.get_label()).split("\n")
            titled = zip(tips, cells, strict=True)
            rest = "".join(f"><title>{escape(tip)}</title></path>{cell}" for tip, cell in titled)
            svg = f"{svg[:start]}{first}{rest}{svg[end:]}"
    return svg


def themed(svg: str) -> str:
    """Replace a picture's colours by those of its page, light or dark."""
    names = "|".join(THEMED)
    return re.sub(names, lambda match: f"var(--{THEMED[match[0]]}, {match[0]})", svg)


# ---- what several pictures share ----


def _figure(height: float, rows: int = 1, columns: int = 1, **options: Any) -> tuple["Figure", Any]:
    """Make a figure of a page's width and its axes [rows, columns]; `height` is in inches."""
    from matplotlib.figure import Figure

    figure = Figure(layout="constrained")
    figure.set_figheight(height)
    return figure, figure.subplots(rows, columns, squeeze=False, **options)


def _short(name: str, most: int) -> str:
    """Cut a name to a number of letters."""
    return name if len(name) <= most else f"{name[: most - 1]}…"


def _interval(
    axis: "Axes", y: float, estimate: Estimate, mark: tuple[str, str], bold: bool
) -> tuple[float, float]:
    """Draw an estimate in percent as a marker on its interval; returns the interval's ends."""
    value = estimate.value or 0.0
    low, high = (100 * end for end in estimate.interval or (value, value))
    marker, colour = mark
    axis.plot([low, high], [y, y], color=colour, linewidth=2 if bold else 1.3)
    axis.plot(100 * value, y, marker, color=colour, markersize=6 if bold else 5)
    return low, high


def _legend(figure: "Figure", lines: Sequence[Any], names: Sequence[str]) -> None:
    """Write names above a figure, in as many columns as fit."""
    letters = 12.5 * figure.get_figwidth()  # in a line
    columns = max(1, min(len(names), int(letters / (max(map(len, names)) + 6))))
    figure.legend(lines, names, loc="outside upper left", ncols=columns)


def _ticks(names: Sequence[str], most: int) -> tuple[np.ndarray, list[str]]:
    """Places and names of about `most` cells of a map, evenly spaced."""
    step = max(1, len(names) // most)
    return np.arange(0, len(names), step) + 0.5, list(names)[::step]


def _map(
    axis: "Axes", grid: np.ndarray, rows: Sequence[str], tip: Callable[[int, int], str],
    **options: Any,
) -> Any:  # fmt: skip
    """Draw a map of numbers [rows, columns], first row on top; `tip` is the tooltip of a cell."""
    axis.grid(False)
    axis.spines[:].set_visible(False)
    axis.set_yticks(*_ticks(rows, 12))
    axis.invert_yaxis()
    mesh = axis.pcolormesh(grid, edgecolors="white", linewidth=0.5, **options)
    figure: Any = axis.figure
    mesh.set_gid(f"cells-{figure.axes.index(axis)}")
    mesh.set_label("\n".join(" ".join(tip(*cell).split()) for cell in np.ndindex(*grid.shape)))
    return mesh


def _numbers(axis: "Axes", grid: np.ndarray, form: str, is_dark: np.ndarray) -> None:
    """Write a map's numbers [rows, columns] into it, in percent."""
    for (row, column), value in np.ndenumerate(grid):
        if not np.isnan(value):
            text = form.format(100 * value).replace("-", wording.MINUS)
            colour = WHITE if is_dark[row, column] else "black"
            place = (column + 0.5, row + 0.52)
            axis.text(*place, text, ha="center", va="center", fontsize=7.5, color=colour)


# ---- scores ----


def scores(report: Report) -> Drawn:
    """Scores by task.

    A line for each model: the marker is its score, the line its 95 % interval. Tasks where less is
    better are in the table alone.
    """
    from matplotlib.lines import Line2D

    table, names = report.table, list(report.table.columns)
    rows = [*table.averaged, *[MACRO][: len(table.averaged) > 1]]
    if not rows:
        return None
    marks, step, lows = _marks(names, table.headline), len(names) + 1, [1.0]
    height = 0.75 + len(rows) * (0.16 * len(names) + 0.14)
    figure, axes = _figure(min(height, 12))  # with its caption it fits on a printed page
    axis = axes[0, 0]
    for y, (row, name) in enumerate(product(rows, [*names, ""])):
        if not name:
            axis.axhline(y, color=FAINT, linewidth=0.8)
        elif (entry := table.columns[name].get(row)) and entry.score.value is not None:
            bold = name == table.headline
            low, high = _interval(axis, y, entry.score, marks[name], bold)
            style = {"color": INK, "weight": "bold"} if bold else {"color": SOFT}
            axis.text(high + 0.8, y, entry.score.text, va="center", size=8, **style)
            lows.append(low)
    if MACRO in rows:
        axis.axhline((len(rows) - 1) * step - 1, color=FAINT, linewidth=1.6)
    places, labels = np.arange(len(rows)) * step, [_short(row, 28) for row in rows]
    axis.set_yticks(places + (len(names) - 1) / 2, labels, fontsize=10)
    right = 100 + 6 * INCHES / figure.get_figwidth()  # room for a number
    axis.set(xlim=(min(lows) - 1, right), ylim=(len(rows) * step - 1, -1), xlabel="score, %")
    axis.set_xticks(range(0, 101, 20))
    lines = [Line2D([], [], marker=marker, color=colour) for marker, colour in marks.values()]
    _legend(figure, lines, names)
    last = {name: column[rows[-1]] for name, column in table.columns.items() if rows[-1] in column}
    mean = f"In the mean over {wording.listed(table.averaged)}"
    place = mean if rows[-1] == MACRO else f"On {rows[-1]}"
    words = (f"{name} {entry.score.text} %" for name, entry in last.items())
    return figure, f"{place}: {', '.join(words)}."


def frontier(report: Report) -> Drawn:
    """What larger models keep.

    Each model's share of the experts' scores above the parameters that it stores for all tasks
    together, in units of one encoder; the grey line is the most that is kept by so many.
    """
    from matplotlib.lines import Line2D

    table, row, sizes = report.table, report.table.rows[-1], report.sizes
    shares = {name: table.columns[name][row].share for name in sizes if row in table.columns[name]}
    values = {n: 100 * each.value for n, each in shares.items() if each and each.value is not None}
    if len({round(sizes[name], 2) for name in values}) < 2:
        return None
    best: list[str] = []  # the models that keep more than every smaller one
    for name in sorted(values, key=lambda name: (sizes[name], -values[name])):
        if not best or values[name] > values[best[-1]]:
            best.append(name)
    figure, axes = _figure(3.4)
    axis, marks = axes[0, 0], _marks(list(table.columns), table.headline)
    x, y = ([numbers[name] for name in best] for numbers in (sizes, values))
    axis.step(x, y, where="post", color=FAINT, zorder=0)
    for name, value in values.items():
        marker, colour = marks[name]
        if share := shares[name]:
            ends = [100 * end for end in share.interval or ()]
            axis.plot([sizes[name]] * len(ends), ends, color=colour, linewidth=1.3)
        axis.plot(sizes[name], value, marker, color=colour, markersize=6)
    lines = [Line2D([], [], marker=marks[name][0], color=marks[name][1]) for name in values]
    _legend(figure, lines, list(values))
    axis.set(xlabel="parameters of all tasks, in encoders", ylabel="% of the experts' scores")
    axis.set_xlim(0, 1.05 * max(sizes[name] for name in values))
    words = [f"{name} {values[name]:.1f} % with {sizes[name]:.2f}" for name in best]
    return figure, f"The most that is kept, by parameters in encoders: {wording.listed(words)}."


def _marks(names: Sequence[str], headline: str) -> dict[str, tuple[str, str]]:
    """The marker and the colour of every column."""
    others = iter(OTHERS * len(names))
    marks = {name: BOUNDS.get(name) or next(others) for name in names if name != headline}
    return {name: marks.get(name, HEADLINE) for name in names}


# ---- Fisher information, and who owns what ----


def _sites(values: NodeValues, is_neuron: bool) -> list[Site]:
    return [site for site in sorted(values) if (site.node == "neuron") == is_neuron]


def _labels(sites: Sequence[Site]) -> list[str]:
    """The numbers of layers in the Fisher artifact; cross-attention is marked."""
    return [f"{site.layer}{' cross' * (site.node == 'cross_head')}" for site in sites]


def _heads(values: NodeValues) -> np.ndarray:
    """Values of the attention heads [layers, heads], NaN where a layer has fewer."""
    sites = _sites(values, is_neuron=False)
    grid = np.full((len(sites), max(len(values[site]) for site in sites)), np.nan)
    for row, site in enumerate(sites):
        grid[row, : len(values[site])] = values[site]
    return grid


def heads(report: Report) -> Drawn:
    """Fisher information of the attention heads.

    A panel for each expert: lighter heads matter more to it, on a logarithmic scale; a ring marks
    the first.
    """
    from matplotlib.colors import LogNorm

    if not report.fisher:
        return None
    grids = {task: _heads(values) for task, values in report.fisher.items()}
    layers = max(map(len, grids.values()))
    rows = -(-len(grids) // 4)  # at most four panels stand in a row
    columns = max(2, -(-len(grids) // rows))
    height = 0.55 + min(max(1.1, 0.15 * layers), 2.6)  # three rows fit on a printed page
    figure, axes = _figure(rows * height + 0.2, rows, columns)
    first = []
    for place, (axis, (task, grid)) in enumerate(zip(axes.flat, grids.items(), strict=False)):
        names = _labels(_sites(report.fisher[task], is_neuron=False))
        times = grid / (np.nanmean(grid) or 1.0)  # of the mean head

        def tip(row: int, head: int, times: np.ndarray = times, names: list[str] = names) -> str:
            return f"layer {names[row]}, head {head}: {times[row, head]:.2g} times the mean"

        image = _map(axis, np.clip(times, 0.01, 10), names, tip, norm=LogNorm(0.01, 10))
        axis.set_xticks(*_ticks([str(head) for head in range(grid.shape[1])], 6))
        axis.set(title=_short(task, 22), xlabel="head", ylabel="" if place % columns else "layer")
        row, head = np.unravel_index(np.nanargmax(times), times.shape)
        axis.plot(head + 0.5, row + 0.5, "o", color=WHITE, mec="black", mew=0.9)
        share = f"{times[row, head]:.1f} times the mean"
        first.append(f"{task} layer {names[row]} head {head} ({share})")
    for axis in axes.flat[len(grids) :]:
        axis.set_axis_off()
    bar = figure.colorbar(image, ax=list(axes.flat[: len(grids)]), shrink=0.8, aspect=24, pad=0.02)
    bar.set_ticks([0.01, 0.1, 1, 10], labels=["0.01 ×", "0.1 ×", "mean", "10 ×"])
    bar.minorticks_off()
    bar.outline.set_visible(False)
    if bar.solids:
        bar.solids.set(rasterized=False, edgecolor="face")  # vectors like all else
    return figure, f"The head with the most, by expert: {'; '.join(first)}."


def owners(report: Report) -> Drawn:
    """Who owns what in the merged model, by layer.

    Each number is an expert's share in percent, the mean over the layer's nodes; the columns add
    up to 100.
    """
    shares, tasks, most = report.shares, list(report.shares), []
    if len(tasks) < 2:
        return None
    kinds = {"attention heads": False, "feed-forward neurons": True}
    sites = {title: _sites(shares[tasks[0]], kind) for title, kind in kinds.items()}
    grids = {  # [experts, layers]
        title: np.array([[shares[task][site].mean() for site in layers] for task in tasks])
        for title, layers in sites.items()
        if layers
    }
    top = max(float(grid.max()) for grid in grids.values())
    figure, axes = _figure(0.75 + len(grids) * (0.5 + 0.27 * len(tasks)), len(grids))
    for axis, (title, grid) in zip(axes[:, 0], grids.items(), strict=True):
        layers = _labels(sites[title])

        def tip(row: int, layer: int, grid: np.ndarray = grid, layers: list[str] = layers) -> str:
            return f"{tasks[row]}, layer {layers[layer]}: {shown(grid[row, layer])} %"

        _map(axis, grid, [_short(task, 28) for task in tasks], tip, vmin=0, vmax=top)
        _numbers(axis, grid, "{:.0f}", grid < DARK * top)
        axis.set_xticks(*_ticks(layers, 24))
        axis.set_title(f"Share of the {title}, % of each layer")
        nodes = {task: np.concatenate([shares[task][s] for s in sites[title]]) for task in tasks}
        first = max(nodes, key=lambda task: float(nodes[task].mean()))
        most.append(f"{first} owns most of the {title} ({shown(nodes[first].mean())} %)")
    axes[-1, 0].set_xlabel("layer")
    words = f"Of {len(tasks)} experts, {wording.listed(most)}"
    return figure, f"{words}; an equal share is {shown(1 / len(tasks))} %."


# ---- cost ----


def costs(report: Report) -> Drawn:
    """Cost by stage.

    A bar for each stage, divided by task or model; those that are too short for a name have none.
    """
    if not report.costs:
        return None
    totals: dict[str, float] = {}
    for cost in report.costs:
        totals[cost.stage] = totals.get(cost.stage, 0.0) + cost.seconds
    stages, longest = list(totals), max(totals, key=totals.__getitem__)
    figure, axes = _figure(0.55 + 0.34 * len(stages))
    axis, starts = axes[0, 0], dict.fromkeys(stages, 0.0)
    for stage, name, time in sorted(report.costs, key=lambda cost: -cost.seconds):
        y, start = stages.index(stage), starts[stage]
        axis.barh(y, time, 0.62, start, color=BAR, edgecolor="white", linewidth=1)
        letters = 12 * figure.get_figwidth()  # on the longest bar
        if time / totals[longest] > 0.02 + len(name) / letters:
            axis.text(start + time / 2, y, name, ha="center", va="center", fontsize=8)
        starts[stage] += time
    for y, total in enumerate(totals.values()):
        axis.text(total + 0.006 * totals[longest], y, seconds(total), va="center")
    axis.set_yticks(range(len(stages)), stages, fontsize=10)
    axis.set(xlabel="seconds", xlim=(0, 1.12 * totals[longest]), ylim=(len(stages) - 0.5, -0.5))
    words = f"The stages took {seconds(sum(totals.values()))} together"
    return figure, f"{words}; {longest} the most, {seconds(totals[longest])}."


# ---- the comparison of methods ----


def methods(comparison: Comparison) -> Drawn:
    """Methods, best first.

    The marker is what a method keeps of the experts' scores, the line its 95 % interval.
    """
    means = {m: row[MACRO] for m, row in comparison.means.items() if row[MACRO].value is not None}
    values = {method: each.value or 0.0 for method, each in means.items()}
    order = sorted(means, key=lambda method: -values[method])
    if not order:
        return None
    figure, axes = _figure(0.6 + 0.24 * len(order))
    axis, highs = axes[0, 0], [100.0]
    axis.axvline(100, color=INK, linewidth=1)
    axis.text(100.5, -0.9, EXPERT, va="center", fontsize=8.5)
    for y, method in enumerate(order):
        bold = method == comparison.best
        mark = HEADLINE if bold else BOUNDS.get(method, OTHERS[0])
        highs.append(_interval(axis, y, means[method], mark, bold)[1])
        text = axis.text(1.01, y, means[method].text, va="center", fontsize=8.5)
        text.set(transform=axis.get_yaxis_transform(), weight="bold" if bold else "normal")
    axis.set_yticks(range(len(order)), order, fontsize=9)
    least = min(0.0, *(100 * value for value in values.values()))
    axis.set(xlim=(least, 1.02 * max(highs)), ylim=(len(order) - 0.4, -1.4))
    axis.set_xlabel("% of the experts' scores, mean over the sets")
    most, fewest = (f"{name} {means[name].text} %" for name in (order[0], order[-1]))
    return figure, f"The most: {most}; the least: {fewest}."


def pairs(comparison: Comparison) -> Drawn:
    """Pairs of experts.

    A row for the task that is scored, a column for its partner: percent of the expert's score.
    """
    shares, best = comparison.pairs, comparison.best
    first = AVERAGE if AVERAGE in shares else next(iter(shares))
    tasks = list(dict.fromkeys(task for pair in shares[first] for task in pair))
    if not tasks:
        return None
    before, after = (  # [scored task, partner]
        np.array([[shares[method].get((a, b), np.nan) for b in tasks] for a in tasks])
        for method in (first, best)
    )
    change = after - before
    most = max(0.05, float(np.nanmax(np.abs(change))))
    gains = {"cmap": "PuOr", "vmin": -most, "vmax": most}
    figure, axes = _figure(3.8, 1, 2)
    for axis, title, grid, form, options, is_dark in (
        (axes[0, 0], best, after, "{:.0f}", {"vmin": 0, "vmax": 1.2}, after < DARK * 1.2),
        (axes[0, 1], f"{best} − {first}", change, "{:+.0f}", gains, abs(change) > 0.6 * most),
    ):

        def tip(row: int, column: int, grid: np.ndarray = grid, title: str = title) -> str:
            value = grid[row, column]
            number = "" if np.isnan(value) else f": {shown(value)}"
            return f"{title}, {tasks[row]} merged with {tasks[column]}{number}"

        names = [_short(task, 20) for task in tasks]
        _map(axis, np.ma.masked_invalid(grid), names, tip, **options)
        _numbers(axis, grid, form, is_dark)
        axis.set_xticks(*_ticks(names, len(names)), rotation=45, ha="right", rotation_mode="anchor")
        axis.set(title=fill(title, 50), xlabel="merged with", aspect="equal", facecolor="#eceff2")
    axes[0, 0].set_ylabel("scored task")
    row, column = np.unravel_index(np.nanargmax(change), change.shape)
    count, higher = (~np.isnan(change)).sum(), (change > 0).sum()
    words = f"Of {count} scores in pairs, {higher} are higher with {best} than with {first}"
    gain = f"{wording.points(change[row, column])} points, of {tasks[row]}"
    return figure, f"{words}; the largest gain is {gain} when merged with {tasks[column]}."


RUN_PICTURES: Mapping[Callable[[Report], Drawn], str] = {
    scores: "Scores",
    frontier: "What larger models keep",
    heads: "Where the experts' information lies",
    owners: "Who owns what",
    costs: "What it cost",
}
"""The pictures of a run, with the sections of its page."""
COMPARISON_PICTURES: Mapping[Callable[[Comparison], Drawn], str] = {
    methods: "Methods",
    pairs: "Pairs",
}
"""The pictures of a comparison, with the sections of its page."""
FOR_PHONES: Collection[Callable[..., Drawn]] = (scores, frontier, costs, methods)
"""The pictures that have a narrow form for phones."""
