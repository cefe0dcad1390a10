"""The table says what the metrics say: scores, intervals, shares of the experts', which differences are real."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest

from fmn.errors import UserError
from fmn.evaluate import bootstrap as intervals
from fmn.fisher.architectures import Site
from fmn.merge.rules import shares
from fmn.report import results as report
from fmn.tasks.task import TASKS
from tests import reports
from tests.reports import SEVEN

FOUR = ("cola", "mnli", "mrpc", "stsb")


@pytest.fixture(scope="module")
def table() -> report.Table:
    return report.tabulate(*reports.run(FOUR))


def test_columns_are_the_merged_models_in_order_and_the_experts_last(table: report.Table) -> None:
    assert table.tasks == FOUR
    assert table.rows == (*FOUR, "mean")
    assert list(table.columns) == ["base", "average", "merged", "expert"]
    assert table.examples == {"cola": 200, "mnli": 402, "mrpc": 202, "stsb": 203}, (
        "mnli has two splits"
    )


def test_scores_are_those_of_the_metrics_and_intervals_those_of_the_answers(
    table: report.Table,
) -> None:
    experts, merged = reports.run(FOUR)
    found = table.columns["merged"].scores["mrpc"]
    entry = merged["merged"].metrics["tasks"]["mrpc"]
    assert found.value == entry["score"] == pytest.approx((entry["accuracy"] + entry["f1"]) / 2)
    draws = intervals.resampled(TASKS["mrpc"], merged["merged"].answers["mrpc"])["score"]
    assert found.interval == intervals.interval(draws)
    share = table.columns["merged"].relative["mrpc"]
    alone = experts["mrpc"].metrics["tasks"]["mrpc"]["score"]
    assert share.value == pytest.approx(entry["score"] / alone)
    of_expert = intervals.resampled(TASKS["mrpc"], experts["mrpc"].answers["mrpc"])["score"]
    assert share.interval == pytest.approx(intervals.interval(draws / of_expert))
    assert table.columns["expert"].relative["mrpc"] == (1.0, (1.0, 1.0))


def test_means_are_over_tasks(table: report.Table) -> None:
    column = table.columns["average"]
    assert column.scores["mean"].value == pytest.approx(
        np.mean([column.scores[task].value for task in FOUR])
    )
    assert column.relative["mean"].value == pytest.approx(
        np.mean([column.relative[task].value for task in FOUR])
    )
    low, high = column.relative["mean"].interval or (0, 0)
    assert low < column.relative["mean"].value < high


def test_differences_are_paired_tests_of_the_headline_against_each_other_column(
    table: report.Table,
) -> None:
    experts, merged = reports.run(FOUR)
    assert table.headline == "merged"
    assert list(table.differences) == ["base", "average", "expert"]
    answers = [{"cola": merged[name].answers["cola"]} for name in ("merged", "average")]
    assert table.differences["average"]["cola"] == intervals.compare(*answers)
    whole = intervals.compare(
        merged["merged"].answers, {task: experts[task].answers[task] for task in FOUR}
    )
    assert table.differences["expert"]["mean"] == whole
    assert report.verdict(table.differences["base"]["mean"]) == "better"
    assert report.verdict(whole) == "worse"
    same = intervals.compare(answers[0], answers[0])
    assert report.verdict(same) == "within chance"


@pytest.mark.parametrize(
    ("names", "headline"),
    [
        (["base", "average", "merged", "heads"], "merged"),
        (["average", "a", "b"], "b"),
        (["base", "average"], "average"),
    ],
)
def test_the_headline_is_the_merged_model(names: list[str], headline: str) -> None:
    assert report.headline(names) == headline


def test_an_expert_that_scores_nothing_is_no_measure() -> None:
    experts, merged = reports.run(("cola", "sst2"))
    experts["cola"].metrics["tasks"]["cola"]["score"] = 0.0
    found = report.tabulate(experts, merged)
    assert "cola" not in found.columns["merged"].relative
    assert (
        found.columns["merged"].relative["mean"].value
        == found.columns["merged"].relative["sst2"].value
    )


def test_an_expert_that_may_score_nothing_gives_no_interval_of_the_share() -> None:
    experts, merged = reports.run(("cola", "sst2"), count=40)
    experts["cola"] = reports.evaluated(["cola"], 0.55, 3, 40)
    found = report.tabulate(experts, merged).columns["merged"]
    assert found.relative["cola"].interval is None
    assert found.relative["mean"].interval is None
    assert found.relative["sst2"].interval is not None
    assert found.scores["cola"].interval is not None


def test_experts_may_be_missing() -> None:
    experts, merged = reports.run(("cola", "sst2"))
    alone = report.tabulate({}, merged)
    assert list(alone.columns) == ["base", "average", "merged"]
    assert not alone.columns["merged"].relative
    some = report.tabulate({"sst2": experts["sst2"]}, merged)
    assert list(some.columns["expert"].scores) == ["sst2", "mean"]
    assert list(some.differences["expert"]) == ["sst2", "mean"]
    header, body = report.cells(some)
    assert body[0][header.index("expert")] == ""


def test_models_that_were_evaluated_otherwise_are_refused() -> None:
    experts, merged = reports.run(("cola", "sst2"))
    with pytest.raises(UserError, match="average: no metrics of task sst2"):
        report.tabulate(experts, {**merged, "average": reports.evaluated(["cola"], 0.5)})
    with pytest.raises(
        UserError, match="merged and average: cola: the two models did not answer the same examples"
    ):
        report.tabulate(
            experts, {**merged, "average": reports.evaluated(["cola", "sst2"], 0.5, 0, 90)}
        )


def widths(header: list[str], body: list[list[str]]) -> int:
    return sum(
        max(len(row[place]) for row in (header, *body)) for place in range(len(header))
    ) + 2 * (len(header) - 1)


def test_the_table_reads_in_percent_with_intervals_in_a_hundred_columns() -> None:
    header, body = report.cells(report.tabulate(*reports.run(SEVEN)))
    assert header == ["task", "examples", "base", "average", "merged", "expert"]
    assert widths(header, body) <= 100
    assert [row[0] for row in body] == [*SEVEN, "mean"]
    score, spread, share = body[5][4].split()
    assert 0 < float(score) < 100
    assert spread.startswith("±")
    assert share.startswith("(")
    assert (
        report.legend(body) == "score in %, ± half of its 95 % interval (% of the expert's score)"
    )


@pytest.mark.parametrize(
    ("more", "intervals_too", "examples_too"), [(1, True, False), (3, False, False)]
)
def test_more_models_leave_out_the_examples_first_then_the_intervals(
    more: int, intervals_too: bool, examples_too: bool
) -> None:
    experts, merged = reports.run(SEVEN, count=50)
    merged |= {
        f"another {number}": reports.evaluated(SEVEN, 0.7, number, 50) for number in range(more)
    }
    header, body = report.cells(report.tabulate(experts, merged))
    assert widths(header, body) <= 100
    assert len([name for name in header if name not in ("task", "examples")]) == 4 + more
    assert ("examples" in header) == examples_too
    assert ("±" in report.legend(body)) == intervals_too


def test_an_expert_that_guesses_is_said_to_and_no_other() -> None:
    assert report.tabulate(*reports.run(SEVEN)).guessing == ()
    names = ("cola", "rte", "stsb")
    merged = {"merged": reports.evaluated(names, 0.8)}
    experts = dict(
        zip(names, (reports.evaluated(names, right) for right in (0.7, 0.5, 0.0)), strict=True)
    )
    found = report.tabulate(experts, merged)
    assert found.guessing == ("rte", "stsb")
    assert [line.split(":")[0] for line in report.remarks(found)] == ["rte", "stsb"]


def test_every_split_of_mnli_stands_for_itself() -> None:
    entry = {
        "accuracy": 0.7,
        "examples": 30,
        "accuracy_mismatched": 0.6,
        "examples_mismatched": 20,
        "score": 0.65,
    }
    spans = {"accuracy": [0.5, 0.8], "accuracy_mismatched": [0.4, 0.7]}
    assert report.measured("mnli", {**entry, "interval": spans}) == [
        ("validation_matched", "accuracy", 0.7, 30, [0.5, 0.8]),
        ("validation_mismatched", "accuracy", 0.6, 20, [0.4, 0.7]),
    ]


def test_shares_of_nodes_are_those_that_the_merge_used() -> None:
    fisher = reports.fisher(["cola", "sst2"], layers=2, heads=3, neurons=5)
    recipe = reports.recipe(
        ["cola", "sst2"], coefficients={"cola": 1.0, "sst2": 3.0}, normalise="none"
    )
    found = report.owned(fisher, recipe)
    site = Site(1, "neuron")
    weighed = {task: recipe["coefficients"][task] * fisher[task][site] for task in fisher}
    np.testing.assert_allclose(
        found["sst2"][site], weighed["sst2"] / (weighed["cola"] + weighed["sst2"])
    )
    by_kind = report.owned(fisher, {**recipe, "normalise": "kind"})
    means = {
        task: np.mean([fisher[task][Site(layer, "neuron")] for layer in range(2)])
        for task in fisher
    }
    import torch

    expected = shares(
        [torch.from_numpy(fisher[task][site] / means[task]) for task in fisher], [1.0, 3.0]
    )
    np.testing.assert_allclose(by_kind["cola"][site], expected[0].numpy())
    assert report.owned(fisher, reports.recipe(["cola", "sst2"], "ties")) == {}, (
        "a method that does not weigh by nodes"
    )
    assert report.owned({"cola": fisher["cola"]}, recipe) == {}, "not of every expert"


def rows(path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(path.read_text().splitlines()))


def test_the_folder_holds_page_pictures_and_numbers(tmp_path: Path, table: report.Table) -> None:
    fisher, costs = reports.fisher(FOUR, layers=3, heads=4), reports.costs(FOUR)
    found = report.write(tmp_path, table, fisher, {"merged": reports.recipe(FOUR)}, costs)
    assert json.loads((tmp_path / "results.json").read_text()) == found["results"]
    assert (
        found["results"]["tasks"]["mrpc"]["merged"]["score"]
        == table.columns["merged"].scores["mrpc"].value
    )
    assert found["results"]["mean"]["average"]["low"] < found["results"]["mean"]["average"]["high"]
    assert (
        "| task | examples | base | average | merged | expert |"
        in (tmp_path / "table.md").read_text()
    )
    scores = rows(tmp_path / "scores.csv")
    assert len(scores) == 5 * 4
    assert float(scores[0]["score"]) == pytest.approx(
        100 * table.columns["base"].scores["cola"].value, abs=1e-3
    )
    differences = rows(tmp_path / "differences.csv")
    assert {row["less"] for row in differences} == {"base", "average", "expert"}
    assert len(rows(tmp_path / "costs.csv")) == len(costs)
    names = {path.stem for path in (tmp_path / "pictures").iterdir()}
    assert names == {
        "scores",
        "differences",
        "fisher-heads",
        "fisher-neurons",
        "owners",
        "owners-heads",
        "cost",
    }
    assert "One model for cola, mnli, mrpc and stsb" in (tmp_path / "report.html").read_text()


def test_a_report_of_metrics_alone_has_what_they_give(tmp_path: Path) -> None:
    _, merged = reports.run(("sst2",), count=50)
    report.write(tmp_path, report.tabulate({}, {"only": merged["merged"]}), {}, {}, [])
    assert {path.name for path in tmp_path.iterdir()} == {
        "report.html", "results.json", "scores.csv", "table.md", "pictures"
    }  # fmt: skip
    assert {path.name for path in (tmp_path / "pictures").iterdir()} == {"scores.svg"}
