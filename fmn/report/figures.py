"""The pictures of a report, as SVG that says in words what it shows.

A new picture is a function and its name in a table at the end: the first line of its docstring is
the picture's title, the rest tells a reader how to read it. It returns the figure and what it
shows, or None if its data are missing.

Every picture can be read without colours: by position, by the shape of a marker, or by numbers.
The colours are those of Okabe and Ito (2008), and for maps cividis (Nunez, Anderton and Renslow
2018): colour-blind readers see them as others do, and they print in grey in the right order.
"""

import inspect
import io
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from html import escape
from itertools import product
from pathlib import Path
from textwrap import fill
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import numpy as np

from fmn.report import results
from fmn.report.comparison import Comparison
from fmn.report.results import AVERAGE, EXPERT, MACRO, Estimate, Report, percent, seconds

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from fmn.fisher.architectures import NodeValues, Site

INK, SOFT, FAINT, BLUE, RED = "#1f2328", "#59636e", "#d1d6dc", "#0072B2", "#D55E00"
HEADLINE = ("D", BLUE)
"""Marker and colour of the headline; then of the bounds, and of all others."""
BOUNDS = {"base": ("v", "#8c959f"), AVERAGE: ("o", "#E69F00"), EXPERT: ("s", INK)}
OTHERS = (("^", "#009E73"), ("P", "#CC79A7"), ("X", RED), ("<", "#56B4E9"), (">", "#000000"))
INCHES = 9.2  # width of a picture: that of a page's text at its natural size
DARK = 0.55  # numbers are white on what is darker than this part of a colour scale
STYLE = Path(__file__).parent / "templates" / "pictures.mplstyle"

T = TypeVar("T")
Drawn = tuple["Figure", str] | None
"""A figure, and what it shows."""


class Picture(NamedTuple):
    """A picture: its file's name, its title, what it shows, how to read it, and the SVG."""

    name: str
    title: str
    finding: str
    reading: str
    svg: str


def draw(pictures: Mapping[Callable[[T], Drawn], str], content: T) -> dict[str, list[Picture]]:
    """The pictures of a report or a comparison, by section of its page."""
    import matplotlib as mpl

    sections: dict[str, list[Picture]] = {section: [] for section in pictures.values()}
    with mpl.rc_context(fname=STYLE):
        for make, section in pictures.items():
            if drawn := make(content):
                name = make.__name__.replace("_", "-")
                title, _, reading = (inspect.getdoc(make) or "").partition(".\n\n")
                svg = _svg(drawn[0], name, title, drawn[1])
                reading = " ".join(reading.split())
                sections[section].append(Picture(name, title, drawn[1], reading, svg))
    return sections


def _svg(figure: "Figure", name: str, title: str, finding: str) -> str:
    """The figure as SVG, for a screen reader too, with ids that no other picture of a page has."""
    file = io.StringIO()
    metadata = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    figure.savefig(file, format="svg", metadata=metadata)
    svg = re.sub(r"(\d\.\d\d)\d+", r"\1", file.getvalue())  # hundredths of a point are enough
    svg = re.sub(r'(\bid="|xlink:href="#|url\(#)', rf"\g<1>{name}-", svg)
    head, body = svg[svg.index("<svg") :].strip().split(">", 1)
    label = f'role="img" aria-labelledby="{name}-title {name}-desc"'
    words = f'<title id="{name}-title">{escape(title)}</title>'
    words += f'<desc id="{name}-desc">{escape(finding)}</desc>'
    return f"{head} {label}>{words}{body}"


# ---- what several pictures share ----


