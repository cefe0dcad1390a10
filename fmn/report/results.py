"""The scores of experts and merged models side by side: tables as data, and as text."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from statistics import fmean
from typing import TYPE_CHECKING, Any, NamedTuple

from fmn.errors import UserError
from fmn.evaluate.files import Metrics, TaskScores
from fmn.merge.recipe import Recipe
from fmn.tasks.task import TASKS

if TYPE_CHECKING:
    import numpy as np

    from fmn.evaluate.bootstrap import Difference
    from fmn.evaluate.metrics import Splits
    from fmn.fisher.architectures import NodeValues

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
WIDTH = 100  # columns of a terminal

TextTable = tuple[list[str], list[list[str]]]
"""Header and rows."""


class Evaluated(NamedTuple):
    """A model's metrics, and the answers that they were computed from, by task and split."""

    metrics: Metrics
    answers: "Mapping[str, Splits]"


class Estimate(NamedTuple):
    """A number, and its 95 % interval if it has one."""

    value: float
    interval: tuple[float, float] | None


class Entry(NamedTuple):
    """A model's score, and its share of the expert's score if an expert scores above zero."""

    score: Estimate
    share: Estimate | None


class Cost(NamedTuple):
    """How long a stage took for a task or model."""

    stage: str
    name: str
    seconds: float


@dataclass(frozen=True)
class Table:
    """TaskScores of merged models and of the experts on the same examples.

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
    differences: "Mapping[str, Mapping[str, Difference]]"
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
    fisher: "Mapping[str, NodeValues]"
    costs: Sequence[Cost]

    @cached_property
    def shares(self) -> "dict[str, NodeValues]":
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
    from fmn.evaluate import bootstrap

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
        examples={task: _count(columns[first].answers[task]) for task in entries},
        columns={name: _entries(column, columns.get(EXPERT)) for name, column in columns.items()},
        headline=first,
        differences={name: _differences(first, name, columns) for name in others},
        guessing=tuple(task for task in alone if _guesses(task, columns[EXPERT])),
    )


def headline(names: Iterable[str]) -> str:
    """The merged model that a report is about: `merged`, or the last that is not a bound."""
    candidates = [name for name in names if name not in BOUNDS] or list(names)
    return "merged" if "merged" in candidates else candidates[-1]


def _count(answers: "Splits") -> int:
    return sum(len(split.labels) for split in answers.values())


class _Column(NamedTuple):
    """TaskScores, answers, and the score in each bootstrap resample, float64 [R], all by task."""

    scores: Mapping[str, float]
    answers: "Mapping[str, Splits]"
    draws: "Mapping[str, np.ndarray]"

    def rows(self) -> dict[str, list[str]]:
        """The tasks that each row of the table is the mean over."""
        return {task: [task] for task in self.scores} | {MACRO: list(self.scores)}


def _entries(column: _Column, expert: _Column | None) -> dict[str, Entry]:
    """A column by row; a task whose expert scores nothing has no share."""
    from fmn.evaluate import bootstrap

    alone = {} if expert is None else expert.scores
    shares = {t: score / alone[t] for t, score in column.scores.items() if alone.get(t, 0) > 0}
    draws = {t: bootstrap.relative(column.draws[t], expert.draws[t]) for t in shares if expert}
    entries = {}
    for row, tasks in column.rows().items():
        score = estimate([column.scores[t] for t in tasks], [column.draws[t] for t in tasks])
        known = [task for task in tasks if task in shares]
        share = estimate([shares[t] for t in known], [draws[t] for t in known]) if known else None
        entries[row] = Entry(score, share)
    return entries


def estimate(values: Sequence[float], draws: "Sequence[np.ndarray | None]") -> Estimate:
    """The mean of some values with its interval; without, if a value has no draws.

    Args:
        values: scores or shares.
        draws: each of them in every resample [R].
    """
    import numpy as np

    from fmn.evaluate import bootstrap

    known = [part for part in draws if part is not None]
    interval = bootstrap.interval(np.mean(known, axis=0)) if len(known) == len(draws) else None
    return Estimate(fmean(values), interval)


def _differences(
    first: str, second: str, columns: Mapping[str, _Column]
) -> "dict[str, Difference]":
    """The score of one column less that of another, by the latter's rows."""
    from fmn.evaluate import bootstrap

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
    from fmn.evaluate import bootstrap
    from fmn.models.labels import better_than_guessing

    if TASKS[task].regression:
        return bootstrap.interval(expert.draws[task])[0] <= 0
    splits = expert.answers[task].values()
    return not any(better_than_guessing(TASKS[task], *answers) for answers in splits)


def node_shares(fisher: "Mapping[str, NodeValues]", recipe: Recipe) -> "dict[str, NodeValues]":
    """Each expert's share of every mask node in a merge, ``lambda_j F_j / sum_k lambda_k F_k``.

    By task, with the Fisher information made comparable as the recipe says. Empty if the method
    does not weigh by nodes, or if the Fisher information of an expert is missing.
    """
    import torch

    from fmn.fisher.architectures import tempered
    from fmn.merge.methods import METHODS
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
    return "" if value is None else f"{100 * value:.1f}"


