"""Bootstrap intervals and paired tests, against SciPy, exact tests and simulations."""

from statistics import fmean

import numpy as np
import pytest
from scipy import stats

from fmn.evaluate import bootstrap
from fmn.evaluate.metrics import Answers
from fmn.tasks.task import TASKS, Task, get_task


def answers(task: Task, count: int = 60, seed: int = 0, right: float = 0.7) -> Answers:
    """Random answers, about a share of which is right; those of a regression task have ties."""
    random = np.random.default_rng(seed)
    if task.regression:
        values = random.integers(0, 26, count) / 5
        return Answers(values + random.normal(0, 2 * (1 - right) + 1e-3, count).round(1), values)
    labels = random.integers(0, task.num_outputs, count)
    others = random.integers(0, task.num_outputs, count)
    return Answers(np.where(random.random(count) < right, labels, others), labels)


def binary(right: np.ndarray) -> dict[str, dict[str, Answers]]:
    """The answers of a model that has these rows right."""
    return {"sst2": {"validation": Answers(1.0 * right, np.ones(len(right)))}}


@pytest.mark.parametrize(
    ("name", "statistic"),
    [
        ("sst2", lambda predicted, labels: np.mean(predicted == labels)),
        ("stsb", lambda predicted, labels: stats.pearsonr(predicted, labels).statistic),
    ],
)
def test_intervals_agree_with_scipys_bootstrap(name: str, statistic: object) -> None:
    sample = answers(get_task(name), 300)
    expected = stats.bootstrap(
        tuple(sample), statistic, paired=True, vectorized=False, n_resamples=2000,
        method="percentile", rng=1,
    )  # fmt: skip
    values = bootstrap.resampled(get_task(name), {"validation": sample}, resamples=4000)
    np.testing.assert_allclose(
        bootstrap.interval(values[get_task(name).metrics[0]]),
        expected.confidence_interval,
        atol=0.25 * float(expected.standard_error),
    )


def test_draws_depend_on_seed_task_split_and_count_alone() -> None:
    mnli = get_task("mnli")
    splits = dict.fromkeys(mnli.validation, answers(mnli, 50))
    first, again = (bootstrap.resampled(mnli, splits, resamples=50) for _ in range(2))
    other = bootstrap.resampled(mnli, splits, resamples=50, seed=1)
    assert all(np.array_equal(first[name], again[name]) for name in first)
    assert not np.array_equal(first["accuracy"], other["accuracy"])
    correlation = np.corrcoef(first["accuracy"], first["accuracy_mismatched"])[0, 1]
    assert abs(correlation) < 0.5, "splits are drawn independently"


def test_relative_scores_are_of_the_same_resamples() -> None:
    sst2 = get_task("sst2")
    expert = bootstrap.resampled(sst2, {"validation": answers(sst2, 100)})["score"]
    share = bootstrap.relative(expert, expert)
    assert share is not None
    assert bootstrap.interval(share) == (1.0, 1.0)
    assert bootstrap.relative(expert, expert - expert.min()) is None


def test_a_model_does_not_differ_from_itself() -> None:
    for each in TASKS.values():
        model = {each.name: {split: answers(each, 30) for split in each.validation}}
        assert bootstrap.compare(model, model) == (0.0, (0.0, 0.0), 1.0)


@pytest.mark.parametrize("name", ["sst2", "cola", "mrpc", "stsb", "mnli"])
def test_a_clear_difference_is_seen_in_both_directions_and_a_small_one_is_not(name: str) -> None:
    each = get_task(name)
    good = {name: {split: answers(each, 400, right=0.95) for split in each.validation}}
    bad = {name: {split: answers(each, 400, right=0.5) for split in each.validation}}
    forth, back = bootstrap.compare(good, bad), bootstrap.compare(bad, good)
    assert forth.difference == -back.difference > 0
    assert forth.interval == pytest.approx((-back.interval[1], -back.interval[0]))
    assert forth.interval[0] > 0
    assert forth.p_value == back.p_value < 0.01
    near = {
        split: Answers(other.predicted.copy(), other.labels) for split, other in good[name].items()
    }
    first = near[each.validation[0]].predicted
    first[0] = 0.5 if each.regression else (first[0] + 1) % each.num_outputs
    assert bootstrap.compare(good, {name: near}).p_value > 0.05


def test_the_p_value_is_near_that_of_mcnemars_test() -> None:
    """The first model alone has 20 examples right, the second alone 8."""
    first, second = np.ones(200), np.ones(200)
    second[:20] = 0
    first[20:28] = 0
    result = bootstrap.compare(binary(first), binary(second), resamples=20000)
    normal = 2 * stats.norm.sf((20 - 8) / np.sqrt(28 - (20 - 8) ** 2 / 200))
    assert result.p_value == pytest.approx(normal, abs=0.01)
    assert result.difference == pytest.approx(0.06)


def test_p_values_of_equal_models_are_spread_evenly() -> None:
    p_values = []
    for seed in range(150):
        random = np.random.default_rng(seed)
        models = [binary(random.random(150) < 0.8) for _ in range(2)]
        p_values.append(bootstrap.compare(*models, resamples=300, seed=seed).p_value)
    assert 0.01 <= np.mean(np.array(p_values) < 0.05) <= 0.10
    assert 0.4 <= np.mean(np.array(p_values) < 0.5) <= 0.6


def test_the_mean_over_tasks_is_compared_too() -> None:
    names, stsb = ("sst2", "stsb"), get_task("stsb")
    good = {name: {"validation": answers(get_task(name), 300, right=0.9)} for name in names}
    bad = {name: {"validation": answers(get_task(name), 300, right=0.6)} for name in names}
    both = bootstrap.compare(good, bad)
    drawn = (bootstrap.draws(good), bootstrap.draws(bad))
    assert bootstrap.compare(good, bad, drawn=drawn) == both
    alone = [bootstrap.compare({name: good[name]}, {name: bad[name]}).difference for name in names]
    assert both.difference == pytest.approx(fmean(alone))
    with pytest.raises(ValueError, match="same"):
        bootstrap.compare(good, {"sst2": bad["sst2"]})
    with pytest.raises(ValueError, match="same examples"):
        bootstrap.compare(good, {**bad, "stsb": {"validation": answers(stsb, 300, seed=1)}})
