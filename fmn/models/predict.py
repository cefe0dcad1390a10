"""A model's predictions on a task."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from fmn.errors import UserError
from fmn.models.checkpoints import names_in_base
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
from fmn.tasks.batches import IGNORED, MULTIPLE, Batch, Examples, by_length, pad_batch
from fmn.tasks.encoding import chat_prompt
from fmn.tasks.task import Task

LINEAR = (nn.Linear, Conv1D)
MAPS = 8  # linear maps from the last backwards that may get the first token alone
LOGITS = 2**28  # logits of generated text held at once: a gigabyte in float32
Reduce = Callable[[Tensor, Batch], Tensor]


@contextmanager
def answered_only(model: PreTrainedModel, labels: Tensor) -> Iterator[None]:
    """Let a generative model compute logits only at positions with a label, [M, C].

    Those of all tokens of a batch would take gigabytes. Other models are left alone.

    Args:
        labels: of the batch, [B, T]; M of them are not IGNORED. The rows are in their order.
    """

    def hook(_module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        answered = places(labels != IGNORED, args[0].device)
        return (args[0].flatten(0, 1).index_select(0, answered),)  # [B, T, n] -> [M, n]

    outputs: Any = model.get_output_embeddings() if model.can_generate() else None
    # Runs before other hooks, so that they see the input that the map reads.
    registered = outputs and outputs.register_forward_pre_hook(hook, prepend=True)
    try:
        yield
    finally:
        if registered:
            registered.remove()


@contextmanager
def hooked(hooks: Iterable[tuple[nn.Module, Callable[..., Any]]]) -> Iterator[None]:
    """Call a hook before every forward pass of a module."""
    with ExitStack() as registered:
        for module, hook in hooks:
            registered.callback(module.register_forward_pre_hook(hook).remove)
        yield


def set_until(restored: ExitStack, target: object, name: str, value: object) -> None:
    """Set an attribute of an object until `restored` closes."""
    if name in vars(target):
        restored.callback(setattr, target, name, vars(target)[name])
    else:
        restored.callback(delattr, target, name)
    setattr(target, name, value)


def in_float(restored: ExitStack, modules: Iterable[nn.Module], device: torch.device) -> None:
    """Let modules compute in the dtype of their weights under autocast, until `restored` closes.

    So a head does: rounded logits tie, and blur the probabilities of confident models.
    """

    def exactly(forward: Callable[[Tensor], Any], activation: Tensor) -> Any:
        with autocast(device, torch.float32):
            is_narrow = activation.dtype == torch.bfloat16
            return forward(activation.float() if is_narrow else activation)

    for module in modules:
        set_until(restored, module, "forward", partial(exactly, module.forward))


@contextmanager
def first_token_only(
    model: PreTrainedModel, run: Callable[[Batch], Tensor], examples: Examples
) -> Iterator[None]:
    """Let the last layer compute only the first token, if the head reads no other.

    Such a layer needs only keys and values of the other tokens. The linear maps after them get only
    the first token, [B, 1, n]. Their output is added to the residual stream [B, T, n]; it is right
    for the first token, and the head does not read the others. A pass of one example shows which
    maps these are.

    Args:
        run: computes the logits of a batch.

    Raises:
        UserError: the model's answers depend on padding.
    """

    def cut(_module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (args[0][:, :1].contiguous(), *args[1:])  # a strided input would copy the weights

    lengths = examples.lengths
    order = np.argsort(lengths, kind="stable")
    order = order[lengths[order] > 1] if examples.pad else order
    with ExitStack() as hooks:
        if len(order) and not model.can_generate() and not examples.has_token_labels:
            # A longer text behind the shortest one shows what padding does.
            longer = np.searchsorted(lengths[order], lengths[order[0]], side="right")
            pair = order[[0, longer]] if examples.pad and longer < len(order) else order[:1]
            beside, alone = (pad_batch(examples, rows) for rows in (pair, order[:1]))
            try:
                logits, maps = _only_first_token_read(model, partial(run, alone))
                with torch.no_grad():
                    hooks.enter_context(hooked((module, cut) for module in maps))
                    if not _is_near(run(beside)[:1], logits):
                        hooks.close()
                        _refuse_padding_that_is_read(model, run(beside)[:1], logits)
            except (MemoryError, RuntimeError):  # for example, an attention checks a shape
                hooks.close()
        yield


def _refuse_padding_that_is_read(model: PreTrainedModel, beside: Tensor, alone: Tensor) -> None:
    """Refuse a model that answers otherwise to a short text beside a longer one, as XLNet does.

    XLNet reads a text's last position, and its own tokenizer puts padding before the text.

    Args:
        beside, alone: the logits [1, C] of a text beside a longer one, and by itself.
    """
    alone, beside = alone.float(), beside.float()
    if (alone - beside).abs().max() > 0.05 + 0.05 * alone.abs().max():
        raise UserError(
            f"the answers of this {model.config.model_type} depend on the padding behind a text;"
            " give a model of another architecture"
        )


def _is_near(values: Tensor, others: Tensor) -> bool:
    """Whether two tensors are equal up to rounding."""
    return bool((values - others).abs().max() <= 0.05 * others.abs().max())


def _only_first_token_read(
    model: nn.Module, run: Callable[[], Tensor]
) -> tuple[Tensor, list[nn.Module]]:
    """The logits, and those last linear maps whose inputs [1, T, n] matter at the first token only.

    There the logits' gradient is zero at the other tokens.
    """

    def record(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        activation = args[0]
        if activation.ndim == 3 and len(activation) == 1 < activation.shape[1]:
            if not activation.requires_grad:
                activation = activation.detach().requires_grad_()
            calls.append((module, activation))  # some have tokens first, and are left out
        return (activation, *args[1:])

    calls: list[tuple[nn.Module, Tensor]] = []
    linear = (module for module in model.modules() if isinstance(module, nn.Linear))
    with torch.enable_grad(), hooked((module, record) for module in linear):
        logits = run()
        if not calls:
            return logits.detach(), []
        direction = torch.linspace(1, 2, logits.numel()).to(logits).view_as(logits)
        last = calls[-MAPS:]
        inputs = [activation for _, activation in last]
        gradients = torch.autograd.grad(logits, inputs, direction, allow_unused=True)
    every = [module for module, _ in calls]
    maps: list[nn.Module] = []
    for (module, _), gradient in reversed(list(zip(last, gradients, strict=True))):
        if every.count(module) > 1 or gradient is None or gradient[:, 1:].any():
            break
        maps.append(module)
    return logits.detach(), maps


def token_scores(logits: Tensor, batch: Batch) -> Tensor:
    """Three sums over the tokens of each generated text, [B, 3].

    They are the cross entropy, the number of tokens, and the number of tokens that are the model's
    first choice. If the last two are equal, greedy generation gives this text.
    """
    rows, columns = (batch.labels != IGNORED).nonzero(as_tuple=True)  # [M]
    labels = to_device(batch.labels[rows, columns], logits.device)
    losses = nn.functional.cross_entropy(logits.float(), labels, reduction="none")
    terms = torch.stack([losses, torch.ones_like(losses), logits.argmax(-1) == labels], 1)  # [M, 3]
    sums = torch.zeros(len(batch.rows), 3, dtype=torch.float64, device=terms.device)
    return sums.index_add_(0, to_device(rows, terms.device), terms.double())


def max_batch_tokens(device: torch.device) -> int:
    """Tokens of a batch, padding included, beyond which batches are no faster."""
    return 1024 if device.type == "cpu" else 32768  # as many tokens as a CPU's caches hold


def multiple_of_widths(device: torch.device) -> int:
    """The number that divides the widths of batches; 1 on a CPU, where padding does not pay."""
    return 1 if device.type == "cpu" else MULTIPLE


def tokens_at_once(model: PreTrainedModel, device: torch.device) -> int:
    """Tokens of a batch; fewer where each has very many logits."""
    tokens = max_batch_tokens(device)
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

    def run(batch: Batch) -> Tensor:
        inputs = {name: to_device(value, target) for name, value in batch.inputs.items()}
        with known_padding(batch.inputs), answered_only(model, batch.labels):
            logits: Tensor = model(**inputs).logits
        return logits

    linear = {path: each for path, each in model.named_modules() if isinstance(each, LINEAR)}
    head = linear.keys() - names_in_base(model, linear).keys()
    with (
        ExitStack() as restored,
        placed(model, target, compute_dtype, examples.longest),
        torch.no_grad(),  # in inference mode autocast would cast the weights for every batch
        autocast(target, compute_dtype),
        first_token_only(model, run, examples),
    ):
        in_float(restored, [linear[path] for path in head], target)
        for batch in by_length(examples, tokens=tokens, multiple=multiple_of_widths(target)):
            outputs.append((batch.rows, reduce(run(batch), batch).float()))
            done += len(batch.rows)
            progress(done, len(examples))
    if not outputs:
        return np.zeros((0, model.config.num_labels), np.float32)
    # The first batch has the longest example. Copying waits for the GPU, so it comes last.
    logits = np.zeros((len(examples), *outputs[0][1].shape[1:]), dtype=np.float32)
    for rows, output in outputs:
        logits[rows, : output.shape[1]] = output.cpu().numpy()
    return logits


def complete(
    model: PreTrainedModel, tokenizer: Any, task: Task, prompt: str, limit: int | None = None
) -> str:
    """Generate the text after a prompt, always with the most probable token.

    Args:
        limit: the most tokens to write; by default the task's `max_length`, minus the tokens of the
            prompt for a causal model.

    Raises:
        UserError: the prompt has no tokens, or leaves no room.
    """
    is_causal = task.task == "text-generation"
    cut = {} if is_causal else {"truncation": True, "max_length": task.max_length}
    if task.chat:
        prompt, cut = chat_prompt(tokenizer, prompt), {"add_special_tokens": False}
    ids = tokenizer(prompt, **cut)["input_ids"]
    if is_causal and ids[-1:] == [tokenizer.eos_token_id]:
        ids = ids[:-1]  # some tokenizers add an end token
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
