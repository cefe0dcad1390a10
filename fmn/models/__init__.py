"""Checkpoints: checked, loaded, fine-tuned, and asked for predictions."""

from typing import TYPE_CHECKING

from fmn.lazy import lazy

if TYPE_CHECKING:
    from fmn.models.checkpoints import load_model as load_model
    from fmn.models.checkpoints import load_tokenizer as load_tokenizer

_MODULES = {
    "load_model": "checkpoints",
    "load_tokenizer": "checkpoints",
}
__all__ = ["load_model", "load_tokenizer"]
__getattr__ = lazy(__name__, _MODULES)
