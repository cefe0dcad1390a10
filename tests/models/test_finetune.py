"""Fine-tuning an expert from a base."""

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForSequenceClassification, PreTrainedModel

from fmn.errors import UserError
from fmn.models import finetune as finetuning
from fmn.models.embedding import Modules, SentenceEncoder
from fmn.models.finetune import finetune, new_expert
from fmn.models.loading import load_model
from fmn.models.predict import predict
from fmn.tasks.batches import Examples, pad_batch
from fmn.tasks.task import Task, get_task
from tests.models.experts import make_task
from tests.tiny import WORDS, tiny_examples, tiny_model


def marked(count: int, seed: int = 0) -> Examples:
    """Texts whose label is whether token 5 occurs in them."""
    random = np.random.default_rng(seed)
    labels = np.arange(count) % 2
    texts = [random.integers(6, WORDS, random.integers(3, 10)).tolist() for _ in labels]
    for text, label in zip(texts, labels, strict=True):
        if label:
            text[int(random.integers(len(text)))] = 5
    return Examples({"input_ids": [[1, *text, 2] for text in texts]}, labels, {"input_ids": 0})


def train(
    seed: int = 0, examples: Examples | None = None, num_labels: int = 2, **changes: Any
) -> tuple[PreTrainedModel, list[float]]:
    model = tiny_model("bert", num_labels=num_labels, dtype=torch.float32)
    settings: dict[str, Any] = {"epochs": 2, "learning_rate": 1e-3}
    settings |= {
        "problem_type": "single_label_classification",
        "batch_size": 16,
        "device": "cpu",
        "dtype": "float32",
        **changes,
    }
    losses = finetune(model, marked(200) if examples is None else examples, seed=seed, **settings)
    return model, losses


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_it_learns_what_can_be_learnt(dtype: str) -> None:
    model, losses = train(epochs=8, learning_rate=2e-3, examples=marked(400), dtype=dtype)
    unseen = marked(200, seed=1)
    assert np.mean(losses[-10:]) < 0.5 * np.mean(losses[:10])
    answers = predict(model, unseen, device="cpu", dtype="float32").argmax(axis=1)
    assert (answers == unseen.labels).mean() > 0.9
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())
    assert not model.training


@pytest.mark.parametrize(
    ("architecture", "low", "high"),
    [
        ("bert", -1, 1),
        ("bert", 1e6, 1e6 + 1),
        ("llama", 0, 1000),  # its head has no bias
    ],
)
def test_a_number_is_learnt_on_any_scale_with_one_learning_rate(
    architecture: str, low: float, high: float
) -> None:
    def on_scale(examples: Examples) -> Examples:
        values = (low + (high - low) * examples.labels).astype(np.float32)
        return Examples(examples.inputs, values, examples.pad)

    model = tiny_model(architecture, num_labels=1, dtype=torch.float32)
    losses = finetune(
        model, on_scale(marked(400)), problem_type="regression", epochs=8, learning_rate=2e-3,
        batch_size=16, seed=0, device="cpu", dtype="float32",
    )  # fmt: skip
    unseen = on_scale(marked(200, seed=1))
    errors = predict(model, unseen, device="cpu", dtype="float32")[:, 0] - unseen.labels
    assert (errors**2).mean() < 0.25 * unseen.labels.var(dtype=float)
    assert np.mean(losses[-10:]) < 0.5 * np.mean(losses[:10])


def test_several_labels_at_once_are_learnt_and_their_loss_is_that_of_transformers() -> None:
    examples = marked(400)
    labels = np.stack([examples.labels, 1 - examples.labels, np.ones(400)], axis=1)
    examples = Examples(examples.inputs, labels.astype(np.float32), examples.pad)
    kind: Any = "multi_label_classification"
    model, losses = train(examples=examples, num_labels=3, problem_type=kind, epochs=8)
    answers = predict(model, examples, device="cpu", dtype="float32") > 0
    assert (answers == labels).mean() > 0.9
    assert losses[-1] < losses[0]

    whole = tiny_model("bert", num_labels=3, dtype=torch.float32)
    whole.config.problem_type = kind
    for module in whole.modules():
        if isinstance(module, torch.nn.Dropout):  # it draws other units in another call
            module.p = 0.0
    batch = pad_batch(examples, np.arange(16))
    with torch.no_grad():
        expected = whole(**batch.inputs, labels=batch.labels).loss.item()
    first = finetune(
        whole, examples.take(np.arange(16)), problem_type=kind, epochs=1, learning_rate=1e-9,
        batch_size=16, seed=0, device="cpu", dtype="float32",
    )  # fmt: skip
    assert first == [pytest.approx(expected, rel=1e-5)]


def test_a_seed_repeats_a_run_in_which_every_parameter_is_trained() -> None:
    before = tiny_model("bert", num_labels=2, dtype=torch.float32).state_dict()
    (first, losses), (same, again), (other, _) = train(), train(), train(seed=1)
    assert losses == again
    weights, repeated, different = (model.state_dict() for model in (first, same, other))
    assert all(torch.equal(weights[name], repeated[name]) for name in weights)
    assert not all(torch.equal(weights[name], different[name]) for name in weights)
    same_as_before = {name for name in weights if torch.equal(weights[name], before[name])}
    # Nothing depends on the bias of the keys: softmax cancels it.
    assert all(name.endswith("key.bias") for name in same_as_before)


