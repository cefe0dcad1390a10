"""Checkpoints: fetched from anywhere, checked, loaded, fine-tuned, and asked for predictions."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fmn.models.checkpoints import load_classifier, load_tokenizer
    from fmn.models.stages import fetch

__all__ = ["fetch", "load_classifier", "load_tokenizer"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from fmn.models import checkpoints, stages

    return getattr(stages if name == "fetch" else checkpoints, name)
