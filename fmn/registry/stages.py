"""The stages that end in MLflow: a merged model registered, a comparison logged; and a version's lineage."""

import json
import re
import shutil
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field

from fmn.errors import UserError, redacted
from fmn.merge import recipe
from fmn.registry import lineage
from fmn.store import artifacts
from fmn.store import records as formats
from fmn.store.records import Settings
from fmn.store.stage import Outcome, check_intact
from fmn.tasks import task as tasks

if TYPE_CHECKING:
    from fmn.experiments.stages import CompareSettings
    from fmn.params import Params
    from fmn.registry.tracking import Input


class RegistrySettings(Settings):
    name: str = Field(
        ..., pattern=r"^[A-Za-z0-9][A-Za-z0-9 ._-]*$", description="name of the registered model"
    )
    experiment: str = Field("fmn", description="MLflow experiment of the run")
    tolerance: float = Field(
        0.01,
        ge=0,
        le=1,
        description="how much less than the champion's a task's score may be for a version to take its place; the mean"
        " may not be less",
    )


REGISTER = 1
COMPARISON = 1
METRICS, SETTINGS = "metrics.json", "params.yaml"


def register(
    model: Path,
    metrics: Path,
    report_folder: Path | None,
    out: Path | None,
    settings: RegistrySettings,
    profile: str | None = None,
    params: "Params | None" = None,
) -> Outcome:
    """The merged model as a new version in the MLflow registry, with a run that holds metrics, report and lineage.

    The version that these very files have already is not made again. ``out``, where given, records where it stands.

    Args:
        profile: the name of the settings file that the model was made with.
        params: its content; what the stages took is read in its work folder.

    Raises:
        UserError: the metrics are not the model's, or the settings make other models.
    """
    from fmn.registry import tracking as registry

    started = time.monotonic()
    check_intact(model)
    made, found = (
        recipe.read_recipe(model).model_dump(mode="json", by_alias=True),
        artifacts.read_json(metrics, formats.Metrics),
    )
    inputs = {
        "merged": artifacts.digest_file(model / recipe.RECIPE),
        "metrics": artifacts.digest_file(metrics),
    }
    key = artifacts.content_key(
        "register", REGISTER, settings.model_dump(exclude={"tolerance"}), inputs
    )
    if found.get("model") != inputs["merged"] or set(found["tasks"]) != set(made["tasks"]):
        raise UserError(
            f"{metrics}: not the metrics of all tasks of {model}; make them with `fmn evaluate {model}`"
        )
    if "data" not in found:
        raise UserError(
            f"{metrics}: made by an older fmn, which did not say of which data; evaluate again"
        )
    tags = lineage.tags(made, found)
    stated, seconds = None, {}
    if params is not None:
        seconds = _seconds(Path(params.work))
        stated = lineage.pinned(params, made, found)
        tags |= {"profile": profile or SETTINGS, "made": lineage.place(model, params)}
    with tempfile.TemporaryDirectory() as scratch:
        registered = registry.register(
            model,
            name=settings.name,
            experiment=settings.experiment,
            key=key,
            params=_params(made, stated or {}),
            metrics=_metrics(found) | seconds,
            inputs=_inputs(made, found),
            artifacts=_kept(Path(scratch), model, metrics, report_folder, stated),
            tags=tags,
            shown=("tasks", "profile", "git.commit"),
            scores={task: entry["score"] for task, entry in found["tasks"].items()},
            data=tags["data"],
            tolerance=settings.tolerance,
            card=_for_mlflow(model / recipe.CARD),
        )
    summary = {
        "name": registered.name,
        "version": registered.version,
        "run": registered.run_id,
        "store": registered.tracking_uri,
        "alias": registered.alias,
        "reason": registered.reason,
    }
    if out is not None and not artifacts.json_is_current(out, key):
        artifacts.write_json(out, "register", key, summary)
    return Outcome("register", out or model, registered.new, time.monotonic() - started, summary)


