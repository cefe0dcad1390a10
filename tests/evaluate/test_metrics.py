"""Metrics, plain and resampled, against scikit-learn and SciPy."""

import itertools
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from scipy.special import expit, softmax
from sklearn import metrics as sk

from fmn.errors import UserError
from fmn.evaluate.metrics import (
    COMPUTE,
    Answers,
    answers,
    averaged,
    higher_is_better,
    relative,
    score_splits,
)
from fmn.tasks.metrics import METRICS
from fmn.tasks.task import TASKS, get_task
from tests.reports import BINARY, CLASSES, LABELS, NUMBERS, own_task

AVERAGED = {f"f1_{kind}": partial(sk.f1_score, average=kind) for kind in ("micro", "macro")}
AVERAGED["f1_weighted"] = partial(sk.f1_score, average="weighted")
# By kind of task, the library's metric of (labels, predicted).
ORACLES: dict[str, dict[str, Callable[..., Any]]] = {
    BINARY: {"f1": sk.f1_score, "precision": sk.precision_score, "recall": sk.recall_score},
    CLASSES: {
        "accuracy": sk.accuracy_score,
        "balanced_accuracy": sk.balanced_accuracy_score,
        "matthews_correlation": sk.matthews_corrcoef,
        **AVERAGED,
    },
    LABELS: {"accuracy": sk.accuracy_score, **AVERAGED},
    NUMBERS: {
        "mse": sk.mean_squared_error,
        "mae": sk.mean_absolute_error,
        "r2": sk.r2_score,
        "pearson": lambda labels, predicted: stats.pearsonr(labels, predicted).statistic,
        "spearmanr": lambda labels, predicted: stats.spearmanr(labels, predicted).statistic,
    },
}
ORACLES[NUMBERS] |= {f"{name}_cosine": ORACLES[NUMBERS][name] for name in ("pearson", "spearmanr")}
KINDS = [(kind, name) for kind, oracles in ORACLES.items() for name in oracles]
TEXTS = "texts"  # that are generated
KINDS += [(TEXTS, "perplexity"), (TEXTS, "exact_match")]
KINDS += [(kind, "roc_auc") for kind in (BINARY, CLASSES, LABELS)]


def expected(kind: str, name: str, answers: Answers) -> float:
    """The library's value; NaN where it is undefined."""
    predicted, labels, scores = answers
    if kind == TEXTS:
        of_token = np.repeat(scores[:, 0] / labels, labels)  # the mean in each text's place
        if name == "perplexity":
            return float(np.exp(of_token.mean()))
        return float(sk.accuracy_score(labels, predicted))
    if name == "roc_auc":
        if kind == LABELS:
            if np.any(labels.min(axis=0) == labels.max(axis=0)):
                return np.nan
            return float(sk.roc_auc_score(labels, scores))
        if len(np.unique(labels)) < scores.shape[1]:
            return np.nan
        shown = scores[:, 1] if scores.shape[1] == 2 else scores
        return float(sk.roc_auc_score(labels, shown, multi_class="ovr"))
    is_constant = len(np.unique(labels)) < 2
    is_correlation = name.startswith(("pearson", "spearmanr"))
    if (name in ("matthews_correlation", "r2") or is_correlation) and is_constant:
        return np.nan
    if is_correlation and len(np.unique(predicted)) < 2:
        return np.nan
    has_ones = (bool((labels == 1).any()), bool((predicted == 1).any()))
    if kind == BINARY and not (has_ones[0] or (has_ones[1] and name != "recall")):
        return np.nan
    if kind == LABELS and name.startswith("f1"):
        if not has_ones[0] and (name == "f1_weighted" or not has_ones[1]):
            return np.nan
        return float(ORACLES[kind][name](labels, predicted, zero_division=0.0))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what is 0 by convention
        return float(ORACLES[kind][name](labels, predicted))


@st.composite
def random_answers(draw: st.DrawFn, kind: str) -> Answers:
    """Answers with ties among the scores, and often without some of the classes."""
    count, seed = draw(st.integers(1, 30)), draw(st.integers(0, 2**32 - 1))
    random = np.random.default_rng(seed)
    if kind == NUMBERS:
        values = random.integers(-3, 4, (2, count)) * draw(st.sampled_from([0.0, 0.5, 100.0]))
        return Answers(values[0], values[1], values[:1].T)
    if kind == TEXTS:
        tokens = random.integers(1, 9, count)
        right = np.minimum(tokens, random.integers(0, 9, count))
        return Answers(right, tokens, random.gamma(1.0, tokens)[:, None])
    classes = 2 if kind == BINARY else draw(st.integers(2, 4))
    scores = random.integers(1, 4, (count, classes)) / 4
    if kind == LABELS:
        labels = (random.random((count, classes)) < draw(st.sampled_from([0.1, 0.5]))).astype(int)
        return Answers((scores > 0.5).astype(int), labels, scores)
    scores /= scores.sum(axis=1, keepdims=True)
    predicted = random.integers(0, draw(st.integers(1, classes)), count)
    return Answers(predicted, random.integers(0, classes, count), scores)


@pytest.mark.parametrize(("kind", "name"), KINDS)
@settings(max_examples=40)
@given(data=st.data())
def test_a_weighted_metric_is_the_librarys_value_of_the_repeated_rows(
    kind: str, name: str, data: st.DataObject
) -> None:
    each = data.draw(random_answers(kind))
    count = len(each.labels)
    rows = np.random.default_rng(count).integers(count, size=count)
    weights = np.stack([np.ones(count), np.bincount(rows, minlength=count)])
    computed = COMPUTE[name](weights, each)
    again = Answers(*(side[rows] for side in each))
    wanted = [expected(kind, name, answers) for answers in (each, again)]
    np.testing.assert_allclose(computed, wanted, atol=1e-9)


