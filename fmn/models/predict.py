"""A model's predictions on a task."""

import numpy as np
import torch
from transformers import PreTrainedModel

from fmn.models.devices import autocast, placed, resolve_device, resolve_dtype
from fmn.store.stage import Progress, no_progress
from fmn.tasks.batches import Examples, by_length

# Tokens of a batch on a CPU, where larger ones leave the caches; a GPU takes 16 times as many.
TOKENS = 2048


def predict(
    model: PreTrainedModel,
    examples: Examples,
    *,
    device: str = "auto",
    dtype: str = "auto",
    width: int | None = None,
    progress: Progress = no_progress,
) -> np.ndarray:
    """Logits, float32 [N, C], in the examples' order.

    The model is moved to `device` and put in evaluation mode; it computes in `dtype` (see
    `devices.resolve_dtype`). `width` is C where the model gives something else than a logit for
    each of its labels. `progress` is called with (examples done, all examples).

    Raises:
        UserError: this machine has no such device, or there is no such dtype.
    """
    target = resolve_device(device)
    compute_dtype = resolve_dtype(dtype, target)
    model.eval()
    logits = np.zeros((len(examples), width or model.config.num_labels), dtype=np.float32)
    done = 0
    tokens = TOKENS if target.type == "cpu" else 16 * TOKENS
    computing = autocast(target, compute_dtype)
    with placed(model, target, compute_dtype), torch.inference_mode(), computing:
        for batch in by_length(examples, tokens=tokens):
            inputs = {name: value.to(target) for name, value in batch.inputs.items()}
            output = model(**inputs).logits  # [B, C]
            logits[batch.rows] = output.float().cpu().numpy()
            done += len(batch.rows)
            progress(done, len(examples))
    return logits
