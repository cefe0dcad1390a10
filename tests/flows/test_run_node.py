"""A stage as Prefect runs it: retried after transient errors, with a tag if it needs a device."""

import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
from prefect import flow

from flows import pipeline
from flows.graph import Node
from fmn import params
from fmn.errors import UserError
from fmn.evaluate.stages import EvaluateSettings
from fmn.store.stage import Outcome
from tests.conftest import wait_until
from tests.hub_server import Hub

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


def waits_for(out: Path, file: str, after: Path | None = None) -> Outcome:
    """Stands for a stage that ends once a file is there, and reads the output `after`."""
    wait_until(lambda: Path(file).exists(), seconds=60)
    out.write_text("")
    return Outcome("test", out, True, 0.1, {})


@pytest.mark.usefixtures("prefect_server", "own_workers")
def test_a_stage_that_waits_for_others_keeps_no_stage_from_running(tmp_path: Path) -> None:
    first, other = tmp_path / "first", tmp_path / "other"
    after = {"file": str(first), "after": first}
    nodes = [  # the first can only end while the last, which needs nothing, runs beside it
        Node("first", "", waits_for, {"out": first, "file": str(other)}),
        Node("next", "", waits_for, {"out": tmp_path / "next", **after}),
        Node("next", "too", waits_for, {"out": tmp_path / "next too", **after}),
        Node("other", "", waits_for, {"out": other, "file": str(tmp_path)}),
    ]

    @flow(task_runner=pipeline.RUNNER)
    def run_all() -> list[pipeline.Key]:
        return list(pipeline.run_nodes(nodes))

    assert run_all() == [pipeline.key_of(node) for node in nodes]


def test_stages_that_compute_on_a_gpu_have_a_tag_that_a_server_can_limit(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def tags(**settings: Any) -> set[str]:
        return pipeline.tags(Node("x", "", fails_at_first, settings))

    assert tags(settings=EvaluateSettings(device="cuda:0")) == {"fmn-gpu"}
    for gpus, expected in (0, set()), (1, {"fmn-gpu"}):
        monkeypatch.setattr("flows.workers.gpus", lambda gpus=gpus: gpus)
        assert tags(settings=EvaluateSettings(device="auto")) == expected
    assert tags(settings=EvaluateSettings(device="cpu")) == tags() == set()


PROFILE = """\
base: here
experts: {tasks: [sst2, stars, more]}
tasks:
  stars: {dataset: {path: reviews.csv}, columns: {text: review, label: stars}}
  more: {dataset: {path: "https://host/more.csv"}, columns: {text: review, label: stars}}
sources:
  sst2: nowhere
  stars: hf://org/none
finetune: {more: {}}
data: {source: embedded}
registry: {name: demo}
"""


def test_sources_and_rows_that_are_not_there_are_listed_with_their_lines(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(tiny_base, "here")
    profile = Path("params.yaml")
    profile.write_text(PROFILE)
    with Hub() as hub:
        for name, value in hub.environment(tmp_path / "home").items():
            monkeypatch.setenv(name, value)
        with pytest.raises(UserError) as error:
            pipeline.check_sources(params.load(profile), profile)
        lines = str(error.value).split("; params.yaml")
        assert len(lines) == 3, "the base is here, and rows at a URL are read when they are needed"
        for place, problem in ((":7: sources.sst2", "nowhere"), (":8: sources.stars", "org/none"),
                               (":4: tasks.stars", "reviews.csv")):  # fmt: skip
            assert any(place in line and problem in line for line in lines), str(error.value)
        hub.add("models", "org/none", tmp_path / "here")
        shutil.copytree("here", "nowhere")
        Path("reviews.csv").write_text("review,stars\ngood,5\n")
        pipeline.check_sources(params.load(profile), profile)
