"""Checkpoints: checked, loaded, fine-tuned, and asked for predictions."""

from typing import TYPE_CHECKING

from fmn.lazy import lazy

if TYPE_CHECKING:
    from fmn.models.loading import load_model as load_model
    from fmn.models.loading import load_tokenizer as load_tokenizer

_MODULES = {
    "load_model": "loading",
    "load_tokenizer": "loading",
}
__all__ = ["load_model", "load_tokenizer"]
__getattr__ = lazy(__name__, _MODULES)
