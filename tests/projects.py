"""A project as a user has it: a working folder with git, DVC, this checkout's code and settings."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from tests.conftest import ROOT

PROFILE = """
work: data/tiny
base: source
experts: {tasks: [sst2, stsb]}
sources: {}
finetune:
  sst2: {epochs: 1, learning_rate: 1.0e-3, examples: 64}
  stsb: {epochs: 1, learning_rate: 1.0e-3, examples: 64}
data: {source: embedded}
fisher: {estimator: empirical, samples: 32, seed: 0}
merge: {method: mask-fisher, mapping: structured}
evaluate: {dtype: float32}
registry: {name: tiny}
"""
FMN, DVC = (sys.executable, "-m", "fmn"), (sys.executable, "-m", "dvc")


def make_project(folder: Path, base: Path) -> Path:
    """Fill a folder with the code, the stages, the settings, and the base as `source`."""
    folder.mkdir(exist_ok=True)
    for name in ("fmn", "flows"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("dvc.yaml", "prefect.yaml", ".dvcignore", ".gitignore"):
        shutil.copy(ROOT / name, folder / name)
    shutil.copytree(ROOT / "data" / "miniature_glue", folder / "data" / "miniature_glue")
    shutil.copy(ROOT / "data" / ".gitignore", folder / "data")
    shutil.copytree(base, folder / "source")
    (folder / "params.yaml").write_text(PROFILE)
    run(folder, "git", "init", "-q")
    run(folder, "git", "config", "user.name", "Somebody")
    run(folder, "git", "config", "user.email", "somebody@example.org")
    dvc(folder, "init", "-q")
    shutil.copy(ROOT / ".dvc" / "config", folder / ".dvc")
    return folder


def take_folders_as_experts(project: Path, experts: Path) -> None:
    """Let a project fetch its experts from folders of its own, `models/TASK`."""
    for task in ("sst2", "stsb"):
        shutil.copytree(experts / task, project / "models" / task)
        (project / "models" / task / "fmn.json").unlink()
    head, rest = PROFILE.split("sources:")
    sources = "sources: {sst2: models/sst2, stsb: models/stsb}\n"
    (project / "params.yaml").write_text(head + sources + rest[rest.index("data:") :])


def environment(folder: Path) -> dict[str, str]:
    """This process's environment, with the project's code, Prefect home and registry."""
    hidden = ("PREFECT", "MLFLOW", "FMN")
    ours = {name: value for name, value in os.environ.items() if not name.startswith(hidden)}
    return ours | {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{ours['PATH']}",
        "PREFECT_HOME": str(folder / ".prefect"),
        "PYTHONPATH": str(folder),
        "OMP_NUM_THREADS": "1",
        "DVC_NO_ANALYTICS": "1",
        "COLUMNS": "100",
    }


def start(folder: Path, *command: str, **variables: str) -> "subprocess.Popen[str]":
    """A command in the project, under way."""
    return subprocess.Popen(
        command, cwd=folder, env=environment(folder) | variables,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def run(
    folder: Path, *command: str, fails: bool = False, stdout: bool = False, **variables: str
) -> str:
    """What a command prints (on standard output alone)."""
    with start(folder, *command, **variables) as process:
        out, err = process.communicate()
    assert (process.returncode != 0) == fails, out + err
    return out if stdout else out + err


def flow(
    folder: Path, *arguments: str, fails: bool = False, stdout: bool = False, **variables: str
) -> str:
    """What `fmn run` prints."""
    return run(folder, *FMN, "run", *arguments, fails=fails, stdout=stdout, **variables)


def dvc(folder: Path, *arguments: str) -> str:
    """What a DVC command prints."""
    return run(folder, *DVC, *arguments)


def repro(folder: Path) -> list[str]:
    """The stages that `dvc repro` runs."""
    lines = dvc(folder, "repro").splitlines()
    return [line.split("'")[1] for line in lines if line.startswith("Running stage")]
