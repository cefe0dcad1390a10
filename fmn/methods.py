"""The merge methods by name, and what each needs; `fmn.merge` is how they compute. Loads nothing heavy."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple


@dataclass(frozen=True)
class Needs:
    """What a merge method needs and depends on beside the experts and their coefficients.

    Attributes:
        fisher: the Fisher information that it weighs experts by: of mask "nodes", of "parameters" (the full diagonal),
            or none; then the coefficients alone weigh.
        gram: whether it needs Gram matrices.
        base: whether it needs the base model.
        random: whether it draws at random, and so depends on the seed.
        density: the part of a task vector that is kept unless told otherwise; None where all is.
    """

    fisher: Literal["nodes", "parameters"] | None = None
    gram: bool = False
    base: bool = False
    random: bool = False
    density: float | None = None


NEEDS: Mapping[str, Needs] = {
    "average": Needs(),
    "mask-fisher": Needs(fisher="nodes"),
    "fisher": Needs(fisher="parameters"),
    "regmean": Needs(gram=True),
    "fisher-regmean": Needs(fisher="nodes", gram=True),
    "task-arithmetic": Needs(base=True),
    "ties": Needs(base=True, density=0.2),
    "dare-ties": Needs(base=True, random=True, density=0.5),
    "tsv-m": Needs(base=True),
    "iso-c": Needs(base=True),
}


class Tuning(NamedTuple):
    """Settings whose `auto` depends on the method.

    Attributes:
        normalise: how the Fisher information of mask nodes is made comparable (`fmn.architectures.tempered`).
        exponent: of the Fisher information.
        scale: of the merged task vector; 1 leaves it.
    """

    normalise: str
    exponent: float
    scale: float


DAMPING = 0.9
"""Of Gram matrices (`fmn.regmean.damped`)."""

PLAIN = Tuning("none", 1.0, 1.0)


def tuned(
    method: str, mapping: str, experts: int, base: bool, normalise: str, exponent: float | str, scale: float | str
) -> Tuning:
    """The settings with every "auto" replaced.

    mask-fisher without the base, and the mapping "paper", are the plain rule of the paper. The rest was chosen on
    held-out rows of training splits: docs/results.md.
    """
    auto = PLAIN
    if method == "fisher-regmean":
        auto = Tuning("kind", 0.5, 1.5 if base else 1.0)
    elif method == "mask-fisher" and mapping == "structured" and base:
        auto = Tuning("kind", 1.0, 1.5)
    return Tuning(
        auto.normalise if normalise == "auto" else normalise,
        auto.exponent if isinstance(exponent, str) else exponent,
        auto.scale if isinstance(scale, str) else scale,
    )
