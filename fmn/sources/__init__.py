"""Where checkpoints come from: the Hub, folders, packages, registered models."""

from typing import TYPE_CHECKING

from fmn.lazy import lazy

if TYPE_CHECKING:
    from fmn.sources.stages import fetch as fetch

_MODULES = {"fetch": "stages"}
__all__ = ["fetch"]
__getattr__ = lazy(__name__, _MODULES)
