"""What a version says it was made from: its digests, its settings with pinned sources, the state of the workspace."""

import subprocess
from pathlib import Path
from typing import Any

import pytest

from fmn import params
from fmn.errors import UserError
from fmn.params import Params
from fmn.registry import lineage

COMMIT = "a" * 40
RECIPE: dict[str, Any] = {
    "tasks": ["mrpc", "sst2"],
    "method": "mask-fisher",
    "mapping": "structured",
    "scale": 1.5,
    "fmn": "0.1.0",
    "base": {
        "source": "hf://org/base@main",
        "revision": f"hf://org/base@{COMMIT}",
        "digest": "b" * 64,
    },
    "experts": {
        "mrpc": {
            "source": "hf://org/mrpc",
            "revision": f"hf://org/mrpc@{COMMIT}",
            "digest": "1" * 64,
        },
        "sst2": {
            "source": "finetune:0123",
            "revision": "finetune:0123",
            "digest": "2" * 64,
            "data_digest": "3" * 64,
            "threads": 1,
        },
    },
    "fisher": {
        "mrpc": {
            "digest": "4" * 64,
            "values": "5" * 64,
            "estimator": "empirical",
            "samples": 32,
            "seed": 0,
            "dtype": "float32",
            "data_digest": "6" * 64,
            "threads": 1,
        }
    },
    "gram": {},
    "files": {
        "encoder/config.json": "7" * 64,
        "encoder/model.safetensors": "8" * 64,
        "tasks/mrpc/config.json": "9" * 64,
        "tasks/sst2/config.json": "0" * 64,
    },
}
METRICS: dict[str, Any] = {
    "score": 0.85,
    "tasks": {"mrpc": {"score": 0.8}, "sst2": {"score": 0.9}},
    "data": {
        "mrpc": {"source": "hub", "revision": COMMIT, "splits": {"validation": "c" * 64}},
        "sst2": {"source": "hub", "revision": COMMIT, "splits": {"validation": "d" * 64}},
    },
}


def settings(**changes: Any) -> Params:
    content = {
        "work": "data/demo",
        "base": "hf://org/base@main",
        "experts": {"tasks": ["mrpc", "sst2"]},
        "sources": {"mrpc": "hf://org/mrpc"},
        "finetune": {"sst2": {"epochs": 2}},
        "data": {"source": "hub"},
        "registry": {"name": "demo"},
    }
    return params.validate({**content, **changes}, "params.yaml")


def test_everything_that_a_model_is_made_from_has_its_digest() -> None:
    found = lineage.digests(RECIPE, METRICS)
    assert list(found) == [
        "base", "data mrpc validation", "data sst2 validation", "data mrpc train", "data sst2 train", "expert mrpc",
        "expert sst2", "fisher mrpc", "merged encoder", "merged head mrpc", "merged head sst2", "scores",
    ]  # fmt: skip
    assert found["data mrpc train"] == "6" * 64
    assert found["data sst2 train"] == "3" * 64
    assert found["fisher mrpc"] == "5" * 64, "of the numbers, not of the file"
    files = {**RECIPE["files"], "encoder/model.safetensors": "f" * 64}
    other = lineage.digests({**RECIPE, "files": files}, METRICS)
    assert [name for name in found if found[name] != other[name]] == ["merged encoder"]


def test_settings_are_recorded_with_the_revisions_that_their_sources_had() -> None:
    stated = lineage.pinned(settings(), RECIPE, METRICS)
    assert stated["base"] == f"hf://org/base@{COMMIT}"
    assert stated["sources"] == {"mrpc": f"hf://org/mrpc@{COMMIT}"}
    assert stated["data"]["revision"] == COMMIT
    assert stated["finetune"]["sst2"]["epochs"] == 2
    assert "compare" not in stated


def test_recorded_settings_are_read_again_as_they_were(tmp_path: Path) -> None:
    stated = lineage.pinned(settings(), RECIPE, METRICS)
    file = tmp_path / "params.yaml"
    file.write_text(lineage.as_yaml(stated))
    found = lineage.again(params.read_yaml(file), tmp_path / "work", "models:/demo/1")
    assert found.work == str(tmp_path / "work")
    assert found.finetune == settings().finetune
    assert found.base == f"hf://org/base@{COMMIT}"


