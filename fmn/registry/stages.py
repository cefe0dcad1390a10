"""The stages that write to MLflow, and functions that read a registered version from it."""

import json
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field

from fmn.errors import UserError, redacted
from fmn.evaluate.files import Metrics, read_metrics
from fmn.evaluate.metrics import higher_is_better
from fmn.experiments.files import SearchResult, Trial
from fmn.experiments.stages import CompareSettings, SearchSettings
from fmn.merge.recipe import CARD, RECIPE, Recipe, read_recipe
from fmn.registry import lineage
from fmn.registry.check import alone, check_served
from fmn.registry.lineage import Lineage
from fmn.registry.promotion import Decision, Standing
from fmn.registry.version import (
    Baselines,
    grouped_metrics,
    page,
    read_baselines,
    spaced,
    version_tags,
)
from fmn.report.stages import ReportInfo
from fmn.report.wording import points, shown
from fmn.store import artifacts, stage
from fmn.store.records import Record, Settings, parse_record
from fmn.store.stage import NotCurrentError, Outcome, only_current
from fmn.store.yaml_file import read_yaml, to_yaml
from fmn.tasks.task import Task

if TYPE_CHECKING:
    from mlflow.entities.model_registry import ModelVersion

REGISTER = 4
LOG = 4
LINEAGE = "lineage/lineage.json"  # file of a run
SETTINGS = "params.yaml"
# In a report's page, in place of which its copy says what became of the model.
REGISTRATION = re.compile(r'<p id="registration">.*?</p>')


class RegistrySettings(Settings):
    name: str = Field(
        ..., pattern=r"^[A-Za-z0-9][A-Za-z0-9 ._-]*$", description="name of the registered model"
    )
    experiment: str = Field("fmn", min_length=1, description="MLflow experiment of the run")
    tolerance: float = Field(
        0.01,
        ge=0,
        le=1,
        description="how much less than the champion's a task's score may be for a version to take"
        " its place; the mean may not be less",
    )


class Registered(Record):
    """A registered version, the address of its store, its alias, and the reason for the alias."""

    name: str
    version: str
    run: str
    store: str
    alias: str
    reason: str


def register(
    model: Path,
    *,
    metrics: Path,
    settings: RegistrySettings,
    data: Path | None = None,
    report: Path | None = None,
    card: Path | None = None,
    params: Path | None = None,
    out: Path | None = None,
) -> Outcome[Registered]:
    """Register a merged model in MLflow; it becomes the champion or the challenger.

    Before that, MLflow serves the model in a process of its own: it must answer a sample of texts
    as in its evaluation. A model that is already registered with these metrics is not registered
    again.

    Args:
        model: the merged model's folder
        metrics: its metrics file, made by `fmn evaluate`
        settings: name, experiment, and when a version becomes the champion
        data: folder of the evaluated rows, for that sample; default: a few built-in sentences
        report: folder to keep with the version, made by `fmn report`
        card: model card to show and keep, made by `fmn report`; default: the model's own
        params: settings file that the model was made with; `fmn reproduce` follows it
        out: file that records name, version and run

    Raises:
        UserError: the metrics are another model's, served answers differ, or MLflow refuses.
    """
    from fmn.registry import tracking

    started = time.monotonic()
    _check_files(out, [model, metrics, data, report, card, params], report, card, data)
    recipe, scores, definitions = _read(model, metrics)
    inputs = {"model": artifacts.digest_folder(model), "metrics": artifacts.digest_file(metrics)}
    names = {"name": settings.name, "experiment": settings.experiment}
    key = artifacts.content_key("register", REGISTER, names, inputs)
    baselines = read_baselines(report, scores)
    with tracking.connection() as client:
        version = tracking.find_version(client, settings.experiment, key, settings.name)
        if version is None and only_current.get():
            raise NotCurrentError(settings.name)
        if version is None:
            with tracking.new_run(client, settings.experiment, key, settings.name):
                _log_files((card or model / CARD).read_text(), report)
                _log_lineage(model, recipe, scores, params)
                served = _log_model(model, metrics, scores, definitions, data, baselines)
                tags = version_tags(scores, recipe, definitions, baselines)
                version = tracking.create_version(served, settings.name, tags)
        is_new = tracking.DECISION not in version.tags
        uri = f"models:/{version.name}/{version.version}"
        describe = partial(page, uri, model, recipe, scores, definitions, baselines)
        decision, before = tracking.promote(client, version, settings.tolerance, describe)
        registered = _registered(version, decision)
        if is_new and report:
            _log_page(registered.run, report, registered, scores, before)
    if out:
        _write_registered(out, registered, inputs)
    return Outcome("register", out or model, is_new, time.monotonic() - started, registered)


