"""A report as one HTML file: what stands in it, and how it looks in a browser and on paper."""

import os
from collections.abc import Callable, Iterator, Mapping
from html.parser import HTMLParser
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest

from fmn.report import comparison, figures, page, results
from fmn.tasks.task import TASKS
from tests import browser, reports
from tests.browser import Browser
from tests.reports import SEVEN

A4 = (688, 1009)  # CSS pixels between the page's margins of 14 and 15 mm
BLOCKS = "table, figure, dl, .figures"


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
    return page.run_page(report, figures.draw(figures.RUN_PICTURES, report))


def comparison_page() -> str:
    sets = {"+".join(pair): pair for pair in combinations(SEVEN, 2)} | {"+".join(SEVEN): SEVEN}
    methods = {"base": 0.5, "average": 0.6} | {
        f"a method with a long name {n}": 0.6 + 0.02 * n for n in range(6)
    }
    content = comparison.compare(reports.cells(sets, methods))
    return page.comparison_page(content, figures.draw(figures.COMPARISON_PICTURES, content))


def test_the_page_says_what_the_report_holds() -> None:
    coefficients = {"cola": 1.0, "mnli": 0.25, "sst2": 2.0}
    recipe = {"coefficients": coefficients, "search": {"score": 0.93, "uniform": 0.91}}
    read = Reader(run_page(tuple(coefficients), recipe=recipe))
    for words in (
        "One model for cola, mnli and sst2",
        "The model merged with mask-fisher keeps",
        "base: the base model under each expert's head (lower bound)",
        "merged less average",
        "cola 1, mnli 0.25, sst2 2",
        "93.0 % of the experts' scores on rows of the training data",
        "hf://org/some-base-uncased-mnli@",
        "mask Fisher of 1024 examples, empirical",
        "normalised by kind",
        "Together 2 min",
    ):
        assert words in read.text, words
    names = [make.__name__.replace("_", "-") for make in figures.RUN_PICTURES]
    assert [one["id"] for one in read.every("figure")] == [f"picture-{name}" for name in names]
    assert all(one.get("role") == "img" and one.get("aria-labelledby") for one in read.every("svg"))
    assert {one.get("scope") for one in read.every("th")} == {"col", "row"}
    ids = [attributes["id"] for _, attributes in read.elements if "id" in attributes]
    assert len(set(ids)) == len(ids)
    links = {(one["href"] or "").removeprefix("#") for one in read.every("a")}
    assert len(links) == 7
    assert links <= set(ids)


def test_a_comparison_has_every_set_and_method() -> None:
    text = Reader(comparison_page()).text
    title = "8 ways to merge cola, mnli, mrpc, qnli, rte, sst2 and stsb"
    for words in (title, "rte + stsb", "Pairs of experts"):
        assert words in text, words
    assert text.count("a method with a long name 5") > 5


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
    names = ("cola", "sst2")
    experts = {name: {"revision": "<b>x & y</b>", "digest": ""} for name in names}
    plain = Reader(run_page(names, models=("heads",)))
    read = Reader(run_page(names, models=("<i>a</i> -1.5",), recipe={"experts": experts}))
    assert "<i>a</i> \N{MINUS SIGN}1.5" in read.text
    assert "<b>x & y</b>" in read.text
    for tag in ("i", "b"):
        assert len(read.every(tag)) == len(plain.every(tag))
    content = comparison.compare(reports.cells({"cola+sst2": names}, {"<i>": 0.5, "average": 0.6}))
    compared = Reader(page.comparison_page(content, {}))
    assert "<i>" in compared.text
    assert not compared.every("i")


def test_a_new_picture_is_a_function_and_its_name_in_the_table() -> None:
    def examples(report: results.Report) -> figures.Drawn:
        """Examples by task.

        A bar for each task.
        """
        figure, axes = figures._figure(2)
        axes[0, 0].barh(list(report.table.examples), list(report.table.examples.values()))
        return figure, "Every task has its examples."

    report = reports.report(("cola", "sst2"))
    pictures = figures.draw({**figures.RUN_PICTURES, examples: "Examples"}, report)
    text = Reader(page.run_page(report, pictures)).text
    assert "Examples by task. Every task has its examples. A bar for each task." in text


