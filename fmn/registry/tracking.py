"""MLflow: runs of merges, searches and comparisons; registered models with the served model in them; their aliases.

The store is what MLflow's own variables name (``MLFLOW_TRACKING_URI``, ``MLFLOW_REGISTRY_URI``), otherwise
``mlflow.db`` (sqlite) and the folder ``mlruns`` in the working folder. ``MLFLOW_DEFAULT_ARTIFACT_ROOT`` says where the
files of a store go that is a database; a server says it itself.
"""

import json
import logging
import os
import re
import shutil
import tempfile
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version as installed
from io import StringIO
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

import filelock

from fmn.errors import UserError, redacted
from fmn.registry import promotion
from fmn.registry.promotion import CHALLENGER, CHAMPION, Decision, Standing
from fmn.store import machine
from fmn.store.artifacts import digest_bytes
from fmn.tasks import task as tasks

os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("DO_NOT_TRACK", "true")
os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
# A request that a server refuses or fails is made again for half a minute; MLflow's own patience is four. One that is
# not answered is given up after 30 seconds, and so after three minutes in all; with MLflow's patience that is twenty.
os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "4")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "30")

import mlflow
from mlflow.entities import Dataset, DatasetInput, InputTag, Metric, Param
from mlflow.entities.model_registry import ModelVersion, RegisteredModel
from mlflow.exceptions import MlflowException
from mlflow.models import ModelSignature
from mlflow.types import ColSpec, ParamSchema, ParamSpec, Schema
from mlflow.types.schema import Map
from mlflow.utils.mlflow_tags import (
    MLFLOW_DATASET_CONTEXT,
    MLFLOW_GIT_COMMIT,
    MLFLOW_PARENT_RUN_ID,
    MLFLOW_RUN_NOTE,
    MLFLOW_SOURCE_NAME,
)
from sqlalchemy.exc import SQLAlchemyError

for name in ("mlflow", "alembic"):
    logging.getLogger(name).setLevel(logging.WARNING)

DEFAULT_STORE = "sqlite:///mlflow.db"
KEY = "fmn.key"
REASON = "promotion"  # tag of a version, and of its run: the alias that it got, and why
SCORES, DATA = (
    "fmn.scores",
    "fmn.data",
)  # tags of a version: the score of each task, digest of the evaluation data
HISTORY = "champion.history"  # tag of a registered model
LINEAGE = "lineage"  # a run's folder of what its version can be made from again
DIGITS = 32  # of a data set's digest; MLflow keeps 36
REQUIREMENTS = ("mlflow", "torch", "transformers", "safetensors", "pandas", "numpy")
SIGNATURE = ModelSignature(
    inputs=Schema([ColSpec("string", "text"), ColSpec("string", "text_pair", required=False)]),
    outputs=Schema(
        [
            ColSpec("string", "label"),
            ColSpec("double", "score"),
            ColSpec(Map("double"), "probabilities"),
        ]
    ),
    params=ParamSchema([ParamSpec("task", "string", "")]),
)


_SUMMARY = 300  # characters of MLflow's error that fit into one line of ours
_VERSION = re.compile(r"models:/[^/@]+(/[0-9]+|@[^/@]+)")


class Input(NamedTuple):
    """A data set that a run read: its task and what it was for ("training", "validation"), where it came from.

    Attributes:
        origin: its source, and revision or seed.
        columns: MLflow's type of each column.
        rows: how many there are; None where that is not known.
    """

    task: str
    context: str
    digest: str
    origin: Mapping[str, str]
    columns: Mapping[str, str]
    rows: int | None


@dataclass(frozen=True)
class Registered:
    """Where a merged model stands in the registry.

    Attributes:
        alias: the alias that its version got when it was registered, champion or challenger.
        reason: why.
    """

    name: str
    version: str
    run_id: str
    tracking_uri: str
    new: bool
    alias: str
    reason: str


def tracking_uri() -> str:
    """The store that runs and models go to."""
    return os.environ.get("MLFLOW_TRACKING_URI") or DEFAULT_STORE


