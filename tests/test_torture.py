"""Kills, damage and crowds: outputs come out right or not at all, whatever happens in between.

Short as a part of `make test-slow`; `make torture` sets FMN_TORTURE and takes its time.
"""

import os
import random
import shutil
import sys
from collections import Counter
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
DAMAGED = 15 if LONG else 2
# `make test` has no time for them.
at_length = pytest.mark.skipif(False, reason="") if LONG else pytest.mark.slow
SEED = int(os.environ.get("FMN_TORTURE_SEED", "0"))


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project whose pipeline has run once."""
    folder = torture.make_project(tmp_path_factory.mktemp("undisturbed"))
    torture.finish(torture.flow(folder))
    return folder


@at_length
@pytest.mark.parametrize("lane", LANES)
def test_kills_change_nothing(lane: int, undisturbed: Path, tmp_path: Path) -> None:
    expected, chance = torture.state(undisturbed), random.Random(SEED + lane)
    seconds = torture.seconds(undisturbed)
    folder = torture.make_project(tmp_path)
    work, stages = folder / "data" / "tiny", torture.stages(folder)
    order = [torture.START, *dict.fromkeys(stages.values())]
    finished: dict[Path, bytes] = {}
    aims, kills = Counter[str](), Counter[str]()
    while kills.total() < KILLS:
        ahead = {torture.START, *(stages[out] for out in stages.keys() - finished.keys())}
        aim = min(order, key=lambda stage: (stage not in ahead, aims[stage]))
        aims[aim] += 1
        left = torture.scratches(stages)
        process = torture.flow(folder)
        torture.wait_for(process, aim, stages, left, chance.uniform(0, seconds[aim]))
        at_work = torture.at_work(stages, left)
        if torture.kill(process, whole_group=chance.random() < 0.5):
            kills[aim if aim in at_work else at_work[0]] += 1
        present = torture.computations(work)
        again = [path for path, sidecar in finished.items() if present.get(path) != sidecar]
        assert not again, f"computed again after a kill: {again}"
        finished = present
        if process.returncode == 0:
            assert torture.state(folder).files == expected.files
        if finished.keys() == stages.keys() and kills.total() < KILLS:  # and from the start
            shutil.rmtree(work)
            finished = {}
    torture.finish(torture.flow(folder))
    assert torture.state(folder) == expected, "a file differs, or it was registered twice"
    assert not [path for path in work.rglob("*.partial") if path.is_dir()]
    names = [*order, torture.BETWEEN]
    bars = [f"{name:16}{kills[name]:3} {'#' * kills[name]}\n" for name in names]
    title = f"kills of lane {lane}, seed {SEED + lane}, by what was under way:\n"
    sys.stdout.writelines([title, *bars])  # pytest -rP shows it


@at_length
@pytest.mark.parametrize("lane", LANES)
def test_damage_is_noticed_and_repaired(lane: int, undisturbed: Path) -> None:
    chance = random.Random(SEED)  # the lanes share the outputs out
    work, expected = undisturbed / "data" / "tiny", torture.state(undisturbed)
    paths = torture.outputs(work)
    stages = torture.stages(undisturbed)
    chance.shuffle(paths)
    for number, path in enumerate(paths[lane :: len(LANES)][:DAMAGED]):
        how, other = ("flip", "cut", "empty", "delete", "swap")[number % 5], None
        siblings = [each for each in paths if stages[each] == stages[path] and each != path]
        if how == "swap":
            how, other = ("swap", chance.choice(siblings)) if siblings else ("delete", None)
        torture.damage(path, how, chance, other)
        torture.finish(torture.flow(undisturbed))
        assert torture.state(undisturbed) == expected, f"{how} {path.relative_to(work)}"
        sys.stdout.write(f"{how} {path.relative_to(work)}: repaired\n")


@at_length
def test_two_runs_and_dvc_at_once_come_to_the_same(undisturbed: Path, tmp_path: Path) -> None:
    folder = torture.make_project(tmp_path)
    runs = [torture.flow(folder), torture.flow(folder)]
    repro = torture.start(folder, *projects.DVC, "repro")
    for run in runs:
        torture.finish(run)
    repro.communicate()  # it may find the project busy
    assert torture.state(folder) == torture.state(undisturbed)
