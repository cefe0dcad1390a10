"""The report of a run and the comparison of methods: tables, pictures, pages, model cards."""

from typing import Any

__all__ = ["report"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from fmn.report import stages

    return getattr(stages, name)
