"""A model made ready for the statistics, and left as it was."""

import numpy as np
import pytest
import torch

from fmn.fisher.runner import backward_passes, prepared
from fmn.tasks.batches import pad_batch
from tests.tiny import tiny_examples, tiny_model

CPU = torch.device("cpu")


@pytest.mark.parametrize("name", ["bert", "gpt2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_model_is_afterwards_as_it_was(name: str, dtype: torch.dtype) -> None:
    model, examples = tiny_model(name, dtype=torch.float32).train(), tiny_examples(name, 4)
    attention, weights = model.config._attn_implementation, dict(model.state_dict())
    attributes = {path: dict(vars(module)) for path, module in model.named_modules()}
    with prepared(model, examples, CPU, dtype) as runner:
        assert not model.training
        assert runner.logits(pad_batch(examples, np.arange(4))).shape == (4, 3)
    assert model.training
    assert model.config._attn_implementation == attention
    assert {path: dict(vars(module)) for path, module in model.named_modules()} == attributes
    assert all(torch.equal(weights[key], value) for key, value in model.state_dict().items())


def test_only_the_encoders_matrices_are_narrow_and_the_logits_are_not() -> None:
    model, examples = tiny_model("bert", dtype=torch.float32), tiny_examples("bert", 4)
    with prepared(model, examples, CPU, torch.bfloat16) as runner:
        dtypes = {name: tensor.dtype for name, tensor in runner.tensors.items()}
        assert dtypes["bert.encoder.layer.0.intermediate.dense.weight"] == torch.bfloat16
        assert dtypes["bert.embeddings.word_embeddings.weight"] == torch.float32
        assert dtypes["classifier.weight"] == torch.float32
        assert runner.logits(pad_batch(examples, np.arange(4))).dtype == torch.float32


def test_each_direction_has_the_gradient_of_its_product_with_the_logits() -> None:
    leaf = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    logits = (leaf**2).sin()  # [B, C]
    directions = [torch.randn(5, 3, dtype=torch.float64) for _ in range(2)]
    passes = list(backward_passes(logits, [leaf], directions))
    for direction, (gradient,) in zip(directions, passes, strict=True):
        assert gradient is not None
        torch.testing.assert_close(gradient, direction * (leaf**2).cos() * 2 * leaf)
