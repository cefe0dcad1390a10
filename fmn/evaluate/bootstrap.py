"""How certain a score is: bootstrap intervals of GLUE's metrics, and paired tests of the difference of two models.

Examples are drawn with replacement (Efron and Tibshirani 1993, chapter 13, the percentile interval), within each
validation split by itself. A resample is a weight for each example, how often it was drawn, so that all resamples are
scored together. The draws depend on seed, task, split and number of examples alone: resamples of two models on the
same examples are paired, and those of two tasks are independent.
"""

import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import NamedTuple

import numpy as np

from fmn.tasks import task as tasks
from fmn.tasks.task import Task

RESAMPLES = 1000
LEVEL = 0.95
_CHUNK = 1 << 20  # weights that are held at a time


class Answers(NamedTuple):
    """A model's answers on N examples, and what is right: class ids in the task's order, or values; each [N]."""

    predicted: np.ndarray
    labels: np.ndarray


Splits = Mapping[str, Answers]
"""A model's answers on a task, by validation split."""


@dataclass(frozen=True)
class Difference:
    """One model's score less another's on the same examples.

    `interval`: 95 % bootstrap interval of the difference. `p_value`: two-sided, from the same resamples.
    `mcnemar`: p-value of McNemar's exact test, for a single task that is scored by accuracy alone.
    """

    difference: float
    interval: tuple[float, float]
    p_value: float
    mcnemar: float | None


def resampled(
    task: Task, splits: Splits, *, resamples: int = RESAMPLES, seed: int = 0
) -> dict[str, np.ndarray]:
    """Every metric of the task (with the suffix of its split) and "score" in each resample, float64 [resamples].

    The score is the mean over splits of the mean over metrics, as in `fmn.evaluate`.
    """
    found: dict[str, np.ndarray] = {}
    scores = []
    for split, answers in splits.items():
        _check(task, answers)
        chunks = [
            [METRICS[name](weights, answers) for name in task.metrics]
            for weights in _draws(seed, task, split, len(answers.labels), resamples)
        ]
        values = np.concatenate(chunks, axis=1)  # [metrics, resamples]
        found |= {
            name + task.suffix(split): row for name, row in zip(task.metrics, values, strict=True)
        }
        scores.append(values.mean(axis=0))
    return {**found, "score": np.mean(scores, axis=0)}


def score(task: Task, splits: Splits) -> float:
    """The task's score of the examples themselves."""
    return float(
        np.mean(
            [
                METRICS[name](np.ones((1, len(a.labels))), a)
                for a in splits.values()
                for name in task.metrics
            ]
        )
    )


def interval(values: np.ndarray, level: float = LEVEL) -> tuple[float, float]:
    """The percentile interval of a statistic's values in the resamples [R]."""
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def relative(scores: np.ndarray, expert: np.ndarray) -> np.ndarray | None:
    """The share of the expert's score in each resample [R]; None where the expert scores zero or less in one of them.

    Both come from `resampled` with the same seed.
    """
    return scores / expert if (expert > 0).all() else None


def macro(scores: Mapping[str, np.ndarray]) -> np.ndarray:
    """The mean over tasks in each resample [R], of scores or shares by task; tasks are resampled independently."""
    mean: np.ndarray = np.mean(list(scores.values()), axis=0)
    return mean


def draws(
    answers: Mapping[str, Splits], *, resamples: int = RESAMPLES, seed: int = 0
) -> dict[str, np.ndarray]:
    """A model's score in each resample, float64 [resamples], by task."""
    return {
        name: resampled(tasks.task(name), splits, resamples=resamples, seed=seed)["score"]
        for name, splits in answers.items()
    }


def compare(
    one: Mapping[str, Splits],
    other: Mapping[str, Splits],
    *,
    resamples: int = RESAMPLES,
    seed: int = 0,
    drawn: tuple[Mapping[str, np.ndarray], Mapping[str, np.ndarray]] | None = None,
) -> Difference:
    """How two models differ in score, in the mean over tasks, from their answers by task on the same examples.

    `drawn`: what `draws` gives for the two with the same resamples and seed, where it is known already.

    The p-value is twice the share of resamples (paired) in which the difference is not of its sign, counted with one
    more so that it is never 0 (Davison and Hinkley 1997, equation 4.11). ValueError where examples differ.
    """
    if one.keys() != other.keys() or not one:
        raise ValueError(f"tasks {', '.join(one)} and {', '.join(other)}: not the same")
    for name in one:
        same = one[name].keys() == other[name].keys() and all(
            np.array_equal(one[name][split].labels, other[name][split].labels)
            for split in one[name]
        )
        if not same:
            raise ValueError(f"{name}: the two models did not answer the same examples")
    first, second = drawn or (draws(each, resamples=resamples, seed=seed) for each in (one, other))
    differences = macro({name: first[name] - second[name] for name in one})
    points = [
        np.mean([score(tasks.task(name), splits) for name, splits in each.items()])
        for each in (one, other)
    ]
    tail = min((differences <= 0).sum(), (differences >= 0).sum())
    return Difference(
        difference=float(points[0] - points[1]),
        interval=interval(differences),
        p_value=min(1.0, 2 * float(tail + 1) / (len(differences) + 1)),
        mcnemar=_mcnemar(one, other),
    )


