"""What the tests of kills, rot and crowds share: a project whose whole pipeline takes seconds, and what it came to."""

import hashlib
import json
import os
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import closing, suppress
from dataclasses import dataclass, field
from pathlib import Path

from fmn.store.artifacts import COST
from tests import projects

MORE = """
gram: {sst2: {samples: 32}, stsb: {samples: 32}}
realign: {realigned: {texts: 16}}
"""
# Where the outputs of the stages lie below the work folder.
OUTPUTS = (
    "base", "data/*", "experts/*", "fisher/*", "base-heads", "average", "merged", "realigned", "metrics/experts/*.json",
    "metrics/*.json",
    "report", "registered.json",
)  # fmt: skip
CLOCKED = (
    "registered.json",
    "run.log",
    "cost.svg",
)  # what says when something happened, or how long it took


def make_project(folder: Path, base: Path) -> Path:
    """A project that also takes Gram matrices and re-aligns the heads."""
    projects.make_project(folder, base)
    profile = projects.PROFILE.replace(
        "method: mask-fisher, mapping: structured", "method: fisher-regmean"
    )
    (folder / "params.yaml").write_text(profile.rstrip() + MORE)
    return folder


def start(folder: Path, *command: str, **variables: str) -> "subprocess.Popen[str]":
    """A command in a process group of its own."""
    return subprocess.Popen(
        command, cwd=folder, env=projects.environment(folder) | variables, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True, start_new_session=True,
    )  # fmt: skip


def flow(folder: Path, **variables: str) -> "subprocess.Popen[str]":
    """`fmn run`, started."""
    return start(folder, sys.executable, "-m", "fmn", "run", **variables)


@dataclass(frozen=True)
class Done:
    """How a command ended, and all that it printed."""

    code: int
    said: str


def finish(process: "subprocess.Popen[str]", timeout: float = 600) -> Done:
    """Wait for a command."""
    with process:
        said = process.communicate(timeout=timeout)[0]
    return Done(process.returncode, said)


def kill(process: "subprocess.Popen[str]", whole: bool) -> bool:
    """SIGKILL to a command alone, or to its whole group; whether it was still running."""
    running = process.poll() is None
    if running and not whole:
        process.kill()
        process.wait()
        time.sleep(1.5)  # workers look once a second whether their owner lives
    # What is left of the group must not run on into the next attempt, which a new machine would not have either.
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    finish(process)
    return running


def outputs(work: Path) -> Iterator[Path]:
    """The outputs that stages have finished, by what their names say."""
    for pattern in OUTPUTS:
        yield from (path for path in sorted(work.glob(pattern)) if not path.name.startswith("."))


@dataclass(frozen=True)
class State:
    """What a run came to, but for what a clock or chance decides.

    `files`: sha256 by name; `versions`: of the registered model, with their metrics and tags.
    """

    files: Mapping[str, str] = field(default_factory=dict)
    versions: Mapping[str, object] = field(default_factory=dict)


def state(folder: Path) -> State:
    """What lies in a project's work folder and in its registry."""
    work = folder / "data" / "tiny"
    files = {}
    for path in sorted(work.rglob("*")):
        hidden = any(part.startswith(".") for part in path.relative_to(work).parts)
        if (
            path.is_file()
            and not hidden
            and path.name not in CLOCKED
            and path.parent.name != "report"
        ):
            files[path.relative_to(work).as_posix()] = hashlib.sha256(path.read_bytes()).hexdigest()
    for name in ("results.json", "table.md"):
        files[f"report/{name}"] = hashlib.sha256((work / "report" / name).read_bytes()).hexdigest()
    with closing(sqlite3.connect(folder / "mlflow.db")) as database:
        rows = database.execute(
            "SELECT name, version, run_id FROM model_versions ORDER BY version"
        ).fetchall()
        versions = {
            f"{name}/{version}": sorted(
                database.execute(
                    "SELECT key, value, step FROM metrics WHERE run_uuid = ?", (run,)
                ).fetchall()
            )
            for name, version, run in rows
        }
    return State(
        files,
        {key: [one for one in found if "seconds" not in one[0]] for key, found in versions.items()},
    )


def places(work: Path) -> dict[Path, int]:
    """Of every finished output, the inode of what its stage noted when it made it: another one for each time.

    The output's own will not do: DVC puts links and copies in the place of what it keeps.
    """
    notes = {path: path.with_name(f".{path.name}{COST}") for path in outputs(work)}
    return {path: note.stat().st_ino for path, note in notes.items() if note.is_file()}


def broken(path: Path, how: str, chance: random.Random, other: Path | None = None) -> None:
    """Do to an output what disks and people do: "flip" a bit, "cut" it, "empty", "delete" or "swap" it for another."""
    if how == "delete":
        shutil.rmtree(path) if path.is_dir() else path.unlink()
        return
    if how == "swap" and other is not None:
        spare = path.with_name("spare")
        path.rename(spare)
        other.rename(path)
        spare.rename(other)
        return
    files = (
        [path]
        if path.is_file()
        else sorted(one for one in path.rglob("*") if one.is_file() and one.stat().st_size)
    )
    file = chance.choice(files)
    content = bytearray(file.read_bytes())
    if how == "flip":
        content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
    file.unlink()  # a merged model's encoder is linked to from its tasks; only this name of it rots
    file.write_bytes(
        {"flip": bytes(content), "cut": bytes(content[: len(content) // 2]), "empty": b""}[how]
    )


def versions(folder: Path) -> int:
    """How many versions are registered."""
    with closing(sqlite3.connect(folder / "mlflow.db")) as database:
        return int(database.execute("SELECT count(*) FROM model_versions").fetchone()[0])


def registered(folder: Path) -> dict[str, object]:
    """What the run says that it registered."""
    found: dict[str, object] = json.loads((folder / "data/tiny/registered.json").read_text())
    return found
