"""Bootstrap intervals and paired tests, against SciPy, exact tests and simulations."""

from copy import deepcopy
from statistics import fmean
from typing import Any

import numpy as np
import pytest
from scipy import stats

from fmn.evaluate import bootstrap
from fmn.evaluate.metrics import Answers, TaskAnswers, higher_is_better
from fmn.tasks.task import TASKS, Task, get_task
from tests.reports import CLASSES, LABELS, NUMBERS, answered, own_task


def binary(right: np.ndarray) -> dict[str, TaskAnswers]:
    """The answers of a model that has these rows right."""
    answers = Answers(1 * (right > 0), np.ones(len(right), dtype=int), np.zeros((len(right), 2)))
    return {"sst2": TaskAnswers(get_task("sst2"), {"validation": answers})}


def model(task: Task, *args: Any, **options: Any) -> dict[str, TaskAnswers]:
    """The answers of a model to every split of a task; arguments as of `answered`."""
    splits = {split: answered(task, *args, **options) for split in task.validation}
    return {task.name: TaskAnswers(task, splits)}


@pytest.mark.parametrize(
    ("name", "statistic"),
    [
        ("sst2", lambda predicted, labels: np.mean(predicted == labels)),
        ("stsb", lambda predicted, labels: stats.pearsonr(predicted, labels).statistic),
    ],
)
def test_intervals_agree_with_scipys_bootstrap(name: str, statistic: object) -> None:
    sample = answered(get_task(name), 0.7, 300)
    expected = stats.bootstrap(
        sample[:2], statistic, paired=True, vectorized=False, n_resamples=2000,
        method="percentile", rng=1,
    )  # fmt: skip
    values = bootstrap.resampled(get_task(name), {"validation": sample}, resamples=4000)
    np.testing.assert_allclose(
        bootstrap.interval(values[get_task(name).metrics[0]]) or (),
        expected.confidence_interval,
        atol=0.25 * float(expected.standard_error),
    )


def test_draws_depend_on_task_split_and_count_alone() -> None:
    mnli = get_task("mnli")
    splits = dict.fromkeys(mnli.validation, answered(mnli, 0.7, 50))
    first, again = (bootstrap.resampled(mnli, splits, resamples=50) for _ in range(2))
    assert all(np.array_equal(first[name], again[name]) for name in first)
    correlation = np.corrcoef(first["accuracy"], first["accuracy_mismatched"])[0, 1]
    assert abs(correlation) < 0.5, "splits are drawn independently"


@pytest.mark.parametrize(("kind", "metric"), [(CLASSES, "accuracy"), (NUMBERS, "mae")])
def test_relative_scores_are_of_the_same_resamples(kind: str, metric: str) -> None:
    task = own_task(kind, metric)
    expert = bootstrap.resampled(task, {"validation": answered(task, 0.7, 100)})["score"]
    share = bootstrap.relative(task, expert, expert)
    assert share is not None
    assert bootstrap.interval(share) == (1.0, 1.0)
    assert bootstrap.relative(task, expert - expert.min(), expert - expert.min()) is None
    better = 2 * expert if kind == CLASSES else expert / 2
    assert bootstrap.relative(task, better, expert) == pytest.approx(np.full(1000, 2.0))


def test_undefined_resamples_are_left_out_and_one_row_has_no_interval() -> None:
    task = own_task(NUMBERS, "pearson")
    few = Answers(np.arange(3.0), np.array([0.0, 0.0, 1.0]), np.zeros((3, 1)))
    draws = bootstrap.resampled(task, {"validation": few})["pearson"]
    assert 0 < np.isnan(draws).mean() < 0.5
    low, high = bootstrap.interval(draws) or (0, 0)
    assert 0 < low < high == pytest.approx(1)
    single = Answers(np.ones(1), np.ones(1), np.zeros((1, 1)))
    for metric in ("mae", "pearson"):
        task = own_task(NUMBERS, metric)
        alone = {"own": TaskAnswers(task, {"validation": single})}
        assert bootstrap.interval(bootstrap.draws(alone)["own"]) is None
        compared = bootstrap.compare(alone, alone)
        assert compared.difference == (0.0 if metric == "mae" else None)
        assert (compared.interval, compared.p_value) == (None, 1.0)


TESTED = [get_task(name) for name in ("sst2", "cola", "mrpc", "stsb", "mnli")]
TESTED += [own_task(NUMBERS, metric) for metric in ("mse", "mae", "r2")]
TESTED += [own_task(LABELS, "f1_micro", "f1_macro", "roc_auc"), own_task(CLASSES, "roc_auc")]


