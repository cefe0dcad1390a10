"""The merge rules, against plain numpy and the properties that they must have."""

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from torch import Tensor

from fmn.merge.rules import (
    damped,
    drop,
    generator,
    leading_svd,
    regress,
    rounded,
    shares,
    trim,
    weighted_mean,
)

FLOAT32 = st.floats(-1e6, 1e6, width=32)
FISHER = st.one_of(st.just(0.0), st.floats(0, 1e300), st.floats(0, 1e-300))
Problem = tuple[list[Tensor], list[Tensor], list[float]]
COEFFICIENT = st.one_of(st.just(0.0), st.floats(1e-3, 1e3))


def doubles(values: Sequence[float] | Sequence[Sequence[float]]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


@st.composite
def problems(draw: st.DrawFn) -> Problem:
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
    theta, fisher = rng.normal(size=(3, 4, 5)), rng.gamma(1.0, size=(3, 4, 1))
    lambdas = np.array([0.2, 0.5, 0.3])
    weights = lambdas[:, None, None] * fisher
    expected = (weights * theta).sum(0) / weights.sum(0)
    merged = merge(list(torch.from_numpy(theta)), list(torch.from_numpy(fisher)), lambdas.tolist())
    np.testing.assert_allclose(merged.numpy(), expected, rtol=1e-13)


@given(problems())
def test_a_merge_does_not_depend_on_the_order_and_changes_no_input(problem: Problem) -> None:
    before = [tensor.clone() for tensors in problem[:2] for tensor in tensors]
    experts, fisher, coefficients = problem
    merged = merge(experts, fisher, coefficients)
    turned = merge(experts[::-1], fisher[::-1], coefficients[::-1])
    largest = max(tensor.abs().max() for tensor in experts)
    torch.testing.assert_close(merged, turned, rtol=1e-6, atol=1e-6 * float(largest))
    assert all(torch.equal(a, b) for a, b in zip(before, [*experts, *fisher], strict=True))


@given(problems())
def test_identical_experts_give_the_expert_bit_for_bit(problem: Problem) -> None:
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
    "parts", [(0.0, 0.5, 0.5), (1.0, 0.0, 0.0), (0.2, 0.8, 0.0), (0.0, 0.0, 1.0)]
)
@pytest.mark.parametrize("rows", [1, 40])
def test_what_is_not_finite_is_never_lost(
    rows: int, parts: tuple[float, ...], value: float
) -> None:
    for bad in range(3):
        experts = [torch.randn(40, 9) for _ in range(3)]
        experts[bad][17, 4] = value
        mean = weighted_mean(experts, doubles(parts).reshape(3, 1, 1).expand(3, rows, 1))
        assert not mean[17, 4].isfinite()
        assert int(mean.isfinite().sum()) == 40 * 9 - 1


@given(problems())
def test_shares_are_a_convex_combination(problem: Problem) -> None:
    _, fisher, coefficients = problem
    parts = shares(fisher, coefficients)
    assert (parts >= 0).all()
    torch.testing.assert_close(parts.sum(0), torch.ones_like(parts[0]), rtol=1e-14, atol=0)
    assert not parts[torch.tensor(coefficients) == 0].any()


@pytest.mark.parametrize(
    ("fisher", "coefficients", "expected"),
    [
        ([0.0, 0.0], [3.0, 1.0], [0.75, 0.25]),
        ([0.0, 2.0], [3.0, 1.0], [0.0, 1.0]),
        ([1.0, 1.0], [3.0, 1.0], [0.75, 0.25]),
        ([0.0, 0.0, 5.0], [1.0, 3.0, 0.0], [0.25, 0.75, 0.0]),
    ],
)
def test_a_node_without_fisher_takes_the_weighted_average(
    fisher: list[float], coefficients: list[float], expected: list[float]
) -> None:
    assert shares(list(doubles(fisher)), coefficients).tolist() == pytest.approx(expected)


@pytest.mark.parametrize("unit", [5e-324, 1e-310, 1.0, 4e307])
def test_subnormal_and_huge_fisher_keep_their_ratio(unit: float) -> None:
    parts = shares([doubles([unit]), doubles([4 * unit])], [1e-200, 1e-200])
    assert [float(part) for part in parts] == pytest.approx([0.2, 0.8], rel=1e-12)


