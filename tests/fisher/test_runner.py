"""A model made ready for the statistics: dtypes, and gradients by direction."""

import numpy as np
import torch

from fmn.fisher.runner import backward_passes, prepared
from fmn.tasks.batches import pad_batch
from tests.tiny import tiny_examples, tiny_model

CPU = torch.device("cpu")


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
