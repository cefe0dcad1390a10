"""How certain a score is: bootstrap intervals, and paired tests of the difference of two models.

Examples are drawn with replacement within each validation split (Efron and Tibshirani 1993, chapter
13, the percentile interval). The draws depend on seed, task, split and number of examples alone:
resamples of two models on the same examples are paired, and those of two tasks are independent.
"""

import zlib
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import numpy as np

from fmn.evaluate.metrics import Splits, score_splits, scores
from fmn.tasks.task import Task, get_task

RESAMPLES = 1000
_CHUNK = 1 << 20  # weights in memory at a time


class Difference(NamedTuple):
    """One model's score minus another's, its 95 % interval and its two-sided p-value."""

    difference: float
    interval: tuple[float, float]
    p_value: float


def resampled(
    task: Task, splits: Splits, *, resamples: int = RESAMPLES, seed: int = 0
) -> dict[str, np.ndarray]:
    """Every metric of the task by name and split, and "score", in each resample, [resamples]."""

    def weights(split: str, examples: int) -> Iterator[np.ndarray]:
        random = np.random.default_rng([seed, zlib.crc32(f"{task.name}/{split}".encode())])
        size = max(1, _CHUNK // examples)
        for start in range(0, resamples, size):
            count = min(size, resamples - start)
            rows = random.integers(examples, size=(count, examples))
            places = rows + examples * np.arange(count)[:, None]
            counts = np.bincount(places.ravel(), minlength=count * examples)
            yield counts.reshape(count, examples).astype(np.float64)

    return scores(task, splits, weights)


def interval(values: np.ndarray) -> tuple[float, float]:
    """The 95 % percentile interval of a statistic's values in the resamples [R]."""
    low, high = np.quantile(values, [0.025, 0.975])
    return float(low), float(high)


def relative(scores: np.ndarray, expert: np.ndarray) -> np.ndarray | None:
    """The share of the expert's score in each resample [R]; None if one of those is not above zero.

    Both come from `resampled` with the same seed.
    """
    return scores / expert if (expert > 0).all() else None


def draws(
    answers: Mapping[str, Splits], *, resamples: int = RESAMPLES, seed: int = 0
) -> dict[str, np.ndarray]:
    """A model's score in each resample, [resamples], by task."""
    return {
        name: resampled(get_task(name), splits, resamples=resamples, seed=seed)["score"]
        for name, splits in answers.items()
    }


def compare(
    first: Mapping[str, Splits],
    second: Mapping[str, Splits],
    *,
    resamples: int = RESAMPLES,
    seed: int = 0,
    drawn: tuple[Mapping[str, np.ndarray], Mapping[str, np.ndarray]] | None = None,
) -> Difference:
    """How two models differ in score, in the mean over tasks, from their answers by task.

    The p-value is twice the share of (paired) resamples in which the difference has not its sign;
    one more is counted, so that it is never 0 (Davison and Hinkley 1997, equation 4.11).

    Args:
        first, second: answers on the same examples; ValueError if tasks or examples differ.
        resamples, seed: of the draws.
        drawn: the models' `draws` with these resamples and seed, where they are known.
    """
    if first.keys() != second.keys() or not first:
        raise ValueError(f"tasks {', '.join(first)} and {', '.join(second)}: not the same")
    for name in first:
        labels = [{k: v.labels.tolist() for k, v in each[name].items()} for each in (first, second)]
        if labels[0] != labels[1]:
            raise ValueError(f"{name}: the two models did not answer the same examples")
    left, right = drawn or (draws(m, resamples=resamples, seed=seed) for m in (first, second))
    differences = np.mean([left[name] - right[name] for name in first], axis=0)  # [R]
    means = [
        np.mean([score_splits(get_task(name), splits)["score"] for name, splits in each.items()])
        for each in (first, second)
    ]
    tail = min((differences <= 0).sum(), (differences >= 0).sum())
    return Difference(
        difference=float(means[0] - means[1]),
        interval=interval(differences),
        p_value=min(1.0, 2 * float(tail + 1) / (len(differences) + 1)),
    )