@given(
    hnp.arrays(np.float32, 7, elements=st.one_of(st.just(0.0), st.floats(-1, 1, width=32))),
    st.floats(0.01, 1),
)
def test_the_largest_magnitudes_stay(values: np.ndarray, density: float) -> None:
    count = max(1, int(density * 7))
    threshold = np.sort(np.abs(values))[-count]
    expected = np.where(np.abs(values) >= threshold, values, 0.0)
    np.testing.assert_array_equal(trim(torch.from_numpy(values), density).numpy(), expected)


def test_what_is_dropped_depends_on_seed_task_and_parameter_alone() -> None:
    ones = torch.ones(1000)
    draw = (7, "mrpc", "a.weight")
    dropped = drop(ones, 0.3, generator(*draw))
    assert torch.equal(dropped, drop(ones, 0.3, generator(*draw)))
    assert 240 < int((dropped > 0).sum()) < 360
    assert drop(ones, 1.0, generator(*draw)).all()
    for other in ((8, "mrpc", "a.weight"), (7, "rte", "a.weight"), (7, "mrpc", "b.weight")):
        same = dropped == drop(ones, 0.3, generator(*other))
        assert 300 < int(same.sum()) < 700  # independent draws agree in 580


def test_dropping_keeps_the_task_vector_in_expectation() -> None:
    dropped = drop(torch.full((20_000,), 2.0), 0.25, generator(0, "rte", "w"))
    assert set(dropped.tolist()) == {0.0, 8.0}
    assert float(dropped.mean()) == pytest.approx(2.0, rel=0.05)


# ---------------------------------------------------------------------------------------------
# Regression of linear maps, against least squares on the inputs themselves


def problem(
    seed: int, experts: int, rows: int, width: int
) -> tuple[list[Tensor], list[np.ndarray]]:
    """Matrices [rows, width], and inputs [tokens, width] of each expert."""
    random = np.random.default_rng(seed)
    inputs = [
        random.normal(random.normal(size=width), 1.0, size=(40, width)) for _ in range(experts)
    ]
    return [torch.from_numpy(random.normal(size=(rows, width))) for _ in range(experts)], inputs


def grams(inputs: Sequence[np.ndarray]) -> list[Tensor]:
    return [torch.from_numpy(tokens.T @ tokens / len(tokens)) for tokens in inputs]


def assert_least_squares(
    merged: Tensor, matrices: Sequence[Tensor], inputs: Sequence[np.ndarray], weights: np.ndarray
) -> None:
    """Row by row, the outputs are nearest to the experts', weighed by `weights` [experts, rows]."""
    expected = []
    for row in range(len(matrices[0])):
        roots = np.sqrt(weights[:, row])
        x = [root * tokens for root, tokens in zip(roots, inputs, strict=True)]
        y = [tokens @ matrix[row].numpy() for tokens, matrix in zip(x, matrices, strict=True)]
        expected.append(np.linalg.lstsq(np.concatenate(x), np.concatenate(y), rcond=None)[0])
    tokens = np.concatenate(inputs)
    errors = tokens @ (merged.numpy() - np.stack(expected)).T
    assert np.abs(errors).max() < 1e-4 * np.abs(tokens).max()


@given(st.integers(0, 10**6), st.integers(1, 4), st.integers(1, 5), st.integers(1, 6))
def test_it_is_least_squares_on_the_experts_outputs(
    seed: int, experts: int, rows: int, width: int
) -> None:
    matrices, inputs = problem(seed, experts, rows, width)
    random = np.random.default_rng(seed)
    for weights in (np.ones((experts, 1)), random.gamma(1.0, size=(experts, 1))):
        merged = regress(matrices, grams(inputs), torch.from_numpy(weights))
        assert_least_squares(merged, matrices, inputs, np.repeat(weights, rows, 1))


@given(st.integers(0, 10**6), st.integers(2, 4))
def test_rows_have_weights_of_their_own(seed: int, experts: int) -> None:
    matrices, inputs = problem(seed, experts, 5, 4)
    weights = rounded(torch.from_numpy(np.random.default_rng(seed).gamma(1.0, size=(experts, 5))))
    merged = regress(matrices, grams(inputs), weights)
    assert_least_squares(merged, matrices, inputs, weights.numpy())


@given(st.integers(0, 10**6), st.integers(1, 4))
def test_equal_experts_are_the_result_bit_for_bit(seed: int, experts: int) -> None:
    matrices, inputs = problem(seed, experts, 6, 5)
    same = [matrices[0].float()] * experts
    weights = torch.from_numpy(np.random.default_rng(seed).gamma(0.2, size=(experts, 6)))
    for some in (weights, weights[:, :1]):
        merged = regress(same, grams(inputs), some)
        assert torch.equal(merged.float(), same[0])


