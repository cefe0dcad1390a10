"""Tiny experts and their statistics, for tests of merging."""

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForSequenceClassification, PreTrainedModel

from fmn.fisher import architectures, gram, parameters
from fmn.fisher.architectures import NodeValues
from fmn.merge.inputs import StoredGrams
from fmn.store.headers import TensorHeader, file_headers
from tests.tiny import tiny_examples, tiny_model

LABELS = {"mrpc": 2, "stsb": 1, "mnli": 3}


def save(model: PreTrainedModel, folder: Path, dtype: torch.dtype = torch.float32) -> Path:
    model.to(dtype).save_pretrained(folder)
    (folder / "vocab.txt").write_text("[PAD]\n[CLS]\n[SEP]\n")
    (folder / "tokenizer_config.json").write_text(json.dumps({"name": folder.name}))
    return folder


def checkpoints(
    folder: Path, name: str = "bert", dtype: torch.dtype = torch.float32
) -> dict[str, Path]:
    """An expert for each of three tasks."""
    return {
        task: save(tiny_model(name, labels, seed), folder / task, dtype)
        for seed, (task, labels) in enumerate(LABELS.items())
    }


def load(folder: Path) -> PreTrainedModel:
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    model.config.pad_token_id = model.config.pad_token_id or 0
    return model


def node_fisher(experts: Mapping[str, Path], seed: int = 0) -> dict[str, NodeValues]:
    """Random Fisher information of the mask nodes."""
    rng = np.random.default_rng(seed)
    return {
        task: {
            site.site: rng.gamma(1.0, size=site.nodes)
            for site in architectures.mask_sites(load(folder))
        }
        for task, folder in experts.items()
    }


def full_fisher(experts: Mapping[str, Path], target: Path) -> dict[str, Mapping[str, TensorHeader]]:
    """The Fisher information of all parameters, in files TASK.full below a folder."""
    headers: dict[str, Mapping[str, TensorHeader]] = {}
    for seed, (task, folder) in enumerate(experts.items()):
        squares = parameters.estimate(
            load(folder),
            tiny_examples("bert", 30, LABELS[task], seed),
            estimator="expected",
            problem_type="regression" if task == "stsb" else "single_label_classification",
            device="cpu",
        )
        headers[task] = _written(target / f"{task}.full", squares)
    return headers


def grams(experts: Mapping[str, Path], target: Path, name: str = "bert") -> dict[str, StoredGrams]:
    """Gram matrices on random texts, in files TASK.gram below a folder."""
    stored = {}
    for seed, (task, folder) in enumerate(experts.items()):
        examples = tiny_examples(name, 30, LABELS[task], seed)
        computed = gram.estimate(load(folder), examples, device="cpu")
        moments = _written(target / f"{task}.gram", computed.moments)
        stored[task] = StoredGrams(moments, computed.inputs, sorted(computed.transposed))
    return stored


def _written(path: Path, tensors: Mapping[str, Tensor]) -> dict[str, TensorHeader]:
    save_file({name: tensor.float().contiguous() for name, tensor in tensors.items()}, path)
    return file_headers(path)
