"""Update dvc.lock after a flow."""

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
    """Record the outputs of a flow in dvc.lock, so that `dvc repro` has nothing to do.

    This is only for params.yaml, which dvc.yaml describes, and not inside a DVC stage. If DVC
    fails, a line reports it; `dvc repro` then checks each stage itself, which takes seconds each.
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
