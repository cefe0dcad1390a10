"""An expert from a base model: plain supervised fine-tuning of the whole model, in memory."""

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from fmn.errors import UserError
from fmn.models.checkpoints import check_tensors, last_linear, load_config, names_in_base, quiet
from fmn.models.devices import autocast, placed, resolve_device, resolve_dtype
from fmn.models.embedding import SentenceEncoder
from fmn.models.labels import output_entries
from fmn.models.loading import load_model, load_weights
from fmn.models.predict import answered_only
from fmn.store.stage import Progress, no_progress
from fmn.tasks.batches import IGNORED, Batch, Examples, pad_batch
from fmn.tasks.task import LossName, Task

WARMUP = 0.1  # share of the steps in which the learning rate rises
WEIGHT_DECAY = 0.01
CLIP = 1.0  # largest norm of a step's gradient
POOL = 16  # batches whose examples are sorted by length together
# The head starts from noise, the encoder from a good model. With a slow head it is the encoder that
# moves to suit the noise, and the further experts move, the worse they merge.
HEAD_RATE = 30.0


def _cosine_loss(embeddings: Tensor, scores: Tensor) -> Tensor:
    """Squared error of the cosine of two texts: embeddings of B texts, then of their B pairs.

    CosineSimilarityLoss of Sentence Transformers (arXiv 1908.10084, section 3).
    """
    texts, pairs = embeddings.chunk(2)
    return functional.mse_loss((texts * pairs).sum(-1), scores[: len(texts)])


def _of_tokens(logits: Tensor, labels: Tensor) -> Tensor:
    """The mean cross entropy of a batch's labelled tokens; labels [B, T].

    The logits are of all tokens, [B, T, C], or of those with labels, [M, C].
    """
    is_labelled = labels != IGNORED
    logits = logits if logits.ndim == 2 else logits[is_labelled]
    return functional.cross_entropy(logits, labels[is_labelled])


_LOSSES: Mapping[LossName, Callable[[Tensor, Tensor], Tensor]] = {
    "single_label_classification": functional.cross_entropy,
    "multi_label_classification": functional.binary_cross_entropy_with_logits,
    "regression": lambda logits, values: functional.mse_loss(logits.squeeze(-1), values),
    "embedding": _cosine_loss,
    "tokens": _of_tokens,
}


def new_expert(base: Path, task: Task, seed: int) -> PreTrainedModel:
    """A base model with a fresh head for a task, in float32; its config names the labels.

    The head depends on the seed alone; a head that the base has is left behind. For a kind without
    heads, the model is the base as it stands.
    """
    config, kind = load_config(base), task.task
    check_tensors(base, config, head=False, kind=kind)
    if not task.kind.has_head:
        return load_model(base, kind)
    config.num_labels = task.num_outputs
    for name, value in output_entries(task).items():
        setattr(config, name, value)
    with quiet():
        torch.manual_seed(seed)
        auto = getattr(transformers, task.kind.auto_class)
        fresh = auto.from_config(config, dtype=torch.float32)
        torch.manual_seed(seed)  # a pooler is random too, if the base has none
        model = load_weights(base, config, kind, ignore_mismatched_sizes=True)
    with torch.no_grad():
        drawn = dict(fresh.named_parameters())
        for name, parameter in _head(model):
            parameter.copy_(drawn[name])
    return model


