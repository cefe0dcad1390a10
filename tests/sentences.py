"""Tiny embedding models, as Sentence Transformers saves them."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import BertConfig, BertModel

WORDS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "fine", "film", "dull", "of", "winter")
TEXTS = ["a fine film", "dull", "a film of winter of a dull winter", "Fine, fine; winter!", "", "a"]
TYPES = {"": "Transformer", "1_Pooling": "Pooling", "2_Normalize": "Normalize"}


def embedding_model(
    folder: Path, pooling: dict[str, Any], seed: int = 0, paths: Sequence[str] = tuple(TYPES)
) -> Path:
    """A random BERT of two layers with the files that make it an embedding model."""
    torch.manual_seed(seed)
    sizes = {"hidden_size": 16, "num_attention_heads": 4, "intermediate_size": 24}
    model = BertModel(BertConfig(vocab_size=len(WORDS), num_hidden_layers=2, **sizes))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    (folder / "vocab.txt").write_text("\n".join(WORDS) + "\n")
    tokenizer = {"tokenizer_class": "BertTokenizer", "do_lower_case": True, "model_max_length": 512}
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    modules = [
        {"idx": n, "name": str(n), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for n, (path, kind) in enumerate(TYPES.items())
        if path in paths
    ]
    write_json(folder / "modules.json", modules)
    write_json(folder / "1_Pooling/config.json", {"word_embedding_dimension": 16, **pooling})
    write_json(folder / "sentence_bert_config.json", {"max_seq_length": 8, "do_lower_case": False})
    return folder


def add_dense(
    folder: Path, activation: str = "Tanh", size: int = 16, width: int = 12, *, bias: bool = True
) -> Path:
    """Put a dense layer, as Sentence Transformers saves it, before the end of a model."""
    from sentence_transformers.sentence_transformer.modules import Dense

    modules = json.loads((folder / "modules.json").read_text())
    ends = [each for each in modules if each["type"].endswith("Normalize")]
    modules = [each for each in modules if each not in ends]
    place = f"{len(modules)}_Dense"
    layer = Dense(size, width, bias=bias, activation_function=getattr(torch.nn, activation)())
    (folder / place).mkdir()
    layer.save(str(folder / place))
    modules.append({"path": place, "type": "sentence_transformers.models.Dense"})
    modules += [{**each, "path": f"{len(modules)}_Normalize"} for each in ends]
    modules = [{**each, "idx": n, "name": str(n)} for n, each in enumerate(modules)]
    write_json(folder / "modules.json", modules)
    return folder


def write_json(path: Path, content: Any) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(content))


def encoded(folder: Path, texts: Sequence[str]) -> np.ndarray:
    """What Sentence Transformers gives, without a line of ours."""
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(str(folder), device="cpu", local_files_only=True)
    embeddings: np.ndarray = model.encode(list(texts), convert_to_numpy=True)
    return embeddings
