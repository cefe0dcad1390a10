"""The table says what the metrics say: scores, intervals, shares of the experts', which differences are real."""

import numpy as np
import pytest
import torch

from fmn.errors import UserError
from fmn.evaluate import bootstrap
from fmn.fisher.architectures import Site
from fmn.merge.rules import shares
from fmn.report import results
from fmn.tasks.task import TASKS
from tests import reports
from tests.reports import SEVEN

FOUR = ("cola", "mnli", "mrpc", "stsb")


@pytest.fixture(scope="module")
def table() -> results.Table:
    return results.tabulate(*reports.run(FOUR))


def test_columns_are_the_merged_models_in_order_and_the_experts_last(table: results.Table) -> None:
    assert table.tasks == FOUR
    assert table.rows == (*FOUR, "mean")
    assert list(table.columns) == ["base", "average", "merged", "expert"]
    assert table.examples == {"cola": 200, "mnli": 402, "mrpc": 202, "stsb": 203}, (
        "mnli has two splits"
    )


def test_scores_are_those_of_the_metrics_and_intervals_those_of_the_answers(
    table: results.Table,
) -> None:
    experts, merged = reports.run(FOUR)
    score, share = table.columns["merged"]["mrpc"]
    entry = merged["merged"].metrics.tasks["mrpc"]
    metrics = entry.model_dump()
    assert score.value == entry.score == pytest.approx((metrics["accuracy"] + metrics["f1"]) / 2)
    draws = bootstrap.resampled(TASKS["mrpc"], merged["merged"].answers["mrpc"])["score"]
    assert score.interval == bootstrap.interval(draws)
    assert share is not None
    alone = experts["mrpc"].metrics.tasks["mrpc"].score
    assert share.value == pytest.approx(entry.score / alone)
    of_expert = bootstrap.resampled(TASKS["mrpc"], experts["mrpc"].answers["mrpc"])["score"]
    assert share.interval == pytest.approx(bootstrap.interval(draws / of_expert))
    assert table.columns["expert"]["mrpc"].share == (1.0, (1.0, 1.0))


def test_means_are_over_tasks(table: results.Table) -> None:
    column = table.columns["average"]
    scores = [column[task].score.value for task in FOUR]
    assert column["mean"].score.value == pytest.approx(np.mean(scores))
    shares = [share.value for task in FOUR if (share := column[task].share)]
    mean = column["mean"].share
    assert mean is not None
    assert mean.value == pytest.approx(np.mean(shares))
    low, high = mean.interval or (0, 0)
    assert low < mean.value < high


def test_differences_are_paired_tests_of_the_headline_against_each_other_column(
    table: results.Table,
) -> None:
    experts, merged = reports.run(FOUR)
    assert table.headline == "merged"
    assert list(table.differences) == ["base", "average", "expert"]
    answers = [{"cola": merged[name].answers["cola"]} for name in ("merged", "average")]
    assert table.differences["average"]["cola"] == bootstrap.compare(*answers)
    whole = bootstrap.compare(
        merged["merged"].answers, {task: experts[task].answers[task] for task in FOUR}
    )
    assert table.differences["expert"]["mean"] == whole
    assert results.verdict(table.differences["base"]["mean"]) == "better"
    assert results.verdict(whole) == "worse"
    same = bootstrap.compare(answers[0], answers[0])
    assert results.verdict(same) == "within chance"


@pytest.mark.parametrize(
    ("names", "headline"),
    [
        (["base", "average", "merged", "heads"], "merged"),
        (["average", "a", "b"], "b"),
        (["base", "average"], "average"),
    ],
)
def test_the_headline_is_the_merged_model(names: list[str], headline: str) -> None:
    assert results.headline(names) == headline


def test_an_expert_that_scores_nothing_is_no_measure() -> None:
    experts, merged = reports.run(("cola", "sst2"))
    experts["cola"].metrics.tasks["cola"].score = 0.0
    column = results.tabulate(experts, merged).columns["merged"]
    assert column["cola"].share is None
    assert column["mean"].share == column["sst2"].share


def test_an_expert_that_may_score_nothing_gives_no_interval_of_the_share() -> None:
    experts, merged = reports.run(("cola", "sst2"), count=40)
    experts["cola"] = reports.evaluated(["cola"], 0.55, 3, 40)
    column = results.tabulate(experts, merged).columns["merged"]
    assert [share.interval is None for _, share in column.values() if share] == [True, False, True]
    assert column["cola"].score.interval is not None


def test_experts_may_be_missing() -> None:
    experts, merged = reports.run(("cola", "sst2"))
    alone = results.tabulate({}, merged)
    assert list(alone.columns) == ["base", "average", "merged"]
    assert alone.columns["merged"]["mean"].share is None
    assert "(" not in "".join(results.text_table(alone)[1][0])
    some = results.tabulate({"sst2": experts["sst2"]}, merged)
    assert list(some.columns["expert"]) == ["sst2", "mean"]
    assert list(some.differences["expert"]) == ["sst2", "mean"]
    header, body = results.text_table(some)
    assert body[0][header.index("expert")] == ""


def test_models_that_were_evaluated_otherwise_are_refused() -> None:
    experts, merged = reports.run(("cola", "sst2"))
    with pytest.raises(UserError, match="average: no metrics of task sst2"):
        results.tabulate(experts, {**merged, "average": reports.evaluated(["cola"], 0.5)})
    with pytest.raises(
        UserError, match="merged and average: cola: the two models did not answer the same examples"
    ):
        results.tabulate(
            experts, {**merged, "average": reports.evaluated(["cola", "sst2"], 0.5, 0, 90)}
        )


