"""Heads re-aligned with a merged encoder, against least squares and leave-one-out by hand."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fmn.merge import heads
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
RIDGES = st.sampled_from([0.0, 1e-3, 1.0, "auto"])


def problem(shape: tuple[int, int, int, int], bias: bool = True) -> tuple[np.ndarray, ...]:
    """Random features of an expert and of a merged model, and the head's last map."""
    texts, width, outputs, seed = shape
    rng = np.random.default_rng(seed)
    own = rng.normal(size=(texts, width))
    merged = (
        own @ rng.normal(size=(width, width))
        + rng.normal(size=width)
        + 0.1 * rng.normal(size=own.shape)
    )
    return own, merged, rng.normal(size=(outputs, width)), rng.normal(size=outputs)


@given(SHAPES, RIDGES)
def test_the_same_encoder_leaves_the_head_as_it_is(
    shape: tuple[int, int, int, int], ridge: float | str
) -> None:
    own, _, weight, bias = problem(shape)
    fit = heads.refit(own, own, weight, bias, ridge)
    np.testing.assert_array_equal(fit.weight, weight)
    assert fit.bias is not None
    np.testing.assert_array_equal(fit.bias, bias)
    assert fit.before == 0


@given(SHAPES)
def test_a_large_ridge_leaves_the_head_as_it_is(shape: tuple[int, int, int, int]) -> None:
    own, merged, weight, bias = problem(shape)
    fit = heads.refit(own, merged, weight, bias, 1e12)
    np.testing.assert_allclose(fit.weight, weight, atol=1e-8)
    assert fit.bias is not None
    np.testing.assert_allclose(fit.bias, bias, atol=1e-8)


@given(SHAPES, st.booleans())
def test_without_ridge_it_is_least_squares(shape: tuple[int, int, int, int], biased: bool) -> None:
    own, merged, weight, bias = problem(shape)
    read = np.concatenate([merged, np.ones((len(merged), 1))], 1) if biased else merged
    wanted = own @ weight.T + (bias if biased else 0)
    spread = np.linalg.svd(read, compute_uv=False)
    fit = heads.refit(own, merged, weight, bias if biased else None, 0.0)
    answers = merged @ fit.weight.T + (fit.bias if biased else 0)
    if len(read) >= read.shape[1] and spread[-1] > 1e-3 * spread[0]:
        fitted = np.linalg.lstsq(read, wanted, rcond=None)[0].T
        np.testing.assert_allclose(fit.weight, fitted[:, : merged.shape[1]], rtol=1e-6, atol=1e-6)
        np.testing.assert_allclose(answers, read @ fitted.T, rtol=1e-6, atol=1e-6)
    assert ((answers - wanted) ** 2).sum() <= (
        (merged @ weight.T + (bias if biased else 0) - wanted) ** 2
    ).sum() + 1e-9


@given(SHAPES, st.sampled_from([1e-3, 0.1, 1.0, 30.0]), st.booleans())
def test_it_is_the_least_of_what_it_says_it_minimises(
    shape: Any, ridge: float, biased: bool
) -> None:
    own, merged, weight, bias = problem(shape)
    ones = np.ones((len(merged), 1))
    read = np.concatenate([merged, ones], 1) if biased else merged
    old = np.concatenate([weight, bias[:, None]], 1) if biased else weight
    wanted = own @ weight.T + (bias if biased else 0)
    energy = (read**2).mean()

    def objective(new: np.ndarray) -> float:
        return float(
            ((read @ new.T - wanted) ** 2).sum(1).mean() + ridge * energy * ((new - old) ** 2).sum()
        )

    fit = heads.refit(own, merged, weight, bias if biased else None, ridge)
    assert (fit.bias is not None) == biased
    fitted = (
        np.concatenate([fit.weight, fit.bias[:, None]], 1) if fit.bias is not None else fit.weight
    )
    slope = 2 * ((read @ fitted.T - wanted).T @ read / len(read) + ridge * energy * (fitted - old))
    np.testing.assert_allclose(slope, 0, atol=1e-8 * max(1, objective(old)))
    assert objective(fitted) <= objective(old) + 1e-12


