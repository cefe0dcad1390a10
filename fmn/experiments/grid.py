"""The sets of experts that a comparison merges, and the bounds that it adds to the methods."""

from collections.abc import Sequence
from itertools import combinations

from fmn.experiments.stages import ComparedSettings

SIZES = {"pairs": 2, "triples": 3}
AVERAGE = "average"
BOUNDS = {
    "base": ComparedSettings(method="average", scale=0),
    AVERAGE: ComparedSettings(method="average"),
}
"""Methods that every comparison has: the base without any expert, and the plain average."""


def sets(tasks: Sequence[str], kinds: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """The sets of experts to merge, by name ("mrpc+rte").

    Args:
        tasks: the experts' tasks.
        kinds: "pairs", "triples", "all", or names of sets.
    """
    chosen = [pick for kind in kinds if kind in SIZES for pick in combinations(tasks, SIZES[kind])]
    chosen += [tuple(kind.split("+")) for kind in kinds if "+" in kind]
    chosen += [tuple(tasks)] if "all" in kinds else []
    return {"+".join(pick): pick for pick in dict.fromkeys(chosen)}