def test_every_metric_that_a_task_may_name_is_checked() -> None:
    of_other_kinds = {"seqeval_f1", "pearson_cosine", "spearmanr_cosine"}  # tested beside
    assert {name for _, name in KINDS} | of_other_kinds == set(COMPUTE) == set(METRICS)


@given(st.integers(0, 2**32 - 1))
def test_outputs_become_the_answers_that_transformers_gives(seed: int) -> None:
    random = np.random.default_rng(seed)
    logits = random.normal(0, 20, (8, 3)).astype(np.float32)
    ids, several = random.integers(0, 3, 8), random.integers(0, 2, (8, 3)).astype(np.float32)
    single = answers(own_task(CLASSES), logits, ids)
    np.testing.assert_allclose(single.scores, softmax(logits, axis=1), atol=1e-6)
    np.testing.assert_array_equal(single.predicted, logits.argmax(axis=1))
    task = own_task(LABELS, "f1_micro").model_copy(update={"threshold": 0.3})
    multiple = answers(task, logits, several)
    np.testing.assert_allclose(multiple.scores, expit(logits), atol=1e-6)
    np.testing.assert_array_equal(multiple.predicted, multiple.scores >= np.float32(0.3))
    np.testing.assert_array_equal(multiple.labels, several)
    number = answers(own_task(NUMBERS, "mse"), logits[:, :1], several[:, 0])
    np.testing.assert_array_equal(number.predicted[:, None], number.scores)


@pytest.mark.parametrize("name", list(TASKS))
def test_right_answers_score_one_and_what_is_undefined_is_none(name: str) -> None:
    task = get_task(name)
    labels = np.array([0.0, 2.5, 5.0]) if task.regression else np.arange(6) % task.num_outputs
    logits = labels[:, None] if task.regression else np.eye(task.num_outputs)[labels]
    right = score_splits(task, {"validation": answers(task, logits, labels)})
    assert list(right.values()) == pytest.approx([1.0] * len(right))
    constant = np.full((len(labels), task.num_outputs), 0.1, dtype=np.float32)
    of_constant = answers(task, constant, labels)
    is_undefined = score_splits(task, {"validation": of_constant})["score"] is None
    assert is_undefined == task.regression, "a correlation"
    of_one = Answers(*(side[:1] for side in of_constant))
    is_undefined = score_splits(task, {"validation": of_one})["score"] is None
    assert is_undefined == (name in ("cola", "stsb", "mrpc", "qqp")), "of one row of class 0"


@pytest.mark.parametrize(("kind", "name"), KINDS)
def test_no_metric_is_a_number_that_is_none(kind: str, name: str) -> None:
    """Of one class, of constant answers, of one row: a number in its range, or None."""
    higher = METRICS[name].higher_is_better
    for count, label, answer in itertools.product((1, 2, 9), (0, 1), (0, 1, None)):
        labels, predicted = np.full(count, label), np.full(count, answer or 0)
        predicted = np.arange(count) % 2 if answer is None else predicted
        scores = np.stack([1.0 - predicted, predicted], axis=1)
        if kind == LABELS:
            labels, predicted = (np.stack([side, side], axis=1) for side in (labels, predicted))
        if kind == TEXTS:
            labels, scores = labels + 1, np.full((count, 1), 1e4)
        score = COMPUTE[name](np.ones((1, count)), Answers(predicted, labels, scores))[0]
        assert np.isnan(score) or (np.isfinite(score) and (score <= 1 or not higher)), (
            count, label, answer,
        )  # fmt: skip
        is_constant = len(np.unique(labels)) == 1 or len(np.unique(predicted)) == 1
        if name in ("pearson", "spearmanr") and is_constant:
            assert np.isnan(score)


def test_splits_count_alike_whatever_their_size() -> None:
    mnli = get_task("mnli")
    right = Answers(np.zeros(9), np.zeros(9), np.zeros((9, 3)))
    wrong = Answers(np.zeros(3), np.ones(3), np.zeros((3, 3)))
    scores = score_splits(mnli, dict(zip(mnli.validation, (right, wrong), strict=True)))
    assert scores == {"accuracy": 1.0, "accuracy_mismatched": 0.0, "score": 0.5}


def test_scores_are_shares_of_the_experts_whichever_is_better() -> None:
    more, less = own_task(CLASSES, "accuracy"), own_task(NUMBERS, "mae", "mse")
    assert (higher_is_better(more), higher_is_better(less)) == (True, False)
    assert [relative(more, *pair) for pair in ((0.6, 0.8), (-0.1, 0.5), (0.5, 0.0))] == [
        pytest.approx(0.75),
        pytest.approx(-0.2),
        None,
    ]
    assert [relative(less, *pair) for pair in ((4.0, 2.0), (0.0, 0.0), (0.0, 1.0))] == [
        0.5,
        1,
        None,
    ]
    assert relative(more, None, 0.5) is relative(less, 0.5, None) is None
    tasks = {"more": more, "less": less, "none": more}
    assert averaged({"more": 0.5, "less": 0.1, "none": None}, tasks) == ["more"]


def test_what_cannot_be_scored_is_refused() -> None:
    with pytest.raises(UserError, match="not finite"):
        answers(get_task("rte"), np.full((2, 2), np.nan), np.array([0, 1]))
    with pytest.raises(UserError, match="no examples"):
        answers(get_task("rte"), np.zeros((0, 2)), np.zeros(0, dtype=np.int64))
