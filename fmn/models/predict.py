"""A model's predictions on a task."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel

from fmn.errors import UserError
from fmn.models.devices import (
    autocast,
    known_padding,
    placed,
    places,
    resolve_device,
    resolve_dtype,
    to_device,
)
from fmn.store.stage import Progress, no_progress
from fmn.tasks.batches import IGNORED, Batch, Examples, by_length
from fmn.tasks.task import Task

# Tokens of a batch on a CPU, where larger ones leave the caches; a GPU takes 16 times as many.
TOKENS = 2048
LOGITS = 2**28  # of a batch of generated text at a time: a gigabyte
Reduce = Callable[[Tensor, Batch], Tensor]


@contextmanager
def answered_only(model: PreTrainedModel, labels: Tensor) -> Iterator[None]:
    """Within it a generative model gives logits only where there is a label, [M, C].

    Those of all tokens of a batch would take gigabytes. Other models are left alone.

    Args:
        labels: of the batch, [B, T]; M of them are not IGNORED. The rows are in their order.
    """

    def hook(_module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        answered = places(labels != IGNORED, args[0].device)
        return (args[0].flatten(0, 1).index_select(0, answered),)  # [B, T, n] -> [M, n]

    outputs: Any = model.get_output_embeddings() if model.can_generate() else None
    # Before other hooks, which see what the map then reads.
    registered = outputs and outputs.register_forward_pre_hook(hook, prepend=True)
    try:
        yield
    finally:
        if registered:
            registered.remove()


def token_scores(logits: Tensor, batch: Batch) -> Tensor:
    """Of each generated text the sum of its tokens' cross entropies, their number, and how many of
    them are the model's first choice, [B, 3]; all of them are, if it generates the text greedily.
    """
    rows, columns = (batch.labels != IGNORED).nonzero(as_tuple=True)  # [M]
    labels = to_device(batch.labels[rows, columns], logits.device)
    losses = nn.functional.cross_entropy(logits.float(), labels, reduction="none")
    terms = torch.stack([losses, torch.ones_like(losses), logits.argmax(-1) == labels], 1)  # [M, 3]
    sums = torch.zeros(len(batch.rows), 3, dtype=torch.float64, device=terms.device)
    return sums.index_add_(0, to_device(rows, terms.device), terms.double())


def tokens_at_once(model: PreTrainedModel, device: torch.device) -> int:
    """Tokens of a batch; fewer where each has very many logits."""
    tokens = TOKENS if device.type == "cpu" else 16 * TOKENS
    limit = LOGITS // model.config.vocab_size if model.can_generate() else tokens
    return max(1, min(tokens, limit))


def predict(
    model: PreTrainedModel,
    examples: Examples,
    *,
    device: str = "auto",
    dtype: str = "auto",
    reduce: Reduce | None = None,
    progress: Progress = no_progress,
) -> np.ndarray:
    """Logits, float32 [N, C], in the examples' order; of tokens [N, T, C], zeros behind the last.

    The model is moved to `device` and put in evaluation mode; it computes in `dtype` (see
    `devices.resolve_dtype`). `reduce` gets the logits [B, ...] of each batch, and what it gives,
    [B, ...], stands in for them; of generated text it gets those of `answered_only`, and is
    `token_scores` by default. `progress` is called with (examples done, all examples).

    Raises:
        UserError: this machine has no such device, or there is no such dtype.
    """
    target = resolve_device(device)
    compute_dtype = resolve_dtype(dtype, target)
    model.eval()
    outputs: list[tuple[np.ndarray, Tensor]] = []
    done = 0
    tokens = tokens_at_once(model, target)
    if reduce is None:
        reduce = token_scores if model.can_generate() else lambda logits, _: logits
    computing = autocast(target, compute_dtype)
    with placed(model, target, compute_dtype), torch.inference_mode(), computing:
        for batch in by_length(examples, tokens=tokens):
            inputs = {name: to_device(value, target) for name, value in batch.inputs.items()}
            with known_padding(batch.inputs), answered_only(model, batch.labels):
                outputs.append((batch.rows, reduce(model(**inputs).logits, batch).float()))
            done += len(batch.rows)
            progress(done, len(examples))
    if not outputs:
        return np.zeros((0, model.config.num_labels), np.float32)
    # The first batch has the longest example. A GPU is not waited for before the last one.
    logits = np.zeros((len(examples), *outputs[0][1].shape[1:]), dtype=np.float32)
    for rows, output in outputs:
        logits[rows, : output.shape[1]] = output.cpu().numpy()
    return logits


def complete(
    model: PreTrainedModel, tokenizer: Any, task: Task, prompt: str, limit: int | None = None
) -> str:
    """What a generative model writes after a prompt, with the most probable token each time.

    Args:
        limit: the most tokens that it writes; by default the task's `max_length`, of which a causal
            model's prompt takes its part.

    Raises:
        UserError: the prompt has no tokens, or leaves no room.
    """
    is_causal = task.task == "text-generation"
    cut = {} if is_causal else {"truncation": True, "max_length": task.max_length}
    ids = tokenizer(prompt, **cut)["input_ids"]
    if is_causal and ids[-1:] == [tokenizer.eos_token_id]:
        ids = ids[:-1]  # which some tokenizers add
    room = task.max_length - len(ids) * is_causal
    if not ids or room < 1:
        problem = f"the prompt has {len(ids)} tokens of the {task.max_length} that it takes"
        raise UserError(f"task {task.name}: {problem}; give a {'shorter' if ids else 'longer'} one")
    own, tokens = model.generation_config, torch.tensor([ids], device=model.device)  # [1, T]
    config = GenerationConfig(
        max_new_tokens=min(limit or room, room),
        do_sample=False,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=own.eos_token_id or tokenizer.eos_token_id,
        bos_token_id=own.bos_token_id,
        decoder_start_token_id=own.decoder_start_token_id,
    )
    with torch.inference_mode():
        output: Any = model.generate(
            tokens, attention_mask=torch.ones_like(tokens), generation_config=config
        )
    text: str = tokenizer.decode(output[0][len(ids) * is_causal :], skip_special_tokens=True)
    return text
