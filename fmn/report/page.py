"""A report as one HTML file: tables, pictures, words. Nothing is fetched, nothing runs.

The pages are jinja2 templates in ``templates/``; all text in them is escaped.
"""

import re
from collections.abc import Mapping, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

from fmn.merge.methods import METHODS
from fmn.merge.recipe import Recipe
from fmn.report import results
from fmn.report.comparison import Comparison
from fmn.report.figures import Picture
from fmn.report.results import BOUNDS, EXPERT, Estimate, Report
from fmn.tasks.task import TASKS

if TYPE_CHECKING:
    from jinja2 import Environment

Pictures = Mapping[str, Sequence[Picture]]
"""By section of the page."""


def run_page(report: Report, pictures: Pictures) -> str:
    """The page of a run, with its pictures."""
    return render("report.html", report=report, pictures=pictures)


def comparison_page(comparison: Comparison, pictures: Pictures) -> str:
    """The page of a comparison of methods, with its pictures."""
    return render("comparison.html", comparison=comparison, pictures=pictures)


def render(template: str, **values: Any) -> str:
    """A template filled with values; a name that it does not know is an error."""
    return _templates().get_template(template).render(values)


@cache
def _templates() -> "Environment":
    import jinja2

    templates = jinja2.Environment(
        loader=jinja2.PackageLoader("fmn.report"),
        autoescape=jinja2.select_autoescape(),  # by the template's name: HTML, not Markdown
        finalize=jinja2.pass_eval_context(_with_minus),
        undefined=jinja2.StrictUndefined,
        extensions=["jinja2.ext.do"],
        trim_blocks=True,
        lstrip_blocks=True,
    )
    words = ("differences_in_words", "listed", "percent", "points", "remarks", "seconds", "span")
    templates.filters |= {name: getattr(results, name) for name in (*words, "verdict")}
    own = (largest, metrics_of, settings, statistics)
    templates.filters |= {function.__name__: function for function in own}
    templates.globals |= {"bounds": BOUNDS}
    return templates


def _with_minus(context: Any, value: Any) -> Any:
    """Text of a page with a minus sign, instead of a hyphen, before numbers."""
    is_text = context.autoescape and type(value) is str
    return re.sub(r"(?<![\w.])-(?=\d)", "\N{MINUS SIGN}", value) if is_text else value


# ---- filters ----


def metrics_of(task: str) -> str:
    """The metrics that a task's score is the mean of; nothing for the mean over tasks."""
    metrics = TASKS[task].metrics if task in TASKS else ()
    return " + ".join(metric.replace("_", " ") for metric in metrics)


def settings(recipe: Recipe) -> str:
    """The settings of a merge that belong to its method, in words."""
    names = ("mapping", "normalise", "exponent", "damping", "density", "seed")
    words = [f"{name} {value}" for name in names if (value := getattr(recipe, name)) is not None]
    return ", ".join(words + ["heads re-aligned"] * (recipe.realign is not None))


def statistics(recipe: Recipe, task: str) -> str:
    """What weighed an expert in a merge, in words."""
    fisher = "mask Fisher" if METHODS[recipe.method].fisher == "nodes" else "Fisher"
    return "; ".join(
        f"{title} of {one.samples} examples{f', {one.estimator}' if one.estimator else ''}"
        for title, by_task in ((fisher, recipe.fisher), ("Gram matrices", recipe.gram))
        if (one := by_task.get(task))
    )


def largest(rows: Mapping[str, Mapping[str, Estimate]], column: str) -> str:
    """The method with the largest value in a column."""
    methods = [method for method in rows if method != EXPERT]
    return max(methods, key=lambda method: rows[method][column].value)
