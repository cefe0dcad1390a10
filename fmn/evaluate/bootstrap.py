"""Bootstrap intervals of scores, and paired tests of the difference between two models.

Examples are drawn with replacement within each validation split (Efron and Tibshirani 1993, chapter
13, the percentile interval). The draws depend only on task, split and number of examples, so
resamples of two models on the same examples are paired, and those of two tasks are independent.
Resamples in which a metric is undefined are left out.
"""

import zlib
from collections.abc import Iterator, Mapping
from typing import NamedTuple, TypeVar

import numpy as np

from fmn.evaluate.metrics import (
    Answers,
    Splits,
    TaskAnswers,
    averaged,
    higher_is_better,
    listed_answers,
    score_splits,
    scores,
)
from fmn.tasks.kinds import REGRESSION
from fmn.tasks.task import Task

RESAMPLES = 1000
CHANCE = 0.05  # most resamples in which a model may be no better than a constant answer
_CHUNK = 1 << 20  # weights in memory at a time

Interval = tuple[float, float]


class Difference(NamedTuple):
    """One model's score minus another's, with its 95 % interval and two-sided p-value.

    Attributes:
        difference: None if one of the scores is undefined.
        interval: None if too few resamples define the difference.
        p_value: the p-value.
        higher_is_better: False if the scores are errors.
        is_floor: whether no resample has the other sign, so that the p-value is an upper bound.
    """

    difference: float | None
    interval: Interval | None
    p_value: float
    higher_is_better: bool = True
    is_floor: bool = False


