"""A full disk, a missing permission, want of memory: each ends in one line, leaves nothing half-written, and passes."""

import os
import shutil
import sqlite3
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import safetensors.torch
import torch

from fmn import cli
from fmn.errors import UserError
from fmn.evaluate import stages as evaluate_stages
from fmn.evaluate.stages import EvaluateSettings
from fmn.experiments import stages as experiments_stages
from fmn.experiments.stages import SearchSettings
from fmn.fisher import stages as fisher_stages
from fmn.fisher.stages import FullFisherSettings, GramSettings
from fmn.merge import stages as merge_stages
from fmn.merge.stages import MergeSettings, RealignSettings
from fmn.models import stages as models_stages
from fmn.registry import stages as registry_stages
from fmn.registry import tracking as registry
from fmn.registry.stages import RegistrySettings
from fmn.report import stages as report_stages
from fmn.store import artifacts, machine
from fmn.store.stage import Outcome
from fmn.tasks import stages as tasks_stages
from fmn.tasks.stages import DataSettings
from tests.conftest import FISHER, ROOT, TASKS, TUNING

MB = 1_000_000


@pytest.fixture(scope="module")
def disk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A file system of its own, of 64 MB."""
    folder = tmp_path_factory.mktemp("disk")
    mount = ["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(folder)]
    if (
        not shutil.which("mount")
        or subprocess.run(mount, capture_output=True, check=False).returncode
    ):
        pytest.skip("no file system may be mounted here")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.fixture
def small(disk: Path) -> Iterator[Path]:
    """The file system, empty."""
    yield disk
    for path in disk.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()


@pytest.fixture(scope="module")
def work(tiny_work: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A work folder of its own."""
    return Path(shutil.copytree(tiny_work, tmp_path_factory.mktemp("whole") / "work"))


def made(work: Path, stage: str) -> Path:
    """What a stage makes where nothing is in its way."""
    make_needed(work, stage)
    return STAGES[stage](work, work / OUTPUTS[stage]).out


def make_needed(work: Path, stage: str) -> None:
    """Make what a stage reads."""
    for before in NEEDED.get(stage, ()):
        made(work, before)


def refused(call: Callable[[], object]) -> str:
    """What a person is told, in one line, of what cannot be done."""
    with pytest.raises(UserError) as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def leave(folder: Path, room: int) -> Path:
    """Fill a file system but for some bytes; returns what fills it."""
    ballast = folder / "ballast"
    with ballast.open("wb", buffering=0) as file:
        free = shutil.disk_usage(folder).free - room
        while free > 0:
            free -= file.write(bytes(min(free, 1 << 16)))
    return ballast


def experts(work: Path) -> dict[str, Path]:
    return {task: work / "experts" / task for task in TASKS}


def fisher_files(work: Path) -> dict[str, Path]:
    return {task: work / "fisher" / f"{task}.parquet" for task in TASKS}


STAGES: dict[str, Callable[[Path, Path], Outcome]] = {
    "fetch": lambda work, out: models_stages.fetch(str(work / "base"), out=out),
    "data": lambda work, out: tasks_stages.data(
        "mrpc", out=out, settings=DataSettings(source="embedded")
    ),
    "finetune": lambda work, out: models_stages.finetune(work / "base", task="sst2", data=work / "data", out=out, settings=TUNING),
    "fisher": lambda work, out: fisher_stages.fisher(
        work / "experts" / "sst2", task="sst2", data=work / "data", out=out, settings=FISHER
    ),
    "full-fisher": lambda work, out: fisher_stages.full_fisher(
        work / "experts" / "sst2", task="sst2", data=work / "data", out=out,
        settings=FullFisherSettings(samples=8, device="cpu"),
    ),
    "gram": lambda work, out: fisher_stages.gram(
        work / "experts" / "sst2", task="sst2", data=work / "data", out=out,
        settings=GramSettings(samples=8, device="cpu"),
    ),
    "merge": lambda work, out: merge_stages.merge(
        experts(work), fisher_files(work), work / "base", out, MergeSettings()
    ),
    "search": lambda work, out: experiments_stages.search(
        experts=experts(work), fisher=fisher_files(work), base=work / "base", data=work / "data",
        out=out, settings=SearchSettings(trials=2, rows=8, device="cpu"),
    ),
    "realign": lambda work, out: merge_stages.realign(
        work / "merged", experts(work), work / "data", out, RealignSettings(texts=16, device="cpu")
    ),
    "evaluate": lambda work, out: evaluate_stages.evaluate(work / "merged", data=work / "data", out=out, settings=EvaluateSettings(device="cpu", dtype="float32")),
    "report": lambda work, out: report_stages.write_report(
        {}, {"merged": work / "metrics.json"}, fisher_files(work), out, work
    ),
}  # fmt: skip
OUTPUTS = {
    "fetch": "again/base", "data": "again/data", "finetune": "again/sst2", "fisher": "again/sst2.parquet",
    "full-fisher": "again/sst2.safetensors", "gram": "again/sst2.gram.safetensors", "merge": "merged",
    "search": "coefficients.json", "realign": "realigned", "evaluate": "metrics.json", "report": "report",
}  # fmt: skip

