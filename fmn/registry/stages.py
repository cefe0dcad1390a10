"""The stages that end in MLflow, and what is known there of a registered version."""

import json
import re
import time
from collections.abc import Iterator, Mapping
from contextlib import redirect_stderr
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from pydantic import Field

from fmn.errors import UserError, redacted
from fmn.evaluate.files import Metrics
from fmn.merge.recipe import CARD, RECIPE, Recipe
from fmn.registry import lineage
from fmn.registry.lineage import Lineage, Part
from fmn.registry.promotion import Decision
from fmn.store import artifacts
from fmn.store.records import Record, Settings, parse_record
from fmn.store.stage import (
    Job,
    Outcome,
    check_intact,
    check_output,
    read_record,
    read_sidecar,
    run_stage,
    write_record,
)
from fmn.store.yaml_file import read_yaml, to_yaml

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import DatasetInput
    from mlflow.entities.model_registry import ModelVersion

    from fmn.experiments.stages import CompareSettings

REGISTER = 2
LOG_COMPARISON = 2
LINEAGE = "lineage/lineage.json"  # file of a run
SETTINGS = "params.yaml"


class RegistrySettings(Settings):
    name: str = Field(
        ..., pattern=r"^[A-Za-z0-9][A-Za-z0-9 ._-]*$", description="name of the registered model"
    )
    experiment: str = Field("fmn", description="MLflow experiment of the run")
    tolerance: float = Field(
        0.01,
        ge=0,
        le=1,
        description="how much less than the champion's a task's score may be for a version to take"
        " its place; the mean may not be less",
    )


class Registered(Record):
    """A registered version, the address of its store, and the alias that it got and why."""

    name: str
    version: str
    run: str
    store: str
    alias: str
    reason: str

    @classmethod
    def of(cls, version: "ModelVersion", decision: Decision) -> "Registered":
        """A version of the present store."""
        from fmn.registry import tracking

        return cls(
            name=version.name,
            version=str(version.version),
            run=str(version.run_id),
            store=redacted(tracking.tracking_uri()),
            **decision._asdict(),
        )


def register(
    model: Path,
    *,
    metrics: Path,
    settings: RegistrySettings,
    report: Path | None = None,
    card: Path | None = None,
    params: Path | None = None,
    out: Path | None = None,
) -> Outcome[Registered]:
    """Register a merged model in MLflow; it becomes the champion or the challenger.

    A model that is registered already, with these metrics, is not registered again.

    Args:
        model: the merged model's folder
        metrics: its metrics file, made by `fmn evaluate`
        settings: name, experiment, and when a version becomes the champion
        report: folder to keep with the version, made by `fmn report`
        card: model card to show and keep, made by `fmn report`; default: the model's own
        params: settings file that the model was made with; `fmn reproduce` follows it
        out: file that records name, version and run

    Raises:
        UserError: the metrics are not the model's, or the store refuses.
    """
    import mlflow

    from fmn.registry import tracking

    started = time.monotonic()
    if out is not None:
        check_output(out, [model, metrics, report, card, params], is_folder=False)
    merged = _read(model, metrics, params)
    card_text = _read_card(card, model)
    inputs = {"model": artifacts.digest_folder(model), "metrics": artifacts.digest_file(metrics)}
    described = settings.model_dump(exclude={"tolerance"})
    key = artifacts.content_key("register", REGISTER, described, inputs)
    with tracking.connection() as client:
        query = f"name = '{settings.name}' and tags.`{tracking.KEY}` = '{key}'"
        if versions := client.search_model_versions(query):
            version = versions[0]
        else:
            tags = {"profile": str(params), "made": model.resolve().name} if params else {}
            with tracking.new_run(client, settings.experiment, key, settings.name, tags) as run:
                mlflow.log_text(card_text, CARD)
                mlflow.log_metrics(_seconds(model, metrics, report))
                if report:
                    mlflow.log_artifacts(str(report), "report")
                version = _create_version(client, run.info.run_id, settings.name, key, merged)
        is_new = tracking.PROMOTION not in version.tags
        decision = tracking.promote(client, version, settings.tolerance, _shown(card_text))
    registered = Registered.of(version, decision)
    if out is not None:
        _record(out, registered, inputs)
    return Outcome("register", out or model, is_new, time.monotonic() - started, registered)


