"""dvc.lock, kept in step with what a flow computed."""

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path

import psutil

from fmn.terminal import say

PATIENCE = 120.0  # seconds to wait for another DVC process
_BUSY = re.compile("Unable to acquire lock|is busy")


def keep_in_step(profile: Path, outputs: Iterable[Path]) -> None:
    """Record in dvc.lock what the flow computed, so that `dvc repro` has nothing to do.

    Only for params.yaml, which dvc.yaml describes, and not inside a DVC stage. Where DVC fails, a
    line says so: its stages then find out by themselves, a few seconds each.
    """
    lock = Path("dvc.lock")
    is_described = profile.resolve() == Path("params.yaml").resolve()
    has_dvc = Path("dvc.yaml").is_file() and Path(".dvc").is_dir()
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
        lock.touch()  # DVC leaves the file alone where nothing is new to it


def _commit() -> str | None:
    """Record all outputs as they are; what DVC said if it could not."""
    # In the middle of a stage, another DVC process wants back the lock that a commit would take.
    try:
        holders = json.loads(Path(".dvc/tmp/rwlock").read_text()).get("write", {}).values()
    except (OSError, ValueError):
        holders = ()
    if any(psutil.pid_exists(holder["pid"]) for holder in holders):
        return "DVC is busy"
    command = [sys.executable, "-m", "dvc", "commit", "--force"]
    commit = subprocess.run(command, capture_output=True, text=True, check=False)
    return " ".join(commit.stderr.rpartition("ERROR: ")[2].split()) if commit.returncode else None
