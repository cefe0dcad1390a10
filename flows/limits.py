"""GPU slots across flow runs: a stage that computes on a device holds one of a Prefect concurrency limit's."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from typing import Any

from prefect.client.orchestration import get_client
from prefect.concurrency.sync import concurrency
from prefect.exceptions import ObjectNotFound

LIMIT = "fmn-gpu"
_LEASE = 60.0  # seconds until the slot of a run that was killed is free again; the least that Prefect takes


@contextmanager
def device_slot(arguments: Mapping[str, Any]) -> Iterator[None]:
    """Hold a slot of `fmn-gpu` for a stage whose settings name a device other than the CPU, if there is such a limit.

    `prefect gcl create fmn-gpu --limit 1` makes one.
    """
    device = getattr(arguments.get("settings"), "device", "cpu")
    if device == "cpu" or not _is_there():
        yield
        return
    with concurrency(LIMIT, lease_duration=_LEASE, raise_on_lease_renewal_failure=False):
        yield


@cache
def _is_there() -> bool:
    with get_client(sync_client=True) as client:
        try:
            client.read_global_concurrency_limit_by_name(LIMIT)
        except ObjectNotFound:
            return False
    return True
