"""Merging experts, weighed by what each of them knows, into one encoder with a head for each task.

>>> METHODS["ties"].paper
'2306.01708'
"""

from fmn.merge.methods import METHODS

__all__ = ["METHODS"]
