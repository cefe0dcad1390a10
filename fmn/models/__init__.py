"""Checkpoints: checked, loaded, fine-tuned, and asked for predictions."""

from typing import TYPE_CHECKING

from fmn.lazy import lazy

if TYPE_CHECKING:
    from fmn.models.checkpoints import load_classifier as load_classifier
    from fmn.models.checkpoints import load_tokenizer as load_tokenizer

_MODULES = {
    "load_classifier": "checkpoints",
    "load_tokenizer": "checkpoints",
}
__all__ = ["load_classifier", "load_tokenizer"]
__getattr__ = lazy(__name__, _MODULES)
