"""Examples of every problem type, and the Fisher information of their losses by brute force."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import product
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel

from fmn.tasks.batches import Examples
from fmn.tasks.kinds import ProblemType
from tests.tiny import tiny_examples

ONE_LABEL: ProblemType = "single_label_classification"
MANY_LABELS: ProblemType = "multi_label_classification"
VALUE: ProblemType = "regression"
PROBLEMS: list[tuple[ProblemType, int]] = [
    (VALUE, 1),
    (ONE_LABEL, 2),
    (ONE_LABEL, 7),
    (MANY_LABELS, 1),
    (MANY_LABELS, 3),
    (MANY_LABELS, 5),
]


def labelled(
    name: str, count: int, problem_type: ProblemType, outputs: int, seed: int = 0
) -> Examples:
    """Random examples with labels of a problem type."""
    examples = tiny_examples(name, count, outputs, seed)
    if problem_type != MANY_LABELS:
        return examples
    labels = np.random.default_rng(seed).integers(0, 2, (count, outputs)).astype(np.float32)
    return replace(examples, labels=labels)


def logits_of(model: PreTrainedModel, examples: Examples, row: int) -> Tensor:
    """The logits [C] of one example by itself, without padding."""
    inputs = {
        name: torch.as_tensor(np.asarray(values[row]))[None]
        for name, values in examples.inputs.items()
    }
    logits: Tensor = model(**inputs).logits[0]
    return logits


def loss(problem_type: ProblemType, logits: Tensor, label: Any) -> Tensor:
    """The loss of one example's label; for classes, minus the logarithm of its probability."""
    target = torch.as_tensor(label)
    if problem_type == ONE_LABEL:
        return functional.cross_entropy(logits, target)
    target = target.to(logits.dtype)
    if problem_type == VALUE:
        return (logits[0] - target) ** 2
    return functional.binary_cross_entropy_with_logits(logits, target, reduction="sum")


def losses(
    problem_type: ProblemType, logits: Tensor, label: Any, estimator: str
) -> Iterator[tuple[Tensor, float]]:
    """What is differentiated, and the weight of its square: every label that there may be."""
    if estimator == "empirical":
        yield loss(problem_type, logits, label), 1.0
    elif problem_type == VALUE:  # of N(output, 1), whose E[((y - output) d output)^2] is this
        yield logits[0], 1.0
    else:
        classes = range(len(logits))
        several = product((0.0, 1.0), repeat=len(logits))
        for each in classes if problem_type == ONE_LABEL else several:
            own = loss(problem_type, logits, each)
            yield own, float(torch.exp(-own.detach()))


def squares(weighted: Iterator[tuple[Tensor, float]], leaves: Sequence[Tensor]) -> list[Tensor]:
    """The weighted sum of squared gradients of losses, for each leaf."""
    sums = [torch.zeros_like(leaf) for leaf in leaves]
    for own, weight in weighted:
        gradients = torch.autograd.grad(own, leaves, retain_graph=True, allow_unused=True)
        for total, gradient in zip(sums, gradients, strict=True):
            total += 0 if gradient is None else weight * gradient**2
    return sums
