"""What a task is, and its rows: from any source to Parquet files, and from there to tokens."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fmn.tasks.task import Task, load_task

__all__ = ["Task", "load_task"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from fmn.tasks import task

    return getattr(task, name)
