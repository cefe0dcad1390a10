"""What a version was made from: parts with digests, pinned settings, the state of the workspace."""

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from fmn.evaluate.files import Metrics
from fmn.merge.recipe import Recipe
from fmn.registry import lineage

COMMIT = "a" * 40
FISHER = {
    "values": "5" * 64,
    "estimator": "empirical",
    "samples": 32,
    "dtype": "float32",
    "data_digest": "6" * 64,
}
MRPC = {"source": "hf://org/mrpc", "revision": f"hf://org/mrpc@{COMMIT}", "digest": "1" * 64}
SST2 = {
    "source": "finetune:0123",
    "revision": "finetune:0123",
    "digest": "2" * 64,
    "settings": {"epochs": 2, "learning_rate": 0.001},
    "data_digest": "3" * 64,
    "threads": 1,
}
BASE = {"source": "hf://org/base", "revision": f"hf://org/base@{COMMIT}", "digest": "b" * 64}


def recipe(**changes: Any) -> Recipe:
    content = {
        "tasks": ["mrpc", "sst2"],
        "method": "mask-fisher",
        "coefficients": {"mrpc": 1.0, "sst2": 1.0},
        "base": BASE,
        "experts": {"mrpc": MRPC, "sst2": SST2},
        "fisher": {"mrpc": FISHER},
    }
    return Recipe.model_validate({**content, **changes})


def metrics(source: str = "hub", revision: str = COMMIT) -> Metrics:
    scores = {"score": 0.85, "examples": 10, "interval": {}}
    rows = {"source": source, "revision": revision}
    content = {
        "model": "",
        "score": 0.85,
        "interval": [0.8, 0.9],
        "tasks": {"mrpc": scores, "sst2": scores},
        "data": {
            "mrpc": {**rows, "splits": {"validation": "c" * 64}},
            "sst2": {**rows, "splits": {"validation": "d" * 64}},
        },
    }
    return Metrics.model_validate_json(json.dumps(content))


SETTINGS: dict[str, Any] = {
    "base": "hf://org/base@main",
    "experts": {"tasks": ["mrpc", "sst2"]},
    "sources": {"mrpc": "hf://org/mrpc"},
    "finetune": {"sst2": {"epochs": 2}},
    "compare": {"methods": {}},
    "notify": {"webhook": "https://hooks.example/secret"},
}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    for name in ("encoder/model.safetensors", "tasks/mrpc/config.json", "tasks/sst2/config.json"):
        file = tmp_path / "merged" / name
        file.parent.mkdir(parents=True)
        file.write_text(name)
    model = tmp_path / "merged"
    (model / "tasks/mrpc/model.safetensors").hardlink_to(model / "encoder/model.safetensors")
    return model


def test_everything_that_a_model_is_made_from_has_origin_and_digest(model: Path) -> None:
    parts = {part.name: part for part in lineage.describe(model, recipe(), metrics())}
    assert list(parts) == [
        "base", "data mrpc validation", "data mrpc train", "data sst2 validation",
        "data sst2 train", "expert mrpc", "expert sst2", "fisher mrpc", "merged encoder",
        "merged head mrpc", "merged head sst2", "scores",
    ]  # fmt: skip
    assert parts["data mrpc train"].digest == "6" * 64
    assert parts["data sst2 train"].digest == "3" * 64
    assert parts["fisher mrpc"].digest == "5" * 64, "of the numbers, not of the file"
    assert parts["fisher mrpc"].origin == "empirical 32 examples, seed 0, float32"
    assert parts["expert mrpc"].origin == f"hf://org/mrpc@{COMMIT}"
    assert parts["expert sst2"].origin == "fine-tuned: epochs 2, learning rate 0.001"
    assert parts["data sst2 validation"].origin == f"hub {COMMIT}"
    assert parts["merged encoder"].origin == "mask-fisher"
    assert parts["scores"].origin == "85.00 % in the mean"
    undefined = metrics().model_copy(update={"score": None})
    last = lineage.describe(model, recipe(), undefined)[-1]
    assert (last.name, last.origin) == ("scores", "undefined in the mean")
    (model / "encoder" / "config.json").write_text("changed")
    again = lineage.describe(model, recipe(), metrics())
    changed = [part.name for part in again if part.digest != parts[part.name].digest]
    assert changed == ["merged encoder"]


