"""Environment variables for the libraries below fmn, to be set before those are imported."""

import os

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


def settle_environment() -> None:
    """Set each variable that is not set yet: libraries stay quiet and send no telemetry."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
