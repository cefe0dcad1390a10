"""A report as one HTML file: tables, pictures, words; nothing is fetched, nothing runs."""

import re
from collections.abc import Mapping, Sequence
from html import escape
from typing import TYPE_CHECKING, Any, NamedTuple

from fmn.merge.methods import NEEDS
from fmn.report.drawing import Picture, listed
from fmn.report.pictures import differences_in_words, seconds
from fmn.report.results import (
    BOUNDS,
    EXPERT,
    MACRO,
    Cost,
    Estimate,
    Table,
    metrics_of,
    percent,
    points,
    remarks,
    span,
    verdict,
)

if TYPE_CHECKING:
    from fmn.evaluate.bootstrap import Difference
    from fmn.report.comparison import Compared

STYLE = """
:root { --ink: #1f2328; --soft: #59636e; --line: #d1d6dc; --faint: #f6f7f9; --mark: #0059a0;
  --sans: system-ui, "Segoe UI", Roboto, "Helvetica Neue", Arial, "DejaVu Sans", sans-serif; }
* { box-sizing: border-box; }
html { background: #fff; color: var(--ink); -webkit-text-size-adjust: 100%; }
body { max-width: 58rem; margin: 0 auto; padding: 3rem 1.25rem 4rem; line-height: 1.5;
  font: 1rem/1.55 var(--sans); }
h1 { font-size: 1.75rem; line-height: 1.25; font-weight: 650; margin: 0 0 .75rem; letter-spacing: -.01em; }
h2 { font-size: 1.2rem; font-weight: 650; margin: 3.25rem 0 .5rem; padding-top: .9rem;
  border-top: 1px solid var(--line); }
h3 { font-size: 1rem; font-weight: 650; margin: 1.75rem 0 .25rem; }
p { margin: .5rem 0; max-width: 44rem; }
ul { margin: .5rem 0; padding-left: 1.2rem; }
.lead { font-size: 1.1rem; }
.soft, small, figcaption, caption { color: var(--soft); }
small { font-size: .8rem; }
a { color: var(--mark); text-underline-offset: .15em; }
nav { margin: 1.25rem 0 0; font-size: .9rem; display: flex; flex-wrap: wrap; gap: .25rem 1.1rem; }
code { font: .86em ui-monospace, "SF Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace; overflow-wrap: anywhere; }
.figures { display: flex; flex-wrap: wrap; gap: 1rem 2.75rem; margin: 1.5rem 0 .25rem; }
.figures div { min-width: 6.5rem; }
.figures b { display: block; font-size: 1.75rem; line-height: 1.2; font-weight: 600;
  font-variant-numeric: tabular-nums; }
.figures .chosen b { color: var(--mark); }
.figures span { display: block; font-weight: 600; font-size: .9rem; }
table { border-collapse: collapse; width: 100%; margin: .75rem 0 1.25rem; font-size: .92rem;
  font-variant-numeric: tabular-nums; }
caption { caption-side: bottom; text-align: left; font-size: .85rem; padding-top: .5rem; }
th, td { padding: .4rem .5rem; text-align: right; vertical-align: baseline; border-bottom: 1px solid var(--line); }
th { font-weight: 600; }
thead th { color: var(--soft); font-size: .82rem; border-bottom: 1px solid var(--ink); vertical-align: bottom;
  line-height: 1.3; }
th:first-child, td:first-child { text-align: left; padding-left: 0; }
th:last-child, td:last-child { padding-right: 0; }
.words td, .words th { text-align: left; }
.words td { overflow-wrap: anywhere; }
.words small { white-space: normal; }
tbody th { white-space: nowrap; }
td small, th small { display: block; line-height: 1.35; font-weight: 400; white-space: nowrap; }
td.chosen { font-weight: 650; }
thead th.chosen { color: var(--ink); }
tr.mean > * { border-top: 1px solid var(--ink); border-bottom: 1px solid var(--ink); background: var(--faint); }
table.dense { font-size: .85rem; }
table.dense th, table.dense td { padding-top: .28rem; padding-bottom: .28rem; }
table.dense small { font-size: .72rem; }
table.dense tbody th { white-space: normal; }
.real { font-weight: 650; }
figure { margin: 1.25rem 0 1.75rem; }
figure svg { display: block; width: 100%; height: auto; }
figure svg text { font-family: var(--sans) !important; }
figcaption { font-size: .85rem; max-width: 44rem; margin-top: .4rem; }
figcaption b { color: var(--ink); font-weight: 650; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .25rem 1.25rem; margin: .75rem 0; font-size: .92rem; }
dt { font-weight: 600; } dd { margin: 0; max-width: 44rem; }
@page { size: A4; margin: 15mm 14mm; }
@media print {
  html { font-size: 12px; color: #000; }
  :root { --soft: #333; --mark: #000; --faint: #fff; --line: #999; }
  body { max-width: none; padding: 0; }
  nav { display: none; }
  a { color: inherit; text-decoration: none; }
  h1, h2, h3 { break-after: avoid; }
  h2 { margin-top: 2rem; }
  section > p { break-after: avoid; break-inside: avoid; }
  table, figure, .figures, dl, tr { break-inside: avoid; }
  thead { display: table-header-group; }
  p { orphans: 3; widows: 3; }
}
"""


