"""Pictures: text stays text, words tell what they show, and no colour tells anything alone."""

import re
import xml.etree.ElementTree as ET
from collections.abc import Callable

import numpy as np
import pytest

from fmn.fisher.architectures import NodeValues, Site
from fmn.report import comparison, figures
from fmn.report.figures import Picture
from fmn.report.results import Report, tabulate
from fmn.report.wording import MINUS
from tests import reports

NAMES = ("cola", "sst2", "stsb")
SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture(scope="module")
def drawn() -> dict[str, Picture]:
    sets = {"cola+sst2": ("cola", "sst2"), "sst2+stsb": ("sst2", "stsb"), "cola+sst2+stsb": NAMES}
    cells = reports.cells(sets, {"base": 0.5, "average": 0.6, "mask-fisher": 0.9})
    sections = figures.draw(figures.RUN_PICTURES, reports.report(NAMES))
    compared = figures.draw(figures.COMPARISON_PICTURES, comparison.compare(cells))
    pictures = [*sections.values(), *compared.values()]
    return {picture.name: picture for section in pictures for picture in section}


def picture_of(make: Callable[[Report], figures.Drawn], report: Report) -> Picture:
    return figures.draw({make: ""}, report)[""][0]


def text(picture: Picture) -> str:
    root = ET.fromstring(picture.svg)  # noqa: S314 - our own file
    return "\n".join("".join(element.itertext()) for element in root.iter(f"{SVG}text"))


def test_every_picture_says_in_words_what_it_shows(drawn: dict[str, Picture]) -> None:
    for picture in drawn.values():
        root = ET.fromstring(picture.svg)  # noqa: S314 - our own file
        assert root.get("role") == "img"
        ids = (root.get("aria-labelledby") or "").split()
        words = {element.get("id"): element.text for element in root if element.get("id") in ids}
        assert words == dict(zip(ids, (picture.title, picture.finding), strict=True))
        assert len(picture.finding) > 40
        assert len(picture.reading) > 40


def test_pictures_name_what_they_show(drawn: dict[str, Picture]) -> None:
    expected = {
        "scores": (*NAMES, "base", "average", "merged", "expert", "score, %"),
        "frontier": ("average", "merged", "expert", "parameters of all tasks, in encoders"),
        "heads": (*NAMES, "layer", "head", "mean"),
        "owners": (*NAMES, "Share of the attention heads, % of each layer"),
        "costs": ("fisher", "118 s", "seconds"),
        "methods": ("base", "average", "mask-fisher", "expert"),
        "pairs": (*NAMES, "mask-fisher − average", "merged with"),
    }
    assert drawn.keys() == expected.keys()
    for name, words in expected.items():
        for word in words:
            assert word in text(drawn[name]), (name, word)


def test_no_two_pictures_of_a_page_share_an_id(drawn: dict[str, Picture]) -> None:
    seen: set[str] = set()
    for picture in drawn.values():
        ids = re.findall(r'\bid="([^"]+)"', picture.svg)
        assert len(set(ids) - seen) == len(ids)
        assert set(re.findall(r'(?:xlink:href="#|url\(#)([^")]+)', picture.svg)) <= set(ids)
        seen |= set(ids)


def test_the_same_numbers_make_the_same_picture(drawn: dict[str, Picture]) -> None:
    assert picture_of(figures.scores, reports.report(NAMES)) == drawn["scores"]


def test_findings_are_of_the_numbers() -> None:
    fisher: dict[str, NodeValues] = {
        "cola": {Site(0, "head"): np.array([1.0, 1.0]), Site(0, "neuron"): np.ones(4)},
        "sst2": {Site(0, "head"): np.array([1.0, 3.0]), Site(0, "neuron"): np.ones(4)},
    }
    table = tabulate(*reports.run(("cola", "sst2"), 60))
    recipe = reports.recipe(["cola", "sst2"], normalise="none")
    report = Report(table, {"merged": recipe}, fisher, [])
    assert "sst2 layer 0 head 1 (1.5 times the mean)" in picture_of(figures.heads, report).finding
    owners = picture_of(figures.owners, report)
    # The shares of sst2 are the mean of 1/2 and 3/4.
    assert "sst2 owns most of the attention heads (62.5 %)" in owners.finding
    assert "38" in text(owners)
    assert "62" in text(owners)


def test_layers_of_a_decoder_have_cross_attention_too() -> None:
    values: NodeValues = {
        Site(0, "head"): np.ones(3),
        Site(1, "head"): np.ones(3),
        Site(1, "cross_head"): np.array([1.0, 2.0, 9.0]),
    }
    table = tabulate({}, {"merged": reports.evaluated(("stsb",), 0.8, count=50)})
    report = Report(table, {}, {"stsb": values}, [])
    picture = picture_of(figures.heads, report)
    assert "1 cross" in text(picture)
    assert "layer 1 cross head 2" in picture.finding


def test_cells_of_a_map_say_what_they_hold(drawn: dict[str, Picture]) -> None:
    for name, form, cells in (
        ("heads", r"layer \d+, head \d+: [\d.e+-]+ times the mean", 3 * 3 * 4),
        ("owners", r"(cola|sst2|stsb), layer \d: [\d.]+ %", 2 * 3 * 3),
        ("pairs", rf".*(cola|sst2|stsb) merged with (cola|sst2|stsb)(: {MINUS}?[\d.]+)?", 2 * 9),
    ):
        root = ET.fromstring(drawn[name].svg)  # noqa: S314 - our own file
        tips = [element.text or "" for element in root.iter(f"{SVG}title")][1:]
        assert len(tips) == cells
        assert not [tip for tip in tips if not re.fullmatch(form, tip)]


def test_a_page_gives_pictures_its_own_colours_and_files_have_theirs(
    drawn: dict[str, Picture],
) -> None:
    plain = drawn["scores"].svg
    on_page = figures.themed(plain)
    assert "var(" not in plain
    assert f"var(--ink, {figures.INK})" in on_page
    assert re.sub(r"var\(--\w+, (#\w+)\)", r"\1", on_page) == plain
