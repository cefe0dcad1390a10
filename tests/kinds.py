"""Checkpoints of every kind of task, as people have them: tiny, random, by plain libraries."""

import io
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
import transformers
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from fmn.merge.model import write_model
from fmn.merge.recipe import MergeSettings
from fmn.sources import names
from fmn.tasks.kinds import KINDS, KindName
from fmn.tasks.task import Columns, Task, write_task
from tests.tiny import CONFIGS

PIECES = ("<pad>", "<s>", "</s>", "<unk>", "w", "v", ".", *(f"##{digit}" for digit in range(10)))
TAGS = ("O", "B-PER", "I-PER", "B-LOC", "I-LOC")
TEXTS = ["w12 v3 w9", "v1", "w4 w5 v60 v7 w8 w9 .", "v22 v22 w0"]
TASKS: Mapping[str, Task] = {
    "mood": Task(
        name="mood", columns=Columns(text="text"), labels=("sad", "glad", "odd"), max_length=24
    ),
    "ner": Task(
        name="ner", task="token-classification", columns=Columns(tokens="tokens"), labels=TAGS,
        metrics=("seqeval_f1",), max_length=12,
    ),
    "similar": Task(
        name="similar", task="sentence-similarity",
        columns=Columns(text="text", text_pair="text_pair"), metrics=("spearmanr_cosine",),
        max_length=24,
    ),
    "flowers": Task(
        name="flowers", task="image-classification", columns=Columns(image="image"),
        labels=("rose", "lily", "poppy"),
    ),
    "chat": Task(
        name="chat", task="text-generation",
        columns=Columns(prompt="prompt", completion="completion", label=None), max_length=24,
    ),
    "sums": Task(
        name="sums", task="text2text-generation",
        columns=Columns(prompt="prompt", completion="completion", label=None), max_length=24,
    ),
}  # fmt: skip
"""A task of every kind."""
ARCHITECTURES: Mapping[KindName, str] = {
    "image-classification": "vit",
    "text-generation": "gpt2",
    "text2text-generation": "t5",
}
"""Where it is not a BERT."""


def piece_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """Write a tokenizer that cuts words such as w12 into several pieces."""
    pieces = {piece: number for number, piece in enumerate(PIECES)}
    tokenizer = Tokenizer(models.WordPiece(pieces, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> $B </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>",
        unk_token="<unk>", model_input_names=["input_ids", "attention_mask"],
    )  # fmt: skip
    fast.save_pretrained(folder)
    return fast


def images(count: int = 3, side: int = 20) -> list[bytes]:
    """The content of PNG files."""
    files = []
    for number in range(count):
        pixels = np.random.default_rng(number).integers(0, 256, (side, side, 3), dtype=np.uint8)
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, format="PNG")
        files.append(file.getvalue())
    return files


def tiny_expert(folder: Path, task: Task, seed: int = 0) -> PreTrainedModel:
    """Write an expert for a task of any kind; another seed gives other weights."""
    name = ARCHITECTURES.get(task.task, "bert")
    config = CONFIGS[name]()
    if task.labels:
        config.id2label, config.label2id = dict(enumerate(task.labels)), None
        config.label2id = {label: number for number, label in enumerate(task.labels)}
    torch.manual_seed(seed)
    model: PreTrainedModel = getattr(transformers, KINDS[task.task].auto_class).from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.eval().save_pretrained(folder)
    if task.task == "image-classification":
        transformers.ViTImageProcessorPil(size={"height": 8, "width": 8}).save_pretrained(folder)
    else:
        piece_tokenizer(folder)
    if task.task == "sentence-similarity":
        _write_modules(folder)
    write_task(folder, task)
    names.normalise(folder, [])  # as `fmn fetch` does
    return model


def _write_modules(folder: Path) -> None:
    """Add what makes an encoder a Sentence Transformer: mean pooling, a dense layer, length one."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import (
        Dense,
        Normalize,
        Pooling,
        Transformer,
    )

    encoder = Transformer(str(folder))
    size = encoder.get_embedding_dimension()
    modules = [encoder, Pooling(size), Dense(size, 10), Normalize()]
    SentenceTransformer(modules=modules, device="cpu").save(str(folder))
    piece_tokenizer(folder)  # the same as that of the other kinds


def merged_model(folder: Path, tasks: Mapping[str, Task], seed: int = 0) -> Path:
    """Experts for tasks of one architecture, and what they are merged to, `folder`/merged."""
    experts = {name: folder / "experts" / name for name in tasks}
    for number, (name, task) in enumerate(tasks.items(), seed):
        tiny_expert(experts[name], task, number)
    write_model(folder / "merged", experts, MergeSettings(method="average"), definitions=tasks)
    return folder / "merged"
