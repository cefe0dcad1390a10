"""What a run found: the scores of experts and merged models side by side, as numbers, tables, pictures and a page."""

import csv
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from fmn.errors import UserError
from fmn.tasks.task import TASKS

if TYPE_CHECKING:
    import numpy as np

    from fmn.evaluate.bootstrap import Difference
    from fmn.evaluate.metrics import Splits
    from fmn.fisher.architectures import NodeValues

MACRO = "mean"
EXPERT = "expert"
# What a merge is held against: the column's name, and what it is.
BOUNDS: Mapping[str, str] = {
    "base": "the base model under each expert's head (lower bound)",
    "average": "the plain average of the parameters",
    EXPERT: "each expert alone (upper bound)",
}
VERDICTS = ("better", "worse", "within chance")
CERTAIN = 0.05
"""A difference with a smaller p-value is called real."""
WIDTH = 100  # columns of a terminal


class Evaluated(NamedTuple):
    """The content of a metrics file, and the answers that it is of."""

    metrics: Mapping[str, Any]
    answers: "Mapping[str, Splits]"


class Estimate(NamedTuple):
    """A number, and its 95 % interval where there is one."""

    value: float
    interval: tuple[float, float] | None


@dataclass(frozen=True)
class Column:
    """What a model scores on each task, and MACRO, their mean; and the same relative to the experts.

    A task without an expert that scores above zero has no relative score, and is left out of their mean.
    """

    scores: Mapping[str, Estimate]
    relative: Mapping[str, Estimate]


@dataclass(frozen=True)
class Table:
    """Scores of merged models and of the experts on the same examples.

    Attributes:
        tasks: in order.
        examples: how many there are, by task.
        columns: by name, in order; EXPERT last, where there are experts.
        guessing: the tasks whose expert is no better than guessing on these examples.
        headline: the column that the others are held against.
        differences: the headline's score less another column's, by column, by task and MACRO.
    """

    tasks: tuple[str, ...]
    examples: Mapping[str, int]
    columns: Mapping[str, Column]
    headline: str
    differences: "Mapping[str, Mapping[str, Difference]]"
    guessing: tuple[str, ...] = ()

    @property
    def rows(self) -> tuple[str, ...]:
        """The tasks, and the mean over them where there are several."""
        return (*self.tasks, MACRO) if len(self.tasks) > 1 else self.tasks


class Drawn(NamedTuple):
    """Scores of a model, and its score in each resample [R], by task."""

    scores: Mapping[str, float]
    resamples: "Mapping[str, np.ndarray]"


def tabulate(experts: Mapping[str, Evaluated], merged: Mapping[str, Evaluated]) -> Table:
    """The table over the first merged model's tasks.

    Args:
        experts: by task.
        merged: by the name that the table gives them.

    Raises:
        UserError: where a model was not evaluated on the same tasks and examples.
    """
    from fmn.evaluate import bootstrap as intervals

    entries = next(iter(merged.values())).metrics["tasks"]
    tasks = tuple(entries)
    for name, one in merged.items():
        if missing := [task for task in tasks if task not in one.metrics["tasks"]]:
            raise UserError(
                f"{name}: no metrics of task {missing[0]}; evaluate it on {', '.join(tasks)}"
            )
    answers = {name: {task: one.answers[task] for task in tasks} for name, one in merged.items()}
    scores = {
        name: {task: one.metrics["tasks"][task]["score"] for task in tasks}
        for name, one in merged.items()
    }
    if alone := {task: experts[task] for task in tasks if task in experts}:
        answers[EXPERT] = {task: one.answers[task] for task, one in alone.items()}
        scores[EXPERT] = {task: one.metrics["tasks"][task]["score"] for task, one in alone.items()}
    drawn = {name: Drawn(scores[name], intervals.draws(given)) for name, given in answers.items()}
    head = headline(merged)
    differences: dict[str, dict[str, Difference]] = {}
    for name, given in answers.items():
        for row in [*given, MACRO] if name != head else []:
            chosen = list(given) if row == MACRO else [row]
            first, second = (
                {task: answers[each][task] for task in chosen} for each in (head, name)
            )
            try:
                found = intervals.compare(
                    first, second, drawn=(drawn[head].resamples, drawn[name].resamples)
                )
            except ValueError as error:
                raise UserError(
                    f"{head} and {name}: {error}; evaluate both on the same data"
                ) from error
            differences.setdefault(name, {})[row] = found
    counts = {
        task: sum(int(count) for name, count in entry.items() if name.startswith("examples"))
        for task, entry in entries.items()
    }
    columns = {name: column(one, drawn.get(EXPERT)) for name, one in drawn.items()}
    guessing = tuple(
        task
        for task in alone
        if _guesses(task, answers[EXPERT][task], columns[EXPERT].scores[task])
    )
    return Table(tasks, counts, columns, head, differences, guessing)


