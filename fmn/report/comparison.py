"""The comparison of merge methods over sets of experts: tables over its cells.

A cell is a set of experts merged with one method and tried on every task of the set
(`fmn.experiments`).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import permutations
from statistics import fmean
from typing import Any

import numpy as np

from fmn.evaluate import bootstrap
from fmn.evaluate.bootstrap import Difference
from fmn.evaluate.metrics import Answers
from fmn.experiments.files import Cell
from fmn.report import results
from fmn.report.results import AVERAGE, BOUNDS, EXPERT, MACRO, Estimate, estimate
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
    known: dict[Any, np.ndarray] = {}
    draws = {
        name: {method: _draw(cell, known) for method, cell in row.items()}
        for name, row in cells.items()
    }
    methods = list(next(iter(cells.values())))
    means = {method: _means(cells, draws, method) for method in methods}
    largest = list(cells)[-1]
    scores = {method: _by_task(cell) for method, cell in cells[largest].items()}
    any_cell = next(iter(cells[largest].values()))
    candidates = [method for method in methods if method not in BOUNDS] or methods
    return Comparison(
        means=means,
        seconds={m: fmean(row[m].seconds for row in cells.values()) for m in methods},
        sets={
            method: {
                name: estimate([relative(row[method])], [draws[name][method]])
                for name, row in cells.items()
            }
            for method in methods
        },
        largest=largest,
        scores=scores | {EXPERT: _by_task(any_cell, of_expert=True)},
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


def relative(cell: Cell) -> float:
    """The mean over tasks of the score relative to the expert's; without experts that score 0."""
    shares = [one.relative for one in cell.tasks.values() if one.relative is not None]
    return fmean(shares) if shares else 0.0


def answers(cell: Cell, of_expert: bool = False) -> dict[str, dict[str, Answers]]:
    """What the merged model of a cell, or the experts, answered, by task and split."""
    return {
        task: {"tried": Answers(np.array(predictions), np.array(one.labels))}
        for task, one in cell.tasks.items()
        for predictions in [one.expert_predictions if of_expert else one.predictions]
    }


def _draw(cell: Cell, known: dict[Any, np.ndarray]) -> np.ndarray | None:
    """`relative` in every bootstrap resample [R]; None if an expert scores nothing in one.

    `known` keeps the draws by task and answers: an expert answers the same in every cell.
    """

    def draw(of_expert: bool) -> dict[str, np.ndarray]:
        draws = {}
        for task, splits in answers(cell, of_expert).items():
            key = (task, *(part.tobytes() for part in splits["tried"]))
            if key not in known:
                known[key] = bootstrap.draws({task: splits})[task]
            draws[task] = known[key]
        return draws

    merged, expert = draw(of_expert=False), draw(of_expert=True)
    scored = [task for task, one in cell.tasks.items() if one.relative is not None]
    return _mean([bootstrap.relative(merged[t], expert[t]) for t in scored])


def _mean(draws: Sequence[np.ndarray | None]) -> np.ndarray | None:
    """The mean in every resample; None if a part is None, or if there are none."""
    parts = [part for part in draws if part is not None]
    return np.mean(parts, axis=0) if parts and len(parts) == len(draws) else None


def _means(
    cells: Cells, draws: Mapping[str, Mapping[str, np.ndarray | None]], method: str
) -> dict[str, Estimate]:
    """A method's mean of `relative` over the sets of each size, and MACRO, the mean of these."""
    means, parts = {}, []
    for kind, names in kinds(cells).items():
        parts.append(_mean([draws[name][method] for name in names]))
        means[kind] = estimate([fmean(relative(cells[name][method]) for name in names)], parts[-1:])
    return {**means, MACRO: estimate([one.value for one in means.values()], parts)}


def _by_task(cell: Cell, of_expert: bool = False) -> dict[str, Estimate]:
    """The scores of a cell's merged model, or of the experts, and their mean."""
    draws = bootstrap.draws(answers(cell, of_expert))
    scores = {t: one.expert if of_expert else one.score for t, one in cell.tasks.items()}
    rows = {task: estimate([score], [draws[task]]) for task, score in scores.items()}
    return {**rows, MACRO: estimate(list(scores.values()), list(draws.values()))}


def differences(row: Mapping[str, Cell]) -> dict[str, Difference]:
    """How every method's mean score on a set differs from the average's, on the same examples.

    Without the method `average`, from the first method's.
    """
    first = answers(row.get(AVERAGE) or next(iter(row.values())))
    compared = {method: bootstrap.compare(answers(cell), first) for method, cell in row.items()}
    compared.pop(AVERAGE if AVERAGE in row else next(iter(row)))
    return compared


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
    body = [
        [
            method,
            *(results.percent(one.value) for one in row.values()),
            results.span(row[MACRO].interval),
            seconds,
        ]
        for method, row in comparison.means.items()
        for seconds in [f"{comparison.seconds[method]:.1f}"]
    ]
    expert = [EXPERT, *["100.0"] * len(kinds), "", ""]
    return ["method", *kinds, "95 % interval", "seconds"], [*body, expert]


class ComparisonResults(Record):
    """``results.json`` of a comparison.

    Attributes:
        methods: by method its means, and "seconds".
        intervals: by method the 95 % intervals of its means.
        sets: by set, method and task: "score", "expert" (its score), "relative" (their ratio).
    """

    methods: dict[str, dict[str, float]]
    intervals: dict[str, dict[str, tuple[float, float] | None]]
    sets: dict[str, dict[str, dict[str, dict[str, float | None]]]]


def numbers(cells: Cells, comparison: Comparison) -> ComparisonResults:
    """The tables as numbers."""
    numbers = ComparisonResults(methods={}, intervals={}, sets={})
    for method, row in comparison.means.items():
        numbers.methods[method] = {kind: one.value for kind, one in row.items()}
        numbers.methods[method]["seconds"] = comparison.seconds[method]
        numbers.intervals[method] = {kind: one.interval for kind, one in row.items()}
    for name, by_method in cells.items():
        numbers.sets[name] = {
            method: {
                task: {"score": one.score, "expert": one.expert, "relative": one.relative}
                for task, one in cell.tasks.items()
            }
            for method, cell in by_method.items()
        }
    return numbers
