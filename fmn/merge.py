"""The merge rule and the other merge methods: pure functions from tensors to a tensor.

Every function takes tensors of any floating dtype, computes in float64 and returns float64; nothing is changed in
place. Float64 is what makes the merge of identical experts the expert, bit for bit, in every stored dtype, and the
order of the experts invisible after rounding.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


def shares(fisher: Sequence[Tensor], coefficients: Sequence[float]) -> list[Tensor]:
    """Each expert's share of every node, ``lambda_j F_j / sum_j lambda_j F_j`` (Matena and Raffel 2022, eq. 4).

    Where that is 0/0, because no expert with a coefficient has any Fisher there, the share is ``lambda_j / sum_j
    lambda_j``. Computed as a softmax of logarithms, so neither subnormal nor huge Fisher information is lost.

    Args:
        fisher: float64, at least zero and finite, one tensor an expert, all of one shape.
        coefficients: ``lambda_j``, at least zero and not all zero.

    Returns:
        float64 tensors of the same shape that sum to one over the experts.
    """
    evidence = torch.stack(list(fisher)).double().log()  # [experts, *nodes]
    lambdas = torch.tensor(list(coefficients), dtype=torch.float64).log()
    lambdas = lambdas.reshape(-1, *[1] * (evidence.ndim - 1)).expand_as(evidence)
    logits = lambdas + evidence
    logits = torch.where(logits.isneginf().all(0), lambdas, logits)
    return list(logits.softmax(0).unbind(0))


def weighted_sum(tensors: Sequence[Tensor], weights: Sequence[Tensor]) -> Tensor:
    """``sum_j w_j theta_j`` with weights that broadcast against the tensors."""
    total = tensors[0].double() * weights[0]
    for tensor, weight in zip(tensors[1:], weights[1:], strict=True):
        total.addcmul_(tensor.double(), weight)
    return total


def rescale(merged: Tensor, base: Tensor, scale: float) -> Tensor:
    """``base + scale * (merged - base)``: averaging shrinks the task vector, a scale above one restores it."""
    return torch.lerp(base.double(), merged.double(), scale)


@dataclass(frozen=True)
class Part:
    """Consecutive rows of one parameter, the same rows of every expert: what a method sees at a time.

    Attributes:
        name: the parameter's name.
        tasks: the experts' tasks.
        experts: each [rows, columns] in its stored dtype; a vector is a matrix of one column.
        base: the same rows of the base model, where the method or the scale asks for them.
        shares: from `shares`, broadcastable against the experts.
        coefficients: ``lambda_j``, one an expert.
    """

    name: str
    tasks: tuple[str, ...]
    experts: tuple[Tensor, ...]
    base: Tensor | None
    shares: tuple[Tensor, ...]
    coefficients: tuple[float, ...]


class Combine(Protocol):
    def __call__(self, part: Part, /) -> Tensor: ...


@dataclass(frozen=True)
class Method:
    """A merge method as data.

    Attributes:
        combine: a part of a parameter to the same part of the merged one.
        fisher: whether the shares come from the Fisher information of mask nodes; else from the coefficients alone.
        base: whether it needs the base model.
        random: whether it draws at random, and so depends on the seed.
    """

    combine: Combine
    fisher: bool = False
    base: bool = False
    random: bool = False


METHODS: Mapping[str, Method] = {
    "average": Method(lambda part: weighted_sum(part.experts, part.shares)),
    "mask-fisher": Method(lambda part: weighted_sum(part.experts, part.shares), fisher=True),
}