def page(port: int) -> str:
    """The address of the registry's page: of the server that is named, or of one to be started here on a port.

    A local store that is not there is made, so that server and runs do not both make it.
    """
    uri = tracking_uri()
    if uri.startswith("http"):
        return f"{redacted(uri).rstrip('/')}/#/models"
    with _client() as client:
        client.search_registered_models(max_results=1)
    return f"http://127.0.0.1:{port}/#/models"


@contextmanager
def _client() -> Iterator[mlflow.MlflowClient]:
    """A client of the store; one process at a time of all that share an sqlite file, or a machine, user and server.

    The first one creates its tables, and whether a version takes the champion's place depends on who holds it.
    """
    uri = tracking_uri()
    mlflow.set_tracking_uri(uri)
    file = _database(uri)
    lock = _lock(uri, file)
    lock.parent.mkdir(parents=True, exist_ok=True)
    try:
        with warnings.catch_warnings(), filelock.FileLock(lock):
            warnings.simplefilter("ignore")
            if file and not file.exists():
                _make_database(file)
            yield mlflow.MlflowClient()
    except Exception as error:
        if told := machine.refusal(error, file):
            raise told from error
        of_http = isinstance(error, OSError) and error.errno is None
        if of_http or isinstance(error, MlflowException | SQLAlchemyError):
            raise UserError(f"MLflow at {uri}: {_fault(error)}") from error
        raise


def _lock(uri: str, file: Path | None) -> Path:
    """Beside an sqlite file; of another store, where every workspace of a user finds it."""
    if file:
        return file.with_name(f".{file.name}.lock")
    return (
        Path(tempfile.gettempdir())
        / f"fmn-{os.getuid()}"
        / f"{digest_bytes(uri.encode())[:16]}.lock"
    )


def _make_database(file: Path) -> None:
    """An sqlite store with MLflow's tables, whole or not at all: half of them would be refused ever after."""
    # A name of its own each time: MLflow's engine keeps a file that was given up open under its old one.
    with tempfile.TemporaryDirectory(dir=file.parent, prefix=f".{file.name}.") as scratch:
        made = Path(scratch) / file.name
        mlflow.MlflowClient(f"sqlite:///{made}").search_experiments(max_results=1)
        made.replace(file)


def _database(uri: str) -> Path | None:
    return Path(uri.removeprefix("sqlite:///")) if uri.startswith("sqlite:///") else None


def _fault(error: BaseException) -> str:
    """What the store said; of a server that could not be asked, why, and what to do."""
    of_http = [
        one
        for one in machine.origins(error)
        if type(one).__module__.startswith(("requests.", "urllib3."))
    ]
    if of_http:
        why = str(of_http[-1]) if "too many" in str(of_http[-1]) else type(of_http[-1]).__name__
        return f"the server does not answer as it should ({why}); see that it runs, then run again to go on from here"
    return " ".join(str(error).split())[:_SUMMARY]


def _experiment(client: mlflow.MlflowClient, name: str) -> str:
    """The id of an experiment, which is made where there is none."""
    found = client.get_experiment_by_name(name)
    if found is None:
        uri = tracking_uri()
        file = _database(uri)
        root = None if uri.startswith("http") else os.environ.get("MLFLOW_DEFAULT_ARTIFACT_ROOT")
        if root is None and file is not None:
            root = (file.resolve().parent / "mlruns").as_uri()
        try:
            client.create_experiment(
                name, artifact_location=f"{root.rstrip('/')}/{_as_folder(name)}" if root else None
            )
        except MlflowException as error:  # another machine was faster
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
    return str(mlflow.set_experiment(name).experiment_id)


def _as_folder(name: str) -> str:
    """A name as that of a folder, which leads nowhere else."""
    return quote(re.sub(r"^\.+|[/\\]", "-", name))