def _mcnemar(one: Mapping[str, Splits], other: Mapping[str, Splits]) -> float | None:
    """The exact test of McNemar 1947: of the examples that one model alone has right, is it half either way?"""
    (name, splits), *more = one.items()
    if more or tasks.task(name).metrics != ("accuracy",):
        return None
    from scipy.stats import binomtest

    right, wrong = 0, 0
    for split, answers in splits.items():
        first, second = (each.predicted == each.labels for each in (answers, other[name][split]))
        right += int((first & ~second).sum())
        wrong += int((second & ~first).sum())
    return float(binomtest(right, right + wrong).pvalue) if right + wrong else 1.0


def _check(task: Task, answers: Answers) -> None:
    predicted, labels = answers
    if predicted.shape != labels.shape or predicted.ndim != 1 or not len(labels):
        raise ValueError(f"{task.name}: {predicted.shape} predictions for {labels.shape} labels")


def _draws(
    seed: int, task: Task, split: str, examples: int, resamples: int
) -> Iterator[np.ndarray]:
    """How often each example is drawn, float64 [some resamples, N], until there are all resamples."""
    random = np.random.default_rng([seed, zlib.crc32(f"{task.name}/{split}".encode())])
    size = max(1, _CHUNK // examples)
    for start in range(0, resamples, size):
        count = min(size, resamples - start)
        places = (
            random.integers(examples, size=(count, examples)) + examples * np.arange(count)[:, None]
        )
        drawn = np.bincount(places.ravel(), minlength=count * examples)
        yield drawn.reshape(count, examples).astype(np.float64)  # [count, N]


# ---- the metrics of weighted examples: weights [R, N], whose rows sum to N, to values [R] ----


def _accuracy(weights: np.ndarray, answers: Answers) -> np.ndarray:
    right: np.ndarray = weights @ (answers.predicted == answers.labels) / weights.shape[1]
    return right


def _f1(weights: np.ndarray, answers: Answers) -> np.ndarray:
    """Of class 1; 0 where it is neither there nor predicted."""
    predicted, labels = answers.predicted == 1, answers.labels == 1
    both, either = weights @ (predicted & labels), weights @ (1.0 * predicted + labels)
    f1: np.ndarray = np.divide(2 * both, either, out=np.zeros_like(both), where=either > 0)
    return f1


def _matthews(weights: np.ndarray, answers: Answers) -> np.ndarray:
    """Of any number of classes (Gorodkin 2004); 0 where all labels, or all predictions, are one class."""
    classes = np.union1d(answers.labels, answers.predicted)
    total = float(weights.shape[1])
    labels = weights @ (answers.labels[:, None] == classes)  # [R, C]
    predicted = weights @ (answers.predicted[:, None] == classes)  # [R, C]
    right = weights @ (answers.predicted == answers.labels)
    product = (total**2 - (labels**2).sum(axis=1)) * (total**2 - (predicted**2).sum(axis=1))
    covariance = right * total - (labels * predicted).sum(axis=1)
    matthews: np.ndarray = np.divide(
        covariance, np.sqrt(product), out=np.zeros_like(covariance), where=product > 0
    )
    return matthews


def _pearson(weights: np.ndarray, answers: Answers) -> np.ndarray:
    return _correlation(
        weights, answers.predicted.astype(np.float64), answers.labels.astype(np.float64)
    )


def _spearman(weights: np.ndarray, answers: Answers) -> np.ndarray:
    return _correlation(
        weights, _ranks(weights, answers.predicted), _ranks(weights, answers.labels)
    )


def _ranks(weights: np.ndarray, values: np.ndarray) -> np.ndarray:
    """The rank of each example's value within each resample, ties at their mean rank, [R, N].

    Exact without sorting each resample: a value that is drawn c times after b smaller ones has the ranks b+1 to b+c.
    """
    distinct, group = np.unique(values, return_inverse=True)
    order = np.argsort(group, kind="stable")
    starts = np.searchsorted(group[order], np.arange(len(distinct)))
    counts = np.add.reduceat(weights[:, order], starts, axis=1)  # [R, distinct values]
    middle = counts.cumsum(axis=1) - (counts - 1) / 2
    ranks: np.ndarray = middle[:, group]
    return ranks


def _correlation(weights: np.ndarray, one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Pearson's, of values [N] or [R, N]; 0 where either side is constant, to rounding."""
    centred, constant = [], np.zeros(len(weights), dtype=bool)
    for values in (one, other):
        deviations = (
            values - (weights * values).sum(axis=1, keepdims=True) / weights.shape[1]
        )  # [R, N]
        spread = (weights * deviations**2).sum(axis=1)
        constant |= spread <= weights.shape[1] * (1e-12 * np.abs(values).max(initial=0.0)) ** 2
        centred.append(deviations / np.sqrt(np.where(spread > 0, spread, 1))[:, None])
    return np.where(constant, 0.0, (weights * centred[0] * centred[1]).sum(axis=1))


METRICS: Mapping[str, Callable[[np.ndarray, Answers], np.ndarray]] = MappingProxyType(
    {
        "accuracy": _accuracy,
        "f1": _f1,
        "matthews_correlation": _matthews,
        "pearson": _pearson,
        "spearmanr": _spearman,
    }
)
