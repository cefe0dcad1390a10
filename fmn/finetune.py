"""An expert from a base model: plain supervised fine-tuning of the whole model, in memory."""

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional
from transformers import AutoModelForSequenceClassification, PreTrainedModel

from fmn.batches import Examples, pad_batch
from fmn.devices import autocast, place, resolve_device, resolve_dtype
from fmn.errors import UserError
from fmn.tasks import Task

WARMUP = 0.1  # share of the steps in which the learning rate rises
WEIGHT_DECAY = 0.01
CLIP = 1.0  # largest norm of a step's gradient
POOL = 16  # batches whose examples are sorted by length together


def new_expert(base: Path, task: Task, seed: int) -> PreTrainedModel:
    """The base model in `base` with a fresh head for `task`, in float32; its config names the labels by id.

    The head depends on `seed` alone. Any head in `base` is left behind.
    """
    torch.manual_seed(seed)
    names = dict(enumerate(task.labels or ("score",)))
    model = AutoModelForSequenceClassification.from_pretrained(
        base,
        num_labels=task.num_outputs,
        id2label=names,
        label2id={name: label for label, name in names.items()},
        problem_type="regression" if task.regression else "single_label_classification",
        ignore_mismatched_sizes=True,
        local_files_only=True,
        use_safetensors=True,
        dtype=torch.float32,
    )
    return model  # type: ignore[no-any-return]


def finetune(
    model: PreTrainedModel,
    examples: Examples,
    *,
    regression: bool,
    epochs: float,
    learning_rate: float,
    batch_size: int,
    seed: int,
    device: str = "auto",
    dtype: str = "auto",
    progress: Callable[[int, int], None] | None = None,
) -> list[float]:
    """Train every parameter of `model` in place, and return the mean loss of each step.

    AdamW, with a learning rate that rises linearly over the first tenth of the steps and falls linearly to zero.
    The loss is cross entropy, or squared error for `regression`. `progress` is called with (steps done, all steps).
    Repeats exactly with the same arguments, threads and hardware. The model stays on `device`, in evaluation mode.
    """
    if not len(examples):
        raise UserError("There are no examples to fine-tune on: the training split is empty.")
    where = resolve_device(device)
    precision = resolve_dtype(dtype, where)
    torch.manual_seed(seed)
    shuffled = np.random.default_rng(seed)
    place(model, where, precision)
    model.train()
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    # Biases and normalisation are not decayed: they have one dimension.
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": WEIGHT_DECAY},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=learning_rate, fused=True)
    steps = max(1, round(epochs * math.ceil(len(examples) / batch_size)))
    warmup = max(1, round(WARMUP * steps))
    losses: list[float] = []
    order: list[np.ndarray] = []
    lengths = examples.lengths
    for step in range(steps):
        order = order or _batches(lengths, batch_size, shuffled)
        rows = order.pop()
        rate = learning_rate * min((step + 1) / warmup, (steps - step) / max(1, steps - warmup))
        for group in optimizer.param_groups:
            group["lr"] = rate
        batch = pad_batch(examples, rows, int(lengths[rows].max()))
        labels = batch.labels.to(where)
        with autocast(where, precision):
            logits = model(**{name: value.to(where) for name, value in batch.inputs.items()}).logits  # [B, C]
        loss = loss_of(logits.float(), labels, regression)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, CLIP)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if progress:
            progress(step + 1, steps)
    model.eval()
    if not math.isfinite(sum(losses)):
        raise UserError(f"Fine-tuning diverged (the loss is not finite): lower the learning rate, now {learning_rate}.")
    return losses


def loss_of(logits: torch.Tensor, labels: torch.Tensor, regression: bool) -> torch.Tensor:
    """Mean loss of logits [B, C] on labels [B]: squared error for regression (C = 1), else cross entropy."""
    if regression:
        return functional.mse_loss(logits.squeeze(-1), labels.float())
    return functional.cross_entropy(logits, labels)


def _batches(lengths: np.ndarray, size: int, random: np.random.Generator) -> list[np.ndarray]:
    """One epoch of batches in random order; examples of like length share a batch, so that little padding is computed."""
    order = random.permutation(len(lengths))
    batches = []
    for start in range(0, len(order), size * POOL):
        pool = order[start : start + size * POOL]
        pool = pool[np.argsort(lengths[pool], kind="stable")]
        batches += [pool[at : at + size] for at in range(0, len(pool), size)]
    return [batches[index] for index in random.permutation(len(batches))]