def _check_files(
    out: Path | None,
    reads: Sequence[Path | None],
    report: Path | None,
    card: Path | None,
    data: Path | None,
) -> None:
    """Refuse an output that is an input, and inputs that do not exist, with a `UserError`."""
    if out:
        stage.check_output(out, reads, is_folder=False, stage="register")
    if data:
        artifacts.check_folder(data)
    for path in (report and report / "report.html", card):
        if path and not path.is_file():
            raise UserError(f"{path}: no such file; make it with `fmn report`")


def _write_registered(out: Path, registered: Registered, inputs: Mapping[str, str]) -> None:
    """Write the record of a version, unless the file has it already."""
    stage.run_stage(
        "register", REGISTER, out, lambda job: stage.write_record(job.path, registered),
        # A version that was deleted in MLflow and registered anew has another run.
        reads=inputs, settings={"registered": registered}, summary=str,
    )  # fmt: skip


def _log_files(card: str, report: Path | None) -> None:
    import mlflow

    mlflow.log_text(card, CARD)
    if report:
        mlflow.log_artifacts(str(report), "report")


def _log_model(
    model: Path,
    metrics: Path,
    scores: Metrics,
    definitions: Mapping[str, Task],
    data: Path | None,
    baselines: Baselines,
) -> str:
    """Log the model to serve and its scores with the current run; returns its address.

    Raises:
        UserError: it does not answer as in its evaluation.
    """
    import mlflow

    from fmn.registry import tracking

    with alone() as load:  # starts while the model is logged
        logged = tracking.log_served_model(model, definitions)
        serve = load(logged.model_uri, tracking.tracking_uri())
        check_served(serve, model, metrics, scores, definitions, data)
    mlflow.log_metrics(grouped_metrics(scores, baselines), model_id=logged.model_id)
    mlflow.set_tags(_standing_tags(scores, definitions))
    return str(logged.model_uri)


def _registered(version: "ModelVersion", decision: Decision) -> Registered:
    from fmn.registry import tracking

    number, run = str(version.version), str(version.run_id)
    store = redacted(tracking.tracking_uri())
    return Registered(name=version.name, version=number, run=run, store=store, **decision._asdict())


def _read(model: Path, metrics: Path) -> tuple[Recipe, Metrics, dict[str, Task]]:
    """Read a merged model's recipe, its metrics, and its tasks as they were scored or merged.

    Raises:
        UserError: the metrics are not the model's, or are not of all its tasks with labels.
    """
    recipe, scores = read_recipe(model), read_metrics(metrics)
    known = recipe.definitions | scores.definitions
    definitions = {name: known[name] for name in recipe.tasks if name in known}
    has_all_tasks = set(definitions) == {*recipe.tasks} == {*scores.tasks, *scores.unlabeled}
    is_complete = has_all_tasks and scores.tasks.keys() == scores.data.keys()
    if scores.model != artifacts.digest_folder(model) or not is_complete:
        remedy = f"make them with `fmn evaluate {model}`"
        raise UserError(f"{metrics}: not the metrics of all tasks of {model}; {remedy}")
    return recipe, scores, definitions