@given(SHAPES, RIDGES)
def test_the_order_of_the_texts_does_not_matter(
    shape: tuple[int, int, int, int], ridge: float | str
) -> None:
    own, merged, weight, bias = problem(shape)
    order = np.random.default_rng(0).permutation(len(own))
    first, second = (
        heads.refit(*texts, weight, bias, ridge)
        for texts in ((own, merged), (own[order], merged[order]))
    )
    if ridge != 0:  # without, texts fewer than features do not settle the map to the last digit
        np.testing.assert_allclose(first.weight, second.weight, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(
        merged @ first.weight.T, merged @ second.weight.T, rtol=1e-5, atol=1e-5
    )


@given(SHAPES.filter(lambda shape: shape[0] > 2), st.sampled_from([1e-2, 1.0, 10.0]))
def test_the_error_is_that_of_leaving_each_text_out(
    shape: tuple[int, int, int, int], ridge: float
) -> None:
    own, merged, weight, bias = problem(shape)
    fit = heads.refit(own, merged, weight, bias, ridge)
    read = np.concatenate([merged, np.ones((len(merged), 1))], 1)
    lacking = (own - merged) @ weight.T
    penalty = ridge * len(read) * (read**2).mean() * np.eye(read.shape[1])
    missed = []
    for text in range(len(read)):
        others = np.arange(len(read)) != text
        step = np.linalg.solve(
            read[others].T @ read[others] + penalty, read[others].T @ lacking[others]
        )
        missed.append(((lacking[text] - read[text] @ step) ** 2).mean())
    assert fit.after == pytest.approx(np.mean(missed) / (own @ weight.T).var(0).mean(), rel=1e-6)


def test_auto_takes_the_ridge_that_answers_new_texts_best() -> None:
    rng = np.random.default_rng(0)
    own, weight, bias = rng.normal(size=(200, 10)), rng.normal(size=(2, 10)), rng.normal(size=2)
    turned = own @ np.linalg.qr(rng.normal(size=(10, 10)))[0] + 1
    learned = heads.refit(own, turned, weight, bias)
    assert learned.after is not None
    assert learned.after < 1e-6 < learned.before
    np.testing.assert_allclose(
        turned @ learned.weight.T + learned.bias, own @ weight.T + bias, atol=1e-3
    )
    unrelated = rng.normal(size=(12, 10))
    assert heads.refit(own[:12], unrelated, 1e-3 * weight, bias).ridge > learned.ridge


@pytest.mark.parametrize(("name", "path"), LAST.items())
def test_the_features_are_what_the_last_linear_map_of_the_head_reads(name: str, path: str) -> None:
    model = tiny_model(name, 3)
    if model.config.pad_token_id is None:
        model.config.pad_token_id = 0
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
@pytest.mark.parametrize("outputs", [1, 2, 3])
def test_a_head_above_another_encoder_answers_as_the_expert_does(name: str, outputs: int) -> None:
    expert, other = tiny_model(name, outputs, seed=1), tiny_model(name, outputs, seed=2)
    texts = tiny_examples(
        name, 16, outputs
    )  # fewer than features, so that some map answers all of them so
    wanted = predict(expert, texts, **FLOAT64)
    own = heads.features(expert, texts, **FLOAT64)
    untouched = heads.refit(own, own, *heads.last_map(expert))
    stored = expert.state_dict()
    assert all(
        torch.equal(stored[key], value) for key, value in heads.tensors(expert, untouched).items()
    )

    drifted = {
        key: tensor.lerp(other.state_dict()[key], 0.3)
        for key, tensor in stored.items()
        if key.endswith("weight")
    }
    expert.base_model.load_state_dict(
        {
            key.removeprefix(f"{expert.base_model_prefix}."): tensor
            for key, tensor in drifted.items()
        },
        strict=False,
    )
    assert np.abs(predict(expert, texts, **FLOAT64) - wanted).max() > 0.1
    fit = heads.refit(own, heads.features(expert, texts, **FLOAT64), *heads.last_map(expert), 0.0)
    expert.load_state_dict(heads.tensors(expert, fit), strict=False)
    np.testing.assert_allclose(predict(expert, texts, **FLOAT64), wanted, atol=1e-4)


@settings(max_examples=10)
@given(st.permutations(range(6)))
def test_labels_are_not_looked_at_and_the_order_of_outputs_does_not_matter(
    order: list[int],
) -> None:
    model = tiny_model("bert", 3)
    examples = tiny_examples("bert", 6)
    shuffled = Examples(examples.inputs, examples.labels[order], examples.pad)
    plain = heads.features(model, examples, **FLOAT64)
    hook = model.register_forward_hook(
        lambda _module, _args, output: setattr(output, "logits", output.logits[:, [2, 0, 1]])
    )
    np.testing.assert_array_equal(heads.features(model, shuffled, **FLOAT64), plain)
    hook.remove()
