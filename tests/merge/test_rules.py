"""The merge rule and the merge methods, against plain numpy and the properties that they must have."""

from collections.abc import Iterator, Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from torch import Tensor

from fmn.merge.methods import NEEDS
from fmn.merge.rules import (
    METHODS,
    Part,
    Settings,
    Sums,
    drop,
    kept,
    kth_largest,
    recombine,
    rescale,
    shares,
    summands,
    weighted_mean,
)

FLOAT32 = st.floats(-1e6, 1e6, width=32)
FISHER = st.one_of(st.just(0.0), st.floats(0, 1e300), st.floats(0, 1e-300))
COEFFICIENT = st.one_of(st.just(0.0), st.floats(1e-3, 1e3))


def doubles(values: Sequence[float] | Sequence[Sequence[float]]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


@st.composite
def problems(draw: st.DrawFn) -> tuple[list[Tensor], list[Tensor], list[float]]:
    """Experts [rows, columns], Fisher [rows, 1] and coefficients, not all zero."""
    count, rows, columns = draw(st.integers(1, 5)), draw(st.integers(1, 4)), draw(st.integers(1, 4))
    experts = draw(hnp.arrays(np.float32, (count, rows, columns), elements=FLOAT32))
    fisher = draw(hnp.arrays(np.float64, (count, rows, 1), elements=FISHER))
    coefficients = draw(st.lists(COEFFICIENT, min_size=count, max_size=count).filter(any))
    return list(torch.from_numpy(experts)), list(torch.from_numpy(fisher)), coefficients


def merge(
    experts: Sequence[Tensor], fisher: Sequence[Tensor], coefficients: Sequence[float]
) -> Tensor:
    return weighted_mean(experts, shares(fisher, coefficients))


def test_the_rule_is_the_weighted_mean_of_the_paper() -> None:
    rng = np.random.default_rng(0)
    theta, fisher, lambdas = (
        rng.normal(size=(3, 4, 5)),
        rng.gamma(1.0, size=(3, 4, 1)),
        np.array([0.2, 0.5, 0.3]),
    )
    weights = lambdas[:, None, None] * fisher
    expected = (weights * theta).sum(0) / weights.sum(0)
    merged = merge(list(torch.from_numpy(theta)), list(torch.from_numpy(fisher)), lambdas.tolist())
    np.testing.assert_allclose(merged.numpy(), expected, rtol=1e-13)


@settings(deadline=None)
@given(problems())
def test_a_merge_does_not_depend_on_the_order_and_changes_no_input(
    problem: tuple[list[Tensor], list[Tensor], list[float]],
) -> None:
    before = [tensor.clone() for tensors in problem[:2] for tensor in tensors]
    experts, fisher, coefficients = problem
    merged, turned = (
        merge(experts, fisher, coefficients),
        merge(experts[::-1], fisher[::-1], coefficients[::-1]),
    )
    largest = max(tensor.abs().max() for tensor in experts)
    torch.testing.assert_close(merged, turned, rtol=1e-6, atol=1e-6 * float(largest))
    assert all(torch.equal(a, b) for a, b in zip(before, [*problem[0], *problem[1]], strict=True))


@settings(deadline=None)
@given(problems())
def test_identical_experts_give_the_expert_bit_for_bit(
    problem: tuple[list[Tensor], list[Tensor], list[float]],
) -> None:
    experts, fisher, coefficients = problem
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        expert = experts[0].clamp(-6e4, 6e4).to(dtype)
        assert torch.equal(merge([expert] * len(experts), fisher, coefficients).to(dtype), expert)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_an_expert_with_the_whole_share_is_the_mean(dtype: torch.dtype) -> None:
    experts = [torch.tensor([0.1, -3.0, 7e-5]).to(dtype) * 10.0**power for power in (-2, 3, 0)]
    for chosen, expert in enumerate(experts):
        mean = weighted_mean(experts, doubles([[float(number == chosen)] for number in range(3)]))
        assert mean.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert torch.equal(mean.to(dtype), expert)


def test_the_mean_of_one_expert_is_a_tensor_of_its_own() -> None:
    expert = torch.zeros(3)
    weighted_mean([expert], doubles([[1.0]])).add_(1)
    assert not expert.any()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize(
    "given", [(0.0, 0.5, 0.5), (1.0, 0.0, 0.0), (0.2, 0.8, 0.0), (0.0, 0.0, 1.0)]
)
@pytest.mark.parametrize("by_row", [False, True])
def test_what_is_not_finite_is_never_lost(
    by_row: bool, given: tuple[float, ...], value: float
) -> None:
    for bad in range(3):
        experts = [float32((40, 9), seed) for seed in range(3)]
        experts[bad][17, 4] = value
        mean = weighted_mean(
            experts, doubles(given).reshape(3, 1, 1).expand(3, 40 if by_row else 1, 1)
        )
        assert not mean[17, 4].isfinite()
        assert int(mean.isfinite().sum()) == 40 * 9 - 1


@settings(deadline=None)
@given(problems())
def test_shares_are_a_convex_combination(
    problem: tuple[list[Tensor], list[Tensor], list[float]],
) -> None:
    _, fisher, coefficients = problem
    parts = shares(fisher, coefficients)
    assert (parts >= 0).all()
    torch.testing.assert_close(parts.sum(0), torch.ones_like(parts[0]), rtol=1e-14, atol=0)
    assert all(
        (part == 0).all()
        for part, coefficient in zip(parts, coefficients, strict=True)
        if coefficient == 0
    )


def test_a_node_without_fisher_takes_the_weighted_average() -> None:
    fisher = [doubles([0.0, 0.0, 1.0]), doubles([0.0, 2.0, 1.0])]
    parts = shares(fisher, [3.0, 1.0])
    torch.testing.assert_close(
        parts, torch.stack([doubles([0.75, 0.0, 0.75]), doubles([0.25, 1.0, 0.25])])
    )


def test_a_node_whose_only_fisher_has_no_coefficient_takes_the_weighted_average() -> None:
    parts = shares([doubles([0.0]), doubles([0.0]), doubles([5.0])], [1.0, 3.0, 0.0])
    assert [float(part) for part in parts] == pytest.approx([0.25, 0.75, 0.0])


@pytest.mark.parametrize("unit", [5e-324, 1e-310, 1.0, 4e307])
def test_subnormal_and_huge_fisher_keep_their_ratio(unit: float) -> None:
    parts = shares([doubles([unit]), doubles([4 * unit])], [1e-200, 1e-200])
    assert [float(part) for part in parts] == pytest.approx([0.2, 0.8], rel=1e-12)


def test_a_scale_stretches_the_task_vector() -> None:
    base, merged = doubles([1.0, 2.0]), doubles([2.0, 0.0])
    assert rescale(merged, base, 1.5).tolist() == [2.5, -1.0]
    assert rescale(merged, base, 1.0).tolist() == merged.tolist()
    assert rescale(merged, base, 0.0).tolist() == base.tolist()


# ---------------------------------------------------------------------------------------------------------------------
# The other methods, each against its published formula in numpy, seen whole and in parts


SHAPES = [(2, 8), (9, 6), (5, 8), (7, 7), (11,), (4, 3, 2), ()]
TASKS = ("mnli", "mrpc", "rte")


def float32(shape: tuple[int, ...], seed: int) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).normal(size=shape)).float()


