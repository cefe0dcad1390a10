"""The scores of experts and merged models side by side: tables as data, and as text."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import numpy as np

from fmn.errors import UserError
from fmn.evaluate import bootstrap
from fmn.evaluate.bootstrap import Difference
from fmn.evaluate.files import Interval, Metrics, TaskScores, read_metrics, read_predictions
from fmn.evaluate.metrics import Splits
from fmn.fisher.architectures import NodeValues, tempered
from fmn.merge.methods import METHODS
from fmn.merge.recipe import Recipe
from fmn.models.evidence import better_than_guessing
from fmn.store.stage import read_sidecar
from fmn.tasks.task import get_task

MACRO = "mean"
EXPERT = "expert"
AVERAGE = "average"
BOUNDS: Mapping[str, str] = {
    "base": "the base model under each expert's head (lower bound)",
    AVERAGE: "the plain average of the parameters",
    EXPERT: "each expert alone (upper bound)",
}
"""What a merge is compared with: the column's name, and what it is."""
VERDICTS = ("better", "worse", "within chance")
SIGNIFICANT = 0.05  # a difference with a smaller p-value is called real
MINUS = "\N{MINUS SIGN}"

TextTable = tuple[list[str], list[list[str]]]
"""Header and rows."""


class Evaluated(NamedTuple):
    """A model's metrics, and the answers that they were computed from, by task and split."""

    metrics: Metrics
    answers: Mapping[str, Splits]


@dataclass(frozen=True, eq=False)
class Estimate:
    """A number, and its value in each bootstrap resample, float64 [R], if it has one in all."""

    value: float
    draws: np.ndarray | None = None

    @cached_property
    def interval(self) -> tuple[float, float] | None:
        """The 95 % interval."""
        return None if self.draws is None else bootstrap.interval(self.draws)


def mean(parts: Sequence[Estimate]) -> Estimate:
    """The mean; without draws, if a part has none."""
    draws = [part.draws for part in parts if part.draws is not None]
    is_known = len(draws) == len(parts)
    value = fmean(part.value for part in parts)
    return Estimate(value, np.mean(draws, axis=0) if is_known else None)


class Entry(NamedTuple):
    """A model's score, and its share of the expert's score if an expert scores above zero."""

    score: Estimate
    share: Estimate | None


def read_evaluated(metrics: Path) -> Evaluated:
    """A metrics file, and the predictions beside it."""
    return Evaluated(read_metrics(metrics), read_predictions(metrics))


class Cost(NamedTuple):
    """How long a stage took for a task or model."""

    stage: str
    name: str
    seconds: float


def read_costs(*inputs: Mapping[str, Path]) -> list[Cost]:
    """The run times of the stages that wrote these inputs, if their sidecars tell; by stage."""
    files = [item for paths in inputs for item in paths.items()]
    sidecars = [(name, sidecar) for name, path in files if (sidecar := read_sidecar(path))]
    stages = list(dict.fromkeys(sidecar.stage for _, sidecar in sidecars))
    costs = [Cost(sidecar.stage, name, sidecar.seconds) for name, sidecar in sidecars]
    return sorted(costs, key=lambda cost: stages.index(cost.stage))


@dataclass(frozen=True)
class Table:
    """Scores of merged models and of the experts on the same examples.

    Attributes:
        tasks: in order.
        examples: number of examples by task.
        columns: scores by model (EXPERT is the last, if there are experts), then by row.
        headline: name of the column that the report is about.
        differences: the headline's score less another column's, by column, then by row.
        guessing: the tasks whose expert is no better than guessing on these examples.
    """

    tasks: tuple[str, ...]
    examples: Mapping[str, int]
    columns: Mapping[str, Mapping[str, Entry]]
    headline: str
    differences: Mapping[str, Mapping[str, Difference]]
    guessing: tuple[str, ...] = ()

    @property
    def rows(self) -> tuple[str, ...]:
        """The tasks, then MACRO if there are several."""
        return (*self.tasks, MACRO) if len(self.tasks) > 1 else self.tasks


@dataclass(frozen=True)
class Report:
    """Everything that the report of a run shows.

    Attributes:
        recipes: how merged models were made, by column, if that is known.
        fisher: Fisher information by task, float64 [nodes] by site; may be empty.
        costs: run times of the stages.
    """

    table: Table
    recipes: Mapping[str, Recipe]
    fisher: Mapping[str, NodeValues]
    costs: Sequence[Cost]

    @cached_property
    def shares(self) -> dict[str, NodeValues]:
        """Every expert's share of each mask node in the headline's model, by task."""
        recipe = self.recipes.get(self.table.headline)
        return node_shares(self.fisher, recipe) if recipe else {}


