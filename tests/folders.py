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
    config = BertConfig(**{**SIZES, **sizes}, num_labels=outputs)
    config.architectures = ["BertForSequenceClassification"]
    folder.mkdir(parents=True)
    config.to_json_file(folder / "config.json", use_diff=False)
    save(folder, BertForSequenceClassification(config).state_dict())
    (folder / "vocab.txt").write_text("\n".join(words) + "\n")
    tokenizer = {"tokenizer_class": "BertTokenizer", "do_lower_case": True}
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    return folder


def save(folder: Path, state: Mapping[str, torch.Tensor], name: str = "model.safetensors") -> None:
    """Write weights; views are copied, as the format cannot have them."""
    tensors = {key: value.contiguous().clone() for key, value in state.items()}
    safetensors.torch.save_file(tensors, folder / name, metadata={"format": "pt"})


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return safetensors.torch.load_file(folder / "model.safetensors")


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
        save(folder, {name: state[name] for name in part}, file)
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def fill(disk: Path, room: int) -> Path:
    """Fill a file system but for `room` bytes; returns the file that fills it."""
    filler = disk / "filler"
    with filler.open("wb") as file:
        file.write(bytes(shutil.disk_usage(disk).free - room))
    return filler
