"""The building blocks of merge methods: pure functions of tensors, which they never change.

Weighted means must be as fast as the disk: they are computed in float32, or in float64 if one of
the tensors is. Everything else is computed in float64.
"""

from collections.abc import Sequence
from functools import reduce
from hashlib import sha256

import torch
from torch import Generator, Tensor

RIDGE = 1e-6  # times the mean diagonal entry; without inputs in a direction, W stays the mean there
STEP = 0.25  # weights are rounded to powers of 2^STEP, so that similar rows share a factorisation
SYSTEMS = 2**26  # entries of the systems of equations that a GPU solves at a time
LEAST = 1e-3  # smallest importance of a mask node
SMALLEST = -20.0  # logarithm to base 2 of the smallest weight relative to the largest


def shares(fisher: Sequence[Tensor], coefficients: Sequence[float]) -> Tensor:
    """Each expert's share ``lambda_j F_j / sum_j lambda_j F_j`` (Matena and Raffel 2022, eq. 4).

    Where ``lambda_j F_j`` is zero for every expert, the share is ``lambda_j / sum_j lambda_j``. The
    shares are a softmax of logarithms, so that tiny and huge Fisher information is not lost.

    Args:
        fisher: a tensor for each expert, all of one shape; finite and at least zero.
        coefficients: ``lambda_j``, at least zero and not all zero.

    Returns:
        float64 [experts, *shape]; the sum over the experts is one.

    >>> shares([torch.tensor([3.0, 0.0]), torch.tensor([1.0, 0.0])], [1.0, 1.0])[0].tolist()
    [0.75, 0.5]
    """
    evidence = torch.stack(list(fisher)).double().log()  # [experts, *shape]
    lambdas = torch.tensor(list(coefficients), dtype=torch.float64, device=evidence.device).log()
    lambdas = lambdas.reshape(-1, *[1] * (evidence.ndim - 1)).expand_as(evidence)
    logits = lambdas + evidence
    return torch.where(logits.isneginf().all(0), lambdas, logits).softmax(0)


def even(count: int) -> list[Tensor]:
    """Equal Fisher information for a number of experts."""
    return [torch.ones((), dtype=torch.float64)] * count


def weighted_mean(tensors: Sequence[Tensor], shares: Tensor) -> Tensor:
    """``sum_j s_j theta_j`` with shares that sum to one, as a running mean.

    Every step moves the mean towards one expert, ``m += s_j / (s_1 + ... + s_j) (theta_j - m)``
    (West 1979, "Updating mean and variance estimates"). This takes one pass over memory, and no
    accumulator wider than float32. If all experts are equal, or if one has the whole share, the
    result is that expert bit for bit. The order of the experts affects only rounding. NaN and Inf
    are passed on.

    Args:
        tensors: tensors of one shape, of any floating dtypes.
        shares: from `shares`, [experts, ...], broadcastable against the tensors.

    Returns:
        a new tensor, float32, or float64 if one of the tensors is.
    """
    wide = reduce(torch.promote_types, (tensor.dtype for tensor in tensors), torch.float32)
    # 0/0 until an expert has a share
    steps = shares.div(shares.cumsum(0)).nan_to_num_(0.0)[1:]
    weights = steps.flatten().tolist() if steps.numel() == len(steps) else steps.to(wide)
    mean = tensors[0].to(wide, copy=len(tensors) == 1)
    for number, (tensor, weight) in enumerate(zip(tensors[1:], weights, strict=True)):
        step = torch.lerp if number == 0 else Tensor.lerp_  # the first step makes a new tensor
        mean = step(mean, tensor.to(wide), weight)
    return mean


def task_vectors(experts: Sequence[Tensor], base: Tensor) -> list[Tensor]:
    """Each expert minus the base (arXiv 2212.04089); float64."""
    return [expert.double() - base.double() for expert in experts]


