"""Compare merge methods over sets of experts: tables of the cells of a comparison.

A cell is a set of experts, merged with one method and scored on every task of the set
(`fmn.experiments`).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import permutations
from statistics import fmean

import numpy as np

from fmn.evaluate import bootstrap
from fmn.evaluate.bootstrap import Difference
from fmn.evaluate.metrics import TaskAnswers, averaged, higher_is_better, listed_answers
from fmn.experiments.files import Cell
from fmn.report import results, wording
from fmn.report.results import AVERAGE, BOUNDS, EXPERT, MACRO, Estimate, mean
from fmn.report.wording import shown
from fmn.store.records import Record
from fmn.tasks.task import Task

Cells = Mapping[str, Mapping[str, Cell]]
"""By set of experts and method."""


@dataclass(frozen=True)
class Comparison:
    """The tables of a comparison; estimates are shares of the experts' scores, except `scores`.

    Attributes:
        means: by method and kind of set ("pairs", "triples", "all", MACRO).
        seconds: mean time of a merge, by method.
        sets: by method and set.
        largest: name of the last set; `scores` and `differences` are on its tasks.
        tasks: definitions of the tasks of the last set.
        averaged: the tasks of the mean score.
        scores: by method (EXPERT is the last) and task (MACRO is the last).
        differences: the mean score minus that of the average, by method.
        pairs: by method, the share of a task's score by (task, the task it was merged with).
        best: the method with the largest mean.
    """

    means: Mapping[str, Mapping[str, Estimate]]
    seconds: Mapping[str, float]
    sets: Mapping[str, Mapping[str, Estimate]]
    largest: str
    tasks: Mapping[str, Task]
    averaged: Sequence[str]
    scores: Mapping[str, Mapping[str, Estimate]]
    differences: Mapping[str, Difference]
    pairs: Mapping[str, Mapping[tuple[str, str], float]]
    best: str


def compare(cells: Cells) -> Comparison:
    """Compute the tables from the cells."""
    methods = list(next(iter(cells.values())))
    candidates = [method for method in methods if method not in BOUNDS] or methods
    shares, means = _shares(cells), {}
    for method in methods:
        parts = {k: mean([shares[name][method] for name in n]) for k, n in kinds(cells).items()}
        means[method] = {**parts, MACRO: mean(list(parts.values()))}
    largest = list(cells)[-1]
    row = cells[largest]
    tasks = {name: entry.definition for name, entry in row[methods[0]].tasks.items()}
    counted = averaged({name: row[methods[0]].tasks[name].expert for name in tasks}, tasks)
    counted = [n for n in counted if all(cell.tasks[n].score is not None for cell in row.values())]
    scores = {method: _scores(cell, counted) for method, cell in row.items()}
    scores[EXPERT] = _scores(row[methods[0]], counted, of_expert=True)
    return Comparison(
        means=means,
        seconds={m: fmean(row[m].seconds for row in cells.values()) for m in methods},
        sets={m: {name: row[m] for name, row in shares.items()} for m in methods},
        largest=largest,
        tasks=tasks,
        averaged=counted,
        scores=scores,
        differences=differences(row),
        pairs={method: pairs(cells, method) for method in methods},
        best=max(candidates, key=lambda method: means[method][MACRO].value or 0.0),
    )


def kinds(cells: Cells) -> dict[str, list[str]]:
    """The sets of each size, by "pairs", "triples", "all"."""
    sizes = {name: name.count("+") + 1 for name in cells}
    titles = {2: "pairs", 3: "triples", max(sizes.values()): "all"}
    by_title: dict[str, list[str]] = {}
    for name, size in sizes.items():
        by_title.setdefault(titles[size], []).append(name)
    return by_title


def answers(cell: Cell, of_expert: bool = False) -> dict[str, TaskAnswers]:
    """The answers of a cell's merged model, or of the experts, by task."""
    answered = {}
    for name, entry in cell.tasks.items():
        predictions = entry.expert_predictions if of_expert else entry.predictions
        scores = entry.expert_scores if of_expert else entry.scores
        split = listed_answers(entry.definition, predictions, entry.labels, scores)
        answered[name] = TaskAnswers(entry.definition, {"tried": split})
    return answered


