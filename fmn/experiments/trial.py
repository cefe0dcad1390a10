"""Try a merged encoder in memory, under each expert's head; each expert is loaded only once."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from torch import Tensor, nn
from transformers import PreTrainedModel

from fmn.evaluate.metrics import Answers, answers, relative, score_splits
from fmn.experiments.files import CellTask, Source
from fmn.fisher.architectures import own_parts
from fmn.merge import heads
from fmn.merge.recipe import RefitSettings
from fmn.models import labels
from fmn.models.checkpoints import in_model
from fmn.models.predict import predict
from fmn.tasks import dataset
from fmn.tasks.batches import Examples
from fmn.tasks.encoding import encode
from fmn.tasks.task import Task


@dataclass(frozen=True)
class ExpertOnTask:
    """An expert, its N examples (`rows` are their numbers in the split), its answers, its score."""

    source: Source
    task: Task
    model: PreTrainedModel
    rows: np.ndarray
    examples: Examples
    answers: Answers
    score: float | None


class TextsForHead(NamedTuple):
    """N texts, and the inputs of the last linear map of the expert's head for them, [N, n]."""

    examples: Examples
    features: np.ndarray


def score(task: Task, answers: Answers) -> float | None:
    """The task's score of answers on one split; None if it is undefined."""
    return score_splits(task, {task.validation[0]: answers})["score"]


@lru_cache(maxsize=16)  # the cells of a comparison share experts
def load_expert(source: Source) -> ExpertOnTask:
    """Load an expert and its rows, and compute its answers."""
    model, processor, task, *_ = labels.load_expert(
        source.checkpoint, source.task, source.data, source.device
    )
    table = dataset.read_split(source.data, task, source.split)
    tuned_on = source.tuned_on if source.split == "train" else None
    unseen, seen = heads.unseen_first(table.num_rows, source.seed, tuned_on)
    rows = np.sort((unseen if len(unseen) else seen)[: source.rows])
    examples = encode(processor, task, table.take(rows), scored=True)
    logits = predict(model, examples, device=source.device, dtype=source.dtype)
    own = answers(task, logits, examples.labels)
    return ExpertOnTask(source, task, model, rows, examples, own, score(task, own))


def try_encoder(
    expert: ExpertOnTask, encoder: Mapping[str, Tensor], head: Mapping[str, Tensor] | None = None
) -> Answers:
    """The answers of the expert's head on another encoder; the expert itself does not change.

    Args:
        expert: the expert and its examples.
        encoder: tensors by name in the base model; others stay the expert's own.
        head: tensors of the head that are replaced, by name in the classifier.
    """
    device, dtype = expert.source.device, expert.source.dtype
    tensors = {**in_model(expert.model, encoder), **(head or {})}
    with _tensors_in(expert.model, tensors):
        logits = predict(expert.model, expert.examples, device=device, dtype=dtype)
    return answers(expert.task, logits, expert.examples.labels)


def cell_task(
    expert: ExpertOnTask, encoder: Mapping[str, Tensor], head: Mapping[str, Tensor] | None
) -> CellTask:
    """The scores and answers of a task in a cell of a comparison; arguments as of `try_encoder`."""
    answers, own = try_encoder(expert, encoder, head), expert.answers
    merged = score(expert.task, answers)
    scores = {}
    if {"roc_auc", "perplexity"} & {*expert.task.metrics}:  # others need no scores
        scores = {"scores": answers.scores.tolist(), "expert_scores": own.scores.tolist()}
    return CellTask(
        definition=expert.task,
        score=merged,
        expert=expert.score,
        relative=relative(expert.task, merged, expert.score),
        labels=answers.labels.tolist(),
        predictions=answers.predicted.tolist(),
        expert_predictions=own.predicted.tolist(),
        **scores,
    )


@lru_cache(maxsize=16)
def texts_for_head(source: Source, limit: int | None, seed: int, digest: str) -> TextsForHead:
    """Texts to re-align a head on, without the rows that encoders are tried on.

    Args:
        source: the expert and its rows.
        limit: most texts; None: all.
        seed: seed of their draw.
        digest: the digest of the training rows, so that the cache notices other rows.
    """
    expert = load_expert(source)
    tried = expert.rows.tolist() if source.split == "train" else ()
    examples = heads.unlabeled(
        source.checkpoint, expert.task, source.data, limit, seed, source.tuned_on, tried
    )
    return TextsForHead(examples, _features(expert, examples))


def realigned_head(
    expert: ExpertOnTask, encoder: Mapping[str, Tensor], texts: TextsForHead, ridge: float | str
) -> dict[str, Tensor]:
    """Re-align the expert's head with another encoder; the result is `head` of `try_encoder`."""
    with _tensors_in(expert.model, in_model(expert.model, encoder)):
        merged = _features(expert, texts.examples)
    weight, bias, _ = heads.refit(texts.features, merged, *heads.last_map(expert.model), ridge)
    return heads.tensors(expert.model, weight, bias)


def with_own_parts(
    encoder: Mapping[str, Tensor], expert: ExpertOnTask, texts: TextsForHead, realign: RefitSettings
) -> dict[str, Tensor]:
    """Replace parts of a merged encoder by the expert's own, as `fmn realign` does."""
    shapes = {name: tuple(tensor.shape) for name, tensor in encoder.items()}
    pooler, layers = realign.own_pooler, realign.own_layers
    names = own_parts(expert.model.config, shapes, pooler=pooler, layers=layers)
    device, dtype = expert.source.device, expert.source.dtype
    own = heads.own_part(
        expert.model, encoder, names, layers, texts.examples,
        seed=realign.seed, device=device, dtype=dtype,
    )  # fmt: skip
    return {**encoder, **own}


def _features(expert: ExpertOnTask, examples: Examples) -> np.ndarray:
    device, dtype = expert.source.device, expert.source.dtype
    return heads.features(expert.model, examples, device=device, dtype=dtype)


@contextmanager
def _tensors_in(model: nn.Module, tensors: Mapping[str, Tensor]) -> Iterator[None]:
    """Give parameters and buffers of a model other values within the block.

    What the model has not, such as a pooler or embeddings of further tokens, is left out.
    """
    state = model.state_dict()
    size = getattr(model.config, "vocab_size", None)
    tensors = {
        name: tensor[:size] if tensor.ndim and len(state[name]) == size else tensor
        for name, tensor in tensors.items()
        if name in state
    }
    before = {name: state[name].clone() for name in tensors}
    model.load_state_dict(dict(tensors), strict=False)
    try:
        yield
    finally:
        model.load_state_dict(before, strict=False)