def test_settings_are_recorded_with_the_revisions_that_their_sources_had() -> None:
    pinned = lineage.pin_settings(SETTINGS, recipe(), metrics())
    assert pinned == {
        "base": f"hf://org/base@{COMMIT}",
        "experts": SETTINGS["experts"],
        "sources": {"mrpc": f"hf://org/mrpc@{COMMIT}"},
        "finetune": SETTINGS["finetune"],
        "data": {"revision": COMMIT},
    }


def test_a_folder_is_recorded_as_an_absolute_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GLUE_DIR", str(tmp_path / "glue"))
    expert = {"source": "mrpc", "revision": "sha256:0123", "digest": "1" * 64}
    folders = {"sources": {"mrpc": "mrpc"}, "data": {"source": "$GLUE_DIR"}}
    made_from = recipe(experts={"mrpc": expert, "sst2": SST2})
    pinned = lineage.pin_settings(SETTINGS | folders, made_from, metrics("glue", ""))
    assert pinned["sources"] == {"mrpc": str(tmp_path / "mrpc")}
    assert pinned["data"] == {"source": str(tmp_path / "glue")}


def test_own_tasks_are_recorded_with_their_commit_or_absolute_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "stars.csv").write_text("review,label\n")
    own = {
        "paws": {"dataset": {"path": "org/paws", "name": "final", "revision": "main"}},
        "stars": {"dataset": {"path": "stars.csv"}, "columns": {"text": "review"}},
        "far": {"dataset": {"path": "https://host.example/far.csv"}, "max_length": 64},
        "sst2": {"max_length": 64},
    }
    sources = {"mrpc": {"source": "hf://org/mrpc", "labels": ["no", "yes"]}}
    scored = metrics()
    rows = scored.data["sst2"]
    commit = "e" * 40
    data = {"paws": rows.model_copy(update={"revision": commit, "source": "org/paws"})}
    data |= {name: rows.model_copy(update={"revision": None}) for name in ("stars", "far")}
    scored = scored.model_copy(update={"data": scored.data | data})
    pinned = lineage.pin_settings(SETTINGS | {"tasks": own, "sources": sources}, recipe(), scored)
    assert pinned["tasks"] == {
        **own,
        "paws": {"dataset": {"path": "org/paws", "name": "final", "revision": commit}},
        "stars": {"dataset": {"path": str(tmp_path / "stars.csv")}, "columns": {"text": "review"}},
    }
    assert pinned["sources"]["mrpc"] == {
        "source": f"hf://org/mrpc@{COMMIT}",
        "labels": ["no", "yes"],
    }
    assert pinned["data"] == {"revision": COMMIT}, "GLUE's, of the tasks that name no data set"


def test_threads_are_known_if_they_were_the_same_everywhere() -> None:
    assert lineage.threads(recipe()) == 1
    assert lineage.threads(recipe(fisher={"mrpc": FISHER | {"threads": 4}})) is None
    assert lineage.threads(recipe(experts={}, fisher={})) is None


def git(*arguments: str) -> str:
    identity = ("-c", "user.name=someone", "-c", "user.email=someone@example.org")
    command = ["git", *identity, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def test_the_commit_of_the_workspace_says_whether_files_differ(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert lineage.git_commit() is None
    git("init", "-q")
    Path("file").write_text("one")
    git("add", "file")
    git("commit", "-qm", "one")
    git("tag", "release")
    assert lineage.git_commit() == git("rev-parse", "HEAD")
    Path("new").write_text("not known to git")
    assert lineage.git_commit() == git("rev-parse", "HEAD")
    Path("file").write_text("two")
    assert lineage.git_commit() == git("rev-parse", "HEAD") + "+"
