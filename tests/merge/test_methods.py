"""Every merge method against its published formula in numpy, and what the table says of it."""

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torch import Tensor

from fmn.merge import rules
from fmn.merge.methods import METHODS, Tuning, tuned

SHAPES = [(2, 8), (9, 6), (5, 8), (7, 7), (11,), (4, 3, 2), ()]
TASKS = ("mnli", "mrpc", "rte")
LAMBDAS = [1.0, 0.5, 2.0]
PLAIN = [name for name, method in METHODS.items() if not method.fisher and not method.gram]


def random(shape: tuple[int, ...], seed: int) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).normal(size=shape)).float()


def run(
    name: str,
    experts: Sequence[Tensor],
    base: Tensor,
    coefficients: Sequence[float] = LAMBDAS,
    tasks: Sequence[str] = TASKS,
) -> np.ndarray:
    generators = [rules.generator(5, task, "weight") for task in tasks]
    merged = METHODS[name](
        experts=experts,
        base=base,
        coefficients=coefficients,
        density=0.3,
        damping=0.9,
        generators=generators,
        fisher=rules.even(len(experts)),
        is_linear_map=base.ndim == 2,
    )
    return merged.numpy()


def ties(vectors: np.ndarray, lambdas: np.ndarray) -> np.ndarray:
    """TIES steps 2 and 3 (arXiv 2306.01708, algorithm 1) on trimmed vectors [experts, ...]."""
    lambdas = lambdas.reshape(-1, *[1] * (vectors.ndim - 1))
    elected = np.sign((lambdas * vectors).sum(0))
    chosen = (np.sign(vectors) == elected) & (elected != 0)
    weight = (lambdas * chosen).sum(0)
    total = (lambdas * vectors * chosen).sum(0)
    return np.where(weight > 0, total / np.where(weight > 0, weight, 1.0), 0.0)


def trimmed(vector: np.ndarray, density: float) -> np.ndarray:
    """TIES step 1: the largest magnitudes stay."""
    k = max(1, int(density * vector.size))
    return np.where(np.abs(vector) >= np.sort(np.abs(vector), axis=None)[-k], vector, 0.0)


def dropped(vectors: np.ndarray, density: float) -> np.ndarray:
    """DARE (arXiv 2311.03099), with the method's own draw."""
    draws = [
        torch.rand(vectors[0].shape, generator=rules.generator(5, task, "weight")) < density
        for task in TASKS
    ]
    return np.asarray(vectors * np.stack([draw.numpy() for draw in draws]) / density)


def task_singular_vectors(vectors: np.ndarray, strengths: np.ndarray) -> np.ndarray:
    """TSV-M (arXiv 2412.00081, algorithm 1)."""
    rank = min(vectors.shape[1:]) // len(vectors)
    parts = [np.linalg.svd(vector, full_matrices=False) for vector in vectors]
    left = np.hstack([u[:, :rank] for u, _, _ in parts])
    right = np.vstack([v[:rank] for _, _, v in parts])
    singular = np.concatenate([c * s[:rank] for c, (_, s, _) in zip(strengths, parts, strict=True)])
    (p, _, q), (r, _, t) = (np.linalg.svd(matrix, full_matrices=False) for matrix in (left, right))
    return np.asarray((p @ q) * singular @ (r @ t))


