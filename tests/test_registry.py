"""The MLflow registry, with a real sqlite store: versions, and the model that is served from them."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pandas as pd
import pytest

from fmn import merge_stages, registry, stages
from fmn.errors import UserError
from fmn.params import EvaluateSettings, MergeSettings, RegistrySettings
from fmn.stage import Outcome
from tests.conftest import TASKS


@pytest.fixture(scope="module")
def merged(tiny_work: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A merged model beside its metrics."""
    folder = tmp_path_factory.mktemp("merged")
    experts = {task: tiny_work / "experts" / task for task in TASKS}
    fisher = {task: tiny_work / "fisher" / f"{task}.parquet" for task in TASKS}
    merge_stages.merge(experts, fisher, None, folder / "merged", MergeSettings())
    stages.evaluate(folder / "merged", [], tiny_work / "data", folder / "metrics.json", EvaluateSettings(device="cpu"))
    return folder


@pytest.fixture(scope="module", autouse=True)
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("store")
    patch = pytest.MonkeyPatch()
    patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{folder / 'mlflow.db'}")
    patch.chdir(folder)
    yield registry.tracking_uri()
    patch.undo()


def register(merged: Path, name: str = "demo") -> Outcome:
    return stages.register(merged / "merged", merged / "metrics.json", None, None, RegistrySettings(name=name))


def test_a_model_is_registered_once_with_its_metrics(merged: Path, store: str) -> None:
    first, second = register(merged), register(merged)
    assert (first.computed, second.computed) == (True, False)
    assert first.summary == second.summary
    assert first.summary["store"] == store
    import mlflow

    run = mlflow.MlflowClient(store).get_run(first.summary["run"])
    metrics = json.loads((merged / "metrics.json").read_text())
    assert run.data.metrics["mrpc.f1"] == metrics["tasks"]["mrpc"]["f1"]
    assert run.data.metrics["score"] == metrics["score"]
    low, high = metrics["tasks"]["mrpc"]["interval"]["f1"]
    assert (run.data.metrics["mrpc.f1.low"], run.data.metrics["mrpc.f1.high"]) == (low, high)
    assert run.data.metrics["score.low"] <= run.data.metrics["score"] <= run.data.metrics["score.high"]
    assert run.data.params["method"] == "mask-fisher"
    assert run.data.tags["expert.mrpc"].startswith("finetune:")
    version = mlflow.MlflowClient(store).get_model_version("demo", first.summary["version"])
    assert "f1" in str(version.description)


def test_the_served_model_answers_as_the_merged_one_does(merged: Path) -> None:
    summary = register(merged).summary
    import mlflow

    model = mlflow.pyfunc.load_model(f"models:/demo/{summary['version']}")
    texts = pd.DataFrame({"text": ["a warm film", "dull"], "text_pair": ["a cold film", "bright"]})
    for task in ("mrpc", "stsb"):
        answers = model.predict(texts, params={"task": task})
        for (text, second), answer in zip(texts.itertuples(index=False), answers.to_dict("records"), strict=True):
            expected = stages.predict(merged / "merged", task, text, second)
            assert answer["label"] == expected["label"]
            assert answer["score"] == pytest.approx(expected["score"], abs=1e-5)
    answer = model.predict(texts[["text"]], params={"task": "sst2"}).to_dict("records")[0]
    expected = stages.predict(merged / "merged", "sst2", "a warm film", None)
    assert json.loads(answer["probabilities"]) == pytest.approx(expected["probabilities"], abs=1e-5)
    with pytest.raises(Exception, match="not one of mrpc, sst2, stsb"):
        model.predict(texts, params={"task": "rte"})


def test_the_served_model_does_not_need_fmn(merged: Path, tmp_path: Path) -> None:
    """`fmn` is made impossible to import where the model is loaded."""
    summary = register(merged).summary
    (tmp_path / "fmn.py").write_text("raise ImportError('fmn is not here')")
    code = (
        "import mlflow, pandas as pd, sys\n"
        f"model = mlflow.pyfunc.load_model('models:/demo/{summary['version']}')\n"
        "print(model.predict(pd.DataFrame({'text': ['good']}), params={'task': 'sst2'}).label[0])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.stdout.strip() in ("negative", "positive"), done.stderr


def test_a_version_can_be_fetched_by_alias_and_is_pinned(merged: Path, store: str, tmp_path: Path) -> None:
    version = register(merged).summary["version"]
    import mlflow

    mlflow.MlflowClient(store).set_registered_model_alias("demo", "champion", version)
    assert registry.pin("models:/demo@champion") == f"models:/demo/{version}"
    assert registry.download("models:/demo@champion", tmp_path / "out") == f"models:/demo/{version}"
    assert list((tmp_path / "out").rglob("model.safetensors"))


def test_what_the_registry_does_not_have_is_a_users_mistake() -> None:
    with pytest.raises(UserError, match="none"):
        registry.pin("models:/none@champion")
    with pytest.raises(UserError, match="MLflow at sqlite"):
        registry.download("models:/none/1", Path("out"))


def test_requirements_are_pinned_without_local_labels() -> None:
    found = dict(line.split("==") for line in registry.requirements())
    assert set(found) == set(registry.REQUIREMENTS)
    assert not any("+" in version for version in found.values())
