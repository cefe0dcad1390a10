"""Tasks of the user's own, of every problem type, in one merge with GLUE's."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from fmn.errors import UserError
from fmn.fisher.files import FisherMetadata, read_fisher
from fmn.fisher.stages import (
    Estimator,
    FisherSettings,
    FullFisherSettings,
    GramSettings,
    fisher,
    full_fisher,
    gram,
)
from fmn.merge.recipe import Recipe
from fmn.merge.stages import MergeSettings, RealignSettings, merge, realign
from fmn.tasks.task import Columns, Task, load_task, read_task, write_task
from tests.folders import edit_config
from tests.pipeline import CPU

TOPICS = ("world", "money", "sport", "science", "art", "food", "travel")
TASKS = {
    task.name: task
    for task in (
        Task(name="topics", columns=Columns(text="headline"), labels=TOPICS, max_length=8),
        Task(
            name="tags",
            problem_type="multi_label_classification",
            columns=Columns(text="body"),
            labels=("toxic", "rude", "spam"),
            metrics=("f1_micro",),
        ),
        Task(
            name="price",
            problem_type="regression",
            columns=Columns(text="item", text_pair="shop"),
            metrics=("pearson",),
        ),
        Task(name="fluent", columns=Columns(text="text"), labels=("no", "yes")),
        Task(
            name="unseen", problem_type=None, columns=Columns(text="text", label=None), metrics=()
        ),
    )
}
NAMES = {name: task.labels or ("score",) for name, task in TASKS.items()}
NAMES |= {"fluent": ("yes",), "unseen": ("calm", "angry", "sad")}  # one logit; labels of its own
WORDS = ["a", "fine", "film", "of", "the", "long", "winter", "that", "nobody", "saw", "twice"]
ROWS = 40


def write_rows(folder: Path, task: Task) -> None:
    """Rows with random texts and labels, and the task's definition beside them."""
    random = np.random.default_rng(len(task.name))
    columns: dict[str, Any] = {
        name: [" ".join(random.choice(WORDS, random.integers(3, 12))) for _ in range(ROWS)]
        for name in task.text_columns
    }
    if task.multi_label:
        drawn = random.integers(0, 2, (ROWS, len(task.labels)))
        ids = [np.flatnonzero(row).tolist() for row in drawn]
        columns["label"] = pa.array(ids, pa.list_(pa.int64()))
    elif task.regression:
        columns["label"] = pa.array(random.uniform(0, 1000, ROWS), pa.float32())
    elif task.has_labels:
        columns["label"] = random.integers(0, len(task.labels), ROWS)
    columns["idx"] = pa.array(range(ROWS), pa.int32())
    folder.mkdir(parents=True)
    pq.write_table(pa.table(columns), folder / "train.parquet")
    write_task(folder, task)


def write_expert(folder: Path, base: Path, task: Task) -> None:
    """An expert as plain Transformers saves it: the base with a head, and another encoder."""
    names = NAMES[task.name]
    torch.manual_seed(len(task.name))
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=len(names))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    ids = {name: output for output, name in enumerate(names)}
    named = {"id2label": dict(enumerate(names)), "label2id": ids}
    problem_type = None if task.name == "fluent" else task.problem_type
    edit_config(folder, **named, problem_type=problem_type)
    for path in (*base.glob("tokenizer*"), *base.glob("*.txt"), *base.glob("special*")):
        shutil.copyfile(path, folder / path.name)


