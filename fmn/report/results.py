"""Compare the scores of experts and merged models: a table as data, as text and as numbers."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import product
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import numpy as np

from fmn.errors import UserError
from fmn.evaluate import bootstrap
from fmn.evaluate.bootstrap import Difference, Interval
from fmn.evaluate.files import Metrics, TaskRows, TaskScores, read_metrics, read_predictions
from fmn.evaluate.metrics import TaskAnswers, averaged, higher_is_better, relative
from fmn.fisher.architectures import NodeValues, tempered
from fmn.merge.methods import METHODS
from fmn.merge.recipe import Recipe
from fmn.report.wording import TextTable, listed, metric_words, shown, span, task_table
from fmn.store.stage import read_sidecar
from fmn.tasks.metrics import METRICS
from fmn.tasks.task import Task

MACRO = "mean"
EXPERT = "expert"
AVERAGE = "average"
BOUNDS: Mapping[str, str] = {
    "base": "the base model under each expert's head (lower bound)",
    AVERAGE: "the plain average of the parameters",
    EXPERT: "each expert alone (upper bound)",
}
"""The columns that a merge is compared with, and their meanings."""
UNLABELED = "not scored, as its rows have no labels"
NO_INTERVAL = "–"
FEW = 5  # with at most so many columns, intervals fit on a terminal


class Evaluated(NamedTuple):
    """A model's metrics, and by task the answers that they were computed from."""

    metrics: Metrics
    answers: Mapping[str, TaskAnswers]


@dataclass(frozen=True, eq=False)
class Estimate:
    """A number, and its value in each bootstrap resample.

    Attributes:
        value: the number; None if it is undefined.
        draws: its values in the resamples, float64 [R], if they are known.
        is_percent: whether it is shown in percent; errors are not.
    """

    value: float | None
    draws: np.ndarray | None = None
    is_percent: bool = True

    @cached_property
    def interval(self) -> Interval | None:
        """The 95 % interval."""
        return None if self.draws is None else bootstrap.interval(self.draws)

    @property
    def text(self) -> str:
        """The number as text."""
        return shown(self.value, self.is_percent)

    @property
    def with_unit(self) -> str:
        """The number as text, with a percent sign if it is a percentage."""
        return self.text + " %" * (self.is_percent and self.value is not None)

    @property
    def span(self) -> str:
        """The interval as text."""
        return span(self.interval, self.is_percent)


def mean(parts: Sequence[Estimate]) -> Estimate:
    """The mean of the defined estimates; it has draws only if all of them have."""
    values = [part.value for part in parts if part.value is not None]
    draws = [part.draws for part in parts if part.value is not None and part.draws is not None]
    if not values:
        return Estimate(None)
    return Estimate(fmean(values), np.mean(draws, axis=0) if len(draws) == len(values) else None)


class Entry(NamedTuple):
    """A model's score, and its share of the expert's score, if that is defined."""

    score: Estimate
    share: Estimate | None


def read_evaluated(metrics: Path) -> Evaluated:
    """Read a metrics file, and the predictions beside it."""
    return Evaluated(read_metrics(metrics), read_predictions(metrics))


class Cost(NamedTuple):
    """The run time of a stage for a task or a model."""

    stage: str
    name: str
    seconds: float


def read_costs(*inputs: Mapping[str, Path]) -> list[Cost]:
    """The run times of the stages that wrote these inputs, from their sidecars, by stage."""
    files = [item for paths in inputs for item in paths.items()]
    sidecars = [(name, sidecar) for name, path in files if (sidecar := read_sidecar(path))]
    stages = list(dict.fromkeys(sidecar.stage for _, sidecar in sidecars))
    costs = [Cost(sidecar.stage, name, sidecar.seconds) for name, sidecar in sidecars]
    return sorted(costs, key=lambda cost: stages.index(cost.stage))


@dataclass(frozen=True)
class Table:
    """Scores of merged models and of the experts on the same examples.

    Attributes:
        definitions: the tasks' definitions, in order.
        data: the origin of the tasks' rows.
        examples: number of examples by task.
        columns: scores by model (EXPERT is the last, if there are experts), then by row.
        headline: name of the column that the report is about.
        differences: the headline's score minus another column's, by column, then by row. P-values
            have Holm's correction over the tasks of a column, and over all means.
        averaged: the tasks of the mean score; their scores are percentages.
        guessing: the tasks whose expert is no better than a constant answer on these examples.
        unlabeled: the merged tasks that have no scores, as their rows have no labels.
    """

    definitions: Mapping[str, Task]
    data: Mapping[str, TaskRows]
    examples: Mapping[str, int]
    columns: Mapping[str, Mapping[str, Entry]]
    headline: str
    differences: Mapping[str, Mapping[str, Difference]]
    averaged: tuple[str, ...]
    guessing: tuple[str, ...] = ()
    unlabeled: tuple[str, ...] = ()

    @property
    def tasks(self) -> tuple[str, ...]:
        """Names of the tasks."""
        return tuple(self.definitions)

    @property
    def rows(self) -> tuple[str, ...]:
        """The tasks, then MACRO if there are several."""
        return (*self.tasks, MACRO) if len(self.tasks) > 1 else self.tasks


