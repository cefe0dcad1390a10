"""The Fisher information of losses over the words of a text, against brute force."""

from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch.nn import functional
from transformers import PreTrainedModel

from fmn.fisher import mask_nodes, parameters
from fmn.fisher.gram import estimate as gram
from fmn.tasks.batches import IGNORED, Examples
from tests.fisher.test_mask_nodes import errors, flat, masked
from tests.tiny import CONFIGS, tiny_examples

TAGS = 3
CPU: dict[str, Any] = {"device": "cpu", "dtype": "float64", "problem_type": "tokens"}


def tagger(name: str) -> PreTrainedModel:
    torch.manual_seed(0)
    config = CONFIGS[name](num_labels=TAGS)
    model = transformers.AutoModelForTokenClassification.from_config(config)
    return model.double().eval()


def tagged(name: str, count: int, share: float = 0.5) -> Examples:
    """Texts in which some of the tokens have a tag, one at least."""
    examples, random = tiny_examples(name, count), np.random.default_rng(1)
    labels = np.full((count, int(examples.lengths.max())), IGNORED)
    for row, length in enumerate(examples.lengths):
        has_tag = random.random(length) < share
        has_tag[1] = True
        labels[row, :length][has_tag] = random.integers(0, TAGS, has_tag.sum())
    return Examples(examples.inputs, labels, examples.pad)


def by_brute_force(model: PreTrainedModel, examples: Examples) -> torch.Tensor:
    """The mask gradients of every text's loss, [N, P]."""
    gradients = []
    for row, length in enumerate(examples.lengths):
        masks, logits = masked(model, examples, row)  # logits [T, C]
        labels = torch.from_numpy(examples.labels[row, :length])
        loss = functional.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="sum")
        gradients.append(torch.cat(torch.autograd.grad(loss, masks)))
    return torch.stack(gradients)


@pytest.mark.parametrize("name", ["bert", "distilbert", "deberta-v2", "modernbert"])
def test_empirical_is_the_square_of_the_sum_over_a_texts_words(name: str) -> None:
    model, examples = tagger(name), tagged(name, 5)
    wanted = by_brute_force(model, examples).square().mean(0)
    result = mask_nodes.estimate(model, examples, estimator="empirical", **CPU)
    rtol = 1e-3 if name == "modernbert" else 1e-9  # it rotates in float32
    np.testing.assert_allclose(flat(result), wanted.numpy(), rtol=rtol, atol=1e-12)


def test_batch_squares_the_gradient_of_the_mean_over_32_texts() -> None:
    model, examples = tagger("bert"), tagged("bert", 40)
    gradients = by_brute_force(model, examples)
    wanted = gradients[:32].mean(0).square() + gradients[32:].mean(0).square()
    result = mask_nodes.estimate(model, examples, estimator="batch", **CPU)
    np.testing.assert_allclose(flat(result), wanted.numpy(), rtol=1e-9)


def test_sampled_is_unbiased_for_the_expectation_over_all_tags() -> None:
    model, examples = tagger("bert"), tagged("bert", 1, share=0.2)
    places = np.flatnonzero(examples.labels[0] != IGNORED)
    masks, logits = masked(model, examples, 0)
    log_p, expected, total = logits.log_softmax(-1), torch.zeros(0), 0.0
    expected = torch.zeros(sum(len(mask) for mask in masks), dtype=torch.float64)
    for tags in product(range(TAGS), repeat=len(places)):
        own = log_p[places, list(tags)].sum()
        gradient = torch.cat(torch.autograd.grad(own, masks, retain_graph=True))
        expected += own.detach().exp() * gradient.square()
        total += float(own.detach().exp())
    assert total == pytest.approx(1)
    copies = examples.take(np.zeros(400, dtype=int))  # each has its own draws
    result = mask_nodes.estimate(model, copies, estimator="sampled", **CPU)
    z = (flat(result) - expected.numpy()) / np.maximum(errors(result), 1e-12)
    assert np.abs(z).max() < 5
    assert 0.5 < np.sqrt((z**2).mean()) < 2


def test_full_fisher_is_that_of_the_same_loss() -> None:
    model, examples = tagger("bert"), tagged("bert", 3)
    result = parameters.estimate(model, examples, estimator="empirical", **CPU)
    name = "encoder.layer.1.output.dense.weight"
    weight, wanted = model.base_model.get_parameter(name), 0.0
    for row, length in enumerate(examples.lengths):
        logits = model(input_ids=torch.tensor([examples.inputs["input_ids"][row]])).logits[0]
        labels = torch.from_numpy(examples.labels[row, :length])
        loss = functional.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="sum")
        wanted += torch.autograd.grad(loss, weight)[0].square() / 3
    torch.testing.assert_close(result[name], wanted)


def test_gram_is_over_all_tokens_of_a_tagger() -> None:
    model, examples = tagger("bert"), tagged("bert", 3)
    grams = gram(model, examples, device="cpu", dtype="float64")
    rows = [
        model.base_model.embeddings(torch.tensor([ids]))[0] for ids in examples.inputs["input_ids"]
    ]
    states = torch.cat(rows).detach()
    wanted = states.T @ states / len(states)
    own = grams.moments[grams.inputs["encoder.layer.0.attention.self.query"]]
    torch.testing.assert_close(own, wanted)
