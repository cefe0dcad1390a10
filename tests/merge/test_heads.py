"""Heads re-aligned with a merged encoder, against least squares and leave-one-out by hand."""

from typing import Any

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st

from fmn.errors import UserError
from fmn.merge import heads
from fmn.merge.recipe import Fit
from fmn.models.predict import predict
from fmn.tasks.batches import Examples
from tests.tiny import CONFIGS, tiny_examples, tiny_model

LAST = {
    "bert": "classifier",
    "roberta": "classifier.out_proj",
    "distilbert": "classifier",
    "electra": "classifier.out_proj",
    "mpnet": "classifier.out_proj",
    "albert": "classifier",
    "deberta-v2": "classifier",
    "modernbert": "classifier",
    "gpt2": "score",
    "llama": "score",
    "t5": "classification_head.out_proj",
}
FLOAT64: dict[str, Any] = {"device": "cpu", "dtype": "float64"}
SHAPES = st.tuples(
    st.integers(2, 12), st.integers(1, 5), st.integers(1, 3), st.integers(0, 2**32 - 1)
)


class Problem:
    """Random features of an expert and of a merged model, and the head's last map.

    As one matrix, the map is `old` [C, n or n + 1], of which `read` [N, n or n + 1] is the input
    and `wanted` [N, C] the output that is wanted.
    """

    def __init__(self, shape: tuple[int, int, int, int], has_bias: bool = True) -> None:
        texts, width, outputs, seed = shape
        rng = np.random.default_rng(seed)
        self.own = rng.normal(size=(texts, width))
        self.merged = self.own @ rng.normal(size=(width, width)) + rng.normal(size=width)
        self.merged += 0.1 * rng.normal(size=self.own.shape)
        self.weight = rng.normal(size=(outputs, width))
        self.bias = rng.normal(size=outputs) if has_bias else None
        self.read = np.hstack([self.merged, np.ones((texts, 1))]) if has_bias else self.merged
        self.old = self.joined(self.weight, self.bias)
        self.wanted = self.own @ self.weight.T + (0 if self.bias is None else self.bias)

    def joined(self, weight: np.ndarray, bias: np.ndarray | None) -> np.ndarray:
        return weight if bias is None else np.hstack([weight, bias[:, None]])

    def refit(self, ridge: float | str) -> tuple[np.ndarray, Fit]:
        weight, bias, fit = heads.refit(self.own, self.merged, self.weight, self.bias, ridge)
        assert (bias is None) == (self.bias is None)
        return self.joined(weight, bias), fit


@given(SHAPES, st.sampled_from([0.0, 1e-3, 1.0, "auto"]))
def test_the_same_encoder_leaves_the_head_as_it_is(
    shape: tuple[int, int, int, int], ridge: float | str
) -> None:
    problem = Problem(shape)
    problem.merged = problem.own
    new, fit = problem.refit(ridge)
    np.testing.assert_array_equal(new, problem.old)
    assert fit.before == 0


@given(SHAPES, st.booleans())
def test_without_ridge_it_is_least_squares(
    shape: tuple[int, int, int, int], has_bias: bool
) -> None:
    problem = Problem(shape, has_bias)
    read, wanted = problem.read, problem.wanted
    new, _ = problem.refit(0.0)
    spread = np.linalg.svd(read, compute_uv=False)
    if len(read) >= read.shape[1] and spread[-1] > 1e-3 * spread[0]:
        fitted = np.linalg.lstsq(read, wanted, rcond=None)[0].T
        np.testing.assert_allclose(new, fitted, rtol=1e-6, atol=1e-6)
    before, after = (((read @ each.T - wanted) ** 2).sum() for each in (problem.old, new))
    assert after <= before + 1e-9


@given(SHAPES, st.sampled_from([1e-3, 0.1, 1.0, 30.0]), st.booleans())
def test_it_is_the_least_of_what_it_says_it_minimises(
    shape: tuple[int, int, int, int], ridge: float, has_bias: bool
) -> None:
    problem = Problem(shape, has_bias)
    read, wanted, old = problem.read, problem.wanted, problem.old
    weight = ridge * (read**2).mean()

    def objective(new: np.ndarray) -> float:
        errors = ((read @ new.T - wanted) ** 2).sum(1)
        return float(errors.mean() + weight * ((new - old) ** 2).sum())

    new, _ = problem.refit(ridge)
    slope = 2 * ((read @ new.T - wanted).T @ read / len(read) + weight * (new - old))
    np.testing.assert_allclose(slope, 0, atol=1e-8 * max(1, objective(old)))
    assert objective(new) <= objective(old) + 1e-12


