"""The table says what the metrics say: scores, intervals, shares, which differences are real."""

import json
import re
from dataclasses import replace

import numpy as np
import pytest
import torch

from fmn.errors import UserError
from fmn.evaluate import bootstrap
from fmn.evaluate.metrics import TaskAnswers
from fmn.fisher.architectures import Site
from fmn.merge.rules import shares
from fmn.report import page, results
from fmn.report.verdict import judgement, verdict
from tests import reports
from tests.reports import NUMBERS, OWN, SEVEN, own_task, value

FOUR = ("cola", "mnli", "mrpc", "stsb")


@pytest.fixture(scope="module")
def table() -> results.Table:
    return results.tabulate(*reports.run(FOUR))


def test_columns_are_the_merged_models_in_order_and_the_experts_last(table: results.Table) -> None:
    assert table.tasks == FOUR
    assert table.rows == (*FOUR, "mean")
    assert list(table.columns) == ["base", "average", "merged", "expert"]
    assert results.default_headline(["average", "a", "b"]) == "b"
    assert results.default_headline(["base", "average"]) == "average"
    assert table.examples == {"cola": 200, "mnli": 402, "mrpc": 202, "stsb": 203}  # mnli: 2 splits


def test_scores_are_those_of_the_metrics_and_intervals_those_of_the_answers(
    table: results.Table,
) -> None:
    experts, merged = reports.run(FOUR)
    score, share = table.columns["merged"]["mrpc"]
    entry = merged["merged"].metrics.tasks["mrpc"]
    metrics = entry.model_dump()
    assert score.value == entry.score == pytest.approx((metrics["accuracy"] + metrics["f1"]) / 2)
    draws = bootstrap.draws(merged["merged"].answers)["mrpc"]
    assert score.interval == bootstrap.interval(draws)
    assert share is not None
    alone = experts["mrpc"].metrics.tasks["mrpc"].score
    assert share.value == pytest.approx(value(score) / (alone or 0))
    of_expert = bootstrap.draws(experts["mrpc"].answers)["mrpc"]
    assert share.interval == pytest.approx(bootstrap.interval(draws / of_expert))
    own_share = table.columns["expert"]["mrpc"].share
    assert own_share is not None
    assert (own_share.value, own_share.interval) == (1.0, (1.0, 1.0))


def test_means_are_over_tasks(table: results.Table) -> None:
    column = table.columns["average"]
    assert value(column["mean"].score) == pytest.approx(
        np.mean([value(column[task].score) for task in FOUR])
    )
    mean = column["mean"].share
    shares = [value(column[task].share) for task in FOUR]
    assert mean is not None
    assert value(mean) == pytest.approx(np.mean(shares))
    low, high = mean.interval or (0, 0)
    assert low < value(mean) < high


def collapsed(merged: dict[str, results.Evaluated], column: str) -> dict[str, results.Evaluated]:
    """A model whose answers to stsb are all the same."""
    metrics, answers = merged[column]
    task, splits = answers["stsb"]
    same = {name: each._replace(predicted=0 * each.predicted) for name, each in splits.items()}
    scores = metrics.tasks["stsb"].model_copy(update={"score": None, "interval": {}})
    metrics = metrics.model_copy(update={"tasks": {**metrics.tasks, "stsb": scores}})
    answered = {**answers, "stsb": TaskAnswers(task, same)}
    return {**merged, column: results.Evaluated(metrics, answered)}


def test_a_model_without_a_score_keeps_no_known_share(table: results.Table) -> None:
    """A model that fails on a task has no better mean for it."""
    experts, merged = reports.run(FOUR)
    lost = results.tabulate(experts, collapsed(dict(merged), "merged"))
    column = lost.columns["merged"]
    assert column["stsb"].score.text == "undefined"
    assert column["stsb"].share is None
    shares = [each.columns["average"]["mean"].share for each in (lost, table)]
    share = column["mean"].share
    assert share
    assert share.value is None
    assert value(shares[0]) == pytest.approx(value(shares[1]))
    assert lost.averaged == ("cola", "mnli", "mrpc"), "the same tasks for every model"
    remark = "stsb: undefined: its labels or answers here do not define pearson + spearmanr"
    assert remark in results.remarks(lost)
    numbers = json.dumps(results.results(lost), allow_nan=False)
    assert json.loads(numbers)["tasks"]["stsb"]["merged"]["score"] is None
    report = replace(reports.report(FOUR), table=lost)
    assert "keeps" not in verdict(report)[0]
    shown = page.render("report.html", report=report, pictures={})
    assert not re.search(r"\bnan\b", shown)