@pytest.fixture(scope="module")
def work(tiny_work: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows and experts of own tasks beside GLUE's sst2; not to be changed by a test."""
    work = tmp_path_factory.mktemp("own")
    for task in TASKS.values():
        write_rows(work / "data" / task.name, task)
        write_expert(work / "experts" / task.name, tiny_work / "base", task)
    for room in ("data", "experts"):
        shutil.copytree(tiny_work / room / "sst2", work / room / "sst2")
    settings = work / "experts" / "tags" / "tokenizer_config.json"
    changed = {"truncation_side": "left", "do_lower_case": False}
    settings.write_text(json.dumps(json.loads(settings.read_text()) | changed))
    return work


def experts(work: Path) -> dict[str, Path]:
    return {name: work / "experts" / name for name in (*TASKS, "sst2")}


def node_fisher(work: Path, name: str, out: Path, estimator: Estimator) -> FisherMetadata:
    settings = FisherSettings(estimator=estimator, samples=16, **CPU)
    expert = work / "experts" / name
    return fisher(expert, task=name, data=work / "data", out=out, settings=settings).summary


@pytest.fixture(scope="module")
def merged(work: Path) -> Recipe:
    files = {name: work / "fisher" / f"{name}.parquet" for name in experts(work)}
    for name, path in files.items():
        metadata = node_fisher(work, name, path, "expected")
        assert metadata.definition is not None
        assert metadata.definition.problem_type is not None
    return merge(experts=experts(work), fisher=files, out=work / "merged").summary


@pytest.mark.parametrize("estimator", ["empirical", "expected", "sampled", "batch"])
@pytest.mark.parametrize("name", TASKS)
def test_every_estimator_takes_every_task_that_has_the_labels_it_reads(
    name: str, estimator: Estimator, work: Path, tmp_path: Path
) -> None:
    out = tmp_path / "f.parquet"
    if name == "unseen" and estimator in ("empirical", "batch"):
        with pytest.raises(UserError, match="choose the estimator expected"):
            node_fisher(work, name, out, estimator)
        return
    assert node_fisher(work, name, out, estimator).samples == 16
    assert all(nodes.any() for nodes in read_fisher(out)[0].values())


@pytest.mark.parametrize("name", TASKS)
def test_the_other_statistics_take_every_task(name: str, work: Path, tmp_path: Path) -> None:
    expert = work / "experts" / name
    options: dict[str, Any] = {"task": name, "data": work / "data"}
    full = FullFisherSettings(estimator="expected", samples=4, **CPU)
    grams = GramSettings(samples=4, **CPU)
    out = tmp_path / "full.safetensors"
    assert full_fisher(expert, **options, out=out, settings=full).summary.samples == 4
    out = tmp_path / "gram.safetensors"
    assert gram(expert, **options, out=out, settings=grams).summary.samples == 4


def test_every_task_says_what_it_is_and_has_its_own_head_and_tokenizer(
    work: Path, merged: Recipe
) -> None:
    assert merged.tasks == sorted(experts(work))
    for name, expert in experts(work).items():
        folder = work / "merged" / "tasks" / name
        definition = merged.definitions[name]
        assert read_task(folder) == definition
        assert definition.max_length == load_task(work / "data", name).max_length
        head, own = (
            load_file(max(folder.glob("*.safetensors"))),
            load_file(expert / "model.safetensors"),
        )
        assert all(torch.equal(own[key], tensor) for key, tensor in head.items())
        model = AutoModelForSequenceClassification.from_pretrained(folder)
        is_single_logit = name == "fluent"
        assert model.config.problem_type == (None if is_single_logit else definition.problem_type)
        assert tuple(model.config.id2label.values()) == NAMES.get(name, definition.labels)
        tokenizer, own_tokenizer = map(AutoTokenizer.from_pretrained, (folder, expert))
        text = {"text": "A Fine FILM of the winter", "max_length": 5, "truncation": True}
        assert tokenizer(**text)["input_ids"] == own_tokenizer(**text)["input_ids"]
        assert tokenizer.truncation_side == ("left" if name == "tags" else "right")


def test_the_encoder_is_the_weighted_mean_whatever_the_problem_types(work: Path) -> None:
    out = work / "average"
    merge(experts=experts(work), out=out, settings=MergeSettings(method="average"))
    tensors = [load_file(folder / "model.safetensors") for folder in experts(work).values()]
    for name, tensor in load_file(out / "encoder" / "model.safetensors").items():
        mean = torch.stack([each[f"bert.{name}"] for each in tensors]).double().mean(0)
        torch.testing.assert_close(tensor.double(), mean, rtol=1e-6, atol=1e-7)


def test_an_expert_without_a_definition_is_what_its_fisher_information_says(
    work: Path, merged: Recipe
) -> None:
    assert not (work / "experts" / "tags" / "task.json").exists()
    assert merged.definitions["tags"] == load_task(work / "data", "tags")
    alone = {"tags": work / "experts" / "tags"}
    average = MergeSettings(method="average")
    recipe = merge(experts=alone, out=work / "alone", settings=average).summary
    definition = recipe.definitions["tags"]  # all that the expert's configuration tells
    assert (definition.labels, definition.columns.label) == (TASKS["tags"].labels, None)


def test_heads_of_every_kind_are_re_aligned(work: Path, merged: Recipe) -> None:
    settings = RealignSettings(texts=30, device="cpu")
    options: dict[str, Any] = {
        "experts": experts(work),
        "data": work / "data",
        "out": work / "realigned",
    }
    recipe = realign(work / "merged", **options, settings=settings).summary
    assert recipe.realign is not None
    for name, fit in recipe.realign.tasks.items():
        assert fit.after is not None
        assert fit.after < fit.before
        assert read_task(work / "realigned" / "tasks" / name) == merged.definitions[name]
    write_task(work / "data" / "topics", TASKS["topics"].model_copy(update={"max_length": 4}))
    try:
        again = realign(work / "merged", **options, settings=settings)
    finally:
        write_task(work / "data" / "topics", TASKS["topics"])
    assert again.computed
    assert again.summary.realign is not None
    assert again.summary.realign.tasks["topics"] != recipe.realign.tasks["topics"]
