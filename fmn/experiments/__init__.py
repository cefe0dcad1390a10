"""Many merges tried in memory: coefficients searched, methods compared over sets of experts."""

from fmn.experiments.files import Cell, SearchResult, Trial

__all__ = ["Cell", "SearchResult", "Trial"]
