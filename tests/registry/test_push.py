"""`fmn push`: one commit on a real HTTP server has the model, and Transformers loads it there."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch

from fmn.errors import UserError
from fmn.fisher.files import read_fisher
from fmn.fisher.stages import GramSettings, fisher, gram
from fmn.merge.recipe import MergeSettings
from fmn.merge.stages import merge
from fmn.models.stages import predict
from fmn.registry.push import push
from fmn.sources.stages import fetch
from tests.conftest import FISHER, TASKS
from tests.hub_server import Hub

GRAM = GramSettings(samples=8, device="cpu", dtype="float32")
LOAD = """
import sys, torch
from transformers import AutoModel, AutoModelForSequenceClassification, AutoTokenizer
repo, task = sys.argv[1:]
model = AutoModelForSequenceClassification.from_pretrained(repo, subfolder=f"tasks/{task}").eval()
AutoModel.from_pretrained(repo, subfolder="encoder")
tokenizer = AutoTokenizer.from_pretrained(repo, subfolder=f"tasks/{task}")
with torch.inference_mode():
    print(*model(**tokenizer("a warm film", return_tensors="pt")).logits.softmax(-1)[0].tolist())
"""


@pytest.fixture
def hub(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> Hub:
    """The Hub, where this user may write."""
    hub.token = "secret"
    monkeypatch.setenv("HF_TOKEN", "secret")
    return hub


@pytest.fixture(scope="module")
def merged(tiny_work: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("merged") / "model"
    experts = {task: tiny_work / "experts" / task for task in TASKS}
    merge(experts=experts, out=out, settings=MergeSettings(method="average"))
    return out


def files_on(hub: Hub, repo: str, branch: str = "main") -> dict[str, Any]:
    return hub.repositories["models", repo][branch][1]


def test_a_merged_model_is_one_commit_that_plain_transformers_loads(
    merged: Path, hub: Hub, tmp_path: Path
) -> None:
    pushed = push(merged, "hf://org/merged", private=True)
    local = {
        str(path.relative_to(merged)): path.read_bytes()
        for path in merged.rglob("*")
        if path.is_file() and path.name != "fmn.json"
    }
    files = files_on(hub, "org/merged")
    assert {name: data for name, data in files.items() if name != ".gitattributes"} == local
    assert (pushed.url, pushed.files) == (f"{hub.url}/org/merged", len(local))
    assert pushed.source == f"hf://org/merged@{pushed.commit}"
    assert hub.repositories["models", "org/merged"]["main"][0] == pushed.commit
    assert hub.private == {"org/merged"}
    assert len(hub.uploads) == len(set(hub.uploads)), "shared shards are sent once"
    shared = [name for name in local if name.endswith(".safetensors")]
    assert len(hub.uploads) < len(shared)
    # Transformers, without fmn, from the Hub.
    code = [sys.executable, "-c", LOAD, "org/merged", "sst2"]
    environment = hub.environment(tmp_path / "home")
    done = subprocess.run(code, env=environment, capture_output=True, text=True, check=True)
    answer: Any = predict(merged, "a warm film", task="sst2")
    expected = answer.probabilities.values()
    assert list(map(float, done.stdout.split())) == pytest.approx(list(expected), abs=1e-5)
    # One task's folder is a source of an expert.
    out = tmp_path / "fetched"
    fetch("hf://org/merged/tasks/sst2", out=out, task="sst2")
    for file in sorted((merged / "tasks" / "sst2").glob("*.safetensors")):
        mine = safetensors.torch.load_file(file)
        theirs = safetensors.torch.load_file(out / file.name)
        assert all(theirs[name].equal(mine[name]) for name in mine)


def test_a_second_push_sends_what_is_new_and_removes_old_tasks(
    merged: Path, tiny_work: Path, hub: Hub, tmp_path: Path
) -> None:
    hub.add("models", "org/mine", {"notes.txt": b"mine", "tasks/old/config.json": b"{}"})
    push(merged, "hf://org/mine", message="first")
    assert "notes.txt" in files_on(hub, "org/mine")
    assert "tasks/old/config.json" not in files_on(hub, "org/mine")
    sent = len(hub.uploads)
    card = tmp_path / "card.md"
    card.write_text("---\ntags: [x]\n---\nScores\n")
    push(merged, "hf://org/mine@next", card=card)
    push(merged, "hf://org/mine", card=card, revision="third")
    assert len(hub.uploads) == sent
    for branch in ("next", "third"):
        assert files_on(hub, "org/mine", branch)["README.md"] == card.read_bytes()
    assert files_on(hub, "org/mine")["README.md"] == (merged / "README.md").read_bytes()


def test_a_hub_that_stumbles_is_asked_again(merged: Path, hub: Hub) -> None:
    for match in ("preupload", "/lfs/", "/commit/"):
        hub.misbehave("status", match, times=1, status=503)
    push(merged, "hf://org/merged")
    assert "merge.json" in files_on(hub, "org/merged")


def test_what_cannot_be_pushed_is_refused_in_one_line(
    merged: Path, tiny_work: Path, hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changed = tmp_path / "changed"
    shutil.copytree(merged, changed)
    recipe = json.loads((changed / "merge.json").read_text())
    (changed / "merge.json").write_text(json.dumps(recipe, indent=3))
    expert = tiny_work / "experts" / "sst2"
    fisher = tiny_work / "fisher" / "sst2.parquet"
    other = tiny_work / "experts" / "mrpc"
    cases: list[tuple[Path, str, dict[str, Any], str]] = [
        (merged, "org/merged", {}, "write hf://ORG/NAME"),
        (merged, "hf://org/../x", {}, "write hf://ORG/NAME"),
        (changed, "hf://org/x", {}, "not what was written there"),
        (expert, "hf://org/x", {}, "is no merged model"),
        (tmp_path / "none", "hf://org/x", {"fisher": fisher}, "no such folder"),
        (merged, "hf://org/x", {"fisher": fisher}, "are for an expert"),
        (other, "hf://org/x", {"fisher": fisher}, "of another checkpoint"),
        (merged, "hf://org/x", {"card": tmp_path / "none.md"}, "no such file"),
    ]
    for source, to, options, problem in cases:
        with pytest.raises(UserError, match=problem) as caught:
            push(source, to, **options)
        assert "\n" not in str(caught.value)
    assert not hub.requests, "nothing was asked of the Hub"
    monkeypatch.setenv("HF_TOKEN", "wrong")
    with pytest.raises(UserError, match="refuses the token"):
        push(merged, "hf://org/x")
    assert ("models", "org/x") not in hub.repositories


def test_an_expert_is_pushed_with_statistics_that_a_fetched_copy_takes(
    tiny_work: Path, hub: Hub, tmp_path: Path
) -> None:
    expert, data = tiny_work / "experts" / "sst2", tiny_work / "data"
    file, gram_file = tiny_work / "fisher" / "sst2.parquet", tmp_path / "g.gram.safetensors"
    gram(expert, task="sst2", data=data, out=gram_file, settings=GRAM)
    pushed = push(expert, "hf://org/sst2", fisher=file, gram=gram_file)
    files = files_on(hub, "org/sst2")
    assert files["fmn/fisher.parquet"] == file.read_bytes()
    assert {"config.json", "model.safetensors", "task.json"} < set(files)
    copy = tmp_path / "copy"
    fetch(pushed.source, out=copy, task="sst2", data=data)
    assert (copy / "fmn" / "gram.safetensors").read_bytes() == gram_file.read_bytes()
    out = tmp_path / "fisher.parquet"
    metadata = fisher(copy, task="sst2", data=data, out=out, settings=FISHER).summary
    assert metadata.published == f"taken from {copy}/fmn/fisher.parquet"
    before, after = (read_fisher(path)[0] for path in (file, out))
    assert all((after[site] == value).all() for site, value in before.items())
    assert metadata.checkpoint.revision == pushed.source
    again = gram(copy, task="sst2", data=data, out=tmp_path / "again.safetensors", settings=GRAM)
    assert again.summary.published is not None
    base = tmp_path / "base"
    fetch(pushed.source, out=base)
    assert not (base / "fmn").exists(), "statistics are an expert's"