def _guesses(task: str, given: "Splits", score: Estimate) -> bool:
    """Whether a model's answers are no better than guessing; of a regression task, not surely correlated."""
    from fmn.models.labels import better_than_guessing

    if TASKS[task].regression:
        return (score.interval[0] if score.interval else score.value) <= 0
    return not any(
        better_than_guessing(TASKS[task], one.predicted, one.labels) for one in given.values()
    )


def headline(names: Iterable[str]) -> str:
    """The merged model that a report is about: `merged`, or the last that is no bound."""
    chosen = [name for name in names if name not in BOUNDS] or list(names)
    return "merged" if "merged" in chosen else chosen[-1]


def column(one: Drawn, expert: Drawn | None) -> Column:
    """What a model scores, with intervals, also relative to the experts."""
    from fmn.evaluate import bootstrap as intervals

    scores = {
        task: Estimate(one.scores[task], intervals.interval(one.resamples[task]))
        for task in one.scores
    }
    scores[MACRO] = Estimate(
        mean(one.scores.values()), intervals.interval(intervals.macro(one.resamples))
    )
    shares, relative = {}, {}
    for task in [task for task in one.scores if expert and expert.scores.get(task, 0) > 0]:
        assert expert  # noqa: S101 - for the type checker
        shares[task] = intervals.relative(one.resamples[task], expert.resamples[task])
        ends = shares[task]
        relative[task] = Estimate(
            one.scores[task] / expert.scores[task],
            None if ends is None else intervals.interval(ends),
        )
    if relative:
        known = {task: ends for task, ends in shares.items() if ends is not None}
        whole = intervals.interval(intervals.macro(known)) if len(known) == len(shares) else None
        relative[MACRO] = Estimate(mean(each.value for each in relative.values()), whole)
    return Column(scores, relative)


def mean(values: Iterable[float]) -> float:
    """The mean of some numbers."""
    given = list(values)
    return sum(given) / len(given)


class Measured(NamedTuple):
    """A metric of a validation split, and its 95 % interval where the metrics file has one."""

    split: str
    metric: str
    value: float
    examples: int
    interval: Sequence[float] | None = None


def measured(task: str, entry: Mapping[str, Any]) -> list[Measured]:
    """What was measured on a task."""
    ends = entry.get("interval", {})
    suffixes = {split: TASKS[task].suffix(split) for split in TASKS[task].validation}
    return [
        Measured(
            split,
            metric,
            entry[metric + suffix],
            entry["examples" + suffix],
            ends.get(metric + suffix),
        )
        for split, suffix in suffixes.items()
        for metric in TASKS[task].metrics
        if metric + suffix in entry
    ]


# ---- as text ----


def percent(value: float | None) -> str:
    """A share in percent, with a decimal; nothing for None."""
    return "" if value is None else f"{100 * value:.1f}"


def span(interval: Sequence[float] | None) -> str:
    """An interval in percent."""
    return "" if interval is None else f"{percent(interval[0])} to {percent(interval[1])}"


def points(value: float) -> str:
    """A difference in percent points, with its sign."""
    return f"{100 * value:+.1f}"


def verdict(difference: "Difference") -> str:
    """What a difference says, one of VERDICTS."""
    better, worse, neither = VERDICTS
    return (
        neither if difference.p_value >= CERTAIN else better if difference.difference > 0 else worse
    )


def metrics_of(task: str) -> str:
    """The metrics that a task's score is the mean of, in words; nothing for MACRO."""
    return (
        " + ".join(metric.replace("_", " ") for metric in TASKS[task].metrics)
        if task in TASKS
        else ""
    )


