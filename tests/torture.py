"""What tests of kills, damage and crowds share: a pipeline of seconds, and what it came to."""

import csv
import json
import os
import random
import re
import shutil
import signal
import sqlite3
import subprocess
import time
from collections.abc import Mapping
from contextlib import closing, suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np

from flows import graph
from fmn import params
from fmn.store import artifacts
from fmn.store.stage import read_sidecar, sidecar_path
from tests import projects, sentences

PROFILE = """
work: data/tiny
base: source
experts: {tasks: [mood, ner, near]}
tasks:
  mood:
    dataset: {path: rows, data_files: {train: train.csv, validation: dev.csv}}
  ner:
    task: token-classification
    dataset: {path: rows, data_files: {train: train.conll, validation: dev.conll}}
    max_length: 8
  near:
    task: sentence-similarity
    columns: {text: text, text_pair: text_pair}
    dataset: {path: rows, data_files: {train: train.jsonl, validation: dev.jsonl}}
sources: {mood: models/mood}
finetune:
  ner: {epochs: 2, learning_rate: 3.0e-3}
  near: {epochs: 2, learning_rate: 3.0e-3}
fisher: {samples: 64}
gram: {mood: {samples: 64}, ner: {samples: 64}, near: {samples: 64}}
merge: {method: auto}
calibrate: {texts: 32}
realign: {realigned: {texts: 32}, realigned-own: {texts: 32, own_layers: 1}}
evaluate: {dtype: float32}
registry: {name: tiny}
"""
START, BETWEEN = "(start)", "(between)"  # moments at which no stage is at work
TAGS = {"film": "B-WORK", "winter": "B-TIME"}  # of the words of `sentences.WORDS`
# Where the outputs of the stages lie below the work folder.
OUTPUTS = (
    "base", "data/*", "experts/*", "fisher/*", "gram/*", "models/*",
    "metrics/experts/*.json", "metrics/*.json", "report", "registered.json",
)  # fmt: skip
# Files that say when something happened, or how long it took.
CLOCKS = re.compile(
    r"run\.log|settings\.json.*|registered\.json.*|cost\.svg|report/(?!results\.json|table\.md).*"
)
SECONDS = re.compile(rb'"seconds": [\d.e+-]+')


def make_project(folder: Path) -> Path:
    """A project with a classifier, a tagger and an embedding model, and every stage in its run.

    One expert is fetched, the others are fine-tuned; the rows are CSV, CoNLL and JSON lines.
    """
    folder.mkdir(exist_ok=True)
    base = sentences.embedding_model(folder / "embedding", {"pooling_mode": "mean"})
    projects.make_project(folder, base)
    shutil.rmtree(base)
    (folder / "params.yaml").write_text(PROFILE)
    rows = folder / "rows"
    rows.mkdir()
    for seed, (split, count) in enumerate((("train", 96), ("dev", 32))):
        words = np.random.default_rng(seed).choice(sentences.WORDS[5:], (count, 2, 4))
        texts = [[" ".join(text) for text in pair] for pair in words]
        moods = [(pair[0], "bad" if "dull" in pair[0] else "good") for pair in texts]
        with (rows / f"{split}.csv").open("w", newline="") as file:
            csv.writer(file).writerows([("text", "label"), *moods])
        tagged = ["".join(f"{word} {TAGS.get(word, 'O')}\n" for word in pair[0]) for pair in words]
        (rows / f"{split}.conll").write_text("\n".join(tagged))
        pairs = [
            {"text": left, "text_pair": right, "label": len({*left.split()} & {*right.split()})}
            for left, right in texts
        ]
        (rows / f"{split}.jsonl").write_text("\n".join(map(json.dumps, pairs)))
        if split == "train":
            projects.fine_tune_elsewhere(
                folder / "source", folder / "models/mood", ("good", "bad"), moods
            )
    return folder


def start(folder: Path, *command: str) -> "subprocess.Popen[str]":
    """A command in a process group of its own."""
    return subprocess.Popen(
        command, cwd=folder, env=projects.environment(folder), stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True, start_new_session=True,
    )  # fmt: skip


def flow(folder: Path) -> "subprocess.Popen[str]":
    """`fmn run`, started."""
    return start(folder, *projects.FMN, "run")


def finish(process: "subprocess.Popen[str]", timeout: float = 600) -> str:
    """Wait for a command, which must succeed; returns all that it printed."""
    with process:
        output = process.communicate(timeout=timeout)[0]
    assert process.returncode == 0, output
    assert "Traceback" not in output
    return output


def kill(process: "subprocess.Popen[str]", whole_group: bool) -> bool:
    """Kill a command alone, or with its whole group; whether it was still running."""
    is_running = process.poll() is None
    if is_running and not whole_group:
        process.kill()
        process.wait()
        time.sleep(1.5)  # workers look once a second whether their owner lives
    # What is left of the group must not run on into the next attempt.
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    with process:
        output = process.communicate()[0]
    assert is_running or process.returncode == 0, output
    return is_running


