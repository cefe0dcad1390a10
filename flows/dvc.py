"""The files that `dvc repro` needs, and the update of dvc.lock after a flow."""

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path

import psutil

from flows.graph import DVC_HEADER, dvc_yaml
from fmn import params
from fmn.errors import UserError
from fmn.rows.stages import quickstart_files
from fmn.store import artifacts
from fmn.store.yaml_file import read_yaml
from fmn.terminal import say

PARAMS, STAGES = Path("params.yaml"), Path("dvc.yaml")
PATIENCE = 120.0  # seconds to wait for another DVC process
_BUSY = re.compile("Unable to acquire lock|is busy")


def describe() -> list[Path]:
    """Write dvc.yaml, the pipeline of params.yaml, and make the folder one of DVC's if it is none.

    If a flow has run already, dvc.lock gets its outputs, so that `dvc repro` repeats nothing.

    Returns:
        what was written.

    Raises:
        UserError: the settings do not name `work`, or dvc.yaml is somebody else's.
    """
    settings = params.load(PARAMS)
    if "work" not in read_yaml(PARAMS):
        raise UserError(f"{PARAMS}: lacks work, which DVC's paths begin with; add `work: data/run`")
    if STAGES.exists() and not STAGES.read_text().startswith(DVC_HEADER[:14]):
        raise UserError(f"{STAGES}: was not written by fmn; move it away")
    written = [STAGES]
    ignore = Path(settings.work) / ".gitignore"  # DVC itself ignores only what it caches
    if not ignore.exists():
        ignore.parent.mkdir(parents=True, exist_ok=True)
        ignore.write_text("*\n!.gitignore\n")
        written.append(ignore)
    with artifacts.atomic_file(STAGES) as partial:
        partial.write_text(dvc_yaml())
    if not any((folder / ".dvc").is_dir() for folder in (Path.cwd(), *Path.cwd().parents)):
        _initialise()
        written += [Path(".dvc"), Path(".dvcignore")]
    if (registered := Path(settings.work) / "registered.json").is_file():
        keep_in_step(PARAMS, [registered])
    return written


def _initialise() -> None:
    """`dvc init` with the checkout's settings; without git where there is no repository."""
    git = subprocess.run(
        ["git", "rev-parse", "--show-prefix"], capture_output=True, text=True, check=False
    )
    in_folder = ["--subdir"] if git.stdout.strip() else []
    options = ["--no-scm"] if git.returncode else in_folder
    command = [sys.executable, "-m", "dvc", "init", "--quiet", *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise UserError(f"dvc init: {' '.join((done.stderr or done.stdout).split())}")
    config, files = Path(".dvc/config"), quickstart_files()
    core = config.read_text() or "[core]\n"  # it may say that there is no git
    config.write_text((files / config).read_text().replace("[core]\n", core))
    Path(".dvcignore").write_text((files / ".dvcignore").read_text())


def keep_in_step(profile: Path, outputs: Iterable[Path]) -> None:
    """Record the outputs of a flow in dvc.lock, so that `dvc repro` has nothing to do.

    This is only for params.yaml, which dvc.yaml describes, and not inside a DVC stage. If DVC
    fails, a line reports it; `dvc repro` then checks each stage itself, which takes seconds each.
    """
    lock = Path("dvc.lock")
    is_described = profile.resolve() == PARAMS.resolve()
    has_dvc = STAGES.is_file() and Path(".dvc").is_dir()
    if not (is_described and has_dvc) or "DVC_STAGE" in os.environ:
        return
    if lock.is_file() and all(path.stat().st_mtime <= lock.stat().st_mtime for path in outputs):
        return
    deadline = time.monotonic() + PATIENCE
    while (problem := _commit()) and _BUSY.search(problem) and time.monotonic() < deadline:
        time.sleep(1)
    if problem:
        say(f"DVC was not brought in step: {problem}; `dvc commit --force` does it")
    else:
        lock.touch()  # DVC does not write the file if nothing changed


def _commit() -> str | None:
    """Record all outputs with `dvc commit`; returns DVC's message if it failed."""
    # Another DVC process in the middle of a stage needs the lock that a commit would take.
    try:
        holders = json.loads(Path(".dvc/tmp/rwlock").read_text()).get("write", {}).values()
    except (OSError, ValueError):
        holders = ()
    if any(psutil.pid_exists(holder["pid"]) for holder in holders):
        return "DVC is busy"
    command = [sys.executable, "-m", "dvc", "commit", "--force"]
    commit = subprocess.run(command, capture_output=True, text=True, check=False)
    return " ".join(commit.stderr.rpartition("ERROR: ")[2].split()) if commit.returncode else None
