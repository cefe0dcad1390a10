"""A report as one HTML file: what stands in it, and how it looks in a browser and on paper."""

import json
import os
import shutil
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from html.parser import HTMLParser
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest

from fmn.report import comparison, figures, page
from fmn.report.results import Entry, Estimate
from fmn.tasks.task import TASKS
from tests import reports
from tests.reports import NUMBERS, OWN, SEVEN, own_task


class Reader(HTMLParser):
    """The elements of a page with their attributes, and all its text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.parts: list[str] = []
        self.feed(text)
        self.text = " ".join(" ".join(self.parts).split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.parts.append(data)

    def every(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


def run_page(*arguments: Any, **more: Any) -> str:
    report = reports.report(*arguments, **more)
    pictures = figures.draw(figures.RUN_PICTURES, report)
    return page.render("report.html", report=report, pictures=pictures)


def comparison_page(tasks: Sequence[Any] = SEVEN) -> str:
    picks = [*combinations(tasks, 2), tuple(tasks)]
    sets = {"+".join(getattr(task, "name", task) for task in pick): pick for pick in picks}
    methods = {"base": 0.5, "average": 0.6} | {
        f"a method with a long name {n}": 0.6 + 0.02 * n for n in range(6)
    }
    content = comparison.compare(reports.cells(sets, methods))
    pictures = figures.draw(figures.COMPARISON_PICTURES, content)
    return page.render("comparison.html", comparison=content, pictures=pictures)


def test_the_page_says_what_the_report_holds() -> None:
    coefficients = {"cola": 1.0, "mnli": 0.25, "sst2": 2.0}
    search = {"digest": "", "score": 0.93, "uniform": 0.91}
    recipe = {"coefficients": coefficients, "search": search}
    read = Reader(run_page(tuple(coefficients), recipe=recipe))
    for words in (
        "One model for cola, mnli and sst2",
        "The model merged keeps",
        "of the experts' scores (mean of 3 tasks, 95 % interval",
        "Better than average by",
        "base: the base model under each expert's head (lower bound)",
        "merged less average",
        "cola 1, mnli 0.25, sst2 2",
        "93.0 % of the experts' scores",
        "hf://org/some-base-uncased-mnli@",
        "mask Fisher of 1024 examples, empirical",
        "normalised by kind",
        "took 144 s",
    ):
        assert words in read.text, words
    names = [draw.__name__ for draw in figures.RUN_PICTURES]
    assert [figure["id"] for figure in read.every("figure")] == [f"picture-{n}" for n in names]
    assert {header.get("scope") for header in read.every("th")} == {"col", "row"}
    ids = [attributes["id"] for _, attributes in read.elements if "id" in attributes]
    assert len(set(ids)) == len(ids)
    links = {(link["href"] or "").removeprefix("#") for link in read.every("a")}
    assert len(links) == 9
    assert links <= set(ids)


def test_errors_are_plain_numbers_and_what_is_undefined_says_so() -> None:
    flat = own_task(NUMBERS, "pearson", name="flat")
    report = reports.report((*OWN, flat))
    undefined = {"flat": Entry(Estimate(None), None)}  # as of labels that are all the same
    columns = {name: {**column, **undefined} for name, column in report.table.columns.items()}
    table = replace(report.table, columns=columns, averaged=("intents", "topics", "spam"))
    report = replace(report, table=table)
    pictures = figures.draw(figures.RUN_PICTURES, report)
    read = Reader(page.render("report.html", report=report, pictures=pictures))
    for words in (
        "price mse + mae (less is better)",
        "flat pearson 64 undefined undefined undefined undefined",
        "price: mse + mae (less is better); a plain number, no percentage",
        "flat: undefined: its labels here do not define pearson",
        "mean score: over intents, topics and spam; without price and flat",
        "mean of 3 tasks",
        "in the mean over 4 tasks",
        "multi label classification label 0, label 1, label 2 f1 micro 128",
    ):
        assert words in read.text, words
    assert "price" not in pictures["Scores"][0].svg, "an error is not on a scale of percent"


def test_nothing_is_fetched_and_nothing_runs() -> None:
    read = Reader(run_page(("cola", "sst2")))
    tags = {tag for tag, _ in read.elements}
    assert not tags & {"script", "link", "img", "iframe", "object", "image"}
    names = ("href", "src", "xlink:href", "style")
    values = [each.get(name) or "" for _, each in read.elements for name in names]
    assert not [value for value in values if "//" in value]
    style = page.render("style.css")
    assert "@import" not in style
    assert "url(" not in style


def test_names_are_text_whatever_is_in_them() -> None:
    odd = OWN[0].model_copy(update={"labels": ("<i>|x", "a" * 99, *OWN[0].labels[2:])})
    shown = Reader(run_page((odd, "cola")))
    assert f"<i>|x, {'a' * 31}…, label 2" in shown.text
    assert "(12 labels)" in shown.text
    names = ("cola", "sst2")
    experts = {name: reports.checkpoint("<b>x & y</b>") for name in names}
    plain = Reader(run_page(names, models=("heads",)))
    read = Reader(run_page(names, models=("<i>a</i>",), recipe={"experts": experts}))
    assert "<i>a</i>" in read.text
    assert "<b>x & y</b>" in read.text
    assert len(shown.every("i")) == len(plain.every("i"))
    for tag in ("i", "b"):
        assert len(read.every(tag)) == len(plain.every(tag))
    content = comparison.compare(reports.cells({"cola+sst2": names}, {"<i>": 0.5, "average": 0.6}))
    compared = Reader(page.render("comparison.html", comparison=content, pictures={}))
    assert "<i>" in compared.text
    assert not compared.every("i")


# ---- in a browser ----

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
A4 = (688, 1009)  # CSS pixels between the page's margins of 14 and 15 mm
LOOK = """
const text = element => element.tagName + ' ' + element.textContent.slice(0, 80);
const box = element => element.getBoundingClientRect();
const all = (selector, start = document) => [...start.querySelectorAll(selector)];
const wide = all('body, body *:not(svg *)').filter(element =>
  box(element).right > document.documentElement.clientWidth + 0.5 || box(element).left < -0.5);