# ---- in a browser ----


@pytest.fixture(scope="module")
def chromium() -> Iterator[Browser]:
    command = browser.program()
    if command is None:
        assert not os.environ.get("CI"), "CI installs a browser"
        pytest.skip("no browser to look at a report in: `apt-get install chromium`")
    with browser.running(command) as chromium:
        yield chromium


PAGES: Mapping[str, Callable[[], str]] = {
    "three tasks": lambda: run_page(("cola", "mnli", "sst2"), 6, 12),
    "nine tasks": lambda: run_page(sorted(TASKS), 24, 16, models=("merged, heads re-aligned",)),
    "a comparison": comparison_page,
}


@pytest.mark.parametrize("which", PAGES)
def test_a_page_looks_right_on_a_screen_and_on_paper(
    chromium: Browser, tmp_path: Path, which: str
) -> None:
    path = tmp_path / "report.html"
    path.write_text(PAGES[which]())
    chromium.media("")
    chromium.open(path, width=1000)
    assert chromium.complaints == []
    assert chromium.requests == [path.as_uri()], "nothing but the page itself is requested"

    sizes = chromium.evaluate(
        "[...document.querySelectorAll('figure > svg')].map(svg => {"
        " const box = svg.getBoundingClientRect(), ink = svg.getBBox();"
        " return [box.width, box.height, ink.width, ink.height, svg.viewBox.baseVal.width] })"
    )
    assert len(sizes) == path.read_text().count("<figure ")
    for width, height, ink_width, ink_height, natural in sizes:
        assert width > 800
        assert height > 80
        assert ink_width > 0.5 * natural
        assert ink_height > 0
    assert overflowing(chromium) == []
    assert text_outside_its_picture(chromium) == []
    chromium.screenshot(tmp_path / "screen.png")
    assert (tmp_path / "screen.png").stat().st_size > 50_000

    chromium.media("print")
    chromium.size(*A4)
    assert overflowing(chromium) == []
    cut = chromium.evaluate(
        f"[...document.querySelectorAll('{BLOCKS}')].filter(one =>"
        " getComputedStyle(one).breakInside !== 'avoid'"
        f" || one.getBoundingClientRect().height > {A4[1]})"
        ".map(one => one.textContent.slice(0, 80))"
    )
    assert cut == [], "no table or picture is cut by the end of a page"
    assert chromium.evaluate("getComputedStyle(document.body).color") == "rgb(0, 0, 0)"
    chromium.pdf(tmp_path / "report.pdf")
    assert (tmp_path / "report.pdf").read_bytes().startswith(b"%PDF")


def overflowing(chromium: Browser) -> Any:
    """Elements that are wider than the page."""
    return chromium.evaluate(
        "[...document.querySelectorAll('body, body *:not(svg *)')].filter(one =>"
        " one.getBoundingClientRect().right > document.documentElement.clientWidth + 0.5"
        " || one.getBoundingClientRect().left < -0.5)"
        ".map(one => one.tagName + ' ' + one.textContent.slice(0, 80))"
    )


def text_outside_its_picture(chromium: Browser) -> Any:
    """Words of a picture that its edge cuts."""
    return chromium.evaluate(
        "[...document.querySelectorAll('figure > svg')].flatMap(svg => {"
        " const frame = svg.getBoundingClientRect();"
        " const words = [...svg.querySelectorAll('text')];"
        " return words.filter(text => { const box = text.getBoundingClientRect();"
        " return box.left < frame.left - 1 || box.right > frame.right + 1"
        " || box.top < frame.top - 1 || box.bottom > frame.bottom + 1 })"
        ".map(text => text.textContent) })"
    )
