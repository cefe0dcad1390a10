"""Scores of models: metrics, bootstrap intervals, and the stage that evaluates."""

from fmn.evaluate.metrics import score_splits

__all__ = ["score_splits"]
