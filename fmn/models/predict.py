"""A model's predictions on a task."""

from collections.abc import Callable

import numpy as np
import torch
from transformers import PreTrainedModel

from fmn.models.devices import autocast, placed, resolve_device, resolve_dtype
from fmn.tasks.batches import Examples, by_length

TOKENS = 2048  # of a batch on a CPU, where larger ones leave the caches; a GPU takes sixteen times as many


def predict(
    model: PreTrainedModel,
    examples: Examples,
    *,
    device: str = "auto",
    dtype: str = "auto",
    progress: Callable[[int, int], None] | None = None,
) -> np.ndarray:
    """Logits, float32 [N, C], in the examples' order. `progress` is called with (examples done, all examples).

    The model is moved to `device` and put in evaluation mode; it computes in `dtype` (see `devices.resolve_dtype`).
    """
    where = resolve_device(device)
    precision = resolve_dtype(dtype, where)
    model.eval()
    logits = np.zeros((len(examples), model.config.num_labels), dtype=np.float32)
    done = 0
    with placed(model, where, precision), torch.inference_mode(), autocast(where, precision):
        for batch in by_length(examples, tokens=TOKENS if where.type == "cpu" else 16 * TOKENS):
            output = model(**{name: value.to(where) for name, value in batch.inputs.items()}).logits
            logits[batch.rows] = output.float().cpu().numpy()
            done += len(batch.rows)
            if progress:
                progress(done, len(examples))
    return logits
