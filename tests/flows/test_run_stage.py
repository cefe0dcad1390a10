"""A stage as Prefect runs it: tried again for what passes, on a slot of a device, with its pages on the server."""

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from prefect import flow
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import ArtifactFilter, ArtifactFilterKey

from flows import limits, pages, pipeline
from fmn.errors import UserError
from fmn.evaluate.stages import EvaluateSettings
from fmn.store.stage import Outcome, Progress

pytestmark = pytest.mark.usefixtures("prefect_server", "own_workers")
FAULTS = {
    "network": ConnectionError("reset"),
    "mistake": UserError("no such thing"),
    "memory": MemoryError("too much"),
}


def fails_at_first(out: Path, fault: str, times: int) -> Outcome:
    """Stands for a stage that fails some times; `out` counts its attempts."""
    attempts = int(out.read_text()) + 1 if out.exists() else 1
    out.write_text(str(attempts))
    if attempts <= times:
        if fault == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        raise FAULTS[fault]
    return Outcome("test", out, True, 0.1, {"attempts": attempts})


def takes_a_second(
    out: Path, settings: EvaluateSettings, progress: Progress | None = None
) -> Outcome:
    """Stands for a stage that computes on a device: it notes when it began and ended."""
    began = time.time()
    for done in range(10):
        time.sleep(0.1)
        if progress:
            progress(done + 1, 10)
    out.write_text(json.dumps([began, time.time()]))
    return Outcome("test", out, True, 1.0, {})


@pytest.fixture(autouse=True)
def stages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline, "STAGES", {"fails": fails_at_first, "takes": takes_a_second})
    monkeypatch.setattr(limits, "_is_there", limits._is_there.__wrapped__)


@flow
def run(stages: list[tuple[str, str, dict[str, Any]]]) -> list[Outcome]:
    quick = pipeline.run_stage.with_options(retry_delay_seconds=0.1)
    futures = [quick.submit(stage, name, arguments) for stage, name, arguments in stages]
    return [future.result() for future in futures]


@pytest.mark.parametrize("fault", ["network", "killed"])
def test_what_passes_by_itself_is_tried_again(
    fault: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert (
        run([("fails", "x", {"out": out, "fault": fault, "times": 2})])[0].summary["attempts"] == 3
    )
    said = capsys.readouterr().out.splitlines()
    assert (
        len(
            [
                line
                for line in said
                if line.startswith("fails x: ") and line.endswith("; trying again")
            ]
        )
        == 2
    )
    assert said[-1].split() == ["fails", "x", "0.1", "s"]


@pytest.mark.parametrize(
    ("fault", "said"), [("mistake", "no such thing"), ("memory", "the memory does not suffice")]
)
def test_what_somebody_has_to_mend_is_not(fault: str, said: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(UserError, match=said):
        run([("fails", "x", {"out": out, "fault": fault, "times": 2})])
    assert out.read_text() == "1"


def test_a_fault_that_does_not_pass_ends_in_its_message(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="reset"):
        run([("fails", "x", {"out": tmp_path / "out", "fault": "network", "times": 99})])
    assert (tmp_path / "out").read_text() == "4"


def overlap(folder: Path, device: str) -> bool:
    """Whether two stages that compute on a device were at it at the same time."""
    outs = [folder / name for name in ("a", "b")]
    # Both processes are there and have imported what they need.
    run(
        [
            (
                "fails",
                out.name,
                {"out": folder / f"warm {out.name}", "fault": "network", "times": 0},
            )
            for out in outs
        ]
    )
    settings = EvaluateSettings(device=device)
    run([("takes", out.name, {"out": out, "settings": settings}) for out in outs])
    (_, ended), (began, _) = sorted(json.loads(out.read_text()) for out in outs)
    return bool(began < ended)


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="one stage at a time on one core")
def test_slots_of_a_device_are_shared_where_there_is_such_a_limit(tmp_path: Path) -> None:
    assert overlap(tmp_path, "auto"), "without a limit nothing waits"
    with get_client(sync_client=True) as client:
        client.upsert_global_concurrency_limit_by_name(limits.LIMIT, 1)
        try:
            assert not overlap(tmp_path, "auto")
            assert overlap(tmp_path, "cpu")
        finally:
            client.delete_global_concurrency_limit_by_name(limits.LIMIT)


def shown(key: str) -> dict[str, Any]:
    with get_client(sync_client=True) as client:
        found = client.read_artifacts(
            artifact_filter=ArtifactFilter(key=ArtifactFilterKey(any_=[key]))
        )
    assert len(found) == 1
    return found[0].model_dump()


def test_a_long_stage_shows_its_progress(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pages, "LONG", 0.3)
    run(
        [("takes", "long one", {"out": tmp_path / "a", "settings": EvaluateSettings(device="cpu")})]
    )
    assert shown("takes-long-one")["data"] == 100


@flow(flow_run_name="my params.yaml")
def show(report_folder: Path, store: str) -> None:
    pages.show_costs({("merge", "merged"): Outcome("merge", report_folder, True, 2.34, {})})
    pages.show_results(["task", "merged"], [["sst2", "91.0"]])
    pages.show_links(
        {"name": "my model", "version": "3", "run": "abc", "store": store}, report_folder
    )


def test_a_run_shows_its_results_costs_and_where_to_look(tmp_path: Path) -> None:
    show(tmp_path, "http://mlflow.example:5000/")
    assert "| sst2 | 91.0 |" in shown("results-my-params-yaml")["data"]
    costs = json.loads(shown("costs-my-params-yaml")["data"])
    assert costs == [{"stage": "merge", "of": "merged", "seconds": 2.3, "computed": True}]
    assert "(http://mlflow.example:5000/#/runs/abc)" in shown("run-my-params-yaml")["data"]
    assert (
        "(http://mlflow.example:5000/#/models/my%20model/versions/3)"
        in shown("version-my-params-yaml")["data"]
    )
    assert f"({tmp_path.as_uri()})" in shown("report-my-params-yaml")["data"]
