"""Kills, rot and crowds: what a pipeline makes comes out right or not at all, whatever happens in between.

Short as a part of `make test`; `make torture` sets FMN_TORTURE and takes its time.
"""

import os
import random
import shutil
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest

from tests import torture

LONG = bool(os.environ.get("FMN_TORTURE"))
# In lanes, which run side by side, each with a project and chances of its own.
LANES = [
    pytest.param(lane, marks=pytest.mark.xdist_group(f"lane-{lane}"))
    for lane in range(2 if LONG else 1)
]
KILLS = 20 if LONG else 2
ROTTEN = 13 if LONG else 2
SEED = int(os.environ.get("FMN_TORTURE_SEED", "0"))


@pytest.fixture(scope="module")
def undisturbed(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, float]:
    """A project whose pipeline has run once, and the seconds that it took."""
    folder = torture.make_project(tmp_path_factory.mktemp("undisturbed"), tiny_base)
    began = time.monotonic()
    done = torture.finish(torture.flow(folder))
    assert done.code == 0, done.said
    return folder, time.monotonic() - began


@pytest.fixture
def project(undisturbed: tuple[Path, float]) -> Path:
    return undisturbed[0]


@pytest.mark.parametrize("lane", LANES)
def test_kills_change_nothing(
    lane: int, undisturbed: tuple[Path, float], tiny_base: Path, tmp_path: Path
) -> None:
    project, seconds = undisturbed
    chance = random.Random(SEED + lane)
    folder = torture.make_project(tmp_path, tiny_base)
    work = folder / "data" / "tiny"
    finished: dict[Path, int] = {}
    kills, reached = 0, []
    while kills < KILLS:
        began = time.monotonic()
        process = torture.flow(folder)
        with suppress(subprocess.TimeoutExpired):
            process.wait(chance.uniform(0, seconds))
        took, whole = time.monotonic() - began, not finished
        kills += torture.kill(process, whole=chance.random() < 0.5)
        there = torture.places(work)
        again = [path for path, inode in finished.items() if there.get(path) != inode]
        assert not again, f"made again after a kill: {again}"
        finished = there
        reached.append(len(there))
        if process.returncode == 0 and kills < KILLS:
            assert torture.state(folder).files == torture.state(project).files
            seconds = (
                min(seconds, took) if whole else seconds
            )  # later runs find Python's files in the cache
            shutil.rmtree(work)  # and from the start
            finished = {}
    done = torture.finish(torture.flow(folder))
    assert done.code == 0, done.said
    assert torture.state(folder) == torture.state(project)
    assert torture.versions(folder) == 1, "registered twice"
    assert not [path for path in work.rglob("*.partial") if path.is_dir()]
    print(f"{kills} kills; outputs that were there at each: {reached}")  # noqa: T201


@pytest.mark.parametrize("lane", LANES)
def test_rot_is_noticed_and_mended(lane: int, project: Path) -> None:
    chance = random.Random(SEED + lane)
    work = project / "data" / "tiny"
    expected = torture.state(project)
    tried = []
    for number in range(ROTTEN):
        how = ("flip", "cut", "empty", "delete", "swap")[number % 5]
        path = chance.choice(list(torture.outputs(work)))
        alike = [
            one
            for one in path.parent.glob(f"*{path.suffix}")
            if one != path and not one.name.startswith(".")
        ]
        alike = [
            one
            for one in alike
            if one.is_dir() == path.is_dir() and one in set(torture.outputs(work))
        ]
        if how == "swap" and not alike:
            how = "flip"
        torture.broken(path, how, chance, chance.choice(alike) if how == "swap" else None)
        tried.append(f"{how} {path.relative_to(work)}")
        done = torture.finish(torture.flow(project))
        assert done.code == 0, f"{tried[-1]}: {done.said}"
        assert "Traceback" not in done.said
        assert torture.state(project) == expected, tried[-1]
    print(f"{len(tried)} rotten outputs mended: {', '.join(tried)}")  # noqa: T201


def test_two_runs_and_dvc_at_once_come_to_the_same(
    project: Path, tiny_base: Path, tmp_path: Path
) -> None:
    folder = torture.make_project(tmp_path, tiny_base)
    runs = [torture.flow(folder), torture.flow(folder)]
    if LONG:
        runs.append(torture.start(folder, sys.executable, "-m", "dvc", "repro"))
    ended = [torture.finish(run) for run in runs]
    for done in ended[:2]:
        assert done.code == 0, done.said
        assert "Traceback" not in done.said
    assert torture.state(folder) == torture.state(project)
    assert torture.versions(folder) == 1