def test_the_order_of_the_experts_does_not_matter() -> None:
    matrices, inputs = problem(0, 3, 6, 5)
    weights = torch.rand(3, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    first = regress(matrices, grams(inputs), weights)
    second = regress(matrices[::-1], grams(inputs[::-1]), weights.flip(0))
    torch.testing.assert_close(first, second, rtol=1e-9, atol=1e-9)


def test_where_no_input_goes_and_where_no_weight_is_the_experts_are_averaged() -> None:
    matrices, inputs = problem(0, 2, 3, 4)
    for tokens in inputs:
        tokens[:, 2] = 0  # a dead neuron before this map
    merged = regress(matrices, grams(inputs), torch.ones(2, 1))
    torch.testing.assert_close(merged[:, 2], (matrices[0] + matrices[1])[:, 2] / 2)
    weights = torch.tensor([[1.0, 0.0, 3.0], [2.0, 0.0, 0.0]])
    rows = regress(matrices, grams(inputs), weights)
    torch.testing.assert_close(rows[1], merged[1], rtol=1e-9, atol=1e-9)
    silent = regress(matrices, [torch.zeros(4, 4, dtype=torch.float64)] * 2, torch.ones(2, 1))
    torch.testing.assert_close(silent, (matrices[0] + matrices[1]) / 2)


def test_damping_shrinks_what_is_off_the_diagonal() -> None:
    full = torch.tensor([[2.0, 1.0], [1.0, 3.0]])
    assert damped(full, 0.9).tolist() == [[2.0, pytest.approx(0.9)], [pytest.approx(0.9), 3.0]]
    assert torch.equal(damped(full, 1.0), full)


@given(st.lists(st.floats(1e-300, 1e300), min_size=2, max_size=4))
def test_rounded_weights_are_near_and_relative_to_the_largest(values: list[float]) -> None:
    weights = torch.tensor(values, dtype=torch.float64)[:, None]
    result = rounded(weights, 0.25)
    assert result.max() == 1
    exact = (weights / weights.max()).clamp(min=2.0**-20)
    assert ((result / exact).log2().abs() <= 0.125 + 1e-9).all()


def test_weights_that_are_all_zero_count_alike() -> None:
    assert rounded(torch.zeros(3, 2)).tolist() == [[1, 1]] * 3


@pytest.mark.parametrize("shape", [(9, 4), (4, 9), (6, 6)])
def test_the_leading_singular_vectors_are_those_of_an_svd(shape: tuple[int, int]) -> None:
    random = np.random.default_rng(0)
    low_rank = random.normal(size=(shape[0], 2)) @ random.normal(size=(2, shape[1]))
    for matrix, rank in ((random.normal(size=shape), 3), (low_rank, 2), (np.zeros(shape), 0)):
        u, s, vh = (part.numpy() for part in leading_svd(torch.from_numpy(matrix), 3))
        left, spread, right = np.linalg.svd(matrix)
        np.testing.assert_allclose(s, spread[:rank], rtol=1e-9)
        expected = left[:, :rank] * spread[:rank] @ right[:rank]
        np.testing.assert_allclose(u * s @ vh, expected, atol=1e-9)
        np.testing.assert_allclose(u.T @ u, np.eye(rank), atol=1e-9)


def equations() -> tuple[list[Tensor], list[Tensor], Tensor]:
    """Four experts; some of their rows have the same weights."""
    torch.manual_seed(0)
    moments = [(x := torch.randn(64, 24, dtype=torch.float64)).T @ x for _ in range(4)]
    matrices = [torch.randn(40, 24, dtype=torch.float64) for _ in moments]
    return matrices, moments, torch.rand(4, 40).pow(8)[:, torch.randint(0, 30, (40,))]


@pytest.mark.parametrize("at_once", [2, 3, 1000])
def test_equations_that_are_solved_together_have_the_same_solutions(at_once: int) -> None:
    torch.testing.assert_close(regress(*equations(), at_once), regress(*equations(), 1))


@pytest.mark.gpu
def test_a_gpu_solves_the_same_equations() -> None:
    matrices, moments, weights = equations()
    on_gpu = regress([m.cuda() for m in matrices], [m.cuda() for m in moments], weights)
    torch.testing.assert_close(on_gpu.cpu(), regress(matrices, moments, weights))