class Cell(NamedTuple):
    """A cell of a table: text, lines in small print below it, and a class."""

    text: str
    small: Sequence[str] = ()
    kind: str = ""


def document(title: str, content: Sequence[str]) -> str:
    """A whole page."""
    head = '<meta charset="utf-8">\n<meta name="viewport" content="width=device-width, initial-scale=1">'
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n{head}\n<title>{escape(title)}</title>\n'
        f"<style>{STYLE}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(content)
        + "\n</main>\n</body>\n</html>\n"
    )


def table(
    header: Sequence[str | Cell],
    body: Sequence[Sequence[str | Cell]],
    caption: str = "",
    kind: str = "",
) -> str:
    """A table whose rows begin with their name; a row named MACRO stands apart. An empty cell is a dash."""

    def cell(given: str | Cell, tag: str, scope: str = "") -> str:
        one = given if isinstance(given, Cell) else Cell(given)
        kinds = f' class="{one.kind}"' if one.kind else ""
        text = escape(minus(one.text)) or ('<span class="soft">–</span>' if tag == "td" else "")
        small = "".join(f"<small>{escape(minus(line))}</small>" for line in one.small)
        return f"<{tag}{scope}{kinds}>{text}{small}</{tag}>"

    lines = [f'<table class="{kind}">' if kind else "<table>"]
    lines += [f"<caption>{escape(caption)}</caption>"] if caption else []
    lines += [
        "<thead><tr>",
        *(cell(name, "th", ' scope="col"') for name in header),
        "</tr></thead>",
        "<tbody>",
    ]
    for first, *others in body:
        name = first.text if isinstance(first, Cell) else first
        row = '<tr class="mean">' if name == MACRO else "<tr>"
        lines += [
            row,
            cell(first, "th", ' scope="row"'),
            *(cell(one, "td") for one in others),
            "</tr>",
        ]
    return "\n".join([*lines, "</tbody></table>"])


def figure(picture: Picture) -> str:
    """A picture with its caption."""
    caption = f"<b>{escape(picture.title)}.</b> {escape(minus(picture.finding))} {escape(picture.reading)}"
    return f'<figure id="picture-{picture.name}">{picture.svg}<figcaption>{caption}</figcaption></figure>'


def minus(text: str) -> str:
    """The text with a minus sign before numbers, where it has a hyphen."""
    return re.sub(r"(?<![\w.])-(?=\d)", "\u2212", text)


def paragraph(text: str, kind: str = "") -> str:
    opening = f'<p class="{kind}">' if kind else "<p>"
    return f"{opening}{escape(minus(text))}</p>"


def bullets(lines: Sequence[str]) -> str:
    return "<ul>" + "".join(f"<li>{escape(minus(line))}</li>" for line in lines) + "</ul>"


