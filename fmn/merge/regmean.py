"""Merging linear maps by regression: RegMean, and RegMean whose output rows have their own weights.

RegMean (Jin et al. 2023, arXiv 2212.09849, eq. 2) finds the matrix whose outputs are nearest to
those of every expert on that expert's own inputs: ``W = (sum_j G_j)^-1 sum_j G_j W_j`` with the
Gram matrices G_j of the inputs. They are the *input* curvature of the experts' losses. The Fisher
information of the mask node that an output row belongs to stands in for the *output* curvature (the
two factors of K-FAC, Martens and Grosse 2015, arXiv 1503.05671), so with weights d:
``W[o] = (sum_j d_j[o] G_j)^-1 sum_j d_j[o] G_j W_j[o]``.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

RIDGE = 1e-6  # of the mean diagonal entry; directions that no input has stay the weighted mean
STEP = 0.25  # weights are rounded to powers of 2^STEP, so that like rows share a factorisation
SMALLEST = -20.0  # logarithm to base 2 of the smallest weight relative to the largest


def damped(gram: Tensor, damping: float) -> Tensor:
    """The Gram matrix with its off-diagonal entries times `damping` (arXiv 2212.09849, 3.3)."""
    return torch.lerp(gram.diagonal().diag(), gram, damping)


def second_moment(vector: Tensor) -> Tensor:
    """``tau^T tau / |tau|^2`` of a task vector [rows, n]; zeros where it is zero.

    It stands in for the Gram matrix of the inputs, as gradients add multiples of the inputs to the
    rows of a linear map (WUDI-Merging, arXiv 2503.08099, proposition 1).
    """
    return vector.T @ vector / vector.square().sum().clamp(min=torch.finfo(vector.dtype).tiny)


def row_weights(fisher: Sequence[Tensor], coefficients: Sequence[float]) -> Tensor:
    """Each expert's weight of a matrix's output rows: lambda times the mean Fisher of the row.

    Args:
        fisher: broadcastable against the matrix [rows, n].

    Returns:
        float64 [experts, rows], or [experts, 1] where the rows do not differ.
    """
    rows = torch.stack([each.double().mean(-1).flatten() for each in fisher])
    return torch.tensor(coefficients, dtype=torch.float64)[:, None] * rows


def rounded(weights: Tensor, step: float = STEP) -> Tensor:
    """Weights relative to the largest over the experts, as powers of ``2^step``.

    Args:
        weights: at least zero, [experts, rows]. Where all are zero, all count alike.
        step: 0 leaves them as they are between ``2^SMALLEST`` and 1.

    Returns:
        float64 [experts, rows], the largest of each row is one.
    """
    weights = weights.double()
    largest = weights.amax(0, keepdim=True)
    relative = torch.where(largest > 0, weights / largest, 1.0)
    powers = relative.log2().clamp(min=SMALLEST)
    return torch.exp2((powers / step).round() * step if step else powers)


def regress(experts: Sequence[Tensor], grams: Sequence[Tensor], weights: Tensor) -> Tensor:
    """The matrix W that minimises ``sum_j d_j[o] E_j |(W[o] - W_j[o]) x|^2`` for every row o.

    Args:
        experts: W_j, [rows, n].
        grams: ``E_j[x x^T]``, float64 [n, n].
        weights: d_j, at least zero, [experts, rows] or [experts, 1]; zeros stand for equal ones.

    Returns:
        float64 [rows, n]. Where the rows' weights do not differ, one factorisation of n^3 / 3
        multiplications serves all. For two experts one diagonalisation of both Gram matrices does
        (about 10 n^3). Otherwise each different column of `rounded` weights takes a factorisation.
    """
    is_single, is_pair = weights.shape[1] == 1, len(experts) == 2
    weights = weights.double() if is_single else rounded(weights, 0 if is_pair else STEP)
    weights = torch.where(weights.sum(0) > 0, weights, 1.0)
    shares = weights / weights.sum(0)
    # Solved for the difference from the weighted mean, which is exact where the experts are equal.
    start = torch.stack([s[:, None] * w for s, w in zip(shares, experts, strict=True)]).sum(0)
    pull = torch.zeros_like(start)
    for share, expert, gram in zip(shares, experts, grams, strict=True):
        pull += share[:, None] * ((expert - start) @ gram)
    stacked = torch.stack(list(grams))  # [experts, n, n]
    if is_pair and not is_single:
        return start + _solve_pair(stacked, shares, pull)
    columns, column_of_row = torch.unique(shares.T, dim=0, return_inverse=True)
    for number, share in enumerate(columns):  # [experts]
        rows = slice(None) if is_single else (column_of_row == number).nonzero()[:, 0]
        total = _regular((share @ stacked.flatten(1)).view_as(stacked[0]))  # sum_j s_j G_j
        start[rows] += torch.cholesky_solve(pull[rows].T, torch.linalg.cholesky(total)).T
    return start


def _solve_pair(grams: Tensor, shares: Tensor, pull: Tensor) -> Tensor:
    """``pull[o] (s_1[o] G_1 + s_2[o] G_2 + ridge)^-1`` for all rows o, [rows, n].

    With A = G_1 + G_2 + ridge = L L^T and L^-1 G_1 L^-T = U diag(v) U^T, the sum is
    L U diag(s_1 v + s_2 (1 - v)) U^T L^T.
    """
    total = _regular(grams.sum(0))
    ridge = (total - grams.sum(0)) / 2
    root = torch.linalg.cholesky(total)
    half = torch.linalg.solve_triangular(root, grams[0] + ridge, upper=False)
    values, vectors = torch.linalg.eigh(torch.linalg.solve_triangular(root, half.T, upper=False))
    basis = torch.linalg.solve_triangular(root.T, vectors, upper=True)
    values = values.clamp(0, 1)
    scales = torch.outer(shares[0], values) + torch.outer(shares[1], 1 - values)  # [rows, n]
    delta: Tensor = (pull @ basis / scales) @ basis.T
    return delta


def _regular(gram: Tensor) -> Tensor:
    ridge = RIDGE * float(gram.diagonal().mean())
    return gram + torch.eye(len(gram), dtype=gram.dtype) * (ridge or 1.0)