def run(
    method: str,
    experts: Sequence[Tensor],
    base: Tensor,
    coefficients: Sequence[float] = (1.0, 1.0, 1.0),
    density: float = 0.3,
    rows: int | None = None,
    tasks: Sequence[str] = TASKS,
) -> np.ndarray:
    """A method on one parameter, in parts of at most `rows` rows where it may be cut."""
    chosen, shape = METHODS[method], tuple(base.shape)
    tensors = [tensor.reshape(shape[0] if shape else 1, -1) for tensor in (*experts, base)]
    height, width = tensors[0].shape
    whole = rows is None or (chosen.rows and len(shape) == 2 and height < width)
    settings = Settings(tuple(tasks), tuple(coefficients), density, seed=5)
    even = shares([doubles([1.0]).reshape(1, 1)] * len(experts), coefficients)

    def passes() -> Iterator[Part]:
        for start in range(0, height, height if whole or rows is None else rows):
            cut = [
                tensor[start : start + (height if whole or rows is None else rows)]
                for tensor in tensors
            ]
            yield Part("weight", shape, start * width, tuple(cut[:-1]), cut[-1], even, settings)

    measured = chosen.measure(passes)
    return torch.cat([chosen.combine(part, measured) for part in passes()]).reshape(shape).numpy()


