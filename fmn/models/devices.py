"""Where to compute and in which dtype: one rule for fine-tuning, statistics and evaluation.

- "float32" is full precision. TF32, which rounds the factors of products to 11 bits, is off; by
  default a GPU would use it for convolutions, and depending on settings for matrix products.
- "bfloat16" is the dtype of matrix products; sums, normalisations and residuals are float32.
- A CPU computes attention by plain matrix products, a GPU by PyTorch's fused kernels (sdpa).
- The host does not wait for a GPU between two batches.
"""

import os
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from contextvars import ContextVar
from functools import cache
from pathlib import Path
from traceback import walk_tb
from typing import Any, TypeVar, cast

import numpy as np
import psutil
import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only
from transformers import PreTrainedModel, masking_utils

from fmn.errors import UserError, system_error
from fmn.store.headers import first_words

T = TypeVar("T")
R = TypeVar("R")
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}
WEIGHTS = 0.8  # of a GPU's free memory; a batch takes half of the rest
AT_ONCE = 4  # most computations side by side: each needs memory


def resolve_device(name: str) -> torch.device:
    """The device with a name; "auto": the first GPU, else the CPU. `UserError` if missing."""
    count = torch.cuda.device_count()
    if name == "auto":
        return torch.device("cuda" if count else "cpu")
    with suppress(RuntimeError):  # PyTorch has no device of this name
        device = torch.device(name)
        if device.type == "cpu" or (device.type == "cuda" and (device.index or 0) < count):
            return device
    raise UserError(
        f"device: no device {name!r} here ({count} CUDA devices); use auto, cpu or cuda:N"
    )


def resolve_dtype(name: str, device: torch.device) -> torch.dtype:
    """The dtype to compute in: "float32", "bfloat16" (autocast), "float64", or "auto".

    "auto" is bfloat16 where the hardware multiplies it natively (on a CPU with AVX512-BF16 that
    makes MiniLM two to three times as fast), and float32 elsewhere.
    """
    if name == "auto":
        return torch.bfloat16 if _has_native_bfloat16(device) else torch.float32
    if name not in _DTYPES:
        raise UserError(f"There is no dtype {name!r}; use auto, {', '.join(_DTYPES)}")
    return _DTYPES[name]


@contextmanager
def placed(
    model: PreTrainedModel, device: torch.device, dtype: torch.dtype, longest: int = 0
) -> Iterator[None]:
    """Move a model to a device; its weights become float64 for float64, otherwise float32.

    They stay so. Meanwhile a CPU computes attention with plain matrix products: for short texts
    they are a fifth faster there than the fused kernel, and in the backward pass more.
    """
    model.to(device, torch.float64 if dtype == torch.float64 else torch.float32)
    attention = model.config._attn_implementation
    try:
        # In float64 eager attention would compute its softmax in float32 (`fmn.fisher.runner`).
        if device.type == "cpu" and attention == "sdpa" and dtype != torch.float64:
            model.set_attn_implementation("eager")
        with plain_float32(), forward_explained(model, dtype, longest):
            yield
    finally:
        if model.config._attn_implementation != attention:
            model.set_attn_implementation(attention)


@contextmanager
def forward_explained(
    model: PreTrainedModel, dtype: torch.dtype = torch.float32, longest: int = 0
) -> Iterator[None]:
    """Raise UserError in place of an exception of Transformers' code, such as a forward pass.

    Some models cannot compute in some dtypes, as their config.json says, or with texts of more
    tokens than they have positions for. `longest`: the tokens of the longest text, if known.
    """
    try:
        yield
    except Exception as error:
        modules = [frame.f_globals.get("__name__", "") for frame, _ in walk_tb(error.__traceback__)]
        last = next((name for name in reversed(modules) if not name.startswith("torch.")), "")
        if not last.startswith("transformers.") or system_error(error):
            raise
        name = str(dtype).removeprefix("torch.")
        remedy = "correct its config.json, or give a model of another architecture"
        positions = getattr(model.config, "max_position_embeddings", None)
        if positions and longest > positions - 3:  # some models use one or two otherwise
            remedy = f"a text has {longest} tokens: set max_length of the task below {positions}"
        elif dtype != torch.float32:
            remedy = f"take the dtype float32, {remedy}"
        raise UserError(
            f"{model.config.name_or_path}: this {model.config.model_type} cannot compute in {name}:"
            f" {first_words(error)}; {remedy}"
        ) from error