def least_interference(vectors: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """WUDI-Merging (arXiv 2503.08099) row by row, with weights [experts, rows], by least squares.

    The solution of least norm has nothing where no task vector has anything.
    """
    norms = np.linalg.norm(vectors, axis=(1, 2))
    units = vectors / np.where(norms, norms, 1)[:, None, None]  # [experts, rows, n]
    rows = []
    for row, weight in enumerate(weights.T):
        scaled = np.sqrt(weight)[:, None, None] * units
        wanted = [matrix @ vector[row] for matrix, vector in zip(scaled, vectors, strict=True)]
        system = np.concatenate(scaled), np.concatenate(wanted)
        rows.append(np.linalg.lstsq(*system, rcond=1e-8)[0])
    return np.stack(rows)


def reference(name: str, vectors: np.ndarray, lambdas: np.ndarray, density: float) -> np.ndarray:
    """What the merged task vector must be, from task vectors [experts, ...]."""
    mean = np.average(vectors, axis=0, weights=lambdas)
    strengths = lambdas / lambdas.mean()
    if name == "task-arithmetic":
        return np.asarray(np.tensordot(lambdas, vectors, 1))
    if name == "ties":
        return ties(np.stack([trimmed(vector, density) for vector in vectors]), lambdas)
    if name == "dare-ties":
        return ties(dropped(vectors, density), lambdas)
    is_small = vectors.ndim == 3 and min(vectors.shape[1:]) < len(vectors)
    if vectors.ndim != 3 or (name == "tsv-m" and is_small):
        return np.asarray(mean)
    if name == "tsv-m":
        return task_singular_vectors(vectors, strengths)
    if name == "wudi":
        return least_interference(vectors, np.repeat(lambdas[:, None], vectors.shape[1], 1))
    u, s, v = np.linalg.svd(np.tensordot(strengths, vectors, 1), full_matrices=False)
    return np.asarray(s.mean() * u @ v)  # Iso-C, eq. 4


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", ["task-arithmetic", "ties", "dare-ties", "tsv-m", "iso-c", "wudi"])
def test_a_method_is_its_published_formula(name: str, shape: tuple[int, ...]) -> None:
    experts, base = [random(shape, seed) for seed in range(3)], random(shape, 9)
    vectors = np.stack([expert.double().numpy() - base.double().numpy() for expert in experts])
    expected = base.double().numpy() + reference(name, vectors, np.array(LAMBDAS), 0.3)
    got = run(name, experts, base)
    tolerance = 1e-9 if got.dtype == np.float64 else 1e-6  # a method that falls back on the mean
    tolerance = 1e-3 if name == "wudi" else tolerance  # it has a small ridge
    np.testing.assert_allclose(got, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", PLAIN)
def test_no_method_depends_on_the_order_of_the_experts_or_changes_them(name: str) -> None:
    experts, base = [random((9, 6), seed) for seed in range(3)], random((9, 6), 9)
    before = [tensor.clone() for tensor in (*experts, base)]
    merged = run(name, experts, base)
    turned = run(name, experts[::-1], base, LAMBDAS[::-1], TASKS[::-1])
    tolerance = 1e-12 if merged.dtype == np.float64 else 1e-6
    np.testing.assert_allclose(merged, turned, rtol=tolerance, atol=tolerance)
    assert all(map(torch.equal, before, (*experts, base)))


@pytest.mark.parametrize("name", [name for name, method in METHODS.items() if method.base])
def test_experts_that_are_the_base_give_the_base(name: str) -> None:
    base = random((9, 6), 9)
    np.testing.assert_array_equal(run(name, [base] * 3, base), base.double().numpy())


def test_a_task_that_changed_nothing_does_not_disturb_task_singular_vectors() -> None:
    base, vector = random((9, 6), 9), random((9, 6), 1)
    got = run("tsv-m", [base + vector, base], base, [1.0, 1.0], TASKS[:2]) - base.double().numpy()
    change = (base + vector).double().numpy() - base.double().numpy()
    u, s, v = np.linalg.svd(change, full_matrices=False)
    np.testing.assert_allclose(got, u[:, :3] * s[:3] @ v[:3], atol=1e-9)


@pytest.mark.parametrize("shape", [(9, 6), (2, 8)])
def test_fisher_wudi_weighs_the_rows_of_each_interference(shape: tuple[int, int]) -> None:
    experts, base = [random(shape, seed).double() for seed in range(2)], random(shape, 9).double()
    fisher = torch.from_numpy(np.random.default_rng(0).gamma(1.0, size=(2, shape[0])))
    weights = np.array([1.0, 0.5])[:, None] * fisher.numpy()
    merged = METHODS["fisher-wudi"](
        experts=experts,
        base=base,
        coefficients=[1.0, 0.5],
        fisher=[each[:, None].expand(shape) for each in fisher],
        is_linear_map=True,
    )
    vectors = np.stack([(expert - base).numpy() for expert in experts])
    expected = least_interference(vectors, weights)
    np.testing.assert_allclose((merged - base).numpy(), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("fisher", [[4.0, 0.0, 1.0, 0.1], [2.0] * 4, [0.0] * 4])
def test_fisher_tsv_weighs_task_vectors_by_the_fisher_information_of_all(
    fisher: list[float],
) -> None:
    experts, base = [random((4, 6), seed).double() for seed in range(2)], random((4, 6), 9).double()
    column = torch.tensor(fisher, dtype=torch.float64)[:, None]
    inputs = {"experts": experts, "base": base, "coefficients": [1.0, 0.5]}
    merged = METHODS["fisher-tsv-m"](fisher=[column, 3 * column], **inputs)
    relative = np.array(fisher) / np.mean(fisher) if any(fisher) else np.ones(4)
    weights = np.maximum(relative, 1e-3)[:, None]
    vectors = np.stack([(expert - base).numpy() for expert in experts]) * weights
    expected = task_singular_vectors(vectors, np.array([4 / 3, 2 / 3])) / weights
    np.testing.assert_allclose((merged - base).numpy(), expected, atol=1e-9)


def test_equal_experts_are_the_result_of_wudi_and_a_silent_one_leaves_the_other() -> None:
    base, expert = random((9, 6), 9), random((9, 6), 1)
    np.testing.assert_allclose(run("wudi", [expert] * 3, base), expert.double(), atol=1e-12)
    got = run("wudi", [expert, base], base, [1.0, 1.0], TASKS[:2])
    np.testing.assert_allclose(got, expert.double(), atol=1e-4)


def test_rows_that_no_task_changed_stay_under_iso_c() -> None:
    base, vector = random((9, 6), 9), random((9, 6), 1)
    vector[4:] = 0  # a rank below the number of columns
    got = run("iso-c", [base + vector] * 2, base, [1.0, 1.0], TASKS[:2])
    np.testing.assert_array_equal(got[4:], base.double().numpy()[4:])


def test_the_table_holds_the_methods_needs() -> None:
    assert len(METHODS) == 13
    for name, method in METHODS.items():
        assert method.name == name
        assert method.base == ("base" in method.arguments)
        assert method.gram == ("grams" in method.arguments)
        assert (method.fisher is not None) == ("fisher" in method.arguments)
        assert method.random == ("generators" in method.arguments)
        assert (method.density is not None) == ("density" in method.arguments)


def test_without_the_base_or_with_the_papers_mapping_mask_fisher_is_the_plain_rule() -> None:
    auto = ("auto", "auto")
    assert tuned("mask-fisher", "structured", False, *auto) == Tuning()
    assert tuned("mask-fisher", "paper", True, *auto) == Tuning()
    assert tuned("average", "structured", True, *auto) == Tuning()
    assert tuned("mask-fisher", "structured", True, *auto) == METHODS["mask-fisher"].auto
    unscaled = METHODS["fisher-regmean"].auto._replace(growth=0)
    assert tuned("fisher-regmean", "structured", False, *auto) == unscaled
    assert tuned("mask-fisher", "paper", True, "expert", 0.5)[:2] == ("expert", 0.5)


def test_the_scale_is_one_for_equal_experts_and_grows_with_what_averaging_shrinks() -> None:
    for name in ("mask-fisher", "fisher-regmean"):
        tuning = METHODS[name].auto
        assert tuning.scale(1.0000001) == 1
        assert 1 < tuning.scale(2) <= tuning.scale(4) <= tuning.most