def named(task: Task) -> str:
    return f"{task.name} {task.metrics[0]}"


@pytest.mark.parametrize("task", [*TASKS.values(), *TESTED], ids=named)
def test_a_model_does_not_differ_from_itself(task: Task) -> None:
    same = model(task, 0.7, 30)
    assert bootstrap.compare(same, same)[:3] == (0.0, (0.0, 0.0), 1.0)


@pytest.mark.parametrize("task", TESTED, ids=named)
def test_a_clear_difference_is_seen_in_both_directions_and_a_small_one_is_not(task: Task) -> None:
    good, bad = model(task, 0.95, 400), model(task, 0.5, 400, seed=1)
    forth, back = bootstrap.compare(good, bad), bootstrap.compare(bad, good)
    assert forth.difference is not None
    assert forth.interval is not None
    assert back.interval is not None
    assert forth.difference == -(back.difference or 0)
    assert (forth.difference > 0) == higher_is_better(task) == forth.higher_is_better
    assert forth.interval == pytest.approx((-back.interval[1], -back.interval[0]))
    assert np.prod(forth.interval) > 0, "zero is outside"
    assert forth.p_value == back.p_value < 0.01
    near = {split: deepcopy(answers) for split, answers in good[task.name].splits.items()}
    first = near[task.validation[0]]
    for side in (first.predicted, first.scores):
        side[0] = side[1]
    assert bootstrap.compare(good, {task.name: TaskAnswers(task, near)}).p_value > 0.05


@pytest.mark.parametrize("task", TESTED, ids=named)
def test_only_who_beats_the_best_constant_answer_is_not_at_chance(task: Task) -> None:
    assert not bootstrap.at_chance(task, model(task, 0.9, 200)[task.name].splits)
    chance = [model(task, 0.0, 200, seed=seed)[task.name].splits for seed in range(20)]
    assert np.mean([bootstrap.at_chance(task, splits) for splits in chance]) >= 0.8
    labels = chance[0][task.validation[0]].labels
    rows = (labels == labels[0]) if labels.ndim == 1 else (labels == labels[0]).all(axis=1)
    right = Answers(labels[rows], labels[rows], np.zeros((rows.sum(), max(task.num_outputs, 1))))
    assert bootstrap.at_chance(task, {"validation": right}), "all labels are the same"


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
        p_values.append(bootstrap.compare(*models, resamples=300).p_value)
    assert 0.01 <= np.mean(np.array(p_values) < 0.05) <= 0.10
    assert 0.4 <= np.mean(np.array(p_values) < 0.5) <= 0.6


def test_the_mean_over_the_tasks_where_more_is_better_is_compared_too() -> None:
    tasks = {name: get_task(name) for name in ("sst2", "stsb")}
    tasks["error"] = own_task(NUMBERS, "mse").model_copy(update={"name": "error"})
    good, bad = (
        {name: model(task, right, 300)[name] for name, task in tasks.items()}
        for right in (0.9, 0.6)
    )
    both = bootstrap.compare(good, bad)
    drawn = (bootstrap.draws(good), bootstrap.draws(bad))
    assert bootstrap.compare(good, bad, drawn=drawn) == both
    alone = {name: bootstrap.compare({name: good[name]}, {name: bad[name]}) for name in tasks}
    assert both.difference == pytest.approx(
        fmean([alone[name].difference or 0 for name in ("sst2", "stsb")])
    )
    assert (alone["error"].difference or 0) < 0
    with pytest.raises(ValueError, match="same"):
        bootstrap.compare(good, {"sst2": bad["sst2"]})
    other = model(tasks["stsb"], 0.6, 299)
    with pytest.raises(ValueError, match="same examples"):
        bootstrap.compare(good, {**bad, **other})


def test_holms_correction_rejects_what_the_step_down_procedure_rejects() -> None:
    random = np.random.default_rng(0)
    for count in (1, 2, 5, 20):
        p_values = random.uniform(0, 1, count) ** 4
        tests = {n: bootstrap.Difference(0.1, None, p) for n, p in enumerate(p_values)}
        none = bootstrap.Difference(None, None, 1.0)
        corrected = bootstrap.holm(tests | {-1: none})
        assert corrected.pop(-1) == none
        for level in (0.01, 0.05, 0.2):
            rejected = set()  # Holm 1979: from the smallest p-value up to the first that is not
            for place, n in enumerate(np.argsort(p_values)):
                if p_values[n] > level / (count - place):
                    break
                rejected.add(int(n))
            assert {n for n, test in corrected.items() if test.p_value <= level} == rejected
