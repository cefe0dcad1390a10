"""Merging experts, weighed by what each of them knows, into one encoder with a head for each task.

>>> from fmn.merge import METHODS
>>> METHODS["ties"].paper
'2306.01708'
"""

from typing import TYPE_CHECKING

from fmn.lazy import lazy

if TYPE_CHECKING:
    from fmn.merge.methods import METHODS as METHODS
    from fmn.merge.model import in_memory as in_memory
    from fmn.merge.model import write_model as write_model
    from fmn.merge.rules import shares as shares
    from fmn.merge.rules import weighted_mean as weighted_mean

_MODULES = {
    "METHODS": "methods",
    "in_memory": "model",
    "shares": "rules",
    "weighted_mean": "rules",
    "write_model": "model",
}
__all__ = ["METHODS", "in_memory", "shares", "weighted_mean", "write_model"]
__getattr__ = lazy(__name__, _MODULES)
