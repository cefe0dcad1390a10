"""From a user's files to the checked rows of a task."""

from fmn.rows.stages import data

__all__ = ["data"]
