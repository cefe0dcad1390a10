"""Stages on a real Dask scheduler and workers: the same bytes as here, also when a worker is killed."""

import contextlib
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from flows import cluster, storage, workers
from flows.cluster import Input, Request
from flows.faults import PassingError
from fmn.errors import UserError
from fmn.evaluate import stages as evaluate_stages
from fmn.evaluate.stages import EvaluateSettings
from fmn.fisher import stages as fisher_stages
from fmn.params import Params
from fmn.store import artifacts, stage
from fmn.store.stage import Outcome, Progress
from tests import projects, torture
from tests.conftest import FISHER, ROOT

SETTINGS = EvaluateSettings(device="cpu")


def profile(address: str, url: str) -> Params:
    content: dict[str, Any] = {
        "base": "x",
        "experts": {"tasks": ["sst2"]},
        "sources": {"sst2": "x"},
    }
    return Params.model_validate(
        content | {"registry": {"name": "x"}, "runner": "dask", "address": address, "storage": url}
    )


def asked(work: Path, **changed: Any) -> Request:
    arguments = {
        "checkpoint": work / "experts/sst2", "task": "sst2", "data": work / "data", "out": work / "x.parquet",
        "settings": FISHER,
    }  # fmt: skip
    return cluster.request("fisher", fisher_stages.fisher, arguments | changed)[0]


def test_a_request_is_told_by_what_its_result_depends_on(tiny_work: Path, tmp_path: Path) -> None:
    one = asked(tiny_work)
    shutil.copytree(tiny_work / "experts/sst2", tmp_path / "copy")
    assert asked(tiny_work, checkpoint=tmp_path / "copy").digest == one.digest
    assert (
        asked(tiny_work, settings=FISHER.model_copy(update={"device": "cuda", "workers": 2})).digest
        == one.digest
    )
    assert asked(tiny_work, settings=FISHER.model_copy(update={"seed": 1})).digest != one.digest
    assert asked(tiny_work, checkpoint=tiny_work / "experts/mrpc").digest != one.digest


def test_the_data_of_its_tasks_alone_travel_with_a_stage(tiny_work: Path) -> None:
    one = asked(tiny_work)
    data = one.arguments["folder"]
    assert isinstance(data, Input)
    assert {name.split("/")[0] for name in one.trees[data.digest]} == {"sst2"}


def test_a_scheduler_that_does_not_answer_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cluster, "ANSWER", 0.5)
    where = profile("tcp://127.0.0.1:9", f"file://{tmp_path}/shared")
    with (
        pytest.raises(UserError, match=r"address tcp://127\.0\.0\.1:9: no Dask scheduler answers"),
        cluster.joined(where),
    ):
        pass


def test_the_extra_that_is_missing_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "prefect_dask", None)
    with (
        pytest.raises(UserError, match=r"pip install 'fmn\[dask\]'"),
        cluster.joined(profile("tcp://127.0.0.1:9", f"file://{tmp_path}/shared")),
    ):
        pass


def test_another_fmn_is_told() -> None:
    assert cluster._differs(cluster.code()) is None
    told = cluster._differs({**cluster.code(), "fmn": "0.0.9 (0123)"})
    assert told is not None
    assert "0.0.9 (0123) where the flow runs; install the same on both" in told


# The rest needs a cluster.

SCHEDULER = "from distributed.cli.dask_scheduler import main; main()"
WORKER = "from distributed.cli.dask_worker import main; main()"


