"""A report as one HTML file: what stands in it, and how it looks in a browser and on paper."""

import json
import os
import re
import shutil
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cache
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
        "merged − average",
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
        "flat pearson 64 undefined – undefined – undefined – undefined –",
        "price: mse + mae (less is better); a plain number, no percentage",
        "flat: undefined: its labels or answers here do not define pearson",
        "mean score: over intents, topics and spam; without price and flat",
        "mean of 3 tasks",
        "in the mean over 4 tasks",
        "multi label classification label 0, label 1, label 2 f1 micro 128",
    ):
        assert words in read.text, words
    assert "price" not in pictures["Scores"][0].svg, "an error is not on a scale of percent"


def test_nothing_is_fetched() -> None:
    read = Reader(run_page(("cola", "sst2")))
    tags = {tag for tag, _ in read.elements}
    assert read.every("script") == [{}], "a script without a source"
    assert not tags & {"link", "img", "iframe", "object", "image"}
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
all('details').forEach(element => element.open = true);
const width = document.documentElement.clientWidth;
const inBox = element => element.parentElement.closest('.box') && !PAPER;
const wide = all('body, body *:not(svg *)').filter(element => !inBox(element) &&
  (box(element).right > width + 0.5 || box(element).left < -0.5));
if (document.documentElement.scrollWidth > width) wide.push(document.body);
const svgs = all('figure svg').filter(svg => box(svg).width);
const outside = svgs.flatMap(svg => all('text', svg).filter(words =>
  box(words).left < box(svg).left - 1 || box(words).right > box(svg).right + 1 ||
  box(words).top < box(svg).top - 1 || box(words).bottom > box(svg).bottom + 1));
const over = svgs.flatMap(svg => {
  // A line of text is higher than its letters.
  const boxes = all('text', svg).filter(words => words.textContent.trim()).map(words => {
    const {left, right, top, bottom} = box(words);
    const edge = 0.22 * Math.min(bottom - top, right - left);
    return {words, left: left + 1, right: right - 1, top: top + edge, bottom: bottom - edge};
  });
  return boxes.filter((a, n) => boxes.slice(n + 1).some(b =>
    a.left < b.right && b.left < a.right && a.top < b.bottom && b.top < a.bottom))
    .map(each => each.words);
});
const tall = all('table, figure, dl, .figures').filter(element =>
  getComputedStyle(element).breakInside === 'avoid' ? box(element).height > HEIGHT :
  PAPER && !element.matches('.narrow'));
const small = svgs.filter(svg => box(svg).height < 80 ||
  svg.getBBox().width < 0.5 * svg.viewBox.baseVal.width ||
  all('text', svg).some(words => (PAPER ? 7.5 : 8) > parseFloat(getComputedStyle(words).fontSize) *
    box(svg).width / svg.viewBox.baseVal.width));
const light = colour => {
  const parts = colour.match(/[\\d.]+/g).slice(0, 3).map(part => part / 255);
  const [r, g, b] = parts.map(x => x <= 0.04045 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4);
  return 0.2126 * r + 0.7152 * g + 0.0722 * b + 0.05;
};
const isClear = colour => /, 0\\)$|transparent/.test(colour);
const ground = element => {
  for (let each = element; each; each = each.parentElement) {
    const colour = getComputedStyle(each).backgroundColor;
    if (!isClear(colour)) return light(colour);
  }
  return light('rgb(255, 255, 255)');
};
const onCells = ['rgb(0, 0, 0)', 'rgb(254, 254, 254)'];
const pale = all('body *:not(script, style, title, desc)').filter(element => {
  const own = [...element.childNodes].some(each => each.nodeType === 3 && each.data.trim());
  const style = getComputedStyle(element), isPicture = element.tagName === 'text';
  const colour = isPicture ? style.fill : style.color;
  if (!own || (isPicture && onCells.includes(colour))) return false;
  const pair = [light(colour), ground(element)];
  return Math.max(...pair) / Math.min(...pair) < 4.5;
});
const cut = all('td, th, p, li, dd, figcaption, a, h1, h2').flatMap(element =>
  [...element.childNodes].filter(node => node.nodeType === 3).flatMap(node =>
    [...node.data.matchAll(/(?<![\\w@/.-])[A-Za-z]{2,15}(?![\\w@/.-])/g)].filter(word => {
      const range = document.createRange();
      range.setStart(node, word.index); range.setEnd(node, word.index + word[0].length);
      return range.getClientRects().length > 1;
    }).map(() => element)));
