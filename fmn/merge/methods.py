"""The merge methods by name, and what each needs; `fmn.merge` is how they compute. Loads nothing heavy."""

import math
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

PAPERS: Mapping[str, str | None] = {
    "average": None,
    "mask-fisher": "2403.09891",
    "fisher": "2111.09832",
    "regmean": "2212.09849",
    "fisher-regmean": "2212.09849",
    "task-arithmetic": "2212.04089",
    "ties": "2306.01708",
    "dare-ties": "2311.03099",
    "tsv-m": "2412.00081",
    "iso-c": "2502.04959",
}
"""Where a method is from, on arXiv."""


class Tuning(NamedTuple):
    """What "auto" stands for where it depends on the method.

    Attributes:
        normalise: how the Fisher information of mask nodes is made comparable (`fmn.architectures.tempered`).
        exponent: of the Fisher information.
        growth: the scale of the merged task vector is the effective number of task vectors to this power
            (`fmn.stream.effective_number`); 0 leaves it.
        most: the largest such scale.
    """

    normalise: str
    exponent: float
    growth: float = 0.0
    most: float = math.inf

    def scale(self, effective: float) -> float:
        """Of the merged task vector, to three decimals; exactly 1 where the experts are all the same."""
        return round(min(math.pow(effective, self.growth), self.most), 3)


DAMPING = 0.9
"""Of Gram matrices (`fmn.regmean.damped`)."""

PLAIN = Tuning("none", 1.0)

# Chosen on rows of training splits that experts were not tuned on: docs/results.md.
AUTO: Mapping[str, Tuning] = {
    "mask-fisher": Tuning("kind", 1.0, growth=0.5),
    "fisher-regmean": Tuning("site", 1.0, growth=0.5, most=1.45),
}


def tuned(method: str, mapping: str, base: bool, normalise: str, exponent: float | str) -> Tuning:
    """The settings with every "auto" replaced.

    The mapping "paper", and mask-fisher where the base is not given, are the plain rule of the paper.
    """
    plain = mapping == "paper" or (method == "mask-fisher" and not base)
    auto = PLAIN if plain else AUTO.get(method, PLAIN)
    return auto._replace(
        normalise=auto.normalise if normalise == "auto" else normalise,
        exponent=auto.exponent if isinstance(exponent, str) else exponent,
        growth=auto.growth if base else 0.0,
    )
