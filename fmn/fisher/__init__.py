"""Statistics of one expert: how much each mask node, or each parameter, matters to its task.

>>> from fmn.fisher import estimate
>>> estimate(model, examples, estimator="expected", regression=False).fisher[0, "head"]
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fmn.fisher.architectures import mask_sites
    from fmn.fisher.files import read_fisher, write_fisher
    from fmn.fisher.mask_nodes import Estimate, estimate

__all__ = ["Estimate", "estimate", "mask_sites", "read_fisher", "write_fisher"]
_MODULES = {"mask_sites": "architectures", "read_fisher": "files", "write_fisher": "files"}


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used: the modules load PyTorch."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES.get(name, 'mask_nodes')}"), name)