@dataclass(frozen=True)
class Report:
    """The content of a run's report.

    Attributes:
        table: the scores.
        recipes: the recipes of merged models, by column, if they are known.
        fisher: Fisher information by task, float64 [nodes] by site; may be empty.
        costs: run times of the stages.
        sizes: parameters for all tasks together, in units of one encoder, by column; may be empty.
        registry: name of the registered model that the headline becomes a version of, if any.
    """

    table: Table
    recipes: Mapping[str, Recipe]
    fisher: Mapping[str, NodeValues]
    costs: Sequence[Cost]
    sizes: Mapping[str, float] = field(default_factory=dict)
    registry: str = ""

    @property
    def tasks(self) -> TextTable:
        """The table of the tasks."""
        return task_table(self.table.definitions, self.table.data)

    @cached_property
    def shares(self) -> dict[str, NodeValues]:
        """Every expert's share of each mask node in the headline's model, by task."""
        recipe = self.recipes.get(self.table.headline)
        return node_shares(self.fisher, recipe) if recipe else {}


# ---- from metrics to the table ----


def tabulate(
    experts: Mapping[str, Evaluated], merged: Mapping[str, Evaluated], headline: str = ""
) -> Table:
    """Build the table of scores on the first merged model's tasks.

    Args:
        experts: the evaluated experts by task.
        merged: the evaluated merged models by name of their column.
        headline: the column that the report is about; default: `default_headline`.

    Raises:
        UserError: a model was not evaluated on the same tasks and examples.
    """
    first = headline or default_headline(merged)
    entries = next(iter(merged.values())).metrics.tasks
    if MACRO in entries:
        raise UserError(f"task {MACRO}: the row of means is called so; give the task another name")
    for name, model in merged.items():
        if missing := [task for task in entries if task not in model.metrics.tasks]:
            raise UserError(
                f"{name}: no metrics of task {missing[0]}; evaluate it on {', '.join(entries)}"
            )
    models = {name: dict.fromkeys(entries, model) for name, model in merged.items()}
    if alone := {task: experts[task] for task in entries if task in experts}:
        models[EXPERT] = alone
    columns = {}
    for name, by_task in models.items():
        scores = {task: model.metrics.tasks[task].score for task, model in by_task.items()}
        answers = {task: model.answers[task] for task, model in by_task.items()}
        columns[name] = _Column(scores, answers, bootstrap.draws(answers))
    definitions = {name: task for name, (task, _) in columns[first].answers.items()}
    counted = tuple(
        name
        for name, task in definitions.items()
        if higher_is_better(task)
        and all(column.scores.get(name, 0) is not None for column in columns.values())
    )
    return Table(
        definitions=definitions,
        data=merged[first].metrics.data,
        examples={
            name: sum(len(split.labels) for split in answered.splits.values())
            for name, answered in columns[first].answers.items()
        },
        columns={
            name: _entries(column, columns.get(EXPERT), counted, definitions)
            for name, column in columns.items()
        },
        headline=first,
        differences=_corrected({n: _differences(first, n, columns) for n in columns if n != first}),
        averaged=counted,
        unlabeled=tuple(merged[first].metrics.unlabeled),
        guessing=tuple(
            task
            for task, model in alone.items()
            if model.metrics.tasks[task].score is not None
            and bootstrap.at_chance(*model.answers[task])
        ),
    )


def default_headline(names: Iterable[str]) -> str:
    """The merged model that a report is about by default: the last that is not a bound."""
    return ([name for name in names if name not in BOUNDS] or list(names))[-1]


class _Column(NamedTuple):
    """Scores, answers, and the score in each bootstrap resample, float64 [R], all by task."""

    scores: Mapping[str, float | None]
    answers: Mapping[str, TaskAnswers]
    draws: Mapping[str, np.ndarray]


