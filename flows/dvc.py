"""dvc.lock kept in step with what a flow made."""

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path

from fmn.terminal import say

PATIENCE = 120.0  # seconds to wait for another DVC process
_BUSY = re.compile("Unable to acquire lock|is busy")


def keep_in_step(profile: Path, outputs: Iterable[Path]) -> None:
    """Record in dvc.lock what the flow made, so that `dvc repro` has nothing to do.

    Only for the profile that dvc.yaml describes, ``params.yaml``, and not inside a DVC stage. Where DVC cannot do it, a
    line says so: its stages then find out by themselves, a few seconds each.
    """
    lock = Path("dvc.lock")
    here = (
        profile.resolve() == Path("params.yaml").resolve()
        and Path("dvc.yaml").is_file()
        and Path(".dvc").is_dir()
    )
    if not here or "DVC_STAGE" in os.environ:
        return
    if lock.is_file() and all(path.stat().st_mtime <= lock.stat().st_mtime for path in outputs):
        return
    deadline, told = time.monotonic() + PATIENCE, False
    while (reason := _commit()) and _BUSY.search(reason) and time.monotonic() < deadline:
        if not told:
            say(f"DVC is busy; waiting for it, {PATIENCE:.0f} s at most")
            told = True
        time.sleep(1)
    if reason:
        say(f"DVC was not brought in step: {reason}; `dvc commit --force` does it")
    else:
        lock.touch()  # DVC leaves it alone where nothing is new to it


def _commit() -> str | None:
    """Record all outputs as they are; what DVC said if it could not."""
    if _runs_stages():
        return "DVC is busy"
    command = [sys.executable, "-m", "dvc", "commit", "--force"]
    commit = subprocess.run(command, capture_output=True, text=True, check=False)
    return " ".join(commit.stderr.rpartition("ERROR: ")[2].split()) if commit.returncode else None


def _runs_stages() -> bool:
    """Whether another DVC process is in the middle of a stage: then it wants back the lock that a commit would take."""
    try:
        held = json.loads(Path(".dvc/tmp/rwlock").read_text())
    except (OSError, ValueError):
        return False
    return any(_lives(holder["pid"]) for holder in held.get("write", {}).values())


def _lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