def span(interval: Sequence[float] | None) -> str:
    """An interval in percent; nothing for None."""
    return "" if interval is None else f"{percent(interval[0])} to {percent(interval[1])}"


def points(value: float) -> str:
    """A difference in percent points, with its sign."""
    return f"{100 * value:+.1f}"


def seconds(value: float) -> str:
    """A time for people: "0.4 s", "12 s", "3 min 20 s"."""
    if value < 120:
        return f"{value:.1f} s" if value < 10 else f"{value:.0f} s"
    minutes, rest = divmod(round(value), 60)
    return f"{minutes} min {rest} s" if minutes < 120 else f"{minutes // 60} h {minutes % 60} min"


def listed(words: Sequence[str]) -> str:
    """ "a", "a and b", "a, b and c"."""
    *first, last = words
    return f"{', '.join(first)} and {last}" if first else last


def verdict(difference: "Difference") -> str:
    """What a difference says, one of VERDICTS."""
    if difference.p_value >= SIGNIFICANT:
        return VERDICTS[2]
    return VERDICTS[0] if difference.difference > 0 else VERDICTS[1]


def differences_in_words(table: Table, most: int = 2) -> list[str]:
    """A sentence on each other column: on which tasks (if at most `most`) the headline wins."""
    sentences = []
    for name, by_row in table.differences.items():
        verdicts = {row: verdict(one) for row, one in by_row.items() if row != MACRO}
        several = len(verdicts) > 1
        parts = [f"{points(by_row[MACRO].difference)} points in the mean"] if several else []
        for word in VERDICTS:
            if rows := [row for row in verdicts if verdicts[row] == word]:
                tasks = listed(rows) if len(rows) <= most else f"{len(rows)} tasks"
                parts.append(f"{word} on {tasks}")
        sentences.append(f"Against {name}: {', '.join(parts)}.")
    return sentences


def text_table(table: Table, width: int = WIDTH) -> TextTable:
    """Header and rows: scores in percent, half of their intervals, shares of the expert's score.

    If that is wider than `width` characters, the examples are left out, then the intervals, then
    the shares.
    """
    for details in (3, 2, 1, 0):
        header = ["task", *(["examples"] if details > 2 else []), *table.columns]
        body = []
        for row in table.rows:
            counts = [str(table.examples.get(row, ""))] if details > 2 else []
            body.append(
                [row, *counts, *(_text(table, name, row, details) for name in table.columns)]
            )
        widths = [max(map(len, cells)) for cells in zip(header, *body, strict=True)]
        if sum(widths) + 2 * (len(header) - 1) <= width:
            break
    return header, body


def _text(table: Table, name: str, row: str, details: int) -> str:
    column = table.columns[name]
    if row not in column:
        return ""
    (value, interval), share = column[row]
    text = percent(value)
    if interval and details > 1:
        text += f"±{50 * (interval[1] - interval[0]):.1f}".rjust(6)
    if name != EXPERT and details > 0 and any(entry.share for entry in column.values()):
        text += (f"({percent(share.value)})" if share else "").rjust(8)
    return text


def notes(table: Table) -> list[str]:
    """What a reader of the text table should know, a line each: what its cells are, caveats."""
    cells = "".join(cell for row in text_table(table)[1] for cell in row)
    interval = ", ± half of its 95 % interval" if "±" in cells else ""
    share = " (% of the expert's score)" if "(" in cells else ""
    return [f"score in %{interval}{share}", *remarks(table)]


def remarks(table: Table) -> list[str]:
    """The tasks whose shares say little, a line each."""
    remark = "its expert alone is no better than guessing here, so shares of its score say little"
    return [f"{task}: {remark}" for task in table.guessing]


class Measured(NamedTuple):
    """A metric on a validation split, and its 95 % interval if the metrics file has one."""

    split: str
    metric: str
    value: float
    examples: int
    interval: Sequence[float] | None = None


def measured(task: str, scores: TaskScores) -> list[Measured]:
    """Every metric of a task, split by split."""
    values, rows = scores.model_dump(), []
    for split in TASKS[task].validation:
        suffix = TASKS[task].suffix(split)
        for metric in TASKS[task].metrics:
            if (name := metric + suffix) in values:
                examples = int(values[f"examples{suffix}"])
                interval = scores.interval.get(name)
                rows.append(Measured(split, metric, values[name], examples, interval))
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


def score_rows(table: Table) -> list[dict[str, Any]]:
    """The rows of ``scores.csv``; numbers in percent."""
    numbers = results(table)
    return [
        {"scored": f"{row}: {name}", "task": row, "model": name}
        | {key: None if one is None else round(100 * one, 3) for key, one in score.items()}
        for row in table.rows
        for name, score in (numbers[MACRO] if row == MACRO else numbers["tasks"][row]).items()
    ]