def _entries(
    column: _Column, expert: _Column | None, averaged: Sequence[str], tasks: Mapping[str, Task]
) -> dict[str, Entry]:
    """A column's entries by row, with the means of scores (over `averaged`) and of shares.

    If an expert has a score where the model has none, the mean share is undefined.
    """
    entries = {}
    for name, score in column.scores.items():
        task, share = tasks[name], None
        draws = column.draws[name]
        if expert and (part := relative(task, score, expert.scores.get(name))) is not None:
            share = Estimate(part, bootstrap.relative(task, draws, expert.draws[name]))
        entries[name] = Entry(Estimate(score, draws, higher_is_better(task)), share)
    shares = [share for _, share in entries.values() if share]
    scores = [entry.score for name, entry in entries.items() if name in averaged]
    is_lost = expert is not None and any(
        score is None and expert.scores.get(name) is not None
        for name, score in column.scores.items()
    )
    share = Estimate(None) if is_lost else mean(shares) if shares else None
    return entries | {MACRO: Entry(mean(scores), share)}


def _differences(first: str, second: str, columns: Mapping[str, _Column]) -> dict[str, Difference]:
    """The first column's score minus the second's, by the rows of the second."""
    pair, tasks, differences = (columns[first], columns[second]), list(columns[second].scores), {}
    for row, names in ({task: [task] for task in tasks} | {MACRO: tasks}).items():
        answers = [{task: column.answers[task] for task in names} for column in pair]
        try:
            differences[row] = bootstrap.compare(*answers, drawn=(pair[0].draws, pair[1].draws))
        except ValueError as error:
            raise UserError(
                f"{first} and {second}: {error}; evaluate both on the same data"
            ) from error
    return differences


def _corrected(
    differences: Mapping[str, Mapping[str, Difference]],
) -> dict[str, dict[str, Difference]]:
    """Apply Holm's correction to differences by column and row (`Table.differences`)."""
    means = bootstrap.holm({name: by_row[MACRO] for name, by_row in differences.items()})
    corrected = {}
    for name, by_row in differences.items():
        tasks = {row: test for row, test in by_row.items() if row != MACRO}
        corrected[name] = bootstrap.holm(tasks) | {MACRO: means[name]}
    return corrected


def node_shares(fisher: Mapping[str, NodeValues], recipe: Recipe) -> dict[str, NodeValues]:
    """Each expert's share of every mask node in a merge, ``lambda_j F_j / sum_k lambda_k F_k``.

    The result is by task. The Fisher information is normalised as in the recipe. The result is
    empty if the method does not weigh by nodes, or if an expert's Fisher information is missing.
    """
    import torch

    from fmn.merge.rules import shares

    lambdas = {task: recipe.coefficients[task] for task in fisher if task in recipe.coefficients}
    if METHODS[recipe.method].fisher != "nodes" or lambdas.keys() != recipe.coefficients.keys():
        return {}
    normalise, exponent = recipe.normalise or "none", recipe.exponent or 1.0
    values = [tempered(fisher[task], normalise, exponent) for task in lambdas]
    result: dict[str, NodeValues] = {task: {} for task in lambdas}
    for site in sorted(values[0]):
        tensors = [torch.from_numpy(expert[site]) for expert in values]
        for task, share in zip(lambdas, shares(tensors, list(lambdas.values())), strict=True):
            result[task][site] = share.numpy()
    return result


# ---- as text ----


def text_table(table: Table) -> TextTable:
    """Header and rows: scores, half of their intervals if they fit, and shares of the expert's."""

    def text(name: str, entry: Entry | None) -> str:
        if entry is None:
            return ""
        score, share = entry
        words = score.text
        if score.interval and len(table.columns) <= FEW:
            low, high = score.interval
            words += f" ±{shown((high - low) / 2, score.is_percent)}"
        return words + (f" ({share.text})" if share and name != EXPERT else "")

    columns = table.columns.items()
    body = [[row, *(text(name, column.get(row)) for name, column in columns)] for row in table.rows]
    return ["task", *table.columns], body


def notes(table: Table) -> list[str]:
    """Notes on the text table, a line each: the meaning of its cells, and caveats."""
    share = " (% of the expert's score)" if EXPERT in table.columns else ""
    interval = ", ± half of its 95 % interval" if len(table.columns) <= FEW else ""
    unit = " in %" if table.averaged or not table.definitions else ""
    return [f"score{unit}{interval}{share}", *remarks(table)]


def remarks(table: Table) -> list[str]:
    """Caveats about tasks, a line each."""
    scores = {task: table.columns[table.headline][task].score.value for task in table.tasks}
    remark = "its expert alone is no better than guessing here, so shares of its score say little"
    lines = [f"{task}: {remark}" for task in table.guessing]
    lines += [f"{task}: {UNLABELED}" for task in table.unlabeled]
    for task, (score, share) in table.columns.get(EXPERT, {}).items():
        if task != MACRO and not share:
            lines.append(f"{task}: the expert's score is {score.text}: no share of it is defined")
    return lines + score_remarks(scores, table.definitions, table.averaged)