const outside = all('figure > svg').flatMap(svg => all('text', svg).filter(words =>
  box(words).left < box(svg).left - 1 || box(words).right > box(svg).right + 1 ||
  box(words).top < box(svg).top - 1 || box(words).bottom > box(svg).bottom + 1));
const tall = all('table, figure, dl, .figures').filter(element =>
  getComputedStyle(element).breakInside === 'avoid' ? box(element).height > HEIGHT : PAPER);
const small = all('figure > svg').filter(svg => box(svg).width < 600 || box(svg).height < 80 ||
  svg.getBBox().width < 0.5 * svg.viewBox.baseVal.width);
const seen = {wide, outside, tall, small};
for (const name in seen) seen[name] = seen[name].map(text);
document.body.textContent = JSON.stringify(seen);
"""
STEPS = ("paper", "calibrated", "realigned", "realigned-own-1")
PAGES: Mapping[str, Callable[[], str]] = {
    "three tasks": lambda: run_page(("cola", "mnli", "sst2"), 6, 12),
    "own tasks": lambda: run_page((*OWN, "cola"), 6, 12),
    "nine tasks": lambda: run_page(sorted(TASKS), 24, 16, models=STEPS, headline="realigned"),
    "a comparison": comparison_page,
    "a comparison of own tasks": lambda: comparison_page(OWN),
}


@pytest.mark.parametrize("name", PAGES)
def test_a_page_looks_right_on_a_screen_and_on_paper(tmp_path: Path, name: str) -> None:
    """Nothing is wider than the page, no picture cuts its words, no page end cuts a table."""
    if CHROMIUM is None:
        assert not os.environ.get("CI"), "CI installs a browser"
        pytest.skip("no browser to look at a report in: `apt-get install chromium`")
    html = PAGES[name]()
    for is_paper, (width, height) in ((False, (1000, 900)), (True, A4)):
        script = LOOK.replace("HEIGHT", str(height) if is_paper else "Infinity")
        script = script.replace("PAPER", str(is_paper).lower())
        shown = html.replace("@media print", "@media all") if is_paper else html
        path = tmp_path / "page.html"
        path.write_text(shown.replace("</body>", f"<script>{script}</script></body>"))
        seen = subprocess.run(
            [
                CHROMIUM,
                *("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"),
                *("--hide-scrollbars", f"--user-data-dir={tmp_path / 'profile'}"),
                *(f"--window-size={width},{height}", "--dump-dom", path.as_uri()),
            ],
            capture_output=True,
            text=True,
            check=True,
            timeout=60,
        )
        body = "".join(Reader(seen.stdout.partition("<body>")[2]).parts)
        assert json.loads(body) == {"wide": [], "outside": [], "tall": [], "small": []}
