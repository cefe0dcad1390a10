"""The stage `fetch` as the door of experts.

Where checkpoints come from is tested beside it.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import safetensors.torch
import torch
from pydantic import ValidationError
from transformers import AutoConfig

from fmn.errors import UserError
from fmn.models.checkpoints import load_config
from fmn.models.labels import load_expert
from fmn.sources import stages
from fmn.sources.stages import ArchitectureSettings, ExpertSource, FetchSettings
from fmn.store.stage import Outcome
from fmn.tasks.task import Task, read_task, write_task
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


@pytest.mark.parametrize("has_kind", [True, False])
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
    kind: Any, labels: list[str], order: list[int], has_kind: bool, tmp_path: Path
) -> None:
    task = make_task(labels, kind)
    source = expert(tmp_path / "expert", len(order), problem_type=kind if has_kind else None)
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


def test_a_described_architecture_is_part_of_the_copy_and_of_its_key(tmp_path: Path) -> None:
    source = expert(tmp_path / "source", 2, names=["a", "b"])
    described = ArchitectureSettings(
        layers="encoder.layer.{}",
        heads=["attention.output.dense", "attention.self: q=query k=key v=value", ""],
        neurons=["output.dense", "intermediate: u=dense", ""],
    )
    out = tmp_path / "out"
    stages.fetch(str(source), out=out)
    assert stages.fetch(str(source), out=out, architecture=described).computed
    assert load_config(out).fmn_architecture == described.model_dump()
    assert not stages.fetch(str(source), out=out, architecture=described).computed


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"layers": "encoder.layer"}, "in place of the layer's number"),
        ({"heads": ["o", "x=query", ""]}, "PARENT: q="),
    ],
)
def test_a_description_that_says_nothing_is_refused(change: dict[str, Any], problem: str) -> None:
    whole = {"layers": "l.{}", "heads": ["o", "q=q", ""], "neurons": ["d", "u=u", ""]}
    with pytest.raises(ValidationError, match=problem):
        ArchitectureSettings.model_validate(whole | change)