def test_a_folder_is_recorded_as_a_whole_path_and_must_still_be_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mrpc").mkdir()
    (tmp_path / "glue").mkdir()
    recipe = {
        **RECIPE,
        "experts": {**RECIPE["experts"], "mrpc": {"source": "mrpc", "revision": "mrpc"}},
    }
    stated = lineage.pinned(
        settings(sources={"mrpc": "mrpc"}, data={"source": "glue"}), recipe, METRICS
    )
    assert stated["sources"] == {"mrpc": str(tmp_path / "mrpc")}
    assert stated["data"]["source"] == str(tmp_path / "glue")
    lineage.again(stated, tmp_path / "work", "models:/demo/1")
    (tmp_path / "glue").rmdir()
    with pytest.raises(
        UserError, match=rf"^models:/demo/1: the data came from {tmp_path}/glue, which is not there"
    ):
        lineage.again(stated, tmp_path / "work", "models:/demo/1")
    (tmp_path / "mrpc").rmdir()
    with pytest.raises(
        UserError, match=rf"the expert mrpc came from {tmp_path}/mrpc, which is not there any more"
    ):
        lineage.again(stated, tmp_path / "work", "models:/demo/1")


def test_settings_that_this_version_does_not_know_are_told() -> None:
    with pytest.raises(UserError, match="the settings of models:/demo/1: old: unknown setting"):
        lineage.again(
            {**lineage.pinned(settings(), RECIPE, METRICS), "old": 1},
            Path("work"),
            "models:/demo/1",
        )


def test_settings_that_make_other_models_are_not_recorded(tmp_path: Path) -> None:
    assert lineage.place(Path("data/demo/merged"), settings()) == "merged"
    with pytest.raises(
        UserError, match=f"these settings make their models in data/demo, not in {tmp_path}"
    ):
        lineage.place(tmp_path / "merged", settings())


def test_threads_are_known_where_they_were_the_same_everywhere() -> None:
    assert lineage.threads(RECIPE) == 1
    mixed = {**RECIPE["fisher"]["mrpc"], "threads": 4}
    assert lineage.threads({**RECIPE, "fisher": {"mrpc": mixed}}) is None
    assert lineage.threads({**RECIPE, "experts": {}, "fisher": {}}) is None


def git(*arguments: str) -> str:
    identity = ("-c", "user.name=someone", "-c", "user.email=someone@example.org")
    done = subprocess.run(
        ["git", *identity, *arguments], capture_output=True, text=True, check=True
    )
    return done.stdout.strip()


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
    assert lineage.git_commit() == git("rev-parse", "HEAD")
    Path("new").write_text("not known to git")
    assert lineage.git_commit() == git("rev-parse", "HEAD")
    Path("file").write_text("two")
    assert lineage.git_commit() == git("rev-parse", "HEAD") + "+"


def test_the_lock_counts_up_to_the_registration(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert lineage.dvc_lock() is None
    lock = "schema: '2.0'\nstages:\n  merge: {cmd: fmn merge, outs: [{md5: a}]}\n"
    Path("dvc.lock").write_text(lock)
    before = lineage.dvc_lock()
    assert before
    Path("dvc.lock").write_text(lock + "  register: {cmd: fmn register}\n")
    assert lineage.dvc_lock() == before
    Path("dvc.lock").write_text(lock.replace("md5: a", "md5: b"))
    assert lineage.dvc_lock() not in (None, before)
    Path("dvc.lock").write_text("[broken")
    assert lineage.dvc_lock() is None


def test_the_table_says_where_everything_came_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    stated = lineage.tags(RECIPE, METRICS) | {"profile": "params.yaml", "git.commit": COMMIT}
    rows = {
        what: (how, digest)
        for what, how, digest in lineage.table(
            RECIPE, METRICS, stated, lineage.pinned(settings(), RECIPE, METRICS)
        )
    }
    assert rows["expert mrpc"] == (f"hf://org/mrpc@{COMMIT} (hf://org/mrpc)", "1" * 64)
    assert rows["expert sst2"][0].startswith("fine-tuned: epochs 2")
    assert rows["fisher mrpc"][0] == "empirical, 32 examples, seed 0, float32"
    assert rows["data sst2 validation"][0] == f"hub, revision {COMMIT}"
    assert rows["merged encoder"][0] == "mask-fisher, structured, scale 1.5"
    assert rows["scores"][0] == "85.00 % in the mean"
    assert rows["settings"][0] == "params.yaml"
    assert rows["git commit"] == ("", COMMIT)
    assert rows["dvc.lock"] == ("not recorded", "")
