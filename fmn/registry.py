"""MLflow: a run for each merge, a registered model with the served model in it, and checkpoints fetched from there.

The store is what ``MLFLOW_TRACKING_URI`` names, otherwise ``mlflow.db`` (sqlite) in the working folder.
"""

import logging
import os
import shutil
import tempfile
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from importlib.metadata import version as installed
from io import StringIO
from pathlib import Path
from typing import Any

import filelock

from fmn.errors import UserError
from fmn.recipe import CARD

os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("DO_NOT_TRACK", "true")
os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")

import mlflow
from mlflow.entities import Metric, Param
from mlflow.exceptions import MlflowException
from mlflow.models import ModelSignature
from mlflow.types import ColSpec, ParamSchema, ParamSpec, Schema
from mlflow.utils.mlflow_tags import MLFLOW_PARENT_RUN_ID

for name in ("mlflow", "alembic"):
    logging.getLogger(name).setLevel(logging.WARNING)

DEFAULT_STORE = "sqlite:///mlflow.db"
KEY = "fmn.key"
REQUIREMENTS = ("mlflow", "torch", "transformers", "safetensors", "pandas", "numpy")
SIGNATURE = ModelSignature(
    inputs=Schema([ColSpec("string", "text"), ColSpec("string", "text_pair", required=False)]),
    outputs=Schema([ColSpec("string", "label"), ColSpec("double", "score"), ColSpec("string", "probabilities")]),
    params=ParamSchema([ParamSpec("task", "string", "")]),
)


@dataclass(frozen=True)
class Registered:
    """Where a merged model stands in the registry."""

    name: str
    version: str
    run_id: str
    tracking_uri: str
    new: bool


def tracking_uri() -> str:
    """The store that runs and models go to."""
    return os.environ.get("MLFLOW_TRACKING_URI") or DEFAULT_STORE


@contextmanager
def _client() -> Iterator[mlflow.MlflowClient]:
    """A client of the store; one process at a time, since the first one creates its tables."""
    uri = tracking_uri()
    mlflow.set_tracking_uri(uri)
    mlflow.set_registry_uri(uri)
    lock = Path(uri.removeprefix("sqlite:///")) if uri.startswith("sqlite:///") else None
    try:
        with warnings.catch_warnings(), _held(lock):
            warnings.simplefilter("ignore")
            yield mlflow.MlflowClient()
    except MlflowException as error:
        raise UserError(f"MLflow at {uri}: {' '.join(str(error).split())}") from error


@contextmanager
def _held(store: Path | None) -> Iterator[None]:
    if store is None:
        yield
        return
    store.parent.mkdir(parents=True, exist_ok=True)
    with filelock.FileLock(store.with_name(f".{store.name}.lock")):
        yield


def register(
    merged: Path,
    *,
    name: str,
    experiment: str,
    key: str,
    params: Mapping[str, Any],
    metrics: Mapping[str, float],
    intervals: Mapping[str, Sequence[float]],
    artifacts: Mapping[str, Path],
    tags: Mapping[str, str],
) -> Registered:
    """Log a run and register the merged model; the version that this content key has already is returned as it is.

    Args:
        merged: the merged model's folder.
        name: of the registered model.
        experiment: of the run.
        key: content key of the registration; a tag of run and version.
        params, metrics, tags: of the run.
        intervals: the (low, high) of metrics, logged as METRIC.low and METRIC.high.
        artifacts: folder or file to log, by the name of the run's artifact folder.

    Raises:
        UserError: the store refuses or cannot be reached.
    """
    with _client() as client:
        known = find(client, name, key)
        if known is not None:
            return known
        mlflow.set_experiment(experiment)
        with mlflow.start_run(run_name=f"{name} {key[:8]}", tags={**tags, KEY: key}) as run:
            mlflow.log_params(dict(params))
            ends = {
                f"{name}.{end}": x
                for name, pair in intervals.items()
                for end, x in zip(("low", "high"), pair, strict=True)
            }
            mlflow.log_metrics({**metrics, **ends})
            for folder, path in artifacts.items():
                (mlflow.log_artifacts if path.is_dir() else mlflow.log_artifact)(str(path), folder)
            with tempfile.TemporaryDirectory() as scratch:
                served = pack(merged, Path(scratch) / "merged")
                logged = mlflow.pyfunc.log_model(
                    name="model",
                    python_model=str(Path(__file__).with_name("served.py")),
                    artifacts={"merged": str(served)},
                    signature=SIGNATURE,
                    pip_requirements=requirements(),
                )
        with redirect_stderr(StringIO()):  # MLflow says there what the caller says better
            version = mlflow.register_model(logged.model_uri, name, tags={**tags, KEY: key})
        for metric, value in metrics.items():
            client.set_model_version_tag(name, version.version, f"metric.{metric}", f"{value:.4f}")
        card = merged / CARD
        if card.is_file():
            client.update_model_version(name, version.version, description=card.read_text())
        return Registered(name, str(version.version), run.info.run_id, tracking_uri(), new=True)


