"""Which sets of experts a comparison merges, and the bounds that stand beside every method."""

from collections.abc import Mapping, Sequence
from itertools import combinations

from fmn.experiments.stages import ComparedSettings

SIZES = {"pairs": 2, "triples": 3}
AVERAGE = "average"
BOUNDS = {
    "base": ComparedSettings(method="average", scale=0),
    AVERAGE: ComparedSettings(method="average"),
}
"""What stands beside every comparison: nothing merged, and what everybody tries first."""


def bounded(methods: Mapping[str, ComparedSettings]) -> dict[str, ComparedSettings]:
    """The methods to compare, the bounds before them."""
    return {**BOUNDS, **methods}


def sets(tasks: Sequence[str], kinds: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """The sets of experts to merge, by name ("mrpc+rte").

    `kinds` are "pairs", "triples", "all", or such names.
    """
    chosen = [pick for kind in kinds if kind in SIZES for pick in combinations(tasks, SIZES[kind])]
    chosen += [tuple(kind.split("+")) for kind in kinds if "+" in kind]
    chosen += [tuple(tasks)] if "all" in kinds else []
    return {"+".join(pick): pick for pick in dict.fromkeys(chosen)}