def sections(parts: Mapping[str, Sequence[str]]) -> list[str]:
    """Sections by title, those that have content, with links to them before."""
    full = {title: content for title, content in parts.items() if any(content)}
    links = "".join(f'<a href="#s{place}">{escape(title)}</a>' for place, title in enumerate(full))
    found = [f"<nav>{links}</nav>"]
    for place, (title, content) in enumerate(full.items()):
        found += [
            f'<section id="s{place}">',
            f"<h2>{escape(title)}</h2>",
            *filter(None, content),
            "</section>",
        ]
    return found


def figures(items: Mapping[str, tuple[str, str]], chosen: str, below: str) -> str:
    """Large figures side by side: by name, the figure and its interval; below them, what they are."""
    kinds = {name: ' class="chosen"' if name == chosen else "" for name in items}
    shown = [
        f"<div{kinds[name]}><b>{escape(number)}</b><span>{escape(name)}</span><small>{escape(small)}</small></div>"
        for name, (number, small) in items.items()
    ]
    return f'<div class="figures">{"".join(shown)}</div>{paragraph(below, "soft")}'


def estimate(one: Estimate | None, *small: str, kind: str = "") -> Cell:
    """A share in percent with its interval below."""
    if one is None:
        return Cell("", small, kind)
    return Cell(percent(one.value), [line for line in (span(one.interval), *small) if line], kind)


def difference(one: "Difference") -> Cell:
    """A difference in points, its interval, and what it says."""
    said = verdict(one)
    mark = {"better": "▲ ", "worse": "▼ "}.get(said, "")
    ends = f"{points(one.interval[0])} to {points(one.interval[1])}"
    return Cell(
        f"{mark}{points(one.difference)}",
        [ends, f"{said}, p {one.p_value:.3f}"],
        "real" if mark else "",
    )


def definitions(items: Mapping[str, str]) -> str:
    return (
        "<dl>"
        + "".join(f"<dt>{escape(name)}</dt><dd>{escape(said)}</dd>" for name, said in items.items())
        + "</dl>"
    )


NOTES = {
    "score": "of a task: the mean of its GLUE metrics, and over its validation splits (mnli has two).",
    "interval": "the middle 95 % of 1000 bootstrap resamples of the examples (percentile interval). Seeds of"
    " fine-tuning are not in it: other experts would differ by more.",
    "relative": "the score divided by the expert's on the same examples, and its interval in the same resamples; none"
    " for a task whose expert scores nothing, and no interval where that happens in a resample.",
    "paired test": "both models on the same resamples; p is twice the share in which the difference changes its sign.",
}


# ---- the page of a run ----


def of_run(
    found: Table,
    recipes: Mapping[str, Mapping[str, Any]],
    costs: Sequence[Cost],
    drawn: Sequence[Picture],
) -> str:
    """The page of a run; arguments as for `fmn.report.write`, and its pictures."""
    pictures = {picture.name: figure(picture) for picture in drawn}
    title = f"One model for {listed(found.tasks)}"

    def shown(*names: str) -> list[str]:
        return [pictures[name] for name in names if name in pictures]

    parts = {
        "Scores": [
            _scores(found),
            bullets(remarks(found)) if found.guessing else "",
            *shown("scores"),
        ],
        "Which differences are real": [_differences(found), *shown("differences")],
        "How it was merged": [_recipes(recipes), _experts(recipes.get(found.headline))],
        "Where the experts' information lies": shown("fisher-heads", "fisher-neurons"),
        "Who owns what": [_owners(recipes.get(found.headline)), *shown("owners", "owners-heads")]
        if "owners" in pictures
        else [],
        "What it cost": [*shown("cost"), _costs(costs)],
        "How to read this": [definitions(NOTES)],
    }
    return document(
        title,
        [
            f"<header><h1>{escape(title)}</h1>",
            *_lead(found, recipes),
            "</header>",
            *sections(parts),
        ],
    )


