"""Embedding models: an encoder, a pooling, and perhaps a normalisation (Sentence Transformers)."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

from torch import Tensor, nn
from transformers import PreTrainedModel

POOLING = Path("1_Pooling/config.json")


class SentenceEncoder(nn.Module):
    """An encoder whose output `logits` is the normalised embedding of each text, [B, D].

    With this name for it, statistics and merges need not know of embeddings.
    """

    base_model_prefix = "encoder"

    def __init__(self, encoder: PreTrainedModel, mode: str) -> None:
        super().__init__()
        self.encoder, self.mode = encoder, mode

    @property
    def base_model(self) -> PreTrainedModel:
        return self.encoder

    @property
    def config(self) -> Any:
        return self.encoder.config

    def set_attn_implementation(self, name: str) -> None:
        self.encoder.set_attn_implementation(name)

    def can_generate(self) -> bool:
        return False

    def forward(self, **inputs: Tensor) -> SimpleNamespace:
        states = self.encoder(**inputs).last_hidden_state  # [B, T, D]
        embedding = pooled(states, inputs["attention_mask"], self.mode)
        return SimpleNamespace(logits=nn.functional.normalize(embedding, dim=-1))


def pooled(states: Tensor, mask: Tensor, mode: str) -> Tensor:
    """The embedding [B, D] of the states [B, T, D] of the tokens in a mask [B, T]."""
    if mode == "cls":
        return states[:, 0]
    weights = mask[..., None].to(states.dtype)
    return (states * weights).sum(1) / weights.sum(1).clamp(min=1e-9)


def sentence_encoder(encoder: PreTrainedModel, folder: Path) -> PreTrainedModel:
    """The embedding model in a folder, of which the encoder was loaded."""
    mode = "mean"
    if (folder / POOLING).is_file():
        settings = json.loads((folder / POOLING).read_text())
        mode = "cls" if settings.get("pooling_mode_cls_token") else mode
    # It has what is needed here of a model of Transformers.
    return cast("PreTrainedModel", SentenceEncoder(encoder, mode).eval())