def _figure(height: float, rows: int = 1, columns: int = 1, **options: Any) -> tuple["Figure", Any]:
    """A figure of a page's width and its axes [rows, columns]; `height` in inches."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(INCHES, height), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False, **options)


def _panels(
    titles: Sequence[str], height: float, side: str, below: str, **options: Any
) -> tuple["Figure", "list[Axes]"]:
    """A figure of small panels, at most four in a row; `height` of a row in inches."""
    rows = -(-len(titles) // 4)
    columns = max(2, -(-len(titles) // rows))
    figure, axes = _figure(rows * height + 0.2, rows, columns, **options)
    for place, (axis, title) in enumerate(zip(axes.flat, titles, strict=False)):
        axis.set(title=title, xlabel=below, ylabel=side if place % columns == 0 else "")
    for axis in axes.flat[len(titles) :]:
        axis.set_axis_off()
    return figure, list(axes.flat[: len(titles)])


def _interval(
    axis: "Axes", y: float, estimate: Estimate, mark: tuple[str, str], bold: bool
) -> tuple[float, float]:
    """Draw an estimate in percent as a marker on its interval; returns the interval's ends."""
    low, high = (100 * end for end in estimate.interval or (estimate.value, estimate.value))
    marker, colour = mark
    axis.plot([low, high], [y, y], color=colour, linewidth=2 if bold else 1.3)
    axis.plot(100 * estimate.value, y, marker, color=colour, markersize=6 if bold else 5)
    return low, high


