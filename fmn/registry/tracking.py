"""MLflow: its store, runs, registered versions and their aliases.

The store is what MLflow's own variables name (``MLFLOW_TRACKING_URI``, ``MLFLOW_REGISTRY_URI``),
otherwise ``mlflow.db`` (SQLite) and the folder ``mlruns`` in the working folder. If the store is a
database, ``MLFLOW_DEFAULT_ARTIFACT_ROOT`` says where files go; a server knows that itself.
"""

import io
import json
import logging
import os
import re
import shutil
import sqlite3
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager, redirect_stderr
from importlib.metadata import version as installed_version
from pathlib import Path
from textwrap import shorten
from typing import TYPE_CHECKING

from fmn.errors import UserError, causes, redacted, refuse_taken_port, system_errors_explained
from fmn.models.checkpoints import CONFIG, SMALL_FILES, TOKENIZER_FILES
from fmn.registry import promotion
from fmn.registry.check import Serve, as_base64, generated_images
from fmn.registry.promotion import CHALLENGER, CHAMPION, Decision, Standing
from fmn.registry.version import EXAMPLE, takes
from fmn.store import artifacts
from fmn.tasks.kinds import GENERATORS
from fmn.tasks.task import Task, write_task
from fmn.terminal import say

# MLflow reads these when it is imported. It retries a request that fails: here for half a minute
# instead of four; without any answer, for three minutes in all instead of twenty.
os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "4")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "30")
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("DO_NOT_TRACK", "true")
os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")

import mlflow
from mlflow.entities.model_registry import ModelVersion, RegisteredModel
from mlflow.exceptions import MlflowException
from mlflow.models import ModelSignature
from mlflow.models.model import ModelInfo
from mlflow.types import ColSpec, ParamSchema, ParamSpec, Schema
from mlflow.types.schema import AnyType, Array, Map, Object, Property
from mlflow.utils.mlflow_tags import MLFLOW_PARENT_RUN_ID, MLFLOW_RUN_NOTE
from sqlalchemy.exc import SQLAlchemyError

if TYPE_CHECKING:
    import pandas as pd

for name in ("mlflow", "alembic"):
    logging.getLogger(name).setLevel(logging.WARNING)

DEFAULT_STORE = "sqlite:///mlflow.db"
_SET_ADDRESS = "set MLFLOW_TRACKING_URI to that of your registry, such as sqlite:///mlflow.db"
# Tags of a run: content key; score by task, tasks whose score is an error, digest of the data; the
# alias that its version got, and why.
KEY = "fmn.key"
SCORES, ERRORS, DATA = "fmn.scores", "fmn.errors", "fmn.data"
PROMOTION = "promotion"
DECISION = "decision"  # tag of a version: its alias
HISTORY = "champion.history"  # tag of a registered model
ABOUT_MODEL = (
    "Merged models of fmn: each version answers several tasks. The alias `champion` is the version"
    " to serve, `models:/NAME@champion`; `challenger` is the last one that did not take its place."
    " `fmn rollback NAME` gives the alias back to the champion before."
)
ABOUT_EXPERIMENT = (
    "Runs of fmn. A run that registered a version has its scores (`score/`), what they keep of the"
    " experts' (`retained/`), the baselines (`expert/`, `average/`, `base/`), the seconds of each"
    " stage (`time/`), and among its artifacts the report, the model card and the lineage. A search"
    " or a comparison has a run for each trial or method below it."
)
# Columns of the served model (see `served.py`). What it takes is of any type: of strings, MLflow
# would make the text "None" of a null, and refuse a list of two texts.
_ANY = AnyType()  # type: ignore[no-untyped-call]
INPUTS = ("text", "text_pair", "task")
INPUTS_OF_KIND = {"token-classification": "words", "image-classification": "image"}
_SPAN = {"entity": "string", "text": "string", "start": "long", "end": "long", "score": "double"}
OUTPUTS: dict[str, str | Array | Map] = {
    "label": "string",
    "labels": Array("string"),
    "score": "double",
    "probabilities": Map("double"),
}
OUTPUTS_OF_KIND: dict[str, dict[str, str | Array | Map]] = {
    "token-classification": {
        "labels": Array("string"),
        "spans": Array(Object([Property(name, kind) for name, kind in _SPAN.items()])),
    },
    "sentence-similarity": {"score": "double", "embedding": Array("double")},
    "text-generation": {"text": "string"},
    "text2text-generation": {"text": "string"},
}
"""The outputs of kinds whose outputs differ from `OUTPUTS`."""
IF_ASKED = {"task": "string", "row": "long"}
PROCESSOR_FILES = (*TOKENIZER_FILES, "chat_template.jinja", "preprocessor_config.json")
REQUIREMENTS = ("mlflow", "torch", "transformers", "safetensors", "pandas", "numpy")


