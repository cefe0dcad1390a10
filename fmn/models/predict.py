"""A model's predictions on a task."""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from fmn.models.devices import autocast, placed, resolve_device, resolve_dtype
from fmn.store.stage import Progress, no_progress
from fmn.tasks.batches import Batch, Examples, by_length

# Tokens of a batch on a CPU, where larger ones leave the caches; a GPU takes 16 times as many.
TOKENS = 2048
Reduce = Callable[[Tensor, Batch], Tensor]


def predict(
    model: PreTrainedModel,
    examples: Examples,
    *,
    device: str = "auto",
    dtype: str = "auto",
    reduce: Reduce = lambda logits, _: logits,
    progress: Progress = no_progress,
) -> np.ndarray:
    """Logits, float32 [N, C], in the examples' order; of tokens [N, T, C], zeros behind the last.

    The model is moved to `device` and put in evaluation mode; it computes in `dtype` (see
    `devices.resolve_dtype`). `reduce` gets the logits [B, ...] of each batch, and what it gives,
    [B, ...], stands in for them. `progress` is called with (examples done, all examples).

    Raises:
        UserError: this machine has no such device, or there is no such dtype.
    """
    target = resolve_device(device)
    compute_dtype = resolve_dtype(dtype, target)
    model.eval()
    logits: np.ndarray | None = None
    done = 0
    tokens = TOKENS if target.type == "cpu" else 16 * TOKENS
    computing = autocast(target, compute_dtype)
    with placed(model, target, compute_dtype), torch.inference_mode(), computing:
        for batch in by_length(examples, tokens=tokens):
            inputs = {name: value.to(target) for name, value in batch.inputs.items()}
            output = reduce(model(**inputs).logits, batch).float().cpu().numpy()
            if logits is None:  # the first batch has the longest example
                logits = np.zeros((len(examples), *output.shape[1:]), dtype=np.float32)
            logits[batch.rows, : output.shape[1]] = output
            done += len(batch.rows)
            progress(done, len(examples))
    return np.zeros((0, model.config.num_labels), np.float32) if logits is None else logits
