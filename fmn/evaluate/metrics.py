"""The table of metrics, each computed for many resamples of the examples at once.

A resample is a weight for each example: the number of times that it was drawn. The plain score is
that of the resample with every example once. Metrics are defined as in scikit-learn and SciPy. An
undefined metric is NaN in arrays of resamples, and None elsewhere.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from fmn.errors import UserError
from fmn.tasks.batches import IGNORED
from fmn.tasks.metrics import METRICS
from fmn.tasks.spans import groups, split_label
from fmn.tasks.task import Task


class Answers(NamedTuple):
    """A model's answers to N examples, and the right answers.

    Attributes:
        predicted: class ids [N]; zeros and ones for each of several labels [N, C]; values [N]; for
            tags, lists of ids [N] with an id for each word; for generated texts, the number of
            tokens that are the model's first choice [N].
        labels: the right answers in the same form; for generated texts, the number of tokens.
        scores: probabilities [N, C]; for regression, the values [N, 1]; for embeddings, the cosines
            [N, 1]; for generated texts, the sum of the tokens' cross entropies [N, 1]; for tags,
            the numbers of spans that are right, predicted, and labelled [N, 3].
    """

    predicted: np.ndarray
    labels: np.ndarray
    scores: np.ndarray


Splits = Mapping[str, Answers]
"""A model's answers on a task, by validation split."""


class TaskAnswers(NamedTuple):
    """A model's answers on a task, and the definition of the task."""

    task: Task
    splits: Splits


def answers(task: Task, logits: np.ndarray, labels: np.ndarray) -> Answers:
    """Convert a model's outputs to answers.

    Args:
        task: the task.
        logits: outputs in the task's order, [N, C]; C is 1 for regression; for tags [N, T, C]. For
            generated texts, the output of `fmn.models.predict.token_scores`, [N, 3].
        labels: class ids or values [N], or zeros and ones [N, C]. For embeddings, the labels twice,
            [2N]; for tags, the position and the tag of each word, [N, W, 2], as
            `fmn.tasks.encoding.encode` returns them for rows to be scored.

    Raises:
        UserError: there are no examples, or an output is not finite.
    """
    from scipy import special

    if not len(labels):
        raise UserError(f"{task.name}: there are no examples to score; give a split with rows")
    if not np.isfinite(logits).all():
        raise UserError(f"{task.name}: the model's outputs are not finite; give another model")
    if task.loss == "embedding":  # of all texts, then of all pairs
        texts, pairs = np.split(logits, 2)
        cosine = np.einsum("nd,nd->n", texts, pairs)
        return Answers(cosine, labels[: len(cosine)], cosine[:, None])
    if task.task == "token-classification":
        return _tags(task, logits, labels)
    if task.regression:
        return Answers(logits[:, 0], labels, logits)
    if task.generates:
        losses, tokens, right = logits.astype(np.float64).T
        return Answers(right.astype(np.int64), tokens.astype(np.int64), losses[:, None])
    if task.multi_label:
        scores = special.expit(logits)
        return Answers((scores >= task.threshold).astype(np.int64), labels.astype(np.int64), scores)
    return Answers(logits.argmax(axis=1), labels, special.softmax(logits, axis=1))


def _tags(task: Task, logits: np.ndarray, labels: np.ndarray) -> Answers:
    """The tag of every word; a word beyond the limit has the tag O, or -1 if there is no O."""
    outside = task.labels.index("O") if "O" in task.labels else -1
    best = logits.argmax(axis=-1)  # [N, T]
    predicted, right = [], []
    for own, words in zip(best, labels, strict=True):
        places, tags = words[words[:, 1] != IGNORED].T
        answered = np.where(places < 0, outside, own[places] if len(own) else outside)
        predicted.append(answered.tolist())
        right.append(tags.tolist())
    return listed_answers(task, predicted, right)


def listed_answers(
    task: Task, predicted: Sequence[Any], labels: Sequence[Any], scores: Sequence[Any] = ()
) -> Answers:
    """Make answers of lists from a file; for tags, the spans are counted."""
    if task.task != "token-classification":
        return Answers(np.array(predicted), np.array(labels), np.array(scores))
    sides = _lists(predicted), _lists(labels)
    counts = np.zeros((len(labels), 3))
    if "seqeval_f1" in task.metrics:
        spans = [[_spans(["O" if tag < 0 else task.labels[tag] for tag in x]) for x in side]
                 for side in sides]  # fmt: skip
        counts[:] = [[len(p & r), len(p), len(r)] for p, r in zip(*spans, strict=True)]
    return Answers(*sides, scores=counts)


