"""Trying encoders out in memory: the expert's own answers, another encoder's, and which rows they are asked."""

from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file

from fmn.experiments import trial
from fmn.merge import heads
from fmn.merge import model as merged
from fmn.merge.stages import MergeSettings
from fmn.models import checkpoints
from fmn.models.predict import predict
from fmn.tasks import dataset as data
from fmn.tasks import task as tasks
from fmn.tasks.batches import select

CPU = ("cpu", "float32")


def test_the_experts_head_answers_over_another_encoder(tiny_work: Path) -> None:
    experts = {task: tiny_work / "experts" / task for task in ("sst2", "mrpc")}
    one = trial.contender(
        experts["sst2"], tasks.task("sst2"), tiny_work / "data", "validation", 20, 0, *CPU
    )
    encoder = merged.in_memory(experts, MergeSettings(method="average"))
    before = {name: tensor.clone() for name, tensor in one.model.state_dict().items()}
    found = trial.logits(one, encoder, *CPU)
    assert all(torch.equal(before[name], tensor) for name, tensor in one.model.state_dict().items())
    assert found.shape == one.logits.shape == (20, 2)
    assert not np.allclose(found, one.logits)

    merged.write_model(tiny_work.parent / "trial", experts, MergeSettings(method="average"))
    written = checkpoints.load_classifier(tiny_work.parent / "trial" / "tasks" / "sst2")
    np.testing.assert_allclose(
        found, predict(written, one.examples, device="cpu", dtype="float32"), atol=1e-6
    )


def test_its_own_encoder_gives_the_experts_answers(tiny_work: Path) -> None:
    folder = tiny_work / "experts" / "stsb"
    one = trial.contender(
        folder, tasks.task("stsb"), tiny_work / "data", "validation", None, 0, *CPU
    )
    stored = load_file(folder / "model.safetensors")
    own = {
        name.removeprefix("bert."): tensor
        for name, tensor in stored.items()
        if name.startswith("bert.")
    }
    np.testing.assert_array_equal(trial.logits(one, own, *CPU), one.logits)


def test_training_rows_that_the_expert_saw_are_left_out_while_there_are_others(
    tiny_work: Path,
) -> None:
    task, folder = tasks.task("sst2"), tiny_work / "data"
    table = data.read(folder, task, "train")
    labels = table["label"].to_numpy()
    tokenizer = checkpoints.load_tokenizer(tiny_work / "experts" / "sst2")
    texts = data.tokenize(tokenizer, task, table).inputs["input_ids"]
    seen = {tuple(texts[row]) for row in select(labels, 200, 3)}
    unseen = {
        tuple(texts[row]) for row in np.setdiff1d(np.arange(len(labels)), select(labels, 200, 3))
    }

    def asked(tuned_on: tuple[int | None, int]) -> list[tuple[int, ...]]:
        one = trial.contender(
            tiny_work / "experts" / "sst2", task, folder, "train", 50, 0, *CPU, tuned_on
        )
        return [tuple(text) for text in one.examples.inputs["input_ids"]]

    assert set(asked((200, 3))) <= unseen
    assert len(asked((None, 0))) == 50
    assert set(asked((None, 0))) & seen

    # Texts to re-align heads on: unseen ones first, none that encoders are tried on, and labels play no part.
    one = trial.contender(
        tiny_work / "experts" / "sst2", task, folder, "train", 50, 0, *CPU, (200, 3)
    )
    count = len(labels) - 200 - 50
    expert = tiny_work / "experts" / "sst2"
    for limit, new in ((count, count), (count + 30, count), (None, count)):
        found = heads.unlabeled(expert, task, folder, limit, 1, (200, 3), one.rows).inputs[
            "input_ids"
        ]
        assert len(found) == (limit or len(labels) - 50)
        assert sum(tuple(text) in unseen for text in found) >= new
        assert not {tuple(text) for text in found} & set(asked((200, 3))) - seen
