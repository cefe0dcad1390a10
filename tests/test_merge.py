"""The merge rule and the merge methods, against plain numpy and the properties that they must have."""

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from torch import Tensor

from fmn.merge import rescale, shares, weighted_sum

FLOAT32 = st.floats(-1e6, 1e6, width=32)
FISHER = st.one_of(st.just(0.0), st.floats(0, 1e300), st.floats(0, 1e-300))
COEFFICIENT = st.one_of(st.just(0.0), st.floats(1e-3, 1e3))


def doubles(values: Sequence[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


@st.composite
def problems(draw: st.DrawFn) -> tuple[list[Tensor], list[Tensor], list[float]]:
    """Experts [rows, columns], Fisher [rows, 1] and coefficients, not all zero."""
    count, rows, columns = draw(st.integers(1, 5)), draw(st.integers(1, 4)), draw(st.integers(1, 4))
    experts = draw(hnp.arrays(np.float32, (count, rows, columns), elements=FLOAT32))
    fisher = draw(hnp.arrays(np.float64, (count, rows, 1), elements=FISHER))
    coefficients = draw(st.lists(COEFFICIENT, min_size=count, max_size=count).filter(any))
    return list(torch.from_numpy(experts)), list(torch.from_numpy(fisher)), coefficients


def merge(experts: Sequence[Tensor], fisher: Sequence[Tensor], coefficients: Sequence[float]) -> Tensor:
    return weighted_sum(experts, shares(fisher, coefficients))


def test_the_rule_is_the_weighted_mean_of_the_paper() -> None:
    rng = np.random.default_rng(0)
    theta, fisher, lambdas = rng.normal(size=(3, 4, 5)), rng.gamma(1.0, size=(3, 4, 1)), np.array([0.2, 0.5, 0.3])
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
    merged, turned = merge(experts, fisher, coefficients), merge(experts[::-1], fisher[::-1], coefficients[::-1])
    largest = max(tensor.abs().max() for tensor in experts)
    torch.testing.assert_close(merged, turned, rtol=1e-13, atol=1e-13 * float(largest))
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


@settings(deadline=None)
@given(problems())
def test_shares_are_a_convex_combination(problem: tuple[list[Tensor], list[Tensor], list[float]]) -> None:
    _, fisher, coefficients = problem
    parts = torch.stack(shares(fisher, coefficients))
    assert (parts >= 0).all()
    torch.testing.assert_close(parts.sum(0), torch.ones_like(parts[0]), rtol=1e-14, atol=0)
    assert all((part == 0).all() for part, coefficient in zip(parts, coefficients, strict=True) if coefficient == 0)


def test_a_node_without_fisher_takes_the_weighted_average() -> None:
    fisher = [doubles([0.0, 0.0, 1.0]), doubles([0.0, 2.0, 1.0])]
    parts = torch.stack(shares(fisher, [3.0, 1.0]))
    torch.testing.assert_close(parts, torch.stack([doubles([0.75, 0.0, 0.75]), doubles([0.25, 1.0, 0.25])]))


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