NEEDED = {"realign": ["merge"], "evaluate": ["merge"], "report": ["evaluate"]}


def content(path: Path) -> Any:
    """But for the model card, which `evaluate` completes."""
    if path.is_file():
        return path.read_bytes()
    return {
        name: digest for name, digest in artifacts.digest_files(path).items() if name != "README.md"
    }


def size(path: Path) -> int:
    files = {
        file.stat().st_ino: file.stat().st_size
        for file in [path, *path.rglob("*")]
        if file.is_file()
    }
    return sum(files.values())


@pytest.fixture(autouse=True)
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'mlflow.db'}")
    monkeypatch.chdir(tmp_path)


# `make test` takes one that writes with safetensors, and one that writes with PyArrow.
FEW = ("finetune", "fisher")
ALL = [name if name in FEW else pytest.param(name, marks=pytest.mark.slow) for name in STAGES]


@pytest.mark.parametrize("stage", ALL)
def test_a_stage_on_a_full_disk_says_so_and_goes_on_when_there_is_room(
    stage: str, work: Path, small: Path
) -> None:
    whole = made(work, stage)
    out = small / "work" / whole.name
    for room in (0, size(whole) * 2 // 3):
        ballast = leave(small, room)
        told = refused(lambda: STAGES[stage](work, out))
        assert str(small) in told
        assert "no space left" in told
        assert "make room" in told
        assert not out.exists() or content(out) == content(whole), (
            "what is half-written has no name"
        )
        ballast.unlink()
    STAGES[stage](work, out)
    assert content(out) == content(whole)


def test_a_store_on_a_full_disk_says_so_and_registers_once_when_there_is_room(
    work: Path, small: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{small / 'mlflow.db'}")
    model, metrics = made(work, "merge"), made(work, "evaluate")

    def register() -> Outcome:
        return registry_stages.register(
            model,
            metrics=metrics,
            settings=RegistrySettings(name="demo"),
            out=small / "registered.json",
        )

    for room in (
        300_000,
        2_000_000,
    ):  # within the making of MLflow's tables, and within the model's files
        ballast = leave(small, room)
        told = refused(register)
        assert str(small) in told
        assert "no space left" in told
        ballast.unlink()
    assert register().summary.version == "1"
    client = mlflow.MlflowClient(registry.tracking_uri())
    assert len(client.search_runs([one.experiment_id for one in client.search_experiments()])) == 1


@pytest.mark.parametrize("stage", ["data", "evaluate"])
def test_a_read_only_disk_is_told(stage: str, work: Path, small: Path, tmp_path: Path) -> None:
    make_needed(work, stage)
    disk = tmp_path / "disk"
    disk.mkdir()
    subprocess.run(["mount", "--bind", str(small), str(disk)], check=True)
    try:
        subprocess.run(["mount", "-o", "remount,bind,ro", str(disk)], check=True)
        told = refused(lambda: STAGES[stage](work, disk / "work" / "out"))
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)
    assert str(disk) in told
    assert "the file system is read-only" in told


@pytest.fixture
def forbidden() -> Iterator[Path]:
    """A folder that this process may not write to."""
    folder = Path(tempfile.mkdtemp(prefix="fmn-forbidden-", dir="/tmp"))
    folder.chmod(0o555)
    root = os.geteuid() == 0
    if root:
        os.seteuid(65534)  # nobody
    try:
        yield folder
    finally:
        if root:
            os.seteuid(0)
        folder.chmod(0o755)
        shutil.rmtree(folder)


def test_a_folder_without_permission_is_told(
    forbidden: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir("/")
    told = refused(lambda: STAGES["data"](forbidden, forbidden / "work" / "mrpc"))
    assert str(forbidden / "work") in told
    assert "no permission" in told
    with pytest.raises(SystemExit) as ended:
        cli.main(["data", "mrpc", "--source", "embedded", "--out", str(forbidden / "mrpc")])
    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert str(forbidden) in line
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{forbidden / 'mlflow.db'}")
    assert "no permission" in refused(lambda: registry.pin("models:/demo@champion"))


ABSENT = "cuda:99"


@pytest.mark.parametrize(
    "stage", ["finetune", "fisher", "full-fisher", "gram", "realign", "evaluate"]
)
def test_a_gpu_that_is_not_there_is_told(
    stage: str, tiny_work: Path, work: Path, tmp_path: Path
) -> None:
    expert, folder, out = (
        tiny_work / "experts" / "sst2",
        tiny_work / "data",
        tmp_path / "out.safetensors",
    )
    if stage in ("realign", "evaluate"):
        made(work, "merge")
    calls: dict[str, Callable[[], Outcome]] = {
        "finetune": lambda: models_stages.finetune(
            tiny_work / "base",
            task="sst2",
            data=folder,
            out=out,
            settings=TUNING.model_copy(update={"device": ABSENT}),
        ),
        "fisher": lambda: fisher_stages.fisher(
            expert,
            task="sst2",
            data=folder,
            out=tmp_path / "out.parquet",
            settings=FISHER.model_copy(update={"device": ABSENT}),
        ),
        "full-fisher": lambda: fisher_stages.full_fisher(
            expert,
            task="sst2",
            data=folder,
            out=out,
            settings=FullFisherSettings(samples=8, device=ABSENT),
        ),
        "gram": lambda: fisher_stages.gram(
            expert,
            task="sst2",
            data=folder,
            out=out,
            settings=GramSettings(samples=8, device=ABSENT),
        ),
        "realign": lambda: merge_stages.realign(
            work / "merged",
            experts(work),
            folder,
            tmp_path / "realigned",
            RealignSettings(texts=16, device=ABSENT),
        ),
        "evaluate": lambda: evaluate_stages.evaluate(
            work / "merged",
            data=folder,
            out=tmp_path / "metrics.json",
            settings=EvaluateSettings(device=ABSENT),
        ),
    }
    told = refused(calls[stage])
    assert f"'{ABSENT}' is not here" in told
    assert "use cpu or auto" in told
    assert not [path for path in tmp_path.iterdir() if not path.name.startswith(".")]


# argv: base, data, output. In a process of its own, which has little mapped that it does not use.
GREEDY = """
import resource, sys
from pathlib import Path
from fmn.errors import UserError
from fmn.models.stages import finetune
from tests.conftest import TUNING
base, folder, out = map(Path, sys.argv[1:])
finetune(base, task="mrpc", data=folder, out=out.with_name("first"), settings=TUNING)
taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (taken + 200_000_000, resource.RLIM_INFINITY))
try:
    greedy = TUNING.model_copy(update={"batch_size": 100_000, "examples": "all"})
    finetune(base, task="mrpc", data=folder, out=out, settings=greedy)
except UserError as error:
    print(error)
"""


def test_want_of_memory_is_told_with_what_to_do(tiny_work: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", GREEDY, str(tiny_work / "base"), str(tiny_work / "data"), str(tmp_path / "out")],
        env={**os.environ, "OMP_NUM_THREADS": "1"}, cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    told = done.stdout.splitlines()
    assert len(told) == 1
    assert "memory does not suffice" in told[0]
    assert "batch_size" in told[0]
    assert not (tmp_path / "out").exists()


class Said(Exception):  # noqa: N818
    """An error of any library."""


def test_what_libraries_say_of_room_rights_and_memory_is_understood(small: Path) -> None:
    leave(small, 4096)
    values = np.random.default_rng(0).normal(size=100_000)
    with closing(sqlite3.connect(":memory:")) as store:
        store.execute("pragma max_page_count = 2")
        store.execute("create table a (b)")

        def fill() -> None:
            store.execute("insert into a values (zeroblob(100000))")

        writers: list[Callable[[], object]] = [
            lambda: safetensors.torch.save_file(
                {"w": torch.from_numpy(values)}, small / "a.safetensors"
            ),
            lambda: pq.write_table(pa.table({"w": values}), small / "a.parquet"),
            lambda: np.savez(small / "a.npz", w=values),
            lambda: (small / "a.json").write_text("x" * 100_000),
            fill,
        ]
        for write in writers:
            with pytest.raises(Exception, match=r".") as caught:
                write()
            told = machine.refusal(caught.value, small / "out")
            assert told is not None
            assert "no space left" in str(told)
    for take in (
        lambda: torch.empty(10**15),
        lambda: np.empty(10**15),
        lambda: pa.allocate_buffer(10**15),
    ):
        with pytest.raises((RuntimeError, MemoryError)) as caught:
            take()
        assert "the memory does not suffice" in str(machine.refusal(caught.value))
    for words in ("CUDA out of memory. Tried to allocate 2.00 GiB", "CUBLAS_STATUS_ALLOC_FAILED"):
        assert "the GPU's memory does not suffice" in str(
            machine.refusal(torch.OutOfMemoryError(words))
        )
    assert machine.refusal(Said("anything else")) is None
    assert machine.refusal(UserError("no permission")) is None
