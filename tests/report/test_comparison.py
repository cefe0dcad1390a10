"""Which sets of experts a comparison merges, and the tables over its cells."""

import json
from pathlib import Path
from typing import Any

import pytest

from fmn.experiments import grid
from fmn.experiments.stages import ComparedSettings
from fmn.report import comparison


def cell(seconds: float = 1.0, **relative: float | None) -> dict[str, Any]:
    return {
        "seconds": seconds,
        "tasks": {
            task: {
                "score": 0.8 * (share or 0.0),
                "expert": 0.8 if share is not None else 0.0,
                "relative": share,
                "labels": [0, 1] * 50,
                "predictions": [0, 1] * right + [1, 0] * (50 - right),
                "expert_predictions": [0, 1] * 40 + [1, 0] * 10,
            }
            for task, share in relative.items()
            for right in (int(40 * (share or 0.0)),)
        },
    }


CELLS = {
    "cola+rte": {"average": cell(cola=0.5, rte=0.7), "mine": cell(cola=1.0, rte=0.8)},
    "cola+sst2": {"average": cell(cola=0.2, sst2=0.8), "mine": cell(3.0, cola=0.6, sst2=1.0)},
    "cola+rte+sst2": {
        "average": cell(cola=0.1, rte=0.3, sst2=0.5),
        "mine": cell(2.0, cola=0.3, rte=None, sst2=0.9),
    },
}


def test_pairs_triples_and_all_without_doubles() -> None:
    assert list(grid.sets(["a", "b", "c"], ["pairs", "triples", "all"])) == [
        "a+b",
        "a+c",
        "b+c",
        "a+b+c",
    ]
    assert grid.sets(["a", "b"], ["all", "pairs"]) == {"a+b": ("a", "b")}
    assert list(grid.sets(["a", "b", "c"], ["all", "c+b"])) == ["c+b", "a+b+c"]


def test_means_over_the_sets_of_each_size() -> None:
    means = {
        method: {kind: one.value for kind, one in row.items()}
        for method, row in comparison.summary(CELLS).items()
    }
    assert means["average"] == pytest.approx({"pairs": 0.55, "all": 0.3, "mean": 0.425})
    # A task whose expert scores nothing has no relative score, and is left out.
    assert means["mine"] == pytest.approx({"pairs": 0.85, "all": 0.6, "mean": 0.725})
    assert comparison.seconds(CELLS) == {"average": 1, "mine": 2}


def test_the_interval_of_a_mean_is_of_the_same_examples_in_all_sets() -> None:
    twice = {"cola+sst2": {"average": cell(sst2=0.5)}, "rte+sst2": {"average": cell(sst2=0.5)}}
    found = comparison.summary(twice)["average"]
    alone = comparison.summary({"cola+sst2": twice["cola+sst2"]})["average"]
    assert found["mean"].interval == alone["mean"].interval, (
        "the same examples twice make nothing more certain"
    )
    low, high = found["mean"].interval or (0, 0)
    assert low < 0.5 < high


def test_an_expert_that_may_score_nothing_leaves_no_interval() -> None:
    weak = cell(sst2=0.5, cola=0.5)
    weak["tasks"]["cola"]["expert_predictions"] = [0, 1] * 26 + [1, 0] * 24
    found = comparison.summary({"cola+sst2": {"average": weak}})["average"]
    assert found["mean"].interval is None


def test_bounds_stand_beside_every_comparison() -> None:
    mine = ComparedSettings(method="ties")
    found = grid.bounded({"mine": mine})
    assert list(found) == ["base", "average", "mine"]
    assert (found["base"].method, found["base"].scale) == ("average", 0)
    own = ComparedSettings(method="average", seed=1)
    assert grid.bounded({"mine": mine, "average": own})["average"] == own, (
        "what a profile has itself is taken"
    )


def test_pairs_are_by_scored_task_and_partner() -> None:
    found = comparison.pairs(CELLS, "mine")
    assert found == {
        ("cola", "rte"): 1.0,
        ("rte", "cola"): 0.8,
        ("cola", "sst2"): 0.6,
        ("sst2", "cola"): 1.0,
    }
    assert comparison.pairs({"cola+rte+sst2": CELLS["cola+rte+sst2"]}, "mine") == {}


def test_a_difference_is_told_from_chance_on_the_same_examples() -> None:
    found = comparison.differences(
        {"better": cell(rte=1.0), "average": cell(rte=0.5), "same": cell(rte=0.5)}
    )
    assert found.keys() == {"better", "same"}, "held against the average, wherever it stands"
    assert found["better"].difference == pytest.approx(0.4)
    assert found["better"].p_value < 0.01
    assert (found["same"].difference, found["same"].p_value) == (0, 1)


def test_the_tables_are_written_for_people_and_machines(tmp_path: Path) -> None:
    header, body = comparison.write(tmp_path, CELLS)["table"]
    assert header == ["method", "pairs", "all", "mean", "95 % interval", "seconds"]
    assert [*body[1][:4], body[1][5]] == ["mine", "85.0", "60.0", "72.5", "2.0"]
    assert body[2] == ["expert", "100.0", "100.0", "100.0", "", ""]
    text = (tmp_path / "table.md").read_text()
    assert "| expert | 80.0 | 80.0 | 80.0 |" in text
    assert "| mine | 90.0 | 80.0 | 60.0 |" in text
    assert "| mine | +" in text
    found = json.loads((tmp_path / "results.json").read_text())
    assert found["sets"]["cola+rte"]["mine"]["rte"]["relative"] == 0.8
    assert found["methods"]["mine"]["pairs"] == pytest.approx(0.85)
    assert {path.name for path in (tmp_path / "pictures").iterdir()} == {"methods.svg", "pairs.svg"}
    assert "2 ways to merge cola, rte and sst2" in (tmp_path / "report.html").read_text()
