"""The merge methods by name, and what each needs; `fmn.merge` is how they compute. Loads nothing heavy."""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Needs:
    """What a merge method needs and depends on beside the experts and their coefficients.

    Attributes:
        fisher: whether the shares come from the Fisher information of mask nodes; else from the coefficients alone.
        base: whether it needs the base model.
        random: whether it draws at random, and so depends on the seed.
        density: the part of a task vector that is kept unless told otherwise; None where all is.
    """

    fisher: bool = False
    base: bool = False
    random: bool = False
    density: float | None = None


NEEDS: Mapping[str, Needs] = {
    "average": Needs(),
    "mask-fisher": Needs(fisher=True),
    "task-arithmetic": Needs(base=True),
    "ties": Needs(base=True, density=0.2),
    "dare-ties": Needs(base=True, random=True, density=0.5),
    "tsv-m": Needs(base=True),
    "iso-c": Needs(base=True),
}
