"""The merge rule and the other merge methods: pure functions from tensors to a tensor, and a table of them.

Every function takes tensors of any floating dtype and changes none. Weighted means, which must keep up with the disk,
are computed in float32, or in float64 where a tensor is; all else is in float64.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from hashlib import sha256
from itertools import product
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fmn.merge.regmean import damped, regress


def shares(fisher: Sequence[Tensor], coefficients: Sequence[float]) -> Tensor:
    """Each expert's share of every node, ``lambda_j F_j / sum_j lambda_j F_j`` (Matena and Raffel 2022, eq. 4).

    Where that is 0/0, because no expert with a coefficient has any Fisher there, the share is ``lambda_j / sum_j
    lambda_j``. Computed as a softmax of logarithms, so neither subnormal nor huge Fisher information is lost.

    Args:
        fisher: float64, at least zero and finite, one tensor an expert, all of one shape.
        coefficients: ``lambda_j``, at least zero and not all zero.

    Returns:
        float64 [experts, *shape], which sums to one over the experts.
    """
    evidence = torch.stack(list(fisher)).double().log()  # [experts, *nodes]
    lambdas = torch.tensor(list(coefficients), dtype=torch.float64).log()
    lambdas = lambdas.reshape(-1, *[1] * (evidence.ndim - 1)).expand_as(evidence)
    logits = lambdas + evidence
    logits = torch.where(logits.isneginf().all(0), lambdas, logits)
    return logits.softmax(0)


def weighted_mean(tensors: Sequence[Tensor], shares: Tensor) -> Tensor:
    """``sum_j s_j theta_j`` with shares that sum to one and broadcast against the tensors, as a running mean.

    Every step moves the mean towards one expert, ``m += s_j / (s_1 + ... + s_j) (theta_j - m)`` (West 1979, "Updating
    mean and variance estimates"), which takes one pass over memory and no accumulator wider than float32. Experts that
    are the same give the expert bit for bit, as does one that has the whole share; the order of the experts changes
    the result by rounding alone. NaN and Inf are never lost, whatever the share.

    Args:
        tensors: of any floating dtypes.
        shares: from `shares`, [experts, *nodes].

    Returns:
        a tensor of its own, float32 or, where a tensor is, float64.
    """
    wide = reduce(torch.promote_types, (tensor.dtype for tensor in tensors), torch.float32)
    steps = shares.div(shares.cumsum(0)).nan_to_num_(0.0)[1:]  # 0/0: nobody has had a share yet
    weights = steps.flatten().tolist() if steps.numel() == len(steps) else steps.to(wide)
    mean = tensors[0].to(wide, copy=len(tensors) == 1)
    for number, (tensor, weight) in enumerate(zip(tensors[1:], weights, strict=True)):
        step = (
            torch.lerp if number == 0 else Tensor.lerp_
        )  # the first makes the mean a tensor of its own
        mean = step(mean, tensor.to(wide), weight)
    return mean


def weighted_sum(tensors: Sequence[Tensor], weights: Sequence[Tensor]) -> Tensor:
    """``sum_j w_j theta_j`` in float64, with weights that broadcast against the tensors."""
    total = tensors[0].double() * weights[0]
    wide = torch.empty_like(total)
    for tensor, weight in zip(tensors[1:], weights[1:], strict=True):
        total.addcmul_(wide.copy_(tensor), weight)
    return total


def rescale(merged: Tensor, base: Tensor, scale: float) -> Tensor:
    """``base + scale * (merged - base)``: averaging shrinks the task vector, a scale above one restores it.

    In the dtype of ``merged``, which is float32 or float64.
    """
    return torch.lerp(base.to(merged.dtype), merged, scale)


def task_vectors(experts: Sequence[Tensor], base: Tensor) -> list[Tensor]:
    """What fine-tuning added to the base, an expert each (Ilharco et al. 2023, arXiv 2212.04089)."""
    return [expert.double() - base.double() for expert in experts]


def task_arithmetic(
    experts: Sequence[Tensor], base: Tensor, coefficients: Sequence[float]
) -> Tensor:
    """``base + sum_j lambda_j tau_j`` (Ilharco et al. 2023, arXiv 2212.04089, section 4)."""
    vectors = task_vectors(experts, base)
    return base.double() + weighted_sum(vectors, [torch.tensor(value) for value in coefficients])


def magnitude(vector: Tensor) -> Tensor:
    """The float32 that `kth_largest` and `trim` compare entries by."""
    return vector.abs().float()


def kth_largest(passes: Callable[[], Iterable[Tensor]], k: int) -> Tensor:
    """The k-th largest entry of each row of a matrix too large to hold, exact, in two passes over its columns.

    Floats at least zero are ordered as the integers that their bits spell, so the first pass counts the upper halves of
    those integers, and the second the lower halves where the upper half is the one that holds the k-th largest.

    Args:
        passes: begins a new pass: float32 [rows, some columns], at least zero, in any division of the columns.
        k: from 1 to the number of columns.

    Returns:
        float32 [rows, 1].
    """
    half, size = 16, 1 << 16

    def counts(upper: Tensor | None) -> Tensor:
        total = torch.zeros(0, size, dtype=torch.int64)
        for piece in passes():
            bits = piece.contiguous().view(torch.int32)  # [rows, columns]
            rows = [
                (row >> half) if upper is None else row[(row >> half) == upper[number]] & (size - 1)
                for number, row in enumerate(bits)
            ]
            counted = torch.stack([row.bincount(minlength=size) for row in rows])
            total = counted if not len(total) else total + counted
        return total  # [rows, size]

    def locate(total: Tensor, ranks: Tensor) -> tuple[Tensor, Tensor]:
        """The value whose count takes in the entry of a rank from the top, and the rank among its equals."""
        above = total.flip(1).cumsum(1)  # [rows, size]
        place = torch.searchsorted(above, ranks)  # [rows, 1]
        value = size - 1 - place
        return value, ranks - above.gather(1, place) + total.gather(1, value)

    first = counts(None)
    upper, ranks = locate(first, torch.full((len(first), 1), k))
    lower, _ = locate(counts(upper), ranks)
    return (upper << half | lower).int().view(torch.float32)


def trim(vector: Tensor, threshold: Tensor) -> Tensor:
    """The task vector with zeros where its magnitude is below the threshold (TIES, step 1)."""
    return torch.where(magnitude(vector) >= threshold, vector, 0.0)


def drop(vector: Tensor, kept: Tensor, density: float) -> Tensor:
    """The task vector without the entries not kept, the others rescaled (DARE; Yu et al. 2024, arXiv 2311.03099)."""
    return torch.where(kept, vector / density, 0.0)


def kept(seed: int, name: str, task: str, first: int, count: int, density: float) -> Tensor:
    """Which entries DARE keeps, of ``count`` from flat position ``first`` of a parameter: bool, true with ``density``.

    Every entry has a random number of its own, addressed by (seed, parameter, task, position) with a counter-based
    generator, so what is kept depends neither on the order of the experts nor on how a parameter is cut into pieces.
    """
    key = int.from_bytes(sha256(f"{seed}/{task}/{name}".encode()).digest()[:16])
    block, skipped = divmod(first, 4)  # a count of Philox gives four numbers
    numbers = np.random.Philox(key=key, counter=block).random_raw(skipped + count)[skipped:]
    return torch.from_numpy(numbers >> np.uint64(11) < density * 2.0**53)


def agree(vectors: Sequence[Tensor], coefficients: Sequence[float]) -> Tensor:
    """The mean of the entries whose sign is the elected one (TIES, steps 2 and 3; Yadav et al. 2023, arXiv 2306.01708).

    The sign of ``sum_j lambda_j tau_j`` is elected; the mean is weighted by ``lambda_j``. Where no entry is left, or
    they cancel exactly, the result is zero.
    """
    elected = weighted_sum(vectors, [torch.tensor(value) for value in coefficients]).sign()
    total, weight = torch.zeros_like(elected), torch.zeros_like(elected)
    for vector, coefficient in zip(vectors, coefficients, strict=True):
        chosen = coefficient * ((vector.sign() == elected) & (elected != 0))
        total.addcmul_(vector, chosen)
        weight += chosen
    return torch.where(weight > 0, total / weight, 0.0)


def isotropic(gram: Tensor) -> Tensor:
    """The matrix P such that ``Delta P`` is Delta with every singular value replaced by their mean.

    Iso-C (Marczak et al. 2025, arXiv 2502.04959, eq. 4) without a decomposition of Delta itself: with
    ``Delta^T Delta = V S^2 V^T``, P is ``mean(S) V S^-1 V^T``. Directions without any signal are left without.

    Args:
        gram: ``Delta^T Delta``, float64 [n, n].
    """
    values, vectors, inverse = _spectrum(gram)
    return values.mean() * (vectors * inverse) @ vectors.T


def separated(grams: Tensor, strengths: Sequence[float]) -> list[Tensor]:
    """Matrices P_j such that ``sum_j tau_j P_j`` is the merge by task singular vectors of the task matrices tau_j.

    TSV-M (Gargiulo et al. 2025, arXiv 2412.00081, algorithm 1): of each of m tasks the first 1/m of the singular
    triplets are kept, and the left and the right singular vectors of all tasks are replaced by the orthonormal ones
    nearest to them. Everything that takes is in the Gram matrices, as ``U_j = tau_j V_j S_j^-1``.

    Args:
        grams: ``tau_i^T tau_j`` at [i, j], float64 [m, m, n, n], where tau_j is [n or more, n].
        strengths: a factor of every task's singular values; 1 for each in the paper.
    """
    tasks = range(len(strengths))
    rank = grams.shape[-1] // len(strengths)
    values, right, inverse = zip(*(_spectrum(grams[j, j], rank) for j in tasks), strict=True)
    scaled = [right[j] * inverse[j] for j in tasks]  # [n, rank]: tau_j @ scaled_j = U_j
    overlaps = torch.cat(
        [torch.cat([scaled[i].T @ grams[i, j] @ scaled[j] for j in tasks], 1) for i in tasks]
    )
    singular = torch.cat(
        [strength * value for strength, value in zip(strengths, values, strict=True)]
    )
    both = torch.cat(right, 1)  # [n, m * rank]
    core = (
        _inverse_root(overlaps) * singular @ _inverse_root(both.T @ both) @ both.T
    )  # [m * rank, n]
    return [
        scale @ block
        for scale, block in zip(scaled, core.reshape(len(scaled), rank, -1), strict=True)
    ]


def _spectrum(gram: Tensor, rank: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """The largest singular values, their right singular vectors [n, rank], and their inverses; all 0 where lost."""
    squares, vectors = torch.linalg.eigh(gram)  # ascending
    values, vectors = squares.clamp(min=0).sqrt().flip(0)[:rank], vectors.flip(1)[:, :rank]
    found = values > values[:1] * math.sqrt(len(gram) * torch.finfo(torch.float64).eps)
    return values * found, vectors * found, torch.where(found, 1 / values, 0.0)


def _inverse_root(gram: Tensor) -> Tensor:
    """``gram^(-1/2)``, with 0 for the directions that it does not have."""
    _, vectors, inverse = _spectrum(gram)
    return (vectors * inverse) @ vectors.T


@dataclass(frozen=True)
class Settings:
    """What a method may ask for beside tensors.

    Attributes:
        tasks: the experts' tasks, in the order of the experts.
        coefficients: ``lambda_j``, in the order of the experts.
        density: the part of every task vector that a method which makes it sparse keeps.
        seed: of the methods that draw at random.
        damping: factor of the off-diagonal entries of Gram matrices.
    """

    tasks: tuple[str, ...]
    coefficients: tuple[float, ...]
    density: float
    seed: int
    damping: float = 1.0


@dataclass(frozen=True)
class Regression:
    """What RegMean needs of a matrix beside its values.

    Attributes:
        gram: an expert's number to the Gram matrix of its inputs, float64 [n, n].
        weights: of every expert's output rows, [experts, rows] or [experts, 1].
        transposed: the matrix is stored [n, rows].
    """

    gram: Callable[[int], Tensor]
    weights: Tensor
    transposed: bool


@dataclass(frozen=True)
class Part:
    """Consecutive elements of one parameter, the same of every expert: what a method sees at a time.

    Attributes:
        name: the parameter's name.
        shape: the whole parameter's shape.
        first: the flat position of the part's first element in the parameter.
        experts: each [rows, columns] in its stored dtype; a vector is a matrix of one column.
        base: the same of the base model, where the method or the scale asks for it.
        shares: from `shares`, [experts, rows or 1, columns or 1].
        settings: what is the same for all parts.
        fisher: every expert's full Fisher information of these elements, where the method takes it.
        regression: where the method is a regression and the parameter a matrix whose inputs are known; then the part is
            the whole matrix.
    """

    name: str
    shape: tuple[int, ...]
    first: int
    experts: tuple[Tensor, ...]
    base: Tensor | None
    shares: Tensor
    settings: Settings
    fisher: tuple[Tensor, ...] = ()
    regression: Regression | None = None

    @property
    def origin(self) -> Tensor:
        """The base model's part; only for methods that say they need it."""
        if self.base is None:
            raise AssertionError(f"{self.name}: no base")
        return self.base

    @property
    def vectors(self) -> list[Tensor]:
        return task_vectors(self.experts, self.origin)


Passes = Callable[[], Iterator[Part]]
"""Begins a new pass over all parts of one parameter."""


@dataclass(frozen=True)
class Sums:
    """What a method of `LINEAR` adds up, kept so that other coefficients are tried without the experts.

    Attributes:
        numerators: float32 [experts, *shape] by parameter: ``D_j theta_j``, or ``D_j tau_j`` where there is a base.
        denominators: ``D_j``, the experts' shares under equal coefficients, float64 [experts, ...] with the shape of a
            share; empty where the task vectors are only added.
        base: float32 [*shape] by parameter; empty where no base takes part.
        same: tensors of integers, which every expert has alike.
    """

    numerators: Mapping[str, Tensor]
    denominators: Mapping[str, Tensor]
    base: Mapping[str, Tensor]
    same: Mapping[str, Tensor]


def recombine(sums: Sums, coefficients: Sequence[float], scale: float = 1.0) -> dict[str, Tensor]:
    """``sum_j lambda_j N_j / sum_j lambda_j D_j`` by parameter, float32; on top of the base, and scaled, where it is.

    As shares under equal coefficients, the ``D_j`` of a node whose Fisher is zero for every expert are equal, so that
    its parameters become the lambda-weighted average, as in `shares`.

    Args:
        sums: of the experts.
        coefficients: ``lambda_j``, all above zero.
        scale: of the merged task vector, where there is a base.
    """
    lambdas = torch.tensor(coefficients, dtype=torch.float64)
    encoder = dict(sums.same)
    for name, numerators in sums.numerators.items():
        merged = torch.tensordot(
            lambdas.float(), numerators, 1
        )  # [experts] x [experts, *shape] -> [*shape]
        if name in sums.denominators:
            merged /= torch.tensordot(lambdas, sums.denominators[name], 1).float()
        if name in sums.base:
            merged = torch.add(sums.base[name], merged, alpha=scale)
        encoder[name] = merged
    return encoder


@dataclass(frozen=True)
class Method:
    """How a merge method computes; `fmn.methods` says what it needs.

    Attributes:
        combine: a part of a parameter, and what was measured, to the same part of the merged parameter.
        measure: what must be known of the whole parameter before.
        rows: whether it must see whole rows, and matrices of more columns than rows whole; else parts may be any.
        propagates: whether NaN or Inf in an expert, whatever its share, is NaN or Inf in the result, so that checking
            the result checks the experts.
    """

    combine: Callable[[Part, Any], Tensor]
    measure: Callable[[Passes], Any] = lambda passes: None
    rows: bool = False
    propagates: bool = False


def _thresholds(passes: Passes) -> Tensor:
    """The magnitude of the last entry of each task vector that TIES keeps, [experts, 1]."""
    part = next(passes())
    k = max(1, int(part.settings.density * math.prod(part.shape)))
    return kth_largest(
        lambda: (
            torch.stack([magnitude(vector).flatten() for vector in part.vectors])
            for part in passes()
        ),
        k,
    )


def _ties(part: Part, thresholds: Tensor) -> Tensor:
    trimmed = [
        trim(vector, threshold) for vector, threshold in zip(part.vectors, thresholds, strict=True)
    ]
    return part.origin.double() + agree(trimmed, part.settings.coefficients)


def _dare_ties(part: Part, measured: None) -> Tensor:
    settings = part.settings
    dropped = [
        drop(
            vector,
            kept(
                settings.seed, part.name, task, part.first, vector.numel(), settings.density
            ).view_as(vector),
            settings.density,
        )
        for task, vector in zip(settings.tasks, part.vectors, strict=True)
    ]
    return part.origin.double() + agree(dropped, settings.coefficients)


def _upright(part: Part) -> list[Tensor]:
    """The task matrices, turned where they are wider than high (then the part is the whole parameter)."""
    return [vector.T if _wide(part) else vector for vector in part.vectors]


def _wide(part: Part) -> bool:
    return part.shape[0] < part.shape[1]


def _turned_back(part: Part, merged: Tensor) -> Tensor:
    return part.origin.double() + (merged.T if _wide(part) else merged)


def _strengths(part: Part) -> list[float]:
    """Every expert's coefficient, with mean one."""
    coefficients = part.settings.coefficients
    return [value * len(coefficients) / sum(coefficients) for value in coefficients]


def _added(part: Part) -> Tensor:
    return sum(
        (
            strength * vector
            for strength, vector in zip(_strengths(part), _upright(part), strict=True)
        ),
        start=torch.zeros(()),
    )


def _isotropic(passes: Passes) -> Tensor | None:
    if len(next(passes()).shape) != 2:
        return None
    return isotropic(reduce(torch.add, (added.T @ added for added in map(_added, passes()))))


def _iso_c(part: Part, factor: Tensor | None) -> Tensor:
    return (
        weighted_mean(part.experts, part.shares)
        if factor is None
        else _turned_back(part, _added(part) @ factor)
    )


def _separated(passes: Passes) -> list[Tensor] | None:
    part = next(passes())
    if len(part.shape) != 2 or min(part.shape) < len(
        part.experts
    ):  # not a singular triplet for each task
        return None
    size, count = min(part.shape), len(part.experts)
    grams = torch.zeros(count, count, size, size, dtype=torch.float64)
    for vectors in map(_upright, passes()):
        for i, j in product(range(count), repeat=2):
            grams[i, j].addmm_(vectors[i].T, vectors[j])
    return separated(grams, _strengths(part))


def _tsv_m(part: Part, factors: list[Tensor] | None) -> Tensor:
    if factors is None:
        return weighted_mean(part.experts, part.shares)
    return _turned_back(part, reduce(torch.add, map(torch.matmul, _upright(part), factors)))


def _fisher(part: Part, measured: None) -> Tensor:
    return weighted_mean(part.experts, shares(part.fisher, part.settings.coefficients))


def _regmean(part: Part, measured: None) -> Tensor:
    given = part.regression
    if given is None:
        return weighted_mean(part.experts, part.shares)
    experts = [expert.T if given.transposed else expert for expert in part.experts]
    merged = regress(
        experts, lambda number: damped(given.gram(number), part.settings.damping), given.weights
    )
    return merged.T if given.transposed else merged


METHODS: Mapping[str, Method] = {
    "average": Method(lambda part, _: weighted_mean(part.experts, part.shares), propagates=True),
    "mask-fisher": Method(
        lambda part, _: weighted_mean(part.experts, part.shares), propagates=True
    ),
    "fisher": Method(_fisher),
    "regmean": Method(_regmean),
    "fisher-regmean": Method(_regmean),
    "task-arithmetic": Method(
        lambda part, _: task_arithmetic(part.experts, part.origin, part.settings.coefficients)
    ),
    "ties": Method(_ties, _thresholds),
    "dare-ties": Method(_dare_ties),
    "tsv-m": Method(_tsv_m, _separated, rows=True),
    "iso-c": Method(_iso_c, _isotropic, rows=True),
}

LINEAR = ("average", "mask-fisher", "task-arithmetic")
"""The methods that `recombine` computes."""


def summands(part: Part) -> Tensor:
    """What `recombine` takes of a part, [experts, rows, columns], and the base in a row more where it takes part."""
    tensors = part.experts if part.base is None else part.vectors
    weighted = [tensor.double() * share for tensor, share in zip(tensors, part.shares, strict=True)]
    return torch.stack(weighted if part.base is None else [*weighted, part.base.double()])
