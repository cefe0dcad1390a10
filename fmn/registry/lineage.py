"""What a registered version was made from, so that it can be told and made again. Knows no MLflow."""

import io
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fmn.errors import UserError
from fmn.models.sources import SCHEMES
from fmn.store import artifacts

if TYPE_CHECKING:
    from fmn.params import Params

LOCK = Path("dvc.lock")
LAST = (
    "register"  # the stage of dvc.yaml that states the digest of what stands before it in the lock
)
# What says nothing of how the merged model is made; the section of notices holds a secret.
_LEFT_OUT = {"compare", "notify", "full_fisher", "runner", "address", "storage"}


def git_commit() -> str | None:
    """The commit that the working folder is at, with a ``+`` where files differ from it; None outside of git."""
    commands = (
        ["git", "rev-parse", "HEAD"],
        ["git", "status", "--porcelain", "--untracked-files=no"],
    )
    try:
        done = [
            subprocess.run(command, capture_output=True, text=True, check=False)
            for command in commands
        ]
    except OSError:
        return None
    if any(one.returncode for one in done):
        return None
    commit, changes = (one.stdout.strip() for one in done)
    return f"{commit}+" if changes else commit


def dvc_lock() -> str | None:
    """The digest of what dvc.lock in the working folder says of the stages before the registration; None without it."""
    from ruamel.yaml import YAML
    from ruamel.yaml.error import YAMLError

    try:
        content = YAML(typ="safe", pure=True).load(LOCK.read_text())
        stages = {name: entry for name, entry in content["stages"].items() if name != LAST}
    except (OSError, YAMLError, KeyError, TypeError, AttributeError):
        return None
    return artifacts.digest_bytes(artifacts.canonical(stages))


def digests(recipe: Mapping[str, Any], metrics: Mapping[str, Any]) -> dict[str, str]:
    """The digest of everything that a merged model was made from, and of what it is, by what it is of.

    Args:
        recipe: the content of ``merge.json``.
        metrics: the content of its metrics file.
    """
    found = {"base": recipe["base"]["digest"]} if recipe.get("base") else {}
    for task, entry in metrics["data"].items():
        found |= {f"data {task} {split}": digest for split, digest in entry["splits"].items()}
    for task in recipe["tasks"]:
        if train := train_digest(recipe, task):
            found[f"data {task} train"] = train
    found |= {f"expert {task}": entry["digest"] for task, entry in recipe["experts"].items()}
    for kind in ("fisher", "gram"):
        found |= {
            f"{kind} {task}": entry["values"]
            for task, entry in recipe[kind].items()
            if "values" in entry
        }
    encoder = {
        name: digest for name, digest in recipe["files"].items() if name.startswith("encoder/")
    }
    parts = {"merged encoder": encoder}
    for name, digest in recipe["files"].items():
        if digest not in encoder.values():  # a task's folder holds the encoder's files too
            parts.setdefault(f"merged head {name.split('/')[1]}", {})[name] = digest
    found |= {
        part: artifacts.digest_bytes(artifacts.canonical(files)) for part, files in parts.items()
    }
    found["scores"] = artifacts.digest_bytes(artifacts.canonical(metrics["tasks"]))
    return found


def train_digest(recipe: Mapping[str, Any], task: str) -> str | None:
    """The digest of the training split that an expert or its statistics were made from; None where none was read."""
    entries = (recipe[kind].get(task, {}) for kind in ("fisher", "gram", "experts"))
    return next((entry["data_digest"] for entry in entries if "data_digest" in entry), None)


def evaluation_data(metrics: Mapping[str, Any]) -> str:
    """One digest for the data that the metrics are of."""
    splits = {task: entry["splits"] for task, entry in metrics["data"].items()}
    return artifacts.digest_bytes(artifacts.canonical(splits))


def tags(recipe: Mapping[str, Any], metrics: Mapping[str, Any]) -> dict[str, str]:
    """The lineage in short, for the tags of a run and a version."""
    found = {
        "tasks": ", ".join(recipe["tasks"]),
        "fmn": recipe["fmn"],
        "data": evaluation_data(metrics),
        **{f"expert.{task}": entry["revision"] for task, entry in recipe["experts"].items()},
        **{
            f"{kind}.{task}": entry["digest"]
            for kind in ("fisher", "gram")
            for task, entry in recipe[kind].items()
        },
    }
    if recipe.get("base"):
        found["base"] = recipe["base"]["revision"]
    here = {"git.commit": git_commit(), "dvc.lock": dvc_lock()}
    return found | {name: value for name, value in here.items() if value}


def pinned(
    params: "Params", recipe: Mapping[str, Any], metrics: Mapping[str, Any]
) -> dict[str, Any]:
    """The settings that a merged model was made with, as plain data: every source pinned to the revision it had."""

    def pin(source: str, entry: Mapping[str, str] | None) -> str:
        revision = (entry or {}).get("revision", "")
        if revision.startswith(SCHEMES):
            return revision
        return source if source.startswith(SCHEMES) else str(Path(source).expanduser().resolve())

    stated = params.model_dump(mode="json", exclude=_LEFT_OUT)
    stated["base"] = pin(params.base, recipe.get("base"))
    stated["sources"] = {
        task: pin(source, recipe["experts"].get(task)) for task, source in params.sources.items()
    }
    if params.data.source == "hub":
        revisions = {entry["revision"] for entry in metrics["data"].values() if "revision" in entry}
        if len(revisions) == 1:
            stated["data"]["revision"] = revisions.pop()
    elif params.data.source != "embedded":
        stated["data"]["source"] = str(Path(params.data.source).expanduser().resolve())
    return stated


