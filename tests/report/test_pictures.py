"""Pictures: text that stays text, words for those who do not see them, nothing that colour alone tells."""

import re
import xml.etree.ElementTree as ET
from pathlib import Path

import numpy as np
import pytest

from fmn.fisher.architectures import NodeValues, Site
from fmn.report import comparison, drawing, pictures
from fmn.report import results as report
from fmn.report.drawing import Picture
from tests import reports

NAMES = ("cola", "sst2", "stsb")
SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture(scope="module")
def drawn() -> dict[str, Picture]:
    table = report.tabulate(*reports.run(NAMES, count=80))
    fisher, costs = reports.fisher(NAMES, layers=3, heads=4, neurons=9), reports.costs(NAMES)
    found = pictures.of_run(table, fisher, reports.recipe(NAMES), costs)
    sets = {"cola+sst2": ("cola", "sst2"), "sst2+stsb": ("sst2", "stsb"), "cola+sst2+stsb": NAMES}
    cells = reports.cells(sets, {"base": 0.5, "average": 0.6, "mask-fisher": 0.9})
    found += pictures.of_comparison(comparison.compared(cells))
    return {picture.name: picture for picture in found}


def text(picture: Picture) -> str:
    root = ET.fromstring(picture.svg)  # noqa: S314 - our own file
    return "\n".join("".join(one.itertext()) for one in root.iter(f"{SVG}text"))


def test_every_picture_says_in_words_what_it_shows(drawn: dict[str, Picture]) -> None:
    for picture in drawn.values():
        root = ET.fromstring(picture.svg)  # noqa: S314 - our own file
        assert root.get("role") == "img"
        ids = (root.get("aria-labelledby") or "").split()
        words = {
            one.get("id"): one.text for one in root if one.tag in (f"{SVG}title", f"{SVG}desc")
        }
        assert list(words) == ids
        assert words[ids[0]] == picture.title
        assert (words[ids[1]] or "").startswith(picture.finding)
        assert len(picture.finding) > 40


def test_pictures_name_what_they_show(drawn: dict[str, Picture]) -> None:
    for name, words in {
        "scores": (*NAMES, "base", "average", "merged", "expert", "score, %"),
        "differences": (*NAMES, "mean", "merged less average", "points"),
        "fisher-heads": (*NAMES, "layer", "head", "mean"),
        "fisher-neurons": (*NAMES, "layer", "times the mean neuron"),
        "owners": (*NAMES, "Share of the attention heads, % of each layer", "33 % equal"),
        "owners-heads": (*NAMES, "33 % equal"),
        "cost": ("finetune", "2 min 0 s", "seconds"),
        "methods": ("base", "average", "mask-fisher", "expert"),
        "pairs": (*NAMES, "mask-fisher less average", "merged with"),
    }.items():
        for word in words:
            assert word in text(drawn[name]), (name, word)


def test_ids_are_those_of_one_picture_and_nothing_is_fetched(drawn: dict[str, Picture]) -> None:
    seen: set[str] = set()
    for picture in drawn.values():
        ids = re.findall(r'\bid="([^"]+)"', picture.svg)
        assert len(set(ids)) == len(ids)
        assert not seen & set(ids)
        seen |= set(ids)
        assert set(re.findall(r'(?:xlink:href="#|url\(#)([^")]+)', picture.svg)) <= set(ids)
        assert "<image" not in picture.svg
        assert set(re.findall(r'https?://[^"\s<>]+', picture.svg)) <= {
            "http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"
        }  # fmt: skip


def test_the_same_numbers_make_the_same_picture(drawn: dict[str, Picture], tmp_path: Path) -> None:
    table = report.tabulate(*reports.run(NAMES, count=80))
    assert pictures.scores(table) == drawn["scores"]
    drawing.write(tmp_path / "pictures", [drawn["scores"]])
    assert (tmp_path / "pictures" / "scores.svg").read_text() == drawn["scores"].svg + "\n"


def test_findings_are_of_the_numbers(drawn: dict[str, Picture]) -> None:
    fisher: dict[str, NodeValues] = {
        "cola": {Site(0, "head"): np.array([1.0, 1.0]), Site(0, "neuron"): np.ones(4)},
        "sst2": {Site(0, "head"): np.array([1.0, 3.0]), Site(0, "neuron"): np.ones(4)},
    }
    assert "sst2 layer 0 head 1 (1.5 times the mean)" in pictures.heads(fisher).finding
    shares = report.owned(fisher, reports.recipe(["cola", "sst2"], normalise="none"))
    layer = text(pictures.owners(shares))
    assert "38" in layer, "the mean of 1/2 and 1/4"
    assert "62" in layer
    assert "sst2 owns most of the attention heads (62.5 %)" in pictures.owners(shares).finding
    assert "cola 1, sst2 1" in pictures.owned_heads(shares).finding
    words = pictures.differences_in_words(
        report.tabulate(*reports.run(("sst2", "stsb"), count=60)), most=1
    )
    assert words[0].startswith("Against base: +")
    assert "2 tasks" in words[0]
    assert "sst2 with stsb: average" in drawn["pairs"].svg


def test_layers_of_a_decoder_have_cross_attention_too() -> None:
    values: NodeValues = {
        Site(0, "head"): np.ones(3), Site(0, "neuron"): np.ones(4), Site(1, "head"): np.ones(3),
        Site(1, "cross_head"): np.array([1.0, 2.0, 9.0]), Site(1, "neuron"): np.zeros(4),
    }  # fmt: skip
    found = pictures.heads({"stsb": values})
    assert "1 cross" in text(found)
    assert "layer 1 cross head 2" in found.finding
    assert "layer" in text(pictures.neurons({"stsb": values}))


@pytest.mark.parametrize(
    ("seconds", "said"),
    [(0.04, "0.0 s"), (9.96, "10.0 s"), (75, "75 s"), (200, "3 min 20 s"), (7800, "2 h 10 min")],
)
def test_times_are_for_people(seconds: float, said: str) -> None:
    assert pictures.seconds(seconds) == said