class Cluster:
    """A scheduler and workers, each a process with a folder of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.code = folder, ROOT
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        folder.mkdir()
        file = folder / "scheduler.json"
        self.start(
            "scheduler",
            SCHEDULER,
            "--host",
            "127.0.0.1",
            "--port",
            "0",
            "--scheduler-file",
            str(file),
        )
        until(file.is_file)
        self.address = str(json.loads(file.read_text())["address"])

    def start(self, name: str, code: str, *options: str) -> "subprocess.Popen[bytes]":
        with (self.folder / f"{name}.log").open("wb") as log:
            self.processes[name] = subprocess.Popen(
                [sys.executable, "-c", code, *options, "--no-dashboard"], stdout=log, stderr=log, cwd=self.folder,
                env=os.environ | {"PYTHONPATH": str(self.code), "OMP_NUM_THREADS": "1"},
            )  # fmt: skip
        return self.processes[name]

    def worker(self, name: str, code: str = WORKER, *options: str) -> "subprocess.Popen[bytes]":
        """A worker that has registered."""
        process = self.start(
            name, code, self.address, "--host", "127.0.0.1", "--no-nanny", "--nthreads", "1", "--memory-limit", "0",
            "--local-directory", str(self.folder / name), *options,
        )  # fmt: skip
        until(lambda: "Registered to" in self.log(name))
        return process

    def log(self, name: str) -> str:
        return (self.folder / f"{name}.log").read_text()

    def under_way(self, stage_file: str) -> str | None:
        """The worker that is at the stage with this output, and has not finished it."""
        for name in self.processes:
            for lock in (self.folder / name).glob(
                f"dask-scratch-space*/fmn-*/made/*/.{stage_file}.lock"
            ):
                if not (lock.parent / stage_file).exists():
                    return name
        return None

    def kill(self, name: str) -> None:
        process = self.processes.pop(name)
        process.kill()
        process.wait()

    def end(self) -> None:
        for name in list(self.processes):
            self.kill(name)


def until(happened: Callable[[], Any], seconds: float = 300) -> None:
    deadline = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.05)


@pytest.fixture
def dask(tmp_path: Path) -> Iterator[Cluster]:
    started = Cluster(tmp_path / "cluster")
    try:
        yield started
    finally:
        started.end()


@contextlib.contextmanager
def joined(dask: Cluster, tmp_path: Path) -> Iterator[storage.Storage]:
    url = f"file://{tmp_path}/shared"
    with cluster.joined(profile(dask.address, url)):
        yield storage.Storage(url)


def evaluate(work: Path, out: Path) -> Outcome:
    arguments = {
        "model": work / "experts/sst2",
        "names": ["sst2"],
        "folder": work / "data",
        "settings": SETTINGS,
    }
    return cluster.run(
        "evaluate", evaluate_stages.evaluate, {**arguments, "out": out}, lambda done, total: None
    )


def goes_on(out: Path, ticks: Path, progress: Progress | None = None) -> Outcome:
    """Stands for a stage that keeps partial sums: it counts to 30, from where a run before it was."""
    sums = out.with_name(f".{out.name}.0-1.partial-sums")

    def compute() -> dict[str, Any]:
        begun = int(sums.read_text()) if sums.is_file() else 0
        for done in range(begun + 1, 31):
            time.sleep(0.2)
            sums.write_text(str(done))
            if progress:
                progress(done, 30)
        return {"begun": begun, "process": os.getpid()}

    return stage.run_json("test", out, "key", compute)


@pytest.mark.slow
def test_a_stage_comes_out_as_here_and_once(dask: Cluster, tiny_work: Path, tmp_path: Path) -> None:
    dask.worker("one")
    here = tmp_path / "here/sst2.json"
    arguments: dict[str, Any] = {
        "model": tiny_work / "experts/sst2", "names": ["sst2"], "folder": tiny_work / "data",
    }  # fmt: skip
    evaluate_stages.evaluate(**arguments, out=here, settings=SETTINGS)
    there, again = tmp_path / "there/sst2.json", tmp_path / "again/sst2.json"
    with joined(dask, tmp_path) as shared:
        assert evaluate(tiny_work, there).computed
        assert storage.tree(there.parent) == storage.tree(here.parent)
        assert not evaluate(tiny_work, there).computed
        evaluate_stages.evaluate(**arguments, out=there, settings=SETTINGS)

        # Somebody else, who has nothing yet, takes what was made.
        stamps = {
            path: path.stat().st_mtime_ns for path in Path(shared.root).rglob("*") if path.is_file()
        }
        evaluate(tiny_work, again)
        assert storage.tree(again.parent) == storage.tree(here.parent)
        assert {path: path.stat().st_mtime_ns for path in stamps} == stamps

        # An input that rots in the storage before it arrives, and an output that does.
        files = storage.tree(tiny_work / "experts/mrpc")
        weights = Path(shared.root) / "files" / files["model.safetensors"].digest[:2]
        weights.mkdir(exist_ok=True)
        (weights / files["model.safetensors"].digest).write_bytes(
            b"x" * files["model.safetensors"].size
        )
        other = {
            "model": tiny_work / "experts/mrpc", "names": ["mrpc"], "folder": tiny_work / "data",
            "out": tmp_path / "mrpc.json", "settings": SETTINGS,
        }  # fmt: skip
        with pytest.raises(
            PassingError, match=r"shared/files/.*: not the model\.safetensors that was put there"
        ):
            cluster.run("evaluate", evaluate_stages.evaluate, other, lambda done, total: None)
        assert cluster.run(
            "evaluate", evaluate_stages.evaluate, other, lambda done, total: None
        ).computed

        made = storage.tree(there.parent)["sst2.json"]
        (Path(shared.root) / "files" / made.digest[:2] / made.digest).write_bytes(b"x" * made.size)
        shutil.rmtree(again.parent)
        with pytest.raises(PassingError, match=r"not the sst2\.json that was put there"):
            evaluate(tiny_work, again)
        assert not again.exists()
        evaluate(tiny_work, again)
        assert storage.tree(again.parent) == storage.tree(here.parent)


@pytest.mark.slow
def test_partial_sums_are_gone_on_from_elsewhere_and_what_is_ended_stops(
    dask: Cluster, tiny_work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dask.worker("one")
    ticks: list[tuple[int, int]] = []

    def killing(done: int, total: int) -> None:
        ticks.append((done, total))
        if done >= 8 and "one" in dask.processes:
            dask.kill("one")
            dask.worker("two")

    given = {"ticks": tiny_work / "data/sst2/fmn.json"}
    with joined(dask, tmp_path) as shared:
        out = tmp_path / "out.json"
        begun = cluster.run("fisher", goes_on, {**given, "out": out}, killing).summary["begun"]
        assert begun >= 4, "not from the start"
        assert max(done for done, _ in ticks) > begun
        assert not list(Path(shared.root).glob("sums/*"))

        ended = workers._context.Value("b", 0, lock=False)
        monkeypatch.setattr(workers, "_ended", lambda: ended)
        ticks.clear()
        threading.Timer(3, workers.end).start()
        with pytest.raises(UserError, match="ended with its run"):
            cluster.run(
                "fisher", goes_on, {"ticks": out, "out": tmp_path / "two.json"}, lambda *_: None
            )
        (sums,) = (dask.folder / "two").rglob(".two.json.*.partial-sums")
        time.sleep(2)
        stopped = sums.read_text()
        time.sleep(1)
        assert sums.read_text() == stopped != "30"
        assert not (tmp_path / "two.json").exists()


@pytest.mark.slow
def test_a_cluster_that_cannot_work_is_told_in_one_line(
    dask: Cluster, tiny_work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cluster, "ANSWER", 2.0)

    def told() -> str:
        with pytest.raises(UserError) as caught, joined(dask, tmp_path):
            pass
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert "the scheduler has no workers; start some: `dask worker" in told()
    monkeypatch.setattr(cluster, "ANSWER", 60.0)

    dask.worker("bare", f"import sys; sys.modules['flows'] = None; {WORKER}")
    assert "no fmn there" in told()
    dask.kill("bare")

    dask.code = tmp_path / "older"
    for name in ("fmn", "flows"):
        shutil.copytree(ROOT / name, dask.code / name, ignore=shutil.ignore_patterns("__pycache__"))
    with (dask.code / "fmn/store/stage.py").open("a") as file:
        file.write("\n")
    dask.worker("older")
    assert "install the same on both" in told()
    dask.kill("older")

    dask.code = ROOT
    dask.worker("one")
    probe = storage.Storage(f"file://{tmp_path}/unshared").probe()
    with joined(dask, tmp_path):
        client = cluster._joined.get()
        assert client is not None
        with pytest.raises(UserError, match="does not see what the flow wrote to"):
            cluster.check_workers(client, probe)
        with pytest.raises(UserError, match="no such thing"):
            cluster.run("evaluate", mistaken, {"out": tmp_path / "x.json"}, lambda *_: None)
        dask.kill("scheduler")
        with pytest.raises(UserError, match=r"the scheduler tcp://.* went away"):
            cluster.run("evaluate", evaluate_stages.evaluate, {
                "model": tiny_work / "experts/sst2", "names": ["sst2"], "folder": tiny_work / "data",
                "out": tmp_path / "y.json", "settings": SETTINGS,
            }, lambda *_: None)  # fmt: skip


def says_where(out: Path, settings: EvaluateSettings) -> Outcome:
    return stage.run_json("test", out, "key", lambda: {"process": os.getpid()})


@pytest.mark.slow
def test_what_computes_on_a_device_goes_where_a_gpu_is_offered(
    dask: Cluster, tmp_path: Path
) -> None:
    def ran_in(device: str, number: int) -> int:
        arguments = {
            "settings": EvaluateSettings(device=device),
            "out": tmp_path / f"{device}-{number}.json",
        }
        return int(
            cluster.run("evaluate", says_where, arguments, lambda *_: None).summary["process"]
        )

    plain = dask.worker("plain")
    with joined(dask, tmp_path):
        assert ran_in("auto", 0) == plain.pid, "without a GPU it runs all the same"
    able = dask.worker("able", WORKER, "--resources", "GPU=1")
    with joined(dask, tmp_path):
        shutil.rmtree(tmp_path / "shared/made")
        assert ran_in("auto", 1) == able.pid
        assert ran_in("cpu", 1) in (plain.pid, able.pid)


def mistaken(out: Path) -> Outcome:
    def compute() -> dict[str, Any]:
        raise UserError("no such thing")

    return stage.run_json("test", out, "key", compute)


@pytest.mark.slow
def test_a_worker_that_is_killed_in_a_fisher_changes_nothing(
    dask: Cluster, tiny_base: Path, tmp_path: Path
) -> None:
    (tmp_path / "local").mkdir()
    (tmp_path / "far").mkdir()
    local, far = (projects.make_project(tmp_path / name, tiny_base) for name in ("local", "far"))
    for folder in (local, far):
        text = (folder / "params.yaml").read_text()
        (folder / "params.yaml").write_text(
            text.replace("empirical, samples: 32", "expected, samples: all")
        )
    done = torture.finish(torture.flow(local))
    assert done.code == 0, done.said

    with (far / "params.yaml").open("a") as settings:
        settings.write(
            f"runner: dask\naddress: {dask.address}\nstorage: file://{tmp_path}/shared\n"
        )
    dask.code = far
    dask.worker("one")
    dask.worker("two")
    run = torture.flow(far)
    until(lambda: dask.under_way("sst2.parquet") or run.poll() is not None)
    victim = dask.under_way("sst2.parquet")
    made = {path: path.stat().st_ino for path in (tmp_path / "shared/made").glob("*.json")}
    assert victim is not None, torture.finish(run).said
    dask.kill(victim)
    done = torture.finish(run)
    assert done.code == 0, done.said
    there, here = torture.state(far), torture.state(local)
    clocks = ("run.log", "report/pictures/cost.svg")
    different = [
        n
        for n in {*there.files, *here.files}
        if there.files.get(n) != here.files.get(n) and n not in clocks
    ]
    assert not different
    assert {"fisher/sst2.parquet", "merged/merge.json", "metrics/merged.json"} <= {*here.files}
    assert {path: path.stat().st_ino for path in made} == made, "made again though it was finished"
    stages_there = 2 + 2 + 2 + 3  # finetune, fisher, evaluate of experts and of merged models
    assert len(list((tmp_path / "shared/made").glob("*.json"))) == stages_there

    # A run on this machine, and DVC, find it done.
    assert "nothing had changed" in torture.finish(torture.flow(far)).said
    dask.end()
    text = (far / "params.yaml").read_text()
    (far / "params.yaml").write_text(text.replace("runner: dask", "runner: local"))
    assert "nothing had changed" in torture.finish(torture.flow(far)).said


def test_a_made_output_of_another_key_is_refused(tmp_path: Path) -> None:
    out = tmp_path / "out.json"

    def elsewhere() -> float:
        artifacts.write_json(out, "test", "another key", {})
        return 1.0

    token = stage.elsewhere.set(elsewhere)
    try:
        with pytest.raises(UserError, match="not what these inputs and settings ask for"):
            stage.run_json("test", out, "key", dict)
    finally:
        stage.elsewhere.reset(token)