def cells(table: Table, width: int = WIDTH) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the table as text: scores in percent, half of their intervals, their share of the expert's.

    Where that is more than `width` characters wide, the examples are left out, then the intervals, then the shares.
    """
    forms = [(True, True, True), (False, True, True), (False, False, True), (False, False, False)]
    for form in forms:
        header, body = _cells(table, *form)
        widest = [max(len(row[place]) for row in (header, *body)) for place in range(len(header))]
        if sum(widest) + 2 * (len(header) - 1) <= width:
            break
    return header, body


def _cells(
    table: Table, examples: bool, spread: bool, share: bool
) -> tuple[list[str], list[list[str]]]:
    def text(one: Column, row: str, shares: bool) -> str:
        if row not in one.scores:
            return ""
        score, relative = one.scores[row], one.relative.get(row)
        found = f"{100 * score.value:.1f}"
        if spread and score.interval:
            found += f"±{50 * (score.interval[1] - score.interval[0]):.1f}".rjust(6)
        if shares:
            found += (f"({100 * relative.value:.1f})" if relative else "").rjust(8)
        return found

    related = any(one.relative for one in table.columns.values())
    header = ["task", *(["examples"] if examples else []), *table.columns]
    body = [
        [row, *([str(table.examples.get(row, ""))] if examples else [])]
        + [
            text(one, row, share and related and name != EXPERT)
            for name, one in table.columns.items()
        ]
        for row in table.rows
    ]
    return header, body


def legend(body: Sequence[Sequence[str]]) -> str:
    """What the cells of such a table are."""
    text = "".join(cell for row in body for cell in row)
    return (
        "score in %"
        + (", ± half of its 95 % interval" if "±" in text else "")
        + (" (% of the expert's score)" if "(" in text else "")
    )


def remarks(table: Table) -> list[str]:
    """What whoever reads such a table should know, a line each."""
    return [
        f"{task}: its expert alone is no better than guessing here, so shares of its score say little"
        for task in table.guessing
    ]


def markdown(header: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    rule = ["---"] * len(header)
    return "\n".join("| " + " | ".join(line) + " |" for line in (header, rule, *body)) + "\n"


# ---- as numbers ----


def results(table: Table) -> dict[str, Any]:
    """The table as numbers, for machines and for `dvc metrics`."""

    def entry(one: Column, row: str) -> dict[str, float | None]:
        score, share = one.scores[row], one.relative.get(row)
        ends = score.interval or (None, None)
        return {
            "score": score.value,
            "relative": share.value if share else None,
            "low": ends[0],
            "high": ends[1],
        }

    def line(row: str) -> dict[str, Any]:
        return {name: entry(one, row) for name, one in table.columns.items() if row in one.scores}

    return {"tasks": {task: line(task) for task in table.tasks}, MACRO: line(MACRO)}


def _write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def _score_rows(table: Table) -> list[dict[str, Any]]:
    rows = []
    for row in table.rows:
        for name, one in table.columns.items():
            if row in one.scores:
                score, share = one.scores[row], one.relative.get(row)
                low, high = score.interval or (None, None)
                given = {
                    "score": score.value,
                    "low": low,
                    "high": high,
                    "relative": share.value if share else None,
                }
                numbers = {
                    key: None if value is None else round(100 * value, 3)
                    for key, value in given.items()
                }
                rows.append({"scored": f"{row}: {name}", "task": row, "model": name, **numbers})
    return rows


def _difference_rows(table: Table) -> list[dict[str, Any]]:
    return [
        {
            "task": row,
            "model": table.headline,
            "less": name,
            "difference": round(100 * one.difference, 3),
            "low": round(100 * one.interval[0], 3),
            "high": round(100 * one.interval[1], 3),
            "p": one.p_value,
        }
        for name, by_row in table.differences.items()
        for row, one in by_row.items()
    ]


# ---- the folder ----


class Cost(NamedTuple):
    """How long a stage took for a task or model."""

    stage: str
    name: str
    seconds: float


def write(
    out: Path,
    table: Table,
    fisher: "Mapping[str, NodeValues]",
    recipes: Mapping[str, Mapping[str, Any]],
    costs: Sequence[Cost],
) -> dict[str, Any]:
    """Fill the folder ``out``: ``report.html``, its pictures in ``pictures``, and the numbers as JSON, CSV, Markdown.

    Returns the numbers under ``results``; for a terminal the table's (header, rows) under ``table``, and below it
    ``notes``, a line each.

    Args:
        fisher: float64 [nodes] by site, by task; may be empty.
        recipes: the content of ``merge.json`` by column, of those that are known.
        costs: what the stages took.
    """
    from fmn.report import drawing, page, pictures

    found = {
        "results": results(table),
        "table": cells(table),
        "notes": [legend(cells(table)[1]), *remarks(table)],
    }
    (out / "results.json").write_text(json.dumps(found["results"], indent=1) + "\n")
    (out / "table.md").write_text(markdown(*cells(table, width=1 << 10)))
    _write_csv(out / "scores.csv", _score_rows(table))
    if table.differences:
        _write_csv(out / "differences.csv", _difference_rows(table))
    if costs:
        _write_csv(out / "costs.csv", [one._asdict() for one in costs])
    drawn = pictures.of_run(table, fisher, recipes.get(table.headline), costs)
    drawing.write(out / "pictures", drawn)
    (out / "report.html").write_text(page.of_run(table, recipes, costs, drawn))
    return found


def owned(fisher: "Mapping[str, NodeValues]", recipe: Mapping[str, Any]) -> "dict[str, NodeValues]":
    """Each expert's share of every mask node in a merge, ``lambda_j F_j / sum_k lambda_k F_k``, by task.

    The Fisher information is made comparable as the recipe says. Empty where the method does not weigh by nodes, or the
    Fisher information of an expert is not there.
    """
    import torch

    from fmn.fisher.architectures import tempered
    from fmn.merge.methods import NEEDS
    from fmn.merge.rules import shares

    lambdas = recipe["coefficients"]
    if NEEDS[recipe["method"]].fisher != "nodes" or not lambdas.keys() <= fisher.keys():
        return {}
    values = [tempered(fisher[task], recipe["normalise"], recipe["exponent"]) for task in lambdas]
    found: dict[str, NodeValues] = {task: {} for task in lambdas}
    for site in sorted(values[0]):
        parts = shares([torch.from_numpy(each[site]) for each in values], list(lambdas.values()))
        for task, part in zip(lambdas, parts, strict=True):
            found[task][site] = part.numpy()
    return found
