"""What a task is, and its rows: from any source to Parquet files, and from there to tokens."""

from fmn.tasks.task import Task, load_task

__all__ = ["Task", "load_task"]