def _shares(cells: Cells) -> dict[str, dict[str, Estimate]]:
    """By set and method: the mean share over the tasks that have one.

    If an expert has a score where the merged model has none, the mean is undefined.
    """
    of_experts: dict[str, np.ndarray] = {}  # an expert's answers are the same in every cell

    def share(cell: Cell) -> Estimate:
        experts = answers(cell, of_expert=True)
        new = {name: experts[name] for name in experts.keys() - of_experts.keys()}
        of_experts.update(bootstrap.draws(new))
        parts = []
        for name, draws in bootstrap.draws(answers(cell)).items():
            entry = cell.tasks[name]
            if entry.score is None and entry.expert is not None:
                return Estimate(None)
            if entry.relative is not None:
                shares = bootstrap.relative(entry.definition, draws, of_experts[name])
                parts.append(Estimate(entry.relative, shares))
        return mean(parts)

    return {
        name: {method: share(cell) for method, cell in row.items()} for name, row in cells.items()
    }


def _scores(cell: Cell, averaged: Sequence[str], of_expert: bool = False) -> dict[str, Estimate]:
    """The scores of a cell's merged model, or of the experts, and the mean of some tasks."""
    draws = bootstrap.draws(answers(cell, of_expert))
    rows = {}
    for name, entry in cell.tasks.items():
        score = entry.expert if of_expert else entry.score
        rows[name] = Estimate(score, draws[name], higher_is_better(entry.definition))
    return {**rows, MACRO: mean([rows[name] for name in averaged])}


def differences(row: Mapping[str, Cell]) -> dict[str, Difference]:
    """Each method's mean score on a set minus the average's, on the same examples.

    Without the method `average`, the first method takes its place. P-values have Holm's correction.
    """
    first = AVERAGE if AVERAGE in row else next(iter(row))
    tests = {
        method: bootstrap.compare(answers(cell), answers(row[first]))
        for method, cell in row.items()
        if method != first
    }
    return bootstrap.holm(tests)


def pairs(cells: Cells, method: str) -> dict[tuple[str, str], float]:
    """The share that a method keeps of a task's score in pairs, by (task, its partner)."""
    return {
        (task, partner): share
        for row in cells.values()
        for task, partner in permutations(row[method].tasks, 2)
        if len(row[method].tasks) == 2
        if (share := row[method].tasks[task].relative) is not None
    }


# ---- as text and as numbers ----


def text_table(comparison: Comparison) -> wording.TextTable:
    """Header and rows: each method's means in percent, and the seconds of a merge."""
    kinds = list(comparison.means[comparison.best])
    body = []
    for method, row in comparison.means.items():
        numbers = [row[kind].text for kind in kinds]
        body.append([method, *numbers, row[MACRO].span, f"{comparison.seconds[method]:.1f}"])
    rows = comparison.means.values()
    has_share = {kind: any(row[kind].value is not None for row in rows) for kind in kinds}
    whole = [shown(1.0 if has_share[kind] else None) for kind in kinds]
    body.append([EXPERT, *whole, "", ""])
    return ["method", *kinds, "95 % interval", "seconds"], body


def notes(comparison: Comparison) -> list[str]:
    """Notes on the tables, a line each."""
    scores = {name: comparison.scores[EXPERT][name].value for name in comparison.tasks}
    return results.score_remarks(scores, comparison.tasks, comparison.averaged)


class ComparisonResults(Record):
    """``results.json``: the means and intervals of each method, and the scores of each cell.

    Undefined numbers are left out, or None.
    """

    methods: dict[str, dict[str, float]]
    intervals: dict[str, dict[str, tuple[float, float] | None]]
    sets: dict[str, dict[str, dict[str, dict[str, float | None]]]]


def numbers(cells: Cells, comparison: Comparison) -> ComparisonResults:
    """The tables as numbers."""
    numbers = ComparisonResults(methods={}, intervals={}, sets={})
    for method, row in comparison.means.items():
        values = {kind: each.value for kind, each in row.items() if each.value is not None}
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