def ties(vectors: np.ndarray, lambdas: np.ndarray) -> np.ndarray:
    """TIES steps 2 and 3 (arXiv 2306.01708, algorithm 1) on task vectors [experts, ...] that are trimmed already."""
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


def separated_by_svd(vectors: np.ndarray, strengths: np.ndarray) -> np.ndarray:
    """TSV-M (arXiv 2412.00081, algorithm 1)."""
    rank = min(vectors.shape[1:]) // len(vectors)
    parts = [np.linalg.svd(vector, full_matrices=False) for vector in vectors]
    left, right = (
        np.hstack([u[:, :rank] for u, _, _ in parts]),
        np.vstack([v[:rank] for _, _, v in parts]),
    )
    singular = np.concatenate(
        [strength * s[:rank] for strength, (_, s, _) in zip(strengths, parts, strict=True)]
    )
    (p, _, q), (r, _, t) = (np.linalg.svd(matrix, full_matrices=False) for matrix in (left, right))
    return np.asarray((p @ q) * singular @ (r @ t))


def reference(method: str, vectors: np.ndarray, lambdas: np.ndarray, density: float) -> np.ndarray:
    """What the merged task vector must be, from task vectors [experts, ...]."""
    mean = np.average(vectors, axis=0, weights=lambdas)
    strengths = lambdas / lambdas.mean()
    if method == "task-arithmetic":
        return np.asarray(np.tensordot(lambdas, vectors, 1))
    if method == "ties":
        return ties(np.stack([trimmed(vector, density) for vector in vectors]), lambdas)
    if method == "dare-ties":
        masks = np.stack(
            [
                kept(5, "weight", task, 0, mean.size, density).numpy().reshape(mean.shape)
                for task in TASKS
            ]
        )
        return ties(vectors * masks / density, lambdas)
    if vectors.ndim != 3 or (method == "tsv-m" and min(vectors.shape[1:]) < len(vectors)):
        return np.asarray(mean)
    if method == "tsv-m":
        return separated_by_svd(vectors, strengths)
    u, s, v = np.linalg.svd(
        np.tensordot(strengths, vectors, 1), full_matrices=False
    )  # Iso-C, eq. 4
    return np.asarray(s.mean() * u @ v)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("method", ["task-arithmetic", "ties", "dare-ties", "tsv-m", "iso-c"])