def register(
    merged: Path,
    *,
    name: str,
    experiment: str,
    key: str,
    params: Mapping[str, Any],
    metrics: Mapping[str, float],
    inputs: Sequence[Input],
    artifacts: Path,
    tags: Mapping[str, str],
    shown: Sequence[str],
    scores: Mapping[str, float],
    data: str,
    tolerance: float,
    card: str,
) -> Registered:
    """Log a run and register the merged model; the version that this content key has already is returned as it is.

    The new version becomes the champion, or the challenger (`fmn.promotion.decide`).

    Args:
        merged: the merged model's folder.
        name: of the registered model.
        experiment: of the run.
        key: content key of the registration; a tag of run and version.
        params, metrics: of the run.
        inputs: the data sets that the model was made with and scored on.
        artifacts: a folder of files to keep with the run.
        tags: the lineage, of the run.
        shown: those of them that the version has too.
        scores: the score of each task; ``metrics["score"]`` is their mean.
        data: digest of the evaluation data.
        tolerance: how much less than the champion's a task's score may be, for the version to take its place.
        card: what the version's page says of it, in Markdown.

    Raises:
        UserError: the store refuses or cannot be reached.
    """
    with _client() as client:
        known = _find(client, name, key)
        if known is None:
            place = _experiment(client, experiment)
            _forget_runs(client, place, key)
            described = {**tags, KEY: key, MLFLOW_SOURCE_NAME: f"fmn {tags['fmn']}"}
            if commit := tags.get("git.commit"):
                described[MLFLOW_GIT_COMMIT] = commit.rstrip("+")
            with mlflow.start_run(run_name=f"{name} {key[:8]}", tags=described) as run:
                mlflow.log_params(dict(params))
                mlflow.log_artifacts(str(artifacts))
                client.log_inputs(run.info.run_id, [_input(one) for one in inputs])
                with tempfile.TemporaryDirectory() as scratch:
                    served = pack(merged, Path(scratch) / "merged")
                    logged = mlflow.pyfunc.log_model(
                        name="model",
                        python_model=str(Path(__file__).with_name("served.py")),
                        artifacts={"merged": str(served)},
                        signature=SIGNATURE,
                        pip_requirements=requirements(),
                    )
                mlflow.log_metrics(dict(metrics), model_id=logged.model_id)
            with redirect_stderr(StringIO()):  # MLflow says there what the caller says better
                stated = {item: tags[item] for item in shown if item in tags}
                stated |= {"score": f"{100 * metrics['score']:.2f} %"}
                stated |= {KEY: key, SCORES: json.dumps(dict(scores)), DATA: data}
                known = mlflow.register_model(logged.model_uri, name, tags=stated)
        standing = Standing(str(known.version), metrics["score"], scores, data)
        decision = _decide(client, known, standing, tolerance, card)
        new = REASON not in known.tags
        return Registered(
            name, str(known.version), str(known.run_id), redacted(tracking_uri()), new, *decision
        )


def _input(one: Input) -> DatasetInput:
    schema = json.dumps(
        {"mlflow_colspec": [{"name": name, "type": kind} for name, kind in one.columns.items()]}
    )
    profile = None if one.rows is None else json.dumps({"num_rows": one.rows})
    source = json.dumps(dict(one.origin))
    found = Dataset(one.task, one.digest[:DIGITS], one.origin["source"], source, schema, profile)
    return DatasetInput(found, [InputTag(MLFLOW_DATASET_CONTEXT, one.context)])


def _forget_runs(client: mlflow.MlflowClient, experiment: str, key: str) -> None:
    """Delete what registrations of this key left that were killed before there was a version."""
    for run in client.search_runs([experiment], f"tags.`{KEY}` = '{key}'"):
        for nested in client.search_runs(
            [experiment], f"tags.`{MLFLOW_PARENT_RUN_ID}` = '{run.info.run_id}'"
        ):
            client.delete_run(nested.info.run_id)
        client.delete_run(run.info.run_id)


def _find(client: mlflow.MlflowClient, name: str, key: str) -> ModelVersion | None:
    """The version of a registered model that carries a content key."""
    return next(
        iter(client.search_model_versions(f"name = '{name}' and tags.`{KEY}` = '{key}'")), None
    )


