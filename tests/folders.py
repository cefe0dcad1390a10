"""Checkpoint folders for tests, and what tests do to them."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from transformers import BertConfig, BertForSequenceClassification

WORDS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "fine", "film", "dull", "##ly")
SIZES: dict[str, Any] = {
    "vocab_size": len(WORDS),
    "hidden_size": 8,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 12,
    "max_position_embeddings": 16,
}


def tiny_bert(
    folder: Path, seed: int = 0, outputs: int = 2, words: tuple[str, ...] = WORDS, **sizes: Any
) -> Path:
    """A checkpoint folder of a small random BERT classifier."""
    torch.manual_seed(seed)
    config = BertConfig(
        **{**SIZES, **sizes}, num_labels=outputs, architectures=["BertForSequenceClassification"]
    )
    folder.mkdir(parents=True)
    config.to_json_file(folder / "config.json", use_diff=False)
    state = {
        name: value.contiguous()
        for name, value in BertForSequenceClassification(config).state_dict().items()
    }
    safetensors.torch.save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "vocab.txt").write_text("\n".join(words) + "\n")
    (folder / "tokenizer_config.json").write_text(
        '{"tokenizer_class": "BertTokenizer", "do_lower_case": true}'
    )
    return folder


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return safetensors.torch.load_file(folder / "model.safetensors")


def weights_of_shard(folder: Path, number: int) -> dict[str, torch.Tensor]:
    return {
        k: v.clone()
        for k, v in safetensors.torch.load_file(
            folder / f"model-0000{number}-of-00002.safetensors"
        ).items()
    }


def edit_config(folder: Path, **values: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **values}))


def pickled(folder: Path, state: Any, **options: Any) -> Path:
    """The same checkpoint with its weights as pytorch_model.bin alone."""
    (folder / "model.safetensors").unlink(missing_ok=True)
    torch.save(state, folder / "pytorch_model.bin", **options)
    return folder


def shards(folder: Path, state: Mapping[str, torch.Tensor]) -> None:
    """The folder's weights as two shards and their index."""
    names = sorted(state)
    (folder / "model.safetensors").unlink()
    weight_map: dict[str, str] = {}
    for number, part in enumerate((names[:10], names[10:]), 1):
        file = f"model-0000{number}-of-00002.safetensors"
        safetensors.torch.save_file(
            {name: state[name] for name in part}, folder / file, metadata={"format": "pt"}
        )
        weight_map |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": weight_map})
    )


def fill(disk: Path, room: int) -> Path:
    """Fill a file system but for `room` bytes; returns the file that fills it."""
    filler = disk / "filler"
    with filler.open("wb") as file:
        file.write(bytes(shutil.disk_usage(disk).free - room))
    return filler
