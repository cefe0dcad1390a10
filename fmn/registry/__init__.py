"""MLflow: merged models as registered versions, the champion among them, and their lineage."""

from typing import Any

__all__ = ["register", "roll_back"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from fmn.registry import stages

    return getattr(stages, name)
