"""How far a run is, by what its stages took before."""

from pathlib import Path

import pytest

from flows import workers
from flows.clock import Clock
from flows.graph import Node
from fmn.store.stage import Job, Outcome, run_stage


def compute(out: Path) -> Outcome:
    raise NotImplementedError(out)


def node(name: str, out: Path, stage: str = "finetune") -> Node:
    return Node(stage, name, compute, {"out": out / name})


def outcome(out: Path, seconds: float, computed: bool = True) -> Outcome:
    return Outcome("finetune", out, computed, seconds, None)


def test_a_first_run_tells_shares_and_then_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workers, "count", lambda: 1)
    lines: list[str] = []
    nodes = [node("data", tmp_path, "data"), *(node(name, tmp_path) for name in "abc")]
    clock = Clock(nodes, lines.append)
    assert clock.count(nodes[0], outcome(tmp_path, 1)) == "1 of 4", "too little is known"
    assert clock.count(nodes[1], outcome(tmp_path, 120)) == "2 of 4, about 4 min left"
    assert clock.count(nodes[2], outcome(tmp_path, 120)) == "3 of 4, about 2 min left"
    assert clock.count(nodes[3], outcome(tmp_path, 120)) == "4 of 4"
    assert lines[:2] == ["stage 1 of 4", "stage 1 of 4"]
    assert lines[-1] == "stage 4 of 4"


def test_a_later_run_knows_what_its_stages_took(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workers, "count", lambda: 2)
    nodes = [node(name, tmp_path) for name in "abcd"]
    for each in nodes:

        def write(job: Job) -> None:
            job.path.write_text("x")

        run_stage("finetune", 1, each.arguments["out"], write, reads={}, settings={}, summary=str)
        file = tmp_path / f"{each.name}.fmn.json"
        text = file.read_text()
        seconds = text[text.index('"seconds"') : text.index(",", text.index('"seconds"'))]
        file.write_text(text.replace(seconds, '"seconds": 1800.0'))
    clock = Clock(nodes, lambda text: None)
    assert (
        clock.count(nodes[0], outcome(tmp_path, 0, computed=False)) == "1 of 4, about 45 min left"
    )
    assert clock.up_to_date == 1
    assert clock.count(nodes[1], outcome(tmp_path, 3600)) == "2 of 4, about 60 min left"
