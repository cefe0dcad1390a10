"""The comparison of merge methods over sets of experts: tables over its cells.

A cell is a set of experts merged with one method and tried on every task of the set
(`fmn.experiments`).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import permutations
from statistics import fmean

import numpy as np

from fmn.evaluate import bootstrap
from fmn.evaluate.bootstrap import Difference
from fmn.evaluate.metrics import Answers
from fmn.experiments.files import Cell
from fmn.report import results
from fmn.report.results import AVERAGE, BOUNDS, EXPERT, MACRO, Estimate, mean
from fmn.store.records import Record

Cells = Mapping[str, Mapping[str, Cell]]
"""By set of experts and method."""


@dataclass(frozen=True)
class Comparison:
    """The tables of a comparison; estimates are relative to the experts, but for `scores`.

    Attributes:
        means: by method and kind of set ("pairs", "triples", "all", MACRO).
        seconds: mean time of a merge, by method.
        sets: by method and set.
        largest: name of the last set, which `scores` and `differences` are of.
        scores: by method, EXPERT the last, and task, MACRO the last.
        differences: of the mean score from that of the average, by method.
        pairs: by method, what is left of a task's score by (task, the task it was merged with).
        best: the method with the largest mean.
    """

    means: Mapping[str, Mapping[str, Estimate]]
    seconds: Mapping[str, float]
    sets: Mapping[str, Mapping[str, Estimate]]
    largest: str
    scores: Mapping[str, Mapping[str, Estimate]]
    differences: Mapping[str, Difference]
    pairs: Mapping[str, Mapping[tuple[str, str], float]]
    best: str


def compare(cells: Cells) -> Comparison:
    """The tables over the cells."""
    methods = list(next(iter(cells.values())))
    candidates = [method for method in methods if method not in BOUNDS] or methods
    shares, means = _shares(cells), {}
    for method in methods:
        row = {k: mean([shares[name][method] for name in n]) for k, n in kinds(cells).items()}
        means[method] = {**row, MACRO: mean(list(row.values()))}
    largest = list(cells)[-1]
    scores = {method: _scores(cell) for method, cell in cells[largest].items()}
    return Comparison(
        means=means,
        seconds={m: fmean(row[m].seconds for row in cells.values()) for m in methods},
        sets={m: {name: row[m] for name, row in shares.items()} for m in methods},
        largest=largest,
        scores=scores | {EXPERT: _scores(cells[largest][methods[0]], of_expert=True)},
        differences=differences(cells[largest]),
        pairs={method: pairs(cells, method) for method in methods},
        best=max(candidates, key=lambda method: means[method][MACRO].value),
    )


def kinds(cells: Cells) -> dict[str, list[str]]:
    """The sets of each size, by "pairs", "triples", "all"."""
    sizes = {name: name.count("+") + 1 for name in cells}
    titles = {2: "pairs", 3: "triples", max(sizes.values()): "all"}
    by_title: dict[str, list[str]] = {}
    for name, size in sizes.items():
        by_title.setdefault(titles[size], []).append(name)
    return by_title


def answers(cell: Cell, of_expert: bool = False) -> dict[str, dict[str, Answers]]:
    """What the merged model of a cell, or the experts, answered, by task and split."""
    return {
        task: {"tried": Answers(np.array(predictions), np.array(entry.labels))}
        for task, entry in cell.tasks.items()
        for predictions in [entry.expert_predictions if of_expert else entry.predictions]
    }


def _shares(cells: Cells) -> dict[str, dict[str, Estimate]]:
    """By set and method: the mean share over the tasks whose expert scores above 0, else 0."""
    known: dict[tuple[str, bytes], np.ndarray] = {}  # an expert answers the same in every cell

    def draws(task: str, part: Answers) -> np.ndarray:
        key = (task, part.predicted.tobytes() + part.labels.tobytes())
        if key not in known:
            known[key] = bootstrap.draws({task: {"tried": part}})[task]
        return known[key]

    def share(cell: Cell) -> Estimate:
        merged, experts = answers(cell), answers(cell, of_expert=True)
        parts = []
        for task, entry in cell.tasks.items():
            if entry.relative is not None:
                pair = (draws(task, side[task]["tried"]) for side in (merged, experts))
                parts.append(Estimate(entry.relative, bootstrap.relative(*pair)))
        return mean(parts) if parts else Estimate(0.0, None)

    return {
        name: {method: share(cell) for method, cell in row.items()} for name, row in cells.items()
    }


def _scores(cell: Cell, of_expert: bool = False) -> dict[str, Estimate]:
    """The scores of a cell's merged model, or of the experts, and their mean."""
    draws = bootstrap.draws(answers(cell, of_expert))
    scores = {t: entry.expert if of_expert else entry.score for t, entry in cell.tasks.items()}
    rows = {task: Estimate(score, draws[task]) for task, score in scores.items()}
    rows[MACRO] = mean(list(rows.values()))
    return rows


def differences(row: Mapping[str, Cell]) -> dict[str, Difference]:
    """How every method's mean score on a set differs from the average's, on the same examples.

    Without the method `average`, from the first method's.
    """
    first = AVERAGE if AVERAGE in row else next(iter(row))
    return {
        method: bootstrap.compare(answers(cell), answers(row[first]))
        for method, cell in row.items()
        if method != first
    }


def pairs(cells: Cells, method: str) -> dict[tuple[str, str], float]:
    """What a method keeps of a task's score in sets of two, by (task, its partner)."""
    return {
        (task, partner): share
        for row in cells.values()
        for task, partner in permutations(row[method].tasks, 2)
        if len(row[method].tasks) == 2
        if (share := row[method].tasks[task].relative) is not None
    }


# ---- as text and as numbers ----


def text_table(comparison: Comparison) -> results.TextTable:
    """Header and rows: each method's means in percent, and the seconds that a merge takes."""
    kinds = list(comparison.means[comparison.best])
    body = []
    for method, row in comparison.means.items():
        numbers = [results.percent(row[kind].value) for kind in kinds]
        seconds = f"{comparison.seconds[method]:.1f}"
        body.append([method, *numbers, results.span(row[MACRO].interval), seconds])
    body.append([EXPERT, *["100.0"] * len(kinds), "", ""])
    return ["method", *kinds, "95 % interval", "seconds"], body


class ComparisonResults(Record):
    """``results.json``: of each method the means and their intervals, of each cell the scores."""

    methods: dict[str, dict[str, float]]
    intervals: dict[str, dict[str, tuple[float, float] | None]]
    sets: dict[str, dict[str, dict[str, dict[str, float | None]]]]


def numbers(cells: Cells, comparison: Comparison) -> ComparisonResults:
    """The tables as numbers."""
    numbers = ComparisonResults(methods={}, intervals={}, sets={})
    for method, row in comparison.means.items():
        values = {kind: estimate.value for kind, estimate in row.items()}
        numbers.methods[method] = {**values, "seconds": comparison.seconds[method]}
        numbers.intervals[method] = {kind: estimate.interval for kind, estimate in row.items()}
    for name, by_method in cells.items():
        numbers.sets[name] = {
            method: {
                task: entry.model_dump(include={"score", "expert", "relative"})
                for task, entry in cell.tasks.items()
            }
            for method, cell in by_method.items()
        }
    return numbers