def stages(folder: Path) -> dict[Path, str]:
    """The stage that writes each output of a project's run, in the order of the run."""
    profile = folder / "params.yaml"
    nodes = graph.nodes(params.load(profile), profile)  # the first writes the settings
    return {folder / node.arguments["out"]: node.stage for node in nodes[1:]}


def seconds(folder: Path) -> dict[str, float]:
    """How long each stage of a run took, the longest of its outputs."""
    longest = {START: 10.0}
    for out, stage in stages(folder).items():
        sidecar = read_sidecar(out)
        longest[stage] = max(longest.get(stage, 0.1), sidecar.seconds if sidecar else 0.0)
    return longest


def scratches(stages: Mapping[Path, str]) -> dict[Path, tuple[int, int]]:
    """The folders in which stages write, or which killed ones left, each with what tells them."""
    identities = {}
    for out in stages:
        with suppress(FileNotFoundError):
            status = out.with_name(f".{out.name}.partial").stat()
            identities[out] = (status.st_ino, status.st_ctime_ns)
    return identities


def at_work(stages: Mapping[Path, str], left: Mapping[Path, tuple[int, int]]) -> list[str]:
    """The stages that are writing, the latest first; a word if there is none.

    Args:
        left: the `scratches` before the run.
    """
    writing = dict(scratches(stages).items() - left.items())
    is_begun = any(sidecar_path(out).exists() for out in stages)
    return [stages[out] for out in stages if out in writing][::-1] or [
        BETWEEN if is_begun else START
    ]


def wait_for(
    process: "subprocess.Popen[str]",
    stage: str,
    stages: Mapping[Path, str],
    left: Mapping[Path, tuple[int, int]],
    seconds: float,
) -> None:
    """Wait until a stage writes, and then some seconds; or until the run has ended."""
    if stage != START:
        while process.poll() is None and stage not in at_work(stages, left):
            time.sleep(0.005)
    with suppress(subprocess.TimeoutExpired):
        process.wait(seconds)


def outputs(work: Path) -> list[Path]:
    """The outputs that stages have finished."""
    paths = [path for pattern in OUTPUTS for path in sorted(work.glob(pattern))]
    return [path for path in paths if path.name[0] != "." and not path.name.endswith("fmn.json")]


def computations(work: Path) -> dict[Path, bytes]:
    """The sidecar of every finished output: its run time tells one computation from another."""
    sidecars = {path: sidecar_path(path) for path in outputs(work)}
    return {path: file.read_bytes() for path, file in sidecars.items() if file.is_file()}


class State(NamedTuple):
    """What a run came to, but for what a clock decides."""

    files: Mapping[str, str]  # sha256 by name
    versions: Mapping[str, object]  # metrics of every version of the registered model


def state(folder: Path) -> State:
    """What lies in a project's work folder and in its registry."""
    files = {
        name: artifacts.digest_bytes(SECONDS.sub(b"", path.read_bytes()))
        for name, path in artifacts.visible(folder / "data" / "tiny").items()
        if not CLOCKS.fullmatch(name)
    }
    with closing(sqlite3.connect(folder / "mlflow.db")) as database:
        metrics = (
            "SELECT key, value, step FROM metrics"
            " WHERE run_uuid = ? AND key NOT LIKE ? AND key NOT LIKE ?"
        )
        versions = {
            f"{name}/{version}": sorted(database.execute(metrics, (run, "%seconds%", "time/%")))
            for name, version, run in database.execute(
                "SELECT name, version, run_id FROM model_versions ORDER BY version"
            ).fetchall()
        }
    return State(files, versions)


def damage(path: Path, how: str, chance: random.Random, other: Path | None = None) -> None:
    """Do to an output what disks and people do.

    Args:
        path: the output.
        how: "flip" a bit, "cut" a file, "empty" it, "delete" the output, or "swap" it for `other`.
        chance: chooses the file and the bit.
        other: another output.
    """
    if how == "delete":
        shutil.rmtree(path) if path.is_dir() else path.unlink()
        return
    if other is not None:
        spare = path.rename(path.with_name("spare"))
        other.rename(path)
        spare.rename(other)
        return
    files = [file for file in sorted(path.rglob("*")) if file.is_file() and file.stat().st_size]
    file = chance.choice(files) if path.is_dir() else path
    content = bytearray(file.read_bytes())
    if how == "flip":
        content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
    file.unlink()  # a merged model's encoder has a second name, which stays intact
    length = {"flip": len(content), "cut": len(content) // 2, "empty": 0}[how]
    file.write_bytes(content[:length])
