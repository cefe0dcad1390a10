"""Print the results of stages, for the commands."""

import json
from collections.abc import Callable
from typing import Any

from fmn.models.stages import Completion, Prediction, Similarity, Tags
from fmn.tasks.dataset import DataInfo
from fmn.terminal import loaded, say, show_table

Show = Callable[[Any], None]


def print_json(content: Any, indent: int | None = 1) -> None:
    """Print plain data as JSON; without an indent on one line."""
    loaded()
    print(json.dumps(content, indent=indent, default=str), flush=True)  # noqa: T201


def facts(*names: str) -> Show:
    """A function that shows some entries of a summary, a line each."""

    def show(summary: Any) -> None:
        for name in names:
            value = getattr(summary, name)
            text = f"{value:.3g}" if isinstance(value, float) else str(value)
            if value is not None:
                say(f"  {name.replace('_', ' ')}: {text}")

    return show


_PRECISE, _COARSE = 0.1, 0.3  # relative standard errors of a Fisher


def show_fisher(metadata: Any) -> None:
    """Show how a mask Fisher was computed, and how precise it is."""
    facts("estimator", "samples", "dtype", "precision", "device", "published")(metadata)
    if (error := metadata.relative_stderr) is None:
        return
    words = f"imprecise, raise --samples above {metadata.samples}"
    if error < _COARSE:
        words = "precise" if error < _PRECISE else "precise enough for a merge"
    say(f"  standard error: {100 * error:.0f} % of a node's value on average: {words}")


def show_data(info: DataInfo) -> None:
    rows = ", ".join(f"{split} {count}" for split, count in info.rows.items())
    notes = info.notes or [f"rows: {rows}"]
    say(*(f"  {note}" for note in notes), *(f"  warning: {line}" for line in info.warnings))


def percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.1f}"


def show_merge(recipe: Any) -> None:
    if recipe.auto:
        tried = [
            [each.method, f"{each.scale:g}", percent(each.error)]
            + [percent(each.tasks[task]) for task in recipe.tasks]
            for each in recipe.auto.candidates
        ]
        show_table(["method", "scale", "off the experts' outputs, %", *recipe.tasks], tried)
        say(f"  {recipe.method} at scale {recipe.scale:g}: {recipe.auto.in_words}")
    body = [
        [task, f"{recipe.coefficients[task]:g}", expert.revision]
        for task, expert in recipe.experts.items()
    ]
    show_table(["task", "coefficient", "expert"], body)


def show_realign(recipe: Any) -> None:
    body = [
        [task, str(fit.texts), f"{fit.ridge:.2g}", percent(fit.before), percent(fit.after)]
        for task, fit in recipe.realign.tasks.items()
    ]
    show_table(["task", "texts", "ridge", "off the expert's outputs, %", "re-aligned"], body)


def show_calibrate(recipe: Any) -> None:
    body = [[task, percent(error)] for task, error in recipe.calibrate.errors.items()]
    show_table(["task", "off the expert's states, %"], body)


def show_metrics(metrics: Any) -> None:
    from fmn.report.results import evaluate_notes, evaluate_table

    show_table(*evaluate_table(metrics))
    say(*evaluate_notes(metrics))


def show_search(result: Any) -> None:
    body = [
        [task, f"{result.coefficients[task]:.3f}", percent(entry.uniform), percent(entry.best)]
        for task, entry in result.tasks.items()
    ]
    means = ["mean", "", percent(result.uniform), percent(result.score)]
    header = ["task", "coefficient", "uniform, % of expert", "best, % of expert"]
    show_table(header, [*body, means])
    say(f"  scale: {result.scale}")


def show_champion(change: Any) -> None:
    before = change.before or "none"
    say(f"champion of {change.name}: version {change.champion}, was {before}")


def show_report(summary: Any) -> None:
    show_table(summary.header, summary.body)
    say(*summary.verdict, wrap=True)
    say(*summary.notes)


def answer_lines(answer: Any) -> list[str]:
    """The lines of an answer of `predict`, by kind of task."""
    if isinstance(answer, Prediction):
        is_value = not (answer.probabilities or answer.labels)  # of a regression task
        return [f"{answer.score:.3f}" if is_value else f"{answer.label} ({answer.score:.3f})"]
    if isinstance(answer, Tags):
        return [f"{each.text}: {each.entity} ({each.score:.3f})" for each in answer.spans]
    if isinstance(answer, Completion):
        return [answer.text]
    if isinstance(answer, Similarity):
        return [f"{answer.score:.3f}"]
    return [" ".join(f"{value:g}" for value in answer.embedding)]
