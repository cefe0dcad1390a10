"""Render a report as one HTML file with tables, pictures and text; it loads nothing else.

The pages are jinja2 templates in ``templates/``, which escape all text. A short script sorts tables
and switches between scores and shares; without it, the page still shows everything.
"""

import os
import re
import subprocess
from collections.abc import Mapping
from datetime import UTC, datetime
from functools import cache
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from fmn import __version__
from fmn.errors import redacted
from fmn.merge.methods import METHODS
from fmn.merge.recipe import Recipe
from fmn.report import results, verdict, wording
from fmn.report.comparison import Comparison, notes
from fmn.report.figures import themed
from fmn.report.results import BOUNDS, EXPERT, Estimate, Report

if TYPE_CHECKING:
    from jinja2 import Environment


def render(template: str, **values: Any) -> str:
    """Fill a template with values; a name without a value is an error."""
    text = _templates().get_template(template).render(values)
    # A number and its unit stay in one line.
    return re.sub(r"(\d) %", "\\1\N{NO-BREAK SPACE}%", text) if template.endswith("html") else text


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
        *(best, facts, notes, settings, statistics, themed, wording.difference_span),
        *(wording.code, wording.escaped, wording.listed, wording.metric_words, wording.p_value),
        *(wording.plain, wording.points, results.remarks, wording.task_titles),
        *(verdict.judgement, verdict.verdict),
    )
    templates.filters |= {each.__name__: each for each in filters}
    templates.globals |= {"bounds": BOUNDS}
    return templates


# ---- filters ----


def facts(content: Report | Comparison) -> dict[str, tuple[str, str]]:
    """Facts about a page (model, registry, date, version, commit): each a text and a link or ""."""
    words: dict[str, tuple[str, str]] = {}
    if isinstance(content, Report):
        head, name = content.table.headline, content.registry
        if recipe := content.recipes.get(head):
            how = ", ".join(filter(None, [recipe.method, settings(recipe)]))
            words["model"] = (f"{head}: {how}", "")
        if name:
            words["registry"] = (f"a version of {name}", registry_page(name))
    words["written"] = (f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC", "")
    words["fmn"] = (f"version {__version__}", "")
    if commit := git_commit():
        words["commit"] = (commit[:12] + "+" * commit.endswith("+"), "")
    return words


def registry_page(name: str, version: str = "") -> str:
    """The address of a registered model's page, on the tracking server or on `fmn mlflow`'s.

    The latter's port is in MLFLOW_PORT; default: 5000.
    """
    server = os.environ.get("MLFLOW_TRACKING_URI", "")
    if not server.startswith("http"):
        server = f"http://127.0.0.1:{os.environ.get('MLFLOW_PORT', '5000')}"
    path = quote(name, safe="") + f"/versions/{version}" * bool(version)
    return f"{redacted(server).rstrip('/')}/#/models/{path}"


def git_commit() -> str | None:
    """The commit of the working folder, with ``+`` if files were changed; None without git."""
    command = ["git", "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty=+"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def settings(recipe: Recipe) -> str:
    """The settings of a merge that belong to its method, in words."""
    names = ("mapping", "normalise", "exponent", "damping", "scale", "density", "seed")
    values = {name: getattr(recipe, name) for name in names}
    words = [
        f"{name} {str(value).replace('-', wording.MINUS) if name != 'normalise' else value}"
        for name, value in values.items()
        if value is not None
    ]
    if recipe.auto:
        words.append(recipe.auto.in_words)
    if search := recipe.search:
        shares = [wording.shown(share) for share in (search.score, search.uniform)]
        words.append(
            "coefficients and scale by search on the training data ({} % of the experts'"
            " scores there; equal coefficients: {} %)".format(*shares)
        )
    if recipe.calibrate:
        words.append(f"encoder calibrated on {recipe.calibrate.texts} texts of each task")
    if realigned := recipe.realign:
        count = realigned.own_layers
        layers = [f"last {count} layers" if count > 1 else "last layer"] * bool(count)
        own = wording.listed(["pooler"] * realigned.own_pooler + layers)
        words.append("heads re-aligned")
        words += [f"each task with its expert's {own}"] if own != "nothing" else []
    return ", ".join(words)


def statistics(recipe: Recipe, task: str) -> str:
    """The statistics that gave an expert its weight in a merge, in words."""
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