def tracking_uri() -> str:
    """The address of the store."""
    return os.environ.get("MLFLOW_TRACKING_URI") or DEFAULT_STORE


def page(port: int) -> str:
    """The address of the registry's page: on MLflow's server, or on a local one at `port`.

    A local store is created here, so that a server and a run do not create it at the same time.
    """
    uri = tracking_uri()
    if uri.startswith("http"):
        return f"{redacted(uri).rstrip('/')}/#/models"
    with connection():
        return f"http://127.0.0.1:{port}/#/models"


def serve_pages(port: int) -> None:
    """Print the address of the registry's page; for a local store, become MLflow's server of it.

    Raises:
        UserError: another program listens at the port.
    """
    uri = tracking_uri()
    is_served = uri.startswith("http")
    if not is_served:
        refuse_taken_port(port, "--port")
    say(page(port))
    if is_served:
        return
    os.environ["MLFLOW_SERVER_ENABLE_JOB_EXECUTION"] = "false"
    os.environ["MLFLOW_BACKEND_STORE_URI"] = uri
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port)]
    os.execv(sys.executable, [*command, "--workers", "1"])  # noqa: S606  # nosec B606


@contextmanager
def connection(creates: bool = True) -> Iterator[mlflow.MlflowClient]:
    """A client of the store, under a lock that all processes of this user and machine share.

    The first one creates the tables; and who becomes the champion depends on who is.

    Args:
        creates: whether a database that is not there is created; what only reads needs none.

    Raises:
        UserError: the store refuses, or cannot be reached.
    """
    uri = tracking_uri()
    file = _database_file()
    if "://" not in uri and uri != "databricks":
        raise UserError(f"MLflow at {uri}: not the address of a store; {_SET_ADDRESS}")
    if file and not creates and not file.exists():
        raise UserError(f"MLflow at {uri}: there is no such database; {_SET_ADDRESS}")
    mlflow.set_tracking_uri(uri)
    lock = artifacts.locked(file or Path("/") / artifacts.digest_bytes(uri.encode()))
    with system_errors_explained(file), lock, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            if file and not file.exists():
                _create_database(file)
            if file:
                _follow_move(file)
            yield mlflow.MlflowClient()
        except (MlflowException, SQLAlchemyError, OSError) as error:
            if isinstance(error, OSError) and error.errno is not None:
                raise  # of the machine, not of a request
            raise UserError(f"MLflow at {uri}: {_reason(error)}") from error


def _database_file() -> Path | None:
    scheme, _, path = tracking_uri().partition("sqlite:///")
    return Path(path) if path and not scheme else None


def _create_database(file: Path) -> None:
    """Create all of MLflow's tables or none: MLflow never completes a database with some."""
    file.parent.mkdir(parents=True, exist_ok=True)
    # A new name each time: MLflow keeps a file open under its name even if it failed to fill it.
    with tempfile.TemporaryDirectory(dir=file.parent, prefix=f".{file.name}.") as scratch:
        database = Path(scratch) / file.name
        mlflow.MlflowClient(f"sqlite:///{database}").search_experiments(max_results=1)
        database.replace(file)


# Columns with addresses of files, for each table of MLflow's database.
ADDRESSES = {
    "experiments": ["artifact_location"],
    "runs": ["artifact_uri"],
    "logged_models": ["artifact_location"],
    "model_versions": ["source", "storage_location"],
}


def _follow_move(file: Path) -> None:
    """Correct the addresses of files after a database and its folder ``mlruns`` were moved.

    MLflow's addresses are absolute. An address in another folder ``mlruns`` is rewritten if the
    experiment's folder is beside the database.
    """
    root = file.resolve().parent / "mlruns"
    if os.environ.get("MLFLOW_DEFAULT_ARTIFACT_ROOT") or not root.is_dir():
        return
    with closing(sqlite3.connect(file)) as database, database:
        rows = database.execute("SELECT artifact_location FROM experiments")
        for old, _, name in {str(location).rpartition("/") for (location,) in rows}:
            is_moved = old.startswith("file:") and old.endswith("/mlruns") and old != root.as_uri()
            if is_moved and (root / name).is_dir():
                start, new = f"{old}/{name}", f"{root.as_uri()}/{name}"
                for table, columns in ADDRESSES.items():
                    for column in columns:
                        database.execute(
                            f"UPDATE {table} SET {column} = ? || substr({column}, ?)"  # noqa: S608
                            f" WHERE {column} = ? OR {column} LIKE ? || '/%'",
                            (new, len(start) + 1, start, start),
                        )


