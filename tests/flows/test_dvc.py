"""dvc.lock after a flow: in step where DVC describes the run, and never at the price of the run."""

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from flows import dvc
from fmn.errors import UserError

SETTINGS = """
base: base
experts: {tasks: [sst2, mrpc]}
sources: {sst2: models/sst2, mrpc: models/mrpc}
registry: {name: x}
"""
STAGES = "stages: {one: {cmd: 'echo 1 > out', outs: [out: {persist: true}]}}\n"


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A DVC project whose only output was made by something else."""
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


def keep_in_step(profile: str = "params.yaml") -> None:
    dvc.keep_in_step(Path(profile), [Path("out")])


def hold_lock(project: Path, process: int) -> Path:
    """Let DVC's lock file say that a process is in the middle of a stage."""
    lock = project / ".dvc" / "tmp" / "rwlock"
    holder = {"pid": process, "cmd": "dvc repro"}
    lock.write_text(json.dumps({"write": {str(project / "out"): holder}, "read": {}}))
    return lock


def test_dvc_has_nothing_to_do_after_a_flow(project: Path) -> None:
    keep_in_step()
    first = Path("dvc.lock").read_text()
    Path("out").write_text("2\n")
    keep_in_step()
    assert Path("dvc.lock").read_text() != first
    assert "up to date" in run(sys.executable, "-m", "dvc", "status")
    os.utime("dvc.lock", (2e9, 2e9))
    keep_in_step()
    assert Path("dvc.lock").stat().st_mtime == 2e9, "what is in step is left alone"


@pytest.mark.parametrize("is_git", [True, False])
def test_a_folder_becomes_a_project_of_dvc(
    is_git: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "a project"
    folder.mkdir()
    monkeypatch.chdir(folder)
    if is_git:  # whose root is another folder
        run("git", "init", "-q", str(tmp_path))
    Path("params.yaml").write_text(SETTINGS)
    with pytest.raises(UserError, match="lacks work"):
        dvc.describe()
    Path("params.yaml").write_text(f"work: data/x\n{SETTINGS}")
    names = ["dvc.yaml", "data/x/.gitignore", ".dvc", ".dvcignore"]
    assert list(map(str, dvc.describe())) == names
    assert list(map(str, dvc.describe())) == ["dvc.yaml"], "again"
    Path("data/x/base").mkdir()
    Path("data/x/base/model.safetensors").write_text("large")
    assert not is_git or "safetensors" not in run("git", "add", "--dry-run", "--all")
    listing = run(sys.executable, "-m", "dvc", "stage", "list", "--name-only").split()
    assert {"settings", "fetch@sst2", "fisher@mrpc", "models"} <= set(listing)
    Path("dvc.yaml").write_text("stages: {}\n")
    with pytest.raises(UserError, match="was not written by fmn"):
        dvc.describe()


def test_only_the_settings_that_dvc_describes_are_its_business(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keep_in_step("other.yaml")
    monkeypatch.setenv("DVC_STAGE", "one")
    keep_in_step()
    monkeypatch.delenv("DVC_STAGE")
    Path("dvc.yaml").unlink()
    keep_in_step()
    assert not Path("dvc.lock").exists()


def test_a_busy_dvc_is_waited_for(project: Path) -> None:
    threading.Timer(1, hold_lock(project, os.getpid()).unlink).start()
    started = time.monotonic()
    keep_in_step()
    assert time.monotonic() - started > 1
    assert Path("dvc.lock").is_file()


def test_a_dvc_that_stays_busy_or_fails_costs_a_line(
    project: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(dvc, "PATIENCE", 0.0)
    hold_lock(project, os.getpid())
    keep_in_step()
    assert "DVC is busy; `dvc commit --force` does it\n" in capsys.readouterr().out
    hold_lock(project, 2**22)  # of a process that is gone
    Path("out").unlink()
    dvc.keep_in_step(Path("params.yaml"), [])
    output = capsys.readouterr().out
    assert output.startswith("DVC was not brought in step: ")
    assert output.count("\n") == 1
    assert "out" in output
