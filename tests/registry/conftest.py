"""A store of its own for each module, and a merged model to register."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import mlflow
import pytest

from fmn.evaluate.stages import EvaluateSettings, evaluate
from fmn.merge.stages import MergeSettings, merge
from fmn.registry import stages as registry_stages
from fmn.registry import tracking
from fmn.registry.stages import Registered, RegistrySettings
from fmn.store.stage import Outcome
from tests.conftest import TASKS, Load

Register = Callable[..., Outcome[Registered]]


class Merged(NamedTuple):
    """A merged model, and its metrics file."""

    model: Path
    metrics: Path


def merge_and_evaluate(tiny_work: Path, out: Path, method: str = "mask-fisher") -> Merged:
    experts = {task: tiny_work / "experts" / task for task in TASKS}
    fisher = {task: tiny_work / "fisher" / f"{task}.parquet" for task in TASKS}
    merged = Merged(out / "merged", out / "metrics.json")
    settings = MergeSettings(method=method)
    merge(
        experts=experts, fisher=fisher, base=tiny_work / "base", out=merged.model, settings=settings
    )
    cpu = EvaluateSettings(device="cpu")
    evaluate(merged.model, data=tiny_work / "data", out=merged.metrics, settings=cpu)
    return merged


@pytest.fixture(scope="session")
def merged(tiny_work: Path, tmp_path_factory: pytest.TempPathFactory) -> Merged:
    """A merged model of three tasks; not to be changed by a test."""
    return merge_and_evaluate(tiny_work, tmp_path_factory.mktemp("merged"))


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of an SQLite store, where MLflow finds it; its folder is the working folder."""
    folder = tmp_path_factory.mktemp("store")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{folder / 'mlflow.db'}")
        patch.chdir(folder)
        yield tracking.tracking_uri()


@pytest.fixture(autouse=True)
def shared(shared_process: Load) -> Load:
    """Every registration of a test uses the shared process; `test_alone` starts its own."""
    return shared_process


@pytest.fixture
def client(store: str) -> mlflow.MlflowClient:
    return mlflow.MlflowClient(store)


@pytest.fixture
def register(merged: Merged) -> Register:
    """Registers the merged model, under a name and with other metrics if they are given."""

    def run(
        name: str = "demo",
        metrics: Path | None = None,
        settings: dict[str, Any] | None = None,
        **options: Any,
    ) -> Outcome[Registered]:
        return registry_stages.register(
            merged.model,
            metrics=metrics or merged.metrics,
            settings=RegistrySettings(name=name, **(settings or {})),
            **options,
        )

    return run
