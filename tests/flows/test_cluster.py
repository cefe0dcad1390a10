"""Stages on a real Dask scheduler and workers: the same bytes as here, also after a kill."""

import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest

from flows import cluster, workers
from flows.workers import Stage, TransientError
from fmn.errors import UserError
from fmn.fisher.stages import FisherSettings
from fmn.params import Params
from fmn.store import artifacts
from fmn.store.records import Record
from fmn.store.stage import Outcome, Progress, no_progress, read_info, run_stage
from tests import projects, torture
from tests.conftest import FISHER, ROOT, wait_until


def profile(address: str, url: str) -> Params:
    content: dict[str, Any] = {
        "base": "x", "experts": {"tasks": ["sst2"]}, "sources": {"sst2": "x"},
        "registry": {"name": "x"}, "runner": "dask", "address": address, "storage": url,
    }  # fmt: skip
    return Params.model_validate(content)


class Copied(Record):
    """What the stage `copy` reports."""

    process: int


def copy(
    checkpoint: Path,
    *,
    task: str,
    data: Path,
    out: Path,
    settings: FisherSettings,
    progress: Progress = no_progress,
) -> Outcome[Copied]:
    """Stands for a stage: it copies a file, `settings.samples` steps of 0.1 s each."""

    def compute(job: Any) -> Copied:
        for done in range(settings.samples if isinstance(settings.samples, int) else 0):
            time.sleep(0.1)
            progress(done + 1, 32)
            (job.path.parent / "steps").write_text(str(done))
        (job.path.parent / "steps").unlink(missing_ok=True)
        shutil.copyfile(checkpoint / "model.safetensors", job.path)
        job.path.with_name(f"{job.path.stem}.extra").write_text(settings.estimator)
        return Copied(process=os.getpid())

    reads = {"checkpoint": checkpoint, "data": data / task}
    return run_stage(
        "copy", 1, out, compute, reads=reads, settings={"settings": settings},
        summary=lambda path: read_info(path, Copied),
    )  # fmt: skip


def copy_folder(model: Path, *, out: Path) -> Outcome[str]:
    """Stands for a stage whose output is a folder."""

    def compute(job: Any) -> None:
        shutil.copytree(model, job.path / "inside", ignore=shutil.ignore_patterns("fmn.json"))

    return run_stage(
        "copy", 1, out, compute, reads={"model": model}, settings={}, summary=str, is_folder=True
    )


def fail(out: Path) -> Outcome[str]:
    def compute(job: object) -> None:
        raise UserError("no such thing")

    return run_stage("fail", 1, out, compute, reads={}, settings={}, summary=str)


def arguments(work: Path, out: Path, **settings: Any) -> dict[str, Any]:
    return {
        "checkpoint": work / "experts/sst2", "task": "sst2", "data": work / "data", "out": out,
        "settings": FISHER.model_copy(update={"samples": 1, **settings}),
    }  # fmt: skip


def test_an_unreachable_scheduler_and_a_missing_package_are_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = profile("tcp://127.0.0.1:9", f"file://{tmp_path}/shared")
    monkeypatch.setattr(cluster, "TIMEOUT", 0.5)
    no_answer = "^address tcp://127.0.0.1:9: no Dask scheduler answers"
    with pytest.raises(UserError, match=no_answer), cluster.joined(settings):
        pass
    monkeypatch.setitem(sys.modules, "distributed", None)
    with pytest.raises(UserError, match=r"pip install 'fmn\[dask\]'"), cluster.joined(settings):
        pass


# ---------------------------------------------------------------------------------------------
# The rest needs a cluster

SCHEDULER = "from distributed.cli.dask_scheduler import main; main()"
WORKER = "from distributed.cli.dask_worker import main; main()"


