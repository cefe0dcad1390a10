"""A report as one HTML file: tables, pictures, words. Nothing is fetched, nothing runs.

The pages are jinja2 templates in ``templates/``; all text in them is escaped.
"""

from collections.abc import Mapping
from functools import cache
from typing import TYPE_CHECKING, Any

from fmn.merge.methods import METHODS
from fmn.merge.recipe import Recipe
from fmn.report import results, verdict
from fmn.report.comparison import notes
from fmn.report.results import BOUNDS, EXPERT, Estimate

if TYPE_CHECKING:
    from jinja2 import Environment


def render(template: str, **values: Any) -> str:
    """A template filled with values; a name that it does not know is an error."""
    return _templates().get_template(template).render(values)


@cache
def _templates() -> "Environment":
    import jinja2

    templates = jinja2.Environment(
        loader=jinja2.PackageLoader("fmn.report"),
        autoescape=jinja2.select_autoescape(),  # by the template's name: HTML, not Markdown
        undefined=jinja2.StrictUndefined,
        extensions=["jinja2.ext.do"],
        trim_blocks=True,
        lstrip_blocks=True,
    )
    filters = (
        *(best, notes, settings, statistics, results.difference_span),
        *(results.escaped, results.listed, results.metric_words, results.points),
        *(results.remarks, verdict.judgement, verdict.verdict),
    )
    templates.filters |= {each.__name__: each for each in filters}
    templates.globals |= {"bounds": BOUNDS}
    return templates


# ---- filters ----


def settings(recipe: Recipe) -> str:
    """The settings of a merge that belong to its method, in words."""
    names = ("mapping", "normalise", "exponent", "damping", "scale", "density", "seed")
    values = {name: getattr(recipe, name) for name in names}
    words = [f"{name} {value}" for name, value in values.items() if value is not None]
    if recipe.auto:
        words.append(recipe.auto.in_words)
    if search := recipe.search:
        shares = [results.shown(share) for share in (search.score, search.uniform)]
        words.append(
            "coefficients and scale by search on the training data ({} % of the experts'"
            " scores there; equal coefficients: {} %)".format(*shares)
        )
    if recipe.calibrate:
        words.append(f"encoder calibrated on {recipe.calibrate.texts} texts of each task")
    if realigned := recipe.realign:
        layers = [f"last {realigned.own_layers} layers"] * bool(realigned.own_layers)
        own = results.listed(["pooler"] * realigned.own_pooler + layers)
        words.append("heads re-aligned")
        words += [f"each task with its expert's {own}"] if own != "nothing" else []
    return ", ".join(words)


def statistics(recipe: Recipe, task: str) -> str:
    """What weighed an expert in a merge, in words."""
    fisher = "mask Fisher" if METHODS[recipe.method].fisher == "nodes" else "Fisher"
    words = []
    for title, by_task in ((fisher, recipe.fisher), ("Gram matrices", recipe.gram)):
        if statistic := by_task.get(task):
            estimator = f", {statistic.estimator}" if statistic.estimator else ""
            words.append(f"{title} of {statistic.samples} examples{estimator}")
    return "; ".join(words)


def best(rows: Mapping[str, Mapping[str, Estimate]], column: str) -> str:
    """The method with the best value in a column; "" if all are undefined."""
    numbers = {m: row[column] for m, row in rows.items() if m != EXPERT}
    known = {m: each.value for m, each in numbers.items() if each.value is not None}
    is_percent = all(each.is_percent for each in numbers.values())
    return (max if is_percent else min)(known, key=known.__getitem__, default="")
