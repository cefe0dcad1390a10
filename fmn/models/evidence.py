"""Judge from labelled rows which order of an expert's outputs is right, and whether one is.

Numbers alone: logits [N, C] in the order of the outputs, and the labels of the same N rows.
"""

import warnings
from collections.abc import Callable, Sequence
from math import exp, lgamma
from typing import NamedTuple

import numpy as np

from fmn.tasks.task import Task

CLEARLY = 0.001  # level of the tests by which rows contradict an order
CHANCE = 0.05  # an expert is better than guessing if the one-sided test is below this
# For a label, the rows that have it and that each output gets right as this label, bool [N, C].
Hits = Callable[[int], np.ndarray]


class Evidence(NamedTuple):
    """The evidence of rows for an order of the outputs: for each label, the output that is its own.

    Scores are the share of rows that are right; for several labels at once the share of labels
    that are found (R-precision); for regression the Pearson correlation, NaN if it is undefined.

    Attributes:
        best: the order with the highest score.
        scores: of the order, and of the best one.
        guess: what guessing scores.
        contradicts: whether the best order is clearly better, and better than guessing; for
            regression, whether the values clearly fall where the labels rise.
        is_chance: whether the order is no better than guessing, although a perfect one would be.
        is_telling: whether a perfect order could be told from guessing.
    """

    best: list[int]
    scores: tuple[float, float]
    guess: float
    contradicts: bool
    is_chance: bool
    is_telling: bool


def weigh(task: Task, logits: np.ndarray, truth: np.ndarray, order: Sequence[int]) -> Evidence:
    """Weigh the evidence of rows for an order of the outputs."""
    if task.regression:
        return _weigh_values(logits[:, 0], truth)
    now = np.array(order)
    hits = _hits(task, logits, truth)
    best = _best(hits, now)
    total = int(truth.sum()) if task.multi_label else len(truth)
    right, right_at_best = (int(_right(hits, each).sum()) for each in (now, best))
    # With several labels per row, each label takes as many rows as have it.
    outputs = logits.argmax(axis=1)
    guesses = [
        _guessed(task, truth if task.multi_label else np.argsort(each)[outputs], truth)
        for each in (now, best)
    ]
    is_telling = _one_sided(total, total, guesses[0]) < CHANCE
    is_best_chance = _one_sided(right_at_best, total, guesses[1]) >= CHANCE
    return Evidence(
        best=best.tolist(),
        scores=(right / max(total, 1), right_at_best / max(total, 1)),
        guess=guesses[0],
        contradicts=not is_best_chance and _is_clearly_better(hits, best, now),
        is_chance=is_telling and _one_sided(right, total, guesses[0]) >= CHANCE,
        is_telling=is_telling,
    )


def _guessed(task: Task, answers: np.ndarray, truth: np.ndarray) -> float:
    """The share of rows that guessing gets right.

    Guessing means: always answer the most frequent label. If the task's metric is a Matthews
    correlation, for which that is useless: answer each label as often as these answers do (Cohen
    1960, the expected agreement of kappa). For several labels at once: draw the rows of each
    answered label at random.
    """
    if task.multi_label:
        answered, present = answers.sum(axis=0), truth.sum(axis=0)  # [C]
        return float(np.dot(answered, present) / max(len(truth) * answered.sum(), 1))
    answered, present = (
        np.bincount(each, minlength=task.num_outputs) / len(truth) for each in (answers, truth)
    )
    is_matthews = "matthews_correlation" in task.metrics
    return float(np.dot(answered, present) if is_matthews else max(present))


def _hits(task: Task, logits: np.ndarray, truth: np.ndarray) -> Hits:
    """The rows that each output gets right as a label.

    With one label per row: the rows where the output is the largest. With several labels at once:
    the k rows where the output has its largest values, for a label that k rows have.
    """
    if task.multi_label:
        from scipy.stats import rankdata

        ranks, has_label = rankdata(-logits, method="max", axis=0), truth.astype(bool)  # [N, C]
        return lambda label: has_label[:, [label]] & (ranks <= has_label[:, label].sum())
    is_answer = logits.argmax(axis=1)[:, None] == np.arange(logits.shape[1])  # [N, C]
    return lambda label: (truth == label)[:, None] & is_answer


def _right(hits: Hits, order: np.ndarray) -> np.ndarray:
    """The number of labels of each row that an order gets right, int [N]."""
    columns = np.stack([hits(label)[:, output] for label, output in enumerate(order)])  # [C, N]
    right: np.ndarray = columns.sum(axis=0, dtype=int)
    return right


def _best(hits: Hits, order: np.ndarray, rows: slice = slice(None)) -> np.ndarray:
    """The order that has most of the rows right; of equals, one that changes `order` least."""
    from scipy.optimize import linear_sum_assignment

    counts = np.stack([hits(label)[rows].sum(axis=0) for label in range(len(order))])
    is_now = np.arange(len(order)) == order[:, None]
    best: np.ndarray = linear_sum_assignment(counts * (len(order) + 1) + is_now, maximize=True)[1]
    return best


def _is_clearly_better(hits: Hits, best: np.ndarray, order: np.ndarray) -> bool:
    """Whether another order gets clearly more rows right, by McNemar's exact test, one-sided.

    The test is done twice. On all rows, its p-value is multiplied by the number of other orders
    (Bonferroni), which is too many if there are many labels. So half of the rows also choose the
    best order, and the other half test it.
    """

    def p_value(better: np.ndarray, rows: slice) -> float:
        gain = (_right(hits, better) - _right(hits, order))[rows]
        return _one_sided(int((gain > 0).sum()), int((gain != 0).sum()), 0.5)

    others = exp(min(lgamma(len(order) + 1), 700)) - 1
    half = _best(hits, order, slice(0, None, 2))
    p_values = (p_value(best, slice(None)) * others, p_value(half, slice(1, None, 2)))
    return 2 * min(p_values) < CLEARLY and not np.array_equal(best, order)


def _one_sided(hits: int, trials: int, share: float) -> float:
    """The probability of so many hits or more, if each has the probability `share`."""
    from scipy.stats import binomtest

    return float(binomtest(hits, trials, share, alternative="greater").pvalue) if trials else 1.0


def _weigh_values(values: np.ndarray, truth: np.ndarray) -> Evidence:
    """The evidence of numbers: Pearson's r, and the probability of such an r by chance."""
    from scipy.stats import pearsonr

    r, p_value = float("nan"), float("nan")
    if len(truth) > 2:
        with warnings.catch_warnings(action="ignore"):  # SciPy warns of constant values
            test = pearsonr(values.astype(float), truth.astype(float), alternative="greater")
        r, p_value = float(test.statistic), float(test.pvalue)
    return Evidence(
        best=[0],
        scores=(r, -r),
        guess=0.0,
        contradicts=1 - p_value < CLEARLY,
        is_chance=p_value >= CHANCE,
        is_telling=not np.isnan(p_value),
    )