class Cluster:
    """A scheduler and workers, each a process with a folder of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.code = folder, ROOT
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        folder.mkdir()
        file = folder / "scheduler.json"
        options = ("--host", "127.0.0.1", "--port", "0", "--scheduler-file", str(file))
        self.start("scheduler", SCHEDULER, *options)
        wait_until(file.is_file)
        self.address = str(json.loads(file.read_text())["address"])

    def start(self, name: str, code: str, *options: str) -> "subprocess.Popen[bytes]":
        with (self.folder / f"{name}.log").open("wb") as log:
            self.processes[name] = subprocess.Popen(
                [sys.executable, "-c", code, *options, "--no-dashboard"],
                stdout=log, stderr=log, cwd=self.folder,
                env=os.environ | {"PYTHONPATH": str(self.code), "OMP_NUM_THREADS": "1"},
            )  # fmt: skip
        return self.processes[name]

    def worker(self, name: str, code: str = WORKER, *options: str) -> "subprocess.Popen[bytes]":
        """Start a worker, and wait until it has registered."""
        process = self.start(
            name, code, self.address, "--host", "127.0.0.1", "--no-nanny", "--nthreads", "1",
            "--memory-limit", "0", "--local-directory", str(self.folder / name), *options,
        )  # fmt: skip
        log = self.folder / f"{name}.log"
        wait_until(lambda: "Registered to" in log.read_text())
        return process

    def at_work(self, stage_file: str) -> str | None:
        """The worker that is computing the stage with this output."""
        for name in self.processes:
            if any((self.folder / name).rglob(f".{stage_file}.partial")):
                return name
        return None

    def kill(self, name: str) -> None:
        process = self.processes.pop(name)
        process.kill()
        process.wait()


@pytest.fixture
def dask(tmp_path: Path) -> Iterator[Cluster]:
    started = Cluster(tmp_path / "cluster")
    try:
        yield started
    finally:
        for name in list(started.processes):
            started.kill(name)


def joined(dask: Cluster, folder: Path) -> AbstractContextManager[None]:
    return cluster.joined(profile(dask.address, f"file://{folder}/shared"))


def run(function: Stage, arguments: Mapping[str, Any], progress: Progress = no_progress) -> Outcome:
    return cluster.run(function, arguments, progress)


@pytest.mark.slow
def test_an_output_comes_back_with_its_sidecar_and_only_once(
    dask: Cluster, tiny_work: Path, tmp_path: Path
) -> None:
    worker = dask.worker("one")
    here, there = tmp_path / "here/x.bin", tmp_path / "there/x.bin"
    copy(**arguments(tiny_work, here))
    with joined(dask, tmp_path):
        outcome = run(copy, arguments(tiny_work, there))
        assert outcome.computed
        assert outcome.summary.process == worker.pid
        names = {path.name for path in there.parent.iterdir()}
        assert names == {"x.bin", "x.bin.fmn.json", "x.extra"}
        assert there.read_bytes() == here.read_bytes()
        assert not run(copy, arguments(tiny_work, there)).computed
        assert not copy(**arguments(tiny_work, there)).computed, "nor without a cluster"

        folder = tmp_path / "folder"
        model = tiny_work / "experts/mrpc"
        assert run(copy_folder, {"model": model, "out": folder}).computed
        assert not copy_folder(model, out=folder).computed

        # A file that is damaged in the storage before it arrives, here or there, costs a retry.
        other = {"model": tiny_work / "experts/stsb", "out": tmp_path / "other"}
        for function, inputs, damaged in (
            (copy, arguments(tiny_work, there), there.with_name("x.extra")),
            (copy_folder, other, tiny_work / "experts/stsb/model.safetensors"),
        ):
            there.unlink()
            digest = artifacts.digest_file(damaged)
            stored = tmp_path / "shared/files" / digest[:2] / digest
            stored.parent.mkdir(exist_ok=True)
            stored.write_text("damaged")
            with pytest.raises(TransientError, match=rf"{damaged.name} .* was damaged"):
                run(function, inputs)
            assert not inputs["out"].exists()
            assert run(function, inputs).computed


@pytest.mark.slow
def test_what_is_ended_stops_on_the_worker(
    dask: Cluster, tiny_work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dask.worker("one")
    monkeypatch.setattr(workers, "_ended", workers._context.Value("b", 0, lock=False))
    out = tmp_path / "out.bin"
    with joined(dask, tmp_path):
        with pytest.raises(UserError, match="ended with its run"):
            # At the first report of progress.
            run(copy, arguments(tiny_work, out, samples=600), lambda *step: workers.end())
        wait_until(lambda: dask.at_work("out.bin") is None, seconds=10)
    assert not out.exists()


@pytest.mark.slow
def test_a_cluster_that_cannot_work_is_reported_in_one_line(
    dask: Cluster, tiny_work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def error_of() -> str:
        with pytest.raises(UserError) as caught, joined(dask, tmp_path):
            pass
        assert "\n" not in str(caught.value)
        return str(caught.value)

    monkeypatch.setattr(cluster, "TIMEOUT", 2.0)
    assert "the Dask scheduler has no workers; start some: `dask worker" in error_of()
    monkeypatch.setattr(cluster, "TIMEOUT", 60.0)
    dask.worker("bare", f"import sys; sys.modules['flows'] = None; {WORKER}")
    assert "; install fmn[dask] of the flow's version there" in error_of()
    dask.kill("bare")

    dask.code = tmp_path / "older"
    for name in ("fmn", "flows"):
        shutil.copytree(ROOT / name, dask.code / name, ignore=shutil.ignore_patterns("__pycache__"))
    with (dask.code / "fmn/store/stage.py").open("a") as file:
        file.write("\n")
    dask.worker("older")
    assert re.search(r"it has fmn .*; the flow has .*; install fmn", error_of())
    dask.kill("older")

    dask.code = ROOT
    dask.worker("one")
    with joined(dask, tmp_path):
        with pytest.raises(UserError, match="no such thing"):
            run(fail, {"out": tmp_path / "x"})
        threading.Timer(2, dask.kill, ["scheduler"]).start()
        with pytest.raises(UserError, match="the Dask scheduler went away"):
            run(copy, arguments(tiny_work, tmp_path / "y", samples=600))


@pytest.mark.slow
def test_a_stage_for_a_gpu_goes_where_one_is_offered(
    dask: Cluster, tiny_work: Path, tmp_path: Path
) -> None:
    def process(device: str) -> int:
        out = tmp_path / f"{device}-{time.monotonic_ns()}"
        return int(run(copy, arguments(tiny_work, out, device=device)).summary.process)

    plain = dask.worker("plain")
    with joined(dask, tmp_path):
        assert process("auto") == plain.pid, "without a GPU it runs all the same"
    gpu = dask.worker("gpu", WORKER, "--resources", "GPU=1")
    with joined(dask, tmp_path):
        assert [process("auto") for _ in range(3)] == 3 * [gpu.pid]
        assert process("cpu") in (plain.pid, gpu.pid)


@pytest.mark.slow
def test_a_worker_that_is_killed_in_a_fisher_changes_nothing(
    dask: Cluster, tiny_base: Path, tmp_path: Path
) -> None:
    local, far = (projects.make_project(tmp_path / name, tiny_base) for name in ("local", "far"))
    for folder in (local, far):
        settings = folder / "params.yaml"
        text = settings.read_text().replace(
            "empirical, samples: 32", "expected, samples: all, parts: 2"
        )
        settings.write_text(text)
    torture.finish(torture.flow(local))

    remote = f"runner: dask\naddress: {dask.address}\nstorage: file://{tmp_path}/shared\n"
    (far / "params.yaml").write_text((far / "params.yaml").read_text() + remote)
    dask.code = far
    dask.worker("one")
    dask.worker("two")
    flow = torture.flow(far)
    wait_until(lambda: dask.at_work("sst2-1-of-2.parquet") or flow.poll() is not None)
    victim = dask.at_work("sst2-1-of-2.parquet")
    assert victim is not None, torture.finish(flow)
    dask.kill(victim)
    torture.finish(flow)
    assert torture.state(far).files == torture.state(local).files

    # A run on this machine has nothing left to do.
    (far / "params.yaml").write_text((local / "params.yaml").read_text())
    assert "nothing had changed" in torture.finish(torture.flow(far))
