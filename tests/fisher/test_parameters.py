"""The exact diagonal Fisher information, against one plain backward pass after another."""

import numpy as np
import pytest
import torch
from torch.nn import functional

from fmn.errors import UserError
from fmn.fisher import parameters as diagonal
from tests.tiny import tiny_examples, tiny_model


def by_hand(name: str, outputs: int, estimator: str, count: int) -> dict[str, torch.Tensor]:
    """Mean over examples of (gradient of the loss)^2, weighed by p_c for `expected`."""
    model, examples = tiny_model(name, outputs), tiny_examples(name, count, outputs)
    parameters = dict(model.base_model.named_parameters())
    sums = {key: torch.zeros_like(value) for key, value in parameters.items()}
    for row, label in enumerate(examples.labels):
        logits = model(input_ids=torch.tensor([examples.inputs["input_ids"][row]])).logits[0]
        if outputs == 1:
            losses = (
                [((logits[0] - float(label)) ** 2, 1.0)]
                if estimator == "empirical"
                else [(logits[0], 1.0)]
            )
        elif estimator == "empirical":
            losses = [(functional.cross_entropy(logits[None], torch.tensor([int(label)])), 1.0)]
        else:
            log_p = logits.log_softmax(0)
            losses = [(log_p[c], float(log_p[c].detach().exp())) for c in range(outputs)]
        for loss, weight in losses:
            found = torch.autograd.grad(
                loss, list(parameters.values()), retain_graph=True, allow_unused=True
            )
            for key, gradient in zip(parameters, found, strict=True):
                if gradient is not None:
                    sums[key] += weight * gradient**2
    return {key: value / count for key, value in sums.items()}


@pytest.mark.parametrize("name", ["bert", "albert", "gpt2"])
@pytest.mark.parametrize(
    ("outputs", "estimator"), [(3, "empirical"), (3, "expected"), (1, "empirical"), (1, "expected")]
)
def test_it_is_the_mean_of_squared_gradients(name: str, outputs: int, estimator: str) -> None:
    found = diagonal.estimate(
        tiny_model(name, outputs), tiny_examples(name, 5, outputs), estimator=estimator, regression=outputs == 1,
        device="cpu", dtype="float64",
    )  # fmt: skip
    expected = by_hand(name, outputs, estimator, 5)
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=1e-9, atol=1e-14)


def test_sampled_is_unbiased_for_expected() -> None:
    model, examples = tiny_model("bert"), tiny_examples("bert", 2)
    name = "encoder.layer.0.output.dense.weight"

    def estimate(estimator: str, seed: int = 0) -> dict[str, torch.Tensor]:
        return diagonal.estimate(
            model,
            examples,
            estimator=estimator,
            regression=False,
            seed=seed,
            device="cpu",
            dtype="float64",
        )

    exact = estimate("expected")
    draws = [estimate("sampled", seed) for seed in range(200)]
    mean = torch.stack([draw[name].sum() for draw in draws])
    error = mean.std() / np.sqrt(len(draws))
    assert abs(mean.mean() - exact[name].sum()) < 4 * error


def test_the_sample_is_that_of_the_mask_fisher_and_the_model_is_left_alone() -> None:
    model, examples = tiny_model("bert"), tiny_examples("bert", 9)
    model.train()
    seen: list[tuple[int, int]] = []
    part = diagonal.estimate(
        model, examples, estimator="empirical", regression=False, samples=4, seed=3, device="cpu",
        progress=lambda done, total: seen.append((done, total)),
    )  # fmt: skip
    from fmn.tasks.batches import select

    chosen = examples.take(select(examples.labels, 4, 3))
    whole = diagonal.estimate(model, chosen, estimator="empirical", regression=False, device="cpu")
    assert all(torch.equal(part[name], whole[name]) for name in whole)
    assert seen == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert model.training
    assert all(parameter.grad is None for parameter in model.parameters())


def test_an_unknown_estimator_is_refused() -> None:
    with pytest.raises(UserError, match="choose one of empirical, expected, sampled"):
        diagonal.estimate(
            tiny_model("bert"), tiny_examples("bert", 2), estimator="batch", regression=False
        )
