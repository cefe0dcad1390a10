"""What a stage is: a function from files to files that does nothing when its output is there, intact and current."""

import time
from collections.abc import Callable, Iterable, Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fmn import artifacts, checkpoints, machine, recipe
from fmn.errors import UserError

Progress = Callable[[int, int], None]
# What makes an output in place of the stage itself, on another machine say, and returns the seconds that it took.
elsewhere: ContextVar[Callable[[], float] | None] = ContextVar("elsewhere", default=None)


@dataclass(frozen=True)
class Outcome:
    """What a stage did.

    Attributes:
        stage: its name.
        out: the output.
        computed: False when the output was there already.
        seconds: how long it took.
        summary: figures worth showing.
    """

    stage: str
    out: Path
    computed: bool
    seconds: float
    summary: Mapping[str, Any]


def run(
    stage: str,
    out: Path,
    current: Callable[[], bool],
    make: Callable[[], None],
    summarise: Callable[[], Mapping[str, Any]],
) -> Outcome:
    """Make ``out`` unless it is current; one process at a time. What fmn did not make is not replaced.

    Raises:
        UserError: it may not be replaced, or the machine refuses room, memory or a permission.
    """
    started = time.monotonic()
    artifacts.check_replaceable(out)
    make_elsewhere = elsewhere.get()
    with machine.refusals_told(out), artifacts.locked(out):
        computed = not current()
        if computed:
            begun = time.monotonic()
            if make_elsewhere is None:
                make()
                seconds = time.monotonic() - begun
            else:
                seconds = make_elsewhere()
                if not current():
                    raise UserError(f"{out}: what came from elsewhere is not what these inputs and settings ask for")
            artifacts.write_cost(out, stage, seconds)
    # Of one that was made elsewhere, what it took there: it may have waited long for its turn.
    taken = seconds if computed and make_elsewhere else time.monotonic() - started
    return Outcome(stage, out, computed, taken, summarise())


def apart(out: Path, inputs: Iterable[Path | None]) -> None:
    """Refuse an output that would replace what is read, or lie within a model that is read."""
    where = out.resolve()
    for path in inputs:
        given = path.resolve() if path is not None else None
        if given is None or path is None:
            continue
        model = any((given / name).is_file() for name in (recipe.RECIPE, checkpoints.CONFIG))
        if where == given or where in given.parents or (model and given in where.parents):
            raise UserError(f"--out {out}: would change {path}, which is read; choose another --out")


def run_folder(stage: str, out: Path, key: str, fill: Callable[[Path], Mapping[str, Any]]) -> Outcome:
    """A stage whose output is a folder that ``fill`` fills; what it returns goes into the manifest."""

    def make() -> None:
        with artifacts.whole_folder(out) as folder:
            artifacts.write_manifest(folder, stage, key, fill(folder))

    def summarise() -> Mapping[str, Any]:
        manifest = artifacts.read_manifest(out)
        return dict(manifest["info"]) if manifest else {}

    return run(stage, out, lambda: artifacts.folder_is_current(out, key), make, summarise)


def run_json(stage: str, out: Path, key: str, compute: Callable[[], Mapping[str, Any]]) -> Outcome:
    """A stage whose output is a JSON file."""
    return run(
        stage,
        out,
        lambda: artifacts.json_is_current(out, key),
        lambda: artifacts.write_json(out, stage, key, compute()),
        lambda: artifacts.read_json(out),
    )


def limit(number: int | str) -> Any:
    return None if number == "all" else number


def lineage(folder: Path) -> dict[str, str]:
    """Where a checkpoint comes from: the source as given, and its revision pinned."""
    manifest = artifacts.read_manifest(folder)
    if manifest is None:
        return {"source": "folder", "revision": f"sha256:{artifacts.digest_folder(folder)}"}
    info = manifest["info"]
    made = f"{manifest['stage']}:{manifest['key'][:16]}"
    return {"source": str(info.get("source", made)), "revision": str(info.get("revision", made))}


def circumstances(folder: Path) -> dict[str, Any]:
    """What a checkpoint that was fine-tuned here says it was made with, beside its settings."""
    info = (artifacts.read_manifest(folder) or {"info": {}})["info"]
    return {name: info[name] for name in ("data_digest", "threads") if name in info}


def tuning(folder: Path) -> dict[str, Any]:
    """The settings that fmn fine-tuned a checkpoint with; empty where it did not."""
    manifest = artifacts.read_manifest(folder)
    if manifest is None or manifest["stage"] != "finetune":
        return {}
    names = ("epochs", "learning_rate", "batch_size", "examples", "seed", "dtype")
    return {name: manifest["info"][name] for name in names}


def there(path: Path) -> Path:
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    return path
