"""The stage that scores models: what it writes, when it computes again, what it refuses."""

import shutil
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pyarrow.parquet as pq
import pytest
from safetensors.torch import load_file, save_file

from fmn.errors import UserError
from fmn.evaluate import bootstrap
from fmn.evaluate.files import predictions_path, read_metrics, read_predictions
from fmn.evaluate.metrics import score_splits
from fmn.evaluate.stages import EvaluateSettings, evaluate
from fmn.merge import recipe
from fmn.merge.stages import MergeSettings, merge
from fmn.store import artifacts
from fmn.store.stage import read_sidecar
from fmn.tasks import dataset
from fmn.tasks.task import get_task
from tests.conftest import TASKS

SETTINGS = EvaluateSettings(device="cpu")


@pytest.fixture(scope="module")
def merged(tiny_work: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny experts merged; not to be changed by a test."""
    out = tmp_path_factory.mktemp("merged") / "average"
    experts = {name: tiny_work / "experts" / name for name in TASKS}
    merge(experts=experts, out=out, settings=MergeSettings(method="average"))
    return out


def test_a_merged_model_is_scored_on_its_own_tasks(
    tiny_work: Path, merged: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read_recipe = Mock(wraps=recipe.read_recipe)
    monkeypatch.setattr(recipe, "read_recipe", read_recipe)
    before = artifacts.digest_files(merged)
    out = tmp_path / "merged.json"
    outcome = evaluate(merged, data=tiny_work / "data", out=out, settings=SETTINGS)
    assert artifacts.digest_files(merged) == before, "the model's folder stays as it is"
    read_recipe.assert_called_once_with(merged)
    metrics = outcome.summary
    assert metrics == read_metrics(out)
    assert metrics.model == artifacts.digest_folder(merged)
    assert set(metrics.tasks) == set(metrics.labels) == set(metrics.data) == set(TASKS)
    predictions = read_predictions(out)
    for name, scores in metrics.tasks.items():
        expected = score_splits(get_task(name), predictions[name])
        assert scores.model_extra is not None
        assert {**scores.model_extra, "score": scores.score} == pytest.approx(expected)
        assert set(scores.interval) == set(expected)
        for metric, (low, high) in scores.interval.items():
            assert low <= expected[metric] <= high
        rows = dataset.read_split(tiny_work / "data", get_task(name), "validation")
        np.testing.assert_array_equal(
            predictions[name]["validation"].labels, rows["label"].to_numpy()
        )
        assert scores.examples == rows.num_rows
    low, high = metrics.interval
    assert low < metrics.score < high
    assert bootstrap.compare(predictions, predictions).p_value == 1.0
    schema = pq.read_schema(predictions_path(out))
    assert schema.names == ["task", "split", "row", "prediction", "label"]
    assert [str(type) for type in schema.types] == ["string", "string", "int32", "double", "double"]


def test_a_second_evaluation_computes_nothing_and_damage_is_repaired(
    tiny_work: Path, tmp_path: Path
) -> None:
    expert, out = tmp_path / "expert", tmp_path / "stsb.json"
    shutil.copytree(tiny_work / "experts" / "stsb", expert)
    files = (out, predictions_path(out))

    def computes() -> bool:
        data = tiny_work / "data"
        return evaluate(expert, data=data, out=out, tasks=["stsb"], settings=SETTINGS).computed

    assert computes()
    assert not computes()
    before = [path.read_bytes() for path in files]
    for path in files:
        path.write_bytes(path.read_bytes()[:-1] + b"?")
        with pytest.raises(UserError, match="not what was written"):
            read_predictions(out)
        assert computes()
        path.unlink()
        with pytest.raises(UserError, match=r"no such file|not what was written"):
            read_predictions(out)
        assert computes()
        assert [path.read_bytes() for path in files] == before
    sidecar = read_sidecar(out)
    assert sidecar is not None
    assert set(sidecar.files) == {path.name for path in files}
    weights = load_file(expert / "model.safetensors")
    (expert / artifacts.SIDECAR).unlink()
    save_file({k: v + 1e-3 for k, v in weights.items()}, expert / "model.safetensors")
    assert computes(), "another model"


def test_mnli_is_scored_on_both_splits(tiny_work: Path, tmp_path: Path) -> None:
    from fmn.models.finetune import new_expert

    mrpc = pq.read_table(tiny_work / "data" / "mrpc" / "train.parquet").slice(0, 40)
    table = mrpc.rename_columns(["premise", "hypothesis", "label", "idx"])
    for split in ("validation_matched", "validation_mismatched"):
        pq.write_table(table, tmp_path / f"{split}.parquet")
    expert = Path(shutil.copytree(tiny_work / "base", tmp_path / "expert"))
    (expert / artifacts.SIDECAR).unlink()
    new_expert(tiny_work / "base", get_task("mnli"), 0).save_pretrained(expert)
    out = tmp_path / "mnli.json"
    outcome = evaluate(expert, data=tmp_path, out=out, tasks=["mnli"], settings=SETTINGS)
    scores = outcome.summary.tasks["mnli"].model_dump()
    assert scores["examples"] == scores["examples_mismatched"] == 40
    assert scores["accuracy"] == scores["accuracy_mismatched"] == scores["score"]


@pytest.mark.parametrize(
    ("model", "tasks", "message"),
    [
        ("expert", [], "--task"),
        ("merged", ["rte"], "no task 'rte' in it; it has"),
        ("expert", ["snli"], "snli"),
    ],
)
def test_a_task_that_the_model_does_not_have_is_refused(
    tiny_work: Path, merged: Path, tmp_path: Path, model: str, tasks: list[str], message: str
) -> None:
    path = {"merged": merged, "expert": tiny_work / "experts" / "mrpc"}[model]
    with pytest.raises(UserError, match=message):
        evaluate(path, data=tiny_work / "data", out=tmp_path / "m.json", tasks=tasks)
    assert not list(tmp_path.iterdir())
