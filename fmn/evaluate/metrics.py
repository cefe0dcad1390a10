"""The table of metrics. Each is computed for many resamples of the examples at once.

A resample is a weight per example: how often it was drawn. The plain score is the one resample that
holds every example once.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Literal, NamedTuple

import numpy as np

from fmn.errors import UserError
from fmn.tasks.task import Task


class Answers(NamedTuple):
    """A model's answers to N examples, and the right ones: class ids or values, each [N]."""

    predicted: np.ndarray
    labels: np.ndarray


Splits = Mapping[str, Answers]
"""A model's answers on a task, by validation split."""


class Metric(NamedTuple):
    """A metric; `compute` maps weights [R, N] whose rows sum to N, and answers, to values [R]."""

    compute: Callable[[np.ndarray, Answers], np.ndarray]
    kind: Literal["classes", "numbers"]
    higher_is_better: bool = True


def answers(task: Task, logits: np.ndarray, labels: np.ndarray) -> Answers:
    """The answers that a model's outputs stand for.

    Args:
        task: the task.
        logits: outputs in the task's order, [N, C]; C is 1 for regression.
        labels: class ids, or values of a regression task, [N].

    Raises:
        UserError: there are no examples, or an output is not finite.
    """
    if not len(labels):
        raise UserError(f"{task.name}: there are no examples to score; give a split with rows")
    if not np.isfinite(logits).all():
        raise UserError(f"{task.name}: the model's outputs are not finite; give another model")
    return Answers(logits[:, 0] if task.regression else logits.argmax(axis=1), labels)


def score(task: Task, logits: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """A model's metrics on a task by name, and "score", their mean; arguments as of `answers`.

    Correlations lie between -1 and 1, and are 0 where a side is constant; other metrics between 0
    and 1.

    >>> score(get_task("mrpc"), np.array([[2.0, 1.0], [0.0, 3.0]]), np.array([0, 1]))
    {'accuracy': 1.0, 'f1': 1.0, 'score': 1.0}
    """
    return score_splits(task, {task.validation[0]: answers(task, logits, labels)})


def score_splits(task: Task, splits: Splits) -> dict[str, float]:
    """The metrics by name and split, and "score": the mean over splits of the mean over metrics."""
    values = scores(task, splits, lambda split, count: [np.ones((1, count))])
    return {name: float(value[0]) for name, value in values.items()}


def scores(
    task: Task, splits: Splits, weights: Callable[[str, int], Iterable[np.ndarray]]
) -> dict[str, np.ndarray]:
    """What `score_splits` gives, in each of R resamples, [R].

    Args:
        task: the task.
        splits: answers by split.
        weights: from a split and its N examples to chunks of the resamples' weights, [r, N].
    """
    named: dict[str, np.ndarray] = {}
    means = []
    for split, answers in splits.items():
        chunks = [
            np.stack([METRICS[name].compute(chunk, answers) for name in task.metrics])
            for chunk in weights(split, len(answers.labels))
        ]
        values = np.concatenate(chunks, axis=1)  # [metrics, R]
        suffix = task.suffix(split)
        named |= {name + suffix: row for name, row in zip(task.metrics, values, strict=True)}
        means.append(values.mean(axis=0))
    return {**named, "score": np.mean(means, axis=0)}


def _accuracy(weights: np.ndarray, answers: Answers) -> np.ndarray:
    accuracy: np.ndarray = weights @ (answers.predicted == answers.labels) / weights.shape[1]
    return accuracy


def _f1(weights: np.ndarray, answers: Answers) -> np.ndarray:
    """F1 of class 1; 0 where it is neither predicted nor among the labels."""
    predicted, labels = answers.predicted == 1, answers.labels == 1
    both, sizes = weights @ (predicted & labels), weights @ (1.0 * predicted + labels)
    f1: np.ndarray = np.divide(2 * both, sizes, out=np.zeros_like(both), where=sizes > 0)
    return f1


def _matthews(weights: np.ndarray, answers: Answers) -> np.ndarray:
    """Matthews correlation of any number of classes (Gorodkin 2004); 0 where a side is constant."""
    classes, total = np.union1d(answers.labels, answers.predicted), float(weights.shape[1])
    labels = weights @ (answers.labels[:, None] == classes)  # [R, C]
    predicted = weights @ (answers.predicted[:, None] == classes)  # [R, C]
    correct = weights @ (answers.predicted == answers.labels)  # [R]
    covariance = correct * total - (labels * predicted).sum(axis=1)
    product = (total**2 - (labels**2).sum(axis=1)) * (total**2 - (predicted**2).sum(axis=1))
    matthews: np.ndarray = np.zeros_like(covariance)
    np.divide(covariance, np.sqrt(product), out=matthews, where=product > 0)
    return matthews


def _pearson(weights: np.ndarray, answers: Answers) -> np.ndarray:
    return _correlation(weights, *(side.astype(np.float64) for side in answers))


def _spearman(weights: np.ndarray, answers: Answers) -> np.ndarray:
    return _correlation(weights, *(_ranks(weights, side) for side in answers))


def _ranks(weights: np.ndarray, values: np.ndarray) -> np.ndarray:
    """The rank of each example's value in each resample, ties at their mean rank, [R, N].

    A value that is drawn c times, after b smaller ones, has the ranks b+1 to b+c.
    """
    distinct, group = np.unique(values, return_inverse=True)
    order = np.argsort(group, kind="stable")
    starts = np.searchsorted(group[order], np.arange(len(distinct)))
    counts = np.add.reduceat(weights[:, order], starts, axis=1)  # [R, distinct values]
    mean_ranks: np.ndarray = counts.cumsum(axis=1) - (counts - 1) / 2
    return mean_ranks[:, group]


def _correlation(weights: np.ndarray, left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Pearson's, of values [N] or [R, N]; 0 where a side is constant, to rounding."""
    count, sides, is_constant = weights.shape[1], [], np.zeros(len(weights), dtype=bool)
    for values in (left, right):
        deviations = values - (weights * values).sum(axis=1, keepdims=True) / count  # [R, N]
        spread = (weights * deviations**2).sum(axis=1)  # [R]
        is_constant |= spread <= count * (1e-12 * np.abs(values).max(initial=0.0)) ** 2
        sides.append(deviations / np.sqrt(np.where(spread > 0, spread, 1))[:, None])
    return np.where(is_constant, 0.0, (weights * sides[0] * sides[1]).sum(axis=1))


METRICS: Mapping[str, Metric] = {
    "accuracy": Metric(_accuracy, "classes"),
    "f1": Metric(_f1, "classes"),
    "matthews_correlation": Metric(_matthews, "classes"),
    "pearson": Metric(_pearson, "numbers"),
    "spearmanr": Metric(_spearman, "numbers"),
}