def log_trials(
    trials: Sequence[Mapping[str, float]], *, name: str, experiment: str, key: str, params: Mapping[str, Any]
) -> str:
    """Log the trials of a search: a nested run for each, and above them one whose metrics are the best trial's so far.

    Trials that are there already are not logged again, so the list may be given anew whenever it has grown.

    Args:
        trials: the metrics of each; "score" is the objective, and the first of equal ones is the better.
        name, params: of the run above.
        experiment: of the runs.
        key: content key of the search; a tag of the run above.

    Returns:
        the id of the run above.

    Raises:
        UserError: the store refuses or cannot be reached.
    """
    with _client() as client:
        place = mlflow.set_experiment(experiment).experiment_id
        known = client.search_runs([place], f"tags.`{KEY}` = '{key}'", max_results=1)
        if known:
            parent = known[0].info.run_id
        else:
            parent = client.create_run(place, run_name=f"{name} {key[:8]}", tags={KEY: key}).info.run_id
            client.log_batch(parent, params=[Param(item, str(value)) for item, value in params.items()])
        logged = int(client.get_run(parent).data.metrics.get("trials", 0))
        now = int(time.time() * 1000)
        for number, metrics in enumerate(trials[logged:], logged):
            # A kill between the two leaves a nested run twice rather than not at all.
            nested = client.create_run(place, run_name=f"trial {number}", tags={MLFLOW_PARENT_RUN_ID: parent})
            client.log_batch(nested.info.run_id, [Metric(item, value, now, 0) for item, value in metrics.items()])
            client.set_terminated(nested.info.run_id)
            best = max(trials[: number + 1], key=lambda trial: trial["score"])
            shown = {**best, "trials": number + 1}
            client.log_batch(parent, [Metric(item, value, now, number) for item, value in shown.items()])
        client.set_terminated(parent)
        return str(parent)


def find(client: mlflow.MlflowClient, name: str, key: str) -> Registered | None:
    """The version of a registered model that carries a content key."""
    for version in client.search_model_versions(f"name = '{name}' and tags.`{KEY}` = '{key}'"):
        return Registered(name, str(version.version), str(version.run_id), tracking_uri(), new=False)
    return None


def pack(merged: Path, out: Path) -> Path:
    """What the served model needs of a merged model: the encoder once, and a head and a configuration a task."""
    shutil.copytree(merged / "encoder", out / "encoder", copy_function=_link)
    for task in sorted((merged / "tasks").iterdir()):
        target = out / "tasks" / task.name
        target.mkdir(parents=True)
        _link(task / "config.json", target / "config.json")
        _link(max(task.glob("*.safetensors")), target / "head.safetensors")  # the last shard
    return out


def _link(source: str | Path, target: str | Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # another file system
        shutil.copy2(source, target)


def requirements() -> list[str]:
    """The served model's packages at the versions in use, without a build's local label (``2.13.0+cpu``)."""
    return [f"{package}=={installed(package).split('+')[0]}" for package in REQUIREMENTS]


def pin(source: str) -> str:
    """``models:/NAME@ALIAS`` as ``models:/NAME/VERSION``."""
    name, _, alias = source.removeprefix("models:/").partition("@")
    if not alias:
        return source
    with _client() as client:
        return f"models:/{name}/{client.get_model_version_by_alias(name, alias).version}"


def download(source: str, out: Path) -> str:
    """Put the files of a registered version into ``out`` and return its pinned source.

    Raises UserError when the registry does not have it.
    """
    pinned = pin(source)
    with _client():
        mlflow.artifacts.download_artifacts(artifact_uri=pinned, dst_path=str(out))
    return pinned