def _record(out: Path, registered: Registered, inputs: Mapping[str, str]) -> None:
    def write(job: Job) -> None:
        write_record(job.path, registered)

    # A version that was deleted in MLflow and registered anew has another run.
    settings = {"registered": registered}
    run_stage("register", REGISTER, out, write, reads=inputs, settings=settings, summary=str)


class _Merged(NamedTuple):
    """A merged model, its recipe, its metrics, and the settings that it was made with if known."""

    model: Path
    recipe: Recipe
    scores: Metrics
    settings: dict[str, Any] | None


def _read(model: Path, metrics: Path, params: Path | None = None) -> _Merged:
    """Read a merged model and its metrics, which must be of it and of all its tasks."""
    check_intact(model)
    recipe = read_record(model / RECIPE, Recipe, "merge with `fmn merge`")
    scores = read_record(metrics, Metrics, "make it with `fmn evaluate`")
    # The second digest is in files that the old kind of stages wrote.
    digests = (artifacts.digest_folder(model), artifacts.digest_file(model / RECIPE))
    is_complete = set(recipe.tasks) == set(scores.tasks) == set(scores.data)
    if scores.model not in digests or not is_complete:
        remedy = f"make them with `fmn evaluate {model}`"
        raise UserError(f"{metrics}: not the metrics of all tasks of {model}; {remedy}")
    settings = read_yaml(params) if params else {}
    if not isinstance(settings, Mapping):
        raise UserError(f"{params}: holds no settings; --params names the settings file")
    pinned = lineage.pin_settings(settings, recipe, scores) if params else None
    return _Merged(model, recipe, scores, pinned)


def _read_card(card: Path | None, model: Path) -> str:
    """The text of a model card; by default of the merged model's own, if it has one."""
    file = card or model / CARD
    if card and not card.is_file():
        raise UserError(f"{card}: no such model card; `fmn report` makes it")
    return file.read_text() if file.is_file() else ""


def _create_version(
    client: "MlflowClient", run_id: str, name: str, key: str, merged: _Merged
) -> "ModelVersion":
    """Log a merged model and everything known of it with the current run, and register it."""
    import mlflow

    from fmn.registry import tracking

    model, recipe, scores, settings = merged
    parts = lineage.describe(model, recipe, scores)
    record = Lineage(parts=parts, threads=lineage.threads(recipe), settings=settings)
    mlflow.log_text(record.model_dump_json(indent=1), LINEAGE)
    mlflow.log_artifact(str(model / RECIPE), "lineage")
    mlflow.log_text(scores.model_dump_json(indent=1), "lineage/metrics.json")
    mlflow.log_params(_params(recipe, settings or {}))
    if settings is not None:
        mlflow.log_text(to_yaml(settings), f"lineage/{SETTINGS}")
    tags = {"tasks": ", ".join(recipe.tasks), "fmn": recipe.fmn}
    tags |= {part.name.replace(" ", "."): part.digest for part in parts}
    here = {"git.commit": lineage.git_commit(), "dvc.lock": lineage.dvc_lock()}
    mlflow.set_tags(tags | {tag: value for tag, value in here.items() if value})
    client.log_inputs(run_id, list(_inputs(parts)))
    logged = tracking.log_served_model(model)
    mlflow.log_metrics(_metrics(scores), model_id=logged.model_id)
    version_tags = {
        "tasks": tags["tasks"],
        "score": f"{100 * scores.score:.2f} %",
        tracking.KEY: key,
        tracking.SCORES: json.dumps({task: entry.score for task, entry in scores.tasks.items()}),
        tracking.DATA: lineage.evaluation_data(scores),
    }
    with redirect_stderr(StringIO()):  # the caller says better what MLflow says there
        return mlflow.register_model(logged.model_uri, name, tags=version_tags)


