"""A model made ready for the statistics: dtypes, and gradients by direction."""

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from fmn.errors import UserError
from fmn.fisher import estimate, gram
from fmn.fisher.runner import backward_passes, prepared
from fmn.models.finetune import finetune
from fmn.models.predict import predict
from fmn.tasks.batches import pad_batch
from tests.tiny import tiny_examples, tiny_model, tiny_texts

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


SIZES = {
    **{"hidden_size": 24, "intermediate_size": 20, "num_hidden_layers": 1, "vocab_size": 40},
    **{"num_attention_heads": 4, "max_position_embeddings": 64, "num_labels": 3, "pad_token_id": 0},
    **{"d_model": 24, "ffn_dim": 20, "num_layers": 1, "attention_heads": 4, "languages": ["a"]},
}
TRAINING: dict[str, Any] = {"epochs": 1, "learning_rate": 1e-4, "batch_size": 4, "seed": 0}
LABELS: dict[str, Any] = {"problem_type": "single_label_classification"}
fisher_of_labels = partial(estimate, estimator="empirical", **LABELS)
fisher_of_tokens = partial(estimate, estimator="empirical", problem_type="tokens")


@pytest.mark.parametrize(
    ("kind", "dtype", "compute", "message"),
    [
        ("xglm", "float64", fisher_of_tokens, "in float64: value cannot .*; take the dtype float3"),
        ("xglm", "float64", predict, "a checkpoint: this xglm cannot compute in float64: value"),
        ("xglm", "float32", predict, None),
        ("mra", "float64", fisher_of_labels, "this mra cannot compute in float64: mat1 and mat2"),
        ("mra", "float32", fisher_of_labels, "the attention of this mra computes nothing on"),
        (
            "bert",
            "float32",
            fisher_of_labels,
            "a text has .* tokens: set max_length of the task below 2",
        ),
        ("bert", "float64", predict, "set max_length of the task below 2"),
        ("xmod", "float32", gram.estimate, r"Please call .*\(\)`; correct its config.json, or"),
        ("xmod", "float32", predict, "cannot compute in float32: Input language unknown"),
        ("xmod", "float32", partial(finetune, **TRAINING, **LABELS), "Input language unknown"),
    ],
)
def test_what_transformers_cannot_compute_is_one_line(
    kind: str, dtype: str, compute: Callable[..., Any], message: str | None
) -> None:
    is_generator = kind == "xglm"
    auto: Any = AutoModelForCausalLM if is_generator else AutoModelForSequenceClassification
    sizes = SIZES | ({"max_position_embeddings": 2} if kind == "bert" else {})
    config = CONFIG_MAPPING[kind](**sizes, name_or_path="a checkpoint")
    model, examples = auto.from_config(config), tiny_examples("bert", 4)
    examples = tiny_texts("gpt2", 4) if is_generator else examples
    if message is None:
        compute(model, examples, device="cpu", dtype=dtype)
        return
    with pytest.raises(UserError, match=message):
        compute(model, examples, device="cpu", dtype=dtype)


def test_a_fault_of_our_own_keeps_its_traceback() -> None:
    model, examples = tiny_model("bert"), tiny_examples("bert", 4)

    def hook(*_: Any) -> None:
        raise ValueError("a bug")

    model.bert.encoder.layer[0].register_forward_pre_hook(hook)
    with pytest.raises(ValueError, match="a bug"):
        predict(model, examples, device="cpu", dtype="float32")
