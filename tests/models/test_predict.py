"""Prediction."""

from functools import partial
from pathlib import Path
from typing import cast

import numpy as np
import pytest
import torch
import transformers
from torch import nn
from transformers import PreTrainedModel

from fmn.errors import UserError
from fmn.fisher.architectures import mask_sites
from fmn.models.embedding import Modules, SentenceEncoder
from fmn.models.predict import first_token_only, hooked, predict
from fmn.tasks.batches import Batch, pad_batch
from tests.tiny import tiny_examples, tiny_model


def test_predictions_come_in_the_examples_order_whatever_the_batches() -> None:
    model, examples = tiny_model("bert"), tiny_examples("bert", 50)
    with torch.inference_mode():
        batches = (pad_batch(examples, np.array([row])) for row in range(50))
        alone = [model(**batch.inputs).logits[0].numpy() for batch in batches]
    logits = predict(model, examples, device="cpu", dtype="float64")
    assert logits.dtype == np.float32
    np.testing.assert_allclose(logits, np.stack(alone), rtol=1e-5, atol=1e-6)


def test_a_model_with_tokens_before_examples_is_not_cut() -> None:
    """XLNet computes [T, B, n]."""
    config = transformers.XLNetConfig(
        d_model=24, n_layer=2, n_head=4, d_inner=20, vocab_size=30, num_labels=3, pad_token_id=0,
        summary_type="first", initializer_range=0.5,
    )  # fmt: skip
    model = transformers.XLNetForSequenceClassification(config).eval()
    examples = tiny_examples("bert", 9)
    with torch.inference_mode():
        batches = (pad_batch(examples, np.array([row])) for row in range(9))
        alone = [model(**batch.inputs).logits[0].numpy() for batch in batches]
    logits = predict(model, examples, device="cpu", dtype="float32")
    np.testing.assert_allclose(logits, np.stack(alone), rtol=1e-4, atol=1e-5)
    config.summary_type = "last"  # the default, which reads the padding of shorter texts
    model = transformers.XLNetForSequenceClassification(config).eval()
    with pytest.raises(UserError, match="of this xlnet depend on the padding"):
        predict(model, examples, device="cpu", dtype="float32")


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


@pytest.mark.parametrize("name", ["bert", "roberta", "deberta-v2", "distilbert", "mpnet", "vit"])
def test_the_last_layer_computes_what_the_head_reads(name: str) -> None:
    model, examples = tiny_model(name), tiny_examples(name, 6)
    batch = pad_batch(examples, np.arange(6))
    seen: dict[str, int] = {}

    def run(batch: Batch) -> torch.Tensor:
        logits: torch.Tensor = model(**batch.inputs).logits
        return logits

    def widths() -> torch.Tensor:
        def watch(module: nn.Module, args: tuple[torch.Tensor, ...], path: str) -> None:
            if args[0].ndim == 3:
                seen[path] = args[0].shape[1]

        linear = [(p, m) for p, m in model.named_modules() if isinstance(m, nn.Linear)]
        with torch.no_grad(), hooked((m, partial(watch, path=path)) for path, m in linear):
            return run(batch)

    whole = widths()
    assert 1 not in seen.values()
    with first_token_only(model, run, examples):
        cut = widths()
    last = [site.module for site in mask_sites(model)][-2:]
    assert [seen[path] for path in last] == [1, 1]
    assert list(seen.values()).count(1) == 3  # both projections, and the one up
    torch.testing.assert_close(cut, whole, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(widths(), whole, rtol=0, atol=0)  # the hooks are gone
    assert not any(module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("name", ["gpt2", "llama", "albert", "mean"])
def test_a_head_that_reads_other_tokens_gets_them(name: str) -> None:
    model, examples = tiny_model("bert" if name == "mean" else name), tiny_examples("bert", 6)
    if name == "mean":
        pooled = Modules(("mean",), normalise=True)
        model = cast("PreTrainedModel", SentenceEncoder(model.base_model, pooled, Path()))
    batch = pad_batch(examples, np.arange(6))

    def run(batch: Batch) -> torch.Tensor:
        logits: torch.Tensor = model(**batch.inputs).logits
        return logits

    with first_token_only(model, run, examples):
        assert not any(module._forward_pre_hooks for module in model.modules())
        assert run(batch).isfinite().all()