def finetune(
    model: PreTrainedModel,
    examples: Examples,
    *,
    problem_type: LossName,
    epochs: float,
    learning_rate: float,
    batch_size: int,
    seed: int,
    device: str = "auto",
    dtype: str = "auto",
    progress: Progress = no_progress,
) -> list[float]:
    """Train every parameter of a model in place, and return the mean loss of each step.

    AdamW, with a learning rate that rises linearly over the first tenth of the steps to its peak
    and falls linearly to zero, `HEAD_RATE` times as high for the head. The loss is Transformers';
    for regression on values of mean 0 and variance 1, so that one rate suits every scale; for pairs
    of texts on scores from 0 to 1, the least and the highest of them. The same arguments, threads
    and hardware repeat it exactly. `epochs` may be a fraction; `progress` gets (steps done, all).

    Raises:
        UserError: there are no examples, all pairs have one score, or the loss diverges.
    """
    if not len(examples):
        raise UserError("fine-tuning: the training split is empty; give one with examples")
    target, random = resolve_device(device), np.random.default_rng(seed)
    compute_dtype = resolve_dtype(dtype, target)
    torch.manual_seed(seed)
    lengths, shift, scale = examples.lengths, 0.0, 1.0
    is_pairs, is_regression = problem_type == "embedding", problem_type == "regression"
    if is_pairs:
        lengths = lengths.reshape(2, -1).max(0)  # [2 N] -> [N]
        examples = replace(examples, labels=_unit_scores(examples.labels))
    if is_regression:
        head = model.get_submodule(last_linear(model))
        examples, shift, scale = _standardized(examples, head)
    steps = max(1, round(epochs * math.ceil(len(lengths) / batch_size)))
    losses, batches = list[float](), list[np.ndarray]()
    longest = examples.longest
    with placed(model, target, compute_dtype, longest), few_embeddings(model, examples) as decay:
        model.train()
        optimizer = torch.optim.AdamW(_groups(model), fused=True)
        for step in range(steps):
            rows = (batches := batches or _batches(lengths, batch_size, random)).pop()
            rows = np.concatenate([rows, rows + len(lengths)]) if is_pairs else rows
            batch = pad_batch(examples, rows)
            loss = _loss(model, batch, problem_type, target, compute_dtype)
            rate = learning_rate * _schedule(step, steps)
            _update(model, optimizer, loss, rate)
            decay(1 - rate * WEIGHT_DECAY)
            losses.append(loss.item() * scale**2)
            if not math.isfinite(losses[-1]):
                remedy = f"take a learning_rate below {learning_rate}"
                raise UserError(f"fine-tuning: the loss diverged in step {step + 1}; {remedy}")
            progress(step + 1, steps)
        if is_regression:
            _rescale(head, shift, scale)
        model.eval()
    return losses


