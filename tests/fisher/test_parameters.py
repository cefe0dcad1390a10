"""The exact diagonal Fisher information, against one plain backward pass after another."""

from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional
from transformers import PreTrainedModel

from fmn.errors import UserError
from fmn.fisher import parameters
from fmn.tasks.batches import Examples, select
from tests.tiny import tiny_examples, tiny_model


def run(
    model: PreTrainedModel, examples: Examples, estimator: str, **options: Any
) -> dict[str, torch.Tensor]:
    regression = model.config.num_labels == 1
    options = {"device": "cpu", "dtype": "float64", **options}
    return parameters.estimate(
        model, examples, estimator=estimator, regression=regression, **options
    )


def by_hand(model: PreTrainedModel, examples: Examples, estimator: str) -> dict[str, torch.Tensor]:
    """Mean over examples of (gradient of the loss)^2, weighed by p_c for "expected"."""
    own = dict(model.base_model.named_parameters())
    sums = {key: torch.zeros_like(value) for key, value in own.items()}
    for row, label in enumerate(examples.labels):
        logits = model(input_ids=torch.tensor([examples.inputs["input_ids"][row]])).logits[0]
        if len(logits) == 1:
            loss = (logits[0] - float(label)) ** 2 if estimator == "empirical" else logits[0]
            losses = [(loss, 1.0)]
        elif estimator == "empirical":
            losses = [(functional.cross_entropy(logits[None], torch.tensor([int(label)])), 1.0)]
        else:
            log_p = logits.log_softmax(0)
            losses = [(each, float(each.detach().exp())) for each in log_p]
        for loss, weight in losses:
            gradients = torch.autograd.grad(
                loss, list(own.values()), retain_graph=True, allow_unused=True
            )
            for key, gradient in zip(own, gradients, strict=True):
                if gradient is not None:
                    sums[key] += weight * gradient**2
    return {key: value / len(examples) for key, value in sums.items()}


@pytest.mark.parametrize("name", ["bert", "albert", "gpt2"])
@pytest.mark.parametrize("outputs", [1, 3])
@pytest.mark.parametrize("estimator", ["empirical", "expected"])
def test_it_is_the_mean_of_squared_gradients(name: str, outputs: int, estimator: str) -> None:
    model, examples = tiny_model(name, outputs), tiny_examples(name, 5, outputs)
    squares, expected = run(model, examples, estimator), by_hand(model, examples, estimator)
    assert squares.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(squares[key], value, rtol=1e-9, atol=1e-14)


def test_sampled_is_unbiased_for_expected() -> None:
    model, examples = tiny_model("bert"), tiny_examples("bert", 2)
    name = "encoder.layer.0.output.dense.weight"
    exact = run(model, examples, "expected")[name].sum()
    draws = [run(model, examples, "sampled", seed=seed)[name].sum() for seed in range(200)]
    error = torch.stack(draws).std() / np.sqrt(len(draws))
    assert abs(torch.stack(draws).mean() - exact) < 4 * error


def test_the_sample_is_that_of_the_mask_fisher_and_the_model_is_left_alone() -> None:
    model, examples = tiny_model("bert").train(), tiny_examples("bert", 9)
    seen: list[tuple[int, int]] = []
    sample = run(
        model, examples, "empirical", samples=4, seed=3, progress=lambda *done: seen.append(done)
    )
    alone = run(model, examples.take(select(examples.labels, 4, 3)), "empirical")
    assert all(torch.equal(sample[name], alone[name]) for name in alone)
    assert seen == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert model.training
    assert all(parameter.grad is None for parameter in model.parameters())


def test_an_unknown_estimator_is_refused() -> None:
    with pytest.raises(UserError, match="choose one of empirical, expected, sampled"):
        run(tiny_model("bert"), tiny_examples("bert", 2), "batch")