@pytest.mark.parametrize("name", ["bert", "roberta", "gpt2", "t5"])
def test_embeddings_of_other_tokens_decay_as_if_the_optimizer_saw_them(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    examples = tiny_examples(name, 24)
    trained, numbers = [], []
    options: dict[str, Any] = {"problem_type": "single_label_classification", "epochs": 4}
    options |= {"learning_rate": 1e-3, "batch_size": 4, "seed": 0, "device": "cpu"}
    for _ in range(2):
        model = tiny_model(name, dtype=torch.float64)
        model.register_forward_pre_hook(
            lambda module, _: numbers.append(sum(p.numel() for p in module.parameters()))
        )
        finetune(model, examples, dtype="float64", **options)
        trained.append(model.state_dict())
        monkeypatch.setattr(finetuning, "few_embeddings", lambda *_: nullcontext(lambda _: None))
    for key, values in trained[1].items():
        torch.testing.assert_close(trained[0][key], values, rtol=1e-9, atol=1e-12)
    assert (numbers[0] < numbers[-1]) == (name != "t5")  # whose decoder reads them too


@pytest.mark.parametrize(("epochs", "steps"), [(1, 13), (2, 26), (0.5, 6), (0.01, 1)])
def test_epochs_may_be_fractions(epochs: float, steps: int) -> None:
    seen: list[tuple[int, int]] = []
    _, losses = train(epochs=epochs, progress=lambda done, of: seen.append((done, of)))
    assert len(losses) == steps
    assert seen == [(step + 1, steps) for step in range(steps)]


def test_divergence_and_missing_examples_are_errors() -> None:
    with pytest.raises(UserError, match="learning_rate"):
        train(learning_rate=1e30, epochs=4)
    with pytest.raises(UserError, match="empty"):
        train(examples=tiny_examples("bert", 4).take(np.arange(0)))


@pytest.mark.parametrize(
    "task",
    [
        get_task("mnli"),
        get_task("stsb"),
        make_task([f"class {number}" for number in range(20)]),
        make_task(["a", "b", "c"], "multi_label_classification"),
    ],
    ids=lambda task: task.name,
)
def test_a_new_expert_names_its_labels_and_loads_without_fmn(
    task: Task, tiny_base: Path, tmp_path: Path
) -> None:
    examples = marked(20)
    model = new_expert(tiny_base, task, seed=0)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert loaded.classifier.out_features == loaded.config.num_labels == task.num_outputs
    assert tuple(loaded.config.id2label.values()) == (task.labels or ("score",))
    assert loaded.config.problem_type == task.problem_type
    (tmp_path / "tokenizer.json").write_bytes((tiny_base / "tokenizer.json").read_bytes())
    np.testing.assert_array_equal(
        predict(model, examples, device="cpu", dtype="float32"),
        predict(load_model(tmp_path), examples, device="cpu", dtype="float32"),
    )


def test_the_head_is_fresh_and_seeded(tiny_base: Path, tmp_path: Path) -> None:
    mrpc, same, other = (new_expert(tiny_base, get_task("mrpc"), seed) for seed in (0, 0, 1))
    assert torch.equal(mrpc.classifier.weight, same.classifier.weight)
    assert not torch.equal(mrpc.classifier.weight, other.classifier.weight)
    mrpc.save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_bytes((tiny_base / "tokenizer.json").read_bytes())
    again = new_expert(tmp_path, get_task("rte"), seed=1)  # the expert has a head of this shape
    assert torch.equal(again.classifier.weight, other.classifier.weight)
    encoder, base = again.bert.state_dict(), mrpc.bert.state_dict()
    assert all(torch.equal(encoder[key], base[key]) for key in base)


def test_scores_of_any_scale_train_pairs_alike() -> None:
    texts = [marked(60, seed).inputs["input_ids"] for seed in (0, 1)]
    scores = np.tile(marked(60).labels.astype(np.float32), 2)  # of texts, then of their pairs
    losses = []
    for labels in (scores, 1 + 4 * scores, 100 * scores - 50):
        examples = Examples({"input_ids": [*texts[0], *texts[1]]}, labels, {"input_ids": 0})
        encoder = tiny_model("bert", dtype=torch.float32).base_model
        model: Any = SentenceEncoder(encoder, Modules(), Path())
        options: dict[str, Any] = {"epochs": 4, "learning_rate": 2e-3, "batch_size": 16}
        options |= {"seed": 0, "device": "cpu", "dtype": "float32", "problem_type": "embedding"}
        losses.append(finetune(model, examples, **options))
    assert losses[0] == losses[1] == losses[2]
    examples = Examples(examples.inputs, np.ones_like(scores), {"input_ids": 0})
    with pytest.raises(UserError, match="every pair has the score 1; give pairs"):
        finetune(model, examples, **options)
