"""Where to compute and in which precision: the one rule that fine-tuning, Fisher and evaluation share."""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from transformers import PreTrainedModel

from fmn.errors import UserError

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}


def resolve_device(name: str) -> torch.device:
    """The device of this name; "auto" is the first CUDA device, or else the CPU. `UserError` where there is none."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"There is no device {name!r}: use auto, cpu, cuda or cuda:N.") from None
    if device.type not in ("cpu", "cuda"):
        raise UserError(
            f"Device {name!r} is not one that fmn computes on: use auto, cpu, cuda or cuda:N."
        )
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(
            f"Device {name!r} is not here ({torch.cuda.device_count()} CUDA devices): use cpu or auto."
        )
    return device


def resolve_dtype(name: str, device: torch.device) -> torch.dtype:
    """The precision to compute in: "float32", "bfloat16" (autocast), "float64", or "auto".

    "auto" is bfloat16 where the hardware multiplies it natively, which on a CPU with AVX512-BF16 doubles the speed of
    MiniLM in training and nearly triples it in inference, and float32 elsewhere.
    """
    if name == "auto":
        return torch.bfloat16 if _native_bfloat16(device) else torch.float32
    if name not in _DTYPES:
        raise UserError(f"There is no dtype {name!r}: use auto, {', '.join(_DTYPES)}.")
    return _DTYPES[name]


@contextmanager
def placed(model: PreTrainedModel, device: torch.device, dtype: torch.dtype) -> Iterator[None]:
    """Move a model to where it computes; its weights become float64 for float64 and otherwise float32, and stay so.

    Meanwhile a CPU computes attention with plain matrix products: for short texts they are a fifth faster there, and
    in the backward pass more, than the fused kernel.
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
    """The context in which a model that is `placed` computes in `dtype`."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=dtype == torch.bfloat16)


def _native_bfloat16(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    if device.type == "cpu":
        able = torch.cpu.get_capabilities()
        return bool(able.get("avx512_bf16") or able.get("amx_bf16"))
    return False


def free_memory(device: torch.device) -> int:
    """Bytes that may still be taken on a device; of a CPU, by the system's account and the container's."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    available = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    with suppress(OSError):
        found = re.search(r"MemAvailable: *(\d+) kB", Path("/proc/meminfo").read_text())
        available = int(found[1]) * 1024 if found else available
    with suppress(
        OSError, ValueError
    ):  # the file is missing outside of containers, and may say "max"
        available = min(available, int(Path("/sys/fs/cgroup/memory.max").read_text()))
    return available
