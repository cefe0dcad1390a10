"""The building blocks of merge methods: pure functions on tensors, which they never change.

Weighted means, which must keep up with the disk, are computed in float32, or in float64 where a
tensor is; all else is in float64.
"""

from collections.abc import Sequence
from functools import reduce
from hashlib import sha256

import torch
from torch import Generator, Tensor


def shares(fisher: Sequence[Tensor], coefficients: Sequence[float]) -> Tensor:
    """Each expert's share ``lambda_j F_j / sum_j lambda_j F_j`` (Matena and Raffel 2022, eq. 4).

    Where no expert with a coefficient has any Fisher information, the share is ``lambda_j / sum_j
    lambda_j``. A softmax of logarithms loses neither subnormal nor huge Fisher information.

    Args:
        fisher: at least zero and finite; a tensor for each expert, all of one shape.
        coefficients: ``lambda_j``, at least zero and not all zero.

    Returns:
        float64 [experts, *shape], which sums to one over the experts.

    >>> shares([torch.tensor([3.0, 0.0]), torch.tensor([1.0, 0.0])], [1.0, 1.0])[0].tolist()
    [0.75, 0.5]
    """
    evidence = torch.stack(list(fisher)).double().log()  # [experts, *shape]
    lambdas = torch.tensor(list(coefficients), dtype=torch.float64).log()
    lambdas = lambdas.reshape(-1, *[1] * (evidence.ndim - 1)).expand_as(evidence)
    logits = lambdas + evidence
    return torch.where(logits.isneginf().all(0), lambdas, logits).softmax(0)


def even(count: int) -> list[Tensor]:
    """Fisher information that prefers none of so many experts."""
    return [torch.ones((), dtype=torch.float64)] * count


def weighted_mean(tensors: Sequence[Tensor], shares: Tensor) -> Tensor:
    """``sum_j s_j theta_j`` with shares that sum to one, as a running mean.

    Every step moves the mean towards one expert, ``m += s_j / (s_1 + ... + s_j) (theta_j - m)``
    (West 1979, "Updating mean and variance estimates"): one pass over memory, and no accumulator
    wider than float32. Equal experts give the expert bit for bit, as does an expert with the whole
    share; the experts' order changes rounding alone. NaN and Inf are never lost.

    Args:
        tensors: of any floating dtypes and of one shape.
        shares: from `shares`, [experts, ...], broadcastable against the tensors.

    Returns:
        a new tensor, float32 or, where one of the tensors is, float64.
    """
    wide = reduce(torch.promote_types, (tensor.dtype for tensor in tensors), torch.float32)
    # 0/0 before any expert has had a share
    steps = shares.div(shares.cumsum(0)).nan_to_num_(0.0)[1:]
    weights = steps.flatten().tolist() if steps.numel() == len(steps) else steps.to(wide)
    mean = tensors[0].to(wide, copy=len(tensors) == 1)
    for number, (tensor, weight) in enumerate(zip(tensors[1:], weights, strict=True)):
        step = torch.lerp if number == 0 else Tensor.lerp_  # the first step makes a new tensor
        mean = step(mean, tensor.to(wide), weight)
    return mean


def task_vectors(experts: Sequence[Tensor], base: Tensor) -> list[Tensor]:
    """What fine-tuning added to the base, for each expert (arXiv 2212.04089); float64."""
    return [expert.double() - base.double() for expert in experts]


def weighted_sum(tensors: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """``sum_j w_j theta_j`` in float64."""
    total = tensors[0].double() * weights[0]
    for tensor, weight in zip(tensors[1:], weights[1:], strict=True):
        total.add_(tensor, alpha=weight)
    return total


def strengths(coefficients: Sequence[float]) -> list[float]:
    """The coefficients scaled to a mean of one."""
    return [value * len(coefficients) / sum(coefficients) for value in coefficients]


def trim(vector: Tensor, density: float) -> Tensor:
    """The task vector with zeros but for its largest magnitudes, at least one (TIES, step 1)."""
    magnitude = vector.abs().float()
    count = max(1, int(density * vector.numel()))
    threshold = magnitude.flatten().kthvalue(vector.numel() - count + 1).values
    return torch.where(magnitude >= threshold, vector, 0.0)


def elect(vectors: Sequence[Tensor], coefficients: Sequence[float]) -> Tensor:
    """The sign of ``sum_j lambda_j tau_j`` for each entry: -1, 0 or 1 (TIES, step 2)."""
    return weighted_sum(vectors, coefficients).sign()


def disjoint_mean(
    vectors: Sequence[Tensor], signs: Tensor, coefficients: Sequence[float]
) -> Tensor:
    """The lambda-weighted mean of the entries that have the elected sign; else 0 (TIES, step 3)."""
    total, weight = torch.zeros_like(signs), torch.zeros_like(signs)
    for vector, coefficient in zip(vectors, coefficients, strict=True):
        agrees = coefficient * ((vector.sign() == signs) & (signs != 0))
        total.addcmul_(vector, agrees)
        weight += agrees
    return torch.where(weight > 0, total / weight, 0.0)


def generator(seed: int, task: str, name: str) -> Generator:
    """A generator of random numbers for one expert and one parameter."""
    digest = sha256(f"{seed}/{task}/{name}".encode()).digest()
    return Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))


def drop(vector: Tensor, density: float, generator: Generator) -> Tensor:
    """The task vector with entries dropped at random, the others rescaled (arXiv 2311.03099)."""
    stays = torch.rand(vector.shape, generator=generator) < density
    return torch.where(stays, vector / density, 0.0)


def svd(matrix: Tensor, most: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """U [m, r], S [r] and V^T [r, n], without directions that hold nothing but rounding errors.

    r is the matrix's rank, as `torch.linalg.matrix_rank` counts it, or ``most`` if that is less.
    """
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    rank = int((s > s[:1] * max(matrix.shape) * torch.finfo(s.dtype).eps)[:most].sum())
    return u[:, :rank], s[:rank], vh[:rank]


def nearest_orthonormal(matrix: Tensor) -> Tensor:
    """The matrix with all its singular values replaced by one."""
    u, _, vh = svd(matrix)
    return u @ vh
