"""A model's predictions on a task, and GLUE's own metrics of them."""

from collections.abc import Callable, Mapping
from types import MappingProxyType

import numpy as np
import torch
from scipy import stats
from sklearn import metrics
from transformers import PreTrainedModel

from fmn.errors import UserError
from fmn.evaluate.bootstrap import Answers
from fmn.models.devices import autocast, placed, resolve_device, resolve_dtype
from fmn.tasks.batches import Examples, by_length
from fmn.tasks.task import Task

# Tokens of a batch on a CPU, where larger ones leave the caches; a GPU takes 16 times as many.
TOKENS = 2048


def predict(
    model: PreTrainedModel,
    examples: Examples,
    *,
    device: str = "auto",
    dtype: str = "auto",
    progress: Callable[[int, int], None] | None = None,
) -> np.ndarray:
    """Logits, float32 [N, C], in the examples' order.

    The model is moved to `device` and put in evaluation mode; it computes in `dtype` (see
    `devices.resolve_dtype`). `progress` is called with (examples done, all examples).

    Raises:
        UserError: this machine has no such device, or there is no such dtype.
    """
    target = resolve_device(device)
    compute_dtype = resolve_dtype(dtype, target)
    model.eval()
    logits = np.zeros((len(examples), model.config.num_labels), dtype=np.float32)
    done = 0
    tokens = TOKENS if target.type == "cpu" else 16 * TOKENS
    computing = autocast(target, compute_dtype)
    with placed(model, target, compute_dtype), torch.inference_mode(), computing:
        for batch in by_length(examples, tokens=tokens):
            inputs = {name: value.to(target) for name, value in batch.inputs.items()}
            output = model(**inputs).logits  # [B, C]
            logits[batch.rows] = output.float().cpu().numpy()
            done += len(batch.rows)
            if progress:
                progress(done, len(examples))
    return logits


def answers(task: Task, logits: np.ndarray, labels: np.ndarray) -> Answers:
    """What the outputs `logits` [N, C] say: class ids, or values of a regression task; beside `labels` [N]."""
    if logits.shape != (len(labels), task.num_outputs):
        raise ValueError(
            f"{task.name}: logits {logits.shape} for {len(labels)} labels and {task.num_outputs} outputs"
        )
    if not len(labels):
        raise UserError(f"{task.name}: there are no examples to score.")
    if not np.isfinite(logits).all():
        raise UserError(f"{task.name}: the model's outputs are not finite, so it cannot be scored.")
    return Answers(logits[:, 0] if task.regression else logits.argmax(axis=1), labels)


def score(task: Task, logits: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """The task's metrics by name, as fractions, and "score", their mean.

    `logits` [N, C] are a model's outputs, `labels` [N] the class ids, or the target values of a regression task.
    Correlations (and `matthews_correlation`) lie in -1..1 and are 0 where either side is constant; the rest in 0..1.
    """
    return score_answers(task, answers(task, logits, labels))


def score_answers(task: Task, given: Answers) -> dict[str, float]:
    """The same of answers, such as `artifacts.read_predictions` gives."""
    scores = {name: float(METRICS[name](given.labels, given.predicted)) for name in task.metrics}
    return {**scores, "score": sum(scores.values()) / len(scores)}


def _correlation(
    function: Callable[..., tuple[float, float]],
) -> Callable[[np.ndarray, np.ndarray], float]:
    def correlation(labels: np.ndarray, predicted: np.ndarray) -> float:
        labels, predicted = labels.astype(np.float64), predicted.astype(np.float64)
        # SciPy warns and returns NaN for a constant, and warns where the spread is lost in rounding.
        if any(
            np.ptp(values) <= 1e-12 * np.abs(values).max(initial=0.0)
            for values in (labels, predicted)
        ):
            return 0.0
        return float(function(labels, predicted)[0])

    return correlation


def _f1(labels: np.ndarray, predicted: np.ndarray) -> float:
    return float(metrics.f1_score(labels, predicted, zero_division=0.0))


def _matthews(labels: np.ndarray, predicted: np.ndarray) -> float:
    # scikit-learn warns where all labels and predictions are one class; the coefficient is 0 there by convention.
    if len(np.union1d(labels, predicted)) < 2:
        return 0.0
    return float(metrics.matthews_corrcoef(labels, predicted))


METRICS: Mapping[str, Callable[[np.ndarray, np.ndarray], float]] = MappingProxyType(
    {
        "accuracy": lambda labels, predicted: float(metrics.accuracy_score(labels, predicted)),
        "f1": _f1,
        "matthews_correlation": _matthews,
        "pearson": _correlation(stats.pearsonr),
        "spearmanr": _correlation(stats.spearmanr),
    }
)
