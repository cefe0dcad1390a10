"""Directions of the logits: what they sum up to, what is drawn, which labels are refused."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import kstest

from fmn.errors import UserError
from fmn.fisher.loss import Loss, uniform_draws
from tests.fisher.problems import MANY_LABELS, ONE_LABEL, VALUE

ROWS = np.arange(5000)
LOGITS = st.lists(st.floats(-800, 800), min_size=2, max_size=6)


def factor(problem_type: Any, logits: torch.Tensor) -> torch.Tensor:
    """The directions of "expected", [directions, C]."""
    loss = Loss("expected", problem_type, 0)
    return torch.cat(list(loss.directions(logits, torch.zeros(1), np.zeros(1))))


@given(LOGITS)
def test_directions_factor_the_covariance_of_one_label(logits: list[float]) -> None:
    row = torch.tensor([logits], dtype=torch.float64)
    directions = factor(ONE_LABEL, row)
    p = row.softmax(1)[0]
    covariance = p.diag() - p.outer(p)
    torch.testing.assert_close(directions.T @ directions, covariance, rtol=1e-9, atol=1e-15)
    # The diagonal, p (1 - p), is right to its last digits even where p is all but one or nothing.
    classes = torch.arange(len(logits))
    others = torch.stack([row[0][classes != k].logsumexp(0) for k in classes])
    diagonal = (row[0] + others - 2 * row.logsumexp(1)).exp()
    torch.testing.assert_close(directions.square().sum(0), diagonal, rtol=1e-9, atol=1e-300)
    assert len(directions) == len(logits) - 1


@given(LOGITS)
def test_directions_factor_the_covariance_of_independent_labels(logits: list[float]) -> None:
    row = torch.tensor([logits], dtype=torch.float64)
    directions = factor(MANY_LABELS, row)
    odds = row[0].abs().neg().exp()  # p (1 - p) to its last digits, from e^-|z|
    variances = odds / (1 + odds).square()
    covariance = directions.T @ directions
    torch.testing.assert_close(covariance, variances.diag(), rtol=1e-9, atol=1e-300)


def test_draws_are_uniform_and_belong_to_their_row_and_column() -> None:
    draws = uniform_draws(3, ROWS, 4)
    assert kstest(draws.flatten(), "uniform").pvalue > 1e-3
    for columns in ([*draws.T, *uniform_draws(4, ROWS, 2).T], [*draws.T, *np.roll(draws, 1, 0).T]):
        assert np.abs(np.corrcoef(columns) - np.eye(len(columns))).max() < 0.05
    order = np.random.default_rng(0).permutation(len(ROWS))
    np.testing.assert_array_equal(uniform_draws(3, ROWS[order], 4), draws[order])
    np.testing.assert_array_equal(uniform_draws(3, ROWS, 2), draws[:, :2])


@pytest.mark.parametrize(
    ("problem_type", "outputs", "labels", "message"),
    [
        (ONE_LABEL, 3, [], "there are no examples"),
        (ONE_LABEL, 1, [0], "1 outputs, but single_label_classification needs two or more"),
        (VALUE, 3, [0.5], "3 outputs, but regression needs one"),
        (ONE_LABEL, 3, [0, -1, 2], "from -1 to 2, do not fit: .* and 0 to 2"),
        (ONE_LABEL, 3, [0, 3], "from 0 to 3, do not fit: .* and 0 to 2"),
        (ONE_LABEL, 2, [0.5], "from 0.5 to 0.5"),
        (ONE_LABEL, 2, [[0, 1]], r"of shape \[1, 2\], .* takes the shape \[1\]"),
        (MANY_LABELS, 2, [0, 0], r"of shape \[2\], .* takes the shape \[2, 2\]"),
        (MANY_LABELS, 2, [[0, 2]], "from 0 to 2, do not fit: .* and 0 to 1"),
        (VALUE, 1, [0.5, np.nan], "from nan to nan, do not fit: .* and finite"),
    ],
)
def test_labels_and_heads_that_do_not_fit_are_refused(
    problem_type: Any, outputs: int, labels: list[Any], message: str
) -> None:
    for estimator in ("empirical", "batch"):
        with pytest.raises(UserError, match=message):
            Loss(estimator, problem_type, 0).check(np.array(labels), outputs)


def test_labels_that_are_not_read_may_be_anything() -> None:
    for estimator in ("expected", "sampled"):
        Loss(estimator, MANY_LABELS, 0).check(np.zeros(4, np.int64), 3)
    with pytest.raises(UserError, match="choose the estimator expected"):
        Loss("empirical", MANY_LABELS, 0).check(np.zeros(4, np.int64), 3)
    with pytest.raises(UserError, match="'exact' is unknown: choose one of empirical, expected"):
        Loss("exact", ONE_LABEL, 0).check(np.zeros(4, np.int64), 3)
