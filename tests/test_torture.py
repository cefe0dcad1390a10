"""Kills, damage and crowds: outputs come out right or not at all, whatever happens in between.

Short as a part of `make test`; `make torture` sets FMN_TORTURE and takes its time.
"""

import os
import random
import shutil
import subprocess
import time
from contextlib import suppress
from pathlib import Path

import pytest

from tests import projects, torture

LONG = bool(os.environ.get("FMN_TORTURE"))
# Lanes run side by side, each with a project and a seed of its own.
LANES = [
    pytest.param(lane, marks=pytest.mark.xdist_group(f"lane-{lane}"))
    for lane in range(2 if LONG else 1)
]
KILLS = 20 if LONG else 2
DAMAGED = 13 if LONG else 2
SEED = int(os.environ.get("FMN_TORTURE_SEED", "0"))


@pytest.fixture(scope="module")
def undisturbed(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, float]:
    """A project whose pipeline has run once, and the seconds that it took."""
    folder = torture.make_project(tmp_path_factory.mktemp("undisturbed"), tiny_base)
    began = time.monotonic()
    torture.finish(torture.flow(folder))
    return folder, time.monotonic() - began


@pytest.mark.parametrize("lane", LANES)
def test_kills_change_nothing(
    lane: int, undisturbed: tuple[Path, float], tiny_base: Path, tmp_path: Path
) -> None:
    project, seconds = undisturbed
    expected, chance = torture.state(project), random.Random(SEED + lane)
    folder = torture.make_project(tmp_path, tiny_base)
    work = folder / "data" / "tiny"
    finished: dict[Path, bytes] = {}
    kills = 0
    while kills < KILLS:
        process = torture.flow(folder)
        with suppress(subprocess.TimeoutExpired):
            process.wait(chance.uniform(0, seconds))
        kills += torture.kill(process, whole_group=chance.random() < 0.5)
        present = torture.computations(work)
        again = [path for path, sidecar in finished.items() if present.get(path) != sidecar]
        assert not again, f"computed again after a kill: {again}"
        finished = present
        if process.returncode == 0 and kills < KILLS:  # and from the start
            assert torture.state(folder).files == expected.files
            shutil.rmtree(work)
            finished = {}
    torture.finish(torture.flow(folder))
    assert torture.state(folder) == expected, "a file differs, or it was registered twice"
    assert not [path for path in work.rglob("*.partial") if path.is_dir()]


@pytest.mark.parametrize("lane", LANES)
def test_damage_is_noticed_and_repaired(lane: int, undisturbed: tuple[Path, float]) -> None:
    project, chance = undisturbed[0], random.Random(SEED + lane)
    work, expected = project / "data" / "tiny", torture.state(project)
    for number in range(DAMAGED):
        how = ("flip", "cut", "empty", "delete", "swap")[number % 5]
        path, other = chance.choice(torture.outputs(work)), None
        if how == "swap":
            experts = [work / "experts/sst2", work / "experts/stsb"]
            path, other = chance.sample(experts, 2)
        torture.damage(path, how, chance, other)
        torture.finish(torture.flow(project))
        assert torture.state(project) == expected, f"{how} {path.relative_to(work)}"


def test_two_runs_and_dvc_at_once_come_to_the_same(
    undisturbed: tuple[Path, float], tiny_base: Path, tmp_path: Path
) -> None:
    folder = torture.make_project(tmp_path, tiny_base)
    runs = [torture.flow(folder), torture.flow(folder)]
    repro = torture.start(folder, *projects.DVC, "repro")
    for run in runs:
        torture.finish(run)
    repro.communicate()  # it may find the project busy
    assert torture.state(folder) == torture.state(undisturbed[0])