def _reason(error: BaseException) -> str:
    """One line on what MLflow said or, if its server did not answer, why and what to do."""
    modules = ("requests.", "urllib3.")
    network = [cause for cause in causes(error) if type(cause).__module__.startswith(modules)]
    if not network:
        reason = str(getattr(error, "orig", error)).partition(" See https://")[0].rstrip(". ")
        remedy = ""
        if "not found" in reason:
            remedy = "; check the name, or set MLFLOW_TRACKING_URI"
        elif isinstance(error, SQLAlchemyError) or "unsupported URI" in reason:
            remedy = f"; {_SET_ADDRESS}"
        return f"{shorten(reason, 300, placeholder=' ...')}{remedy}"
    last = network[-1]
    reason = str(last) if "too many" in str(last) else type(last).__name__
    remedy = "see that it runs at MLFLOW_TRACKING_URI, then run again to go on from here"
    return f"the server does not answer as it should ({reason}); {remedy}"


def experiment_id(client: mlflow.MlflowClient, experiment: str) -> str:
    """The id of an experiment, created if it does not exist; it becomes MLflow's current one."""
    root = os.environ.get("MLFLOW_DEFAULT_ARTIFACT_ROOT")
    if file := _database_file():
        root = root or (file.resolve().parent / "mlruns").as_uri()
    is_server = tracking_uri().startswith("http")
    if root and not is_server and client.get_experiment_by_name(experiment) is None:
        folder = re.sub(r"^\.+|[^\w.-]+", "-", experiment)  # a name that is not a path
        client.create_experiment(experiment, artifact_location=f"{root.rstrip('/')}/{folder}")
    entity = mlflow.set_experiment(experiment)
    if MLFLOW_RUN_NOTE not in entity.tags:  # experiments have the same tag
        client.set_experiment_tag(entity.experiment_id, MLFLOW_RUN_NOTE, ABOUT_EXPERIMENT)
    return str(entity.experiment_id)


@contextmanager
def new_run(
    client: mlflow.MlflowClient, experiment: str, key: str, name: str
) -> Iterator[mlflow.ActiveRun]:
    """Start a run with a content key; runs with this key that were interrupted are deleted."""
    experiments = [experiment_id(client, experiment)]
    for run in client.search_runs(experiments, f"tags.`{KEY}` = '{key}'"):
        nested = f"tags.`{MLFLOW_PARENT_RUN_ID}` = '{run.info.run_id}'"
        for left in [*client.search_runs(experiments, nested), run]:
            client.delete_run(left.info.run_id)
    with mlflow.start_run(run_name=f"{name} {key[:8]}", tags={KEY: key}) as run:
        yield run


# ---------------------------------------------------------------------------------------------
# Registered versions


def pin(source: str) -> str:
    """A source in the registry as ``models:/NAME/VERSION``.

    ``models:/NAME@ALIAS``, ``models:/NAME/latest`` and ``models:/NAME/Production`` float: they name
    another version tomorrow.

    Raises:
        UserError: there is no such version.
    """
    if not re.fullmatch(r"models:/[^/@]+(/[^/@]+|@[^/@]+)", source):
        remedy = "write models:/NAME/VERSION or models:/NAME@ALIAS"
        raise UserError(f"{source}: not a registered version; {remedy}")
    path, _, alias = source.removeprefix("models:/").partition("@")
    name, _, wanted = path.partition("/")
    if wanted.isdecimal():
        return source
    with connection(creates=False) as client:
        if alias:
            return f"models:/{name}/{client.get_model_version_by_alias(name, alias).version}"
        is_latest = wanted.lower() == "latest"
        versions = client.get_latest_versions(name, None if is_latest else [wanted])
    if not versions:
        raise UserError(f"{source}: the registry has no such version of {name}; name another")
    return f"models:/{name}/{max(int(version.version) for version in versions)}"