# ---- from metrics to the table ----


def tabulate(experts: Mapping[str, Evaluated], merged: Mapping[str, Evaluated]) -> Table:
    """The table over the first merged model's tasks.

    Args:
        experts: by task.
        merged: by the name of their column.

    Raises:
        UserError: a model was not evaluated on the same tasks and examples.
    """
    entries = next(iter(merged.values())).metrics.tasks
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
    first = headline(merged)
    others = [name for name in columns if name != first]
    return Table(
        tasks=tuple(entries),
        examples={
            task: sum(len(split.labels) for split in columns[first].answers[task].values())
            for task in entries
        },
        columns={name: _entries(column, columns.get(EXPERT)) for name, column in columns.items()},
        headline=first,
        differences={name: _differences(first, name, columns) for name in others},
        guessing=tuple(task for task in alone if _guesses(task, columns[EXPERT])),
    )


def headline(names: Iterable[str]) -> str:
    """The merged model that a report is about: `merged`, or the last that is not a bound."""
    candidates = [name for name in names if name not in BOUNDS] or list(names)
    return "merged" if "merged" in candidates else candidates[-1]


class _Column(NamedTuple):
    """Scores, answers, and the score in each bootstrap resample, float64 [R], all by task."""

    scores: Mapping[str, float]
    answers: Mapping[str, Splits]
    draws: Mapping[str, np.ndarray]

    def rows(self) -> dict[str, list[str]]:
        """The tasks that each row of the table is the mean over."""
        return {task: [task] for task in self.scores} | {MACRO: list(self.scores)}


def _entries(column: _Column, expert: _Column | None) -> dict[str, Entry]:
    """A column by row; a task whose expert scores nothing has no share."""
    scores, shares = {}, {}
    for task, score in column.scores.items():
        scores[task] = Estimate(score, column.draws[task])
        if expert and (full := expert.scores.get(task, 0.0)) > 0:
            draws = bootstrap.relative(column.draws[task], expert.draws[task])
            shares[task] = Estimate(score / full, draws)
    entries = {}
    for row, tasks in column.rows().items():
        known = [shares[task] for task in tasks if task in shares]
        share = mean(known) if known else None
        entries[row] = Entry(mean([scores[task] for task in tasks]), share)
    return entries


def _differences(first: str, second: str, columns: Mapping[str, _Column]) -> dict[str, Difference]:
    """The score of one column less that of another, by the latter's rows."""
    pair, differences = (columns[first], columns[second]), {}
    for row, tasks in columns[second].rows().items():
        answers = [{task: column.answers[task] for task in tasks} for column in pair]
        try:
            differences[row] = bootstrap.compare(*answers, drawn=(pair[0].draws, pair[1].draws))
        except ValueError as error:
            raise UserError(
                f"{first} and {second}: {error}; evaluate both on the same data"
            ) from error
    return differences


def _guesses(task: str, expert: _Column) -> bool:
    """Whether an expert is no better than guessing; in regression: not surely correlated."""
    if get_task(task).regression:
        return bootstrap.interval(expert.draws[task])[0] <= 0
    splits = expert.answers[task].values()
    return not any(better_than_guessing(get_task(task), *answers) for answers in splits)


def node_shares(fisher: Mapping[str, NodeValues], recipe: Recipe) -> dict[str, NodeValues]:
    """Each expert's share of every mask node in a merge, ``lambda_j F_j / sum_k lambda_k F_k``.

    By task, with the Fisher information made comparable as the recipe says. Empty if the method
    does not weigh by nodes, or if the Fisher information of an expert is missing.
    """
    import torch

    from fmn.merge.rules import shares

    lambdas = recipe.coefficients
    if METHODS[recipe.method].fisher != "nodes" or not lambdas.keys() <= fisher.keys():
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


def percent(value: float | None) -> str:
    """A share in percent, with a decimal; nothing for None."""
    return "" if value is None else f"{100 * value:.1f}".replace("-", MINUS)


def span(interval: Sequence[float] | None) -> str:
    """An interval in percent; nothing for None."""
    return "" if interval is None else f"{percent(interval[0])} to {percent(interval[1])}"


