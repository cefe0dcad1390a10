"""The table of metrics, and the tasks that they fit; `fmn.evaluate.metrics` computes them."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from fmn.errors import hint
from fmn.tasks.kinds import GENERATORS, MULTI, REGRESSION, SINGLE, KindName

_CLASSIFIERS = ("text-classification", "image-classification")


class MetricFacts(NamedTuple):
    """The tasks that a metric scores, and its direction.

    Attributes:
        problem_types: the problem types that it scores; empty for tasks without them.
        higher_is_better: its direction.
        is_binary: whether it is the score of class 1 of two classes.
        kinds: the kinds of tasks that it scores.
    """

    problem_types: tuple[str, ...]
    higher_is_better: bool = True
    is_binary: bool = False
    kinds: tuple[str, ...] = _CLASSIFIERS


METRICS: Mapping[str, MetricFacts] = {
    "accuracy": MetricFacts((SINGLE, MULTI), kinds=(*_CLASSIFIERS, "token-classification")),
    "balanced_accuracy": MetricFacts((SINGLE,)),
    "f1": MetricFacts((SINGLE,), is_binary=True),
    "f1_micro": MetricFacts((SINGLE, MULTI)),
    "f1_macro": MetricFacts((SINGLE, MULTI)),
    "f1_weighted": MetricFacts((SINGLE, MULTI)),
    "precision": MetricFacts((SINGLE,), is_binary=True),
    "recall": MetricFacts((SINGLE,), is_binary=True),
    "matthews_correlation": MetricFacts((SINGLE,)),
    "roc_auc": MetricFacts((SINGLE, MULTI)),
    "mse": MetricFacts((REGRESSION,), higher_is_better=False),
    "mae": MetricFacts((REGRESSION,), higher_is_better=False),
    "r2": MetricFacts((REGRESSION,)),
    "pearson": MetricFacts((REGRESSION,)),
    "spearmanr": MetricFacts((REGRESSION,)),
    "seqeval_f1": MetricFacts((SINGLE,), kinds=("token-classification",)),
    "pearson_cosine": MetricFacts((REGRESSION,), kinds=("sentence-similarity",)),
    "spearmanr_cosine": MetricFacts((REGRESSION,), kinds=("sentence-similarity",)),
    "perplexity": MetricFacts((), higher_is_better=False, kinds=GENERATORS),
    "exact_match": MetricFacts((), kinds=GENERATORS),
}
"""Every metric, by its name in scikit-learn, SciPy or seqeval."""

DEFAULT_METRICS: Mapping[str | None, tuple[str, ...]] = {
    SINGLE: ("accuracy",),
    MULTI: ("f1_micro",),
    REGRESSION: ("pearson", "spearmanr"),
    None: (),
}

_METRICS_OF_KIND: Mapping[str, tuple[str, ...]] = {
    "token-classification": ("seqeval_f1",),
    "sentence-similarity": ("spearmanr_cosine",),
    "text-generation": ("perplexity",),
    "text2text-generation": ("perplexity",),
}


def default_metrics(kind: KindName, problem_type: str | None) -> tuple[str, ...]:
    """The metrics of a task whose settings name none."""
    return _METRICS_OF_KIND.get(kind) or DEFAULT_METRICS[problem_type]


def check_metrics(
    metrics: Sequence[str],
    problem_type: str | None,
    labels: int,
    kind: str = "text-classification",
) -> None:
    """Check that metrics are known, fit a task, and have the same direction.

    Args:
        metrics: their names.
        problem_type: the task's problem type; None: not known yet.
        labels: the number of the task's labels; 0: not known yet.
        kind: the kind of task.

    Raises:
        ValueError: names the metric and what fits.
    """
    for name in metrics:
        if name not in METRICS:
            raise ValueError(
                f"unknown metric {name!r}; {_known(problem_type, kind)}{hint(name, METRICS)}"
            )
        if kind not in METRICS[name].kinds:
            raise ValueError(f"metric {name} is not for {kind}; {_known(problem_type, kind)}")
        if problem_type and problem_type not in METRICS[name].problem_types:
            raise ValueError(
                f"metric {name} is not for {problem_type}; {_known(problem_type, kind)}"
            )
        if METRICS[name].is_binary and labels > 2:
            raise ValueError(
                f"metric {name} is of class 1 of two classes, and here are {labels}; say"
                f" {'f1_macro' if name == 'f1' else 'f1_macro or balanced_accuracy'}"
            )
    directions = {METRICS[name].higher_is_better for name in metrics}
    if len(directions) > 1 and kind not in GENERATORS:  # for those, the first metric decides
        less = [name for name in metrics if not METRICS[name].higher_is_better]
        raise ValueError(
            f"less is better of {', '.join(less)}, and more of the other metrics, so that their"
            " mean would mean nothing; choose metrics of one direction"
        )
    if len(set(metrics)) < len(metrics):
        raise ValueError(f"metrics {', '.join(metrics)}: one is listed twice")


def _known(problem_type: str | None, kind: str) -> str:
    fitting = [
        name
        for name, facts in METRICS.items()
        if kind in facts.kinds and problem_type in (None, *facts.problem_types)
    ]
    return f"choose from {', '.join(fitting)}"
