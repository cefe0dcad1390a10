"""Fine-tuning an expert, and a merged model's answers."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoConfig

from fmn.errors import UserError
from fmn.models import stages
from fmn.store.artifacts import digest_files
from fmn.store.stage import Outcome
from fmn.tasks.task import write_task
from tests.conftest import TUNING
from tests.models.experts import answers, expert, make_task, write_rows

# finetune, predict


def finetune(work: Path, out: Path, **changes: object) -> Outcome:
    settings = TUNING.model_copy(update=changes)
    base, data = work / "base", work / "data"
    return stages.finetune(base, task="sst2", data=data, out=out, settings=settings)


@pytest.fixture
def merged(tiny_work: Path, tmp_path: Path) -> Path:
    """The folder of a model that could have been merged: two tasks, their names and no more."""
    for task in ("sst2", "stsb"):
        shutil.copytree(tiny_work / "experts" / task, tmp_path / "merged" / "tasks" / task)
    return tmp_path / "merged"


def test_an_expert_is_computed_once_for_the_same_settings_and_rows(
    tiny_work: Path, tmp_path: Path
) -> None:
    out = tmp_path / "expert"
    first = finetune(tiny_work, out)
    assert first.computed
    assert digest_files(out) == digest_files(tiny_work / "experts" / "sst2"), "it is repeatable"
    again = finetune(tiny_work, out, device="auto")  # where to compute changes no key
    assert not again.computed
    assert again.summary == first.summary
    assert finetune(tiny_work, out, seed=1).computed
    (out / "config.json").write_text("{}")
    assert finetune(tiny_work, out, seed=1).computed
    data = shutil.copytree(tiny_work / "data", tmp_path / "data")
    shutil.copyfile(data / "sst2" / "validation.parquet", data / "sst2" / "train.parquet")
    outcome = stages.finetune(tiny_work / "base", task="sst2", data=data, out=out, settings=TUNING)
    assert outcome.computed
    for inside in ("base/expert", "data", "data/sst2"):
        with pytest.raises(UserError, match="would change"):
            finetune(tiny_work, tiny_work / inside)


def test_a_task_without_labels_is_not_fine_tuned(tiny_base: Path, tmp_path: Path) -> None:
    labelled = make_task(["a", "b"])
    columns = labelled.columns.model_copy(update={"label": None})
    task = labelled.model_copy(update={"columns": columns, "metrics": ()})
    data = write_rows(tmp_path / "data", labelled, np.zeros(9, np.int64))
    write_task(data, task)
    with pytest.raises(UserError, match="task own: its rows have no labels to fine-tune on"):
        stages.finetune(tiny_base, task="own", data=data, out=tmp_path / "out")


def test_a_merged_model_answers_in_the_tasks_own_words(merged: Path) -> None:
    answer = stages.predict(merged, "a warm and funny film", task="sst2")
    names = AutoConfig.from_pretrained(merged / "tasks" / "sst2").id2label
    assert answer.probabilities.keys() == set(names.values()) == {"negative", "positive"}
    assert sum(answer.probabilities.values()) == pytest.approx(1, abs=1e-5)
    assert answer.score == answer.probabilities[answer.label] >= 0.5
    value = stages.predict(merged, "one text", "another", task="stsb")
    assert (value.label, value.probabilities) == ("score", {})
    for task, texts, problem in (
        ("stsb", ("one text",), "task stsb: it takes 2 texts"),
        ("sst2", ("one text", "another"), "task sst2: it takes 1 text"),
        ("rte", ("one text", "another"), "not a merged model of task rte"),
    ):
        with pytest.raises(UserError, match=problem):
            stages.predict(merged, *texts, task=task)


def test_of_several_labels_those_above_the_threshold_are_the_answer(tmp_path: Path) -> None:
    folder = expert(tmp_path / "merged" / "tasks" / "own", 3, names=["a", "b", "c"])
    text = "w3 w4 w5 w6"
    shares = 1 / (1 + np.exp(-answers(folder, [text])[0].astype(float)))
    for threshold in (float(np.sort(shares)[:2].mean()), 0.999):
        kind: Any = "multi_label_classification"
        write_task(folder, make_task(["a", "b", "c"], kind, threshold=threshold))
        answer = stages.predict(tmp_path / "merged", text, task="own")
        above = [name for name, share in zip("abc", shares, strict=True) if share >= threshold]
        assert answer.labels == above
        assert answer.label == (", ".join(above) or "none")
        assert list(answer.probabilities.values()) == pytest.approx(shares.tolist(), abs=1e-6)
        assert answer.score == max(answer.probabilities.values())


def test_a_text_is_cut_at_the_tasks_length(tmp_path: Path) -> None:
    folder = expert(tmp_path / "merged" / "tasks" / "own", 2, names=["no", "yes"])
    words = "w3 w4 w5 w6 w7 w8"
    answered = []
    for length in (128, 3):
        write_task(folder, make_task(["no", "yes"], max_length=length))
        answered.append(stages.predict(tmp_path / "merged", words, task="own"))
    assert answered[0] != answered[1]
    assert answered[1] == stages.predict(tmp_path / "merged", "w3 w4 w5", task="own")