def _log_lineage(model: Path, recipe: Recipe, scores: Metrics, params: Path | None) -> None:
    """Log a model's lineage with the current run: as files, tags and data sets."""
    import mlflow
    from mlflow.data.code_dataset_source import CodeDatasetSource
    from mlflow.data.meta_dataset import MetaDataset

    parts = lineage.describe(model, recipe, scores)
    settings = lineage.pin_settings(read_yaml(params), recipe, scores) if params else None
    record = Lineage(parts=parts, threads=lineage.threads(recipe), settings=settings)
    mlflow.log_text(record.model_dump_json(indent=1), LINEAGE)
    mlflow.log_artifact(str(model / RECIPE), "lineage")
    mlflow.log_text(scores.model_dump_json(indent=1), "lineage/metrics.json")
    mlflow.log_params(_params(recipe, settings or {}))
    tags = {"tasks": ", ".join(recipe.tasks), "fmn": recipe.fmn}
    tags |= {part.name.replace(" ", "."): part.digest for part in parts}
    if settings is not None:
        mlflow.log_text(to_yaml(settings), f"lineage/{SETTINGS}")
        tags |= {"profile": str(params), "made": model.resolve().name}
    if commit := lineage.git_commit():
        tags["git.commit"] = commit
    mlflow.set_tags(tags)
    for part in parts:
        if part.name.startswith("data "):
            _, task, split = part.name.split(" ", 2)
            source = CodeDatasetSource({"source": part.origin, "split": split})
            # MLflow keeps 36 digits.
            dataset = MetaDataset(source, task, part.digest[:32])  # type: ignore[abstract]
            mlflow.log_input(dataset, context="training" if split == "train" else "validation")


def _standing_tags(scores: Metrics, definitions: Mapping[str, Task]) -> dict[str, str]:
    """Tags of the run that the next version is compared with: scores, errors and data."""
    from fmn.registry import tracking

    score_by_task = {name: entry.score for name, entry in scores.tasks.items()}
    errors = [name for name, task in definitions.items() if not higher_is_better(task)]
    return {
        tracking.SCORES: json.dumps(dict.fromkeys(definitions) | score_by_task),
        tracking.ERRORS: json.dumps(errors),
        tracking.DATA: lineage.evaluation_data(scores),
    }


def _log_page(
    run: str, report: Path, registered: Registered, scores: Metrics, before: Standing | None
) -> None:
    """Log the report's page once more, with the registered version and its alias."""
    import mlflow

    from fmn.report.page import registry_page, render

    html = (report / "report.html").read_text()
    changes = []
    for name, entry in scores.tasks.items():
        old = before.tasks.get(name) if before else None
        if old is not None and entry.score is not None:
            is_percent = higher_is_better(scores.definitions[name])
            texts = [shown(value, is_percent) for value in (entry.score, old)]
            changes.append((name, *texts, points(entry.score - old, is_percent)))
    words = render(
        "registration.html",
        registered=registered,
        link=registry_page(registered.name, registered.version),
        before=before,
        changes=changes,
    )
    client = mlflow.MlflowClient()
    client.log_text(run, REGISTRATION.sub(lambda _: words, html, count=1), "report/report.html")