def _decide(
    client: mlflow.MlflowClient,
    version: ModelVersion,
    standing: Standing,
    tolerance: float,
    card: str,
) -> Decision:
    """The alias of a version, and why: as was decided before or, of a new version, as is decided now."""
    if stated := version.tags.get(REASON):
        alias, _, reason = stated.partition(": ")
        return Decision(alias, reason)
    name = version.name
    model = client.get_registered_model(name)
    history, holder = model.tags.get(HISTORY, ""), _holder(model, CHAMPION)
    if holder == standing.version:  # the process was killed before it could say so
        holder = promotion.before(history, holder, _versions(client, name))
    decision = promotion.decide(
        standing, _standing(client, name, holder) if holder else None, tolerance
    )
    client.set_registered_model_alias(name, decision.alias, standing.version)
    if decision.alias == CHAMPION:
        _record(client, name, history, standing.version, promotion.PROMOTED)
        if CHALLENGER in model.aliases:  # it lost against another
            client.delete_registered_model_alias(name, CHALLENGER)
    said = f"{decision.alias}: {decision.reason}"
    for item in (REASON, MLFLOW_RUN_NOTE):
        client.set_tag(str(version.run_id), item, said)
    client.update_model_version(
        name, standing.version, description=f"Registered as {said}\n\n{card}"
    )
    if not model.description:
        client.update_registered_model(
            name, "Models merged by fmn, one encoder and a head for each task in a version."
        )
    client.set_model_version_tag(
        name, standing.version, REASON, said
    )  # the last: until then it is decided anew
    return decision


def _standing(client: mlflow.MlflowClient, name: str, version: str) -> Standing | None:
    """What a version scored, as its tags say."""
    tags = client.get_model_version(name, version).tags
    scores = json.loads(tags.get(SCORES, "{}"))
    score = sum(scores.values()) / len(scores) if scores else 0.0
    return Standing(version, score, scores, tags.get(DATA, ""))


def _holder(model: RegisteredModel, alias: str) -> str | None:
    version = model.aliases.get(alias)
    return None if version is None else str(version)


def _versions(client: mlflow.MlflowClient, name: str) -> set[str]:
    return {str(one.version) for one in client.search_model_versions(f"name = '{name}'")}


def _record(client: mlflow.MlflowClient, name: str, history: str, version: str, how: str) -> None:
    when = datetime.now(UTC).strftime("%Y-%m-%dT%H:%MZ")
    client.set_registered_model_tag(name, HISTORY, promotion.add(history, version, how, when))


def roll_back(name: str, version: str | None) -> tuple[str | None, str]:
    """Give the champion's place back to the version that held it before, or to another; returns both, old and new.

    Raises:
        UserError: there is no such model or version, or none that held the place before.
    """
    with _client() as client:
        model = client.get_registered_model(name)
        holder = _holder(model, CHAMPION)
        history = model.tags.get(HISTORY, "")
        there = _versions(client, name)
        chosen = version or promotion.before(history, holder, there)
        if chosen is None:
            raise UserError(
                f"{name}: no version was the champion before; say which is to be: --to VERSION"
            )
        if chosen not in there:
            raise UserError(
                f"{name}: has no version {chosen}; it has {', '.join(sorted(there, key=int)) or 'none'}"
            )
        if chosen == holder:
            raise UserError(f"{name}: version {chosen} is the champion")
        client.set_registered_model_alias(name, CHAMPION, chosen)
        _record(client, name, history, chosen, promotion.RESTORED)
        if _holder(model, CHALLENGER) == chosen:
            client.delete_registered_model_alias(name, CHALLENGER)
        return holder, chosen


class Recorded(NamedTuple):
    """A registered version, the tags of its run, and where the files of its lineage were put."""

    uri: str
    tags: Mapping[str, str]
    folder: Path


def recorded(source: str, out: Path) -> Recorded:
    """Put what a registered version can be made from again, as it was recorded, into the folder ``out``.

    Raises:
        UserError: there is no such version, or none that fmn registered with its lineage.
    """
    if not _VERSION.fullmatch(source):
        raise UserError(
            f"{source}: not a registered version; write models:/NAME/VERSION or models:/NAME@ALIAS"
        )
    pinned = pin(source)
    with _client() as client:
        name, _, version = pinned.removeprefix("models:/").rpartition("/")
        found = client.get_model_version(name, version)
        if not found.run_id or not any(
            one.path == LINEAGE for one in client.list_artifacts(found.run_id)
        ):
            raise UserError(
                f"{pinned}: its run holds no lineage; fmn did not register it, or an older one did"
            )
        folder = mlflow.artifacts.download_artifacts(
            run_id=found.run_id, artifact_path=LINEAGE, dst_path=str(out)
        )
        return Recorded(pinned, dict(client.get_run(found.run_id).data.tags), Path(folder))