def widths(header: list[str], body: list[list[str]]) -> int:
    return sum(
        max(len(row[place]) for row in (header, *body)) for place in range(len(header))
    ) + 2 * (len(header) - 1)


def test_the_table_reads_in_percent_with_intervals_in_a_hundred_columns() -> None:
    header, body = results.text_table(results.tabulate(*reports.run(SEVEN)))
    assert header == ["task", "examples", "base", "average", "merged", "expert"]
    assert widths(header, body) <= 100
    assert [row[0] for row in body] == [*SEVEN, "mean"]
    score, spread, share = body[5][4].split()
    assert 0 < float(score) < 100
    assert spread.startswith("±")
    assert share.startswith("(")


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
    header, body = results.text_table(results.tabulate(experts, merged))
    assert widths(header, body) <= 100
    assert len([name for name in header if name not in ("task", "examples")]) == 4 + more
    assert ("examples" in header) == examples_too
    assert ("±" in body[0][-1]) == intervals_too


def test_an_expert_that_guesses_is_said_to_and_no_other() -> None:
    assert results.tabulate(*reports.run(SEVEN)).guessing == ()
    names = ("cola", "rte", "stsb")
    merged = {"merged": reports.evaluated(names, 0.8)}
    experts = dict(
        zip(names, (reports.evaluated(names, right) for right in (0.7, 0.5, 0.0)), strict=True)
    )
    found = results.tabulate(experts, merged)
    assert found.guessing == ("rte", "stsb")
    assert [line.split(":")[0] for line in results.remarks(found)] == ["rte", "stsb"]


def test_what_a_reader_should_know_stands_below_the_table(table: results.Table) -> None:
    legend = "score in %, ± half of its 95 % interval (% of the expert's score)"
    assert results.notes(table) == [legend]


def test_every_split_of_mnli_stands_for_itself() -> None:
    spans = {"accuracy": [0.5, 0.8], "accuracy_mismatched": [0.4, 0.7]}
    entry = {
        "accuracy": 0.7,
        "examples": 30,
        "accuracy_mismatched": 0.6,
        "examples_mismatched": 20,
        "score": 0.65,
        "interval": spans,
    }
    metrics = reports.metrics({"mnli": entry})
    assert results.measured("mnli", metrics.tasks["mnli"]) == [
        ("validation_matched", "accuracy", 0.7, 30, [0.5, 0.8]),
        ("validation_mismatched", "accuracy", 0.6, 20, [0.4, 0.7]),
    ]
    header, body = results.evaluate_table(metrics)
    assert header == ["task", "metric", "split", "%", "95 % interval", "examples"]
    assert body[0] == ["mnli", "accuracy", "validation_matched", "70.00", "50.0 to 80.0", "30"]
    assert body[-1] == ["mean", "score", "", "65.00", "70.0 to 80.0", ""]


def test_shares_of_nodes_are_those_that_the_merge_used() -> None:
    fisher = reports.fisher(["cola", "sst2"], layers=2, heads=3, neurons=5)
    lambdas = {"cola": 1.0, "sst2": 3.0}
    recipe = reports.recipe(["cola", "sst2"], coefficients=lambdas, normalise="none")
    nodes = results.node_shares(fisher, recipe)
    site = Site(1, "neuron")
    weighed = {task: lambdas[task] * fisher[task][site] for task in fisher}
    expected = weighed["sst2"] / (weighed["cola"] + weighed["sst2"])
    np.testing.assert_allclose(nodes["sst2"][site], expected)
    by_kind = results.node_shares(fisher, recipe.model_copy(update={"normalise": "kind"}))
    sites = [Site(layer, "neuron") for layer in range(2)]
    means = {task: np.mean([fisher[task][one] for one in sites]) for task in fisher}
    values = [torch.from_numpy(fisher[task][site] / means[task]) for task in fisher]
    np.testing.assert_allclose(by_kind["cola"][site], shares(values, [1.0, 3.0])[0].numpy())
    unweighed = reports.recipe(["cola", "sst2"], "ties")
    assert results.node_shares(fisher, unweighed) == {}
    assert results.node_shares({"cola": fisher["cola"]}, recipe) == {}, "not of every expert"


def test_the_numbers_are_those_of_the_table(table: results.Table) -> None:
    numbers = results.results(table)
    score, share = table.columns["merged"]["mrpc"]
    assert share is not None
    assert score.interval is not None
    assert list(numbers["tasks"]["mrpc"]["merged"].values()) == [
        score[0],
        share[0],
        *score.interval,
    ]
    assert numbers["mean"]["expert"]["relative"] == 1
    rows = results.score_rows(table)
    assert len(rows) == 5 * 4
    assert rows[0]["scored"] == "cola: base"
    assert rows[0]["score"] == round(100 * table.columns["base"]["cola"].score.value, 3)


def test_differences_are_told_in_words(table: results.Table) -> None:
    words = results.differences_in_words(table, most=1)
    assert words[0].startswith("Against base: +")
    assert "4 tasks" in words[0]


def test_words_are_listed_as_people_say_them() -> None:
    listed = [results.listed(words) for words in (["a"], ["a", "b"], ["a", "b", "c"])]
    assert listed == ["a", "a and b", "a, b and c"]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.04, "0.0 s"), (9.96, "10.0 s"), (75, "75 s"), (200, "3 min 20 s"), (7800, "2 h 10 min")],
)
def test_times_are_for_people(seconds: float, text: str) -> None:
    assert results.seconds(seconds) == text


def test_a_bar_in_a_name_does_not_end_a_cell_of_markdown() -> None:
    assert results.markdown(["a"], [["b|c"]]) == "| a |\n| --- |\n| b\\|c |\n"
