"""The exact diagonal Fisher information of every parameter of the encoder, one example at a time.

The statistic of Fisher merging (Matena and Raffel 2022, arXiv 2111.09832, eq. 3), which mask nodes stand in for at a
fraction of its cost (`fmn.fisher`).
"""

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel

from fmn.errors import UserError
from fmn.fisher.mask_nodes import directions_of, draws_of, prepared
from fmn.models.devices import resolve_device, resolve_dtype
from fmn.tasks.batches import Examples, pad_batch, select

ESTIMATORS = ("empirical", "expected", "sampled")


def estimate(
    model: PreTrainedModel,
    examples: Examples,
    *,
    estimator: str,
    regression: bool,
    samples: int | Literal["auto"] | None = None,
    seed: int = 0,
    device: str = "auto",
    dtype: str = "float32",
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Tensor]:
    """The mean over examples of the squared gradient of the loss, by parameter name in the base model.

    `estimator`, `samples`, `seed`, `device` and `dtype` are those of `fmn.fisher.estimate`, but for "batch" and "auto"
    samples; the loss is that of one example alone, whose gradient is taken by itself: 2 to 3 passes an example.
    Returns float32 tensors of the parameters' shapes (float64 for dtype float64), on the CPU.
    """
    if estimator not in ESTIMATORS:
        raise UserError(
            f"estimator {estimator!r} is unknown here: choose one of {', '.join(ESTIMATORS)}"
        )
    where = resolve_device(device)
    rows = select(examples.labels, None if samples is None else int(samples), seed)
    prefix = f"{model.base_model_prefix}."
    with prepared(model, examples, where, resolve_dtype(dtype, where)) as runner:
        names = [name for name, _ in model.named_parameters() if name.startswith(prefix)]
        # For bfloat16 some are narrow; the sums are not.
        leaves = [runner.tensors[name].requires_grad_() for name in names]

        sums = [
            torch.zeros_like(leaf, dtype=max(leaf.dtype, torch.float32, key=lambda d: d.itemsize))
            for leaf in leaves
        ]
        for done, row in enumerate(rows, 1):
            batch = pad_batch(examples, rows[done - 1 : done], len(_tokens(examples, int(row))))
            draws = draws_of(seed, rows[done - 1 : done]) if estimator == "sampled" else None
            with torch.enable_grad():
                logits = runner.logits(batch)
            directions = directions_of(runner, logits, batch, draws, estimator, regression)
            for i, direction in enumerate(directions):
                more = i + 1 < len(directions)
                found = torch.autograd.grad(
                    logits, leaves, direction.to(logits.dtype), more, allow_unused=True
                )
                for total, gradient in zip(sums, found, strict=True):
                    if gradient is not None:
                        wide = gradient.to(total.dtype)
                        total.addcmul_(wide, wide)
            if progress:
                progress(done, len(rows))
        return {
            name.removeprefix(prefix): total.div_(len(rows)).cpu()
            for name, total in zip(names, sums, strict=True)
        }


def _tokens(examples: Examples, row: int) -> list[int]:
    """An example's tokens; one for an example without any."""
    return next(
        (values[row] for name, values in examples.inputs.items() if name in examples.pad), [0]
    )
