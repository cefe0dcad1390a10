"""The stages `finetune`, `predict`, and `fetch` as the door of experts.

Where checkpoints come from is tested beside their sources.
"""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import safetensors.torch
import torch
from transformers import AutoConfig

from fmn.errors import UserError
from fmn.models import stages
from fmn.models.labels import load_expert
from fmn.models.stages import ExpertSource, FetchSettings
from fmn.store.artifacts import digest_files
from fmn.store.stage import Outcome
from fmn.tasks.task import Task, read_task, write_task
from tests.conftest import TUNING
from tests.models.experts import answers, expert, make_task, write_rows

SEVEN = make_task(["mo", "tu", "we", "th", "fr", "sa", "su"])
ORDER = [3, 0, 6, 2, 1, 5, 4]  # the output that stands for each day
DAYS = [SEVEN.labels[ORDER.index(output)] for output in range(7)]  # of the outputs
# Heads of one linear map and of two, with a bias and without; of an encoder, a decoder and both.
HEADS = (
    "bert",
    "roberta",
    "distilbert",
    "albert",
    "deberta-v2",
    "modernbert",
    "gpt2",
    "llama",
    "t5",
)


# fetch


def rows_of(folder: Path, task: Task, order: list[int], out: Path) -> Path:
    """Training rows that an expert has right, whose output order[label] stands for a label."""
    logits = answers(folder)[:, order]
    labels: Any = logits.argmax(axis=1)
    if task.regression:
        labels = logits[:, 0]
    elif task.multi_label:
        labels = logits > np.quantile(logits, 0.7, axis=0)
    return write_rows(out, task, labels)


def fetch(source: Path, out: Path, task: str = "own", **options: Any) -> Outcome:
    return stages.fetch(str(source), out=out, task=task, **options)


def encoder(folder: Path) -> dict[str, bytes]:
    """The bytes of all tensors but the head's."""
    tensors: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors |= safetensors.torch.load_file(file)
    heads = ("classifier", "score", "classification_head")
    return {
        name: value.numpy().tobytes()
        for name, value in tensors.items()
        if not name.startswith(heads)
    }


@pytest.mark.parametrize("architecture", HEADS)
@pytest.mark.parametrize("shards", ["1GB", "20KB"])
def test_an_aligned_copy_answers_as_the_original_in_the_tasks_order(
    architecture: str, shards: str, tmp_path: Path
) -> None:
    source = expert(tmp_path / "e", 7, architecture=architecture, names=DAYS, shards=shards)
    (tmp_path / "data").mkdir()
    write_task(tmp_path / "data", SEVEN)
    info = fetch(source, tmp_path / "out", data=tmp_path / "data").summary
    assert (info.labels.order, info.labels.origin) == (ORDER, "names")
    np.testing.assert_allclose(answers(tmp_path / "out"), answers(source)[:, ORDER], atol=1e-6)
    assert encoder(tmp_path / "out") == encoder(source)
    config = AutoConfig.from_pretrained(tmp_path / "out")
    assert tuple(config.id2label.values()) == SEVEN.labels
    assert config.label2id == {name: label for label, name in enumerate(SEVEN.labels)}
    assert config.problem_type == "single_label_classification"
    assert read_task(tmp_path / "out") == SEVEN
    # In memory it is the same, without a copy.
    model = load_expert(source, SEVEN, None).model
    copied = load_expert(tmp_path / "out", SEVEN, None).model
    for name, value in copied.state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name
    assert model.config.id2label == copied.config.id2label


@pytest.mark.parametrize("stated", [True, False])
@pytest.mark.parametrize(
    ("kind", "labels", "order"),
    [
        ("single_label_classification", ["a", "b", "c"], [2, 0, 1]),
        ("single_label_classification", SEVEN.labels, ORDER),
        ("multi_label_classification", ["a", "b", "c"], [2, 0, 1]),
        ("multi_label_classification", ["only"], [0]),
        ("regression", [], [0]),
    ],
)
def test_outputs_without_names_get_the_tasks_by_training_data(
    kind: Any, labels: list[str], order: list[int], stated: bool, tmp_path: Path
) -> None:
    task = make_task(labels, kind)
    source = expert(tmp_path / "expert", len(order), problem_type=kind if stated else None)
    data = rows_of(source, task, order, tmp_path / "data")
    info = fetch(source, tmp_path / "out", data=data).summary
    assert info.labels.order == order
    assert info.labels.score == pytest.approx(1.0)
    assert info.labels.origin == ("names" if kind == "regression" else "training data")
    np.testing.assert_allclose(answers(tmp_path / "out"), answers(source)[:, order], atol=1e-6)
    config = AutoConfig.from_pretrained(tmp_path / "out")
    assert config.problem_type == kind
    assert tuple(config.id2label.values()) == (task.labels or ("score",))
    if order != sorted(order):
        assert any("not named; 100.0% of 240" in note for note in info.labels.notes)