def test_an_expert_without_a_score_is_not_100_percent_of_it(table: results.Table) -> None:
    experts, merged = reports.run(FOUR)
    alone = collapsed({"expert": experts["stsb"]}, "expert")["expert"]
    lost = results.tabulate({**experts, "stsb": alone}, merged)
    assert lost.columns["expert"]["stsb"] == (lost.columns["expert"]["stsb"].score, None)
    assert lost.columns["merged"]["stsb"].share is None
    assert "stsb: the expert's score is undefined: no share of it is defined" in results.remarks(
        lost
    )
    shown = page.render(
        "report.html", report=replace(reports.report(FOUR), table=lost), pictures={}
    )
    assert shown.count('<small class="relative only">100\N{NO-BREAK SPACE}%</small>') == 4, (
        "three tasks, the mean"
    )
    assert shown.count('<small class="relative only">–</small>') == 1


def test_differences_are_paired_tests_of_the_headline_against_each_other_column(
    table: results.Table,
) -> None:
    experts, merged = reports.run(FOUR)
    assert table.headline == "merged"
    assert list(table.differences) == ["base", "average", "expert"]
    answers = [{"cola": merged[name].answers["cola"]} for name in ("merged", "average")]
    tests = {
        task: bootstrap.compare(*({task: merged[n].answers[task]} for n in ("merged", "average")))
        for task in FOUR
    }
    tested = dict(table.differences["average"])
    del tested["mean"]
    assert tested == bootstrap.holm(tests), "the tests of a column are corrected for their number"
    whole = bootstrap.compare(
        merged["merged"].answers, {task: experts[task].answers[task] for task in FOUR}
    )
    expected = min(1.0, 3 * whole.p_value)
    assert table.differences["expert"]["mean"].difference == whole.difference
    assert table.differences["expert"]["mean"].p_value == pytest.approx(expected)
    assert judgement(table.differences["base"]["mean"]) == "better"
    assert judgement(whole) == "worse"
    same = bootstrap.compare(answers[0], answers[0])
    assert judgement(same) == "within chance"


def test_an_expert_that_scores_nothing_is_no_measure() -> None:
    experts, merged = reports.run(("cola", "sst2"), count=40)
    experts["cola"] = reports.evaluated(["cola"], 0.2, 3, 40)
    column = results.tabulate(experts, merged).columns["merged"]
    intervals = [share.interval for _, share in column.values() if share]
    assert [interval is None for interval in intervals] == [True, False, True], "in some resamples"
    assert column["cola"].score.interval is not None
    cola = experts["cola"].metrics.tasks
    cola["cola"] = cola["cola"].model_copy(update={"score": 0.0})
    column = results.tabulate(experts, merged).columns["merged"]
    mean, sst2 = column["mean"].share, column["sst2"].share
    assert column["cola"].share is None
    assert mean is not None
    assert sst2 is not None
    assert (mean.value, mean.interval) == (sst2.value, sst2.interval)


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
    other = reports.evaluated(["cola", "sst2"], 0.5, 0, 90)
    with pytest.raises(
        UserError, match=r"merged and average: cola: .* not answer the same examples"
    ):
        results.tabulate(experts, {**merged, "average": other})


def test_the_table_is_text_and_numbers(table: results.Table) -> None:
    score, share = table.columns["merged"]["mrpc"]
    assert share is not None
    low, high = score.interval or (0, 0)
    header, body = results.text_table(table)
    assert header == ["task", "base", "average", "merged", "expert"]
    assert [row[0] for row in body] == [*FOUR, "mean"]
    expected = f"{100 * value(score):.1f} ±{50 * (high - low):.1f} ({100 * value(share):.1f})"
    assert body[2][3] == expected
    legend = "score in %, ± half of its 95 % interval (% of the expert's score)"
    assert results.notes(table) == [legend]
    numbers = results.results(table)
    assert [*numbers["tasks"]["mrpc"]["merged"].values()] == [score.value, share.value, low, high]
    assert numbers["mean"]["expert"]["relative"] == 1
    rows = results.score_rows(table)
    assert len(rows) == 5 * 4
    assert rows[10] == ("mrpc: merged", round(100 * value(score), 3))


