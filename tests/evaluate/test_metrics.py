"""Metrics, plain and resampled, against scikit-learn and SciPy."""

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from sklearn import metrics as sklearn_metrics

from fmn.errors import UserError
from fmn.evaluate.metrics import METRICS, Answers, answers, score, score_splits
from fmn.tasks.task import TASKS, Task, get_task


def _pearson(labels: np.ndarray, predicted: np.ndarray) -> float:
    return float(stats.pearsonr(labels, predicted).statistic)


def _spearman(labels: np.ndarray, predicted: np.ndarray) -> float:
    return float(stats.spearmanr(labels, predicted).statistic)


ORACLES: dict[str, Callable[[np.ndarray, np.ndarray], float]] = {
    "accuracy": sklearn_metrics.accuracy_score,
    "f1": lambda labels, predicted: sklearn_metrics.f1_score(
        labels == 1, predicted == 1, zero_division=0.0
    ),
    "matthews_correlation": sklearn_metrics.matthews_corrcoef,
    "pearson": _pearson,
    "spearmanr": _spearman,
}


def expected(name: str, labels: np.ndarray, predicted: np.ndarray) -> float:
    """The library's value; 0 for a correlation with a constant, where libraries warn."""
    if METRICS[name].kind == "numbers" and not (np.ptp(labels) and np.ptp(predicted)):
        return 0.0
    if name == "matthews_correlation" and len(np.union1d(labels, predicted)) < 2:
        return 0.0
    return float(ORACLES[name](labels, predicted))


def logits_of(task: Task, predicted: np.ndarray) -> np.ndarray:
    """Outputs [N, C] that stand for these answers."""
    return predicted[:, None] if task.regression else np.eye(task.num_outputs)[predicted]


@given(st.data(), st.randoms())
def test_a_weighted_metric_is_the_librarys_value_of_the_repeated_rows(
    data: st.DataObject, random: Any
) -> None:
    name = data.draw(st.sampled_from(sorted(METRICS)))
    values = st.integers(0, 2) if METRICS[name].kind == "classes" else st.integers(-4, 4)
    pairs = data.draw(st.lists(st.tuples(values, values), min_size=1, max_size=30))
    predicted, labels = (np.array(side) for side in zip(*pairs, strict=True))
    rows = np.array([random.randrange(len(pairs)) for _ in pairs])
    weights = np.stack([np.ones(len(pairs)), np.bincount(rows, minlength=len(pairs))])
    whole, repeated = METRICS[name].compute(weights, Answers(predicted, labels))
    assert whole == pytest.approx(expected(name, labels, predicted), abs=1e-9)
    assert repeated == pytest.approx(expected(name, labels[rows], predicted[rows]), abs=1e-9)
    assert (-1.0 if name[0] in "mps" else 0.0) - 1e-9 <= repeated <= 1.0 + 1e-9


def test_metrics_fit_their_tasks() -> None:
    for each in TASKS.values():
        kind = "numbers" if each.regression else "classes"
        assert {METRICS[name].kind for name in each.metrics} == {kind}


@pytest.mark.parametrize("name", list(TASKS))
def test_right_answers_score_one_and_constant_ones_give_no_warning(name: str) -> None:
    each = get_task(name)
    labels = np.array([0.0, 2.5, 5.0]) if each.regression else np.arange(6) % each.num_outputs
    right = score(each, logits_of(each, labels), labels)
    assert right == pytest.approx(dict.fromkeys((*each.metrics, "score"), 1.0))
    constant = np.full((len(labels), each.num_outputs), 0.1, dtype=np.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scores = score(each, constant, labels)
        assert np.isfinite(list(score(each, constant[:1], labels[:1]).values())).all()
    if name in ("cola", "stsb"):
        assert scores["score"] == 0.0


def test_splits_count_alike_whatever_their_size() -> None:
    mnli = get_task("mnli")
    right, wrong = Answers(np.zeros(9), np.zeros(9)), Answers(np.zeros(3), np.ones(3))
    scores = score_splits(mnli, dict(zip(mnli.validation, (right, wrong), strict=True)))
    assert scores == {"accuracy": 1.0, "accuracy_mismatched": 0.0, "score": 0.5}


def test_what_cannot_be_scored_is_refused() -> None:
    with pytest.raises(UserError, match="not finite"):
        answers(get_task("rte"), np.full((2, 2), np.nan), np.array([0, 1]))
    with pytest.raises(UserError, match="no examples"):
        answers(get_task("rte"), np.zeros((0, 2)), np.zeros(0, dtype=np.int64))