def test_a_method_is_its_published_formula_whole_and_in_parts(
    method: str, shape: tuple[int, ...]
) -> None:
    experts, base = [float32(shape, seed) for seed in range(3)], float32(shape, 9)
    lambdas = np.array([1.0, 0.5, 2.0])
    vectors = np.stack([expert.double().numpy() - base.double().numpy() for expert in experts])
    expected = base.double().numpy() + reference(method, vectors, lambdas, 0.3)
    for rows in (None, 1, 2, 4):
        got = run(method, experts, base, lambdas.tolist(), rows=rows)
        tolerance = (
            1e-9 if got.dtype == np.float64 else 1e-6
        )  # a method that falls back on the mean
        np.testing.assert_allclose(got, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("method", [name for name, needs in NEEDS.items() if not needs.fisher])
def test_no_method_depends_on_the_order_of_the_experts(method: str) -> None:
    experts, base, lambdas = (
        [float32((9, 6), seed) for seed in range(3)],
        float32((9, 6), 9),
        [1.0, 0.5, 2.0],
    )
    one = run(method, experts, base, lambdas)
    two = run(method, experts[::-1], base, lambdas[::-1], tasks=TASKS[::-1])
    tolerance = 1e-12 if one.dtype == np.float64 else 1e-6
    np.testing.assert_allclose(one, two, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("method", [name for name, needs in NEEDS.items() if needs.base])
def test_experts_that_are_the_base_give_the_base(method: str) -> None:
    base = float32((9, 6), 9)
    np.testing.assert_array_equal(run(method, [base] * 3, base), base.double().numpy())


def test_a_task_that_changed_nothing_does_not_disturb_task_singular_vectors() -> None:
    base = float32((9, 6), 9)
    vector = float32((9, 6), 1)
    got = (
        run("tsv-m", [base + vector, base], base, [1.0, 1.0], tasks=TASKS[:2])
        - base.double().numpy()
    )
    u, s, v = np.linalg.svd(
        (base + vector).double().numpy() - base.double().numpy(), full_matrices=False
    )
    np.testing.assert_allclose(got, u[:, :3] * s[:3] @ v[:3], atol=1e-9)


@settings(deadline=None)
@given(
    hnp.arrays(
        np.float32,
        (2, 7),
        elements=st.one_of(st.just(0.0), st.floats(0, 1, width=32), st.floats(0, width=32)),
    ),
    st.integers(1, 7),
    st.integers(1, 7),
)
def test_the_kth_largest_is_that_of_a_sort(values: np.ndarray, k: int, width: int) -> None:
    got = kth_largest(
        lambda: (torch.from_numpy(values[:, at : at + width]) for at in range(0, 7, width)), k
    )
    assert got[:, 0].tolist() == np.sort(values, 1)[:, -k].tolist()


def test_what_dare_keeps_is_a_matter_of_the_place_alone() -> None:
    whole = kept(7, "a.weight", "mrpc", 0, 1000, 0.3)
    pieces = [
        kept(7, "a.weight", "mrpc", start, min(33, 1000 - start), 0.3)
        for start in range(0, 1000, 33)
    ]
    assert torch.equal(whole, torch.cat(pieces))
    assert 240 < int(whole.sum()) < 360
    assert kept(7, "a.weight", "mrpc", 0, 1000, 1.0).all()
    for other in ((8, "a.weight", "mrpc"), (7, "b.weight", "mrpc"), (7, "a.weight", "rte")):
        assert (
            300 < int((whole == kept(*other, 0, 1000, 0.3)).sum()) < 700
        )  # independent ones agree in 580


def test_dare_keeps_the_task_vector_in_expectation() -> None:
    vector = torch.full((20_000,), 2.0)
    dropped = drop(vector, kept(0, "w", "rte", 0, 20_000, 0.25), 0.25)
    assert set(dropped.tolist()) == {0.0, 8.0}
    assert float(dropped.mean()) == pytest.approx(2.0, rel=0.05)


@settings(deadline=None)
@given(problems(), st.data())
def test_partial_sums_recombine_to_the_merge_with_any_coefficients(
    problem: tuple[list[Tensor], list[Tensor], list[float]], data: st.DataObject
) -> None:
    experts, fisher, _ = problem
    lambdas = data.draw(st.lists(st.floats(0.05, 20), min_size=len(experts), max_size=len(experts)))
    equal = shares(fisher, [1.0] * len(experts))
    tasks = tuple(map(str, range(len(experts))))
    part = Part("p", experts[0].shape, 0, tuple(experts), None, equal, Settings(tasks, (), 1.0, 0))
    found = recombine(Sums({"p": summands(part).float()}, {"p": equal}, {}, {}), lambdas)["p"]
    largest = max(float(tensor.abs().max()) for tensor in experts)
    torch.testing.assert_close(
        found, merge(experts, fisher, lambdas), rtol=1e-5, atol=1e-5 * largest
    )


def test_partial_sums_of_nodes_without_fisher_are_averaged_by_lambda() -> None:
    experts, none = (
        [torch.tensor([[1.0, 2.0]]), torch.tensor([[5.0, 4.0]])],
        [torch.zeros(1, 1)] * 2,
    )
    equal = shares(none, [1.0, 1.0])
    part = Part("p", (1, 2), 0, tuple(experts), None, equal, Settings(("a", "b"), (), 1.0, 0))
    found = recombine(Sums({"p": summands(part).float()}, {"p": equal}, {}, {}), [3.0, 1.0])["p"]
    torch.testing.assert_close(found, torch.tensor([[2.0, 2.5]]))
