"""Prediction."""

import numpy as np
import torch

from fmn.models.predict import predict
from fmn.tasks.batches import pad_batch
from tests.tiny import tiny_examples, tiny_model


def test_predictions_come_in_the_examples_order_whatever_the_batches() -> None:
    model, examples = tiny_model("bert"), tiny_examples("bert", 50)
    with torch.inference_mode():
        batches = (pad_batch(examples, np.array([row])) for row in range(50))
        alone = [model(**batch.inputs).logits[0].numpy() for batch in batches]
    logits = predict(model, examples, device="cpu", dtype="float64")
    assert logits.dtype == np.float32
    np.testing.assert_allclose(logits, np.stack(alone), rtol=1e-5, atol=1e-6)


def test_bfloat16_is_close_to_float32_and_leaves_the_weights_alone() -> None:
    model, examples = tiny_model("bert", dtype=torch.float32), tiny_examples("bert", 50)
    exact = predict(model, examples, device="cpu", dtype="float32")
    rough = predict(model, examples, device="cpu", dtype="bfloat16")
    assert not np.array_equal(exact, rough)
    np.testing.assert_allclose(exact, rough, atol=0.1 * np.abs(exact).max())
    np.testing.assert_array_equal(exact, predict(model, examples, device="cpu", dtype="float32"))


def test_progress_counts_every_example_and_dropout_is_off() -> None:
    model, examples, steps = tiny_model("bert").train(), tiny_examples("bert", 300), []
    first, second = (
        predict(model, examples, device="cpu", dtype="float32", progress=lambda *s: steps.append(s))
        for _ in range(2)
    )
    np.testing.assert_array_equal(first, second)
    done = [count for count, total in steps if total == 300]
    assert done[-1] == 300
    assert done == 2 * sorted(set(done))
