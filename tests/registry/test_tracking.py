"""The MLflow store, SQLite or a real server: its faults, use by several at once, serving."""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import mlflow
import pandas as pd
import pytest
from mlflow.environment_variables import MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR

from flows.workers import is_transient
from fmn.errors import UserError
from fmn.models.stages import predict
from fmn.registry import stages as registry_stages
from fmn.registry import tracking
from fmn.registry.check import check_served
from fmn.registry.stages import RegistrySettings
from tests.conftest import Load
from tests.kinds import TASKS as KINDS
from tests.kinds import merged_model
from tests.mlflow_proxy import proxy
from tests.registry.conftest import Merged, Register

if TYPE_CHECKING:
    from fastapi.testclient import TestClient

pytestmark = pytest.mark.usefixtures("store")


@pytest.mark.parametrize("bucket", [None, "bucket"])
def test_files_lie_beside_a_local_store_or_where_a_variable_says(
    bucket: str | None,
    register: Register,
    client: mlflow.MlflowClient,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if bucket:
        monkeypatch.setenv("MLFLOW_DEFAULT_ARTIFACT_ROOT", Path(bucket).resolve().as_uri())
    settings = {"experiment": f"../other {bucket}"}
    run = client.get_run(register(f"files-{bucket}", settings=settings).summary.run)
    folder = Path(bucket or "mlruns").resolve() / f"--other-{bucket}"
    assert run.info.artifact_uri.startswith(folder.as_uri())
    assert folder.is_dir()


@pytest.mark.filterwarnings("ignore::UserWarning:mlflow")
@pytest.mark.parametrize("names", [["mood", "ner", "similar"], ["flowers"], ["chat"]])
def test_every_kind_passes_the_signature_of_a_logged_model(
    names: list[str], tmp_path: Path
) -> None:
    tasks = {name: KINDS[name] for name in names}
    if len(tasks) == 1:
        tasks["other"] = KINDS[names[0]].model_copy(update={"name": "other"})
    model, no_metrics = merged_model(tmp_path, tasks), cast("Any", None)
    with tracking.connection() as client:
        with tracking.new_run(client, "kinds", names[0], names[0]):
            logged = tracking.log_served_model(model, tasks)
        served = tracking.load_served_model(logged.model_uri)
    check_served(served, model, tmp_path / "none.json", no_metrics, tasks, None)
    if "ner" in tasks:
        table = pd.DataFrame({"text": ["w1 v2"], "text_pair": [None]})
        answers = served(table, "*")
        assert {"label", "labels", "spans", "embedding"} <= {*answers.columns}


def test_a_version_can_be_fetched_by_alias_and_is_pinned(
    register: Register, tmp_path: Path
) -> None:
    version = f"models:/demo/{register().summary.version}"
    for floating in ("models:/demo@champion", "models:/demo/latest", "models:/demo/Latest"):
        assert tracking.pin(floating) == version
    assert tracking.pin(version) == version
    with pytest.raises(UserError, match="no such version of demo"):
        tracking.pin("models:/demo/Production")
    assert tracking.download("models:/demo@champion", tmp_path / "out") == version
    assert list((tmp_path / "out").rglob("model.safetensors"))
    with pytest.raises(UserError, match="none"):
        tracking.pin("models:/none@champion")
    with pytest.raises(UserError, match="MLflow at sqlite"):
        tracking.download("models:/none/1", Path("out"))


@pytest.mark.parametrize("fault", [500, 503, "cut", "slow"])
def test_a_server_that_fails_is_asked_again_and_then_told_in_one_line(
    fault: int | str, register: Register, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR", "0")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    with proxy() as server:
        server.always = fault
        monkeypatch.setenv("MLFLOW_TRACKING_URI", server.url.replace("//", "//someone:hidden@"))
        with pytest.raises(UserError) as refusal:
            register()
        # MLflow does not retry an answer that was cut off.
        assert server.requests == (1 if fault == "cut" else 3)
    with pytest.raises(UserError) as absence:  # nobody listens there any more
        register()
    problem = f"MLflow at {server.url}: the server does not answer as it should ("
    for error in (refusal.value, absence.value):
        assert str(error).startswith(problem), "without the password"
        assert "run again to go on from here" in str(error)
        assert "\n" not in str(error)
        assert is_transient(error), "a flow tries it again"


def test_the_patience_with_a_server_is_bounded() -> None:
    retries = int(os.environ["MLFLOW_HTTP_REQUEST_MAX_RETRIES"])
    timeout = int(os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"])
    backoff = sum(MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR.default * 2**n for n in range(1, retries))
    assert (1 + retries) * timeout + backoff <= 180, "docs/reliability.md says so"


@pytest.mark.slow
def test_a_server_that_recovers_gets_the_version_once(
    register: Register, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR", "0")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
    store = ["--backend-store-uri", "sqlite:///server.db", "--artifacts-destination", "artifacts"]
    with (
        serving("server", *store, path="/health") as address,
        proxy(int(address.rpartition(":")[2])) as server,
    ):
        monkeypatch.setenv("MLFLOW_TRACKING_URI", server.url)
        # At once, within the run, and within the model's files.
        for calm, faults in ((0, [500] * 20), (0, ["cut"]), (15, ["cut"]), (30, [503] * 20)):
            server.faults = [*[""] * calm, *faults]
            with pytest.raises(UserError, match="does not answer as it should"):
                register("unsteady")
        server.faults = [500, "", 503, 502, "", "", 500]
        assert register("unsteady").summary.version == "1"
        assert not server.faults
        client = mlflow.MlflowClient(server.url)
        assert len(client.search_model_versions("name = 'unsteady'")) == 1
        runs = client.search_runs([it.experiment_id for it in client.search_experiments()])
        assert [run.info.status for run in runs] == ["FINISHED"]


def test_the_page_of_the_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    assert tracking.page(5001) == "http://127.0.0.1:5001/#/models"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "https://mlflow.example/")
    assert tracking.page(5001) == "https://mlflow.example/#/models"


TOGETHER = """
import multiprocessing, os, sys, tempfile
from pathlib import Path
import torch, transformers  # once, before the fork
from fmn.registry import register, tracking
from fmn.registry.stages import RegistrySettings

model, metrics, names = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:]
context = multiprocessing.get_context("fork")
start = context.Barrier(len(names))

def run(name):
    os.chdir(tempfile.mkdtemp())
    start.wait()
    outcome = register(model, metrics=metrics, settings=RegistrySettings(name=name))
    print(outcome.summary.name, outcome.summary.version, outcome.computed, flush=True)

processes = [context.Process(target=run, args=(name,)) for name in names]
for process in processes: process.start()
for process in processes: process.join()
sys.exit(max(process.exitcode for process in processes))
"""


def together(merged: Merged, store: str, names: list[str], folder: Path) -> list[str]:
    """What registrations print that start at once, each in a process and a folder of its own."""
    variables = {"MLFLOW_TRACKING_URI": store, "OMP_NUM_THREADS": "1", "TMPDIR": str(folder)}
    process = subprocess.run(
        [sys.executable, "-c", TOGETHER, *map(str, merged), *names],
        env={**os.environ, **variables}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert process.returncode == 0, process.stderr
    return sorted(process.stdout.splitlines())


def test_the_same_content_is_registered_once_by_two_at_once(register: Register) -> None:
    with ThreadPoolExecutor(2) as threads:
        first, second = threads.map(register, ["same", "same"])
    assert sorted([first.computed, second.computed]) == [False, True]
    assert first.summary == second.summary


@pytest.mark.slow
def test_ten_register_at_once_in_a_new_store(merged: Merged, tmp_path: Path) -> None:
    names = [f"model-{number}" for number in range(10)]
    lines = together(merged, f"sqlite:///{tmp_path / 'mlflow.db'}", [*names, names[0]], tmp_path)
    assert lines == sorted([*(f"{name} 1 True" for name in names), f"{names[0]} 1 False"])


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


@contextmanager
def serving(*command: str, path: str, **environment: str) -> Iterator[str]:
    """The address of `mlflow COMMAND` on loopback, as soon as `path` answers."""
    address = f"http://127.0.0.1:{(port := _free_port())}"
    environment = {
        **os.environ,
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
        "OMP_NUM_THREADS": "1",
        **environment,
    }
    options = ("--host", "127.0.0.1", "--port", str(port), "--workers", "1")
    arguments = [sys.executable, "-m", "mlflow", *command, *options]
    server = subprocess.Popen(
        arguments, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        for _ in range(300):
            assert server.poll() is None, "the server ended"
            try:
                with urllib.request.urlopen(f"{address}/{path}", timeout=5):  # noqa: S310
                    break
            except OSError:
                time.sleep(0.5)
        yield address
    finally:
        server.terminate()
        server.wait()


@pytest.mark.slow
def test_a_tracking_server_takes_ten_registrations_at_once(
    merged: Merged, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    database = ("--backend-store-uri", f"sqlite:///{tmp_path / 'mlflow.db'}")
    files = ("--artifacts-destination", str(tmp_path / "files"))
    with serving("server", *database, *files, path="health") as address:
        names = [f"model-{number}" for number in range(9)]
        lines = together(merged, address, [*names, names[0]], tmp_path)
        assert lines == sorted([*(f"{name} 1 True" for name in names), f"{names[0]} 1 False"])
        monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
        assert tracking.pin(f"models:/{names[3]}@champion") == f"models:/{names[3]}/1"
        tracking.download(f"models:/{names[3]}/1", tmp_path / "fetched")
    assert list((tmp_path / "fetched").rglob("model.safetensors"))
    assert list((tmp_path / "files").rglob("model.safetensors"))


FILM, PAIR = "a warm film", ["a warm film", "a cold film"]
COLUMNS = {"text": PAIR[:1], "text_pair": PAIR[1:]}
MRPC, SST2 = {"params": {"task": "mrpc"}}, {"params": {"task": "sst2"}}


@pytest.fixture(scope="module")
def scoring(store: str, merged: Merged) -> "TestClient":
    """MLflow's scoring server of a registered version."""
    settings = RegistrySettings(name="scored")
    version = registry_stages.register(merged.model, metrics=merged.metrics, settings=settings)
    # MLflow warns when this part of it is imported; registration keeps such warnings to itself.
    from fastapi.testclient import TestClient
    from mlflow.pyfunc.scoring_server import init

    model = mlflow.pyfunc.load_model(f"models:/scored/{version.summary.version}")
    return TestClient(init(model))


def invoke(scoring: "TestClient", content: dict[str, Any]) -> Any:
    """Status and content of the answer."""
    headers = {"Content-Type": "application/json"}
    answer = scoring.post("/invocations", content=json.dumps(content), headers=headers)
    return answer.status_code, answer.json()


@pytest.mark.parametrize(
    ("content", "texts"),
    [
        ({"dataframe_records": [{"text": FILM}, {"text": "dull"}], **SST2}, 2),
        ({"dataframe_records": [{"text": FILM, "text_pair": None}], **SST2}, 1),
        ({"dataframe_records": [{"text": FILM, "task": "sst2"}]}, 1),
        ({"dataframe_split": {"columns": ["text"], "data": [[FILM]], "index": [7]}, **SST2}, 1),
        ({"inputs": {"text": [FILM, "dull"]}, **SST2}, 2),
        ({"inputs": {"text": FILM}, **SST2}, 1),
        ({"inputs": [{"text": FILM}, {"text": "dull"}], **SST2}, 2),
        ({"instances": [{"text": FILM}, {"text": "dull"}], **SST2}, 2),
        ({"inputs": [{"text": FILM}, {"text": PAIR}], "params": {"task": "*"}}, 3),
        ({"dataframe_records": [{"text": PAIR}], **MRPC}, 1),
        ({"dataframe_records": [{"text": PAIR[0], "text_pair": PAIR[1]}], **MRPC}, 1),
        ({"dataframe_split": {"columns": ["text", "text_pair"], "data": [PAIR]}, **MRPC}, 1),
        ({"inputs": {"text": PAIR}, **MRPC}, 1),
        ({"inputs": {"text": [PAIR, PAIR]}, **MRPC}, 2),
        ({"inputs": COLUMNS, **MRPC}, 1),
        ({"instances": [{"text": PAIR}, {"text": PAIR}], **MRPC}, 2),
        ({"dataframe_split": {"columns": ["text"], "data": []}, **SST2}, 0),
    ],
)
def test_every_form_of_a_request_is_understood(
    content: dict[str, Any], texts: int, scoring: "TestClient", merged: Merged
) -> None:
    status, answer = invoke(scoring, content)
    assert (status, len(answer["predictions"])) == (200, texts), answer
    if texts:
        is_pair = content.get("params") == MRPC["params"]
        task, texts_of_task = ("mrpc", PAIR) if is_pair else ("sst2", [FILM])
        expected: Any = predict(merged.model, *texts_of_task, task=task)
        assert answer["predictions"][0]["label"] == expected.label
        shares = answer["predictions"][0]["probabilities"]
        assert shares == pytest.approx(expected.probabilities, abs=1e-5)


@pytest.mark.parametrize("text", [None, 1, 1.5, True, {"a": 1}, [], [None], [1, 2], ["a"] * 3])
@pytest.mark.parametrize("form", ["records", "split", "inputs", "instances"])
def test_what_is_not_a_text_is_a_bad_request(form: str, text: Any, scoring: "TestClient") -> None:
    contents: dict[str, Any] = {
        "records": {"dataframe_records": [{"text": "fine"}, {"text": text}]},
        "split": {"dataframe_split": {"columns": ["text"], "data": [["fine"], [text]]}},
        "inputs": {"inputs": {"text": ["fine", text]}},
        "instances": {"instances": [{"text": text}, {"text": text}]},
    }
    status, answer = invoke(scoring, {**contents[form], **SST2})
    assert (status, "stack_trace" in answer) == (400, False), answer
    if form != "instances":
        assert re.search("row 1: (text is|holds) ", answer["message"])


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ({"dataframe_records": [{"text": "a"}]}, "task '' is not one of mrpc, sst2, stsb"),
        ({"dataframe_records": [{"txt": "a"}], **SST2}, "missing inputs ['text']"),
        ({"dataframe_records": [{"text": "\ud800"}], **SST2}, "surrogates not allowed"),
    ],
)
def test_a_mistake_is_a_bad_request(
    content: dict[str, Any], problem: str, scoring: "TestClient"
) -> None:
    status, answer = invoke(scoring, content)
    assert (status, "stack_trace" in answer) == (400, False), answer
    assert problem in answer["message"]


def test_a_table_in_parquet_is_answered(scoring: "TestClient") -> None:
    content = pd.DataFrame({"text": [[FILM], PAIR], "task": ["sst2", "*"]}).to_parquet()
    headers = {"Content-Type": "application/vnd.apache.parquet"}
    answer = scoring.post("/invocations", content=content, headers=headers).json()["predictions"]
    tasks = [(row["row"], row["task"]) for row in answer]
    assert tasks == [(0, "sst2"), (1, "mrpc"), (1, "stsb")]


def test_a_request_that_would_outlast_the_server_is_refused_and_a_batch_is_not(
    scoring: "TestClient", monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [{"text": f"{FILM} {n}"} for n in range(10_000)]
    content = {"dataframe_records": rows, **SST2}
    monkeypatch.setenv("__pyfunc_model_path__", "models:/scored/1")
    monkeypatch.setenv("MLFLOW_SCORING_SERVER_REQUEST_TIMEOUT", "0.05")
    status, answer = invoke(scoring, content)
    assert (status, "stack_trace" in answer) == (400, False), answer
    for words in (
        r"10000 rows would take about \d+ s, and the server ends a request after 0.05 s",
        r"send at most \d+ rows at once",
        "`mlflow models predict -m models:/NAME/VERSION",
    ):
        assert re.search(words, answer["message"]), answer["message"]
    assert invoke(scoring, {"dataframe_records": rows[:20], **SST2})[0] == 200
    monkeypatch.delenv("__pyfunc_model_path__")
    status, answer = invoke(scoring, content)
    assert (status, len(answer["predictions"])) == (200, 10_000)


@pytest.mark.parametrize("is_copy", [False, True])
def test_a_registry_that_was_moved_finds_its_files(
    is_copy: bool, merged: Merged, shared: Load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old, new = tmp_path / "old place", tmp_path / "new"
    old.mkdir()
    monkeypatch.chdir(old)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{old / 'mlflow.db'}")
    settings = RegistrySettings(name="moving")
    run = registry_stages.register(merged.model, metrics=merged.metrics, settings=settings)
    shutil.copytree(old, new)
    if is_copy:  # the copy has files of its own
        shutil.rmtree(next((old / "mlruns").iterdir()))
    else:
        shutil.rmtree(old)
    monkeypatch.chdir(new)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{new / 'mlflow.db'}")
    assert tracking.pin("models:/moving/latest") == "models:/moving/1"  # any command of fmn's
    serve = shared("models:/moving/1", tracking.tracking_uri())  # plain MLflow, without fmn
    assert serve(pd.DataFrame({"text": ["good"]}), "sst2").label[0] in ("negative", "positive")
    assert registry_stages.read_lineage("models:/moving@champion").lineage.parts
    again = registry_stages.register(merged.model, metrics=merged.metrics, settings=settings)
    assert (again.computed, again.summary.run) == (False, run.summary.run)


def test_the_latest_version_is_a_floating_name(register: Register, merged: Merged) -> None:
    register("floating")
    assert tracking.pin("models:/floating/latest") == "models:/floating/1"
    assert tracking.pin("models:/floating/7") == "models:/floating/7"
    with pytest.raises(UserError, match="nobody"):
        tracking.pin("models:/nobody/latest")


@pytest.mark.slow
def test_a_version_is_served_to_curl(register: Register, merged: Merged, store: str) -> None:
    register()
    command = ("models", "serve", "-m", "models:/demo@champion", "--env-manager", "local")
    content = {"dataframe_records": [{"text": FILM}], **SST2}
    with serving(*command, path="ping", MLFLOW_TRACKING_URI=store) as address:
        request = urllib.request.Request(  # noqa: S310
            f"{address}/invocations",
            json.dumps(content).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=60) as response:  # noqa: S310
            (answer,) = json.load(response)["predictions"]
    expected: Any = predict(merged.model, FILM, task="sst2")
    assert answer["label"] == expected.label
    assert answer["score"] == pytest.approx(expected.score, abs=1e-5)