def _params(recipe: Recipe, settings: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters of the run: those of the merge, and those of the stages before it."""
    fields = {"method", "mapping", "normalise", "exponent", "damping", "scale", "density", "seed"}
    params = recipe.model_dump(include=fields) | {"coefficient": recipe.coefficients}
    steps = {"calibrate": recipe.calibrate, "realign": recipe.realign}
    results = {"merged", "data", "tasks", "errors"}
    params |= {name: step.model_dump(exclude=results) for name, step in steps.items() if step}
    in_tags = {"work", "base", "experts", "sources", "tasks", "merge", "registry"}
    in_tags |= {*steps, "baselines"}
    return _flat({**params, **{key: settings[key] for key in settings.keys() - in_tags}})


def _flat(content: Mapping[str, Any]) -> dict[str, Any]:
    """Flatten settings to dotted names: ``{"fisher": {"seed": 0}}`` to ``{"fisher.seed": 0}``."""
    from pandas import json_normalize

    columns = json_normalize(dict(content)).to_dict("list").items()
    return {str(name): values[0] for name, values in columns if values[0] is not None}


class ChampionChange(Record):
    """The champion before a rollback and after it."""

    name: str
    before: str | None
    champion: str


def roll_back(name: str, *, to: str | None = None) -> ChampionChange:
    """Give the alias champion back to the version of a registered model that held it before.

    Args:
        name: name of the registered model
        to: the version that becomes the champion instead

    Raises:
        UserError: there is no such model or version, or there was no champion before.
    """
    from fmn.registry import tracking

    if not name or not (to or "1").isdecimal():
        raise UserError(f"rollback {name} {to or ''}: give the model's name, and a number to --to")
    with tracking.connection(creates=False) as client:
        model = client.get_registered_model(name)
        champion, before = tracking.champions(client, model)
        version = to or before
        if version is None:
            remedy = "choose one with --to VERSION"
            raise UserError(f"{name}: no version was the champion before; {remedy}")
        if version == champion:
            raise UserError(f"{name}: version {version} is the champion")
        tracking.make_champion(client, model, version)
    return ChampionChange(name=name, before=champion, champion=version)


@dataclass(frozen=True)
class Version:
    """A registered version: its address ``models:/NAME/VERSION``, its run's tags, its lineage.

    The tag ``made`` is the name of the merged model in the work folder of its settings.
    """

    uri: str
    tags: Mapping[str, str]
    lineage: Lineage

    @property
    def table(self) -> list[list[str]]:
        """The lineage as rows of (part, origin, digest)."""
        rows = [[part.name, part.origin, part.digest] for part in self.lineage.parts]
        tags = ("profile", "fmn", "git.commit")
        return rows + [[tag, self.tags.get(tag, "not recorded"), ""] for tag in tags]


def read_lineage(source: str) -> Version:
    """Read a registered version and its lineage.

    Args:
        source: ``models:/NAME/VERSION`` or ``models:/NAME@ALIAS``.

    Raises:
        UserError: there is no such version, or fmn did not register it.
    """
    import mlflow

    from fmn.registry import tracking

    if not re.fullmatch(r"models:/[^/@]+(/[0-9]+|@[^/@]+)", source):
        forms = "models:/NAME/VERSION or models:/NAME@ALIAS"
        raise UserError(f"{source}: not a registered version; write {forms}")
    uri = tracking.pin(source)
    with tracking.connection(creates=False) as client:
        run = client.get_model_version(*uri.removeprefix("models:/").split("/")).run_id
        files = client.list_artifacts(run, str(Path(LINEAGE).parent)) if run else []
        if not run or LINEAGE not in [file.path for file in files]:
            raise UserError(f"{uri}: its run holds no lineage; fmn did not register it")
        content = mlflow.artifacts.load_dict(f"runs:/{run}/{LINEAGE}")
        tags = dict(client.get_run(run).data.tags)
    return Version(uri, tags, parse_record(content, Lineage, uri, "register the model again"))


def settings_again(version: Version, out: Path) -> Path:
    """Write ``out/params.yaml``, settings that compute a version's model again in ``out/work``.

    Raises:
        UserError: the version was registered without its settings.
    """
    settings = version.lineage.settings
    if settings is None:
        remedy = "`fmn register --params FILE` records them"
        raise UserError(f"{version.uri}: registered without its settings; {remedy}")
    with artifacts.atomic_file(out / SETTINGS) as partial:
        partial.write_text(to_yaml({**settings, "work": str((out / "work").resolve())}))
    return out / SETTINGS


def compare_digests(version: Version, model: Path, metrics: Path) -> list[tuple[str, str, str]]:
    """Compare a model with a version: rows of (part, digest in the registry, digest now)."""
    recorded = {part.name: part.digest for part in version.lineage.parts}
    now = {part.name: part.digest for part in lineage.describe(model, *_read(model, metrics)[:2])}
    return [(name, recorded.get(name, ""), now.get(name, "")) for name in recorded | now]


# ---------------------------------------------------------------------------------------------
# Runs without a version


class LoggedRun(Record):
    """The id of a run."""

    run: str


def log_comparison(
    tables: Path, *, title: str, comparing: CompareSettings, settings: RegistrySettings
) -> Outcome[LoggedRun]:
    """Log the tables of a comparison in MLflow: a run, and in it a run for each method.

    Raises:
        UserError: the tables are not those that were written, or the store refuses.
    """
    stage.check_intact(tables)
    sidecar = stage.read_sidecar(tables)
    if not sidecar or sidecar.stage != "comparison":
        raise UserError(f"{tables}: not the tables of a comparison; make them with `fmn compare`")
    means = stage.read_info(tables, ReportInfo).results
    nested = {}
    for method, numbers in means.items():
        names = {name: f"retained/{name}" for name in numbers} | {"seconds": "time/merge"}
        scores = {names[name]: value for name, value in numbers.items()}
        nested[method] = comparing.methods[method].model_dump(mode="json"), scores
    return _log_runs(
        f"compare {title}",
        settings.experiment,
        {"title": title, "tables": sidecar.key},
        params=comparing.model_dump(mode="json", exclude={"methods", "device"}),
        nested=nested,
        tables=tables,
    )


def log_search(result: SearchResult, settings: SearchSettings) -> Outcome[LoggedRun]:
    """Log a search in MLflow: a run with the best trial's scores, and in it a run for each trial.

    Raises:
        UserError: the store refuses.
    """

    def scores(trial: Trial) -> dict[str, float]:
        numbers = {"score/mean": trial.score, "scale": trial.scale}
        numbers |= {f"score/{name}": score for name, score in trial.tasks.items()}
        return numbers | {f"coefficient/{name}": x for name, x in trial.coefficients.items()}

    return _log_runs(
        f"search {', '.join(result.experts)}",
        settings.experiment,
        {"study": result.study, "trials": len(result.trials)},
        params=result.merge | settings.model_dump(mode="json", exclude={"device", "experiment"}),
        metrics=scores(max(result.trials, key=lambda trial: trial.score)),
        nested={f"trial {n}": ({}, scores(trial)) for n, trial in enumerate(result.trials)},
    )


def _log_runs(
    name: str,
    experiment: str,
    content: Mapping[str, Any],
    *,
    params: Mapping[str, Any],
    nested: Mapping[str, tuple[Mapping[str, Any], Mapping[str, float]]],
    metrics: Mapping[str, float] = {},
    tables: Path | None = None,
) -> Outcome[LoggedRun]:
    """Log a run, and runs nested in it, unless the experiment has a run of this `content`.

    Args:
        name: the run's name.
        content: identifies the run.
        params, metrics: of the run.
        nested: parameters and metrics of the nested runs, by name.
        tables: a folder to log with the run.
    """
    import mlflow

    from fmn.registry import tracking

    started = time.monotonic()
    key = artifacts.content_key("log", LOG, {"experiment": experiment, **content}, {})
    with tracking.connection() as client:
        query = f"tags.`{tracking.KEY}` = '{key}' and attributes.status = 'FINISHED'"
        runs = client.search_runs([tracking.experiment_id(client, experiment)], query)
        is_new = not runs
        if is_new:
            with tracking.new_run(client, experiment, key, name) as run:
                if tables:
                    mlflow.log_artifacts(str(tables), "tables")
                    mlflow.set_tag("mlflow.note.content", spaced((tables / "table.md").read_text()))
                mlflow.log_params(_flat(params))
                mlflow.log_metrics(dict(metrics))
                for title, (own_params, own_metrics) in nested.items():
                    with mlflow.start_run(run_name=title, nested=True):
                        mlflow.log_params(_flat(own_params))
                        mlflow.log_metrics(dict(own_metrics))
        record = LoggedRun(run=(run if is_new else runs[0]).info.run_id)
    return Outcome("log", tables or Path(), is_new, time.monotonic() - started, record)
