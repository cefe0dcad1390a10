"""Prediction and GLUE's metrics."""

import warnings

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fmn.errors import UserError
from fmn.models.predict import predict, score
from fmn.tasks.batches import pad_batch
from fmn.tasks.task import TASKS, task
from tests.tiny import tiny_examples, tiny_model


def one_hot(classes: list[int], count: int) -> np.ndarray:
    return np.eye(count, dtype=np.float32)[classes]


def test_predictions_come_in_the_examples_order_whatever_the_batches() -> None:
    model, examples = tiny_model("bert"), tiny_examples("bert", 50)
    with torch.inference_mode():
        batches = [pad_batch(examples, np.array([row])) for row in range(50)]
        alone = [model(**batch.inputs).logits[0].numpy() for batch in batches]
    found = predict(model, examples, device="cpu", dtype="float64")
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, np.stack(alone), rtol=1e-5, atol=1e-6)


def test_bfloat16_is_close_to_float32_and_leaves_the_weights_alone() -> None:
    model, examples = tiny_model("bert", dtype=torch.float32), tiny_examples("bert", 50)
    exact = predict(model, examples, device="cpu", dtype="float32")
    rough = predict(model, examples, device="cpu", dtype="bfloat16")
    assert not np.array_equal(exact, rough)
    np.testing.assert_allclose(exact, rough, atol=0.1 * np.abs(exact).max())
    np.testing.assert_array_equal(exact, predict(model, examples, device="cpu", dtype="float32"))


def test_prediction_switches_dropout_off_and_puts_the_attention_back() -> None:
    model = tiny_model("bert").train()
    before = model.config._attn_implementation
    first, second = (
        predict(model, tiny_examples("bert", 5), device="cpu", dtype="float32") for _ in range(2)
    )
    np.testing.assert_array_equal(first, second)
    assert model.config._attn_implementation == before


def test_progress_counts_every_example() -> None:
    seen: list[tuple[int, int]] = []
    predict(
        tiny_model("bert"),
        tiny_examples("bert", 300),
        device="cpu",
        dtype="float32",
        progress=lambda done, of: seen.append((done, of)),
    )
    assert seen[-1] == (300, 300)
    assert [done for done, _ in seen] == sorted({done for done, _ in seen})


@pytest.mark.parametrize(
    ("device", "dtype", "message"),
    [("cpu", "float8", "float8"), ("gpu", "float32", "gpu"), ("cuda:99", "float32", "cuda:99")],
)
def test_an_unknown_device_or_dtype_is_refused(device: str, dtype: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        predict(tiny_model("bert"), tiny_examples("bert", 2), device=device, dtype=dtype)


def test_every_task_has_its_own_metrics_and_a_score_that_is_their_mean() -> None:
    for one in TASKS.values():
        labels = np.array([0.0, 2.5, 5.0]) if one.regression else np.arange(6) % one.num_outputs
        right = labels[:, None] if one.regression else one_hot(labels.tolist(), one.num_outputs)
        assert score(one, right, labels) == pytest.approx(
            {**dict.fromkeys(one.metrics, 1.0), "score": 1.0}
        )


def test_the_metrics_are_what_their_formulas_say() -> None:
    labels, predicted = np.array([1, 1, 1, 0, 0, 0, 0, 1]), [1, 1, 0, 0, 0, 1, 0, 1]
    tp, tn, fp, fn = 3, 3, 1, 1
    accuracy, f1 = 6 / 8, 2 * tp / (2 * tp + fp + fn)
    matthews = (tp * tn - fp * fn) / np.sqrt((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn))
    logits = one_hot(predicted, 2)
    assert score(task("mrpc"), logits, labels) == pytest.approx(
        {"accuracy": accuracy, "f1": f1, "score": (accuracy + f1) / 2}
    )
    assert score(task("cola"), logits, labels)["score"] == pytest.approx(matthews)
    values, guesses = np.array([1.0, 2.0, 3.0, 5.0]), np.array([[2.0], [1.0], [3.0], [10.0]])
    found = score(task("stsb"), guesses, values)
    assert found["pearson"] == pytest.approx(np.corrcoef(values, guesses[:, 0])[0, 1])
    assert found["spearmanr"] == pytest.approx(0.8)  # 1 - 6 * 2 / (4 * 15)


@pytest.mark.parametrize("name", list(TASKS))
def test_a_constant_prediction_is_scored_without_a_warning(name: str) -> None:
    one = task(name)
    labels = (
        np.array([1.0, 2.0, 4.0, 4.0], dtype=np.float32)
        if one.regression
        else np.array([0, 1, 1, 0])
    )
    constant = np.full((4, one.num_outputs), 0.1, dtype=np.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = score(one, constant, labels)
        score(one, constant[:1], labels[:1])
    assert all(np.isfinite(value) for value in found.values())
    if name in ("cola", "stsb"):
        assert found["score"] == 0.0


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=40))
def test_scores_stay_in_their_range(pairs: list[tuple[bool, bool]]) -> None:
    labels = np.array([int(label) for label, _ in pairs])
    logits = one_hot([int(guess) for _, guess in pairs], 2)
    for name in ("cola", "mrpc", "sst2"):
        assert -1.0 - 1e-9 <= score(task(name), logits, labels)["score"] <= 1.0 + 1e-9


def test_what_cannot_be_scored_is_refused() -> None:
    with pytest.raises(UserError, match="not finite"):
        score(task("rte"), np.full((2, 2), np.nan), np.array([0, 1]))
    with pytest.raises(UserError, match="no examples"):
        score(task("rte"), np.zeros((0, 2)), np.zeros(0, dtype=np.int64))