def weighted_sum(tensors: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """``sum_j w_j theta_j`` in float64."""
    total = tensors[0].double() * weights[0]
    for tensor, weight in zip(tensors[1:], weights[1:], strict=True):
        total.add_(tensor, alpha=weight)
    return total


def strengths(coefficients: Sequence[float]) -> list[float]:
    """Scale the coefficients to a mean of one."""
    return [value * len(coefficients) / sum(coefficients) for value in coefficients]


def trim(vector: Tensor, density: float) -> Tensor:
    """Set all but the largest entries of a task vector to zero; one or more stay (TIES, step 1)."""
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
    """The lambda-weighted mean of entries with the elected sign; 0 without any (TIES, step 3)."""
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
    """Drop entries of a task vector at random, and rescale the others (arXiv 2311.03099)."""
    stays = torch.rand(vector.shape, generator=generator) < density
    return torch.where(stays, vector / density, 0.0)


def svd(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """U [m, r], S [r] and V^T [r, n] of a matrix [m, n] of rank r.

    The rank is that of `torch.linalg.matrix_rank`; other directions are rounding errors.
    """
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    rank = int((s > s[:1] * max(matrix.shape) * torch.finfo(s.dtype).eps).sum())
    return u[:, :rank], s[:rank], vh[:rank]


def leading_svd(matrix: Tensor, most: int) -> tuple[Tensor, Tensor, Tensor]:
    """U [m, r], S [r] and V^T [r, n] of the ``most`` largest singular values, or of fewer.

    They come from the eigenvectors of the smaller Gram matrix, which is three times as fast as an
    SVD. As that squares singular values, those below 1e-7 of the largest, the precision of weights
    in float32, are left out.
    """
    if matrix.shape[0] < matrix.shape[1]:
        u, s, vh = leading_svd(matrix.mT, most)
        return vh.mT, s, u.mT
    values, v = torch.linalg.eigh(matrix.mT @ matrix)  # ascending
    s = values.flip(0).clamp(min=0).sqrt()
    rank = int((s > s[:1] * 1e-7)[:most].sum())
    v = v.flip(1)[:, :rank]
    return matrix @ v / s[:rank], s[:rank], v.mT


def importance(fisher: Sequence[Tensor]) -> Tensor:
    """The sum of the experts' Fisher information, divided by its mean; positive, float64.

    Without any Fisher information it is one.
    """
    total = torch.stack([each.double() for each in fisher]).sum(0)
    mean = total.mean()
    return (total / mean).clamp(min=LEAST) if mean > 0 else torch.ones_like(total)


def nearest_orthonormal(matrix: Tensor) -> Tensor:
    """Replace all singular values of a matrix by one."""
    u, _, vh = svd(matrix)
    return u @ vh


# ---------------------------------------------------------------------------------------------
# Merging linear maps by regression
#
# RegMean (Jin et al. 2023, arXiv 2212.09849, eq. 2) solves for the matrix whose outputs are nearest
# to those of every expert on that expert's own inputs: W = (sum_j G_j)^-1 sum_j G_j W_j with the
# Gram matrices G_j of the inputs, which are the *input* curvature of the experts' losses. We weigh
# each output row by the Fisher information d_j of its mask node, an estimate of the *output*
# curvature (the two factors of K-FAC, Martens and Grosse 2015, arXiv 1503.05671):
# W[o] = (sum_j d_j[o] G_j)^-1 sum_j d_j[o] G_j W_j[o].


def damped(gram: Tensor, damping: float) -> Tensor:
    """Multiply the off-diagonal entries of a Gram matrix by `damping` (arXiv 2212.09849, 3.3)."""
    return torch.lerp(gram.diagonal().diag(), gram, damping)


def second_moment(vector: Tensor) -> Tensor:
    """``tau^T tau / |tau|^2`` of a task vector [rows, n]; zeros where it is zero.

    It approximates the Gram matrix of the inputs, as gradients add multiples of the inputs to the
    rows of a linear map (WUDI-Merging, arXiv 2503.08099, proposition 1).
    """
    return vector.T @ vector / vector.square().sum().clamp(min=torch.finfo(vector.dtype).tiny)


def row_weights(fisher: Sequence[Tensor], coefficients: Sequence[float]) -> Tensor:
    """Each expert's weights of a matrix's output rows: lambda times the mean Fisher of the row.

    Args:
        fisher: for each expert, broadcastable against the matrix [rows, n].
        coefficients: ``lambda_j``.

    Returns:
        float64 [experts, rows], or [experts, 1] if all rows have the same weight.
    """
    rows = torch.stack([each.double().mean(-1).flatten() for each in fisher])
    return torch.tensor(coefficients, dtype=torch.float64, device=rows.device)[:, None] * rows


def rounded(weights: Tensor, step: float = STEP) -> Tensor:
    """Divide weights by the largest over the experts, and round them to powers of ``2^step``.

    Args:
        weights: at least zero, [experts, rows]. If all weights of a row are zero, all become one.
        step: 0: no rounding, only a lower limit of ``2^SMALLEST``.

    Returns:
        float64 [experts, rows]; the largest weight of each row is one.
    """
    weights = weights.double()
    largest = weights.amax(0, keepdim=True)
    relative = torch.where(largest > 0, weights / largest, 1.0)
    powers = relative.log2().clamp(min=SMALLEST)
    return torch.exp2((powers / step).round() * step if step else powers)


def regress(
    experts: Sequence[Tensor],
    grams: Sequence[Tensor],
    weights: Tensor,
    at_once: int | None = None,
) -> Tensor:
    """The matrix W that minimises ``sum_j d_j[o] E_j |(W[o] - W_j[o]) x|^2`` for every row o.

    Args:
        experts: W_j, [rows, n].
        grams: ``E_j[x x^T]``, float64 [n, n].
        weights: d_j, at least zero, [experts, rows] or [experts, 1]; if all of a row are zero, they
            count as equal.
        at_once: systems of equations that are solved at a time; default: depends on the device.

    Returns:
        float64 [rows, n], on the device of the Gram matrices.

    The cost is one factorisation (n^3 / 3 multiplications) if all rows have the same weights, one
    diagonalisation of both Gram matrices (about 10 n^3) for two experts, and otherwise a
    factorisation for each different column of `rounded` weights.
    """
    is_single, is_pair = weights.shape[1] == 1, len(experts) == 2
    weights = weights.to(grams[0].device)
    weights = weights.double() if is_single else rounded(weights, 0 if is_pair else STEP)
    weights = torch.where(weights.sum(0) > 0, weights, 1.0)
    shares = weights / weights.sum(0)
    # Solve for the difference from the weighted mean, so that equal experts give an exact result.
    start = torch.stack([s[:, None] * w for s, w in zip(shares, experts, strict=True)]).sum(0)
    pull = torch.zeros_like(start)
    for share, expert, gram in zip(shares, experts, grams, strict=True):
        pull += share[:, None] * ((expert - start) @ gram)
    stacked = torch.stack(list(grams))  # [experts, n, n]
    if is_pair and not is_single:
        return start + _solve_pair(stacked, shares, pull)
    if is_single:
        return start + _solved(stacked, shares.T, pull[None])[0]
    columns, column_of_row, counts = torch.unique(
        shares.T, dim=0, return_inverse=True, return_counts=True
    )
    rows_by_column = column_of_row.argsort(stable=True)
    first = counts.cumsum(0) - counts  # of each column's rows among them
    # Columns with similar numbers of rows are solved together, so that there is little padding.
    if at_once is None:  # on a CPU one system, which fits the cache
        at_once = max(1, SYSTEMS // start.shape[1] ** 2) if start.is_cuda else 1
    for some in counts.argsort().split(at_once):
        places = torch.arange(int(counts[some].max()), device=start.device)
        is_row = places < counts[some, None]  # [columns, most rows of a column]
        rows = rows_by_column[torch.where(is_row, first[some, None] + places, 0)]
        steps = _solved(stacked, columns[some], pull[rows] * is_row[..., None])
        start[rows[is_row]] += steps[is_row]
    return start


def _solved(grams: Tensor, shares: Tensor, pulls: Tensor) -> Tensor:
    """``pulls[k] (sum_j s_j[k] G_j + ridge)^-1`` for each k.

    Args:
        grams: G_j, [experts, n, n].
        shares: s_j, [k, experts].
        pulls: [k, rows, n], which is also the result's shape.
    """
    totals = _regular((shares @ grams.flatten(1)).view(-1, *grams.shape[1:]))
    return torch.cholesky_solve(pulls.mT, torch.linalg.cholesky(totals)).mT


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


def _regular(grams: Tensor) -> Tensor:
    """Add a ridge to Gram matrices [..., n, n], in place."""
    diagonals = grams.diagonal(dim1=-2, dim2=-1)
    ridge = RIDGE * diagonals.mean(-1, keepdim=True)
    diagonals += torch.where(ridge == 0, 1.0, ridge)
    return grams
