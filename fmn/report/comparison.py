"""The comparison of merge methods over sets of experts: tables over its cells.

A cell is a set of experts merged with one method and tried on every task of the set
(`fmn.experiments`).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import NamedTuple

import numpy as np

from fmn.evaluate import bootstrap
from fmn.evaluate.bootstrap import Answers, Difference
from fmn.report.results import (
    AVERAGE,
    BOUNDS,
    EXPERT,
    MACRO,
    Estimate,
    TextTable,
    estimate,
    percent,
    span,
)
from fmn.store.records import Cell, Record, Tried
from fmn.tasks import task as tasks

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


class _Draws(NamedTuple):
    """A cell in every bootstrap resample [R]: its scores by task, and their mean share if any."""

    scores: Mapping[str, np.ndarray]
    relative: np.ndarray | None


def compare(cells: Cells) -> Comparison:
    """The tables over the cells."""
    experts: dict[tuple[str, bytes, bytes], np.ndarray] = {}
    draws = {
        name: {method: _draw(cell, experts) for method, cell in row.items()}
        for name, row in cells.items()
    }
    methods = list(next(iter(cells.values())))
    means = {method: _means(cells, draws, method) for method in methods}
    largest = list(cells)[-1]
    last = cells[largest]
    scores = {
        method: _by_task(
            {task: one.score for task, one in cell.tasks.items()}, draws[largest][method].scores
        )
        for method, cell in last.items()
    }
    entries = next(iter(last.values())).tasks
    alone = {task: {"tried": _answers(one, one.alone)} for task, one in entries.items()}
    expert_scores = {task: one.expert for task, one in entries.items()}
    scores[EXPERT] = _by_task(expert_scores, bootstrap.draws(alone))
    candidates = [method for method in methods if method not in BOUNDS] or methods
    return Comparison(
        means,
        {method: fmean(row[method].seconds for row in cells.values()) for method in methods},
        {
            method: {
                name: estimate(relative(row[method]), [draws[name][method].relative])
                for name, row in cells.items()
            }
            for method in methods
        },
        largest,
        scores,
        differences(last),
        {method: pairs(cells, method) for method in methods},
        max(candidates, key=lambda method: means[method][MACRO].value),
    )


def kinds(cells: Cells) -> dict[str, list[str]]:
    """The sets of each size, by "pairs", "triples", "all"."""
    largest = max(name.count("+") + 1 for name in cells)
    names = {2: "pairs", 3: "triples", largest: "all"}
    result: dict[str, list[str]] = {}
    for name in cells:
        result.setdefault(names[name.count("+") + 1], []).append(name)
    return result


def relative(cell: Cell) -> float:
    """The mean over tasks of the score relative to the expert's; without experts that score 0."""
    shares = [one.relative for one in cell.tasks.values() if one.relative is not None]
    return fmean(shares) if shares else 0.0


def _answers(tried: Tried, predictions: Sequence[float]) -> Answers:
    return Answers(np.array(predictions), np.array(tried.labels))


def _draw(cell: Cell, known: dict[tuple[str, bytes, bytes], np.ndarray]) -> _Draws:
    """`known` keeps scores by task and answers: an expert answers the same in every cell."""

    def scores(task: str, answers: Answers) -> np.ndarray:
        key = (task, answers.predicted.tobytes(), answers.labels.tobytes())
        if key not in known:
            known[key] = bootstrap.resampled(tasks.task(task), {"tried": answers})["score"]
        return known[key]

    merged, shares = {}, []
    for task, one in cell.tasks.items():
        merged[task] = scores(task, _answers(one, one.predictions))
        if one.relative is not None:
            expert = scores(task, _answers(one, one.alone))
            shares.append(bootstrap.relative(merged[task], expert))
    return _Draws(merged, _mean(shares))


def _mean(draws: Sequence[np.ndarray | None]) -> np.ndarray | None:
    """The mean in every resample; None if a part is None, or if there are none."""
    parts = [part for part in draws if part is not None]
    return np.mean(parts, axis=0) if parts and len(parts) == len(draws) else None


def _means(
    cells: Cells, draws: Mapping[str, Mapping[str, _Draws]], method: str
) -> dict[str, Estimate]:
    """A method's mean of `relative` over the sets of each size, and MACRO, the mean of these."""
    result, parts = {}, []
    for kind, names in kinds(cells).items():
        parts.append(_mean([draws[name][method].relative for name in names]))
        result[kind] = estimate(fmean(relative(cells[name][method]) for name in names), parts[-1:])
    return {**result, MACRO: estimate(fmean(one.value for one in result.values()), parts)}


def _by_task(scores: Mapping[str, float], draws: Mapping[str, np.ndarray]) -> dict[str, Estimate]:
    result = {task: estimate(score, [draws[task]]) for task, score in scores.items()}
    return {**result, MACRO: estimate(fmean(scores.values()), list(draws.values()))}


def differences(row: Mapping[str, Cell]) -> dict[str, Difference]:
    """How every method's mean score on a set differs from the average's, on the same examples.

    Without the method `average`, from the first method's.
    """
    answers = {
        method: {
            task: {"tried": _answers(one, one.predictions)} for task, one in cell.tasks.items()
        }
        for method, cell in row.items()
    }
    first = AVERAGE if AVERAGE in answers else next(iter(answers))
    return {
        method: bootstrap.compare(one, answers[first])
        for method, one in answers.items()
        if method != first
    }


def pairs(cells: Cells, method: str) -> dict[tuple[str, str], float]:
    """What a method keeps of a task's score in sets of two, by (task, its partner)."""
    return {
        (task, partner): share
        for row in cells.values()
        for task in row[method].tasks
        for partner in row[method].tasks
        if task != partner and len(row[method].tasks) == 2
        if (share := row[method].tasks[task].relative) is not None
    }


# ---- as text and as numbers ----


def text_table(comparison: Comparison) -> TextTable:
    """Header and rows: each method's means in percent, and the seconds that a merge takes."""
    kinds = list(comparison.means[comparison.best])
    body = [
        [method, *(percent(one.value) for one in row.values()), span(row[MACRO].interval), seconds]
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


def results(cells: Cells, comparison: Comparison) -> ComparisonResults:
    """The tables as numbers."""
    numbers: ComparisonResults = ComparisonResults(methods={}, intervals={}, sets={})
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
