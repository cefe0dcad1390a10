"""Bootstrap intervals and paired tests, against resamples that are drawn and scored one by one, and against SciPy."""

import time
from statistics import fmean
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from sklearn.metrics import f1_score, matthews_corrcoef

from fmn.evaluate import bootstrap as intervals
from fmn.evaluate.bootstrap import METRICS, Answers
from fmn.models import predict as evaluate
from fmn.tasks.task import TASKS, Task, task


def answers(one: Task, count: int = 60, seed: int = 0, right: float = 0.7) -> Answers:
    """Random answers, of which about a share is right; a regression task's are correlated and have ties."""
    random = np.random.default_rng(seed)
    if one.regression:
        values = random.integers(0, 26, count) / 5
        return Answers(values + random.normal(0, 2 * (1 - right) + 1e-3, count).round(1), values)
    labels = random.integers(0, one.num_outputs, count)
    return Answers(
        np.where(random.random(count) < right, labels, random.integers(0, one.num_outputs, count)),
        labels,
    )


def logits(one: Task, predicted: np.ndarray) -> np.ndarray:
    return predicted[:, None] if one.regression else np.eye(one.num_outputs)[predicted]


@pytest.mark.parametrize("name", ["cola", "mrpc", "mnli", "stsb"])
def test_every_resample_is_scored_as_if_it_were_drawn(name: str) -> None:
    one = task(name)
    splits = {split: answers(one, 40 + place, place) for place, split in enumerate(one.validation)}
    found = intervals.resampled(one, splits, resamples=25)
    scores = []
    for place, (split, (predicted, labels)) in enumerate(splits.items()):
        (weights,) = intervals._draws(0, one, split, len(labels), 25)
        rows = [np.repeat(np.arange(len(labels)), drawn.astype(int)) for drawn in weights]
        assert {len(drawn) for drawn in rows} == {40 + place}
        expected = [
            evaluate.score(one, logits(one, predicted)[drawn], labels[drawn]) for drawn in rows
        ]
        for metric in one.metrics:
            np.testing.assert_allclose(
                found[metric + one.suffix(split)],
                [each[metric] for each in expected],
                rtol=1e-9,
                atol=1e-9,
            )
        scores.append([each["score"] for each in expected])
    np.testing.assert_allclose(found["score"], np.mean(scores, axis=0), rtol=1e-9, atol=1e-9)


@given(st.data())
def test_metrics_of_the_examples_themselves_are_those_of_the_libraries(data: st.DataObject) -> None:
    one = data.draw(st.sampled_from(list(TASKS.values())))
    values = (
        st.integers(-4, 4).map(float) if one.regression else st.integers(0, one.num_outputs - 1)
    )
    pairs = data.draw(st.lists(st.tuples(values, values), min_size=1, max_size=30))
    predicted, labels = (np.array(side) for side in zip(*pairs, strict=True))
    expected = evaluate.score(one, logits(one, predicted), labels)
    given_answers = Answers(predicted, labels)
    for metric in one.metrics:
        found = METRICS[metric](np.ones((1, len(labels))), given_answers)
        np.testing.assert_allclose(found, expected[metric], atol=1e-9)
    assert intervals.score(one, {one.validation[0]: given_answers}) == pytest.approx(
        expected["score"], abs=1e-9
    )


@given(
    st.lists(st.tuples(st.integers(0, 2), st.integers(0, 2)), min_size=2, max_size=30), st.randoms()
)
def test_weights_mean_repetition(pairs: list[tuple[int, int]], random: Any) -> None:
    predicted, labels = (np.array(side) for side in zip(*pairs, strict=True))
    drawn = np.array([random.randrange(len(pairs)) for _ in pairs])
    weights = np.bincount(drawn, minlength=len(pairs)).astype(float)[None]
    picked, right = predicted[drawn], labels[drawn]
    found = {
        name: float(metric(weights, Answers(predicted, labels))[0])
        for name, metric in METRICS.items()
    }
    assert found["accuracy"] == pytest.approx(np.mean(picked == right))
    assert found["f1"] == pytest.approx(f1_score(right == 1, picked == 1, zero_division=0.0))
    if len(np.unique(np.r_[picked, right])) > 1:
        assert found["matthews_correlation"] == pytest.approx(matthews_corrcoef(right, picked))
    if np.ptp(picked) and np.ptp(right):
        assert found["pearson"] == pytest.approx(stats.pearsonr(right, picked).statistic)
        assert found["spearmanr"] == pytest.approx(stats.spearmanr(right, picked).statistic)
    else:
        assert found["pearson"] == found["spearmanr"] == 0.0


@pytest.mark.parametrize("name", ["sst2", "stsb"])
def test_intervals_agree_with_scipys_bootstrap(name: str) -> None:
    one = task(name)
    predicted, labels = answers(one, 300)
    metric = one.metrics[0]
    statistic = {
        "accuracy": lambda p, y: np.mean(p == y),
        "pearson": lambda p, y: stats.pearsonr(p, y).statistic,
    }[metric]
    expected = stats.bootstrap(
        (predicted, labels),
        statistic,
        paired=True,
        vectorized=False,
        n_resamples=2000,
        method="percentile",
        rng=1,
    )
    found = intervals.resampled(one, {"validation": Answers(predicted, labels)}, resamples=4000)
    np.testing.assert_allclose(
        intervals.interval(found[metric]),
        expected.confidence_interval,
        atol=0.25 * float(expected.standard_error),
    )


def test_intervals_cover_the_truth_about_as_often_as_they_say() -> None:
    one, covered = task("sst2"), []
    for seed in range(200):
        right = np.random.default_rng(seed).random(200) < 0.8
        found = intervals.resampled(
            one, {"validation": Answers(1 * right, np.ones(200))}, resamples=300, seed=seed
        )
        low, high = intervals.interval(found["score"])
        covered.append(low <= 0.8 <= high)
    assert 0.90 <= fmean(covered) <= 0.99


