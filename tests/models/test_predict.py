"""Prediction."""

import numpy as np
import pytest
import torch

from fmn.errors import UserError
from fmn.models.predict import predict
from fmn.tasks.batches import in_order
from tests.tiny import tiny_examples, tiny_model


def test_predictions_come_in_the_examples_order_whatever_the_batches() -> None:
    model, examples = tiny_model("bert"), tiny_examples("bert", 50)
    with torch.inference_mode():
        alone = [model(**batch.inputs).logits[0].numpy() for batch in in_order(examples, 1)]
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