def _lead(found: Table, recipes: Mapping[str, Mapping[str, Any]]) -> list[str]:
    row, head = found.rows[-1], found.columns[found.headline]
    over = f"the mean over {len(found.tasks)} tasks" if row == MACRO else row
    related = row in head.relative
    shown = {
        name: (one.relative if related else one.scores).get(row)
        for name, one in found.columns.items()
    }
    items = {
        name: (f"{percent(one.value)} %", span(one.interval)) for name, one in shown.items() if one
    }
    if related and EXPERT in items:
        items[EXPERT] = ("100 %", "by definition")
    method = f" with {recipes[found.headline]['method']}" if found.headline in recipes else ""
    said = f"The model merged{method} " + (
        f"keeps {items[found.headline][0]} of its experts' scores in {over}"
        if related
        else f"scores {items[found.headline][0]} in {over}"
    )
    said += f" (95 % interval {items[found.headline][1]})." if items[found.headline][1] else "."
    below = ("of the experts' scores" if related else "score") + f", in {over}"
    return [
        paragraph(said, "lead"),
        bullets(differences_in_words(found)) if found.differences else "",
        figures(items, found.headline, below),
    ]


def _scores(found: Table) -> str:
    names = list(found.columns)
    header: list[str | Cell] = ["task", Cell("examples")]
    header += [Cell(name, kind="chosen" if name == found.headline else "") for name in names]
    body: list[list[str | Cell]] = []
    for row in found.rows:
        line: list[str | Cell] = [Cell(row, [metrics_of(row)] if metrics_of(row) else [])]
        line.append(f"{found.examples[row]:,}" if row in found.examples else "")
        for name in names:
            one = found.columns[name]
            share = one.relative.get(row)
            small = [f"{percent(share.value)} % of expert"] if share and name != EXPERT else []
            line.append(
                estimate(
                    one.scores.get(row), *small, kind="chosen" if name == found.headline else ""
                )
            )
        body.append(line)
    said = "; ".join(f"{name}: {what}" for name, what in BOUNDS.items() if name in names)
    return table(
        header,
        body,
        f"Scores in percent, the 95 % interval, and the share of the expert's score. {said}.",
    )


def _differences(found: Table) -> str:
    if not found.differences:
        return ""
    header = ["task", *(f"{found.headline} less {name}" for name in found.differences)]
    body: list[list[str | Cell]] = []
    for row in found.rows:
        line: list[str | Cell] = [row]
        for by_row in found.differences.values():
            one = by_row.get(row)
            line.append(difference(one) if one else "")
        body.append(line)
    return table(
        header, body,
        "Differences in points with their 95 % interval, by a paired bootstrap on the same examples. ▲ better and ▼"
        " worse: p below 0.05, each tested by itself; of twenty differences that are none, one looks real.",
    )  # fmt: skip


def _settings(recipe: Mapping[str, Any]) -> str:
    """The settings of a merge that are its method's, in words."""
    names = ("mapping", "normalise", "exponent", "damping", "density", "seed")
    said = [f"{name} {recipe[name]}" for name in names if recipe.get(name) is not None]
    if recipe.get("realign"):
        said.append("heads re-aligned")
    return ", ".join(said)


def _recipes(recipes: Mapping[str, Mapping[str, Any]]) -> str:
    body = [
        [
            name,
            recipe["method"],
            _settings(recipe),
            _coefficients(recipe["coefficients"]),
            f"{recipe['scale']:g}",
        ]
        for name, recipe in recipes.items()
    ]
    said = "Scale: of the merged task vector, which is the merged model less the base."
    for name, recipe in recipes.items():
        if search := recipe.get("search"):
            said += (
                f" Coefficients and scale of {name} were found by search: {percent(search['score'])} % of the experts'"
                f" scores on rows of the training data, where equal coefficients reach {percent(search['uniform'])} %."
            )
    return (
        table(["model", "method", "settings", "coefficients", "scale"], body, said, "words")
        if body
        else ""
    )