def test_only_an_expert_that_guesses_is_said_to_guess() -> None:
    assert results.tabulate(*reports.run(SEVEN)).guessing == ()
    names = ("cola", "rte", "stsb")
    merged = {"merged": reports.evaluated(names, 0.8)}
    rights = zip(names, (0.7, 0.0, 0.0), strict=True)
    experts = {name: reports.evaluated(names, right) for name, right in rights}
    table = results.tabulate(experts, merged)
    assert table.guessing == ("rte", "stsb")
    assert [line.split(":")[0] for line in results.notes(table)[1:]] == [
        "rte", "stsb", "stsb",
    ]  # fmt: skip
    assert re.fullmatch(
        r"stsb: the expert's score is −\d+\.\d: no share of it is defined", results.notes(table)[3]
    )


def test_a_task_without_labels_is_said_to_have_no_score() -> None:
    experts, merged = reports.run(SEVEN)
    model = merged["merged"]
    metrics = model.metrics.model_copy(update={"unlabeled": ["topics"]})
    table = results.tabulate(experts, {**merged, "merged": model._replace(metrics=metrics)})
    assert results.notes(table)[1:] == ["topics: not scored, as its rows have no labels"]


def test_own_tasks_have_shares_means_and_verdicts_in_their_own_direction() -> None:
    experts, merged = reports.run(OWN, count=100)
    table = results.tabulate(experts, merged)
    column = table.columns["merged"]
    score, share = column["price"]
    alone = experts["price"].metrics.tasks["price"].score
    assert share is not None
    assert share.value == pytest.approx((alone or 0) / (score.value or 1)), (
        "of errors, the quotient"
    )
    assert table.averaged == ("intents", "topics", "spam")
    scores = [value(column[task].score) for task in table.averaged]
    assert value(column["mean"].score) == pytest.approx(np.mean(scores))
    tested = table.differences["base"]["price"]
    assert (tested.difference or 0) < 0
    assert judgement(tested) == "better"
    assert judgement(table.differences["expert"]["price"]) == "worse"
    body = results.text_table(table)[1]
    assert body[2][3].startswith(f"{score.value:.4g} ±")
    assert f"({100 * value(share):.1f})" in body[2][3]
    assert [row for row, _ in results.score_rows(table) if row.startswith("price")] == []
    assert results.remarks(table) == [
        "price: mse + mae (less is better); a plain number, no percentage",
        "mean score: over intents, topics and spam; without price",
    ]
    undefined = own_task(NUMBERS, "pearson", name="flat")
    flat = reports.evaluated([undefined], 0.5, count=1)
    table = results.tabulate({}, {"merged": flat})
    assert table.columns["merged"]["flat"].score.value is None
    assert results.text_table(table)[1] == [["flat", "undefined"]]
    assert results.results(table)["tasks"]["flat"]["merged"]["score"] is None


def test_many_columns_have_no_room_for_intervals() -> None:
    experts, merged = reports.run(("cola", "sst2"), 60)
    merged |= dict.fromkeys(("a", "b"), merged["merged"])
    table = results.tabulate(experts, merged)
    cells = [cell for row in results.text_table(table)[1] for cell in row]
    assert "±" not in "".join([*cells, *results.notes(table)])
    assert sum("(" in cell for cell in cells) == 5 * 3


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
    means = {task: np.mean([fisher[task][other] for other in sites]) for task in fisher}
    values = [torch.from_numpy(fisher[task][site] / means[task]) for task in fisher]
    np.testing.assert_allclose(by_kind["cola"][site], shares(values, [1.0, 3.0])[0].numpy())
    unweighed = reports.recipe(["cola", "sst2"], "ties")
    assert results.node_shares(fisher, unweighed) == {}
    assert results.node_shares({"cola": fisher["cola"]}, recipe) == {}, "not of every expert"