def place(model: Path, params: "Params") -> str:
    """The name of a model's folder in the one that the settings work in; UserError where they make it elsewhere."""
    if model.resolve().parent != Path(params.work).resolve():
        raise UserError(
            f"--params: these settings make their models in {params.work}, not in {model.parent}"
        )
    return model.resolve().name


def as_yaml(settings: Mapping[str, Any]) -> str:
    """Plain data as YAML."""
    from ruamel.yaml import YAML

    text = io.StringIO()
    YAML(typ="safe", pure=True).dump(dict(settings), text)
    return text.getvalue()


def again(settings: Any, work: Path, where: str) -> "Params":
    """Recorded settings, to be followed in another folder; UserError where a source is gone, or fmn reads them no more.

    Args:
        settings: what `pinned` gave.
        work: the folder to make everything in.
        where: what the settings are of, for messages.
    """
    from fmn.params import validate

    found = validate({**settings, "work": str(work.resolve())}, f"the settings of {where}")
    folders = {
        "base": found.base,
        **{f"expert {task}": source for task, source in found.sources.items()},
    }
    if found.data.source not in ("hub", "embedded"):
        folders["data"] = found.data.source
    for name, source in folders.items():
        if not source.startswith(SCHEMES) and not Path(source).is_dir():
            raise UserError(
                f"{where}: the {name} came from {source}, which is not there any more; put it back there"
            )
    return found


def threads(recipe: Mapping[str, Any]) -> int | None:
    """How many threads everything was computed with, on which the last bits depend; None where that differs."""
    entries = [entry for kind in ("experts", "fisher", "gram") for entry in recipe[kind].values()]
    counts = {int(entry["threads"]) for entry in entries if "threads" in entry}
    return counts.pop() if len(counts) == 1 else None


def table(
    recipe: Mapping[str, Any],
    metrics: Mapping[str, Any],
    stated: Mapping[str, str],
    settings: Mapping[str, Any] | None,
) -> list[list[str]]:
    """The lineage for people, a row a thing: what, from where or how, digest.

    Args:
        recipe, metrics: as for `digests`.
        stated: the tags of the version.
        settings: what `pinned` gave, where it was recorded.
    """
    found, tuned = digests(recipe, metrics), (settings or {}).get("finetune", {})
    how = {
        f"expert {task}": _origin(entry, tuned.get(task))
        for task, entry in recipe["experts"].items()
    }
    if recipe.get("base"):
        how["base"] = recipe["base"]["revision"]
    for kind in ("fisher", "gram"):
        for task, entry in recipe[kind].items():
            details = (
                entry.get("estimator"),
                f"{entry['samples']} examples",
                f"seed {entry['seed']}",
                entry["dtype"],
            )
            how[f"{kind} {task}"] = ", ".join(filter(None, details))
    for task, entry in metrics["data"].items():
        details = (
            entry["source"],
            *(f"{name} {entry[name]}" for name in ("revision", "seed") if name in entry),
        )
        how |= {name: ", ".join(details) for name in found if name.startswith(f"data {task} ")}
    scale = f"scale {recipe['scale']:.3g}" if recipe["scale"] != 1 else None
    how["merged encoder"] = ", ".join(filter(None, (recipe["method"], recipe["mapping"], scale)))
    heads = "re-aligned" if recipe.get("realign") else "the expert's own"
    how |= dict.fromkeys((f"merged head {task}" for task in recipe["tasks"]), heads)
    how["scores"] = f"{100 * metrics['score']:.2f} % in the mean"
    rows = [[what, how.get(what, ""), digest] for what, digest in found.items()]
    rows.append(["settings", stated.get("profile", "not recorded"), ""])
    rows.append(["git commit", *_compared(stated.get("git.commit"), git_commit())])
    rows.append(["dvc.lock", *_compared(stated.get("dvc.lock"), dvc_lock())])
    rows.append(["fmn", stated.get("fmn", ""), ""])
    return rows


def _origin(entry: Mapping[str, str], tuning: Mapping[str, Any] | None) -> str:
    """Where an expert came from: its pinned source or, where it was made here, how."""
    source, revision = entry["source"], entry["revision"]
    if tuning:
        names = ("epochs", "learning_rate", "batch_size", "examples", "seed")
        return "fine-tuned: " + ", ".join(
            f"{name.replace('_', ' ')} {tuning[name]}" for name in names
        )
    return (
        f"{revision} ({source})" if source != revision and source.startswith(SCHEMES) else revision
    )


def _compared(stated: str | None, here: str | None) -> tuple[str, str]:
    if stated is None:
        return "not recorded", ""
    changed = "with changes" if stated.endswith("+") else ""
    same = ("as in this folder" if stated == here else "not that of this folder") if here else ""
    return ", ".join(filter(None, (same, changed))), stated