def download(source: str, out: Path) -> str:
    """Put a registered version's files into a folder; returns its pinned source."""
    pinned = pin(source)
    with connection(creates=False) as client:
        client.get_model_version(*pinned.removeprefix("models:/").split("/"))  # or it says so soon
        mlflow.artifacts.download_artifacts(artifact_uri=pinned, dst_path=str(out))
    return pinned


def log_served_model(model: Path, definitions: Mapping[str, Task]) -> ModelInfo:
    """Log a merged model with the current run, for `served.py` to serve."""
    name, task = next(iter(definitions.items()))
    requirements = [*REQUIREMENTS]
    if any(task.task == "image-classification" for task in definitions.values()):
        requirements.append("pillow")
    # Without local labels (``+cpu``), which no index has.
    versions = {package: installed_version(package).split("+")[0] for package in requirements}
    with tempfile.TemporaryDirectory() as scratch:
        pack(model, definitions, Path(scratch) / "merged")
        logged: ModelInfo = mlflow.pyfunc.log_model(
            name="model",
            python_model=str(Path(__file__).with_name("served.py")),
            artifacts={"merged": f"{scratch}/merged"},
            signature=signature(definitions),
            input_example=(_example(task), {"task": name}),
            pip_requirements=[f"{package}=={number}" for package, number in versions.items()],
        )
    return logged


def signature(definitions: Mapping[str, Task]) -> ModelSignature:
    """The inputs, outputs and parameters of a served model of these tasks."""
    kinds = {task.task for task in definitions.values()}
    columns = [*INPUTS, *(column for kind, column in INPUTS_OF_KIND.items() if kind in kinds)]
    needs_text = columns == [*INPUTS]
    inputs = [ColSpec(_ANY, name, required=needs_text and name == "text") for name in columns]
    known = [OUTPUTS_OF_KIND.get(kind, OUTPUTS) for kind in sorted(kinds)]
    in_all = [name for name in known[0] if all(name in outputs for outputs in known)]
    types = {name: kind for outputs in known for name, kind in outputs.items()}
    outputs = [
        ColSpec(kind, name, required=name in in_all and known[0] is OUTPUTS)
        for name, kind in types.items()
    ]
    outputs += [ColSpec(kind, name, required=False) for name, kind in IF_ASKED.items()]
    parameters = [ParamSpec("task", "string", "")]
    if not kinds.isdisjoint(GENERATORS):
        parameters.append(ParamSpec("max_new_tokens", "long", 0))
    return ModelSignature(Schema([*inputs]), Schema([*outputs]), ParamSchema(parameters))


def _example(task: Task) -> "pd.DataFrame":
    """An example of a task's input."""
    import pandas as pd

    columns = takes(task)
    if columns == ["image"]:
        return pd.DataFrame({"image": [as_base64(generated_images()[0])]})
    return pd.DataFrame([dict(zip(["text", *columns[1:]], EXAMPLE, strict=False))])


def create_version(uri: str, name: str, tags: Mapping[str, str]) -> ModelVersion:
    """Register a logged model as a new version."""
    with redirect_stderr(io.StringIO()):  # the caller reports the version
        return mlflow.register_model(uri, name, tags=dict(tags))


def load_served_model(uri: str) -> Serve:
    """Load a logged model as MLflow serves it."""
    served = mlflow.pyfunc.load_model(uri)
    return lambda table, task, **params: served.predict(table, params={"task": task, **params})


def pack(model: Path, definitions: Mapping[str, Task], out: Path) -> None:
    """Copy the files that `served.py` needs of a merged model into a folder, equal files once."""
    shutil.copytree(model / "encoder", out / "encoder")
    folders = {_processor(out / "encoder"): "encoder"}  # by digest of tokenizer or image processor
    weights = {artifacts.digest_file(file) for file in (model / "encoder").glob("*.safetensors")}
    processors = {}
    for name, definition in definitions.items():
        task, folder = model / "tasks" / name, out / "tasks" / name
        folder.mkdir(parents=True)
        write_task(folder, definition)
        for file in [CONFIG, *SMALL_FILES]:
            if (task / file).is_file() and file not in PROCESSOR_FILES:
                (folder / file).parent.mkdir(exist_ok=True)
                shutil.copyfile(task / file, folder / file)
        # A head is in the last shard. The other shards are the encoder's.
        last = max(task.glob("*.safetensors"))
        if artifacts.digest_file(last) not in weights:
            shutil.copyfile(last, folder / "head.safetensors")
        digest = _processor(task)
        if digest not in folders:
            folders[digest] = f"tasks/{name}"
            for path in _processor_files(task):
                shutil.copyfile(path, folder / path.name)
        processors[name] = folders[digest]
    (out / "processors.json").write_text(json.dumps(processors))


