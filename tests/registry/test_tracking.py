"""The MLflow store, SQLite or a real server: its faults, use by several at once, serving."""

import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import mlflow
import pandas as pd
import pytest
from mlflow.environment_variables import MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR

from flows.workers import is_transient
from fmn.errors import UserError
from fmn.models import stages as models_stages
from fmn.registry import tracking
from tests.mlflow_proxy import proxy
from tests.registry.conftest import Merged, Register

pytestmark = pytest.mark.usefixtures("store")


<<<<<<< HEAD
def predict(merged: Merged, task: str, text: str, text_pair: str | None = None) -> Any:
    return models_stages.predict(merged.model, task, text, text_pair)
=======
@pytest.fixture(scope="module")
def merged(tiny_work: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A merged model beside its metrics."""
    folder = tmp_path_factory.mktemp("merged")
    experts = {task: tiny_work / "experts" / task for task in TASKS}
    fisher = {task: tiny_work / "fisher" / f"{task}.parquet" for task in TASKS}
    merge_stages.merge(
        experts=experts, fisher=fisher, out=folder / "merged", settings=MergeSettings()
    )
    evaluate_stages.evaluate(
        folder / "merged",
        [],
        tiny_work / "data",
        folder / "metrics.json",
        EvaluateSettings(device="cpu"),
    )
    return folder


@pytest.fixture(scope="module", autouse=True)
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("store")
    patch = pytest.MonkeyPatch()
    patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{folder / 'mlflow.db'}")
    patch.chdir(folder)
    yield registry.tracking_uri()
    patch.undo()


@pytest.fixture
def client(store: str) -> mlflow.MlflowClient:
    return mlflow.MlflowClient(store)


def register(
    merged: Path, name: str = "demo", metrics: Path | None = None, **settings: Any
) -> Outcome:
    return registry_stages.register(
        merged / "merged",
        metrics or merged / "metrics.json",
        None,
        None,
        RegistrySettings(name=name, **settings),
    )


def scored(merged: Path, out: Path, scores: Mapping[str, float], split: str | None = None) -> Path:
    """The metrics with other scores of tasks, or of other data, by its digest."""
    content = artifacts.read_json(merged / "metrics.json")
    for task, score in scores.items():
        content["tasks"][task]["score"] = score
    content["score"] = sum(entry["score"] for entry in content["tasks"].values()) / len(
        content["tasks"]
    )
    if split:
        content["data"]["sst2"]["splits"]["validation"] = split
    artifacts.write_json(out, "evaluate", "changed", content)
    return out


def described(client: mlflow.MlflowClient, outcome: Outcome) -> ModelVersion:
    return client.get_model_version(outcome.summary["name"], outcome.summary["version"])


def test_a_model_is_registered_once_with_its_metrics(
    merged: Path, client: mlflow.MlflowClient, store: str
) -> None:
    first, second = register(merged), register(merged)
    assert (first.computed, second.computed) == (True, False)
    assert first.summary == second.summary
    assert first.summary["store"] == store
    run = client.get_run(first.summary["run"])
    metrics = json.loads((merged / "metrics.json").read_text())
    assert run.data.metrics["mrpc.f1"] == metrics["tasks"]["mrpc"]["f1"]
    assert run.data.metrics["score"] == metrics["score"]
    low, high = metrics["tasks"]["mrpc"]["interval"]["f1"]
    assert (run.data.metrics["mrpc.f1.low"], run.data.metrics["mrpc.f1.high"]) == (low, high)
    assert (
        run.data.metrics["score.low"] <= run.data.metrics["score"] <= run.data.metrics["score.high"]
    )
    assert run.data.params["method"] == "mask-fisher"
    assert run.data.params["coefficient.sst2"] == "1.0"


def test_another_tolerance_makes_no_other_version(merged: Path) -> None:
    first, second = register(merged), register(merged, tolerance=0.5)
    assert (second.computed, second.summary) == (False, first.summary)


def test_run_and_version_say_what_the_model_was_made_from(
    merged: Path, client: mlflow.MlflowClient, tiny_work: Path
) -> None:
    outcome = register(merged)
    run, version = client.get_run(outcome.summary["run"]), described(client, outcome)
    recipe = json.loads((merged / "merged" / "merge.json").read_text())
    assert run.data.tags["expert.mrpc"] == recipe["experts"]["mrpc"]["revision"]
    assert run.data.tags["fisher.mrpc"] == artifacts.digest_file(
        tiny_work / "fisher" / "mrpc.parquet"
    )
    assert run.data.tags["tasks"] == version.tags["tasks"] == "mrpc, sst2, stsb"
    assert version.tags["score"] == f"{100 * run.data.metrics['score']:.2f} %"
    assert run.inputs is not None
    inputs = {
        (one.dataset.name, one.tags[0].value): one.dataset for one in run.inputs.dataset_inputs
    }
    assert set(inputs) == {
        (task, context) for task in TASKS for context in ("training", "validation")
    }
    for context, split in (("training", "train"), ("validation", "validation")):
        digest = data.digests(tiny_work / "data", tasks.task("sst2"), [split])[split]
        assert digest.startswith(inputs["sst2", context].digest)
    assert json.loads(str(inputs["sst2", "validation"].source)) == {
        "source": "embedded",
        "seed": "0",
        "split": "validation",
    }
    assert json.loads(str(inputs["sst2", "validation"].profile)) == {"num_rows": 500}


def test_the_versions_page_shows_the_card_without_front_matter(
    merged: Path, client: mlflow.MlflowClient
) -> None:
    description = str(described(client, register(merged)).description)
    assert description.startswith("Registered as champion: the first version\n\n# mrpc, sst2, stsb")
    assert "f1" in description
    assert "---\n" not in description.splitlines()


def test_the_report_is_kept_with_the_run(
    merged: Path, client: mlflow.MlflowClient, tmp_path: Path
) -> None:
    report = tmp_path / "report"
    report_stages.write_report({}, {"merged": merged / "metrics.json"}, {}, report)
    settings = RegistrySettings(name="reported")
    outcome = registry_stages.register(
        merged / "merged", merged / "metrics.json", report, None, settings
    )
    kept = {one.path for one in client.list_artifacts(outcome.summary["run"], "report")}
    assert {"report/table.md", "report/report.html", "report/pictures"} <= kept
    assert not [path for path in kept if "fmn.json" in path]


def test_the_champion_moves_to_a_version_that_is_as_good_and_the_reason_is_told(
    merged: Path, client: mlflow.MlflowClient, tmp_path: Path
) -> None:
    def aliases() -> dict[str, str]:
        return {
            alias: str(version)
            for alias, version in client.get_registered_model("rising").aliases.items()
        }

    levels = {"mrpc": 0.7, "sst2": 0.8, "stsb": 0.6}
    first = register(merged, "rising", scored(merged, tmp_path / "1.json", levels))
    assert (first.summary["alias"], first.summary["reason"]) == ("champion", "the first version")
    worse = register(merged, "rising", scored(merged, tmp_path / "2.json", levels | {"sst2": 0.7}))
    assert worse.summary["alias"] == "challenger"
    assert aliases() == {"champion": "1", "challenger": "2"}
    uneven = register(
        merged, "rising", scored(merged, tmp_path / "3.json", levels | {"sst2": 0.7, "mrpc": 0.9})
    )
    assert "sst2 scores 10.00 less, tolerance 1.00" in uneven.summary["reason"]
    assert aliases() == {"champion": "1", "challenger": "3"}
    better = register(
        merged, "rising", scored(merged, tmp_path / "4.json", levels | {"mrpc": 0.75})
    )
    assert better.summary["alias"] == "champion"
    assert aliases() == {"champion": "4"}, "no version is the challenger of one that won"
    elsewhere = scored(merged, tmp_path / "5.json", dict.fromkeys(TASKS, 1.0), split="f" * 64)
    other = register(merged, "rising", elsewhere)
    assert other.summary["reason"] == "not comparable: version 4 was evaluated on other data"
    assert aliases() == {"champion": "4", "challenger": "5"}
    for outcome in (first, worse, better, other):
        said = f"{outcome.summary['alias']}: {outcome.summary['reason']}"
        assert described(client, outcome).tags["promotion"] == said
        assert client.get_run(outcome.summary["run"]).data.tags["mlflow.note.content"] == said
    again = register(merged, "rising", tmp_path / "2.json")
    assert (again.computed, again.summary) == (False, worse.summary), (
        "what was decided is not decided again"
    )


def test_the_champion_is_rolled_back_to_the_one_before(
    merged: Path, client: mlflow.MlflowClient, tmp_path: Path
) -> None:
    for version in range(3):
        register(
            merged,
            "falling",
            scored(merged, tmp_path / f"{version}.json", {"mrpc": 0.7 + version / 10}),
        )
    assert registry_stages.roll_back("falling", None) == {
        "name": "falling",
        "before": "3",
        "champion": "2",
    }
    assert registry_stages.roll_back("falling", None)["champion"] == "1"
    with pytest.raises(
        UserError, match="falling: no version was the champion before; say which is to be: --to"
    ):
        registry_stages.roll_back("falling", None)
    assert registry_stages.roll_back("falling", "3") == {
        "name": "falling",
        "before": "1",
        "champion": "3",
    }
    model = client.get_registered_model("falling")
    assert {alias: str(version) for alias, version in model.aliases.items()} == {"champion": "3"}
    events = [event.rsplit(" ", 1)[0] for event in model.tags["champion.history"].split("; ")]
    assert events == [
        "1 promoted",
        "2 promoted",
        "3 promoted",
        "2 restored",
        "1 restored",
        "3 restored",
    ]
    with pytest.raises(UserError, match="falling: has no version 7; it has 1, 2, 3"):
        registry_stages.roll_back("falling", "7")
    with pytest.raises(UserError, match="falling: version 3 is the champion"):
        registry_stages.roll_back("falling", "3")
    with pytest.raises(UserError, match="nothing"):
        registry_stages.roll_back("nothing", None)


def test_what_a_killed_registration_left_is_cleared_away_and_an_undecided_version_is_decided(
    merged: Path, client: mlflow.MlflowClient
) -> None:
    first = register(merged, "killed")
    key = described(client, first).tags["fmn.key"]
    # As if killed after the version was made and before it was decided on.
    client.delete_model_version_tag("killed", "1", "promotion")
    client.delete_registered_model_alias("killed", "champion")
    again = register(merged, "killed")
    assert (again.summary, again.computed) == (first.summary, True)
    assert str(client.get_model_version_by_alias("killed", "champion").version) == "1"
    # As if killed before there was a version.
    client.delete_registered_model("killed")
    register(merged, "killed")
    experiment = client.get_experiment_by_name("fmn")
    assert experiment is not None
    runs = client.search_runs([experiment.experiment_id], f"tags.`fmn.key` = '{key}'")
    assert [run.info.status for run in runs] == ["FINISHED"]
>>>>>>> room-merge


def test_the_files_of_a_local_store_lie_beside_it(
    register: Register, client: mlflow.MlflowClient, store: str
) -> None:
    uri = client.get_run(register().summary.run).info.artifact_uri
    folder = Path(store.removeprefix("sqlite:///")).parent
    assert uri.startswith((folder / "mlruns" / "fmn").as_uri())


def test_where_files_go_can_be_said_for_a_database(
    register: Register,
    client: mlflow.MlflowClient,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("MLFLOW_DEFAULT_ARTIFACT_ROOT", (tmp_path / "bucket").as_uri())
    registered = register("elsewhere", settings={"experiment": "../other place"}).summary
    run = client.get_run(registered.run)
    assert run.info.artifact_uri.startswith((tmp_path / "bucket" / "--other-place").as_uri())
    assert (tmp_path / "bucket").is_dir()


def test_the_served_model_answers_as_the_merged_one_does(
    register: Register, merged: Merged
) -> None:
    model = mlflow.pyfunc.load_model(f"models:/demo/{register().summary.version}")
    texts = pd.DataFrame({"text": ["a warm film", "dull"], "text_pair": ["a cold film", "bright"]})
    for task in ("mrpc", "stsb"):
        answers = model.predict(texts, params={"task": task})
        for (text, second), answer in zip(
            texts.itertuples(index=False), answers.to_dict("records"), strict=True
        ):
            expected = models_stages.predict(merged, text, second, task=task)
            assert answer["label"] == expected.label
            assert answer["score"] == pytest.approx(expected.score, abs=1e-5)
    answer = model.predict(texts[["text"]], params={"task": "sst2"}).to_dict("records")[0]
    expected = models_stages.predict(merged, "a warm film", task="sst2")
    assert answer["probabilities"] == pytest.approx(expected.probabilities, abs=1e-5)
    with pytest.raises(Exception, match="not one of mrpc, sst2, stsb"):
        model.predict(texts, params={"task": "rte"})


def test_the_served_model_does_not_need_fmn(register: Register, tmp_path: Path) -> None:
    """`fmn` is made impossible to import where the model is loaded."""
    register()
    (tmp_path / "fmn.py").write_text("raise ImportError('fmn is not here')")
    code = (
        "import mlflow, pandas as pd, sys\n"
        "model = mlflow.pyfunc.load_model('models:/demo@champion')\n"
        "print(model.predict(pd.DataFrame({'text': ['good']}), params={'task': 'sst2'}).label[0])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.stdout.strip() in ("negative", "positive"), done.stderr


def test_a_version_can_be_fetched_by_alias_and_is_pinned(
    register: Register, tmp_path: Path
) -> None:
    version = register().summary.version
    assert tracking.pin("models:/demo@champion") == f"models:/demo/{version}"
    assert tracking.download("models:/demo@champion", tmp_path / "out") == f"models:/demo/{version}"
    assert list((tmp_path / "out").rglob("model.safetensors"))


def test_what_the_registry_does_not_have_is_a_users_mistake() -> None:
    with pytest.raises(UserError, match="none"):
        tracking.pin("models:/none@champion")
    with pytest.raises(UserError, match="MLflow at sqlite"):
        tracking.download("models:/none/1", Path("out"))


def test_a_server_that_is_not_there_is_told_in_one_line_without_its_password(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://someone:secret@127.0.0.1:{_free_port()}")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with pytest.raises(UserError, match=r"^MLflow at http://127\.0\.0\.1:\d+: ") as told:
        tracking.pin("models:/demo@champion")
    assert "secret" not in str(told.value)
    assert "\n" not in str(told.value)


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
        with pytest.raises(UserError) as told:
            register()
        # MLflow does not retry an answer that was cut off.
        assert server.requests == (1 if fault == "cut" else 3)
    problem = f"MLflow at {server.url}: the server does not answer as it should ("
    assert str(told.value).startswith(problem)
    assert "run again to go on from here" in str(told.value)
    assert "\n" not in str(told.value)
    assert is_transient(told.value), "a flow tries it again"


def test_the_patience_with_a_server_is_bounded() -> None:
    limits = {
        name: int(os.environ[f"MLFLOW_HTTP_REQUEST_{name}"]) for name in ("MAX_RETRIES", "TIMEOUT")
    }
    backoff = sum(
        MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR.default * 2**n for n in range(1, limits["MAX_RETRIES"])
    )
    assert (1 + limits["MAX_RETRIES"]) * limits["TIMEOUT"] + backoff <= 180, (
        "docs/reliability.md says so"
    )


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
        troubles: list[list[int | str]] = [
            [500] * 20,
            ["cut"],
            [*[""] * 15, "cut"],
            [*[""] * 30, *[503] * 20],
        ]
        for faults in troubles:
            server.faults = faults
            with pytest.raises(UserError, match="does not answer as it should"):
                register("unsteady")
        server.faults = [500, "", 503, 502, "", "", 500]
        assert register("unsteady").summary.version == "1"
        assert not server.faults
        client = mlflow.MlflowClient(server.url)
        assert len(client.search_model_versions("name = 'unsteady'")) == 1
        runs = client.search_runs([one.experiment_id for one in client.search_experiments()])
        assert [run.info.status for run in runs] == ["FINISHED"]


def test_requirements_are_pinned_without_local_labels() -> None:
    found = dict(line.split("==") for line in tracking.requirements())
    assert set(found) == set(tracking.REQUIREMENTS)
    assert not any("+" in version for version in found.values())


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
    store = f"sqlite:///{tmp_path / 'mlflow.db'}"
    kept = str(tmp_path / "kept")
    with serving(
        "server", "--backend-store-uri", store, "--artifacts-destination", kept, path="health"
    ) as address:
        names = [f"model-{number}" for number in range(9)]
        lines = together(merged, address, [*names, names[0]], tmp_path)
        assert lines == sorted([*(f"{name} 1 True" for name in names), f"{names[0]} 1 False"])
        monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
        assert tracking.pin(f"models:/{names[3]}@champion") == f"models:/{names[3]}/1"
        tracking.download(f"models:/{names[3]}/1", tmp_path / "fetched")
    assert list((tmp_path / "fetched").rglob("model.safetensors"))
    assert list((tmp_path / "kept").rglob("model.safetensors"))


@pytest.mark.slow
def test_a_version_is_served_to_curl(register: Register, merged: Merged, store: str) -> None:
    register()

    def ask(address: str, **content: Any) -> Any:
        body = json.dumps(content).encode()
        request = urllib.request.Request(  # noqa: S310
            f"{address}/invocations", body, {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=60) as answer:  # noqa: S310
            return json.load(answer)["predictions"]

    command = ("models", "serve", "-m", "models:/demo@champion", "--env-manager", "local")
    with serving(*command, path="ping", MLFLOW_TRACKING_URI=store) as address:
        texts = [{"text": "a warm film"}, {"text": "dull"}]
        answers = ask(address, dataframe_records=texts, params={"task": "sst2"})
        expected = models_stages.predict(merged, "a warm film", task="sst2")
        assert [set(answer["probabilities"]) for answer in answers] == [
            {"negative", "positive"}
        ] * 2
        assert (answers[0]["label"], answers[0]["score"]) == (
            expected.label,
            pytest.approx(expected.score, abs=1e-5),
        )
        pair = {"text": "a warm film", "text_pair": "a cold film"}
        answer = ask(address, dataframe_records=[pair], params={"task": "mrpc"})[0]
        assert answer["label"] in ("equivalent", "not_equivalent")
        with pytest.raises(urllib.error.HTTPError) as refused:
            ask(address, dataframe_records=texts, params={"task": "rte"})
        assert refused.value.code == 400
        assert "not one of mrpc, sst2, stsb" in refused.value.read().decode()
