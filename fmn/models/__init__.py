"""Checkpoints: fetched from anywhere, checked, loaded, fine-tuned, and asked for predictions."""

from typing import TYPE_CHECKING

from fmn.lazy import lazy

if TYPE_CHECKING:
    from fmn.models.checkpoints import load_classifier as load_classifier
    from fmn.models.checkpoints import load_tokenizer as load_tokenizer
    from fmn.models.stages import fetch as fetch

_MODULES = {
    "fetch": "stages",
    "load_classifier": "checkpoints",
    "load_tokenizer": "checkpoints",
}
__all__ = ["fetch", "load_classifier", "load_tokenizer"]
__getattr__ = lazy(__name__, _MODULES)
