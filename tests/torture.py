"""What tests of kills, damage and crowds share: a pipeline of seconds, and what it came to."""

import os
import random
import re
import shutil
import signal
import sqlite3
import subprocess
import time
from collections.abc import Mapping
from contextlib import closing, suppress
from pathlib import Path
from typing import NamedTuple

from fmn.store import artifacts
from fmn.store.stage import sidecar_path
from tests import projects

MORE = """
gram: {sst2: {samples: 32}, stsb: {samples: 32}}
realign: {realigned: {texts: 16}}
"""
# Where the outputs of the stages lie below the work folder.
OUTPUTS = (
    "base", "data/*", "experts/*", "fisher/*", "gram/*", "models/*",
    "metrics/experts/*.json", "metrics/*.json", "report", "registered.json",
)  # fmt: skip
# Files that say when something happened, or how long it took.
CLOCKS = re.compile(r"run\.log|registered\.json.*|cost\.svg|report/(?!results\.json|table\.md).*")
SECONDS = re.compile(rb'"seconds": [\d.e+-]+')


def make_project(folder: Path, base: Path) -> Path:
    """A project that also computes Gram matrices and re-aligns the heads."""
    projects.make_project(folder, base)
    merge = "method: mask-fisher, mapping: structured"
    settings = projects.PROFILE.replace(merge, "method: fisher-regmean")
    (folder / "params.yaml").write_text(settings.rstrip() + MORE)
    return folder


def start(folder: Path, *command: str) -> "subprocess.Popen[str]":
    """A command in a process group of its own."""
    return subprocess.Popen(
        command, cwd=folder, env=projects.environment(folder), stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True, start_new_session=True,
    )  # fmt: skip


def flow(folder: Path) -> "subprocess.Popen[str]":
    """`fmn run`, started."""
    return start(folder, *projects.FMN, "run")


def finish(process: "subprocess.Popen[str]", timeout: float = 600) -> str:
    """Wait for a command, which must succeed; returns all that it printed."""
    with process:
        output = process.communicate(timeout=timeout)[0]
    assert process.returncode == 0, output
    assert "Traceback" not in output
    return output


def kill(process: "subprocess.Popen[str]", whole_group: bool) -> bool:
    """Kill a command alone, or with its whole group; whether it was still running."""
    is_running = process.poll() is None
    if is_running and not whole_group:
        process.kill()
        process.wait()
        time.sleep(1.5)  # workers look once a second whether their owner lives
    # What is left of the group must not run on into the next attempt.
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    with process:
        process.communicate()
    return is_running


def outputs(work: Path) -> list[Path]:
    """The outputs that stages have finished."""
    paths = [path for pattern in OUTPUTS for path in sorted(work.glob(pattern))]
    return [path for path in paths if path.name[0] != "." and not path.name.endswith("fmn.json")]


def computations(work: Path) -> dict[Path, bytes]:
    """The sidecar of every finished output: its run time tells one computation from another."""
    sidecars = {path: sidecar_path(path) for path in outputs(work)}
    return {path: file.read_bytes() for path, file in sidecars.items() if file.is_file()}


class State(NamedTuple):
    """What a run came to, but for what a clock decides."""

    files: Mapping[str, str]  # sha256 by name
    versions: Mapping[str, object]  # metrics of every version of the registered model


def state(folder: Path) -> State:
    """What lies in a project's work folder and in its registry."""
    files = {
        name: artifacts.digest_bytes(SECONDS.sub(b"", path.read_bytes()))
        for name, path in artifacts.visible(folder / "data" / "tiny").items()
        if not CLOCKS.fullmatch(name)
    }
    with closing(sqlite3.connect(folder / "mlflow.db")) as database:
        metrics = "SELECT key, value, step FROM metrics WHERE run_uuid = ? AND key NOT LIKE ?"
        versions = {
            f"{name}/{version}": sorted(database.execute(metrics, (run, "%seconds%")))
            for name, version, run in database.execute(
                "SELECT name, version, run_id FROM model_versions ORDER BY version"
            ).fetchall()
        }
    return State(files, versions)


def damage(path: Path, how: str, chance: random.Random, other: Path | None = None) -> None:
    """Do to an output what disks and people do.

    Args:
        path: the output.
        how: "flip" a bit, "cut" a file, "empty" it, "delete" the output, or "swap" it for `other`.
        chance: chooses the file and the bit.
        other: another output.
    """
    if how == "delete":
        shutil.rmtree(path) if path.is_dir() else path.unlink()
        return
    if other is not None:
        spare = path.rename(path.with_name("spare"))
        other.rename(path)
        spare.rename(other)
        return
    files = [file for file in sorted(path.rglob("*")) if file.is_file() and file.stat().st_size]
    file = chance.choice(files) if path.is_dir() else path
    content = bytearray(file.read_bytes())
    if how == "flip":
        content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
    file.unlink()  # a merged model's encoder has a second name, which stays intact
    length = {"flip": len(content), "cut": len(content) // 2, "empty": 0}[how]
    file.write_bytes(content[:length])
