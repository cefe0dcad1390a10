"""Gram matrices of the inputs of linear maps, against hooks without batching or padding."""

from collections import defaultdict

import pytest
import torch

from fmn.errors import UserError
from fmn.fisher import gram
from fmn.models.predict import LINEAR, hooked
from fmn.tasks.batches import IGNORED
from tests.tiny import tiny_examples, tiny_generator, tiny_model, tiny_texts


def by_hand(name: str, count: int) -> dict[str, torch.Tensor]:
    """E[x x^T] of what every linear map of the encoder reads, one unpadded example at a time."""
    model, examples = tiny_model(name), tiny_examples(name, count)
    linear = {n: m for n, m in model.base_model.named_modules() if isinstance(m, LINEAR)}
    reads: dict[str, list[torch.Tensor]] = defaultdict(list)
    hooks = [
        (module, lambda _, args, path=path: reads[path].append(args[0].detach().flatten(0, -2)))
        for path, module in linear.items()
    ]
    with hooked(hooks):
        for tokens in examples.inputs["input_ids"]:
            model(input_ids=torch.tensor([tokens]))
    stacked = {path: torch.cat(parts) for path, parts in reads.items()}
    return {path: x.T @ x / len(x) for path, x in stacked.items()}


@pytest.mark.parametrize("name", ["bert", "distilbert", "albert", "gpt2", "modernbert", "llama"])
def test_every_linear_map_has_the_moments_of_what_it_reads_without_padding(name: str) -> None:
    grams = gram.estimate(tiny_model(name), tiny_examples(name, 7), device="cpu", dtype="float64")
    expected = by_hand(name, 7)
    assert grams.inputs.keys() == expected.keys()
    for path, moments in expected.items():  # rotary tables are float32
        own = grams.moments[grams.inputs[path]]
        torch.testing.assert_close(own, moments, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["gpt2", "llama", "t5", "bart"])
def test_of_generated_text_padding_of_encoder_and_decoder_is_left_out(name: str) -> None:
    model, examples = tiny_generator(name), tiny_texts(name, 7)
    reads: dict[str, list[torch.Tensor]] = defaultdict(list)
    linear = {n: m for n, m in model.named_modules() if isinstance(m, LINEAR)}
    hooks = [
        (module, lambda _, args, path=path: reads[path].append(args[0].detach()[0]))
        for path, module in linear.items()
    ]
    with hooked(hooks):
        for row in range(7):
            inputs = {key: torch.tensor([values[row]]) for key, values in examples.inputs.items()}
            length = model(**inputs).logits.shape[1]
            answered = torch.tensor(examples.labels[row, :length] != IGNORED)
            reads["lm_head"][-1] = reads["lm_head"][-1][answered]
    grams = gram.estimate(model, examples, device="cpu", dtype="float64")
    for path, parts in reads.items():
        x = torch.cat(parts)
        short = path if path == "lm_head" else path.removeprefix("transformer.")
        own = grams.moments[grams.inputs[short.removeprefix("model.")]]
        torch.testing.assert_close(own, x.T @ x / len(x), rtol=1e-5, atol=1e-6)
    assert len(grams.inputs) == len(linear)


def test_maps_that_read_the_same_share_one_matrix() -> None:
    grams = gram.estimate(tiny_model("bert"), tiny_examples("bert", 3), device="cpu")
    attention = "encoder.layer.1.attention.self"
    shared = {grams.inputs[f"{attention}.{name}"] for name in ("query", "key", "value")}
    assert shared == {f"{attention}.query"}
    assert grams.inputs["pooler.dense"] == "pooler.dense"
    assert set(grams.moments) == set(grams.inputs.values())
    assert not grams.transposed
    grams = gram.estimate(tiny_model("gpt2"), tiny_examples("gpt2", 3), device="cpu")
    assert "h.0.mlp.c_fc" in grams.transposed


def test_it_does_not_depend_on_the_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    model, examples = tiny_model("bert"), tiny_examples("bert", 20)
    before = gram.estimate(model, examples, device="cpu", dtype="float64")
    monkeypatch.setattr(gram, "max_batch_tokens", lambda device: 16)
    after = gram.estimate(model, examples, device="cpu", dtype="float64")
    for name, moments in before.moments.items():
        torch.testing.assert_close(after.moments[name], moments, rtol=1e-10, atol=1e-12)


def test_there_must_be_examples() -> None:
    with pytest.raises(UserError, match="no examples"):
        gram.estimate(tiny_model("bert"), tiny_examples("bert", 0), device="cpu")
