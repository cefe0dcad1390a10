"""Which sets of experts a comparison merges, and the tables over its cells."""

import json
from pathlib import Path
from typing import Any

import pytest

from fmn import comparison


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
            }
            for task, share in relative.items()
            for right in (int(40 * (share or 0.0)),)
        },
    }


CELLS = {
    "cola+rte": {"average": cell(cola=0.5, rte=0.7), "mine": cell(cola=1.0, rte=0.8)},
    "cola+sst2": {"average": cell(cola=0.2, sst2=0.8), "mine": cell(3.0, cola=0.6, sst2=1.0)},
    "cola+rte+sst2": {"average": cell(cola=0.1, rte=0.3, sst2=0.5), "mine": cell(2.0, cola=0.3, rte=None, sst2=0.9)},
}


def test_pairs_triples_and_all_without_doubles() -> None:
    assert list(comparison.sets(["a", "b", "c"], ["pairs", "triples", "all"])) == ["a+b", "a+c", "b+c", "a+b+c"]
    assert comparison.sets(["a", "b"], ["all", "pairs"]) == {"a+b": ("a", "b")}
    assert list(comparison.sets(["a", "b", "c"], ["all", "c+b"])) == ["c+b", "a+b+c"]


def test_means_over_the_sets_of_each_size() -> None:
    means = comparison.summary(CELLS)
    assert means["average"] == pytest.approx({"pairs": 0.55, "all": 0.3, "mean": 0.425, "seconds": 1})
    # A task whose expert scores nothing has no relative score, and is left out.
    assert means["mine"] == pytest.approx({"pairs": 0.85, "all": 0.6, "mean": 0.725, "seconds": 2})


def test_a_difference_is_told_from_chance_on_the_same_examples() -> None:
    found = comparison.differences({"first": cell(rte=0.5), "better": cell(rte=1.0), "same": cell(rte=0.5)})
    assert found.keys() == {"better", "same"}
    assert found["better"].difference == pytest.approx(0.4)
    assert found["better"].p_value < 0.01
    assert (found["same"].difference, found["same"].p_value) == (0, 1)


def test_the_tables_are_written_for_people_and_machines(tmp_path: Path) -> None:
    header, body = comparison.write(tmp_path, CELLS)["table"]
    assert header == ["method", "pairs", "all", "mean", "seconds"]
    assert body[1] == ["mine", "85.0", "60.0", "72.5", "2.0"]
    text = (tmp_path / "table.md").read_text()
    assert "| expert | 80.0 | 80.0 | 80.0 |" in text
    assert "| cola+sst2 | 50.0 | 80.0 |" in text
    assert "| mine | +" in text
    found = json.loads((tmp_path / "results.json").read_text())
    assert found["sets"]["cola+rte"]["mine"]["rte"]["relative"] == 0.8
