"""The comparison of merge methods over sets of experts: which sets, and the tables over their cells.

A cell is a set of experts merged with one method and tried on every task of the set (`fmn.merge_stages.compare`).
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fmn.evaluate import bootstrap as intervals
from fmn.evaluate.bootstrap import Difference
from fmn.evaluate.metrics import Answers
from fmn.experiments.grid import AVERAGE, BOUNDS
from fmn.report.results import EXPERT, Estimate, markdown, mean, percent, points, span
from fmn.tasks import task as tasks

Cell = Mapping[str, Any]
Cells = Mapping[str, Mapping[str, Cell]]
"""By set of experts and method."""


def kinds(cells: Cells) -> dict[str, list[str]]:
    """The sets of each size, by "pairs", "triples", "all"."""
    largest = max(name.count("+") + 1 for name in cells)
    names = {2: "pairs", 3: "triples", largest: "all"}
    found: dict[str, list[str]] = {}
    for name in cells:
        found.setdefault(names[name.count("+") + 1], []).append(name)
    return found


def relative(cell: Cell) -> float:
    """The mean over a cell's tasks of the score relative to the expert's; a task whose expert scores 0 is left out."""
    shares = [
        entry["relative"] for entry in cell["tasks"].values() if entry["relative"] is not None
    ]
    return mean(shares) if shares else 0.0


class Resampled(NamedTuple):
    """What a cell's merged model scores in each bootstrap resample, by task; and its `relative`, None without one."""

    scores: Mapping[str, np.ndarray]
    relative: np.ndarray | None


def resampled(cells: Cells) -> dict[str, dict[str, Resampled]]:
    """Every cell's scores in the same resamples of the examples, by set and method."""
    known: dict[
        tuple[str, bytes, bytes], np.ndarray
    ] = {}  # an expert answers the same in every cell

    def scores(task: str, entry: Mapping[str, Any], which: str) -> np.ndarray:
        given = Answers(np.array(entry[which]), np.array(entry["labels"]))
        key = (task, given.predicted.tobytes(), given.labels.tobytes())
        if key not in known:
            known[key] = intervals.resampled(tasks.task(task), {"tried": given})["score"]
        return known[key]

    def one(cell: Cell) -> Resampled:
        entries = cell["tasks"]
        mine = {task: scores(task, entry, "predictions") for task, entry in entries.items()}
        shares = {
            task: intervals.relative(mine[task], scores(task, entry, "expert_predictions"))
            for task, entry in entries.items()
            if entry["relative"] is not None
        }
        sure = {task: share for task, share in shares.items() if share is not None}
        return Resampled(mine, intervals.macro(sure) if sure and len(sure) == len(shares) else None)

    return {
        name: {method: one(cell) for method, cell in row.items()} for name, row in cells.items()
    }


def estimate(value: float, draws: Sequence[np.ndarray | None]) -> Estimate:
    """A mean with the interval of the mean of what it is of, which are independent of one another or paired."""
    known = [one for one in draws if one is not None]
    whole = known and len(known) == len(draws)
    return Estimate(value, intervals.interval(np.mean(known, axis=0)) if whole else None)


def summary(
    cells: Cells, drawn: Mapping[str, Mapping[str, Resampled]] | None = None
) -> dict[str, dict[str, Estimate]]:
    """By method: the mean of `relative` over the sets of each size, and "mean", the mean of those means."""
    drawn = resampled(cells) if drawn is None else drawn
    sizes = kinds(cells)
    found: dict[str, dict[str, Estimate]] = {}
    for method in next(iter(cells.values())):
        by_size, means = {}, []
        for kind, names in sizes.items():
            draws = [drawn[name][method].relative for name in names]
            by_size[kind] = estimate(mean(relative(cells[name][method]) for name in names), draws)
            known = [one for one in draws if one is not None]
            means.append(np.mean(known, axis=0) if len(known) == len(draws) else None)
        found[method] = {
            **by_size,
            "mean": estimate(mean(one.value for one in by_size.values()), means),
        }
    return found


def seconds(cells: Cells) -> dict[str, float]:
    """The mean time that a merge took, by method."""
    return {
        method: mean(row[method]["seconds"] for row in cells.values())
        for method in next(iter(cells.values()))
    }


def best(cells: Cells, means: Mapping[str, Mapping[str, Estimate]]) -> str:
    """The method with the largest mean, of those that are no bound where there are some."""
    chosen = [method for method in means if method not in BOUNDS] or list(means)
    return max(chosen, key=lambda method: means[method]["mean"].value)


def answers(cell: Cell) -> dict[str, dict[str, Answers]]:
    """What the merged model of a cell answered, by task, as `fmn.intervals` takes it."""
    return {
        task: {"tried": Answers(np.array(entry["predictions"]), np.array(entry["labels"]))}
        for task, entry in cell["tasks"].items()
    }


def differences(row: Mapping[str, Cell]) -> dict[str, Difference]:
    """How every method's mean score over the tasks of a set differs from the average's, on the same examples.

    Without the method `average`, from the first method's.
    """
    given = {method: answers(cell) for method, cell in row.items()}
    first = AVERAGE if AVERAGE in given else next(iter(given))
    return {
        method: intervals.compare(one, given[first])
        for method, one in given.items()
        if method != first
    }


def pairs(cells: Cells, method: str) -> dict[tuple[str, str], float]:
    """What a method keeps of a task's score, by (task, the task that it was merged with), in the sets of two."""
    found = {}
    for row in cells.values():
        entries = row[method]["tasks"]
        if len(entries) == 2:
            for task, partner in (tuple(entries), tuple(entries)[::-1]):
                if entries[task]["relative"] is not None:
                    found[task, partner] = entries[task]["relative"]
    return found