def resampled(task: Task, splits: Splits, *, resamples: int = RESAMPLES) -> dict[str, np.ndarray]:
    """Every metric of the task by name and split, and "score", in each resample, [resamples].

    Undefined values are NaN. So are all values of a split with one row, whose resamples are equal.
    """

    def weights(split: str, examples: int) -> Iterator[np.ndarray]:
        random = np.random.default_rng([0, zlib.crc32(f"{task.name}/{split}".encode())])
        size = max(1, _CHUNK // examples)
        for start in range(0, resamples, size):
            count = min(size, resamples - start)
            rows = random.integers(examples, size=(count, examples))
            places = rows + examples * np.arange(count)[:, None]
            counts = np.bincount(places.ravel(), minlength=count * examples)
            yield counts.reshape(count, examples).astype(np.float64)

    values = scores(task, splits, weights)
    if min(len(answers.labels) for answers in splits.values()) == 1:
        return {name: np.full(resamples, np.nan) for name in values}
    return values


def interval(values: np.ndarray) -> Interval | None:
    """The 95 % percentile interval of a statistic's values in the resamples [R].

    Returns None if half of the values are NaN (undefined), or more.
    """
    defined = values[~np.isnan(values)]
    if 2 * len(defined) <= len(values):
        return None
    low, high = np.quantile(defined, [0.025, 0.975])
    return float(low), float(high)


def relative(task: Task, scores: np.ndarray, expert: np.ndarray) -> np.ndarray | None:
    """`metrics.relative` in each resample [R]; None if it is undefined in one of them.

    Args:
        task: the task.
        scores, expert: "score" of `resampled`, of a model and of the expert, [R].
    """
    part, whole = (scores, expert) if higher_is_better(task) else (expert, scores)
    return None if (whole <= 0).any() else part / whole


def draws(
    answers: Mapping[str, TaskAnswers], *, resamples: int = RESAMPLES
) -> dict[str, np.ndarray]:
    """A model's score in each resample, [resamples], by task."""
    return {n: resampled(*each, resamples=resamples)["score"] for n, each in answers.items()}


def compare(
    first: Mapping[str, TaskAnswers],
    second: Mapping[str, TaskAnswers],
    *,
    resamples: int = RESAMPLES,
    drawn: tuple[Mapping[str, np.ndarray], Mapping[str, np.ndarray]] | None = None,
) -> Difference:
    """Test the difference between two models in the score of a task, or in the mean over several.

    The mean is over the tasks where more is better and both scores are defined. The p-value is
    twice the share of paired resamples in which the difference does not have its sign; one resample
    is added, so that it is never 0 (Davison and Hinkley 1997, equation 4.11).

    Args:
        first, second: answers by task, on the same examples.
        resamples: number of resamples.
        drawn: the `draws` of both models, if they are known.

    Raises:
        ValueError: tasks or examples differ.
    """
    if first.keys() != second.keys() or not first:
        raise ValueError(f"tasks {', '.join(first)} and {', '.join(second)}: not the same")
    for name in first:
        labels = [
            {split: answers.labels.tolist() for split, answers in each[name].splits.items()}
            for each in (first, second)
        ]
        if labels[0] != labels[1]:
            raise ValueError(f"{name}: the two models did not answer the same examples")
    tasks = {name: answered.task for name, answered in first.items()}
    left, right = ({n: score_splits(*m[n])["score"] for n in tasks} for m in (first, second))
    names = list(tasks)
    if len(names) > 1:
        names = [name for name in averaged(left, tasks) if right[name] is not None]
    is_more_better = all(higher_is_better(tasks[name]) for name in names)
    pairs = [(left[name], right[name]) for name in names]
    values = [a - b for a, b in pairs if a is not None and b is not None]
    if not values:
        return Difference(None, None, 1.0, is_more_better)
    ours, theirs = drawn or (draws(m, resamples=resamples) for m in (first, second))
    differences = np.mean([ours[name] - theirs[name] for name in names], axis=0)  # [R]
    tail = min((differences <= 0).sum(), (differences >= 0).sum())
    count = (~np.isnan(differences)).sum()
    return Difference(
        difference=float(np.mean(values)),
        interval=interval(differences),
        p_value=min(1.0, 2 * float(tail + 1) / float(count + 1)),
        higher_is_better=is_more_better,
        is_floor=bool(count > 1 and tail == 0),
    )


Name = TypeVar("Name")


def holm(tests: Mapping[Name, Difference]) -> dict[Name, Difference]:
    """Apply Holm's correction for multiple tests to the p-values of several differences.

    The k-th smallest of m p-values is multiplied by m - k + 1, and is at least as large as the
    corrected ones before it (Holm 1979). The probability of one or more false positives then stays
    below the level. Undefined differences do not count.

    >>> tests = {p: Difference(0.1, None, p) for p in (0.01, 0.04, 0.03)}
    >>> [round(test.p_value, 2) for test in holm(tests).values()]
    [0.03, 0.06, 0.06]
    """
    corrected, largest = dict(tests), 0.0
    names = [name for name, test in tests.items() if test.difference is not None]
    for place, name in enumerate(sorted(names, key=lambda name: tests[name].p_value)):
        largest = max(largest, min(1.0, tests[name].p_value * (len(names) - place)))
        corrected[name] = tests[name]._replace(p_value=largest)
    return corrected


def at_chance(task: Task, splits: Splits) -> bool:
    """Whether a model is not significantly better, by the task's score, than a constant answer.

    The constant answer is the best for these examples: a class; some of the most frequent labels;
    the mean or the median. The test uses paired resamples (`CHANCE`, one-sided). If the score of
    the constant answer is undefined, as that of a correlation, it counts as 0.
    """
    sign = 1 if higher_is_better(task) else -1
    constants = [
        (sign * (score_splits(task, constant)["score"] or 0.0), constant)
        for constant in _constant_answers(task, splits)
    ]
    if not constants:
        return not task.generates
    _, best = max(constants, key=lambda pair: pair[0])
    own, other = (resampled(task, each)["score"] for each in (splits, best))
    gains = sign * (own - np.nan_to_num(other))
    gains = gains[~np.isnan(gains)]
    return not (len(gains) and np.quantile(gains, CHANCE) > 0)


def _constant_answers(task: Task, splits: Splits) -> Iterator[Splits]:
    if task.generates:  # the probabilities of a constant answer are not known
        return
    if task.task == "token-classification":
        tags = [tag for answers in splits.values() for text in answers.labels for tag in text]
        for tag in np.argsort(-np.bincount(tags or [0]), kind="stable")[:2]:
            yield {
                split: listed_answers(task, [[tag] * len(x) for x in each.labels], [*each.labels])
                for split, each in splits.items()
            }
        return
    labels = np.concatenate([answers.labels for answers in splits.values()])
    classes, counts = np.unique(labels, return_counts=True)
    constants = classes[np.argsort(-counts, kind="stable")][:2]  # no rarer class scores more
    if task.problem_type == REGRESSION:
        constants = np.array([labels.mean(dtype=np.float64), np.median(labels)])
    elif task.multi_label:
        rank = np.argsort(np.argsort(-labels.mean(axis=0), kind="stable"))  # by frequency
        constants = (rank < np.arange(len(rank) + 1)[:, None]).astype(int)  # [C + 1, C]
    for constant in constants:
        yield {
            split: Answers(np.full(each.labels.shape, constant), each.labels, 0 * each.scores)
            for split, each in splits.items()
        }
