"""The tables over the cells of a comparison."""

import numpy as np
import pytest

from fmn.experiments.files import Cell
from fmn.report import comparison, page
from fmn.store.records import parse_record
from fmn.tasks.task import get_task
from tests import reports
from tests.reports import OWN


def cell(seconds: float = 1.0, **relative: float | None) -> Cell:
    """A cell whose experts are right in 80 of 100 rows, and score 0.8, or 0 where None is given."""
    entries = {
        task: {
            "definition": get_task(task).model_dump(mode="json"),
            "score": 0.8 * (share or 0.0),
            "expert": 0.8 if share is not None else 0.0,
            "relative": share,
            "labels": [0, 1] * 50,
            "predictions": [0, 1] * right + [1, 0] * (50 - right),
            "expert_predictions": [0, 1] * 40 + [1, 0] * 10,
        }
        for task, share in relative.items()
        for right in (int(40 * (share or 0.0)),)
    }
    return parse_record({"seconds": seconds, "tasks": entries}, Cell, "cell")


CELLS = {
    "cola+rte": {"average": cell(cola=0.5, rte=0.7), "mine": cell(cola=1.0, rte=0.8)},
    "cola+sst2": {"average": cell(cola=0.2, sst2=0.8), "mine": cell(3.0, cola=0.6, sst2=1.0)},
    "cola+rte+sst2": {
        "average": cell(cola=0.1, rte=0.3, sst2=0.5),
        "mine": cell(2.0, cola=0.3, rte=None, sst2=0.9),
    },
}


def test_means_over_the_sets_of_each_size() -> None:
    compared = comparison.compare(CELLS)
    means = {
        method: {kind: mean.value for kind, mean in row.items()}
        for method, row in compared.means.items()
    }
    assert means["average"] == pytest.approx({"pairs": 0.55, "all": 0.3, "mean": 0.425})
    # A task whose expert scores nothing has no relative score, and is left out.
    assert means["mine"] == pytest.approx({"pairs": 0.85, "all": 0.6, "mean": 0.725})
    assert compared.seconds == {"average": 1, "mine": 2}
    assert compared.best == "mine"
    assert compared.largest == "cola+rte+sst2"


def test_the_interval_of_a_mean_is_of_the_same_examples_in_all_sets() -> None:
    twice = {"cola+sst2": {"average": cell(sst2=0.5)}, "rte+sst2": {"average": cell(sst2=0.5)}}
    both = comparison.compare(twice).means["average"]
    alone = comparison.compare({"cola+sst2": twice["cola+sst2"]}).means["average"]
    assert both["mean"].interval == alone["mean"].interval, (
        "the same examples twice make nothing more certain"
    )
    low, high = both["mean"].interval or (0, 0)
    assert low < 0.5 < high


def test_an_expert_that_may_score_nothing_leaves_no_interval() -> None:
    weak = cell(sst2=0.5, cola=0.5)
    answers = {"expert_predictions": [0.0, 1.0] * 26 + [1.0, 0.0] * 24}
    weak.tasks["cola"] = weak.tasks["cola"].model_copy(update=answers)
    means = comparison.compare({"cola+sst2": {"average": weak}}).means["average"]
    assert means["mean"].interval is None


def test_pairs_are_by_scored_task_and_partner() -> None:
    assert comparison.pairs(CELLS, "mine") == {
        ("cola", "rte"): 1.0,
        ("rte", "cola"): 0.8,
        ("cola", "sst2"): 0.6,
        ("sst2", "cola"): 1.0,
    }
    assert comparison.pairs({"cola+rte+sst2": CELLS["cola+rte+sst2"]}, "mine") == {}


def test_a_difference_is_tested_on_the_same_examples() -> None:
    differences = comparison.differences(
        {"better": cell(rte=1.0), "average": cell(rte=0.5), "same": cell(rte=0.5)}
    )
    assert differences.keys() == {"better", "same"}, "held against the average, wherever it stands"
    assert differences["better"].difference == pytest.approx(0.4)
    assert differences["better"].p_value < 0.01
    assert (differences["same"].difference, differences["same"].p_value) == (0, 1)


def test_the_tables_are_text_and_numbers() -> None:
    compared = comparison.compare(CELLS)
    _, body = comparison.text_table(compared)
    assert [*body[1][:4], body[1][5]] == ["mine", "85.0", "60.0", "72.5", "2.0"]
    assert body[2] == ["expert", "100.0", "100.0", "100.0", "", ""]
    numbers = comparison.numbers(CELLS, compared)
    assert numbers.methods["mine"]["seconds"] == 2
    assert numbers.intervals["mine"]["pairs"] == compared.means["mine"]["pairs"].interval


def test_own_tasks_of_every_sort_are_compared() -> None:
    names = "+".join(task.name for task in OWN)
    cells = reports.cells({names: OWN}, {"average": 0.3, "mine": 0.9})
    compared = comparison.compare(cells)
    entries = cells[names]["mine"].tasks
    shares = [entry.relative for entry in entries.values()]
    assert compared.means["mine"]["mean"].value == pytest.approx(np.mean(np.array(shares, float)))
    price = entries["price"]
    assert price.relative == pytest.approx((price.expert or 0) / (price.score or 1))
    scores = compared.scores["mine"]
    others = [reports.value(scores[task]) for task in compared.averaged]
    assert list(compared.averaged) == ["intents", "topics", "spam"], "less is better of price"
    assert reports.value(scores["mean"]) == pytest.approx(np.mean(others))
    assert page.best(compared.scores, "price") == page.best(compared.scores, "topics") == "mine"
    assert comparison.notes(compared) == [
        "price: mse + mae (less is better); a plain number, no percentage",
        "mean score: over intents, topics and spam; without price",
    ]
    undefined = cells[names]["mine"].tasks["spam"].model_copy(update={"score": None})
    cells[names]["mine"].tasks["spam"] = undefined.model_copy(update={"relative": None})
    again = comparison.compare(cells)
    assert list(again.averaged) == ["intents", "topics"]
    assert again.scores["mine"]["spam"].text == "undefined"
    assert again.means["mine"]["mean"].text == "undefined", "the expert has a score there"
    assert "spam" in comparison.numbers(cells, again).sets[names]["mine"]