def points(value: float) -> str:
    """A difference in percent points, with its sign."""
    return f"{100 * value:+.1f}".replace("-", MINUS)


def seconds(value: float) -> str:
    """A time for people: "0.4 s", "75 s", "13 min"."""
    if value >= 600:
        return f"{value / 60:.0f} min"
    return f"{value:.1f} s" if value < 10 else f"{value:.0f} s"


def listed(words: Sequence[str]) -> str:
    """ "a", "a and b", "a, b and c"."""
    *first, last = words
    return f"{', '.join(first)} and {last}" if first else last


def verdict(difference: Difference) -> str:
    """What a difference says, one of VERDICTS."""
    if difference.p_value >= SIGNIFICANT:
        return VERDICTS[2]
    return VERDICTS[0] if difference.difference > 0 else VERDICTS[1]


def differences_in_words(table: Table) -> list[str]:
    """A sentence on each other column: on which tasks the headline is better or worse."""
    sentences = []
    for name, by_row in table.differences.items():
        verdicts = {row: verdict(difference) for row, difference in by_row.items() if row != MACRO}
        parts = []
        if len(verdicts) > 1:
            parts.append(f"{points(by_row[MACRO].difference)} points in the mean")
        for word in VERDICTS:
            if tasks := [task for task in verdicts if verdicts[task] == word]:
                names = listed(tasks) if len(tasks) < 3 else f"{len(tasks)} tasks"
                parts.append(f"{word} on {names}")
        sentences.append(f"Against {name}: {', '.join(parts)}.")
    return sentences


def text_table(table: Table) -> TextTable:
    """Header and rows: scores in percent, half of their intervals, shares of the expert's score."""
    body = [
        [row, *(_text(name, column.get(row)) for name, column in table.columns.items())]
        for row in table.rows
    ]
    return ["task", *table.columns], body


def _text(name: str, entry: Entry | None) -> str:
    if entry is None:
        return ""
    text = percent(entry.score.value)
    if entry.score.interval:
        low, high = entry.score.interval
        text += f" ±{50 * (high - low):.1f}"
    return text + (f" ({percent(entry.share.value)})" if entry.share and name != EXPERT else "")


def notes(table: Table) -> list[str]:
    """What a reader of the text table should know, a line each: what its cells are, caveats."""
    share = " (% of the expert's score)" if EXPERT in table.columns else ""
    return [f"score in %, ± half of its 95 % interval{share}", *remarks(table)]


def remarks(table: Table) -> list[str]:
    """The tasks whose shares say little, a line each."""
    remark = "its expert alone is no better than guessing here, so shares of its score say little"
    return [f"{task}: {remark}" for task in table.guessing]


def measured(task: str, scores: TaskScores) -> list[tuple[str, str, float, int, Interval | None]]:
    """Each metric of a task: split, name, value, number of examples, 95 % interval if known."""
    values, rows, definition = scores.model_dump(), [], get_task(task)
    for split in definition.validation:
        suffix = definition.suffix(split)
        for metric in definition.metrics:
            if (name := metric + suffix) in values:
                examples = int(values[f"examples{suffix}"])
                rows.append((split, metric, values[name], examples, scores.interval.get(name)))
    return rows


def evaluate_table(metrics: Metrics) -> TextTable:
    """Header and rows of what `fmn evaluate` prints: every metric and its 95 % interval."""
    body = []
    for task, scores in metrics.tasks.items():
        for split, metric, value, examples, interval in measured(task, scores):
            body.append([task, metric, split, f"{100 * value:.2f}", span(interval), str(examples)])
    body.append([MACRO, "score", "", f"{100 * metrics.score:.2f}", span(metrics.interval), ""])
    return ["task", "metric", "split", "%", "95 % interval", "examples"], body


def markdown(header: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    """A Markdown table; a `|` in a cell stays a character."""
    rule = ["---"] * len(header)
    lines = [[cell.replace("|", "\\|") for cell in line] for line in (header, rule, *body)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


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


def score_rows(table: Table) -> list[tuple[str, float]]:
    """The rows of ``scores.csv``: scores in percent by "TASK: MODEL"."""
    return [
        (f"{row}: {name}", round(100 * column[row].score.value, 3))
        for row in table.rows
        for name, column in table.columns.items()
        if row in column
    ]
