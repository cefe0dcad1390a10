"""The whole pipeline in a project of its own: a flow, DVC, and each in step with the other."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT

PROFILE = """
work: data/tiny
base: {base}
experts: {{tasks: [sst2, stsb]}}
sources: {{}}
finetune:
  sst2: {{epochs: 1, learning_rate: 1.0e-3, examples: 64}}
  stsb: {{epochs: 1, learning_rate: 1.0e-3, examples: 64}}
data: {{source: embedded}}
fisher: {{estimator: empirical, samples: 32, seed: 0}}
merge: {{method: mask-fisher, mapping: structured}}
evaluate: {{dtype: float32}}
registry: {{name: tiny}}
"""


@pytest.fixture(scope="module")
def project(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A git and DVC project with this checkout's stages and a tiny profile."""
    folder = tmp_path_factory.mktemp("project")
    for name in ("fmn", "flows"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("dvc.yaml", ".dvcignore", ".gitignore"):
        shutil.copy(ROOT / name, folder / name)
    (folder / "data").mkdir()
    shutil.copy(ROOT / "data" / ".gitignore", folder / "data")
    shutil.copytree(tiny_base, folder / "source")
    (folder / "params.yaml").write_text(PROFILE.format(base="source"))
    run(folder, "git", "init", "-q")
    run(folder, sys.executable, "-m", "dvc", "init", "-q")
    return folder


def run(folder: Path, *command: str, fails: bool = False, stdout: bool = False) -> str:
    """What a command prints (on standard output alone); it runs with its own Prefect home and the project's code."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PREFECT", "MLFLOW"))}
    environment |= {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}",
        "PREFECT_HOME": str(folder / ".prefect"),
        "PYTHONPATH": str(folder),
        "OMP_NUM_THREADS": "1",
        "DVC_NO_ANALYTICS": "1",
        "COLUMNS": "100",
    }
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    said = done.stdout + done.stderr
    assert (done.returncode != 0) == fails, said
    return done.stdout if stdout else said


def flow(folder: Path, *arguments: str, fails: bool = False, stdout: bool = False) -> str:
    return run(folder, sys.executable, "-m", "fmn", "run", *arguments, fails=fails, stdout=stdout)


def dvc(folder: Path, *arguments: str) -> str:
    return run(folder, sys.executable, "-m", "dvc", *arguments)


def test_flow_and_dvc_never_repeat_each_other(project: Path) -> None:
    first = flow(project)
    assert "already there" not in first
    assert "models:/tiny/1" in first
    for unwanted in ("Traceback", "Warning", "WARNING", "Error"):
        assert unwanted not in first, first
    assert all(len(line) <= 100 for line in first.splitlines())

    second = flow(project)
    assert second.count("already there") == len([line for line in first.splitlines() if line.endswith(" s")]) - 1
    assert "nothing had changed" in second
    assert "models:/tiny/1" in second, "nothing new is registered"

    stated = json.loads(flow(project, "--json", stdout=True))
    assert (stated["computed"], stated["registered"]["version"]) == (False, "1")

    assert "Data and pipelines are up to date" in dvc(project, "repro")
    assert "up to date" in dvc(project, "status")
    assert "tasks.sst2.merged.score" in dvc(project, "metrics", "show")
    assert not [path for path in (project / "data").rglob(".gitignore") if path.parent != project / "data"]

    # A new setting, through DVC this time: what depends on it is made, and the flow has nothing left to do.
    profile = (project / "params.yaml").read_text()
    (project / "params.yaml").write_text(profile.replace("mapping: structured", "mapping: paper"))
    rebuilt = dvc(project, "repro")
    ran = [line.split("'")[1] for line in rebuilt.splitlines() if line.startswith("Running stage")]
    assert ran == ["merge", "evaluate@merged", "report", "register"]
    third = flow(project)
    assert "nothing had changed" in third
    assert "models:/tiny/2" in third


@pytest.mark.slow
def test_dvc_builds_everything_from_nothing_and_the_flow_agrees(project: Path) -> None:
    flow(project)
    shutil.rmtree(project / "data" / "tiny")
    dvc(project, "repro", "--force")
    assert "nothing had changed" in flow(project)


def test_a_mistake_in_the_profile_is_told_before_anything_starts(project: Path) -> None:
    (project / "wrong.yaml").write_text(PROFILE.format(base="source").replace("sst2:", "sst:"))
    said = flow(project, "--params", "wrong.yaml", fails=True)
    assert said.startswith("fmn: wrong.yaml: ")
    assert said.count("\n") == 1


def test_a_stage_that_fails_is_named_and_the_others_are_kept(project: Path) -> None:
    profile = (
        PROFILE.format(base="source")
        .replace("data/tiny", "data/other")
        .replace("sources: {}", "sources: {stsb: nowhere}")
    )
    lines = [line for line in profile.splitlines() if not line.startswith("  stsb:")]
    (project / "other.yaml").write_text("\n".join(lines))
    said = flow(project, "--params", "other.yaml", fails=True)
    assert said.splitlines()[-1].startswith("fmn: fetch stsb: ")
    assert "Traceback" not in said
    assert (project / "data/other/experts/sst2/model.safetensors").is_file()
    assert not (project / "data/other/merged").exists()


@pytest.mark.slow
def test_a_version_is_made_again_from_what_it_was_registered_with(project: Path) -> None:
    flow(project)
    version = "models:/tiny@champion"
    shown = run(project, sys.executable, "-m", "fmn", "reproduce", version)
    assert "fine-tuned: epochs 1.0" in shown
    again = run(project, sys.executable, "-m", "fmn", "reproduce", version, "--run", "--out", "again")
    assert "all digests are the same" in again
    assert "differs" not in again
    assert "register" not in again
    (project / "source").rename(project / "moved")
    said = run(project, sys.executable, "-m", "fmn", "reproduce", version, "--run", "--out", "other", fails=True)
    (project / "moved").rename(project / "source")
    assert said.splitlines()[-1].endswith("source, which is not there any more; put it back there")
    assert not (project / "other").exists()
