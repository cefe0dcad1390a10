"""Environment variables for the libraries below fmn, to be set before those are imported."""

import ctypes
import os
from contextlib import suppress

ENVIRONMENT = {
    # Idle threads sleep instead of spinning: two that spin beside another busy process made
    # training six times slower.
    "OMP_WAIT_POLICY": "PASSIVE",
    "DO_NOT_TRACK": "true",
    "DVC_NO_ANALYTICS": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_DISABLE_XET": "1",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "120",
    "TOKENIZERS_PARALLELISM": "false",
    "TRANSFORMERS_VERBOSITY": "error",
}
_MMAP_MAX, _TRIM_THRESHOLD = -4, -1  # of mallopt(3)


def settle_environment() -> None:
    """Set each variable that is not set yet: libraries stay quiet and send no telemetry."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)


def keep_freed_memory() -> None:
    """Keep freed memory in this process instead of returning it to the system (glibc).

    Otherwise the kernel zeroes the pages of each large tensor, which takes a fifth of the time of a
    training step on a CPU.
    """
    with suppress(AttributeError, OSError):  # another C library
        library = ctypes.CDLL(None)
        library.mallopt(_MMAP_MAX, 0)
        library.mallopt(_TRIM_THRESHOLD, 2**31 - 1)
