"""Scores of models: metrics, bootstrap intervals, and the stage that evaluates."""

from fmn.evaluate.metrics import METRICS, score_splits

__all__ = ["METRICS", "score_splits"]
