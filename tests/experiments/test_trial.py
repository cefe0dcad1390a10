"""Trying encoders in memory: the expert's own answers, another encoder's, and on which rows."""

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from fmn.errors import UserError
from fmn.evaluate.metrics import answers
from fmn.experiments import trial
from fmn.experiments.files import Source, TunedOn
from fmn.merge import heads
from fmn.merge import model as merged
from fmn.merge.stages import MergeSettings
from fmn.models import loading
from fmn.models.predict import predict
from fmn.tasks import dataset
from fmn.tasks.batches import select
from fmn.tasks.encoding import encode
from fmn.tasks.task import get_task


def source(
    work: Path,
    name: str,
    split: str = "validation",
    rows: int | None = None,
    tuned_on: TunedOn = (None, 0),
) -> Source:
    expert = work / "experts" / name
    return Source(expert, get_task(name), work / "data", split, rows, 0, "cpu", "float32", tuned_on)


def test_the_experts_head_answers_on_another_encoder(tiny_work: Path, tmp_path: Path) -> None:
    experts = {name: tiny_work / "experts" / name for name in ("sst2", "mrpc")}
    expert = trial.load_expert(source(tiny_work, "sst2", rows=20))
    before = {name: tensor.clone() for name, tensor in expert.model.state_dict().items()}
    own = trial.try_encoder(expert, {})
    average = MergeSettings(method="average")
    encoder = merged.in_memory(experts, average)
    tried = trial.try_encoder(expert, encoder)
    after = expert.model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    np.testing.assert_array_equal(own.predicted, expert.answers.predicted)
    assert len(tried.predicted) == len(expert.rows) == 20

    merged.write_model(tmp_path / "merged", experts, average)
    written = loading.load_model(tmp_path / "merged" / "tasks" / "sst2")
    logits = predict(written, expert.examples, device="cpu", dtype="float32")
    expected = answers(get_task("sst2"), logits, expert.examples.labels)
    np.testing.assert_array_equal(tried.predicted, expected.predicted)


def test_its_own_encoder_gives_the_experts_answers(tiny_work: Path) -> None:
    expert = trial.load_expert(source(tiny_work, "stsb"))
    stored = load_file(expert.source.checkpoint / "model.safetensors")
    prefix = "bert."
    own = {name.removeprefix(prefix): t for name, t in stored.items() if name.startswith(prefix)}
    np.testing.assert_array_equal(
        trial.try_encoder(expert, own).predicted, expert.answers.predicted
    )
    other = {name: 1.1 * tensor for name, tensor in own.items()}
    assert not np.allclose(trial.try_encoder(expert, other).predicted, expert.answers.predicted)


def test_training_rows_that_the_expert_saw_come_last(tiny_work: Path) -> None:
    labels = dataset.read_split(tiny_work / "data", get_task("sst2"), "train")["label"].to_numpy()
    seen = set(select(labels, 200, 3).tolist())

    def rows(tuned_on: TunedOn) -> set[int]:
        return set(
            trial.load_expert(source(tiny_work, "sst2", "train", 50, tuned_on)).rows.tolist()
        )

    assert len(rows((200, 3))) == len(rows((None, 0))) == 50
    assert not rows((200, 3)) & seen
    assert rows((None, 0)) & seen


def test_heads_are_realigned_on_texts_that_are_not_tried(tiny_work: Path) -> None:
    table = dataset.read_split(tiny_work / "data", get_task("sst2"), "train")
    labels = table["label"].to_numpy()
    tried = source(tiny_work, "sst2", "train", 50, (200, 3))
    expert = trial.load_expert(tried)
    tokenizer = loading.load_tokenizer(tried.checkpoint)
    tokens = encode(tokenizer, get_task("sst2"), table).inputs["input_ids"]
    unseen = {tuple(tokens[row]) for row in set(range(len(labels))) - {*select(labels, 200, 3)}}
    left = len(labels) - 200 - 50
    for limit in (left, left + 30, None):
        texts = trial.texts_for_head(tried, limit, 1, "")
        ids = texts.examples.inputs["input_ids"]
        count = limit or len(labels) - 50
        assert len(texts.features) == len(ids) == count
        assert sum(tuple(text) in unseen for text in ids) >= left
    everything = expert.rows.tolist() + list(range(len(labels)))
    with pytest.raises(UserError, match="no training text is left"):
        heads.unlabeled(
            tried.checkpoint, expert.task, tried.data, None, 0, tried.tuned_on, everything
        )