def _coefficients(given: Mapping[str, float]) -> str:
    if len(set(given.values())) == 1:
        return f"{next(iter(given.values())):g} each"
    return ", ".join(f"{task} {value:.3g}" for task, value in given.items())


def _experts(recipe: Mapping[str, Any] | None) -> str:
    if not recipe or "experts" not in recipe:
        return ""
    needs = NEEDS[recipe["method"]]
    titles = {
        "fisher": "mask Fisher" if needs.fisher == "nodes" else "Fisher",
        "gram": "Gram matrices",
    }
    body: list[list[str | Cell]] = []
    for task, entry in recipe["experts"].items():
        given = [
            f"{title} of {stated['samples']} examples"
            + (f", {stated['estimator']}" if "estimator" in stated else "")
            for kind, title in titles.items()
            if (stated := recipe.get(kind, {}).get(task))
        ]
        tuning = [
            f"{name.replace('_', ' ')} {value}" for name, value in entry.get("settings", {}).items()
        ]
        body.append(
            [task, Cell(entry["revision"], [", ".join(tuning)] if tuning else []), "; ".join(given)]
        )
    base = recipe.get("base")
    return table(
        ["expert", "from", "weighed by"],
        body,
        f"Base: {base['revision']}." if base else "",
        "words",
    )


def _owners(recipe: Mapping[str, Any] | None) -> str:
    if not recipe:
        return ""
    said = (
        "Expert <i>j</i> owns the share λ<sub>j</sub>F<sub>j</sub> / Σ<sub>k</sub> λ<sub>k</sub>F<sub>k</sub> of a"
        " node's parameters, with F the Fisher information of mask nodes as the merge took it"
        f" (normalised by {escape(recipe['normalise'])}, to the power {recipe['exponent']:g})."
    )
    if recipe["mapping"] == "paper":
        said += " By the mapping paper, value, output and down projections take the mean of their layer instead."
    if recipe["method"] == "fisher-regmean":
        said += " In fisher-regmean, the shares weigh the rows of each regression."
    return f"<p>{said}</p>"


def _costs(costs: Sequence[Cost]) -> str:
    if not costs:
        return ""
    names = list(dict.fromkeys(one.name for one in costs))
    stages = list(dict.fromkeys(one.stage for one in costs))

    def total(stage: str | None, name: str | None) -> str:
        """The seconds of a stage for a name; of all stages, or for all names, where that is None."""
        found = [
            one.seconds for one in costs if stage in (None, one.stage) and name in (None, one.name)
        ]
        return f"{sum(found):,.1f}" if found else ""

    body = [[name, *(total(stage, name) for stage in stages), total(None, name)] for name in names]
    body.append(["all", *(total(stage, None) for stage in stages), total(None, None)])
    return table(
        ["task or model", *stages, "all"], body,
        "Seconds of the run that made each output, which may have been an earlier run; stages that ran side by side"
        f" shared the machine. Together {seconds(sum(one.seconds for one in costs))}.", "dense",
    )  # fmt: skip


# ---- the page of a comparison ----


def of_comparison(found: "Compared", drawn: Sequence[Picture]) -> str:
    """The page of a comparison of methods, with its pictures."""
    pictures = {picture.name: figure(picture) for picture in drawn}
    title = f"{len(found.means)} ways to merge {listed(list(found.scores[EXPERT])[:-1])}"
    parts = {
        "Methods": [_methods(found), pictures["methods"]],
        f"All together: {found.largest}": _by_task(found),
        "By set of experts": [_by_set(found, part) for part in _parts(list(found.sets))],
        "Pairs": [pictures["pairs"]] if "pairs" in pictures else [],
        "How to read this": [definitions(NOTES)],
    }
    return document(
        title,
        [
            f"<header><h1>{escape(title)}</h1>",
            *_compared_lead(found),
            "</header>",
            *sections(parts),
        ],
    )