def autocast(device: torch.device, dtype: torch.dtype) -> torch.autocast:
    """The context in which a model that is `placed` computes in a dtype."""
    kind = device.type if device.type in ("cpu", "cuda") else "cpu"  # others lack autocast
    return torch.autocast(kind, dtype=torch.bfloat16, enabled=dtype == torch.bfloat16)


def side_by_side(
    function: Callable[[T], R], items: Iterable[T], device: torch.device
) -> Iterator[R]:
    """The results of a function for items, in their order; several are computed at a time.

    The number at a time is the number of CPU cores divided by PyTorch's number of threads, at most
    AT_ONCE, and one on a GPU. Results do not depend on it: each is computed as it would be alone.
    The function must not change anything that another call reads.
    """
    threads = len(os.sched_getaffinity(0)) // torch.get_num_threads()
    if device.type != "cpu" or threads < 2:
        yield from map(function, items)
        return
    has_gradients, is_cast = torch.is_grad_enabled(), torch.is_autocast_enabled("cpu")

    def call(item: T) -> R:  # a new thread has PyTorch's defaults
        with torch.set_grad_enabled(has_gradients), torch.autocast("cpu", enabled=is_cast):
            return function(item)

    with ThreadPoolExecutor(min(threads, AT_ONCE)) as pool:
        futures = [pool.submit(call, item) for item in items]
        try:
            for future in futures:
                yield future.result()
        finally:
            pool.shutdown(cancel_futures=True)


@contextmanager
def plain_float32() -> Iterator[None]:
    """Let a GPU compute float32 in full precision, whatever the program's own settings are."""
    cuda, cudnn = torch.backends.cuda, cast(Any, torch.backends.cudnn)
    backends = (cuda.matmul, cudnn.conv)
    before = [backend.fp32_precision for backend in backends]
    try:
        for backend in backends:
            backend.fp32_precision = "ieee"
        yield
    finally:
        for backend, precision in zip(backends, before, strict=True):
            backend.fp32_precision = precision