class _Rows(nn.Module):
    """The rows `ids` [K] of an embedding [V, n]; a lookup takes ids of the whole embedding."""

    def __init__(self, whole: nn.Embedding, ids: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(whole.weight.detach()[ids])
        self.places = torch.full((len(whole.weight),), -1, device=ids.device)  # by id
        self.places[ids] = torch.arange(len(ids), device=ids.device)
        padding = -1 if whole.padding_idx is None else int(self.places[whole.padding_idx])
        self.padding = None if padding < 0 else padding

    def forward(self, ids: Tensor) -> Tensor:
        return functional.embedding(self.places[ids], self.weight, self.padding)


@contextmanager
def few_embeddings(
    model: PreTrainedModel, examples: Examples
) -> Iterator[Callable[[float], object]]:
    """In the block, a model has only the embeddings of the examples' tokens; then all again.

    The optimizer updates every embedding in every step, which takes up to a fifth of the time with
    short texts, although it only decays those of other tokens. Embeddings that are also used
    elsewhere, such as in a tied output, all stay.

    Yields:
        a function to call with the factor by which each step decays weights; at the end of the
        block, the other embeddings are multiplied by all factors.
    """
    whole = model.base_model.get_input_embeddings()
    names = dict(model.named_parameters(remove_duplicate=False)).items()
    is_alone = sum(parameter is getattr(whole, "weight", None) for _, parameter in names) == 1
    if type(whole) is not nn.Embedding or not is_alone or "input_ids" not in examples.inputs:
        yield lambda _: None
        return
    tokens = np.concatenate([*examples.inputs["input_ids"], [examples.pad["input_ids"]]])
    ids = torch.from_numpy(np.unique(tokens)).to(whole.weight.device)
    few, factors = _Rows(whole, ids), list[float]()
    model.base_model.set_input_embeddings(few)
    try:
        yield factors.append
    finally:
        model.base_model.set_input_embeddings(whole)
        with torch.no_grad():
            whole.weight.mul_(math.prod(factors))
            whole.weight[ids] = few.weight


def _loss(
    model: PreTrainedModel,
    batch: Batch,
    problem_type: LossName,
    device: torch.device,
    dtype: torch.dtype,
) -> Tensor:
    """The mean loss of a batch, computed in a dtype; itself float32."""
    with autocast(device, dtype), answered_only(model, batch.labels):
        inputs = {name: value.to(device) for name, value in batch.inputs.items()}
        logits = model(**inputs).logits
    return _LOSSES[problem_type](logits.float(), batch.labels.to(device))


def _update(
    model: PreTrainedModel, optimizer: torch.optim.Optimizer, loss: Tensor, learning_rate: float
) -> None:
    """One step of the optimizer, against the gradient of a loss."""
    for group in optimizer.param_groups:
        group["lr"] = group["factor"] * learning_rate
    loss.backward()  # type: ignore[no-untyped-call]
    nn.utils.clip_grad_norm_(model.parameters(), CLIP)
    optimizer.step()
    optimizer.zero_grad()


def _schedule(step: int, steps: int) -> float:
    """The share of the peak learning rate that a step has."""
    warmup = max(1, round(WARMUP * steps))
    return min((step + 1) / warmup, (steps - step) / max(1, steps - warmup), 1.0)


def _unit_scores(scores: np.ndarray) -> np.ndarray:
    """Scores of pairs as cosines: the least is 0, the highest 1.

    >>> _unit_scores(np.array([1.0, 3.0, 5.0], np.float32)).tolist()
    [0.0, 0.5, 1.0]
    """
    least, highest = scores.min(), scores.max()
    if least == highest:
        remedy = "give pairs that are alike, and others that are not"
        raise UserError(f"fine-tuning: every pair has the score {least:g}; {remedy}")
    scaled: np.ndarray = ((scores - least) / (highest - least)).astype(np.float32)
    return scaled


def _standardized(examples: Examples, head: nn.Module) -> tuple[Examples, float, float]:
    """Standardise values; returns them with their mean and standard deviation.

    A head without a bias cannot add a mean, which then stays: the values' square has the mean 1.
    """
    values = examples.labels.astype(np.float64)  # [N]
    shift = float(values.mean()) if head.bias is not None else 0.0
    scale = float(np.sqrt(np.mean((values - shift) ** 2))) or 1.0
    labels = ((values - shift) / scale).astype(np.float32)
    return replace(examples, labels=labels), shift, scale


def _rescale(head: nn.Module, shift: float, scale: float) -> None:
    """Rescale a linear map's outputs to the task's scale."""
    with torch.no_grad():
        for name, parameter in head.named_parameters():
            parameter.mul_(scale).add_(shift if name == "bias" else 0.0)


def _head(model: PreTrainedModel) -> list[tuple[str, nn.Parameter]]:
    """The parameters outside the encoder, by name."""
    parameters = dict(model.named_parameters())
    encoder = names_in_base(model, parameters)
    return [item for item in parameters.items() if item[0] not in encoder]


def _groups(model: PreTrainedModel) -> list[dict[str, Any]]:
    """Parameters for AdamW: only matrices decay, the head learns `HEAD_RATE` times as fast."""
    # An embedding model's dense layers are no fresh head.
    head = set() if isinstance(model, SentenceEncoder) else {name for name, _ in _head(model)}
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        groups.setdefault((name in head, parameter.ndim > 1), []).append(parameter)
    return [
        {
            "params": members,
            "factor": HEAD_RATE if in_head else 1.0,
            "weight_decay": WEIGHT_DECAY if matrix else 0.0,
        }
        for (in_head, matrix), members in groups.items()
    ]


def _batches(lengths: np.ndarray, size: int, random: np.random.Generator) -> list[np.ndarray]:
    """The rows of an epoch's batches, in random order.

    Examples of like length share a batch, so that little is padding.
    """
    order = random.permutation(len(lengths))
    batches = []
    for start in range(0, len(order), size * POOL):
        pool = order[start : start + size * POOL]
        pool = pool[np.argsort(lengths[pool], kind="stable")]
        batches += [pool[at : at + size] for at in range(0, len(pool), size)]
    return [batches[index] for index in random.permutation(len(batches))]
