"""Statistics of one expert: how much each mask node, or each parameter, matters to its task.

>>> from fmn.fisher import estimate
>>> options = {"estimator": "expected", "problem_type": "single_label_classification"}
>>> estimate(model, examples, **options).fisher[0, "head"]
"""

from typing import TYPE_CHECKING

from fmn.lazy import lazy

if TYPE_CHECKING:
    from fmn.fisher.architectures import mask_sites as mask_sites
    from fmn.fisher.files import read_fisher as read_fisher
    from fmn.fisher.files import write_fisher as write_fisher
    from fmn.fisher.mask_nodes import Estimate as Estimate
    from fmn.fisher.mask_nodes import estimate as estimate

_MODULES = {
    "Estimate": "mask_nodes",
    "estimate": "mask_nodes",
    "mask_sites": "architectures",
    "read_fisher": "files",
    "write_fisher": "files",
}
__all__ = ["Estimate", "estimate", "mask_sites", "read_fisher", "write_fisher"]
__getattr__ = lazy(__name__, _MODULES)
