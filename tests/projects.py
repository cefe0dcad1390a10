"""A project as a user has it: a working folder with git, DVC, this checkout's code and settings."""

import csv
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pyarrow.parquet as pq
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

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


# Two experts that somebody else fine-tuned, on GLUE and on rows of their own.
OWN_PROFILE = """
work: data/tiny
base: source
experts: {tasks: [sst2, mood]}
tasks:
  mood:
    dataset: {path: my rows, data_files: {train: first.csv, validation: second.csv}}
    columns: {text: What they wrote, label: "Mood, roughly"}
    metrics: [accuracy]
sources: {sst2: models/sst2, mood: models/mood}
data: {source: embedded}
fisher: {samples: 32}
registry: {name: tiny}
"""
MOODS = ("glad", "so-so", "cross")


def make_own_project(folder: Path, base: Path) -> Path:
    """A project with `OWN_PROFILE`: experts of plain Transformers, and rows in CSV files."""
    project = make_project(folder, base)
    (project / "params.yaml").write_text(OWN_PROFILE)
    rows = {mood: f"{mood} is what {{}} wrote, all {mood}" for mood in MOODS}
    for split, count in (("first", 60), ("second", 30)):
        lines = [(rows[MOODS[n % 3]].format(n), MOODS[n % 3]) for n in range(count)]
        write_rows(project / f"my rows/{split}.csv", lines)
    sentences = pq.read_table(project / "data/miniature_glue/sst2/train.parquet").slice(0, 60)
    names = ("negative", "positive")
    reviews = [(row["sentence"], names[row["label"]]) for row in sentences.to_pylist()]
    fine_tune_elsewhere(base, project / "models/sst2", names, reviews)
    # Its labels are in an order of their own.
    own = read_rows(project / "my rows/first.csv")
    fine_tune_elsewhere(base, project / "models/mood", MOODS[::-1], own)
    return project


def write_rows(path: Path, rows: Sequence[tuple[str, str]]) -> None:
    path.parent.mkdir(exist_ok=True)
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([("Mood, roughly", "What they wrote"), *(r[::-1] for r in rows)])


def read_rows(path: Path) -> list[tuple[str, str]]:
    """The texts and labels of `write_rows`."""
    with path.open(newline="") as file:
        return [(text, mood) for mood, text in list(csv.reader(file))[1:]]


def fine_tune_elsewhere(
    base: Path, out: Path, names: Sequence[str], rows: Sequence[tuple[str, str]]
) -> None:
    """Fine-tune an expert with Transformers alone."""
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(base)
    model = AutoModelForSequenceClassification.from_pretrained(
        base, id2label=dict(enumerate(names)), label2id={name: n for n, name in enumerate(names)}
    )
    batch = tokenizer([text for text, _ in rows], padding=True, return_tensors="pt")
    labels = torch.tensor([names.index(name) for _, name in rows])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(20):
        model(**batch, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)


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


def repro(folder: Path, *arguments: str) -> list[str]:
    """The stages that `dvc repro` runs, without `settings`, which always runs."""
    lines = dvc(folder, "repro", *arguments).splitlines()
    return [
        line.split("'")[1]
        for line in lines
        if line.startswith("Running stage") and "'settings'" not in line
    ]