def test_draws_depend_on_seed_task_split_and_count_alone() -> None:
    mnli = task("mnli")
    given_answers = answers(mnli, 50)
    both = intervals.resampled(mnli, dict.fromkeys(mnli.validation, given_answers), resamples=50)
    again = intervals.resampled(mnli, dict.fromkeys(mnli.validation, given_answers), resamples=50)
    other = intervals.resampled(
        mnli, dict.fromkeys(mnli.validation, given_answers), resamples=50, seed=1
    )
    assert all(np.array_equal(both[name], again[name]) for name in both)
    assert not np.array_equal(both["accuracy"], other["accuracy"])
    assert not np.array_equal(both["accuracy"], both["accuracy_mismatched"]), (
        "splits are drawn independently"
    )
    assert abs(np.corrcoef(both["accuracy"], both["accuracy_mismatched"])[0, 1]) < 0.5


def test_the_share_of_the_expert_is_of_the_same_resamples() -> None:
    one = task("sst2")
    expert = intervals.resampled(one, {"validation": answers(one, 100)})["score"]
    share = intervals.relative(expert, expert)
    assert share is not None
    assert intervals.interval(share) == (1.0, 1.0)
    assert intervals.relative(expert, expert - expert.min()) is None, (
        "an expert that scores nothing is no measure"
    )
    half = intervals.macro({"a": expert, "b": np.zeros_like(expert)})
    np.testing.assert_allclose(half, expert / 2)


def test_a_model_does_not_differ_from_itself() -> None:
    for one in TASKS.values():
        mine = {one.name: {split: answers(one, 30) for split in one.validation}}
        found = intervals.compare(mine, mine)
        assert (found.difference, found.interval, found.p_value) == (0.0, (0.0, 0.0), 1.0)
        assert found.mcnemar == (1.0 if one.metrics == ("accuracy",) else None)


@pytest.mark.parametrize("name", ["sst2", "cola", "mrpc", "stsb", "mnli"])
def test_a_clear_difference_is_found_in_both_directions_and_a_small_one_is_not(name: str) -> None:
    one = task(name)
    good = {name: {split: answers(one, 400, right=0.95) for split in one.validation}}
    bad = {name: {split: answers(one, 400, right=0.5) for split in one.validation}}
    found, back = intervals.compare(good, bad), intervals.compare(bad, good)
    assert found.difference == -back.difference > 0
    assert found.interval == pytest.approx((-back.interval[1], -back.interval[0]))
    assert found.interval[0] > 0
    assert found.p_value == back.p_value < 0.01
    near = {
        split: Answers(each.predicted.copy(), each.labels) for split, each in good[name].items()
    }
    first = near[one.validation[0]].predicted
    first[0] = 0.5 if one.regression else (first[0] + 1) % one.num_outputs
    assert intervals.compare(good, {name: near}).p_value > 0.05


def test_the_paired_test_agrees_with_exact_ones_where_they_exist() -> None:
    """20 examples that the first alone has right, 8 the second alone: the binomial test is the exact one."""
    labels = np.ones(200)
    first, second = labels.copy(), labels.copy()
    second[:20] = 0
    first[20:28] = 0
    found = intervals.compare(
        {"sst2": {"validation": Answers(first, labels)}}, {"sst2": {"validation": Answers(second, labels)}},
        resamples=20000,
    )  # fmt: skip
    assert found.mcnemar == pytest.approx(stats.binomtest(20, 28).pvalue)
    normal = 2 * stats.norm.sf((20 - 8) / np.sqrt(28 - (20 - 8) ** 2 / 200))
    assert found.p_value == pytest.approx(normal, abs=0.01)
    assert found.difference == pytest.approx(0.06)


def test_p_values_of_equal_models_are_spread_evenly() -> None:
    one, labels = task("sst2"), np.ones(150)
    found = []
    for seed in range(150):
        random = np.random.default_rng(seed)
        sides = [
            {one.name: {"validation": Answers(1.0 * (random.random(150) < 0.8), labels)}}
            for _ in range(2)
        ]
        found.append(intervals.compare(*sides, resamples=300, seed=seed).p_value)
    assert 0.01 <= np.mean(np.array(found) < 0.05) <= 0.10
    assert 0.4 <= np.mean(np.array(found) < 0.5) <= 0.6


def test_the_mean_over_tasks_is_compared_too() -> None:
    names = ("sst2", "stsb")
    good = {name: {"validation": answers(task(name), 300, right=0.9)} for name in names}
    bad = {name: {"validation": answers(task(name), 300, right=0.6)} for name in names}
    found = intervals.compare(good, bad)
    drawn = (intervals.draws(good), intervals.draws(bad))
    assert intervals.compare(good, bad, drawn=drawn) == found, (
        "draws may be given where they are known"
    )
    alone = [intervals.compare({name: good[name]}, {name: bad[name]}).difference for name in names]
    assert found.difference == pytest.approx(fmean(alone))
    assert found.mcnemar is None
    with pytest.raises(ValueError, match="same"):
        intervals.compare(good, {"sst2": bad["sst2"]})
    with pytest.raises(ValueError, match="same examples"):
        intervals.compare(good, {**bad, "stsb": {"validation": answers(task("stsb"), 300, seed=1)}})


def test_a_thousand_resamples_of_the_largest_split_with_ranks_take_a_moment() -> None:
    started = time.monotonic()
    intervals.resampled(task("stsb"), {"validation": answers(task("stsb"), 1500)})
    assert time.monotonic() - started < 5  # 0.2 s on a quiet core
