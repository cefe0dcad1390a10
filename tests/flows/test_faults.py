"""Faults that may pass are told apart from those that somebody has to mend."""

import sqlite3
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest
import requests
import torch

from flows.faults import PassingError, one_line, passes
from fmn.errors import UserError
from fmn.models import stages as models_stages
from tests.hub_server import Hub


def locked_database(folder: Path) -> BaseException:
    with sqlite3.connect(folder / "db") as first:
        first.execute("create table a (b)")
        first.execute("begin exclusive")
        second = sqlite3.connect(folder / "db", timeout=0)
        try:
            return raised(lambda: second.execute("select * from a"))
        finally:
            second.close()


def raised(call: Callable[[], object]) -> BaseException:
    with pytest.raises(Exception, match=r".") as caught:
        call()
    return caught.value


def mlflow_on(error: BaseException) -> BaseException:
    """As MLflow wraps what its database says, and `fmn.registry` what MLflow says."""
    from mlflow.exceptions import MlflowException
    from mlflow.protos.databricks_pb2 import TEMPORARILY_UNAVAILABLE

    def wrap() -> None:
        try:
            try:
                raise error
            except Exception as origin:
                raise MlflowException(str(origin), error_code=TEMPORARILY_UNAVAILABLE) from origin
        except MlflowException as origin:
            raise UserError("MLflow at sqlite:///x: it failed") from origin

    return raised(wrap)


def test_the_network_and_a_locked_database_may_pass(tmp_path: Path) -> None:
    assert passes(raised(lambda: httpx.get("http://127.0.0.1:9", timeout=5)))
    assert passes(raised(lambda: requests.get("http://127.0.0.1:9", timeout=5)))
    assert passes(ConnectionResetError("reset"))
    assert passes(TimeoutError("late"))
    locked = locked_database(tmp_path)
    assert passes(locked)
    assert passes(mlflow_on(locked))
    assert passes(mlflow_on(ConnectionError("gone")))


def test_a_server_that_is_overtaxed_may_recover_and_one_that_refuses_does_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fmn.store.hub.RETRY_SECONDS", 0)
    with Hub() as hub:
        hub.add("models", "org/name", {"config.json": b"{}"})
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        hub.misbehave("status", "org/name", times=1, status=503)
        assert passes(raised(lambda: models_stages.fetch("hf://org/name", out=tmp_path / "out")))
        assert not passes(
            raised(lambda: models_stages.fetch("hf://org/none", out=tmp_path / "out"))
        )
        hub.gated.add("org/name")
        assert not passes(
            raised(lambda: models_stages.fetch("hf://org/name", out=tmp_path / "out"))
        )
    with Hub() as gone:
        monkeypatch.setenv("HF_ENDPOINT", gone.url)
    assert passes(raised(lambda: models_stages.fetch("hf://org/name", out=tmp_path / "out")))


def test_mistakes_memory_and_our_own_faults_do_not_pass(tmp_path: Path) -> None:
    assert not passes(UserError("no such thing"))
    assert not passes(MemoryError())
    assert not passes(torch.OutOfMemoryError("CUDA out of memory"))
    assert not passes(KeyError("x"))
    no_table = raised(lambda: sqlite3.connect(":memory:").execute("select * from nothing"))
    assert not passes(no_table)
    assert not passes(mlflow_on(no_table)), "MLflow says that it may pass"


def test_an_error_is_one_line() -> None:
    assert one_line(PassingError("a\n  b")) == "a b"
    assert one_line(ValueError("a\nb")) == r"ValueError('a\nb')"


def test_a_file_that_was_taken_away_may_come_back(tmp_path: Path) -> None:
    error = raised((tmp_path / "away").read_bytes)
    assert passes(error)
    mistake = UserError("no such file")
    mistake.__cause__ = error
    assert not passes(mistake)