def _ticks(names: Sequence[str], most: int) -> tuple[np.ndarray, list[str]]:
    """Places and names of at most about `most` of the cells of a map."""
    step = max(1, len(names) // most)
    return np.arange(0, len(names), step) + 0.5, list(names)[::step]


def _map(axis: "Axes", grid: np.ndarray, rows: Sequence[str], **options: Any) -> Any:
    """A map of numbers [rows, columns], from above to below."""
    axis.grid(False)
    axis.spines[:].set_visible(False)
    axis.set_yticks(*_ticks(rows, 12))
    axis.invert_yaxis()
    return axis.pcolormesh(grid, edgecolors="white", linewidth=0.5, **options)


def _numbers(axis: "Axes", grid: np.ndarray, form: str, is_dark: np.ndarray) -> None:
    """Write a map's numbers [rows, columns] into it, in percent."""
    for (row, column), value in np.ndenumerate(grid):
        if not np.isnan(value):
            text = form.format(100 * value).replace("-", "\N{MINUS SIGN}")
            colour = "white" if is_dark[row, column] else "black"
            place = (column + 0.5, row + 0.52)
            axis.text(*place, text, ha="center", va="center", fontsize=7.5, color=colour)


def _bar(figure: "Figure", image: Any, axes: Any, ticks: Mapping[str, float]) -> None:
    """A colour bar beside the first panels, about as long as one of them."""
    shrink = min(0.9, 1.9 / figure.get_figheight())
    bar = figure.colorbar(image, ax=axes, shrink=shrink, aspect=16, anchor=(0, 0.97), pad=0.02)
    bar.set_ticks(list(ticks.values()), labels=list(ticks))
    bar.minorticks_off()
    bar.outline.set_visible(False)
    if bar.solids is not None:
        bar.solids.set(rasterized=False, edgecolor="face")  # vectors like all else


# ---- scores ----


def scores(report: Report) -> Drawn:
    """Scores by task.

    A line for each model: the marker is its score, the line its 95 % interval.
    """
    from matplotlib.lines import Line2D

    table, names, rows = report.table, list(report.table.columns), report.table.rows
    marks, step, lows = _marks(names, table.headline), len(names) + 1, [1.0]
    figure, axes = _figure(0.75 + len(rows) * (0.16 * len(names) + 0.14))
    axis = axes[0, 0]
    for y, (row, name) in enumerate(product(rows, [*names, ""])):
        if not name:
            axis.axhline(y, color=FAINT, linewidth=0.8)
        elif entry := table.columns[name].get(row):
            bold = name == table.headline
            low, high = _interval(axis, y, entry.score, marks[name], bold)
            style = {"color": INK, "weight": "bold"} if bold else {"color": SOFT}
            axis.text(high + 0.8, y, percent(entry.score.value), va="center", size=8, **style)
            lows.append(low)
    if MACRO in rows:
        axis.axhline((len(rows) - 1) * step - 1, color=FAINT, linewidth=1.6)
    axis.set_yticks(np.arange(len(rows)) * step + (len(names) - 1) / 2, rows, fontsize=10)
    axis.set(xlim=(min(lows) - 1, 106), ylim=(len(rows) * step - 1, -1), xlabel="score, %")
    axis.set_xticks(range(0, 101, 20))
    lines = [Line2D([], [], marker=marker, color=colour) for marker, colour in marks.values()]
    figure.legend(lines, names, loc="outside upper left", ncols=len(names))
    last = {name: column[rows[-1]] for name, column in table.columns.items() if rows[-1] in column}
    place = "In the mean over the tasks" if rows[-1] == MACRO else f"On {rows[-1]}"
    words = (f"{name} {percent(entry.score.value)} %" for name, entry in last.items())
    return figure, f"{place}: {', '.join(words)}."


def _marks(names: Sequence[str], headline: str) -> dict[str, tuple[str, str]]:
    """The marker and the colour of every column."""
    others = iter(OTHERS * len(names))
    marks = {name: BOUNDS.get(name) or next(others) for name in names if name != headline}
    return {name: marks.get(name, HEADLINE) for name in names}


def differences(report: Report) -> Drawn:
    """Differences on the same examples.

    Filled and pointing right or left: better or worse, with p below 0.05. A hollow circle: within
    chance.
    """
    table, rows, count = report.table, report.table.rows, len(report.table.differences)
    if not count:
        return None
    looks = dict(
        zip(results.VERDICTS, ((BLUE, ">", 2), (RED, "<", 2), (SOFT, "o", 1.2)), strict=True)
    )
    figure, axes = _figure(0.8 + 0.3 * len(rows), 1, count, sharey=True)
    for axis, (name, by_row) in zip(axes[0], table.differences.items(), strict=True):
        axis.axvline(0, color=SOFT, linewidth=0.8)
        for y, one in ((rows.index(row), one) for row, one in by_row.items() if row in rows):
            colour, marker, width = looks[results.verdict(one)]
            axis.plot([100 * end for end in one.interval], [y, y], color=colour, linewidth=width)
            face = "white" if marker == "o" else colour
            axis.plot(100 * one.difference, y, marker, color=colour, mfc=face, markersize=6.5)
        axis.set_yticks(range(len(rows)), rows, fontsize=10)
        axis.set_title(fill(f"{table.headline} less {name}", 96 // count))
        axis.set(xlabel="points", ylim=(len(rows) - 0.4, -0.6), xmargin=0.12)
        if MACRO in rows:
            axis.axhline(len(rows) - 1.5, color=FAINT, linewidth=1.6)
    return figure, " ".join(results.differences_in_words(table))


# ---- Fisher information ----


def _sites(values: "NodeValues", is_neuron: bool) -> "list[Site]":
    return [site for site in sorted(values) if (site.node == "neuron") == is_neuron]


def _labels(sites: "Sequence[Site]") -> list[str]:
    """Layers as the Fisher artifact numbers them; cross-attention says so."""
    return [f"{site.layer}{' cross' * (site.node == 'cross_head')}" for site in sites]


def _heads(values: "NodeValues") -> tuple[np.ndarray, list[str]]:
    """Values of the attention heads [layers, heads], NaN where a layer has fewer; the layers."""
    sites = _sites(values, is_neuron=False)
    grid = np.full((len(sites), max(len(values[site]) for site in sites)), np.nan)
    for row, site in enumerate(sites):
        grid[row, : len(values[site])] = values[site]
    return grid, _labels(sites)


def _head_maps(
    experts: Mapping[str, tuple[np.ndarray, list[str]]], **options: Any
) -> tuple["Figure", "list[Axes]", Any]:
    """A panel for each expert: a map of values by layer and head."""
    layers = max(len(names) for _, names in experts.values())
    height = 0.55 + min(max(1.1, 0.15 * layers), 2.6)  # three rows fit on a printed page
    figure, axes = _panels(list(experts), height, "layer", "head")
    for axis, (grid, names) in zip(axes, experts.values(), strict=True):
        image = _map(axis, grid, names, **options)
        axis.set_xticks(*_ticks([str(head) for head in range(grid.shape[1])], 6))
    return figure, axes, image


def fisher_heads(report: Report) -> Drawn:
    """Fisher information of the attention heads.

    A panel for each expert: lighter heads matter more to it, on a logarithmic scale; a ring marks
    the first.
    """
    from matplotlib.colors import LogNorm

    if not report.fisher:
        return None
    experts = {task: _heads(values) for task, values in report.fisher.items()}
    times = {task: grid / (np.nanmean(grid) or 1.0) for task, (grid, _) in experts.items()}
    shown = {task: (np.clip(times[task], 0.01, 10), experts[task][1]) for task in experts}
    figure, axes, image = _head_maps(shown, norm=LogNorm(0.01, 10))
    first = []
    for axis, (task, grid) in zip(axes, times.items(), strict=True):
        row, head = np.unravel_index(np.nanargmax(grid), grid.shape)
        axis.plot(head + 0.5, row + 0.5, "o", color="white", mec="black", mew=0.9)
        place = f"{task} layer {experts[task][1][row]} head {head}"
        first.append(f"{place} ({grid[row, head]:.1f} times the mean)")
    _bar(figure, image, axes, {"0.01 ×": 0.01, "0.1 ×": 0.1, "mean": 1, "10 ×": 10})
    return figure, f"The head with the most, by expert: {'; '.join(first)}."


def fisher_neurons(report: Report) -> Drawn:
    """Fisher information of the neurons by layer.

    By layer: the circle is the median neuron, the thick line the middle half, the thin line 90 %
    of them, the cross the largest.
    """
    if not report.fisher:
        return None
    label, first = "times the mean neuron", []
    figure, axes = _panels(list(report.fisher), 2.1, label, "layer", sharey=True)
    for axis, (task, values) in zip(axes, report.fisher.items(), strict=True):
        sites = _sites(values, is_neuron=True)
        labels, layers = _labels(sites), np.arange(len(sites))
        mean = float(np.concatenate([values[site] for site in sites]).mean()) or 1.0
        levels = (0.05, 0.25, 0.5, 0.75, 0.95, 1)
        parts = np.array([np.quantile(values[site] / mean, levels) for site in sites])
        low, lower, median, upper, high, top = np.maximum(parts, 1e-4).T  # each [layers]
        axis.vlines(layers, low, high, color=BLUE, linewidth=1)
        axis.vlines(layers, lower, upper, color=BLUE, linewidth=6, alpha=0.5)
        axis.plot(layers, median, "o", color="white", mec=BLUE, markersize=3.5)
        axis.plot(layers, top, "x", color=SOFT, markersize=3.5, mew=0.9)
        step = max(1, len(sites) // 6)
        axis.set_xticks(layers[::step], labels[::step])
        axis.set(yscale="log", xlim=(-0.6, len(sites) - 0.4))
        axis.minorticks_off()
        axis.grid(False, axis="x")
        axis.grid(axis="y")
        sums = np.array([values[site].sum() for site in sites])
        share = percent(sums.max() / (sums.sum() or 1.0))
        first.append(f"{task} layer {labels[sums.argmax()]} ({share} % of all)")
    return figure, f"The layer whose neurons have the most, by expert: {'; '.join(first)}."


# ---- who owns what ----


def _share_ticks(experts: int, shares: Iterable[np.ndarray]) -> dict[str, float]:
    """The numbers beside a colour bar of shares, from 0 to the last; the equal share among them."""
    top = min(1.0, float(np.ceil(10 * max(np.nanmax(part) for part in shares)) / 10))
    equal, step = 1 / experts, 0.1 if top <= 0.5 else 0.2
    others = [mark for mark in np.arange(step, top, step) if abs(mark - equal) > 0.08 * top]
    marks = {"0 %": 0.0, f"{100 * equal:.0f} % equal": equal}
    return marks | {f"{100 * mark:.0f} %": mark for mark in [*others, top]}


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
    ticks = _share_ticks(len(tasks), grids.values())
    top = max(ticks.values())
    figure, axes = _figure(0.75 + len(grids) * (0.5 + 0.27 * len(tasks)), len(grids))
    for axis, (title, grid) in zip(axes[:, 0], grids.items(), strict=True):
        image = _map(axis, grid, tasks, vmin=0, vmax=top)
        _numbers(axis, grid, "{:.0f}", grid < DARK * top)
        axis.set_xticks(*_ticks(_labels(sites[title]), 24))
        axis.set_title(f"Share of the {title}, % of each layer")
        nodes = {task: np.concatenate([shares[task][s] for s in sites[title]]) for task in tasks}
        first = max(nodes, key=lambda task: float(nodes[task].mean()))
        most.append(f"{first} owns most of the {title} ({percent(nodes[first].mean())} %)")
    axes[-1, 0].set_xlabel("layer")
    _bar(figure, image, list(axes[:, 0]), ticks)
    equal = percent(1 / len(tasks))
    return figure, f"Of {len(tasks)} experts, {results.listed(most)}; an equal share is {equal} %."


def owners_heads(report: Report) -> Drawn:
    """Who owns which attention head.

    A panel for each expert: the lighter, the larger its share of the head; a dot where it has the
    largest.
    """
    if len(report.shares) < 2:
        return None
    experts = {task: _heads(values) for task, values in report.shares.items()}
    grids = np.array([grid for grid, _ in experts.values()])  # [experts, layers, heads]
    ticks, present = _share_ticks(len(grids), grids), ~np.isnan(grids[0])
    top = max(ticks.values())
    winners = np.nan_to_num(grids, nan=-1).argmax(axis=0)  # [layers, heads]
    figure, axes, image = _head_maps(experts, vmin=0, vmax=top)
    wins = []
    for place, (axis, task) in enumerate(zip(axes, experts, strict=True)):
        rows, heads = np.nonzero((winners == place) & present)
        colours = np.where(grids[place, rows, heads] < DARK * top, "white", "black")
        axis.scatter(heads + 0.5, rows + 0.5, s=3, c=colours)
        wins.append(f"{task} {len(rows)}")
    _bar(figure, image, axes, ticks)
    words = f"Of {present.sum()} attention heads, the expert with the largest share is"
    return figure, f"{words}: {', '.join(wins)}."


# ---- cost ----


def cost(report: Report) -> Drawn:
    """Cost by stage.

    A bar for each stage, divided by task or model; those that are too short for a name have none.
    """
    if not report.costs:
        return None
    sums = dict.fromkeys((one.stage for one in report.costs), 0.0)
    stages, whole = list(sums), {one.stage: 0.0 for one in report.costs}
    for one in report.costs:
        whole[one.stage] += one.seconds
    longest = max(stages, key=whole.__getitem__)
    figure, axes = _figure(0.55 + 0.34 * len(stages))
    axis = axes[0, 0]
    for stage, name, time in sorted(report.costs, key=lambda one: -one.seconds):
        y, start = stages.index(stage), sums[stage]
        axis.barh(y, time, 0.62, start, color="#9cc4e4", edgecolor="white", linewidth=1)
        if time > 0.06 * whole[longest]:
            axis.text(start + time / 2, y, name, ha="center", va="center", fontsize=8)
        sums[stage] += time
    for y, stage in enumerate(stages):
        axis.text(whole[stage] + 0.006 * whole[longest], y, seconds(whole[stage]), va="center")
    axis.set_yticks(range(len(stages)), stages, fontsize=10)
    axis.set(xlabel="seconds", xlim=(0, 1.12 * whole[longest]), ylim=(len(stages) - 0.5, -0.5))
    words = f"The stages took {seconds(sum(whole.values()))} together"
    return figure, f"{words}; {longest} the most, {seconds(whole[longest])}."


# ---- the comparison of methods ----


def methods(comparison: Comparison) -> Drawn:
    """Methods, best first.

    The marker is what a method keeps of the experts' scores, the line its 95 % interval.
    """
    means = {method: row[MACRO] for method, row in comparison.means.items()}
    order = sorted(means, key=lambda method: -means[method].value)
    figure, axes = _figure(0.6 + 0.24 * len(order))
    axis, highs = axes[0, 0], [100.0]
    axis.axvline(100, color=INK, linewidth=1)
    axis.text(100.5, -0.9, EXPERT, va="center", fontsize=8.5)
    for y, method in enumerate(order):
        bold = method == comparison.best
        mark = HEADLINE if bold else BOUNDS.get(method, OTHERS[0])
        highs.append(_interval(axis, y, means[method], mark, bold)[1])
        text = axis.text(1.01, y, percent(means[method].value), va="center", fontsize=8.5)
        text.set(transform=axis.get_yaxis_transform(), weight="bold" if bold else "normal")
    axis.set_yticks(range(len(order)), order, fontsize=9)
    least = min(0.0, *(100 * one.value for one in means.values()))
    axis.set(xlim=(least, 1.02 * max(highs)), ylim=(len(order) - 0.4, -1.4))
    axis.set_xlabel("% of the experts' scores, mean over the sets")
    most, fewest = (f"{name} {percent(means[name].value)} %" for name in (order[0], order[-1]))
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
    before, after = (
        np.array([[shares[method].get((a, b), np.nan) for b in tasks] for a in tasks])
        for method in (first, best)
    )
    change = after - before  # [scored task, partner]
    most = max(0.05, float(np.nanmax(np.abs(change))))
    plain, gains = {"vmin": 0, "vmax": 1.2}, {"cmap": "PuOr", "vmin": -most, "vmax": most}
    figure, axes = _figure(3.8, 1, 3)
    for axis, title, grid, form, options, is_dark in (
        (axes[0, 0], first, before, "{:.0f}", plain, before < DARK * 1.2),
        (axes[0, 1], best, after, "{:.0f}", plain, after < DARK * 1.2),
        (axes[0, 2], f"{best} less {first}", change, "{:+.0f}", gains, abs(change) > 0.6 * most),
    ):
        _map(axis, np.ma.masked_invalid(grid), tasks, **options)
        _numbers(axis, grid, form, is_dark)
        axis.set_xticks(*_ticks(tasks, len(tasks)), rotation=45, ha="right", rotation_mode="anchor")
        axis.set(title=fill(title, 34), xlabel="merged with", aspect="equal", facecolor="#eceff2")
    axes[0, 0].set_ylabel("scored task")
    row, column = np.unravel_index(np.nanargmax(change), change.shape)
    count, higher = (~np.isnan(change)).sum(), (change > 0).sum()
    words = f"Of {count} scores in pairs, {higher} are higher with {best} than with {first}"
    gain = f"{results.points(change[row, column])} points, of {tasks[row]}"
    return figure, f"{words}; the largest gain is {gain} when merged with {tasks[column]}."


RUN_PICTURES: Mapping[Callable[[Report], Drawn], str] = {
    scores: "Scores",
    differences: "Which differences are real",
    fisher_heads: "Where the experts' information lies",
    fisher_neurons: "Where the experts' information lies",
    owners: "Who owns what",
    owners_heads: "Who owns what",
    cost: "What it cost",
}
"""The pictures of a run, with the section of its page that shows them."""
COMPARISON_PICTURES: Mapping[Callable[[Comparison], Drawn], str] = {
    methods: "Methods",
    pairs: "Pairs",
}
"""The same of a comparison."""