class Compared(NamedTuple):
    """The numbers of a comparison; those relative to the experts are means over the tasks.

    Attributes:
        means: by method and kind of set ("pairs", "triples", "all", "mean").
        seconds: of a merge, by method.
        sets: by set and method.
        largest: the name of the last set, which the tables by task are of.
        scores: on that set, by method, EXPERT among them, and task, "mean" among them.
        differences: on that set, of the mean score from that of the average, by method.
        pairs: by method, as `pairs` has it.
        best: the method that keeps most in the mean.
    """

    means: Mapping[str, Mapping[str, Estimate]]
    seconds: Mapping[str, float]
    sets: Mapping[str, Mapping[str, Estimate]]
    largest: str
    scores: Mapping[str, Mapping[str, Estimate]]
    differences: Mapping[str, Difference]
    pairs: Mapping[str, Mapping[tuple[str, str], float]]
    best: str


def compared(cells: Cells) -> Compared:
    """What a comparison found."""
    drawn = resampled(cells)
    means = summary(cells, drawn)
    by_set = {
        name: {
            method: estimate(relative(cell), [drawn[name][method].relative])
            for method, cell in row.items()
        }
        for name, row in cells.items()
    }
    last = list(cells)[-1]

    def by_task(
        values: Mapping[str, float], draws: Mapping[str, np.ndarray]
    ) -> dict[str, Estimate]:
        found = {task: estimate(values[task], [draws[task]]) for task in values}
        return {**found, "mean": estimate(mean(values.values()), [intervals.macro(draws)])}

    scores = {
        method: by_task(
            {task: entry["score"] for task, entry in cell["tasks"].items()},
            drawn[last][method].scores,
        )
        for method, cell in cells[last].items()
    }
    entries = next(iter(cells[last].values()))["tasks"]
    alone = {
        task: {"tried": Answers(np.array(entry["expert_predictions"]), np.array(entry["labels"]))}
        for task, entry in entries.items()
    }
    scores[EXPERT] = by_task(
        {task: entry["expert"] for task, entry in entries.items()}, intervals.draws(alone)
    )
    return Compared(
        means,
        seconds(cells),
        by_set,
        last,
        scores,
        differences(cells[last]),
        {method: pairs(cells, method) for method in means},
        best(cells, means),
    )


def write(out: Path, cells: Cells) -> dict[str, Any]:
    """Fill the folder ``out``: ``report.html``, ``pictures``, ``results.json``, ``table.md``.

    Returns the first table's (header, rows) under "table", and its numbers.
    """
    from fmn.report import drawing, page, pictures

    found = compared(cells)
    numbers = {
        method: {kind: one.value for kind, one in row.items()} | {"seconds": found.seconds[method]}
        for method, row in found.means.items()
    }
    ends = {
        method: {kind: one.interval for kind, one in row.items()}
        for method, row in found.means.items()
    }
    kept = {
        name: {
            method: {
                task: {key: entry[key] for key in ("score", "expert", "relative")}
                for task, entry in cell["tasks"].items()
            }
            for method, cell in row.items()
        }
        for name, row in cells.items()
    }
    content = {"methods": numbers, "intervals": ends, "sets": kept}
    (out / "results.json").write_text(json.dumps(content, indent=1) + "\n")
    (out / "table.md").write_text("\n".join(_text(found)))
    drawn = pictures.of_comparison(found)
    drawing.write(out / "pictures", drawn)
    (out / "report.html").write_text(page.of_comparison(found, drawn))
    return {"table": _methods(found), "methods": numbers}


def _methods(found: Compared) -> tuple[list[str], list[list[str]]]:
    sizes = list(next(iter(found.means.values())))
    body = [
        [
            method,
            *(percent(row[kind].value) for kind in sizes),
            span(row["mean"].interval),
            f"{found.seconds[method]:.1f}",
        ]
        for method, row in found.means.items()
    ]
    return ["method", *sizes, "95 % interval", "seconds"], [
        *body,
        [EXPERT, *["100.0"] * len(sizes), "", ""],
    ]


def _text(found: Compared) -> list[str]:
    of_tasks = list(next(iter(found.scores.values())))
    return [
        "Mean of the score relative to the expert, in percent, over the sets of experts; the 95 % interval of the mean"
        " (bootstrap of the examples); seconds that a merge takes.",
        "",
        markdown(*_methods(found)),
        f"Scores in percent of {found.largest}:",
        "",
        markdown(
            ["method", *of_tasks],
            [
                [method, *(percent(row[task].value) for task in of_tasks)]
                for method, row in found.scores.items()
            ],
        ),
        f"Mean score of {found.largest}, its difference from {AVERAGE} in points, the 95 % interval of that and the"
        " p-value of the paired bootstrap on the same examples:",
        "",
        markdown(
            ["method", "difference", "interval", "p"],
            [
                [
                    method,
                    points(one.difference),
                    " to ".join(map(points, one.interval)),
                    f"{one.p_value:.3f}",
                ]
                for method, one in found.differences.items()
            ],
        ),
        "Mean of the score relative to the expert, in percent:",
        "",
        markdown(
            ["method", *found.sets],
            [
                *(
                    [method, *(percent(row[method].value) for row in found.sets.values())]
                    for method in found.means
                ),
                [EXPERT, *["100.0"] * len(found.sets)],
            ],
        ),
    ]
