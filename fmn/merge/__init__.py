"""Merging experts, weighed by what each of them knows, into one encoder with a head for each task.

>>> METHODS["ties"].paper
'2306.01708'
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from fmn.merge.methods import METHODS

if TYPE_CHECKING:
    from fmn.merge.model import write_model
    from fmn.merge.rules import shares, weighted_mean

__all__ = ["METHODS", "shares", "weighted_mean", "write_model"]

_MODULES = {"shares": "rules", "weighted_mean": "rules", "write_model": "model"}


def __getattr__(name: str) -> Any:  # PyTorch is loaded when it is needed (PEP 562)
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
