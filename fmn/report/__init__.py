"""Tables, pictures, pages and model cards of a run and of a comparison."""

from fmn.report.stages import report

__all__ = ["report"]
