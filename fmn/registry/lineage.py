"""The lineage of a registered version: its sources and their digests. Does not import MLflow."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fmn.evaluate.files import Metrics
from fmn.merge.recipe import Checkpoint, Recipe
from fmn.report.page import git_commit as git_commit
from fmn.sources.origin import SCHEMES
from fmn.store import artifacts
from fmn.store.records import Record

# Sections of the settings that do not affect the merged model; `notify` holds a secret.
_NOT_RECORDED = {"baselines", "compare", "notify", "full_fisher", "runner", "address", "storage"}


class Part(Record):
    """An input of a merged model, or a part of the model itself.

    Attributes:
        name: such as ``expert sst2`` or ``merged encoder``.
        origin: where it comes from, or how it was computed.
        digest: sha256, in hexadecimal.
    """

    name: str
    origin: str
    digest: str


class Lineage(Record):
    """The lineage of a merged model, stored with the registered version.

    Attributes:
        parts: the inputs and the parts of the model, with their digests.
        threads: see `threads`; the last bits of the model depend on them.
        settings: the settings with every source pinned, if they are known.
    """

    parts: list[Part]
    threads: int | None = None
    settings: dict[str, Any] | None = None


def describe(model: Path, recipe: Recipe, metrics: Metrics) -> list[Part]:
    """List a merged model's inputs, its parts, and its scores, with their digests."""
    parts = [("base", recipe.base.revision, recipe.base.digest)] if recipe.base else []
    for task in dict.fromkeys((*metrics.data, *recipe.tasks)):
        origin = ""  # a task without labels has no metrics
        if rows := metrics.data.get(task):
            origin = " ".join(filter(None, (rows.source, rows.revision, str(rows.seed or ""))))
            parts += [(f"data {task} {name}", origin, rows.splits[name]) for name in rows.splits]
        if digest := _training_data(recipe, task):
            parts.append((f"data {task} train", origin, digest))
    for task, expert in recipe.experts.items():
        parts.append((f"expert {task}", _origin(expert), expert.digest))
    for kind, statistics in (("fisher", recipe.fisher), ("gram", recipe.gram)):
        for task, used in statistics.items():
            origin = f"{used.estimator} {used.samples} examples, seed {used.seed}, {used.dtype}"
            parts.append((f"{kind} {task}", origin.strip(), used.values))
    files = artifacts.digest_files(model)
    encoder = {name: digest for name, digest in files.items() if name.startswith("encoder/")}
    method = f"{recipe.method}, calibrated" if recipe.calibrate else recipe.method
    parts.append(("merged encoder", method, _digest(encoder)))
    for task in recipe.tasks:
        names = [name for name in files if name.startswith(f"tasks/{task}/")]
        # A task's folder has links to the encoder's files.
        head = {name: files[name] for name in names if files[name] not in encoder.values()}
        origin = "re-aligned" if recipe.realign else "the expert's own"
        parts.append((f"merged head {task}", origin, _digest(head)))
    scores = {task: entry.model_dump(mode="json") for task, entry in metrics.tasks.items()}
    mean = "undefined" if metrics.score is None else f"{100 * metrics.score:.2f} %"
    parts.append(("scores", f"{mean} in the mean", _digest(scores)))
    return [Part(name=name, origin=origin, digest=digest) for name, origin, digest in parts]


def _training_data(recipe: Recipe, task: str) -> str:
    """The digest of the training split of an expert or its statistics; empty if unknown."""
    entries = (recipe.fisher.get(task), recipe.gram.get(task), recipe.experts.get(task))
    return next((entry.data_digest for entry in entries if entry and entry.data_digest), "")


def _origin(expert: Checkpoint) -> str:
    """The revision of an expert; if fmn fine-tuned it, the settings of that."""
    details = (f"{name.replace('_', ' ')} {value}" for name, value in expert.settings.items())
    return "fine-tuned: " + ", ".join(details) if expert.settings else expert.revision


def _digest(content: Mapping[str, Any]) -> str:
    return artifacts.digest_bytes(artifacts.canonical(content))


def evaluation_data(metrics: Metrics) -> str:
    """One digest of all data that a model was scored on."""
    return _digest({task: rows.splits for task, rows in metrics.data.items()})


def threads(recipe: Recipe) -> int | None:
    """The number of threads that computed experts and statistics; None if it differs."""
    counts = {expert.threads for expert in recipe.experts.values() if expert.threads}
    counts |= {used.threads for used in [*recipe.fisher.values(), *recipe.gram.values()]}
    return counts.pop() if len(counts) == 1 else None


def pin_settings(settings: Mapping[str, Any], recipe: Recipe, metrics: Metrics) -> dict[str, Any]:
    """Pin every source in the content of a settings file to the revision that the model used."""
    pinned = {name: value for name, value in settings.items() if name not in _NOT_RECORDED}
    if "base" in pinned:
        pinned["base"] = _pin(pinned["base"], recipe.base)
    pinned["sources"] = {
        task: {**source, "source": _pin(source["source"], recipe.experts.get(task))}
        if isinstance(source, Mapping)
        else _pin(source, recipe.experts.get(task))
        for task, source in (pinned.get("sources") or {}).items()
    }
    commits = {task: rows.revision for task, rows in metrics.data.items() if rows.revision}
    if tasks := pinned.get("tasks"):
        own = {task for task, definition in tasks.items() if (definition or {}).get("dataset")}
        pinned["tasks"] = {
            **tasks,
            **{task: _pin_task(tasks[task], commits.pop(task, None)) for task in sorted(own)},
        }
    data = dict(pinned.get("data") or {})
    if data.get("source") not in (None, "hub", "embedded"):
        data["source"] = _pin(os.path.expandvars(data["source"]), None)
    if len(revisions := set(commits.values())) == 1:
        data["revision"] = revisions.pop()
    return {**pinned, "data": data}


def _pin(source: str, checkpoint: Checkpoint | None) -> str:
    """The revision of a checkpoint; for a folder, its absolute path."""
    if checkpoint and checkpoint.revision.startswith(SCHEMES):
        return checkpoint.revision
    return source if source.startswith(SCHEMES) else str(Path(source).expanduser().resolve())


def _pin_task(definition: Mapping[str, Any], commit: str | None) -> dict[str, Any]:
    """Pin the data set of an entry of the section `tasks`: to a commit, or to an absolute path."""
    dataset = dict(definition["dataset"])
    path = Path(os.path.expandvars(dataset["path"])).expanduser()
    if commit:
        dataset["revision"] = commit
    elif path.exists():  # otherwise a URL
        dataset["path"] = str(path.resolve())
    return {**definition, "dataset": dataset}