def _processor_files(folder: Path) -> list[Path]:
    return [folder / name for name in PROCESSOR_FILES if (folder / name).is_file()]


def _processor(folder: Path) -> str:
    """The digest of the files of the tokenizer or image processor in a folder."""
    digests = {file.name: artifacts.digest_file(file) for file in _processor_files(folder)}
    return artifacts.digest_bytes(artifacts.canonical(digests))


def find_version(
    client: mlflow.MlflowClient, experiment: str, key: str, name: str
) -> ModelVersion | None:
    """The registered version whose run has this content key, if there is one."""
    entity = client.get_experiment_by_name(experiment)
    runs = client.search_runs([entity.experiment_id], f"tags.`{KEY}` = '{key}'") if entity else []
    for run in runs:
        query = f"name = '{name}' and run_id = '{run.info.run_id}'"
        for version in client.search_model_versions(query):
            return version
    return None


def promote(
    client: mlflow.MlflowClient,
    version: ModelVersion,
    tolerance: float,
    describe: Callable[[Decision, Standing | None], str],
) -> tuple[Decision, Standing | None]:
    """Make a version champion or challenger, and record the reason.

    A version that has an alias already keeps it.

    Args:
        client: a client of the store.
        version: the version.
        tolerance: see `promotion.decide`.
        describe: writes the version's page from the decision and the previous champion.

    Returns:
        The decision, and the champion that a new version was compared with, if any.
    """
    run = client.get_run(str(version.run_id))
    if DECISION in version.tags:
        alias, _, reason = run.data.tags.get(PROMOTION, version.tags[DECISION]).partition(": ")
        return Decision(alias, reason), None
    name, number = version.name, str(version.version)
    model = client.get_registered_model(name)
    champion, before = champions(client, model)
    if champion == number:  # the process was killed before it recorded the decision
        champion = before
    standing = None
    if champion:
        standing = _standing(client, client.get_model_version(name, champion))
    decision = promotion.decide(_standing(client, version), standing, tolerance)
    if decision.reason.startswith(promotion.NOT_COMPARABLE):
        standing = None
    if decision.alias == CHAMPION:
        make_champion(client, model, number)
    else:
        client.set_registered_model_alias(name, CHALLENGER, number)
    text = f"{decision.alias}: {decision.reason}"
    client.set_tag(run.info.run_id, PROMOTION, text)
    client.set_tag(run.info.run_id, MLFLOW_RUN_NOTE, text)
    client.update_model_version(name, number, describe(decision, standing))
    if not model.description:
        client.update_registered_model(name, ABOUT_MODEL)
    # Set last: a killed process makes the decision again.
    client.set_model_version_tag(name, number, DECISION, decision.alias)
    return decision, standing


def _standing(client: mlflow.MlflowClient, version: ModelVersion) -> Standing:
    """A version's scores and data, from the tags of its run."""
    tags = client.get_run(version.run_id).data.tags if version.run_id else {}
    scores, errors = (json.loads(tags.get(tag, "{}")) for tag in (SCORES, ERRORS))
    return Standing(str(version.version), scores, frozenset(errors), tags.get(DATA, ""))


def champions(client: mlflow.MlflowClient, model: RegisteredModel) -> tuple[str | None, str | None]:
    """The champion, and the latest champion before it that still exists."""
    versions = client.search_model_versions(f"name = '{model.name}'")
    existing = {str(version.version) for version in versions}
    champion = str(model.aliases[CHAMPION]) if CHAMPION in model.aliases else None
    return champion, promotion.previous_champion(model.tags.get(HISTORY, ""), champion, existing)


def make_champion(client: mlflow.MlflowClient, model: RegisteredModel, version: str) -> None:
    """Give a version the alias champion, and record it in the registered model's history."""
    client.set_registered_model_alias(model.name, CHAMPION, version)
    history = promotion.add_champion(model.tags.get(HISTORY, ""), version)
    client.set_registered_model_tag(model.name, HISTORY, history)
    if CHALLENGER in model.aliases:  # the challenger was compared with another champion
        client.delete_registered_model_alias(model.name, CHALLENGER)
