"""Scores of models: metrics, bootstrap intervals, and the stage that evaluates."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fmn.evaluate.metrics import METRICS, score

__all__ = ["METRICS", "score"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from fmn.evaluate import metrics

    return getattr(metrics, name)
