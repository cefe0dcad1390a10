"""Where to compute and in which dtype: one rule for fine-tuning, Fisher and evaluation."""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import torch
from transformers import PreTrainedModel

from fmn.errors import UserError

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}


def resolve_device(name: str) -> torch.device:
    """The device of a name; "auto": the first CUDA device, or else the CPU. `UserError` if none."""
    count = torch.cuda.device_count()
    if name == "auto":
        return torch.device("cuda" if count else "cpu")
    with suppress(RuntimeError):  # the name of no device of PyTorch's
        device = torch.device(name)
        if device.type == "cpu" or (device.type == "cuda" and (device.index or 0) < count):
            return device
    raise UserError(
        f"There is no device {name!r} ({count} CUDA devices here); use auto, cpu or cuda:N"
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
def placed(model: PreTrainedModel, device: torch.device, dtype: torch.dtype) -> Iterator[None]:
    """Move a model to a device; its weights become float64 for float64, otherwise float32.

    They stay so. Meanwhile a CPU computes attention with plain matrix products: for short texts
    they are a fifth faster there than the fused kernel, and in the backward pass more.
    """
    model.to(device, torch.float64 if dtype == torch.float64 else torch.float32)
    attention = model.config._attn_implementation
    try:
        if device.type == "cpu" and attention == "sdpa":
            model.set_attn_implementation("eager")
        yield
    finally:
        if model.config._attn_implementation != attention:
            model.set_attn_implementation(attention)


def autocast(device: torch.device, dtype: torch.dtype) -> torch.autocast:
    """The context in which a model that is `placed` computes in a dtype."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=dtype == torch.bfloat16)


def _has_native_bfloat16(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    capabilities = torch.cpu.get_capabilities() if device.type == "cpu" else {}
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))


def free_memory(device: torch.device) -> int:
    """Bytes that are free on a device; of a CPU, as the system and the container count."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    free: int = psutil.virtual_memory().available
    with suppress(OSError, ValueError):  # the file is missing outside a container, or says "max"
        free = min(free, int(Path("/sys/fs/cgroup/memory.max").read_text()))
    return free
