"""Prepare a model for the statistics: on its device, in its dtype, one pass per batch."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from fmn.fisher.architectures import mask_sites
from fmn.models.checkpoints import names_in_base
from fmn.models.devices import (
    autocast,
    forward_explained,
    known_padding,
    passing_on,
    plain_float32,
    spread,
    to_device,
)
from fmn.models.predict import LINEAR, answered_only, hooked, in_float, set_until
from fmn.tasks.batches import Batch, Examples


def float_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of weights, sums and logits: only matrix products are in bfloat16."""
    return torch.float64 if dtype == torch.float64 else torch.float32


@dataclass(frozen=True)
class Runner:
    """A model ready to run; `tensors` stand in for its parameters and buffers."""

    model: PreTrainedModel
    tensors: Mapping[str, Tensor]
    device: torch.device
    dtype: torch.dtype

    def logits(self, batch: Batch) -> Tensor:
        """The model's outputs, [B, C]; of generated text, [M, C] (`answered_only`)."""
        floats = float_dtype(self.dtype)
        inputs = {
            name: to_device(tensor, self.device, floats if tensor.is_floating_point() else None)
            for name, tensor in batch.inputs.items()
        }
        computing = autocast(self.device, self.dtype)
        known = known_padding(batch.inputs)
        with computing, known, answered_only(self.model, batch.labels):
            logits: Tensor = functional_call(self.model, dict(self.tensors), (), inputs).logits
        return logits


def backward_passes(
    logits: Tensor, leaves: Sequence[Tensor], directions: Sequence[Tensor]
) -> Iterator[Sequence[Tensor | None]]:
    """For each direction v [B, C], the gradients of v . logits with respect to the leaves."""
    for number, direction in enumerate(directions, 1):
        more = number < len(directions)
        yield torch.autograd.grad(
            logits, leaves, direction.to(logits.dtype), retain_graph=more, allow_unused=True
        )


def outputs_of(model: PreTrainedModel) -> int:
    """The width of a model's outputs."""
    config = model.config
    return int(config.vocab_size if model.can_generate() else config.num_labels)


@contextmanager
def prepared(
    model: PreTrainedModel, examples: Examples, device: torch.device, dtype: torch.dtype
) -> Iterator[Runner]:
    """Put the model into evaluation mode and its tensors on the device; undone at the end.

    For bfloat16 the encoder's matrices are cast here, once: autocast would cast them again in every
    pass. The head stays in float32, as rounded logits would blur the probabilities of confident
    models.
    """
    linear = {path: module for path, module in model.named_modules() if isinstance(module, LINEAR)}
    head = model.get_output_embeddings() if model.can_generate() else None
    encoder = {path for path in names_in_base(model, linear) if linear[path] is not head}
    named = dict(chain(model.named_parameters(), model.named_buffers()))
    kinds = {}
    for name, tensor in named.items():
        is_narrow = dtype == torch.bfloat16 and name.rpartition(".")[0] in encoder
        floats = torch.bfloat16 if is_narrow else float_dtype(dtype)
        kinds[name] = floats if tensor.is_floating_point() else tensor.dtype
    where = _where(model, {n: t.numel() * kinds[n].itemsize for n, t in named.items()}, device)
    tensors = {}
    for name, tensor in named.items():
        layer = next((path for path in where if name.startswith(f"{path}.")), "")
        tensors[name] = tensor.detach().to(where.get(layer, device), kinds[name])
    config = model.config
    with ExitStack() as restored:
        restored.enter_context(passing_on(model, where, device))
        for module in model.modules():
            set_until(restored, module, "training", False)
        # The backward pass of sdpa is slow on a CPU: half the speed in bfloat16. But in float64
        # eager attention computes its softmax in float32, where the masks of float64 overflow.
        is_slow = device.type == "cpu" and dtype != torch.float64
        if is_slow and config._attn_implementation == "sdpa":
            restored.callback(model.set_attn_implementation, "sdpa")
            model.set_attn_implementation("eager")
        # A decoder inside the model may have its own configuration.
        configs = {id(own): own for m in model.modules() if (own := getattr(m, "config", None))}
        for own in configs.values():
            if getattr(own, "use_cache", False):
                set_until(restored, own, "use_cache", False)
        # Decoders search for the last token that is not padding.
        if getattr(config, "pad_token_id", 0) is None:
            set_until(restored, config, "pad_token_id", examples.pad.get("input_ids"))
        in_float(restored, [linear[path] for path in linear.keys() - encoder], device)
        restored.enter_context(plain_float32())
        restored.enter_context(forward_explained(model, dtype, examples.longest))
        yield Runner(model, tensors, device, dtype)


def _where(
    model: PreTrainedModel, sizes: Mapping[str, int], device: torch.device
) -> dict[str, torch.device]:
    """The device of each layer that is not on `device`; `sizes`: bytes of tensors by name."""
    layers = {site.layer: 0 for site in mask_sites(model)} if device.type == "cuda" else {}
    for path in layers:
        layers[path] = sum(size for name, size in sizes.items() if name.startswith(f"{path}."))
    return spread(layers, sum(sizes.values()) - sum(layers.values()), device)


@contextmanager
def shared_casts(runner: Runner) -> Iterator[None]:
    """Let maps that read the same activation one after another share its cast to bfloat16.

    Autocast would cast it for each of query, key and value, and their gradients back.
    """
    weights = (name for name, tensor in runner.tensors.items() if tensor.dtype == torch.bfloat16)
    modules = {runner.model.get_submodule(name.rpartition(".")[0]) for name in weights}
    activation, narrow = None, torch.empty(0)

    def cast(_module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        nonlocal activation, narrow
        if args[0].dtype != torch.float32:
            return args
        if args[0] is not activation:
            activation, narrow = args[0], args[0].bfloat16()
        return (narrow, *args[1:])

    with hooked((module, cast) for module in modules):
        yield


@contextmanager
def recomputed(runner: Runner, layers: Iterable[str]) -> Iterator[None]:
    """In the block, the backward pass computes the activations of layers again.

    Memory then holds the input of each layer and the activations of one layer, at the cost of a
    second forward pass (activation checkpointing, arXiv 1604.06174).

    Args:
        layers: the layers' paths in the model.
    """
    with ExitStack() as restored:
        for path in layers:
            layer, start = runner.model.get_submodule(path), f"{path}."
            own = {
                f"layer.{name.removeprefix(start)}": tensor
                for name, tensor in runner.tensors.items()
                if name.startswith(start)
            }
            forward = partial(_computed_with, _Layer(layer), own)
            set_until(
                restored, layer, "forward",
                partial(checkpoint, forward, use_reentrant=False, preserve_rng_state=False),
            )  # fmt: skip
        yield


class _Layer(nn.Module):
    """Calls a layer's forward function as it is at construction, without the layer's hooks."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer, self.original = layer, layer.forward

    def forward(self, *args: Any, **named: Any) -> Any:
        return self.original(*args, **named)


def _computed_with(layer: _Layer, tensors: Mapping[str, Tensor], *args: Any, **named: Any) -> Any:
    """The output of a layer with these tensors; in the backward pass the model has others."""
    return functional_call(layer, dict(tensors), args, named)
