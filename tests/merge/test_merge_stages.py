"""Re-aligned heads: a merged model of its own, made of texts alone, from the very experts that were merged."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from fmn.errors import UserError
from fmn.evaluate import stages as evaluate_stages
from fmn.evaluate.stages import EvaluateSettings
from fmn.experiments import stages as experiments_stages
from fmn.experiments.stages import ComparedSettings, CompareSettings
from fmn.merge import heads, recipe
from fmn.merge import stages as merge_stages
from fmn.merge.stages import MergeSettings, RealignSettings, RefitSettings
from fmn.models import checkpoints
from fmn.models import stages as models_stages
from fmn.registry import stages as registry_stages
from fmn.registry.stages import RegistrySettings
from fmn.report import stages as report_stages
from fmn.store import artifacts
from fmn.store.stage import Outcome
from fmn.tasks.dataset import read
from fmn.tasks.task import task
from tests.conftest import TASKS

SETTINGS = RealignSettings(texts=40, device="cpu")
EVALUATE = EvaluateSettings(device="cpu")


@pytest.fixture
def work(tiny_work: Path, tmp_path: Path) -> Path:
    """A copy of the tiny work folder, with the average of its experts in `merged`."""
    folder = Path(shutil.copytree(tiny_work, tmp_path / "work"))
    merge_stages.merge(
        experts(folder), {}, None, folder / "merged", MergeSettings(method="average")
    )
    return folder


def experts(work: Path) -> dict[str, Path]:
    return {task: work / "experts" / task for task in TASKS}


def realign(work: Path, settings: RealignSettings = SETTINGS) -> Outcome:
    return merge_stages.realign(
        work / "merged", experts(work), work / "data", work / "realigned", settings
    )


def test_the_last_map_of_every_head_alone_is_new_and_the_encoder_is_on_the_disk_once(
    work: Path,
) -> None:
    before = artifacts.digest_files(work / "merged")
    made = realign(work)
    recipe.verify(work / "realigned")
    assert artifacts.digest_files(work / "merged") == before
    after = artifacts.digest_files(work / "realigned")
    changed = {name for name in after if after[name] != before[name]} - {"README.md", "merge.json"}
    assert changed == {f"tasks/{name}/model-00002-of-00002.safetensors" for name in TASKS}
    place = "encoder/model.safetensors"
    assert (work / "realigned" / place).stat().st_ino == (work / "merged" / place).stat().st_ino
    for name in TASKS:
        old, new = (
            checkpoints.load_classifier(work / m / "tasks" / name) for m in ("merged", "realigned")
        )
        path = heads.last_linear(old)
        tensors = new.state_dict()
        differing = {
            key for key, tensor in old.state_dict().items() if not torch.equal(tensor, tensors[key])
        }
        assert differing == {f"{path}.weight", f"{path}.bias"}
        fit = made.summary["realign"]["tasks"][name]
        assert (fit["texts"], fit["ridge"] > 0, fit["after"] < fit["before"]) == (40, True, True)
    stated = json.loads((work / "realigned" / "merge.json").read_text())
    assert stated["realign"]["merged"] == artifacts.digest_file(work / "merged" / "merge.json")
    assert stated["experts"] == recipe.read_recipe(work / "merged")["experts"]
    assert "re-aligned" in (work / "realigned" / "README.md").read_text()


def test_it_is_made_again_when_and_only_when_something_it_depends_on_changed(work: Path) -> None:
    assert (realign(work).computed, realign(work).computed) == (True, False)
    assert realign(work, SETTINGS.model_copy(update={"texts": 30})).computed
    first = realign(work).summary
    (work / "realigned" / "tasks" / "sst2" / "config.json").unlink()
    again = realign(work)
    assert (again.computed, again.summary) == (True, first)
    merge_stages.merge(
        experts(work),
        {},
        None,
        work / "merged",
        MergeSettings(method="average", coefficient=["sst2=2"]),
    )
    assert realign(work).computed


def shuffled(table: pa.Table) -> pa.Table:
    labels = np.roll(table["label"].to_numpy(), 1)
    return table.set_column(table.column_names.index("label"), "label", pa.array(labels))


@pytest.mark.parametrize("change", [shuffled, lambda table: table.drop_columns(["label"])])
def test_labels_are_never_read(work: Path, change: Callable[[pa.Table], pa.Table]) -> None:
    first = realign(work).summary["files"]
    for name in TASKS:
        file = work / "data" / name / "train.parquet"
        table = change(read(work / "data", task(name), "train"))
        pq.write_table(table, file)
    again = realign(work)
    assert again.computed
    assert again.summary["files"] == first


def test_an_encoder_that_is_the_experts_own_leaves_its_head_as_it_is(work: Path) -> None:
    one = {"mrpc": experts(work)["mrpc"]}
    merge_stages.merge(one, {}, None, work / "alone", MergeSettings(method="average"))
    made = merge_stages.realign(work / "alone", one, work / "data", work / "realigned", SETTINGS)
    assert made.summary["files"] == recipe.read_recipe(work / "alone")["files"]


def test_other_experts_than_those_that_were_merged_are_refused(work: Path) -> None:
    other = {**experts(work), "sst2": work / "experts" / "mrpc"}
    with pytest.raises(UserError, match=r"expert sst2: .* is not what .*merged was merged from"):
        merge_stages.realign(work / "merged", other, work / "data", work / "realigned", SETTINGS)
    lacking = {name: path for name, path in experts(work).items() if name != "stsb"}
    with pytest.raises(UserError, match="--expert stsb=DIR is missing"):
        merge_stages.realign(work / "merged", lacking, work / "data", work / "realigned", SETTINGS)
    assert not (work / "realigned").exists()
    realign(work)
    with pytest.raises(UserError, match="re-aligned already"):
        merge_stages.realign(
            work / "realigned", experts(work), work / "data", work / "more", SETTINGS
        )


def test_it_is_evaluated_shown_asked_and_registered_as_any_merged_model(
    work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    realign(work)
    files = {name: work / "metrics" / f"{name}.json" for name in ("merged", "realigned")}
    for name, file in files.items():
        evaluate_stages.evaluate(work / name, [], work / "data", file, EVALUATE)
    table = report_stages.report(merged=files, out=work / "report").summary.results
    assert table["tasks"]["stsb"]["merged"] != table["tasks"]["stsb"]["realigned"]
    assert "label" in models_stages.predict(work / "realigned", "sst2", "a warm film", None)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{work / 'mlflow.db'}")
    monkeypatch.chdir(work)
    registered = registry_stages.register(
        work / "realigned", files["realigned"], None, None, RegistrySettings(name="tiny")
    )
    assert registered.summary["version"] == "1"


def test_a_comparison_tries_in_memory_what_the_stage_writes(work: Path) -> None:
    asked = CompareSettings(methods={"any": ComparedSettings(method="average")}, device="cpu")
    tuned_on: dict[str, tuple[int | None, int]] = dict.fromkeys(TASKS, (64, 0))

    def cell(name: str, settings: CompareSettings, refit: RefitSettings | None) -> Outcome:
        merging = ComparedSettings(method="average", realign=refit)
        out = work / "cells" / f"{name}.json"
        return experiments_stages.compare(
            experts(work), {}, {}, work / "base", work / "data", out, merging, settings, tuned_on
        )

    realign(work)
    metrics = work / "metrics.json"
    found = cell("realigned", asked, RefitSettings(texts=40)).summary["tasks"]
    evaluate_stages.evaluate(work / "realigned", [], work / "data", metrics, EVALUATE)
    answers = artifacts.read_predictions(metrics)
    for name in TASKS:
        np.testing.assert_allclose(
            found[name]["predictions"], answers[name]["validation"].predicted, atol=1e-4
        )
    assert cell("plain", asked, None).summary["tasks"]["stsb"]["score"] != found["stsb"]["score"]

    train = asked.model_copy(update={"split": "train", "rows": 20})
    assert cell("train", train, RefitSettings(texts="all")).computed
    assert not cell("train", train, RefitSettings(texts="all")).computed
    assert cell("train", train, RefitSettings(texts=40)).computed
    every = asked.model_copy(update={"split": "train", "rows": "all"})
    tuned_on = dict.fromkeys(TASKS, (None, 0))
    with pytest.raises(UserError, match="no training text is left"):
        cell("none", every, RefitSettings(texts=40))