def score_remarks(
    scores: Mapping[str, float | None], tasks: Mapping[str, Task], averaged: Sequence[str]
) -> list[str]:
    """Lines about scores that are undefined or not percentages, and about the mean's tasks."""
    lines = []
    for name, task in tasks.items():
        if not higher_is_better(task):
            lines.append(f"{name}: {metric_words(task)}; a plain number, no percentage")
        if scores[name] is None:
            lines.append(
                f"{name}: undefined: its labels or answers here do not define {metric_words(task)}"
            )
    if len(tasks) > 1 and (others := [name for name in tasks if name not in averaged]):
        over = f"over {listed(averaged)}" if averaged else "over no task"
        lines.append(f"mean score: {over}; without {listed(others)}")
    return lines


def measured(
    task: Task, scores: TaskScores
) -> Iterator[tuple[str, str, float | None, int, Interval | None]]:
    """Each metric of a task: split, name, value, number of examples, 95 % interval if known."""
    values = scores.model_dump()
    for split, metric in product(task.validation, task.metrics):
        suffix = task.suffix(split)
        if (name := metric + suffix) in values:
            examples = int(values[f"examples{suffix}"])
            yield split, metric, values[name], examples, scores.interval.get(name)


def evaluate_table(metrics: Metrics) -> TextTable:
    """Header and rows of the table of `fmn evaluate`: every metric and its 95 % interval."""
    body = []
    for name, scores in metrics.tasks.items():
        task = metrics.definitions[name]
        for split, metric, value, examples, interval in measured(task, scores):
            is_percent = METRICS[metric].higher_is_better
            ends = span(interval, is_percent) or NO_INTERVAL
            numbers = [shown(value, is_percent, 2), ends, str(examples)]
            body.append([name, metric + " (less is better)" * (not is_percent), split, *numbers])
    mean = [shown(metrics.score, digits=2), span(metrics.interval) or NO_INTERVAL, ""]
    over = _averaged(metrics)
    left_out = len(over) < len(metrics.tasks)
    body.append([MACRO, "score", f"of {listed(over)}" if over and left_out else "", *mean])
    unit = "%" if is_in_percent(metrics.definitions) else "score"
    return ["task", "metric", "split", unit, "95 % interval", "examples"], body


def is_in_percent(tasks: Mapping[str, Task]) -> bool:
    """Whether every metric of the tasks is a percentage, none an error or a perplexity."""
    return all(METRICS[name].higher_is_better for task in tasks.values() for name in task.metrics)


def evaluate_notes(metrics: Metrics) -> list[str]:
    """Notes on the table of `fmn evaluate`, a line each."""
    scores = {name: entry.score for name, entry in metrics.tasks.items()}
    skipped = [f"{name}: {UNLABELED}" for name in metrics.unlabeled]
    for name, entry in metrics.tasks.items():
        if entry.score is not None and entry.interval.get("score") is None:
            reason = "too few of the resamples of its rows define it"
            skipped.append(f"{name}: the score has no interval ({NO_INTERVAL}): {reason}")
    return score_remarks(scores, metrics.definitions, _averaged(metrics)) + skipped


def _averaged(metrics: Metrics) -> list[str]:
    scores = {name: entry.score for name, entry in metrics.tasks.items()}
    return averaged(scores, metrics.definitions)


# ---- as numbers ----


def results(table: Table) -> dict[str, Any]:
    """``results.json``: by task and model "score", "low", "high", "relative"; "mean" by model."""
    rows: dict[str, dict[str, Any]] = {row: {} for row in (*table.tasks, MACRO)}
    for name, column in table.columns.items():
        for row, (score, share) in column.items():
            low, high = score.interval or (None, None)
            relative = share.value if share else None
            numbers = {"score": score.value, "relative": relative, "low": low, "high": high}
            rows[row][name] = numbers
    mean = rows.pop(MACRO)
    return {"tasks": rows, MACRO: mean}


def main_numbers(table: Table) -> dict[str, float]:
    """``metrics.json``, a few numbers of the headline's model for `dvc exp show`.

    "mean score", "mean retained" (the mean share of the experts' scores), and each task's score.
    """
    column = table.columns[table.headline]
    score, share = column.get(MACRO, (None, None))
    numbers = {
        "mean score": score.value if score else None,
        "mean retained": share.value if share else None,
    }
    numbers |= {row: column[row].score.value for row in table.tasks if row in column}
    return {name: round(value, 4) for name, value in numbers.items() if value is not None}


def score_rows(table: Table) -> list[tuple[str, float]]:
    """The rows of ``scores.csv``: the scores that are percentages, by "TASK: MODEL"."""
    return [
        (f"{row}: {name}", round(100 * score.value, 3))
        for row in table.rows
        for name, column in table.columns.items()
        if row in column and (score := column[row].score).is_percent and score.value is not None
    ]