def _compared_lead(found: "Compared") -> list[str]:
    shown = [name for name in ("base", "average", found.best) if name in found.means]
    value, ends = found.means[found.best]["mean"]
    said = (
        f"{found.best} keeps {percent(value)} % of the experts' scores in the mean over {len(found.sets)} sets of"
        f" experts{f' (95 % interval {span(ends)})' if ends else ''}."
    )
    means = {name: found.means[name]["mean"] for name in shown}
    items = {name: (f"{percent(one.value)} %", span(one.interval)) for name, one in means.items()}
    return [
        paragraph(said, "lead"),
        figures(
            {**items, EXPERT: ("100 %", "by definition")},
            found.best,
            "of the experts' scores, mean over the sets",
        ),
    ]


def _ranked(rows: Mapping[str, Mapping[str, Estimate]], columns: Sequence[str]) -> dict[str, str]:
    """The method with the largest value in each column."""
    methods = [method for method in rows if method != EXPERT]
    return {name: max(methods, key=lambda method: rows[method][name].value) for name in columns}


def _methods(found: "Compared") -> str:
    kinds = list(next(iter(found.means.values())))
    first = _ranked(found.means, kinds)
    body: list[list[str | Cell]] = []
    for method, row in found.means.items():
        cells = [
            estimate(row[kind], kind="chosen" if first[kind] == method else "") for kind in kinds
        ]
        body.append([method, *cells, f"{found.seconds[method]:,.1f}"])
    body.append([EXPERT, *["100.0"] * len(kinds), ""])
    return table(
        ["method", *kinds, "seconds"], body,
        "Percent of the experts' scores: the mean over the tasks of a set, over the sets of a size, and over those;"
        f" with the 95 % interval. {_bounds(found.means)} Seconds: of a merge. Bold: the most in a column.", "dense",
    )  # fmt: skip


def _bounds(names: Mapping[str, Any]) -> str:
    said = [f"{name}: {what}" for name, what in BOUNDS.items() if name in names or name == EXPERT]
    return f"{'; '.join(said)}."


def _by_task(found: "Compared") -> list[str]:
    tasks = [name for name in found.scores[EXPERT] if name != MACRO]
    first = _ranked(found.scores, [*tasks, MACRO])

    def shown(method: str, name: str) -> Cell:
        return estimate(found.scores[method][name], kind="chosen" if first[name] == method else "")

    said = "Scores in percent of these experts merged together, with the 95 % interval. Bold: the most in a column."
    made = [
        table(
            ["method", *part],
            [[method, *(shown(method, name) for name in part)] for method in found.scores],
            said,
            "dense",
        )
        for part in _parts(tasks)
    ]
    body: list[list[str | Cell]] = []
    for method in found.scores:
        one = found.differences.get(method)
        body.append([method, shown(method, MACRO), difference(one) if one else ""])
    return [*made, table(
        ["method", "mean score", "less that of the average"], body,
        "The mean over these tasks in percent; and the difference from that of the plain average in points, by a paired"
        " bootstrap on the same examples. ▲ better and ▼ worse: p below 0.05, each tested by itself.", "dense",
    )]  # fmt: skip


def _parts(columns: Sequence[str], most: int = 7) -> list[Sequence[str]]:
    """Columns for tables side by side that fit on a page, of about equal number."""
    count = -(-len(columns) // most)
    size = -(-len(columns) // count)
    return [columns[start : start + size] for start in range(0, len(columns), size)]


def _by_set(found: "Compared", names: Sequence[str]) -> str:
    rows = {method: {name: found.sets[name][method] for name in names} for method in found.means}
    first = _ranked(rows, names)
    body: list[list[str | Cell]] = [
        [
            method,
            *(
                estimate(row[name], kind="chosen" if first[name] == method else "")
                for name in names
            ),
        ]
        for method, row in rows.items()
    ]
    body.append([EXPERT, *["100.0"] * len(names)])
    header = [Cell("method"), *(Cell("", name.replace("+", " +\n").split("\n")) for name in names)]
    return table(
        header,
        body,
        "Percent of the experts' scores in the mean over a set's tasks, with the 95 % interval.",
        "dense",
    )
