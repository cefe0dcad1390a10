"""A stage as Prefect runs it: retried after transient errors, with a tag if it needs a device."""

import os
import signal
from pathlib import Path
from typing import Any

import pytest
from prefect import flow

from flows import pipeline
from flows.graph import Node
from fmn.errors import UserError
from fmn.evaluate.stages import EvaluateSettings
from fmn.store.stage import Outcome

ERRORS = {"network": ConnectionError("reset"), "mistake": UserError("no such thing")}


def fails_at_first(out: Path, error: str, times: int) -> Outcome:
    """Stands for a stage that fails some times; `out` counts its attempts."""
    attempts = int(out.read_text()) + 1 if out.exists() else 1
    out.write_text(str(attempts))
    if attempts <= times:
        if error == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        raise ERRORS[error]
    return Outcome("test", out, True, 0.1, {})


@flow
def run(arguments: dict[str, Any]) -> Outcome:
    quick = pipeline.run_node.with_options(retry_delay_seconds=0.1)
    return quick.submit(Node("fails", "x", fails_at_first, arguments)).result()


@pytest.mark.usefixtures("prefect_server", "own_workers")
@pytest.mark.parametrize(
    ("error", "times", "attempts", "message"),
    [
        ("network", 2, 3, None),
        ("killed", 2, 3, None),
        ("network", 99, 4, "reset"),
        ("mistake", 99, 1, "no such thing"),
    ],
)
def test_transient_failures_are_retried_three_times_and_mistakes_are_not(
    error: str,
    times: int,
    attempts: int,
    message: str | None,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    arguments = {"out": tmp_path / "out", "error": error, "times": times}
    if message:
        with pytest.raises(UserError, match=message):
            run(arguments)
    else:
        run(arguments)
        lines = capsys.readouterr().out.splitlines()
        assert len([line for line in lines if line.startswith("fails x: ")]) == times
        assert lines[-1].split() == ["test", "x", "0.1", "s"]
    assert (tmp_path / "out").read_text() == str(attempts)


def test_stages_that_compute_on_a_device_have_a_tag_that_a_server_can_limit() -> None:
    def tags(**settings: Any) -> set[str]:
        return pipeline.tags(Node("x", "", fails_at_first, settings))

    assert tags(settings=EvaluateSettings(device="auto")) == {"fmn-gpu"}
    assert tags(settings=EvaluateSettings(device="cpu")) == tags() == set()
