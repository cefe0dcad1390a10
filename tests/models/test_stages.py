"""The stages `finetune` and `predict`; those of `fetch` are beside its sources."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig

from fmn.errors import UserError
from fmn.models import stages
from fmn.models.provenance import Lineage, lineage, rows_tuned_on, training_metadata, tuning
from fmn.store.artifacts import digest_files, digest_folder
from fmn.store.stage import Outcome, read_sidecar
from tests.conftest import TUNING


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


def test_provenance_says_where_an_expert_comes_from(
    tiny_base: Path, tiny_work: Path, tmp_path: Path
) -> None:
    expert, base = tiny_work / "experts" / "sst2", tiny_work / "base"
    training = training_metadata(expert)
    assert training is not None
    assert training.base == lineage(base)
    assert lineage(base).source == lineage(base).revision == str(tiny_base)
    assert (training.task, training.steps, training.threads) == ("sst2", 2, torch.get_num_threads())
    sidecar = read_sidecar(expert)
    assert sidecar is not None
    assert training.data_digest == sidecar.inputs["train"]
    output = f"finetune:{sidecar.key[:16]}"
    assert lineage(expert) == Lineage(source=output, revision=output)
    assert tuning(expert) == TUNING.model_dump(exclude={"device"})
    assert rows_tuned_on(expert) == (64, 0)

    foreign = Path(shutil.copytree(expert, tmp_path / "foreign"))
    (foreign / "fmn.json").unlink()
    digest = f"sha256:{digest_folder(foreign)}"
    assert lineage(foreign) == Lineage(source="folder", revision=digest)
    for folder in (foreign, base):
        assert training_metadata(folder) is None
        assert tuning(folder) == {}
        assert rows_tuned_on(folder) == (None, 0)
    content = json.loads((expert / "fmn.json").read_text())
    content["info"]["examples"] = "many"
    (foreign / "fmn.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"fmn\.json: examples is 'many'"):
        rows_tuned_on(foreign)


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
