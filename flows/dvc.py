"""dvc.lock kept in step with what a flow made."""

import os
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path

from fmn.terminal import say

PATIENCE = 120.0  # seconds to wait for another DVC process
_BUSY = ("Unable to acquire lock", "is busy, it is being blocked by")


def keep_in_step(profile: Path, outputs: Iterable[Path]) -> None:
    """Record in dvc.lock what the flow made, so that `dvc repro` has nothing to do.

    Only for the profile that dvc.yaml describes, ``params.yaml``, and not inside a DVC stage. Where DVC cannot do it, a
    line says so: its stages then find out by themselves, a few seconds each.
    """
    lock = Path("dvc.lock")
    here = profile.resolve() == Path("params.yaml").resolve() and Path("dvc.yaml").is_file() and Path(".dvc").is_dir()
    if not here or "DVC_STAGE" in os.environ:
        return
    if lock.is_file() and all(path.stat().st_mtime <= lock.stat().st_mtime for path in outputs):
        return
    deadline, told = time.monotonic() + PATIENCE, False
    while True:
        command = [sys.executable, "-m", "dvc", "commit", "--force"]
        commit = subprocess.run(command, capture_output=True, text=True, check=False)
        if commit.returncode == 0:
            lock.touch()  # DVC leaves it alone where nothing is new to it
            return
        reason = " ".join(commit.stderr.rpartition("ERROR: ")[2].split())
        if not any(word in reason for word in _BUSY) or time.monotonic() > deadline:
            say(f"DVC was not brought in step: {reason}; `dvc commit --force` does it")
            return
        if not told:
            say(f"DVC is busy; waiting for it, {PATIENCE:.0f} s at most")
            told = True
        time.sleep(2)