def to_device(tensor: Tensor, device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    """The tensor on the device; the copy does not wait for the work that is queued there."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        tensor = tensor.pin_memory()
    return tensor.to(device, dtype, non_blocking=True)


def places(mask: Tensor, device: torch.device) -> Tensor:
    """Where a mask on the host is true, on the device: places in the flattened mask, int64 [N].

    Indexing by a mask on the device would wait until the number of places is known there.
    """
    return to_device(mask.flatten().nonzero()[:, 0], device)


_IS_PADDED: ContextVar[bool | None] = ContextVar("is_padded", default=None)


@contextmanager
def known_padding(inputs: Mapping[str, Tensor]) -> Iterator[None]:
    """Answer Transformers' question whether a batch has padding without asking the device.

    Transformers asks in every forward pass, as it leaves out a mask without padding. The answer
    from a GPU would have to wait for all its queued work; the host has it at once.

    Args:
        inputs: of a model, on the CPU.
    """
    _ask_the_host()
    masks = [mask for name, mask in inputs.items() if name.endswith("attention_mask")]
    token = _IS_PADDED.set(not all(bool(mask.all()) for mask in masks))
    try:
        yield
    finally:
        _IS_PADDED.reset(token)


@cache
def _ask_the_host() -> None:
    def known(ask: Callable[..., bool]) -> Callable[..., bool]:
        def is_needless(padding_mask: Tensor | None, *sizes: Any, **named: Any) -> bool:
            is_padded = _IS_PADDED.get()
            if is_padded is None:
                return ask(padding_mask, *sizes, **named)
            return not is_padded and ask(None, *sizes, **named)

        return is_needless

    for name in ("_ignore_causal_mask_sdpa", "_ignore_bidirectional_mask_sdpa"):
        setattr(masking_utils, name, known(getattr(masking_utils, name)))


def _has_native_bfloat16(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    capabilities = torch.cpu.get_capabilities() if device.type == "cpu" else {}
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))


def free_memory(device: torch.device) -> int:
    """Bytes that are free on a device; of a CPU, as the system and the container count.

    What PyTorch holds of a GPU and does not use is free.
    """
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    free: int = psutil.virtual_memory().available
    with suppress(OSError, ValueError):  # the file is missing outside a container, or says "max"
        free = min(free, int(Path("/sys/fs/cgroup/memory.max").read_text()))
    return free


# ---------------------------------------------------------------------------------------------
# A model on several GPUs, one after another


def spread(layers: Mapping[str, int], rest: int, device: torch.device) -> dict[str, torch.device]:
    """The devices of the layers of a model that does not fit on one GPU; empty if it fits.

    Args:
        layers: bytes by path, in the order of computation.
        rest: bytes of all else, which stays on `device`.

    Raises:
        UserError: it does not fit on all GPUs together.
    """
    total = rest + sum(layers.values())
    if device.type != "cuda" or total <= WEIGHTS * free_memory(device):
        return {}
    others = [torch.device("cuda", number) for number in range(torch.cuda.device_count())]
    devices = [device, *(each for each in others if each.index != (device.index or 0))]
    free = [int(WEIGHTS * free_memory(each)) for each in devices]
    return dict(zip(layers, (devices[n] for n in split(layers.values(), rest, free)), strict=True))


def split(layers: Collection[int], rest: int, free: Sequence[int]) -> list[int]:
    """The device of each layer by number, in rising order: each has its share of the free bytes.

    Where whole layers do not fit like that, each device takes as many as it has room for.

    >>> split([4, 4, 4, 4], 2, [10, 10])
    [0, 0, 1, 1]
    >>> split([22, 1, 1], 0, [21, 21, 48])
    [2, 2, 2]
    """
    room = [max(free[0] - rest, 0), *free[1:]]
    ends = np.cumsum(room) / max(sum(room), 1)
    sizes = np.array(list(layers))
    middles = (np.cumsum(sizes) - sizes / 2) / sizes.sum()
    numbers = np.minimum(np.searchsorted(ends, middles), len(free) - 1)
    if not _fits(numbers, sizes, room):
        numbers = _filled(sizes, room)
    if not _fits(numbers, sizes, room):
        needed, there = (f"{count / 1e9:.1f} GB" for count in (sizes.sum() + rest, sum(free)))
        problem = f"the model takes {needed}, and the {len(free)} GPUs have room for {there}"
        raise UserError(f"device: {problem}; use dtype bfloat16, more GPUs, or cpu")
    return [int(number) for number in numbers]


def _fits(numbers: np.ndarray, sizes: np.ndarray, room: Sequence[int]) -> bool:
    return bool((np.bincount(numbers, sizes, len(room)) <= room).all())


def _filled(sizes: np.ndarray, room: Sequence[int]) -> np.ndarray:
    """The device of each layer if devices are filled in turn; the last takes the rest."""
    left, device, numbers = list(room), 0, []
    for size in sizes:
        while left[device] < size and device < len(room) - 1:
            device += 1
        left[device] -= size
        numbers.append(device)
    return np.array(numbers)


@contextmanager
def passing_on(
    model: PreTrainedModel, where: Mapping[str, torch.device], home: torch.device
) -> Iterator[None]:
    """Move each layer's inputs to its device, and the last output to `home`.

    Args:
        where: devices by path of a layer.
    """

    def moved(values: Any, device: torch.device) -> Any:
        return tree_map_only(Tensor, lambda tensor: to_device(tensor, device), values)

    paths = list(where)
    with ExitStack() as hooks:
        for path, after in zip(paths, [*paths[1:], ""], strict=False):
            layer, device = model.get_submodule(path), where[path]
            is_last = path.rpartition(".")[0] != after.rpartition(".")[0]
            hook = layer.register_forward_pre_hook(
                lambda _, args, named, device=device: moved((args, named), device), with_kwargs=True
            )
            hooks.callback(hook.remove)
            if is_last:
                hook = layer.register_forward_hook(lambda _, __, output: moved(output, home))
                hooks.callback(hook.remove)
        yield