@given(SHAPES.filter(lambda shape: shape[0] > 2), st.sampled_from([1e-2, 1.0, 10.0]))
def test_the_error_is_that_of_leaving_each_text_out(
    shape: tuple[int, int, int, int], ridge: float
) -> None:
    problem = Problem(shape)
    read, lacking = problem.read, (problem.own - problem.merged) @ problem.weight.T
    penalty = ridge * len(read) * (read**2).mean() * np.eye(read.shape[1])
    errors = []
    for text in range(len(read)):
        others = np.arange(len(read)) != text
        gram, moment = read[others].T @ read[others], read[others].T @ lacking[others]
        step = np.linalg.solve(gram + penalty, moment)
        errors.append(((lacking[text] - read[text] @ step) ** 2).mean())
    variance = (problem.own @ problem.weight.T).var(0).mean()
    assert problem.refit(ridge)[1].after == pytest.approx(np.mean(errors) / variance, rel=1e-6)


def test_auto_takes_the_ridge_that_answers_new_texts_best() -> None:
    rng = np.random.default_rng(0)
    own, weight, bias = rng.normal(size=(200, 10)), rng.normal(size=(2, 10)), rng.normal(size=2)
    turned = own @ np.linalg.qr(rng.normal(size=(10, 10)))[0] + 1
    new_weight, new_bias, fit = heads.refit(own, turned, weight, bias)
    assert fit.after is not None
    assert fit.after < 1e-6 < fit.before
    answers = turned @ new_weight.T + new_bias
    np.testing.assert_allclose(answers, own @ weight.T + bias, atol=1e-3)
    unrelated = rng.normal(size=(12, 10))
    assert heads.refit(own[:12], unrelated, 1e-3 * weight, bias)[2].ridge > fit.ridge


def test_a_head_that_is_the_mean_of_two_is_refused() -> None:
    """To turn the outputs of one of them only would be wrong without a word."""
    config = transformers.DeiTConfig(**CONFIGS["vit"]().to_dict() | {"model_type": "deit"})
    model = transformers.DeiTForImageClassificationWithTeacher(config)
    with pytest.raises(UserError, match=r"mean of two heads.* as a DeiTForImageClassification"):
        heads.last_linear(model)


@pytest.mark.parametrize(("name", "path"), LAST.items())
def test_the_features_are_what_the_last_linear_map_of_the_head_reads(name: str, path: str) -> None:
    model = tiny_model(name, 3)
    model.config.pad_token_id = model.config.pad_token_id or 0
    examples = tiny_examples(name, 7)
    assert heads.last_linear(model) == path
    read = heads.features(model, examples, **FLOAT64)
    weight, bias = heads.last_map(model)
    for row in range(len(examples)):
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([examples.inputs["input_ids"][row]])).logits[0]
        fitted = read[row] @ weight.T + (0 if bias is None else bias)
        np.testing.assert_allclose(fitted, logits.numpy(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["bert", "roberta", "distilbert", "electra"])
@pytest.mark.parametrize("outputs", [1, 3])
def test_a_head_above_another_encoder_answers_as_the_expert_does(name: str, outputs: int) -> None:
    expert, other = tiny_model(name, outputs, seed=1), tiny_model(name, outputs, seed=2)
    texts = tiny_examples(name, 16, outputs)  # fewer than features: some map answers all of them
    wanted = predict(expert, texts, **FLOAT64)
    own, last = heads.features(expert, texts, **FLOAT64), heads.last_map(expert)
    with torch.no_grad():
        for parameter, target in zip(
            expert.base_model.parameters(), other.base_model.parameters(), strict=True
        ):
            if parameter.ndim == 2:
                parameter.lerp_(target, 0.3)
    assert np.abs(predict(expert, texts, **FLOAT64) - wanted).max() > 0.1
    weight, bias, _ = heads.refit(own, heads.features(expert, texts, **FLOAT64), *last, 0.0)
    expert.load_state_dict(heads.tensors(expert, weight, bias), strict=False)
    np.testing.assert_allclose(predict(expert, texts, **FLOAT64), wanted, atol=1e-4)


def test_labels_are_not_looked_at_and_the_head_is_put_back() -> None:
    model, examples = tiny_model("bert", 3), tiny_examples("bert", 6)
    before = predict(model, examples, **FLOAT64)
    plain = heads.features(model, examples, **FLOAT64)
    shuffled = Examples(examples.inputs, examples.labels[::-1], examples.pad)
    np.testing.assert_array_equal(heads.features(model, shuffled, **FLOAT64), plain)
    np.testing.assert_array_equal(predict(model, examples, **FLOAT64), before)