def _params(made: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    """What the recipe says of the merge, and the settings of the stages before it."""
    names = ("method", "mapping", "normalise", "exponent", "damping", "scale", "density", "seed")
    found = {name: made[name] for name in names if made.get(name) is not None}
    found |= {f"coefficient.{task}": value for task, value in made["coefficients"].items()}
    left_out = (
        "work",
        "base",
        "experts",
        "sources",
        "merge",
        "registry",
    )  # in the recipe and the tags
    return found | _flat({name: value for name, value in settings.items() if name not in left_out})


def _flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in settings.items():
        if isinstance(value, Mapping):
            found |= _flat(value, f"{prefix}{name}.")
        elif value not in (None, [], ""):
            found[f"{prefix}{name}"] = value
    return found


def _metrics(found: Mapping[str, Any]) -> dict[str, float]:
    """Metrics by TASK.NAME, with the ends of their 95 % intervals as TASK.NAME.low and TASK.NAME.high."""
    entries = {
        "": {"score": found["score"], "interval": {"score": found["interval"]}},
        **found["tasks"],
    }
    values: dict[str, float] = {}
    for task, entry in entries.items():
        prefix = f"{task}." if task else ""
        for name, value in entry.items():
            if name != "interval":
                values[prefix + name] = value
        for name, ends in entry["interval"].items():
            values |= {
                f"{prefix}{name}.{end}": x for end, x in zip(("low", "high"), ends, strict=True)
            }
    return values


def _seconds(work: Path) -> dict[str, float]:
    """What the stages took that lead to a merged model, by ``seconds/STAGE NAME``."""
    costs = artifacts.read_costs(work)
    # Of files of one name but for what comes after a dot, the plain one is the pipeline's, others are a comparison's.
    plain_last = sorted(costs, key=lambda path: -len(path.name))
    taken = {
        path: costs[path]
        for path in plain_last
        if costs[path][0] not in ("compare", "comparison", "search")
    }
    return {
        f"seconds/{stage} {path.name.split('.')[0]}": seconds
        for path, (stage, seconds) in taken.items()
    }


def _inputs(made: Mapping[str, Any], found: Mapping[str, Any]) -> "list[Input]":
    """The validation splits that the model was scored on, and the training splits behind experts and statistics."""
    from fmn.registry.tracking import Input

    listed = []
    for name, entry in found["data"].items():
        task = tasks.task(name)
        origin = {item: value for item, value in entry.items() if item != "splits"}
        columns = {
            **dict.fromkeys(task.columns, "string"),
            "label": "double" if task.regression else "long",
        }
        for split, digest in entry["splits"].items():
            rows = found["tasks"][name].get("examples" + task.suffix(split))
            listed.append(Input(name, split, digest, {**origin, "split": split}, columns, rows))
        if train := lineage.train_digest(made, name):
            listed.append(
                Input(name, "training", train, {**origin, "split": "train"}, columns, None)
            )
    return listed


def _kept(
    folder: Path,
    model: Path,
    metrics: Path,
    report_folder: Path | None,
    settings: Mapping[str, Any] | None,
) -> Path:
    """A folder of the files that a run keeps: lineage and report."""
    from fmn.registry.tracking import LINEAGE

    (folder / LINEAGE).mkdir()
    shutil.copyfile(model / recipe.RECIPE, folder / LINEAGE / recipe.RECIPE)
    shutil.copyfile(metrics, folder / LINEAGE / METRICS)
    if settings is not None:
        (folder / LINEAGE / SETTINGS).write_text(lineage.as_yaml(settings))
    if report_folder is not None:
        shutil.copytree(
            report_folder,
            folder / "report",
            ignore=shutil.ignore_patterns(artifacts.MANIFEST, ".*"),
        )
    return folder


def _for_mlflow(card: Path) -> str:
    """A model card as MLflow shows it: without front matter."""
    text = card.read_text() if card.is_file() else ""
    if text.startswith("---\n"):
        text = text[4:].partition("\n---\n")[2]
    return _spaced(text.strip())


def _spaced(text: str) -> str:
    """Markdown with room between the columns of its tables, which MLflow sets close."""
    return re.sub(r"(?m)(?<=\S) \|(?=.*\|$)", "&emsp;|", text).replace("---&emsp;", "---")


def roll_back(name: str, version: str | None) -> dict[str, str | None]:
    """Give the champion's place back to the version that held it before, or to another; UserError without one."""
    from fmn.registry import tracking as registry

    before, now = registry.roll_back(name, version)
    return {"name": name, "before": before, "champion": now}


def record_dvc_lock(run: str) -> None:
    """State with a registration's run the dvc.lock that was brought in step after it."""
    from fmn.registry import tracking as registry

    if digest := lineage.dvc_lock():
        registry.tag(run, {"dvc.lock": digest})


@dataclass(frozen=True)
class Lineage:
    """What a registered version was made from.

    Attributes:
        uri: ``models:/NAME/VERSION``.
        tags: of its run.
        recipe: the content of ``merge.json``.
        metrics: the content of its metrics file.
        settings: the settings, with pinned sources; None where it was registered without them.
    """

    uri: str
    tags: Mapping[str, str]
    recipe: Mapping[str, Any]
    metrics: Mapping[str, Any]
    settings: Mapping[str, Any] | None

    @property
    def table(self) -> list[list[str]]:
        """Rows: what, from where or how, digest."""
        return lineage.table(self.recipe, self.metrics, self.tags, self.settings)


def read_lineage(source: str) -> Lineage:
    """What a registered version was made from; UserError where that was not recorded."""
    from fmn.params import read_yaml
    from fmn.registry import tracking as registry

    with tempfile.TemporaryDirectory() as scratch:
        found = registry.recorded(source, Path(scratch))
        settings = found.folder / SETTINGS
        return Lineage(
            found.uri,
            found.tags,
            recipe.read_recipe(found.folder).model_dump(mode="json", by_alias=True),
            artifacts.read_json(found.folder / METRICS, formats.Metrics),
            read_yaml(settings) if settings.is_file() else None,
        )


def settings_again(found: Lineage, out: Path) -> Path:
    """Write the settings that make a version's model again below the folder ``out``; returns their file.

    Raises:
        UserError: they were not recorded, or a source is not there any more.
    """
    if found.settings is None:
        raise UserError(
            f"{found.uri}: registered without its settings; `fmn register --params FILE` records them"
        )
    settings = lineage.again(found.settings, out / "work", found.uri)
    out.mkdir(parents=True, exist_ok=True)
    file = out / SETTINGS
    with artifacts.whole_file(file) as partial:
        partial.write_text(lineage.as_yaml(settings.model_dump(mode="json", exclude_defaults=True)))
    return file


def compare_digests(found: Lineage, model: Path, metrics: Path) -> list[tuple[str, str, str]]:
    """A model that was made again beside the version: (what, digest stated, digest now)."""
    before = lineage.digests(found.recipe, found.metrics)
    now = lineage.digests(
        recipe.read_recipe(model).model_dump(mode="json", by_alias=True),
        artifacts.read_json(metrics, formats.Metrics),
    )
    return [
        (name, before.get(name, ""), now.get(name, "")) for name in dict.fromkeys([*before, *now])
    ]


def log_comparison(
    tables: Path, title: str, comparing: "CompareSettings", settings: RegistrySettings
) -> Outcome:
    """The tables of a comparison in MLflow: a run, and below it a run for each method with its metrics by set.

    Args:
        tables: the folder that `write_comparison` filled.
        title: of the comparison.
        comparing: what was compared.
        settings: the experiment of the runs.
    """
    from fmn.registry import tracking as registry
    from fmn.registry.tracking import Logged

    started = time.monotonic()
    manifest = artifacts.read_manifest(tables)
    if manifest is None or not artifacts.folder_is_current(tables, manifest["key"]):
        raise UserError(
            f"{tables}: not the tables of a comparison, or changed; make them with `fmn compare`"
        )
    results = json.loads((tables / "results.json").read_text())
    described = {"title": title, "experiment": settings.experiment}
    key = artifacts.content_key(
        "log-comparison", COMPARISON, described, {"tables": manifest["key"]}
    )
    means: Mapping[str, Mapping[str, float]] = results["methods"]
    how = comparing.model_dump(mode="json", exclude={"methods", "device"})
    run, new = registry.log_comparison(
        Logged(
            how,
            {
                _named(f"{kind}/{method}"): value
                for method, row in means.items()
                for kind, value in row.items()
            },
        ),
        {
            method: Logged(
                _flat(comparing.methods[method].model_dump(mode="json")),
                {**row, **_by_set(results["sets"], method)},
            )
            for method, row in means.items()
        },
        name=title,
        experiment=settings.experiment,
        key=key,
        artifacts=tables,
        note=_spaced((tables / "table.md").read_text()),
    )
    summary = {"run": run, "store": redacted(registry.tracking_uri())}
    return Outcome("log", tables, new, time.monotonic() - started, summary)


def _by_set(sets: Mapping[str, Mapping[str, Mapping[str, Any]]], method: str) -> dict[str, float]:
    """A method's metrics by set of experts: the mean score relative to the experts', and the score of each task."""
    found = {}
    for name, row in sets.items():
        shares: Sequence[float] = [
            one["relative"] for one in row[method].values() if one["relative"] is not None
        ]
        if shares:
            found[_named(f"relative/{name}")] = sum(shares) / len(shares)
        found |= {_named(f"{name}/{task}"): one["score"] for task, one in row[method].items()}
    return found


def _named(name: str) -> str:
    """A metric's name in the characters that MLflow takes."""
    return re.sub(r"[^\w .:/-]", "-", name)
