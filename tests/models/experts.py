"""Experts as people have them: made by plain Transformers, with rows that they have right."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedTokenizerFast,
)

from fmn.tasks.kinds import ProblemType
from fmn.tasks.task import Columns, Task, write_task
from tests.tiny import WORDS, tiny_model

TEXTS = [
    " ".join(f"w{word}" for word in np.random.default_rng(row).integers(3, WORDS, 8)) + " </s>"
    for row in range(240)
]


def expert(
    folder: Path,
    outputs: int,
    *,
    architecture: str = "bert",
    names: Sequence[str] | None = None,
    problem_type: str | None = None,
    shards: str = "1GB",
) -> Path:
    """A checkpoint of a random model whose answers differ from text to text."""
    words = {"<pad>": 0, "<s>": 1, "</s>": 2, **{f"w{word}": word for word in range(3, WORDS)}}
    vocabulary = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    vocabulary.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=vocabulary, pad_token="<pad>", eos_token="</s>", unk_token="<pad>"
    )
    tokenizer.save_pretrained(folder)
    model = tiny_model(architecture, num_labels=outputs, dtype=torch.float32)
    if names is not None:
        model.config.id2label = dict(enumerate(names))
        model.config.label2id = {name: output for output, name in enumerate(names)}
    model.config.problem_type = problem_type
    model.save_pretrained(folder, max_shard_size=shards)
    bias = dict(model.named_parameters()).get("classifier.bias")
    if bias is not None:
        with torch.no_grad():
            bias -= torch.from_numpy(answers(folder).mean(axis=0))
        model.save_pretrained(folder, max_shard_size=shards)
    return folder


def answers(folder: Path, texts: Sequence[str] = TEXTS) -> np.ndarray:
    """Logits [N, C], as plain Transformers computes them."""
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    inputs = AutoTokenizer.from_pretrained(folder)(list(texts), padding=True, return_tensors="pt")
    inputs.pop("token_type_ids", None)
    with torch.inference_mode():
        logits: np.ndarray = model(**inputs).logits.float().numpy()
    return logits


def make_task(
    labels: Sequence[str], kind: ProblemType = "single_label_classification", **more: Any
) -> Task:
    """A task of single texts."""
    metrics = {"regression": "pearson", "multi_label_classification": "f1_micro"}
    more = {"metrics": (metrics.get(kind, "accuracy"),), **more}
    columns = Columns(text="text")
    return Task(name="own", problem_type=kind, columns=columns, labels=tuple(labels), **more)


def write_rows(folder: Path, task: Task, labels: np.ndarray) -> Path:
    """The texts with these labels as a task's training rows; several labels at once as [N, C]."""
    values = [np.flatnonzero(row).tolist() for row in labels] if labels.ndim == 2 else labels
    folder.mkdir(parents=True)
    pq.write_table(
        pa.table({"text": TEXTS[: len(labels)], "label": values}), folder / "train.parquet"
    )
    write_task(folder, task)
    return folder
