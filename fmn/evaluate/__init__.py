"""Scores of models: metrics, bootstrap intervals, and the stage that evaluates."""

from fmn.evaluate.metrics import METRICS, score

__all__ = ["METRICS", "score"]
