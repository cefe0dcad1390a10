"""The stage that scores models: what it writes, when it computes again, what it refuses."""

import shutil
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from safetensors.torch import load_file, save_file
from sklearn.metrics import f1_score, mean_squared_error

from fmn.errors import UserError
from fmn.evaluate import bootstrap
from fmn.evaluate.files import (
    predictions_path,
    read_metrics,
    read_predictions,
    write_predictions,
)
from fmn.evaluate.metrics import TaskAnswers, score_splits
from fmn.evaluate.stages import EvaluateSettings, evaluate
from fmn.merge import recipe
from fmn.merge.stages import MergeSettings, merge
from fmn.models.finetune import new_expert
from fmn.store import artifacts
from fmn.store.stage import read_sidecar, write_record
from fmn.tasks import dataset
from fmn.tasks.task import Columns, get_task, write_task
from tests import reports
from tests.conftest import TASKS
from tests.reports import BINARY, CLASSES, LABELS, NUMBERS, answered, own_expert, own_task

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
        expected = score_splits(*predictions[name])
        assert scores.model_extra is not None
        assert {**scores.model_extra, "score": scores.score} == expected
        assert set(scores.interval) == set(expected)
        for metric, value in expected.items():
            assert value is not None
            low, high = scores.interval[metric] or (0, 0)
            assert low <= value <= high
        rows = dataset.read_split(tiny_work / "data", get_task(name), "validation")
        np.testing.assert_array_equal(
            predictions[name].splits["validation"].labels, rows["label"].to_numpy()
        )
        assert scores.examples == rows.num_rows
    assert metrics.interval is not None
    assert metrics.score is not None
    assert metrics.interval[0] < metrics.score < metrics.interval[1]
    assert bootstrap.compare(predictions, predictions).p_value == 1.0


@pytest.mark.parametrize("kind", [BINARY, CLASSES, LABELS, NUMBERS])
def test_predictions_come_back_as_they_were_written(tmp_path: Path, kind: str) -> None:
    task = own_task(kind, {NUMBERS: "mae"}.get(kind, "f1_macro"))
    splits = {split: answered(task, 0.3, count) for split, count in (("first", 9), ("second", 5))}
    written = {"own": TaskAnswers(task, splits)}
    out = tmp_path / "metrics.json"
    write_record(
        out, reports.metrics({"own": {"score": 0.5, "examples": 9, "interval": {}}}, [task])
    )
    write_predictions(predictions_path(out), written)
    ((name, (of_task, again)),) = read_predictions(out).items()
    assert (name, of_task, list(again)) == ("own", task, list(splits))
    for split, answers in splits.items():
        for side, other in zip(answers, again[split], strict=True):
            np.testing.assert_array_equal(side.astype(np.float32), other.astype(np.float32))
            assert side.dtype.kind == other.dtype.kind
    schema = pq.read_schema(predictions_path(out))
    numbers, ids = dict.fromkeys(("prediction", "label"), "double"), "list<element: int32>"
    assert dict(zip(schema.names, map(str, schema.types), strict=True)) == {
        "task": "string",
        "split": "string",
        "row": "int32",
        **numbers,
        **{f"{side}s": ids for side in numbers},
        "scores": "list<element: float>",
    }


def test_tasks_of_every_sort_are_scored_and_those_without_labels_are_skipped(
    tiny_work: Path, tmp_path: Path
) -> None:
    texts = [f"a {word} film" for word in ("fine", "dull", "long", "short", "new", "old")]
    sides: dict[str, Any] = {
        NUMBERS: pa.array(np.linspace(-1, 1, 6), pa.float32()),
        CLASSES: [0, 1, 2, 0, 1, 2],
        LABELS: pa.array([[], [0], [1, 2], [0, 1, 2], [2], [0]], pa.list_(pa.int64())),
    }
    tasks = {
        kind: own_task(kind, {NUMBERS: "mse"}.get(kind, "f1_macro"), name=kind) for kind in sides
    }
    index = pa.array(range(6), pa.int32())
    experts = {
        kind: own_expert(
            tiny_work, tmp_path, tasks[kind], {"text": texts, "label": side, "idx": index}
        )
        for kind, side in sides.items()
    }
    plain = Columns(text="text", label=None)
    bare = tasks[CLASSES].model_copy(update={"name": "bare", "columns": plain, "metrics": ()})
    experts["bare"] = own_expert(tiny_work, tmp_path, bare, {"text": texts})
    model, data, out = tmp_path / "merged", tmp_path / "data", tmp_path / "metrics.json"
    merge(experts=experts, out=model, settings=MergeSettings(method="average"))
    metrics = evaluate(model, data=data, out=out, settings=SETTINGS).summary
    assert set(metrics.tasks) == set(metrics.definitions) == {CLASSES, LABELS, NUMBERS}
    assert metrics.unlabeled == ["bare"]
    scores = [metrics.tasks[kind].score or 0 for kind in (CLASSES, LABELS)]
    assert metrics.score == pytest.approx(np.mean(scores)), "the mean is where more is better"
    several = read_predictions(out)[LABELS].splits["validation"]
    assert several.labels.tolist()[2] == [0, 1, 1]
    assert scores[1] == pytest.approx(
        f1_score(several.labels, several.scores >= 0.5, average="macro", zero_division=0)
    )
    ids, values = (read_predictions(out)[kind].splits["validation"] for kind in (CLASSES, NUMBERS))
    wanted = f1_score(ids.labels, ids.predicted, average="macro")
    assert metrics.tasks[CLASSES].score == pytest.approx(wanted)
    wanted = mean_squared_error(values.labels, values.predicted)
    assert metrics.tasks[NUMBERS].score == pytest.approx(wanted)
    shutil.rmtree(data / "bare")
    evaluate(model, data=data, out=tmp_path / "again.json", settings=SETTINGS)
    with pytest.raises(UserError, match="the rows of bare have no labels"):
        evaluate(model, data=data, out=tmp_path / "bare.json", tasks=["bare"], settings=SETTINGS)


def test_rows_may_lie_in_the_folder_itself(tiny_work: Path, tmp_path: Path) -> None:
    """An expert that was fetched without rows has a definition without labels."""
    expert = Path(shutil.copytree(tiny_work / "experts" / "sst2", tmp_path / "expert"))
    task, rows = get_task("sst2"), shutil.copytree(tiny_work / "data" / "sst2", tmp_path / "rows")
    (expert / "fmn.json").unlink(missing_ok=True)
    write_task(Path(rows), task)
    columns = task.columns.model_copy(update={"label": None})
    write_task(expert, task.model_copy(update={"columns": columns, "metrics": ()}))
    scores = [
        evaluate(expert, tasks=["sst2"], data=data, out=tmp_path / f"{data.name}.json",
                 settings=SETTINGS).summary.score
        for data in (tiny_work / "data", Path(rows))
    ]  # fmt: skip
    assert scores[0] == scores[1] is not None


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