@pytest.mark.parametrize("architecture", ["bert", "llama"])  # with a bias, and without
def test_a_single_logit_becomes_two_outputs_that_plain_transformers_reads(
    architecture: str, tmp_path: Path
) -> None:
    source = expert(tmp_path / "expert", 1, architecture=architecture)
    task, z = make_task(["no", "yes"]), answers(source)[:, 0]
    (tmp_path / "data").mkdir()
    write_task(tmp_path / "data", task)
    info = fetch(source, tmp_path / "out", data=tmp_path / "data").summary
    assert (info.labels.order, info.labels.origin) == ([0, 1], "identity")
    logits = answers(tmp_path / "out")
    np.testing.assert_allclose(logits, np.stack([0 * z, z], axis=1), atol=1e-6)
    assert AutoConfig.from_pretrained(tmp_path / "out").id2label == {0: "no", 1: "yes"}
    listed = FetchSettings(labels=["yes", "no"])
    info = fetch(source, tmp_path / "out", data=tmp_path / "data", settings=listed).summary
    assert (info.labels.order, info.labels.origin) == ([1, 0], "settings")
    np.testing.assert_allclose(answers(tmp_path / "out"), logits[:, ::-1], atol=1e-6)


def test_the_key_holds_the_task_the_list_and_the_training_rows(tmp_path: Path) -> None:
    source = expert(tmp_path / "expert", 3)
    task = make_task(["a", "b", "c"])
    data, out = rows_of(source, task, [0, 1, 2], tmp_path / "data"), tmp_path / "out"
    listed = FetchSettings(labels=["a", "b", "c"])

    def is_computed(**options: Any) -> bool:
        return fetch(source, out, data=data, **options).computed

    assert [is_computed(), is_computed()] == [True, False]
    assert [is_computed(settings=listed), is_computed(settings=listed)] == [True, False]
    table = pq.read_table(data / "train.parquet")
    pq.write_table(table, data / "validation.parquet")  # which is not read
    assert not is_computed(settings=listed)
    pq.write_table(table.slice(0, 200), data / "train.parquet")
    assert is_computed(settings=listed)
    write_task(data, task.model_copy(update={"max_length": 9}))
    assert is_computed(settings=listed)
    assert fetch(source, out, task="").computed
    assert read_task(out) is None, "without a task, it is a copy"
    with pytest.raises(UserError, match="say its task, --task TASK"):
        fetch(source, out, task="", data=data)


def test_what_the_data_contradict_leaves_nothing_and_names_the_source(tmp_path: Path) -> None:
    source = expert(tmp_path / "expert", 2, names=["no", "yes"])
    data = rows_of(source, make_task(["no", "yes"]), [1, 0], tmp_path / "data")
    with pytest.raises(UserError, match=f"own: {source}: .*as named 0.0%, turned round 100.0%"):
        fetch(source, tmp_path / "out", data=data)
    assert not (tmp_path / "out").exists()


def test_without_rows_the_expert_tells_its_task(tiny_work: Path, tmp_path: Path) -> None:
    source = expert(tmp_path / "expert", 3, names=["a", "b", "c"])
    fetch(source, tmp_path / "out")
    task = read_task(tmp_path / "out")
    assert task is not None
    assert (task.labels, task.has_labels) == (("a", "b", "c"), False)
    fetch(tiny_work / "experts" / "stsb", tmp_path / "stsb", task="stsb")
    assert read_task(tmp_path / "stsb") == read_task(tiny_work / "experts" / "stsb")


def test_a_source_is_a_text_or_has_labels_too() -> None:
    assert ExpertSource.model_validate("hf://a/b") == ExpertSource(source="hf://a/b")
    listed = ExpertSource.model_validate({"source": "hf://a/b", "labels": ["x", "y"]})
    assert listed.labels == ["x", "y"]


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
