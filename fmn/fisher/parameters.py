"""The exact diagonal Fisher information of every parameter of the encoder.

This is the statistic of Fisher merging (Matena and Raffel 2022, arXiv 2111.09832, eq. 3). Mask
nodes approximate it at a fraction of its cost (`fmn.fisher.mask_nodes`).
"""

from collections.abc import Callable

import torch
from torch import Tensor
from transformers import PreTrainedModel

from fmn.errors import UserError
from fmn.fisher.loss import Loss
from fmn.fisher.runner import backward_passes, float_dtype, outputs_of, prepared
from fmn.models.checkpoints import names_in_base
from fmn.models.devices import resolve_device, resolve_dtype
from fmn.tasks.batches import Examples, pad_batch, select
from fmn.tasks.task import LossName

ESTIMATORS = ("empirical", "expected", "sampled")


def estimate(
    model: PreTrainedModel,
    examples: Examples,
    *,
    estimator: str,
    problem_type: LossName,
    samples: int | None = None,
    seed: int = 0,
    device: str = "auto",
    dtype: str = "float32",
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Tensor]:
    """The mean over examples of the squared gradient of the loss, by parameter of the base model.

    Arguments as for `fmn.fisher.estimate`, but for the estimator "batch". The gradient of every
    example is computed by itself: 2 to 3 passes an example.

    Returns:
        float32 tensors of the parameters' shapes (float64 for dtype float64), on the CPU.
    """
    if estimator not in ESTIMATORS:
        choice = ", ".join(ESTIMATORS)
        raise UserError(f"estimator {estimator!r} is unknown here: choose one of {choice}")
    loss = Loss(estimator, problem_type, seed)
    loss.check(examples.labels, outputs_of(model))
    target = resolve_device(device)
    rows = select(examples.labels, samples, seed)
    with prepared(model, examples, target, resolve_dtype(dtype, target)) as runner:
        names = names_in_base(model, [name for name, _ in model.named_parameters()])
        leaves = [runner.tensors[name].requires_grad_() for name in names]
        # Leaves may be bfloat16; the sums are not.
        sums = [torch.zeros_like(leaf, dtype=float_dtype(leaf.dtype)) for leaf in leaves]
        for done in range(1, len(rows) + 1):
            batch = pad_batch(examples, rows[done - 1 : done])
            with torch.enable_grad():
                logits = runner.logits(batch)
            directions = loss.directions(logits, batch.labels, rows[done - 1 : done])
            for gradients in backward_passes(logits, leaves, directions):
                for total, gradient in zip(sums, gradients, strict=True):
                    if gradient is not None:
                        total.addcmul_(gradient.to(total.dtype), gradient.to(total.dtype))
            if progress:
                progress(done, len(rows))
        return {
            name: total.div_(len(rows)).cpu()
            for name, total in zip(names.values(), sums, strict=True)
        }
