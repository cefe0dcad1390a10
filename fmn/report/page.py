"""A report as one HTML file: tables, pictures, words. Nothing is fetched, nothing runs.

The pages are jinja2 templates in ``templates/``; all text in them is escaped.
"""

import re
from collections.abc import Collection, Mapping, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

from fmn.merge.methods import NEEDS
from fmn.report import results
from fmn.report.comparison import Comparison
from fmn.report.figures import Picture
from fmn.report.results import BOUNDS, EXPERT, Estimate, Report
from fmn.store.records import Recipe
from fmn.tasks.task import TASKS

if TYPE_CHECKING:
    from jinja2 import Environment

Pictures = Mapping[str, Sequence[Picture]]
"""By section."""


def run_page(report: Report, pictures: Pictures) -> str:
    """The page of a run, with its pictures."""
    return render("report.html", report=report, pictures=pictures)


def comparison_page(comparison: Comparison, pictures: Pictures) -> str:
    """The page of a comparison of methods, with its pictures."""
    return render("comparison.html", comparison=comparison, pictures=pictures)


def render(template: str, **values: Any) -> str:
    """A template filled with values; what it leaves undefined is an error."""
    return _templates().get_template(template).render(values)


@cache
def _templates() -> "Environment":
    from jinja2 import (
        Environment,
        PackageLoader,
        StrictUndefined,
        pass_eval_context,
        select_autoescape,
    )

    @pass_eval_context
    def finalize(context: Any, value: Any) -> Any:
        return minus(value) if context.autoescape and type(value) is str else value

    templates = Environment(
        loader=PackageLoader("fmn.report"),
        autoescape=select_autoescape(),  # by the template's name: HTML, not Markdown
        undefined=StrictUndefined,
        finalize=finalize,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    names = ("differences_in_words", "listed", "percent", "points", "remarks", "seconds", "span")
    templates.filters |= {name: getattr(results, name) for name in (*names, "verdict")}
    own = (bounds, coefficients, largest, metrics_of, parts, settings, statistics)
    templates.filters |= {function.__name__: function for function in own}
    templates.filters["lines"] = str.splitlines
    return templates


# ---- what the templates call ----


def minus(text: str) -> str:
    """The text with a minus sign, instead of a hyphen, before numbers."""
    return re.sub(r"(?<![\w.])-(?=\d)", "\N{MINUS SIGN}", text)


def bounds(columns: Collection[str]) -> str:
    """What the bounds among some columns are."""
    return "; ".join(f"{name}: {what}" for name, what in BOUNDS.items() if name in columns) + "."


def metrics_of(task: str) -> str:
    """The metrics that a task's score is the mean of; nothing for the mean over tasks."""
    metrics = TASKS[task].metrics if task in TASKS else ()
    return " + ".join(metric.replace("_", " ") for metric in metrics)


def settings(recipe: Recipe) -> str:
    """The settings of a merge that belong to its method, in words."""
    names = ("mapping", "normalise", "exponent", "damping", "density", "seed")
    words = [f"{name} {getattr(recipe, name)}" for name in names]
    words = [
        word for name, word in zip(names, words, strict=True) if getattr(recipe, name) is not None
    ]
    return ", ".join([*words, *(["heads re-aligned"] if recipe.realign else [])])


def coefficients(recipe: Recipe) -> str:
    """The coefficients of a merge by task."""
    values = recipe.coefficients
    if len(set(values.values())) == 1:
        return f"{next(iter(values.values())):g} each"
    return ", ".join(f"{task} {value:.3g}" for task, value in values.items())


def statistics(recipe: Recipe, task: str) -> list[str]:
    """What weighed an expert in a merge, in words."""
    fisher = "mask Fisher" if NEEDS[recipe.method].fisher == "nodes" else "Fisher"
    return [
        f"{title} of {one.samples} examples{f', {one.estimator}' if one.estimator else ''}"
        for title, by_task in ((fisher, recipe.fisher), ("Gram matrices", recipe.gram))
        if (one := by_task.get(task))
    ]


def parts(columns: Collection[str], most: int = 7) -> list[list[str]]:
    """Columns for tables that fit on a page, of about equal number."""
    names = list(columns)
    count = -(-len(names) // most)
    size = -(-len(names) // count)
    return [names[start : start + size] for start in range(0, len(names), size)]


def largest(rows: Mapping[str, Mapping[str, Estimate]], column: str) -> str:
    """The method with the largest value in a column."""
    methods = [method for method in rows if method != EXPERT]
    return max(methods, key=lambda method: rows[method][column].value)
