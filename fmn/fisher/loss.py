"""The losses whose squared gradients are the Fisher information, as directions of the logits.

An estimator of the Fisher information is the mean over examples of

- "empirical": (dL)^2 with the loss L of the example's label;
- "expected": E_y[(d log p(y))^2] over labels y of the model's own distribution p, exactly;
- "sampled": (d log p(y))^2 for one y drawn from p by the seed and the example's row.

"batch" uses the loss of "empirical". The problem type determines L and p:

- single-label classification: the cross entropy, and the softmax of the logits;
- multi-label classification: the sum over labels of binary cross entropies, and an independent
  Bernoulli variable for each label;
- regression: the squared error, and a Gaussian of unit variance around the output;
- "tokens" (tags, generated text): the sum over an example's labelled tokens of cross entropies, and
  an independent softmax for each;
- "embedding": a Gaussian of unit variance around each component, drawn at random; no labels.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fmn.errors import UserError
from fmn.fisher.runner import float_dtype
from fmn.models.devices import places, to_device
from fmn.tasks.batches import IGNORED
from fmn.tasks.task import LossName

ESTIMATORS = ("empirical", "expected", "sampled", "batch")


# For tokens and embeddings, which have very many outputs.
_OFFERED: Mapping[str, tuple[str, ...]] = {
    "tokens": ("empirical", "sampled", "batch"),
    "embedding": ("sampled",),
}


@dataclass(frozen=True)
class Loss:
    """The loss with the labels that an estimator uses; `seed` draws the labels of "sampled"."""

    estimator: str
    problem_type: LossName
    seed: int

    def directions(self, logits: Tensor, labels: Tensor, rows: np.ndarray) -> Sequence[Tensor]:
        """Vectors v [B, C]: the estimator sums the squared gradients of v . logits over them.

        Args:
            logits: [B, C], the model's outputs; of tokens [B, T, C], or [M, C] of the M that have a
                label alone.
            labels: [B], class ids or values; or [B, C], zeros and ones. "expected" and "sampled"
                do not read them. Of tokens [B, T], ids, or IGNORED where a token has no label;
                "sampled" reads where it is so.
            rows: [B], the examples' rows.
        """
        logits = logits.detach().to(float_dtype(logits.dtype))
        if self.problem_type == "tokens":
            return self._of_tokens(logits, labels, rows)
        labels = to_device(labels, logits.device)
        if self.problem_type == "embedding":
            return [torch.special.ndtri(self._uniform(logits, rows, logits.shape[1]))]
        if self.problem_type == "multi_label_classification":
            return self._of_many_labels(logits, labels, rows)
        if self.problem_type == "regression":
            return self._of_a_value(logits, labels, rows)
        return self._of_one_label(logits, labels, rows)

    def _of_one_label(self, logits: Tensor, labels: Tensor, rows: np.ndarray) -> Sequence[Tensor]:
        if self.estimator == "expected":
            return _factor_of_covariance(logits)
        p = logits.log_softmax(1).exp()
        if self.estimator == "sampled":
            uniform = self._uniform(logits, rows, 1)
            labels = (p.cumsum(1) < uniform).sum(1).clamp(max=p.shape[1] - 1)
        return [p.scatter_add(1, labels.long()[:, None], -torch.ones_like(p[:, :1]))]

    def _of_tokens(self, logits: Tensor, labels: Tensor, rows: np.ndarray) -> Sequence[Tensor]:
        answered = places(labels != IGNORED, logits.device)  # [M] of B * T
        is_sparse = logits.ndim == 2
        flat = logits.flatten(0, -2)  # [M, C], or [B * T, C]
        p = (flat if is_sparse else flat[answered]).softmax(-1)  # [M, C]
        ids = to_device(labels[labels != IGNORED], logits.device)
        if self.estimator == "sampled":
            draws = self._uniform(logits, rows, labels.shape[1])  # [B, T]
            uniform = draws.flatten()[answered][:, None]  # [M, 1]
            ids = (p.cumsum(-1) < uniform).sum(-1).clamp(max=p.shape[-1] - 1)
        direction = p.scatter_add_(-1, ids[:, None], -torch.ones_like(p[:, :1]))
        if is_sparse:
            return [direction]
        return [torch.zeros_like(flat).index_put_((answered,), direction).view_as(logits)]

    def _of_many_labels(self, logits: Tensor, labels: Tensor, rows: np.ndarray) -> Sequence[Tensor]:
        p, rest = logits.sigmoid(), (-logits).sigmoid()  # rest: 1 - p, to its last digits
        if self.estimator == "expected":  # d log p(y) / d logits = y - p, of variance p (1 - p)
            return (p * rest).sqrt().diag_embed().unbind(1)  # [B, C, C] -> C vectors [B, C]
        if self.estimator == "sampled":
            labels = self._uniform(logits, rows, logits.shape[1]) < p
        return [torch.where(labels.bool(), -rest, p)]

    def _of_a_value(self, logits: Tensor, labels: Tensor, rows: np.ndarray) -> Sequence[Tensor]:
        if self.estimator == "expected":
            return [torch.ones_like(logits)]
        if self.estimator == "sampled":  # y from N(output, 1), and log p(y) = -(y - output)^2 / 2
            return [torch.special.ndtri(self._uniform(logits, rows, 1))]
        return [2 * (logits - labels.to(logits.dtype)[:, None])]

    def _uniform(self, logits: Tensor, rows: np.ndarray, count: int) -> Tensor:
        draws = torch.from_numpy(uniform_draws(self.seed, rows, count))
        return to_device(draws, logits.device, logits.dtype)

    def check(self, labels: np.ndarray, outputs: int) -> None:
        """Check the inputs of an estimate before a long computation.

        Args:
            labels: of all examples, [N] or [N, C].
            outputs: C, the width of the model's head; 0: it is not checked.

        Raises:
            UserError: the estimator is unknown, there are no examples, or head or labels do not
                fit the problem type.
        """
        if self.estimator not in ESTIMATORS:
            choice = ", ".join(ESTIMATORS)
            raise UserError(f"estimator {self.estimator!r} is unknown: choose one of {choice}")
        if not len(labels):
            raise UserError("there are no examples to estimate the Fisher information from")
        if self.problem_type in _OFFERED and self.estimator not in _OFFERED[self.problem_type]:
            choice = ", ".join(_OFFERED[self.problem_type])
            raise UserError(
                f"estimator {self.estimator} would take a backward pass for each of very many"
                f" outputs, or reads labels that there are none of; choose from {choice}"
            )
        if self.problem_type == "embedding":
            return
        if self.problem_type == "tokens":
            self._check_tokens(labels, outputs)
            return
        is_regression = self.problem_type == "regression"
        is_multi_label = self.problem_type == "multi_label_classification"
        if not is_multi_label and is_regression != (outputs == 1):
            needed = "one" if is_regression else "two or more"
            raise UserError(
                f"the model's head has {outputs} outputs, but {self.problem_type} needs {needed}"
            )
        if self.estimator in ("expected", "sampled"):
            return
        shape = (len(labels), outputs) if is_multi_label else (len(labels),)
        classes = range(2 if is_multi_label else outputs)
        is_valid = np.isfinite(labels) if is_regression else np.isin(labels, classes)
        if labels.shape != shape or not is_valid.all():
            valid = "finite values" if is_regression else f"0 to {classes[-1]}"
            raise UserError(
                f"labels of shape {list(labels.shape)}, from {labels.min()} to {labels.max()}, do"
                f" not fit: {self.problem_type} takes the shape {list(shape)} and {valid}; give"
                " labelled examples, or choose the estimator expected, which reads no labels"
            )

    def _check_tokens(self, labels: np.ndarray, outputs: int) -> None:
        if labels.ndim != 2 or not (labels != IGNORED).any():
            raise UserError("no token has a label; give rows with labels")
        largest, least = labels.max(), labels[labels != IGNORED].min()
        if least < 0 or (outputs and largest >= outputs):
            raise UserError(
                f"labels of tokens from {least} to {largest} do not fit a head of {outputs}"
                " outputs; give an expert of this task"
            )


def _factor_of_covariance(logits: Tensor) -> list[Tensor]:
    """Vectors v_k [B, C] with sum_k v_k v_k^T = diag(p) - p p^T, the covariance of d log p_c.

    For classes d log p_c / d logits = e_c - p. The vectors are the columns of the covariance's
    Cholesky factor: with the tails s_k = p_k + ... + p_C, v_k[k] = sqrt(p_k s_{k+1} / s_k) and
    v_k[j] = -v_k[k] p_j / s_{k+1} for j > k. In logarithms nothing cancels.
    """
    log_p = logits.log_softmax(1)
    tails = log_p.flip(1).logcumsumexp(1).flip(1)  # [B, C]: log s_k
    directions = []
    for k in range(log_p.shape[1] - 1):
        pivot = (0.5 * (log_p[:, k] + tails[:, k + 1] - tails[:, k])).exp()[:, None]  # [B, 1]
        rest = -pivot * (log_p[:, k + 1 :] - tails[:, k + 1, None]).exp()  # [B, C - k - 1]
        directions.append(torch.cat([torch.zeros_like(log_p[:, :k]), pivot, rest], 1))
    return directions


def uniform_draws(seed: int, rows: np.ndarray, count: int = 1) -> np.ndarray:
    """Random numbers in (0, 1) for each row, float64 [B, count].

    They depend on seed, row and column alone (SplitMix64).
    """
    z = rows.astype(np.uint64)[:, None] + np.uint64(1)  # [B, 1]
    for salt in (np.uint64(seed % 2**64), np.arange(count, dtype=np.uint64)):
        z = (z ^ salt) * np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        z = z ^ (z >> np.uint64(31))
    return (z >> np.uint64(11)).astype(np.float64) * 2.0**-53 + 2.0**-54