def _spans(tags: Sequence[str]) -> set[tuple[str, int, int]]:
    """The entity, the first and the last word of each span."""
    return {
        (split_label(tags[group[0]])[1], group[0], group[-1])
        for group in groups(tags, has_outside=True)
    }


def _lists(lists: Sequence[Any]) -> np.ndarray:
    """An array of lists of ids, [N]."""
    array = np.empty(len(lists), dtype=object)
    array[:] = [[int(tag) for tag in tags] for tags in lists]
    return array


def higher_is_better(task: Task) -> bool:
    """Whether more is better in a task's score."""
    return METRICS[task.metrics[0]].higher_is_better


def averaged(scores: Mapping[str, float | None], tasks: Mapping[str, Task]) -> list[str]:
    """The tasks of a mean score: those where more is better and the score is defined."""
    return [n for n, value in scores.items() if value is not None and higher_is_better(tasks[n])]


def relative(task: Task, score: float | None, expert: float | None) -> float | None:
    """A score divided by the expert's; for errors, the expert's error divided by this one.

    Returns None if a score is undefined, or if the divisor is not positive.
    """
    if score is None or expert is None:
        return None
    part, whole = (score, expert) if higher_is_better(task) else (expert, score)
    if whole > 0:
        return part / whole
    return 1.0 if part == whole == 0 and not higher_is_better(task) else None


def score_splits(task: Task, splits: Splits) -> dict[str, float | None]:
    """The metrics by name and split, and "score": the mean over splits of the mean over metrics.

    An undefined metric is None. If one is, the score is undefined too.

    >>> right = Answers(np.array([0, 1]), np.array([0, 1]), np.eye(2))
    >>> score_splits(get_task("mrpc"), {"validation": right})
    {'accuracy': 1.0, 'f1': 1.0, 'score': 1.0}
    """
    values = scores(task, splits, lambda split, count: [np.ones((1, count))])
    return {name: None if np.isnan(draw[0]) else float(draw[0]) for name, draw in values.items()}


def scores(
    task: Task, splits: Splits, weights: Callable[[str, int], Iterable[np.ndarray]]
) -> dict[str, np.ndarray]:
    """The metrics of `score_splits` in each of R resamples, [R]; NaN where undefined.

    Args:
        task: the task.
        splits: answers by split.
        weights: a function of a split and its number of examples N, that returns the resamples'
            weights in chunks [r, N].
    """
    named: dict[str, np.ndarray] = {}
    means = []
    for split, answers in splits.items():
        chunks = [
            np.stack([COMPUTE[name](chunk, answers) for name in task.metrics])
            for chunk in weights(split, len(answers.labels))
        ]
        values = np.concatenate(chunks, axis=1)  # [metrics, R]
        suffix = task.suffix(split)
        named |= {name + suffix: row for name, row in zip(task.metrics, values, strict=True)}
        in_score = [name in task.score_metrics for name in task.metrics]
        means.append(values[in_score].mean(axis=0))
    return {**named, "score": np.mean(means, axis=0)}


# ---- counts: of classes, or of the labels of multi-label classification ----


def _ratio(part: np.ndarray, whole: np.ndarray, otherwise: float = np.nan) -> np.ndarray:
    """The quotient; `otherwise` where the whole is zero."""
    quotient: np.ndarray = np.full(part.shape, otherwise)
    np.divide(part, whole, out=quotient, where=whole > 0)
    return quotient