def _params(recipe: Recipe, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Parameters of the run: the merge's, from the recipe, and those of the stages before it."""
    fields = {"method", "mapping", "normalise", "exponent", "damping", "scale", "density", "seed"}
    params = recipe.model_dump(include=fields) | {"coefficient": recipe.coefficients}
    in_tags = {"work", "base", "experts", "sources", "merge", "registry"}
    return _flat({**params, **{key: settings[key] for key in settings.keys() - in_tags}})


def _flat(content: Mapping[str, Any]) -> dict[str, Any]:
    """Nested settings with dotted names: ``{"fisher": {"seed": 0}}`` is ``{"fisher.seed": 0}``."""
    from pandas import json_normalize

    columns = json_normalize(dict(content)).to_dict("list").items()
    return {str(name): values[0] for name, values in columns if values[0] is not None}


def _metrics(metrics: Metrics) -> dict[str, float]:
    """Metrics by ``TASK.NAME``, with their 95 % intervals as ``.low`` and ``.high``."""
    values, intervals = {"score": metrics.score}, {"score": metrics.interval}
    for task, entry in metrics.tasks.items():
        scores = entry.model_dump(exclude={"interval"})
        values |= {f"{task}.{name}": value for name, value in scores.items()}
        intervals |= {f"{task}.{name}": ends for name, ends in entry.interval.items()}
    for name, (low, high) in intervals.items():
        values |= {f"{name}.low": low, f"{name}.high": high}
    return values


def _seconds(*outputs: Path | None) -> dict[str, float]:
    """The run time of the stages that wrote these outputs, by ``seconds/STAGE NAME``."""
    sidecars = {path.stem: read_sidecar(path) for path in outputs if path}
    return {f"seconds/{it.stage} {name}": it.seconds for name, it in sidecars.items() if it}


def _inputs(parts: list[Part]) -> Iterator["DatasetInput"]:
    """The data sets that a model was made from and scored on, as MLflow shows them."""
    from mlflow.entities import Dataset, DatasetInput, InputTag
    from mlflow.utils.mlflow_tags import MLFLOW_DATASET_CONTEXT

    for part in parts:
        if part.name.startswith("data "):
            _, task, split = part.name.split(" ")
            source = json.dumps({"source": part.origin, "split": split})
            digest = part.digest[:32]  # MLflow keeps 36 digits
            dataset = Dataset(task, digest, part.origin.split(" ")[0], source)
            context = "training" if split == "train" else "validation"
            yield DatasetInput(dataset, [InputTag(MLFLOW_DATASET_CONTEXT, context)])


def _shown(markdown: str) -> str:
    """Markdown without front matter, and with room between columns, which MLflow sets close."""
    text = re.sub(r"\A---\n.*?\n---\n", "", markdown, flags=re.DOTALL).strip()
    return re.sub(r"(?m)(?<=\S) \|(?=.*\|$)", "&emsp;|", text).replace("---&emsp;", "---")


class ChampionChange(Record):
    """The versions that were the champion before a rollback and after it."""

    name: str
    before: str | None
    champion: str


def roll_back(name: str, *, to: str | None = None) -> ChampionChange:
    """Give the alias champion back to the version of a registered model that held it before.

    Args:
        name: of the registered model
        to: the version that is to be the champion instead

    Raises:
        UserError: there is no such model or version, or no champion before.
    """
    from fmn.registry import tracking

    before, champion = tracking.roll_back(name, to)
    return ChampionChange(name=name, before=before, champion=champion)


def record_dvc_lock(run: str) -> None:
    """Tag a registration's run with the digest of the dvc.lock that was written after it."""
    from fmn.registry import tracking

    if digest := lineage.dvc_lock():
        with tracking.connection() as client:
            client.set_tag(run, "dvc.lock", digest)


@dataclass(frozen=True)
class Version:
    """A registered version, as ``models:/NAME/VERSION``, the tags of its run, and its lineage.

    The tag ``made`` is the name of the merged model in the work folder of its settings.
    """

    uri: str
    tags: Mapping[str, str]
    lineage: Lineage

    @property
    def table(self) -> list[list[str]]:
        """The lineage in rows: what, from where or how, digest."""
        rows = [[part.name, part.origin, part.digest] for part in self.lineage.parts]
        names = {"settings": "profile", "fmn": "fmn"}
        rows += [[name, self.tags.get(tag, "not recorded"), ""] for name, tag in names.items()]
        return rows + [[name, "", self.tags.get(name, "")] for name in ("git.commit", "dvc.lock")]


def read_lineage(source: str) -> Version:
    """A registered version, by number or alias, and what it was made from.

    Raises:
        UserError: there is no such version, or fmn did not register it.
    """
    import mlflow

    from fmn.registry import tracking

    if not re.fullmatch(r"models:/[^/@]+(/[0-9]+|@[^/@]+)", source):
        forms = "models:/NAME/VERSION or models:/NAME@ALIAS"
        raise UserError(f"{source}: not a registered version; write {forms}")
    uri = tracking.pin(source)
    with tracking.connection() as client:
        run_id = client.get_model_version(*uri.removeprefix("models:/").split("/")).run_id
        files = client.list_artifacts(run_id, str(Path(LINEAGE).parent)) if run_id else []
        if not run_id or LINEAGE not in [file.path for file in files]:
            reason = "fmn did not register it, or an older one did"
            raise UserError(f"{uri}: its run holds no lineage; {reason}")
        content = mlflow.artifacts.load_dict(f"runs:/{run_id}/{LINEAGE}")
        tags = dict(client.get_run(run_id).data.tags)
    return Version(uri, tags, parse_record(content, Lineage, uri, "register the model again"))


def settings_again(version: Version, out: Path) -> Path:
    """Write the settings that make a version's model again, in the folder ``out/work``.

    Returns:
        the settings file, ``out/params.yaml``.

    Raises:
        UserError: the version was registered without them.
    """
    settings = version.lineage.settings
    if settings is None:
        remedy = "`fmn register --params FILE` records them"
        raise UserError(f"{version.uri}: registered without its settings; {remedy}")
    with artifacts.atomic_file(out / SETTINGS) as partial:
        partial.write_text(to_yaml({**settings, "work": str((out / "work").resolve())}))
    return out / SETTINGS


def compare_digests(version: Version, model: Path, metrics: Path) -> list[tuple[str, str, str]]:
    """A model that was made again beside the version: (what, digest recorded, digest now)."""
    recorded = {part.name: part.digest for part in version.lineage.parts}
    parts = lineage.describe(*_read(model, metrics)[:3])
    now = {part.name: part.digest for part in parts}
    names = dict.fromkeys([*recorded, *now])
    return [(name, recorded.get(name, ""), now.get(name, "")) for name in names]


class ComparisonResults(Record):
    """What is read of a comparison's ``results.json``: means by method and kind of set."""

    methods: dict[str, dict[str, float]]


class LoggedComparison(Record):
    """The run of a comparison, and the address of its store."""

    run: str
    store: str


def log_comparison(
    tables: Path, *, title: str, comparing: "CompareSettings", settings: RegistrySettings
) -> Outcome[LoggedComparison]:
    """Log the tables of a comparison in MLflow: a run, and in it a run for each method.

    Raises:
        UserError: the tables are not those that were written, or the store refuses.
    """
    import mlflow

    from fmn.registry import tracking

    started = time.monotonic()
    check_intact(tables)
    sidecar = read_sidecar(tables)
    if sidecar is None or sidecar.stage != "comparison":
        raise UserError(f"{tables}: not the tables of a comparison; make them with `fmn compare`")
    results = read_record(tables / "results.json", ComparisonResults)
    described = {"title": title, "experiment": settings.experiment, "tables": sidecar.key}
    key = artifacts.content_key("log-comparison", LOG_COMPARISON, described, {})
    tags = {"mlflow.note.content": _shown((tables / "table.md").read_text())}
    with tracking.connection() as client:
        query = f"tags.`{tracking.KEY}` = '{key}' and attributes.status = 'FINISHED'"
        experiments = [tracking.experiment_id(client, settings.experiment)]
        if runs := client.search_runs(experiments, query):
            run = runs[0]
        else:
            name = f"compare {title}"
            with tracking.new_run(client, settings.experiment, key, name, tags) as run:
                mlflow.log_artifacts(str(tables), "tables")
                mlflow.log_params(comparing.model_dump(mode="json", exclude={"methods", "device"}))
                for method, means in results.methods.items():
                    with mlflow.start_run(run_name=method, nested=True):
                        mlflow.log_params(_flat(comparing.methods[method].model_dump(mode="json")))
                        mlflow.log_metrics(means)
    record = LoggedComparison(run=run.info.run_id, store=redacted(tracking.tracking_uri()))
    return Outcome("log", tables, not runs, time.monotonic() - started, record)
