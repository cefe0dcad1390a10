"""The exact diagonal Fisher information, against one plain backward pass after another."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from fmn.errors import UserError
from fmn.fisher import parameters
from fmn.tasks.batches import Examples, select
from fmn.tasks.kinds import ProblemType
from fmn.tasks.task import LossName
from tests.fisher.problems import (
    MANY_LABELS,
    ONE_LABEL,
    PROBLEMS,
    labelled,
    logits_of,
    losses,
    squares,
)
from tests.tiny import tiny_examples, tiny_generator, tiny_model, tiny_texts


def run(
    model: PreTrainedModel,
    examples: Examples,
    estimator: str,
    problem_type: LossName = ONE_LABEL,
    **options: Any,
) -> dict[str, Tensor]:
    options = {"device": "cpu", "dtype": "float64", "problem_type": problem_type, **options}
    return parameters.estimate(model, examples, estimator=estimator, **options)


@pytest.mark.parametrize("name", ["bert", "albert", "gpt2"])
@pytest.mark.parametrize(("problem_type", "outputs"), PROBLEMS)
@pytest.mark.parametrize("estimator", ["empirical", "expected"])
def test_it_is_the_mean_of_squared_gradients(
    name: str, problem_type: ProblemType, outputs: int, estimator: str
) -> None:
    model, examples = tiny_model(name, outputs), labelled(name, 3, problem_type, outputs)
    own = dict(model.base_model.named_parameters())
    means = {key: torch.zeros_like(value) for key, value in own.items()}
    for row, label in enumerate(examples.labels):
        weighted = losses(problem_type, logits_of(model, examples, row), label, estimator)
        for mean, term in zip(means.values(), squares(weighted, list(own.values())), strict=True):
            mean += term / len(examples)
    result = run(model, examples, estimator, problem_type)
    assert result.keys() == means.keys()
    for key, value in means.items():
        torch.testing.assert_close(result[key], value.detach(), rtol=1e-9, atol=1e-14)


@pytest.mark.parametrize(("problem_type", "outputs"), [(ONE_LABEL, 3), (MANY_LABELS, 3)])
def test_sampled_is_unbiased_for_expected(problem_type: ProblemType, outputs: int) -> None:
    model, examples = tiny_model("bert", outputs), tiny_examples("bert", 2)
    name = "encoder.layer.0.output.dense.weight"
    exact = run(model, examples, "expected", problem_type)[name].sum()
    draws = torch.stack(
        [run(model, examples, "sampled", problem_type, seed=s)[name].sum() for s in range(100)]
    )
    assert abs(draws.mean() - exact) < 4 * draws.std() / np.sqrt(len(draws))


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


@pytest.mark.parametrize("name", ["gpt2", "llama", "t5", "bart"])
def test_of_generated_text_it_is_that_of_all_parameters_by_transformers_own_loss(name: str) -> None:
    model, examples = tiny_generator(name), tiny_texts(name, 3)
    own = {n.removeprefix("transformer.").removeprefix("model."): p
           for n, p in model.named_parameters()}  # fmt: skip
    means = {key: torch.zeros_like(value) for key, value in own.items()}
    for row, labels in enumerate(examples.labels):
        inputs = {key: torch.tensor([values[row]]) for key, values in examples.inputs.items()}
        logits = model(**inputs).logits[0]
        total = torch.nn.functional.cross_entropy(
            logits, torch.tensor(labels[: len(logits)]), ignore_index=-100, reduction="sum"
        )
        for mean, gradient in zip(
            means.values(), torch.autograd.grad(total, list(own.values()), allow_unused=True),
            strict=True,
        ):  # fmt: skip
            mean += 0 if gradient is None else gradient.square() / 3
    result = run(model, examples, "empirical", "tokens")
    assert result.keys() == means.keys()
    assert any(key in result for key in ("wte.weight", "shared.weight", "lm_head.weight"))
    for key, mean in means.items():
        torch.testing.assert_close(result[key], mean, rtol=1e-4, atol=1e-9)
