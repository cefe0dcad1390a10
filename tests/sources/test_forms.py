"""Addresses, folders and configurations in the forms that people keep them."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from fmn.errors import UserError
from fmn.models import checkpoints, loading
from fmn.models.provenance import CheckpointInfo
from fmn.sources import forms, stages
from fmn.store.artifacts import digest_files
from tests.folders import edit_config
from tests.hub_server import Hub


def fetch(source: str | Path, out: Path) -> CheckpointInfo:
    return stages.fetch(str(source), out=out).summary


# Addresses


@pytest.mark.parametrize(
    ("address", "source"),
    [
        ("https://huggingface.co/org/name", "hf://org/name"),
        ("https://huggingface.co/org/name/", "hf://org/name"),
        ("https://huggingface.co/org/name.git", "hf://org/name"),
        ("https://hf.co/org/name/tree/main", "hf://org/name@main"),
        ("https://huggingface.co/gpt2/tree/v1.0", "hf://gpt2@v1.0"),
        ("https://huggingface.co/org/name/tree/refs%2Fpr%2F3", "hf://org/name@refs/pr/3"),
        ("https://huggingface.co/org/name/tree/main/a/b", "hf://org/name/a/b@main"),
        ("https://huggingface.co/org/name/blob/main/config.json", "hf://org/name@main"),
        ("https://huggingface.co/org/name/resolve/v2/a/model.safetensors", "hf://org/name/a@v2"),
        ("https://huggingface.co/org/name?library=transformers", "hf://org/name"),
        ("file:///models/my%20bert", "/models/my bert"),
        ("file://localhost/models/bert", "/models/bert"),
        ("models/bert", "models/bert"),
        ("hf://org/name@v1", "hf://org/name@v1"),
        ("package:module/path", "package:module/path"),
    ],
)
def test_addresses_become_sources(address: str, source: str) -> None:
    assert forms.address(address) == source


@pytest.mark.parametrize(
    "address",
    [
        "https://example.com/org/name",
        "https://huggingface.co/datasets/org/name",
        "https://huggingface.co/spaces/org/name",
        "https://huggingface.co/org/name/discussions/1",
        "https://huggingface.co.example.com/org/name",
        "https://huggingface.co",
    ],
)
def test_other_addresses_are_refused(address: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not the address of a model on the Hub; write hf://"):
        fetch(address, tmp_path / "out")


def test_addresses_are_fetched(hub: Hub, bert: Path, tmp_path: Path) -> None:
    files: dict[str, Any] = {path.name: path for path in bert.iterdir()}
    in_folder = {f"checkpoint-5/{name}": path for name, path in files.items()}
    commit = hub.add("models", "org/bert", {**in_folder, "README.md": b"x"}, revision="v1")
    info = fetch(f"{hub.url}/org/bert/tree/v1/checkpoint-5", tmp_path / "out")
    assert info.revision == f"hf://org/bert/checkpoint-5@{commit}"
    assert digest_files(tmp_path / "out") == digest_files(bert)
    hub.requests.clear()
    assert not stages.fetch(info.revision, out=tmp_path / "out").computed
    assert not hub.requests
    with pytest.raises(UserError, match=r"no config\.json, but checkpoint-5 has; give that folder"):
        fetch("hf://org/bert@v1", tmp_path / "no")
    info = fetch(f"file://{bert}", tmp_path / "local")
    assert info.revision == str(bert)
    assert digest_files(tmp_path / "local") == digest_files(bert)
    with pytest.raises(UserError, match="would change"):
        fetch(f"file://{bert}", bert / "inside")


# Folders


def test_folders_of_the_hubs_cache_are_taken(hub: Hub, bert: Path, tmp_path: Path) -> None:
    hub.add("models", "org/bert", bert)
    commit = fetch("hf://org/bert", tmp_path / "out").revision.rpartition("@")[2]
    repository = tmp_path / "cache" / "models--org--bert"
    for number, folder in enumerate((repository, repository / "snapshots" / commit)):
        fetch(folder, tmp_path / f"out-{number}")
        assert digest_files(tmp_path / f"out-{number}") == digest_files(bert)
    other = repository / "snapshots" / ("0" * 40)
    shutil.copytree(repository / "snapshots" / commit, other, symlinks=True)
    with pytest.raises(UserError, match=f"snapshots {'0' * 40}, .*; give the folder of one"):
        fetch(repository, tmp_path / "no")
    (repository / "refs").mkdir(exist_ok=True)
    (repository / "refs" / "main").write_text(f"{commit}\n")
    fetch(repository, tmp_path / "main")
    assert digest_files(tmp_path / "main") == digest_files(bert)


def test_a_training_runs_folder_is_the_model_or_names_its_checkpoints(
    copy: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    for step in (1000, 500):
        shutil.copytree(copy, run / f"checkpoint-{step}")
        for name in ("training_args.bin", "optimizer.pt", "scheduler.pt", "rng_state.pth"):
            (run / f"checkpoint-{step}" / name).write_bytes(b"anything")
        (run / f"checkpoint-{step}" / "global_step5").mkdir()
        (run / f"checkpoint-{step}" / "zero_to_fp32.py").write_text("raise SystemExit")
    (run / "runs").mkdir()
    with pytest.raises(UserError, match="of a training run: checkpoint-500, checkpoint-1000; give"):
        fetch(run, tmp_path / "out")
    assert fetch(run / "checkpoint-500", tmp_path / "500").notes == []
    assert digest_files(tmp_path / "500") == digest_files(copy)
    shutil.copytree(copy, run, dirs_exist_ok=True)
    assert fetch(run, tmp_path / "last").notes == []
    assert digest_files(tmp_path / "last") == digest_files(copy)


@pytest.mark.parametrize(
    ("files", "problem"),
    [
        (["global_step9/mp_rank_00_model_states.pt"], "DeepSpeed's shards.*zero_to_fp32.py"),
        (["zero_to_fp32.py", "latest"], "DeepSpeed's shards.*zero_to_fp32.py"),
        (["pytorch_model/mp_rank_00_model_states.pt"], "DeepSpeed's shards.*zero_to_fp32.py"),
        (["pytorch_model/zero_pp_rank_0_mp_rank_00_optim_states.pt"], "DeepSpeed's shards"),
        (["pytorch_model_fsdp_0/__0_0.distcp"], "FSDP's shards.*accelerate merge-weights"),
        (["pytorch_model.bin/pytorch_model.bin"], "folder pytorch_model.bin"),
        (["model-q4.gguf"], "GGUF"),
        (["tf_model.h5"], "TensorFlow or Flax"),
        (["model.ckpt.index", "model.ckpt.meta"], "TensorFlow or Flax"),
        (["flax_model.msgpack"], "TensorFlow or Flax"),
        (["onnx/model.onnx"], "exported model"),
        (["consolidated.00.pth"], "their author's own format"),
        (["model.fp16.safetensors"], r"a variant alone \(model.fp16.safetensors\); rename"),
        (["weights.safetensors"], "no model.safetensors but weights.safetensors; rename it"),
        (["adapter_model.safetensors"], "without its adapter_config.json"),
        (["training_args.bin"], "neither model.safetensors nor pytorch_model.bin"),
    ],
)
def test_folders_without_weights_say_what_they_hold(
    files: list[str], problem: str, copy: Path, tmp_path: Path
) -> None:
    (copy / "model.safetensors").unlink()
    for name in files:
        (copy / name).parent.mkdir(exist_ok=True)
        (copy / name).write_bytes(b"anything")
    with pytest.raises(UserError, match=f"^{copy}: .*{problem}"):
        fetch(copy, tmp_path / "out")


def test_places_that_hold_no_checkpoint_are_named(copy: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is a file; give the folder that holds it"):
        fetch(copy / "config.json", tmp_path / "out")
    outside = tmp_path / "outside"
    shutil.copytree(copy, outside / "0_Transformer")
    with pytest.raises(UserError, match="but 0_Transformer has; give that folder"):
        fetch(outside, tmp_path / "out")
    (outside / "merge.json").write_text("{}")
    with pytest.raises(UserError, match="is a merged model; give one of its folders"):
        fetch(outside, tmp_path / "out")


# Entries of config.json


@pytest.mark.parametrize(
    ("changes", "notes"),
    [
        ({"_attn_implementation": "flash_attention_2"}, ["_attn_implementation = flash_att"]),
        ({"attn_implementation": "flash_attention_3"}, ["attn_implementation = flash_att"]),
        ({"_attn_implementation": "eager", "_attn_implementation_autoset": True}, ["autoset"]),
        ({"_attn_implementation": "sdpa"}, []),
        ({"torch_dtype": None}, []),
        ({"torch_dtype": "torch.float32"}, []),
        ({"torch_dtype": "auto"}, ["torch_dtype = 'auto'"]),
        ({"dtype": ""}, ["dtype = ''"]),
        ({"id2label": {}, "label2id": {}}, ["id2label = {}", "label2id = {}"]),
        ({"num_labels": None}, ["num_labels = None"]),
        ({"use_cache": None}, ["use_cache = None"]),
        ({"pad_token_id": -1}, ["pad_token_id = -1"]),
        ({"architectures": "BertForSequenceClassification"}, []),
        ({"architectures": [""]}, ["architectures = ['']", "a BertForSequenceClassification"]),
        ({"label2id": {"LABEL_0": 1, "LABEL_1": 0}}, ["label2id has 'LABEL_0' for another output"]),
        ({"id2label": {"1": 1, "0": 0}, "label2id": None}, []),
        ({"model_type": None}, ["no model_type; as its architectures say, it is bert"]),
        ({"model_type": ""}, ["no model_type; as its architectures say, it is bert"]),
    ],
)
def test_entries_that_stand_for_nothing_are_left_out(
    changes: dict[str, Any], notes: list[str], copy: Path, tmp_path: Path
) -> None:
    expected = loading.load_model(copy).state_dict()
    edit_config(copy, **changes)
    info = fetch(copy, tmp_path / "out")
    assert len(info.notes) == len(notes)
    assert all(part in note for part, note in zip(notes, info.notes, strict=True))
    loaded = loading.load_model(tmp_path / "out").state_dict()
    assert all((loaded[name] == value).all() for name, value in expected.items())
    config = checkpoints.load_config(tmp_path / "out")
    assert config.architectures == ["BertForSequenceClassification"]


def test_settings_within_settings_are_tidied_too() -> None:
    inner = {"_attn_implementation": "flash_attention_2", "hidden_size": 8}
    config, notes = forms.tidy({"model_type": "x", "text_config": inner})
    assert config["text_config"] == {"hidden_size": 8}
    assert len(notes) == 1
    config, notes = forms.tidy({"model_type": "x", "_attn_implementation": "someone/kernel"})
    assert (config["_attn_implementation"], notes) == ("someone/kernel", [])


@pytest.mark.parametrize("architectures", [None, ["NoSuchModel"], ["AutoModel"], ["os"], 7])
def test_a_model_type_that_nothing_tells_is_refused(
    architectures: Any, copy: Path, tmp_path: Path
) -> None:
    edit_config(copy, model_type=None, architectures=architectures)
    with pytest.raises(UserError, match="model_type None, unknown to Transformers; set it"):
        fetch(copy, tmp_path / "out")


def test_a_configuration_that_needs_nothing_stays_as_it_is(copy: Path, tmp_path: Path) -> None:
    edit_config(copy, finetuning_task=None, custom={"a": [1]})
    before = (copy / "config.json").read_text()
    fetch(copy, tmp_path / "out")
    assert (tmp_path / "out" / "config.json").read_text() == before
    assert json.loads(before)["finetuning_task"] is None
