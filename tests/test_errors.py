"""Errors that the user can fix: one line without secrets, also for what the system lacks."""

import errno
import pickle
import shutil
import sqlite3
from collections.abc import Callable
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import safetensors.torch
import torch

from flows.workers import TransientError
from fmn.errors import UserError, causes, hint, redacted, system_error, system_errors_explained


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("MLflow at http://me:pass@word@host:5000/x: gone", "MLflow at http://host:5000/x: gone"),
        ("postgresql://me:p%40ss@db/mlflow", "postgresql://db/mlflow"),
        ("hf://me:hf_1@org/name: not a source", "hf://org/name: not a source"),
        (
            "http://h/f?X-Amz-Signature=a&b=1&token=t",
            "http://h/f?X-Amz-Signature=***&b=1&token=***",
        ),
        ("hf://name@main and hf://org/name@v1: no such", None),
        ("models:/name@champion, sqlite:////a@b/mlflow.db", None),
        ("somebody@example.org at https://example.org/@x", None),
    ],
)
def test_secrets_in_addresses_are_removed(text: str, expected: str | None) -> None:
    assert redacted(text) == (expected or text)


def test_secrets_of_the_environment_are_removed(monkeypatch: pytest.MonkeyPatch) -> None:
    secrets = {
        "HF_TOKEN": "hf_abcdef",
        "MLFLOW_TRACKING_PASSWORD": "correct horse",
        "AWS_SECRET_ACCESS_KEY": "wJalrXUtnFEMI/K7MDENG",
        "FMN_WEBHOOK": "https://hooks.example/services/T0/B0/X",
        "PREFECT_API_KEY": "pnu_123456",
    }
    public = {
        "TOKENIZERS_PARALLELISM": "false-and-long",
        "AWS_WEB_IDENTITY_TOKEN_FILE": "/run/secret/token",
        "X_TOKEN": "1",
    }
    for name, value in (secrets | public).items():
        monkeypatch.setenv(name, value)
    error = TransientError(f"{' '.join(secrets.values())}; {' '.join(public.values())}")
    assert not [value for value in secrets.values() if value in str(error)]
    assert all(value in str(error) for value in public.values())
    copy = pickle.loads(pickle.dumps(error))  # noqa: S301
    assert (type(copy), str(copy)) == (TransientError, str(error)), "it travels between processes"


def test_a_hint_names_the_nearest_name() -> None:
    assert hint("mprc", ["mrpc", "sst2"]) == "; did you mean 'mrpc'?"
    assert hint("nothing", ["mrpc", "sst2"]) == ""


def raised(call: Callable[[], object]) -> Exception:
    """The exception that a call raises."""
    try:
        call()
    except Exception as error:
        return error
    raise AssertionError("nothing was raised")


VALUES = np.random.default_rng(0).normal(size=100_000)
WRITERS: dict[str, Callable[[Path], Any]] = {
    "safetensors": lambda path: safetensors.torch.save_file({"w": torch.from_numpy(VALUES)}, path),
    "parquet": lambda path: pq.write_table(pa.table({"w": VALUES}), path),
    "torch": lambda path: torch.save({"w": torch.from_numpy(VALUES)}, path),
    "numpy": lambda path: np.savez(path, w=VALUES),
    "text": lambda path: path.write_text("x" * 100_000),
    "copy": lambda path: shutil.copyfile("/dev/urandom", path),
}


@pytest.mark.parametrize("writer", WRITERS)
def test_a_full_disk_is_recognised_behind_every_library(writer: str, full_disk: Path) -> None:
    error = raised(lambda: WRITERS[writer](full_disk / "file"))
    message = str(system_error(error, full_disk / "out"))
    assert message.startswith(f"{full_disk}/out: no space left on the disk of {full_disk} (")
    assert "make room there" in message


def fill_a_database() -> None:
    with closing(sqlite3.connect(":memory:")) as store:
        store.execute("pragma max_page_count = 2")
        store.execute("create table a (b)")
        store.execute("insert into a values (zeroblob(100000))")


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (raised(fill_a_database), "out: no space left on the disk of "),
        (raised(lambda: torch.empty(10**15)), "out: the memory does not suffice; free some, or"),
        (raised(lambda: np.empty(10**15)), "out: the memory does not suffice; free some, or"),
        (raised(lambda: pa.allocate_buffer(10**15)), "out: the memory does not suffice; free some"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried"), "the GPU's memory does not suffice"),
        (RuntimeError("CUBLAS_STATUS_ALLOC_FAILED"), "the GPU's memory does not suffice"),
        (BrokenProcessPool(), "out: a process was killed, perhaps for lack of memory"),
        (OSError(errno.EROFS, "", "/a/b"), "/a/b: the file system is read-only; give this user"),
        (PermissionError(errno.EACCES, "", "/a", None, "/b"), "/b: no permission; give this user"),
        (sqlite3.OperationalError("attempt to write a readonly database"), "out: no permission"),
    ],
)
def test_what_the_system_lacks_is_recognised(error: Exception, message: str) -> None:
    assert message in str(system_error(error, Path("out")))


def test_other_errors_are_not_explained() -> None:
    for error in (ValueError("x"), FileNotFoundError(errno.ENOENT, "", "x"), UserError("no space")):
        assert system_error(error) is None
    with pytest.raises(ValueError, match="x"), system_errors_explained():
        raise ValueError("x")


def test_the_error_behind_an_error_counts() -> None:
    def fail(is_hidden: bool) -> None:
        try:
            raise OSError(errno.ENOSPC, "")
        except OSError as error:
            raise UserError("a.json: not JSON") from (None if is_hidden else error)

    assert [type(cause) for cause in causes(raised(lambda: fail(False)))] == [UserError, OSError]
    with pytest.raises(UserError, match="no space left"), system_errors_explained():
        fail(is_hidden=False)
    with pytest.raises(UserError, match=r"a\.json: not JSON"), system_errors_explained():
        fail(is_hidden=True)
