"""Merging linear maps by regression, against least squares on the inputs themselves."""

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fmn.merge.rules import damped, regress, rounded


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
