"""The pictures of a report, as SVG that says in words what it shows."""

from collections.abc import Mapping, Sequence
from textwrap import fill
from typing import TYPE_CHECKING, Any

import numpy as np

from fmn.report import drawing
from fmn.report.drawing import Picture, listed
from fmn.report.results import (
    CERTAIN,
    EXPERT,
    MACRO,
    VERDICTS,
    Cost,
    Table,
    owned,
    percent,
    points,
    verdict,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from fmn.fisher.architectures import NodeValues, Site
    from fmn.report.comparison import Compared


def of_run(
    table: Table,
    fisher: "Mapping[str, NodeValues]",
    recipe: Mapping[str, Any] | None,
    costs: Sequence[Cost],
) -> list[Picture]:
    """The pictures of a run; `recipe` is that of the table's headline."""
    found = [scores(table)]
    found += [differences(table)] if table.differences else []
    found += [heads(fisher), neurons(fisher)] if fisher else []
    shares = owned(fisher, recipe) if recipe else {}
    found += [owners(shares), owned_heads(shares)] if len(shares) > 1 else []
    found += [cost(costs)] if costs else []
    return found


def of_comparison(found: "Compared") -> list[Picture]:
    """The pictures of a comparison of methods."""
    drawn = [methods(found)]
    return [*drawn, pairs(found)] if any(found.pairs.values()) else drawn


# ---- scores ----


def scores(table: Table) -> Picture:
    """A line for each task and column: the score and its interval."""
    names, rows = list(table.columns), table.rows
    look = drawing.look(names, table.headline)
    with drawing.style():
        figure, axes = drawing.figure(0.75 + len(rows) * (0.16 * len(names) + 0.14))
        axis = axes[0, 0]
        step = len(names) + 1
        for group, row in enumerate(rows):
            for place, name in enumerate(names):
                if row not in table.columns[name].scores:
                    continue
                value, ends = table.columns[name].scores[row]
                low, high = ends or (value, value)
                marker, colour = look[name]
                y = group * step + place
                bold = name == table.headline
                axis.plot(
                    [100 * low, 100 * high], [y, y], color=colour, linewidth=2 if bold else 1.3
                )
                axis.plot(100 * value, y, marker, color=colour, markersize=6 if bold else 5)
                axis.annotate(
                    percent(value), (100 * high, y), (6, 0), textcoords="offset points", va="center", fontsize=8,
                    color=drawing.INK if bold else drawing.SOFT, fontweight="bold" if bold else "normal",
                )  # fmt: skip
            if group:
                axis.axhline(
                    group * step - 1, color=drawing.FAINT, linewidth=0.8 if row != MACRO else 1.6
                )
        middle = (len(names) - 1) / 2
        axis.set_yticks([group * step + middle for group in range(len(rows))], rows, fontsize=10)
        axis.tick_params("y", length=0)
        axis.set_ylim(len(rows) * step - 1, -1)
        lows = [
            ends[0] if ends else value
            for one in table.columns.values()
            for value, ends in one.scores.values()
        ]
        axis.set_xlim(min(0.0, 100 * min(lows) - 1), 106)
        axis.set_xticks(range(0, 101, 20))
        axis.grid(axis="x")
        axis.spines["left"].set_visible(False)
        axis.set_xlabel("score, %")
        drawing.legend(figure, look)
        return drawing.picture(
            figure, "scores", "Scores by task", _scores_in_words(table),
            "A line for each model: the marker is its score, the line its 95 % interval.",
        )  # fmt: skip


def _scores_in_words(table: Table) -> str:
    last = table.rows[-1]
    found = [
        f"{name} {percent(one.scores[last].value)} %"
        for name, one in table.columns.items()
        if last in one.scores
    ]
    where = "In the mean over the tasks" if last == MACRO else f"On {last}"
    return f"{where}: {', '.join(found)}."


def differences(table: Table) -> Picture:
    """A panel for each other column: the headline's score less that one's, by task."""
    others, rows = list(table.differences), table.rows
    with drawing.style():
        figure, axes = drawing.figure(0.8 + 0.3 * len(rows), 1, len(others), sharey=True)
        for axis, name in zip(axes[0], others, strict=True):
            axis.axvline(0, color=drawing.SOFT, linewidth=0.8)
            for y, row in enumerate(rows):
                if row not in table.differences[name]:
                    continue
                one = table.differences[name][row]
                real = one.p_value < CERTAIN
                colour = (
                    drawing.SOFT if not real else "#0072B2" if one.difference > 0 else "#D55E00"
                )
                marker = "o" if not real else ">" if one.difference > 0 else "<"
                axis.plot(
                    [100 * end for end in one.interval],
                    [y, y],
                    color=colour,
                    linewidth=2 if real else 1.2,
                )
                axis.plot(
                    100 * one.difference, y, marker, color=colour, markersize=6.5,
                    markerfacecolor=colour if real else "white",
                )  # fmt: skip
            axis.set_title(fill(f"{table.headline} less {name}", 96 // len(others)))
            axis.set_xlabel("points")
            axis.margins(x=0.12)
            axis.grid(axis="x")
            axis.spines["left"].set_visible(False)
            axis.tick_params("y", length=0)
            if MACRO in rows:
                axis.axhline(len(rows) - 1.5, color=drawing.FAINT, linewidth=1.6)
        axes[0, 0].set_yticks(range(len(rows)), rows, fontsize=10)
        axes[0, 0].set_ylim(len(rows) - 0.4, -0.6)
        return drawing.picture(
            figure, "differences", "Differences on the same examples", " ".join(differences_in_words(table)),
            "Filled and pointing right or left: better or worse, with p below 0.05. A hollow circle: within chance.",
            " ".join(differences_in_words(table, most=len(rows))),
        )  # fmt: skip


def differences_in_words(table: Table, most: int = 2) -> list[str]:
    """Where the headline is better, worse, or within chance of each other column; over `most` tasks are a number."""
    found = []
    for name, by_row in table.differences.items():
        said = {row: verdict(one) for row, one in by_row.items() if row != MACRO}
        by_word = {word: [row for row, each in said.items() if each == word] for word in VERDICTS}
        parts = [
            f"{word} on {listed(rows) if len(rows) <= most else f'{len(rows)} tasks'}"
            for word, rows in by_word.items()
            if rows
        ]
        if MACRO in by_row and len(said) > 1:
            parts.insert(0, f"{points(by_row[MACRO].difference)} points in the mean")
        found.append(f"Against {name}: {', '.join(parts)}.")
    return found


# ---- Fisher information ----


def _layers(values: "NodeValues", neurons: bool) -> "list[Site]":
    return [site for site in sorted(values) if (site.node == "neuron") == neurons]


def _label(site: "Site") -> str:
    """The name of a row of heads: its layer, numbered as in the Fisher artifact; cross-attention says so."""
    return f"{site.layer}" + (" cross" if site.node == "cross_head" else "")


def _grid(values: "NodeValues") -> "tuple[np.ndarray, list[str]]":
    """Values of the attention heads [layers, heads], NaN where a layer has fewer, and the names of the rows."""
    sites = _layers(values, neurons=False)
    grid = np.full((len(sites), max(len(values[site]) for site in sites)), np.nan)
    for row, site in enumerate(sites):
        grid[row, : len(values[site])] = values[site]
    return grid, [_label(site) for site in sites]


def _map(axis: "Axes", grid: np.ndarray, names: Sequence[str], **options: Any) -> Any:
    """A map of heads: layers down, heads across, both numbered as in the Fisher artifact."""
    image = axis.pcolormesh(grid, cmap="cividis", edgecolors="white", linewidth=0.5, **options)
    axis.invert_yaxis()
    step = max(1, grid.shape[1] // 6)
    axis.set_xticks(
        np.arange(0, grid.shape[1], step) + 0.5, map(str, range(0, grid.shape[1], step)), fontsize=8
    )
    step = max(1, len(names) // 12)
    axis.set_yticks(np.arange(0, len(names), step) + 0.5, names[::step], fontsize=8)
    axis.tick_params(length=0)
    axis.spines[:].set_visible(False)
    return image


def _row_height(layers: int) -> float:
    return 0.55 + min(
        max(1.1, 0.15 * layers), 2.6
    )  # three rows and their caption fit on a printed page


def _ring(axis: "Axes", row: int, column: int) -> None:
    """Mark a head of a map, on dark and on light."""
    axis.plot(
        column + 0.5,
        row + 0.5,
        "o",
        color="white",
        markersize=5.5,
        markeredgecolor="black",
        markeredgewidth=0.9,
    )


def heads(fisher: "Mapping[str, NodeValues]") -> Picture:
    """A map for each expert of its heads' Fisher information, relative to their mean."""
    from matplotlib.colors import LogNorm

    grids = {task: _grid(values) for task, values in fisher.items()}
    said = []
    with drawing.style():
        layers = max(len(names) for _, names in grids.values())
        figure, axes, columns = drawing.panels(len(grids), _row_height(layers))
        for place, (axis, (task, (grid, names))) in enumerate(
            zip(axes, grids.items(), strict=True)
        ):
            mean = np.nanmean(grid) or 1.0
            shown = np.clip(grid / mean, 0.01, 10)
            image = _map(axis, shown, names, norm=LogNorm(0.01, 10))
            row, head = np.unravel_index(np.nanargmax(grid), grid.shape)
            _ring(axis, int(row), int(head))
            axis.set_title(task)
            axis.set_xlabel("head", fontsize=8)
            if place % columns == 0:
                axis.set_ylabel("layer", fontsize=8)
            said.append(
                f"{task} layer {names[row]} head {head} ({grid[row, head] / mean:.1f} times the mean)"
            )
        bar = _scale(figure, image, axes)
        bar.set_ticks([0.01, 0.1, 1, 10], labels=["0.01 ×", "0.1 ×", "mean", "10 ×"])
        bar.minorticks_off()
        _plain(bar)
        return drawing.picture(
            figure, "fisher-heads", "Fisher information of the attention heads",
            f"The head with the most, by expert: {'; '.join(said)}.",
            "A panel for each expert: lighter heads matter more to it, on a logarithmic scale; a ring marks the first.",
        )  # fmt: skip


def neurons(fisher: "Mapping[str, NodeValues]") -> Picture:
    """A panel for each expert: how its neurons' Fisher information is distributed in each layer."""
    said = []
    floor = 1e-4
    with drawing.style():
        figure, axes, columns = drawing.panels(len(fisher), 2.1, sharey=True)
        for place, (axis, (task, values)) in enumerate(zip(axes, fisher.items(), strict=True)):
            sites = _layers(values, neurons=True)
            mean = float(np.concatenate([values[site] for site in sites]).mean()) or 1.0
            parts = np.array(
                [np.quantile(values[site] / mean, [0.05, 0.25, 0.5, 0.75, 0.95]) for site in sites]
            )
            tops = [float(values[site].max()) / mean for site in sites]
            parts, layers = np.maximum(parts, floor), np.arange(len(sites))
            axis.vlines(layers, parts[:, 0], parts[:, 4], color="#0072B2", linewidth=1)
            axis.vlines(layers, parts[:, 1], parts[:, 3], color="#0072B2", linewidth=6, alpha=0.5)
            axis.plot(
                layers, parts[:, 2], "o", color="white", markeredgecolor="#0072B2", markersize=3.5
            )
            axis.plot(
                layers,
                np.maximum(tops, floor),
                "x",
                color=drawing.SOFT,
                markersize=3.5,
                markeredgewidth=0.9,
            )
            axis.set_yscale("log")
            step = max(1, len(sites) // 6)
            axis.set_xticks(layers[::step], [_label(site) for site in sites][::step], fontsize=8)
            axis.set_xlim(-0.6, len(sites) - 0.4)
            axis.minorticks_off()
            axis.grid(axis="y")
            axis.tick_params(length=0, labelsize=8)
            axis.set_title(task)
            axis.set_xlabel("layer", fontsize=8)
            if place % columns == 0:
                axis.set_ylabel("times the mean neuron", fontsize=8)
            sums = np.array([values[site].sum() for site in sites])
            most = int(sums.argmax())
            said.append(
                f"{task} layer {_label(sites[most])} ({percent(sums[most] / (sums.sum() or 1.0))} % of all)"
            )
        return drawing.picture(
            figure, "fisher-neurons", "Fisher information of the neurons by layer",
            f"The layer whose neurons have the most, by expert: {'; '.join(said)}.",
            "By layer: the circle is the median neuron, the thick line the middle half, the thin line 90 % of them, the"
            " cross the largest.",
        )  # fmt: skip


# ---- who owns what ----


def owners(shares: "Mapping[str, NodeValues]") -> Picture:
    """Each expert's share of every layer, of its heads and of its neurons, as numbers on a map."""
    tasks = list(shares)
    kinds = [
        (title, sites)
        for title, neurons in (("attention heads", False), ("feed-forward neurons", True))
        if (sites := _layers(shares[tasks[0]], neurons))
    ]
    said = []
    top = _top(
        np.array(
            [[shares[task][site].mean() for task in tasks] for _, sites in kinds for site in sites]
        )
    )
    with drawing.style():
        figure, axes = drawing.figure(0.75 + len(kinds) * (0.5 + 0.27 * len(tasks)), len(kinds))
        for axis, (title, sites) in zip(axes[:, 0], kinds, strict=True):
            grid = np.array(
                [[shares[task][site].mean() for site in sites] for task in tasks]
            )  # [experts, layers]
            every = np.array(
                [np.concatenate([shares[task][site] for site in sites]).mean() for task in tasks]
            )
            image = _map(axis, grid, tasks, vmin=0, vmax=top)
            step = max(1, len(sites) // 24)
            axis.set_xticks(
                np.arange(0, len(sites), step) + 0.5,
                [_label(site) for site in sites][::step],
                fontsize=8,
            )
            axis.set_yticks(np.arange(len(tasks)) + 0.5, tasks, fontsize=9)
            for (row, column), value in np.ndenumerate(grid):
                axis.text(
                    column + 0.5, row + 0.52, f"{100 * value:.0f}", ha="center", va="center", fontsize=8,
                    color="white" if value < 0.55 * top else "black",
                )  # fmt: skip
            axis.set_title(f"Share of the {title}, % of each layer")
            most = int(every.argmax())
            said.append(f"{tasks[most]} owns most of the {title} ({percent(every[most])} %)")
        axes[-1, 0].set_xlabel("layer", fontsize=8)
        bar = _scale(figure, image, list(axes[:, 0]))
        _shares_bar(bar, len(tasks), top)
        return drawing.picture(
            figure, "owners", "Who owns what in the merged model, by layer",
            f"Of {len(tasks)} experts, {listed(said)}; an equal share is {percent(1 / len(tasks))} %.",
            "Each number is an expert's share in percent, the mean over the layer's nodes; the columns add up to 100.",
        )  # fmt: skip


def _top(shares: np.ndarray) -> float:
    """The end of a scale of shares: the largest, to the next tenth, and well above an equal share."""
    return min(1.0, float(np.ceil(10 * np.nanmax(shares)) / 10))


def _shares_bar(bar: Any, experts: int, top: float) -> None:
    """A colour bar of shares with the equal share marked."""
    equal, step = 1 / experts, 0.1 if top <= 0.5 else 0.2
    marks = [
        0,
        equal,
        *(mark for mark in np.arange(step, top + 0.01, step) if abs(mark - equal) > 0.08 * top),
    ]
    bar.set_ticks(
        marks,
        labels=[f"{100 * mark:.0f} %" + (" equal" if mark == equal else "") for mark in marks],
    )
    _plain(bar)


def _scale(figure: "Figure", image: Any, axes: "Sequence[Axes]") -> Any:
    """A colour bar beside the first panels, as long as one of them."""
    shrink = min(0.9, 1.9 / figure.get_figheight())
    return figure.colorbar(
        image, ax=list(axes), shrink=shrink, aspect=16, anchor=(0, 0.97), pad=0.02
    )


def _plain(bar: Any) -> None:
    bar.solids.set_rasterized(False)  # vectors like all else
    bar.solids.set_edgecolor("face")
    bar.ax.tick_params(labelsize=8, length=0)
    bar.outline.set_visible(False)


def owned_heads(shares: "Mapping[str, NodeValues]") -> Picture:
    """A map for each expert of its share of every attention head."""
    grids = {task: _grid(values) for task, values in shares.items()}
    winners = np.argmax(
        np.nan_to_num(np.array([grid for grid, _ in grids.values()]), nan=-1), axis=0
    )
    there = ~np.isnan(next(iter(grids.values()))[0])
    top = _top(np.array([grid for grid, _ in grids.values()]))
    said = []
    with drawing.style():
        layers = max(len(names) for _, names in grids.values())
        figure, axes, columns = drawing.panels(len(grids), _row_height(layers))
        for place, (axis, (task, (grid, names))) in enumerate(
            zip(axes, grids.items(), strict=True)
        ):
            image = _map(axis, grid, names, vmin=0, vmax=top)
            first = (winners == place) & there
            for colour, ground in (("white", grid < 0.55 * top), ("black", grid >= 0.55 * top)):
                rows, places = np.nonzero(first & ground)
                axis.plot(places + 0.5, rows + 0.5, ".", markersize=3.5, color=colour)
            axis.set_title(task)
            axis.set_xlabel("head", fontsize=8)
            if place % columns == 0:
                axis.set_ylabel("layer", fontsize=8)
            said.append(f"{task} {int(first.sum())}")
        bar = _scale(figure, image, axes)
        _shares_bar(bar, len(grids), top)
        return drawing.picture(
            figure, "owners-heads", "Who owns which attention head",
            f"Of {int(there.sum())} attention heads, the expert with the largest share is: {', '.join(said)}.",
            "A panel for each expert: the lighter, the larger its share of the head; a dot where it has the largest.",
        )  # fmt: skip


# ---- the comparison of methods ----


def methods(found: "Compared") -> Picture:
    """A line for each method: what it keeps of the experts' scores in the mean over the sets, best first."""
    order = sorted(found.means, key=lambda method: -found.means[method]["mean"].value)
    look = {method: drawing.MARKERS.get(method, drawing.OTHERS[0]) for method in order} | {
        found.best: drawing.HEADLINE
    }
    with drawing.style():
        figure, axes = drawing.figure(0.6 + 0.24 * len(order))
        axis = axes[0, 0]
        axis.axvline(100, color=drawing.INK, linewidth=1)
        axis.annotate(
            EXPERT, (100, -0.9), (4, 0), textcoords="offset points", va="center", fontsize=8.5
        )
        highest = 100.0
        for y, method in enumerate(order):
            value, ends = found.means[method]["mean"]
            low, high = ends or (value, value)
            marker, colour = look[method]
            bold = method == found.best
            axis.plot([100 * low, 100 * high], [y, y], color=colour, linewidth=2 if bold else 1.3)
            axis.plot(100 * value, y, marker, color=colour, markersize=6)
            axis.text(
                1.01, y, percent(value), transform=axis.get_yaxis_transform(), va="center", fontsize=8.5,
                fontweight="bold" if bold else "normal",
            )  # fmt: skip
            highest = max(highest, 100 * high)
        axis.set_yticks(range(len(order)), order, fontsize=9)
        axis.set_ylim(len(order) - 0.4, -1.4)
        axis.set_xlim(
            min(0.0, *(100 * one["mean"].value for one in found.means.values())), 1.02 * highest
        )
        axis.grid(axis="x")
        axis.tick_params("y", length=0)
        axis.spines["left"].set_visible(False)
        axis.set_xlabel("% of the experts' scores, mean over the sets")
        said = [f"{method} {percent(found.means[method]['mean'].value)} %" for method in order]
        return drawing.picture(
            figure, "methods", "Methods, best first", f"The most: {said[0]}; the least: {said[-1]}.",
            "The marker is what a method keeps of the experts' scores, the line its 95 % interval.",
            f"In order: {', '.join(said)}.",
        )  # fmt: skip


def pairs(found: "Compared") -> Picture:
    """What pairs of experts keep: with the average, with the best method, and the difference of the two."""
    first = "average" if "average" in found.pairs else next(iter(found.pairs))
    tasks = list(dict.fromkeys(task for pair in found.pairs[first] for task in pair))

    def grid(method: str) -> np.ndarray:
        values = found.pairs[method]
        return np.array(
            [[values.get((task, partner), np.nan) for partner in tasks] for task in tasks]
        )

    one, other = grid(first), grid(found.best)
    change = other - one
    most = max(0.05, float(np.nanmax(np.abs(change))))
    with drawing.style():
        figure, axes = drawing.figure(3.8, 1, 3)
        for axis, (title, values) in zip(
            axes[0], ((first, one), (found.best, other)), strict=False
        ):
            _matrix(axis, values, tasks, title, "{:.0f}", cmap="cividis", vmin=0, vmax=1.2)
        _matrix(
            axes[0, 2],
            change,
            tasks,
            f"{found.best} less {first}",
            "{:+.0f}",
            cmap="PuOr",
            vmin=-most,
            vmax=most,
        )
        axes[0, 0].set_ylabel("scored task", fontsize=8)
        where = np.unravel_index(np.nanargmax(change), change.shape)
        gains = int(np.nansum(change > 0))
        return drawing.picture(
            figure, "pairs", "Pairs of experts",
            f"Of {int((~np.isnan(change)).sum())} scores in pairs, {gains} are higher with {found.best} than with"
            f" {first}; the largest gain is {points(change[where])} points, of {tasks[where[0]]} when merged with"
            f" {tasks[where[1]]}.",
            "A row for the task that is scored, a column for its partner: percent of the expert's score.",
            "; ".join(
                f"{task} with {partner}: {first} {percent(found.pairs[first][task, partner])} %,"
                f" {found.best} {percent(found.pairs[found.best][task, partner])} %"
                for task, partner in found.pairs[first]
            ),
        )  # fmt: skip


def _matrix(
    axis: "Axes", grid: np.ndarray, tasks: Sequence[str], title: str, form: str, **options: Any
) -> None:
    """A square map of tasks with its numbers, in percent; what is not there is grey."""
    axis.set_facecolor("#eceff2")
    axis.pcolormesh(np.ma.masked_invalid(grid), edgecolors="white", linewidth=0.8, **options)
    middle, half = (options["vmin"] + options["vmax"]) / 2, (options["vmax"] - options["vmin"]) / 2
    for (row, column), value in np.ndenumerate(grid):
        if not np.isnan(value):
            place = np.clip((value - middle) / half, -1, 1)
            dark = abs(place) > 0.6 if options["cmap"] == "PuOr" else place < 0.1
            axis.text(
                column + 0.5, row + 0.52, form.format(100 * value).replace("-", "\u2212"), ha="center", va="center",
                fontsize=8 if len(tasks) < 7 else 7, color="white" if dark else "black",
            )  # fmt: skip
    axis.set_xticks(
        np.arange(len(tasks)) + 0.5,
        tasks,
        fontsize=8,
        rotation=45,
        ha="right",
        rotation_mode="anchor",
    )
    axis.set_yticks(np.arange(len(tasks)) + 0.5, tasks, fontsize=8)
    axis.tick_params(length=0)
    axis.spines[:].set_visible(False)
    axis.invert_yaxis()
    axis.set_aspect("equal")
    axis.set_title(fill(title, 34))
    axis.set_xlabel("merged with", fontsize=8)


# ---- cost ----


def cost(costs: Sequence[Cost]) -> Picture:
    """A bar for each stage, its tasks one after another."""
    stages = list(dict.fromkeys(one.stage for one in costs))
    sums = {stage: sum(one.seconds for one in costs if one.stage == stage) for stage in stages}
    whole = sum(sums.values())
    with drawing.style():
        figure, axes = drawing.figure(0.55 + 0.34 * len(stages))
        axis = axes[0, 0]
        for y, stage in enumerate(stages):
            start = 0.0
            parts = sorted(
                (one for one in costs if one.stage == stage), key=lambda one: -one.seconds
            )
            for one in parts:
                axis.barh(
                    y, one.seconds, 0.62, start, color="#9cc4e4", edgecolor="white", linewidth=1
                )
                if one.seconds > 0.06 * max(sums.values()):
                    axis.text(
                        start + one.seconds / 2, y, one.name, ha="center", va="center", fontsize=8
                    )
                start += one.seconds
            axis.annotate(
                f"{seconds(sums[stage])}",
                (start, y),
                (5, 0),
                textcoords="offset points",
                va="center",
                fontsize=9,
            )
        axis.set_yticks(range(len(stages)), stages, fontsize=10)
        axis.set_ylim(len(stages) - 0.5, -0.5)
        axis.set_xlim(0, 1.12 * max(sums.values()))
        axis.tick_params(length=0)
        axis.grid(axis="x")
        axis.set_xlabel("seconds")
        most = max(sums, key=lambda stage: sums[stage])
        return drawing.picture(
            figure, "cost", "Cost by stage",
            f"The stages took {seconds(whole)} together; {most} the most, {seconds(sums[most])}.",
            "A bar for each stage, divided by task or model; those that are too short for a name have none.",
        )  # fmt: skip


def seconds(value: float) -> str:
    """A time for people: "0.4 s", "12 s", "3 min 20 s"."""
    if value < 10:
        return f"{value:.1f} s"
    if value < 120:
        return f"{value:.0f} s"
    minutes, rest = divmod(round(value), 60)
    return f"{minutes} min {rest} s" if minutes < 120 else f"{minutes // 60} h {minutes % 60} min"