def _counts(weights: np.ndarray, answers: Answers) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Counts of each label's right predictions, predictions, and occurrences: each [R, C].

    The classes of single-label classification are those that are predicted or occur.
    """
    sides = (answers.predicted, answers.labels)
    if answers.labels.ndim == 1:
        classes = np.union1d(*sides)
        predicted, labels = (side[:, None] == classes for side in sides)  # [N, C]
    else:
        predicted, labels = (side > 0 for side in sides)
    return (
        weights @ (1.0 * predicted * labels),
        weights @ (1.0 * predicted),
        weights @ (1.0 * labels),
    )


def _accuracy(weights: np.ndarray, answers: Answers) -> np.ndarray:
    """The share of right examples, or words; with several labels, all of them must be right."""
    if answers.labels.dtype == object:  # lists of tags
        pairs = zip(answers.predicted, answers.labels, strict=True)
        right = [float(np.equal(*pair).sum()) for pair in pairs]
        return _ratio(weights @ right, weights @ [float(len(tags)) for tags in answers.labels])
    is_right = answers.predicted == answers.labels
    is_right = is_right if is_right.ndim == 1 else is_right.all(axis=1)
    accuracy: np.ndarray = weights @ is_right / weights.shape[1]
    return accuracy


def _balanced_accuracy(weights: np.ndarray, answers: Answers) -> np.ndarray:
    """The mean recall of the classes among the labels."""
    hits, _, present = _counts(weights, answers)
    return _ratio(_ratio(hits, present, 0.0).sum(axis=1), (present > 0).sum(axis=1))


def _class_one(weights: np.ndarray, answers: Answers, metric: str) -> np.ndarray:
    """Precision, recall or F1 of class 1; undefined where it does not occur.

    The precision of a model that never predicts class 1, although it occurs, is 0.
    """
    predicted, labels = ((side == 1)[:, None] for side in answers[:2])
    counts = _counts(weights, Answers(predicted, labels, answers.scores))
    hits, predictions, present = (count[:, 0] for count in counts)
    if metric == "recall":
        return _ratio(hits, present)
    f1 = _ratio(2 * hits, predictions + present)
    return f1 if metric == "f1" else np.where(np.isnan(f1), f1, _ratio(hits, predictions, 0.0))


def _f1(weights: np.ndarray, answers: Answers, average: str) -> np.ndarray:
    """F1 of the sum of all counts (micro), or the mean of each, plain (macro) or weighted.

    The plain mean leaves out a class that does not occur; a label that does not occur counts 0.
    """
    hits, predictions, present = _counts(weights, answers)
    sizes = predictions + present
    if average == "micro":
        return _ratio(2 * hits.sum(axis=1), sizes.sum(axis=1))
    shares = (sizes > 0) | ((answers.labels.ndim > 1) & (sizes.sum(axis=1, keepdims=True) > 0))
    shares = present if average == "weighted" else 1.0 * shares
    f1 = _ratio(2 * hits, sizes, 0.0)
    return _ratio((f1 * shares).sum(axis=1), shares.sum(axis=1))


def _matthews(weights: np.ndarray, answers: Answers) -> np.ndarray:
    """Matthews correlation of any number of classes (Gorodkin 2004); 0 for a constant answer."""
    hits, predictions, present = _counts(weights, answers)
    total = float(weights.shape[1])
    covariance = hits.sum(axis=1) * total - (present * predictions).sum(axis=1)
    spreads = [total**2 - (side**2).sum(axis=1) for side in (present, predictions)]
    matthews = _ratio(covariance, np.sqrt(spreads[0] * spreads[1]), 0.0)
    return np.where(spreads[0] > 0, matthews, np.nan)


def _span_f1(weights: np.ndarray, answers: Answers) -> np.ndarray:
    """F1 of all spans (seqeval's micro average); undefined without spans."""
    right, predicted, present = (weights @ answers.scores).T  # [R] each
    return _ratio(2 * right, predicted + present)


# ---- ranks and values ----


def _roc_auc(weights: np.ndarray, answers: Answers) -> np.ndarray:
    """The area under the ROC curve of class 1; of several classes or labels, the mean of each's."""
    labels, scores = answers.labels, answers.scores
    if labels.ndim == 1:
        classes = np.arange(scores.shape[1]) if scores.shape[1] > 2 else np.array([1])
        labels, scores = labels[:, None] == classes, scores[:, classes]  # [N, C]
    by_example = np.ascontiguousarray(weights.T)  # [N, R]: rows are taken faster than columns
    columns = zip(labels.T, scores.T, strict=True)
    areas = [_area(by_example, label > 0, score) for label, score in columns]
    mean: np.ndarray = np.mean(areas, axis=0)
    return mean


def _area(weights: np.ndarray, is_positive: np.ndarray, scores: np.ndarray) -> np.ndarray:
    """The area under one ROC curve, from scores [N] and weights [N, R].

    It is the share of pairs of a positive and a negative example in which the positive one has the
    higher score; equal ones count half.
    """
    positive, negative = np.flatnonzero(is_positive), np.flatnonzero(~is_positive)
    negative = negative[np.argsort(scores[negative], kind="stable")]
    below = np.zeros((len(negative) + 1, weights.shape[1]))  # weight of so many lowest negatives
    np.cumsum(weights[negative], axis=0, out=below[1:])
    first, last = (
        np.searchsorted(scores[negative], scores[positive], side) for side in ("left", "right")
    )
    wins = (weights[positive] * (below[first] + below[last])).sum(axis=0) / 2
    return _ratio(wins, weights[positive].sum(axis=0) * below[-1])


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


def _pearson(weights: np.ndarray, answers: Answers) -> np.ndarray:
    return _correlation(weights, *(side.astype(np.float64) for side in answers[:2]))


def _spearman(weights: np.ndarray, answers: Answers) -> np.ndarray:
    return _correlation(weights, *(_ranks(weights, side) for side in answers[:2]))


def _mean_error(weights: np.ndarray, answers: Answers, power: int) -> np.ndarray:
    """The mean of the absolute errors to a power."""
    errors = np.abs(answers.predicted.astype(np.float64) - answers.labels)
    mean: np.ndarray = weights @ errors**power / weights.shape[1]
    return mean


def _r2(weights: np.ndarray, answers: Answers) -> np.ndarray:
    _, spread = _deviations(weights, answers.labels.astype(np.float64))
    r2: np.ndarray = 1 - _ratio(weights.shape[1] * _mean_error(weights, answers, 2), spread)
    return r2


def _deviations(weights: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """From the mean, [R, N], and the sum of their squares, [R], of values [N] or [R, N].

    The sum is 0 for values that are constant to rounding.
    """
    count = weights.shape[1]
    deviations = values - (weights * values).sum(axis=1, keepdims=True) / count
    spread = (weights * deviations**2).sum(axis=1)
    rounding = count * (1e-12 * np.abs(values).max(initial=0.0)) ** 2
    return deviations, np.where(spread > rounding, spread, 0.0)


def _correlation(weights: np.ndarray, predicted: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Pearson's, of values [N] or [R, N]; undefined where one side is constant."""
    (left, of_left), (right, of_right) = (_deviations(weights, v) for v in (predicted, labels))
    return _ratio((weights * left * right).sum(axis=1), np.sqrt(of_left * of_right))


# ---- generated texts ----


def _perplexity(weights: np.ndarray, answers: Answers) -> np.ndarray:
    """The exponential of the mean cross entropy of all tokens."""
    mean = _ratio(weights @ answers.scores[:, 0], weights @ answers.labels)
    with np.errstate(over="ignore"):
        perplexity = np.exp(mean)
    return np.where(np.isfinite(perplexity), perplexity, np.nan)


Compute = Callable[[np.ndarray, Answers], np.ndarray]
"""From weights [R, N], whose rows sum to N, and answers to a metric's values [R]."""

COMPUTE: Mapping[str, Compute] = {
    "accuracy": _accuracy,
    "balanced_accuracy": _balanced_accuracy,
    "f1": partial(_class_one, metric="f1"),
    "f1_micro": partial(_f1, average="micro"),
    "f1_macro": partial(_f1, average="macro"),
    "f1_weighted": partial(_f1, average="weighted"),
    "precision": partial(_class_one, metric="precision"),
    "recall": partial(_class_one, metric="recall"),
    "matthews_correlation": _matthews,
    "roc_auc": _roc_auc,
    "mse": partial(_mean_error, power=2),
    "mae": partial(_mean_error, power=1),
    "r2": _r2,
    "pearson": _pearson,
    "spearmanr": _spearman,
    "pearson_cosine": _pearson,
    "spearmanr_cosine": _spearman,
    "perplexity": _perplexity,
    "exact_match": _accuracy,
    "seqeval_f1": _span_f1,
}
"""What computes each of `fmn.tasks.task.METRICS`."""
