"""A stage as Prefect runs it: retried after transient errors, on a slot of a device."""

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from prefect import flow
from prefect.client.orchestration import get_client

from flows import pages, pipeline
from flows.graph import Node
from fmn.errors import UserError
from fmn.evaluate.stages import EvaluateSettings
from fmn.store.stage import Outcome, Progress, no_progress

pytestmark = pytest.mark.usefixtures("prefect_server", "own_workers")
ERRORS = {"network": ConnectionError("reset"), "mistake": UserError("no such thing")}


def fails_at_first(out: Path, error: str, times: int) -> Outcome:
    """Stands for a stage that fails some times; `out` counts its attempts."""
    attempts = int(out.read_text()) + 1 if out.exists() else 1
    out.write_text(str(attempts))
    if attempts <= times:
        if error == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        raise ERRORS[error]
    return Outcome("test", out, True, 0.1, {"attempts": attempts})


def takes_a_second(
    out: Path, settings: EvaluateSettings, progress: Progress = no_progress
) -> Outcome:
    """Stands for a stage that computes on a device: it notes when it began and ended."""
    began = time.time()
    for done in range(10):
        time.sleep(0.1)
        progress(done + 1, 10)
    out.write_text(json.dumps([began, time.time()]))
    return Outcome("test", out, True, 1.0, {})


STAGES: dict[str, Any] = {"fails": fails_at_first, "takes": takes_a_second}


@flow
def run(stages: list[tuple[str, str, dict[str, Any]]]) -> list[Outcome]:
    quick = pipeline.run_node.with_options(retry_delay_seconds=0.1)
    nodes = [Node(stage, name, STAGES[stage], arguments) for stage, name, arguments in stages]
    return [future.result() for future in [quick.submit(node) for node in nodes]]


@pytest.mark.parametrize("error", ["network", "killed"])
def test_transient_failures_are_retried(
    error: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = {"out": tmp_path / "out", "error": error, "times": 2}
    assert run([("fails", "x", arguments)])[0].summary["attempts"] == 3
    lines = capsys.readouterr().out.splitlines()
    assert len([line for line in lines if line.startswith("fails x: ")]) == 2
    assert lines[-1].split() == ["test", "x", "0.1", "s"]


def test_three_times_and_not_after_a_mistake(tmp_path: Path) -> None:
    for error, attempts, message in (("mistake", "1", "no such thing"), ("network", "4", "reset")):
        out = tmp_path / error
        with pytest.raises(UserError, match=message):
            run([("fails", "x", {"out": out, "error": error, "times": 99})])
        assert out.read_text() == attempts


def overlap(folder: Path, device: str) -> bool:
    """Whether two stages that compute on a device did so at the same time."""
    outs, warm = [folder / "a", folder / "b"], {"error": "network", "times": 0}
    # Both processes are there and have imported what they need.
    run([("fails", out.name, {"out": folder / f"warm {out.name}", **warm}) for out in outs])
    settings = EvaluateSettings(device=device)
    run([("takes", out.name, {"out": out, "settings": settings}) for out in outs])
    (_, ended), (began, _) = sorted(json.loads(out.read_text()) for out in outs)
    return bool(began < ended)


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="one stage at a time on one core")
def test_slots_of_a_device_are_shared_where_there_is_such_a_limit(tmp_path: Path) -> None:
    assert overlap(tmp_path, "auto"), "without a limit nothing waits"
    with get_client(sync_client=True) as client:
        client.upsert_global_concurrency_limit_by_name(pages.LIMIT, 1)
        pages._has_limit.cache_clear()
        try:
            assert not overlap(tmp_path, "auto")
            assert overlap(tmp_path, "cpu")
        finally:
            client.delete_global_concurrency_limit_by_name(pages.LIMIT)
            pages._has_limit.cache_clear()
