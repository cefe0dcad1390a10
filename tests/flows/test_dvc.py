"""dvc.lock after a flow: in step where DVC describes the profile, and never at the price of the run."""

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from flows import dvc

STAGES = "stages: {one: {cmd: 'echo 1 > out', outs: [out: {persist: true}]}}\n"


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A DVC project whose only output somebody else has made."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DVC_STAGE", raising=False)
    run("git", "init", "-q")
    run(sys.executable, "-m", "dvc", "init", "-q")
    Path("dvc.yaml").write_text(STAGES)
    Path("params.yaml").write_text("")
    Path("out").write_text("1\n")
    return tmp_path


def run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return done.stdout + done.stderr


def keep(profile: str = "params.yaml") -> None:
    dvc.keep_in_step(Path(profile), [Path("out")])


def test_dvc_has_nothing_to_do_after_a_flow(project: Path) -> None:
    keep()
    assert "up to date" in run(sys.executable, "-m", "dvc", "status")
    first = Path("dvc.lock").read_text()
    Path("out").write_text("2\n")
    keep()
    assert Path("dvc.lock").read_text() != first
    assert "up to date" in run(sys.executable, "-m", "dvc", "status")


def test_what_is_in_step_is_left_alone(project: Path) -> None:
    keep()
    os.utime("dvc.lock", (2e9, 2e9))
    keep()
    assert Path("dvc.lock").stat().st_mtime == 2e9


def test_only_the_profile_that_dvc_describes_is_its_business(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keep("other.yaml")
    monkeypatch.setenv("DVC_STAGE", "one")
    keep()
    monkeypatch.delenv("DVC_STAGE")
    Path("dvc.yaml").unlink()
    keep()
    assert not Path("dvc.lock").exists()


def test_a_busy_dvc_is_waited_for(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    holder = {"pid": os.getpid(), "cmd": "dvc repro"}
    busy = project / ".dvc" / "tmp" / "rwlock"
    busy.write_text(json.dumps({"write": {str(project / "out"): holder}, "read": {}}))
    threading.Timer(3, busy.unlink).start()
    started = time.monotonic()
    keep()
    assert time.monotonic() - started > 3
    assert Path("dvc.lock").is_file()
    assert capsys.readouterr().out == "DVC is busy; waiting for it, 120 s at most\n"


def test_a_dvc_that_stays_busy_or_fails_costs_a_line(
    project: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(dvc, "PATIENCE", 0.0)
    holder = {"pid": os.getpid(), "cmd": "dvc repro"}
    busy = project / ".dvc" / "tmp" / "rwlock"
    busy.write_text(json.dumps({"write": {str(project / "out"): holder}, "read": {}}))
    keep()
    assert "DVC is busy; `dvc commit --force` does it\n" in capsys.readouterr().out
    busy.write_text(
        json.dumps({"write": {str(project / "out"): {**holder, "pid": 2**22}}, "read": {}})
    )
    Path("out").unlink()
    dvc.keep_in_step(Path("params.yaml"), [])
    said = capsys.readouterr().out
    assert said.startswith("DVC was not brought in step: ")
    assert said.count("\n") == 1
    assert "out" in said
