"""Before a run: a settings file from experts, and whether it can run."""

from typing import TYPE_CHECKING

from fmn.lazy import lazy

if TYPE_CHECKING:
    from fmn.setup.stages import check as check
    from fmn.setup.stages import init as init

_MODULES = {"check": "stages", "init": "stages"}
__all__ = ["check", "init"]
__getattr__ = lazy(__name__, _MODULES)