def tag(run: str, tags: Mapping[str, str]) -> None:
    """Set tags of a run."""
    with _client() as client:
        for item, value in tags.items():
            client.set_tag(run, item, value)


class Logged(NamedTuple):
    """What a run is to hold."""

    params: Mapping[str, Any]
    metrics: Mapping[str, float]


def log_comparison(
    whole: Logged,
    methods: Mapping[str, Logged],
    *,
    name: str,
    experiment: str,
    key: str,
    artifacts: Path,
    note: str,
) -> tuple[str, bool]:
    """Log a comparison: a run with its tables, and below it a run for each method.

    Args:
        whole: of the run above.
        methods: of the run of each method.
        name: of the comparison.
        experiment: of the runs.
        key: content key of the comparison; a tag of the run above. One that was logged is not logged again.
        artifacts: a folder of tables to keep with the run above.
        note: what its page says, in Markdown.

    Returns:
        the id of the run above, and whether it is new.

    Raises:
        UserError: the store refuses or cannot be reached.
    """
    with _client() as client:
        place = _experiment(client, experiment)
        known = client.search_runs(
            [place], f"tags.`{KEY}` = '{key}' and attributes.status = 'FINISHED'", max_results=1
        )
        if known:
            return str(known[0].info.run_id), False
        _forget_runs(client, place, key)
        tags = {KEY: key, MLFLOW_RUN_NOTE: note, MLFLOW_SOURCE_NAME: "fmn compare"}
        with mlflow.start_run(run_name=f"compare {name} {key[:8]}", tags=tags) as parent:
            mlflow.log_artifacts(str(artifacts), "tables")
            mlflow.log_params(dict(whole.params))
            mlflow.log_metrics(dict(whole.metrics))
            for method, one in methods.items():
                with mlflow.start_run(
                    run_name=method, nested=True, tags={MLFLOW_SOURCE_NAME: "fmn compare"}
                ):
                    mlflow.log_params(dict(one.params))
                    mlflow.log_metrics(dict(one.metrics))
        return str(parent.info.run_id), True


def log_trials(
    trials: Sequence[Mapping[str, float]],
    *,
    name: str,
    experiment: str,
    key: str,
    params: Mapping[str, Any],
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
        place = _experiment(client, experiment)
        known = client.search_runs([place], f"tags.`{KEY}` = '{key}'", max_results=1)
        if known:
            parent = known[0].info.run_id
        else:
            parent = client.create_run(
                place, run_name=f"{name} {key[:8]}", tags={KEY: key}
            ).info.run_id
            client.log_batch(
                parent, params=[Param(item, str(value)) for item, value in params.items()]
            )
        logged = int(client.get_run(parent).data.metrics.get("trials", 0))
        now = int(time.time() * 1000)
        for number, metrics in enumerate(trials[logged:], logged):
            # A kill between the two leaves a nested run twice rather than not at all.
            nested = client.create_run(
                place, run_name=f"trial {number}", tags={MLFLOW_PARENT_RUN_ID: parent}
            )
            client.log_batch(
                nested.info.run_id, [Metric(item, value, now, 0) for item, value in metrics.items()]
            )
            client.set_terminated(nested.info.run_id)
            best = max(trials[: number + 1], key=lambda trial: trial["score"])
            shown = {**best, "trials": number + 1}
            client.log_batch(
                parent, [Metric(item, value, now, number) for item, value in shown.items()]
            )
        client.set_terminated(parent)
        return str(parent)


def pack(merged: Path, out: Path) -> Path:
    """What the served model needs of a merged model: the encoder once, and a head and a configuration a task."""
    shutil.copytree(merged / "encoder", out / "encoder", copy_function=_link)
    texts = {}
    for task in sorted((merged / "tasks").iterdir()):
        texts[task.name] = len(tasks.task(task.name).text_columns)
        target = out / "tasks" / task.name
        target.mkdir(parents=True)
        _link(task / "config.json", target / "config.json")
        _link(max(task.glob("*.safetensors")), target / "head.safetensors")  # the last shard
    (out / "texts.json").write_text(json.dumps(texts))
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