const seen = {wide, outside, over, tall, small, pale, cut};
for (const name in seen) seen[name] = seen[name].map(text);
parent.postMessage(JSON.stringify(seen), '*');
"""
FRAMES = """<!doctype html><meta name="color-scheme" content="light dark"><body><script>
const seen = {};
addEventListener('message', message => {
  const width = frames.findIndex(frame => frame.contentWindow === message.source);
  seen[WIDTHS[width]] = JSON.parse(message.data);
  if (Object.keys(seen).length === WIDTHS.length) document.body.textContent = JSON.stringify(seen);
});
const WIDTHS = SIZES, frames = WIDTHS.map(width => {
  const frame = document.createElement('iframe');
  Object.assign(frame, {width, height: 900, src: 'page.html'});
  return document.body.appendChild(frame);
});
</script></body>"""
STEPS = ("paper", "calibrated", "realigned", "realigned-own-1")
PAGES: Mapping[str, Callable[[], str]] = {
    "two tasks": lambda: run_page(("mrpc", "sst2"), 12, 12),
    "own tasks": lambda: run_page((*OWN, "cola"), 6, 12),
    "nine tasks": lambda: run_page(sorted(TASKS), 24, 16, models=STEPS, headline="realigned"),
    "a comparison": comparison_page,
    "a comparison of own tasks": lambda: comparison_page(OWN),
}


@cache
def drawn(name: str) -> str:
    """One of `PAGES`; drawing its pictures takes seconds."""
    return PAGES[name]()


def dump(path: Path, scheme: str = "light") -> Any:
    """What a page's script leaves as the text of the page, in a browser of this colour scheme."""
    if CHROMIUM is None:
        assert not os.environ.get("CI"), "CI installs a browser"
        pytest.skip("no browser to look at a report in: `apt-get install chromium`")
    dumped = subprocess.run(
        [
            CHROMIUM,
            *("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"),
            *("--hide-scrollbars", f"--user-data-dir={path.parent / 'profile'}"),
            f"--blink-settings=preferredColorScheme={('dark', 'light').index(scheme)}",
            *("--window-size=1400,900", "--virtual-time-budget=20000", "--dump-dom"),
            path.as_uri(),
        ],
        capture_output=True,
        text=True,
        check=True,
        timeout=90,
    )
    return json.loads("".join(Reader(dumped.stdout.partition("<body>")[2]).parts))


def with_script(html: str, script: str) -> str:
    return html.replace("</body>", f"<script>{script}</script></body>")


@pytest.mark.parametrize("look", ["light", "dark", "print"])
@pytest.mark.parametrize("name", PAGES)
def test_a_page_looks_right(tmp_path: Path, name: str, look: str) -> None:
    """Only a table in its box is wider than the page; words do not meet, and can be read."""
    is_paper = look == "print"
    script = LOOK.replace("HEIGHT", str(A4[1]) if is_paper else "Infinity")
    html = drawn(name).replace("@media print", "@media all" if is_paper else "@media print")
    html = html.replace("@media screen", "@media print") if is_paper else html
    (tmp_path / "page.html").write_text(
        with_script(html, script.replace("PAPER", str(is_paper).lower()))
    )
    widths = [A4[0]] if is_paper else [390, 820, 1280]
    frames = tmp_path / "frames.html"
    frames.write_text(FRAMES.replace("SIZES", str(widths)))
    seen = dump(frames, "dark" if look == "dark" else "light")
    faults = {
        (width, fault): words
        for width, faults in seen.items()
        for fault, words in faults.items()
        if words
    }
    assert [int(width) for width in seen] == widths
    assert not faults


def test_tables_sort_and_scores_switch_and_cells_have_tooltips(tmp_path: Path) -> None:
    clicks = """
    const table = document.querySelector('table.switched'), names = () =>
      [...table.tBodies[0].rows].map(row => row.cells[0].firstChild.data);
    const steps = [names()], button = table.tHead.rows[0].cells[4].firstChild;
    for (const _ of [1, 2, 3]) { button.click(); steps.push(names()); }
    const views = [], cell = table.tBodies[0].rows[0].cells[4];
    for (const each of table.parentElement.previousElementSibling.children) {
      each.click(); views.push(cell.innerText.split('\\n').length);
    }
    const tip = document.querySelector('#picture-heads path > title').textContent;
    document.body.textContent = JSON.stringify({steps, views, tip});
    """
    report = reports.report(("cola", "mrpc", "sst2"))
    pictures = figures.draw(figures.RUN_PICTURES, report)
    html = page.render("report.html", report=report, pictures=pictures)
    (tmp_path / "page.html").write_text(with_script(html, clicks))
    seen = dump(tmp_path / "page.html")
    table = report.table
    order = sorted(table.tasks, key=lambda task: reports.value(table.columns["merged"][task].score))
    start = [*table.tasks, "mean"]
    assert seen["steps"] == [start, [*order[::-1], "mean"], [*order, "mean"], start]
    assert seen["views"] == [3, 2, 1]
    assert re.fullmatch(r"layer 0, head 0: [\d.]+ times the mean", seen["tip"])
