"""Sources that move: every run resolves them, and computes again what depends on them."""

import re
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import safetensors.torch

from flows.pipeline import pipeline
from fmn.errors import UserError
from fmn.rows.stages import data
from fmn.sources.stages import fetch
from fmn.store.stage import Outcome
from fmn.tasks.dataset import DataInfo
from fmn.tasks.task import TaskSettings
from tests.conftest import TASKS
from tests.flows.test_notices import listening
from tests.hub_server import Hub

PROFILE = """
work: data/tiny
base: {base}
experts: {{tasks: [sst2, mrpc, stsb]}}
sources:
  sst2: hf://org/sst2@main
  mrpc: models:/expert-mrpc@champion
  stsb: models/stsb
data: {{source: sets}}
fisher: {{samples: 16, device: cpu}}
evaluate: {{device: cpu}}
registry: {{name: tiny}}
"""


@pytest.fixture
def project(
    tiny_base: Path,
    tiny_work: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    own_workers: None,
) -> Iterator[Hub]:
    """A working folder whose three experts come from a Hub, from a registry and from a folder."""
    for task in TASKS:
        shutil.copytree(tiny_work / "experts" / task, tmp_path / "models" / task)
        (tmp_path / "models" / task / "fmn.json").unlink()
        for file in (tiny_work / "data" / task).glob("*.parquet"):
            (tmp_path / "sets" / task).mkdir(parents=True, exist_ok=True)
            pq.write_table(pq.read_table(file).slice(0, 60), tmp_path / "sets" / task / file.name)
    (tmp_path / "params.yaml").write_text(PROFILE.format(base=tiny_base))
    with Hub() as hub:
        hub.add("models", "org/sst2", tmp_path / "models" / "sst2")
        for name, value in hub.environment(tmp_path / "home").items():
            monkeypatch.setenv(name, value)
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'mlflow.db'}")
        monkeypatch.chdir(tmp_path)
        register_expert("mrpc")
        yield hub


def register_expert(task: str) -> None:
    """Register a copy of models/TASK as a new version of the expert, and as its champion."""
    import mlflow

    client = mlflow.MlflowClient(f"sqlite:///{Path.cwd() / 'mlflow.db'}")
    if not client.search_registered_models(f"name = 'expert-{task}'"):
        client.create_registered_model(f"expert-{task}")
    number = len(client.search_model_versions(f"name = 'expert-{task}'")) + 1
    folder = Path(shutil.copytree(f"models/{task}", f"registered/{task}-{number}/model"))
    (folder.parent / "MLmodel").write_text("flavors: {}")
    client.create_model_version(f"expert-{task}", str(folder.parent.resolve()))
    client.set_registered_model_alias(f"expert-{task}", "champion", str(number))


def retune(task: str) -> None:
    """Change the weights of models/TASK, as a new training would."""
    file = Path("models") / task / "model.safetensors"
    weights = safetensors.torch.load_file(file)
    weights["classifier.weight"] *= 1.5
    safetensors.torch.save_file(weights, file, metadata={"format": "pt"})


def run() -> tuple[set[tuple[str, str]], str]:
    """The stages that a run computed, and the version that the registry then has."""
    outcomes = pipeline("params.yaml")
    computed = {stage for stage, outcome in outcomes.items() if outcome.computed}
    return computed, outcomes["register", ""].summary.version


def check_one_expert(task: str, computed: set[tuple[str, str]]) -> None:
    """The expert and every merged model were computed again, and nothing else."""
    of_experts = {stage for stage in computed if stage[1] in TASKS}
    assert of_experts == {("fetch", task), ("fisher", task), ("evaluate-expert", task)}
    others = computed - of_experts - {("settings", "")}  # which say where sources stand
    stages = {"merge", "realign", "evaluate", "report", "register"}
    assert {stage for stage, _ in others} == stages
    merged = {(stage, name) for stage in ("merge", "evaluate") for name in ("merged", "average")}
    assert merged < others


SOURCES = (
    *("hf://org/sst2", "hf://org/sst2@main", "https://huggingface.co/org/sst2"),
    *("models:/expert-sst2@champion", "models:/expert-sst2/latest", "models/sst2"),
)


@pytest.mark.parametrize("source", SOURCES)
def test_every_name_of_a_checkpoint_that_floats_is_looked_at_each_time(
    project: Hub, source: str
) -> None:
    if source.startswith("models:"):
        register_expert("sst2")
    out = Path("fetched")
    first = fetch(source, out=out)
    assert first.computed
    assert not fetch(source, out=out).computed
    assert_pinned(first.summary.revision, source)
    retune("sst2")
    project.add("models", "org/sst2", Path("models/sst2"))
    if source.startswith("models:"):
        register_expert("sst2")
    second = fetch(source, out=out)
    assert second.computed
    assert not fetch(source, out=out).computed
    assert second.summary.revision != first.summary.revision or source == "models/sst2"


def assert_pinned(revision: str, source: str) -> None:
    """Whether what is recorded means the same bytes tomorrow; a folder stands for itself."""
    pinned = r"hf://org/sst2@[0-9a-f]{40}|models:/expert-sst2/1"
    assert re.fullmatch(pinned, revision) or revision == source == "models/sst2"


@pytest.mark.parametrize("path", ["reviews.csv", "rows", "org/reviews", "http"])
def test_every_name_of_rows_that_floats_is_looked_at_each_time(project: Hub, path: str) -> None:
    served = Path("served")
    with serving(served) as address:
        place = {"http": f"{address}/reviews.csv", "rows": "served"}.get(path, path)

        def write(count: int) -> None:
            lines = [f"how good number {row} is,{row % 2}" for row in range(count)]
            text = "\n".join(["review,stars", *lines, ""])
            for folder in (Path(), served):
                (folder / "reviews.csv").write_text(text)
            project.add("datasets", "org/reviews", {"reviews.csv": text.encode()})

        def rows() -> Outcome[DataInfo]:
            columns = {"text": "review", "label": "stars"}
            definition = TaskSettings.model_validate(
                {"dataset": {"path": place}, "columns": columns}
            )
            return data("stars", out=Path("out"), definition=definition)

        write(40)
        assert rows().computed
        assert not rows().computed
        write(60)
        second = rows()
        assert second.computed
        assert sum(second.summary.rows.values()) == 60
        assert not rows().computed


@contextmanager
def serving(folder: Path) -> Iterator[str]:
    """The address of a server of a folder's files."""
    folder.mkdir()
    handler = partial(SimpleHTTPRequestHandler, directory=str(folder))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.mark.slow
@pytest.mark.usefixtures("prefect_server")
def test_a_run_computes_what_depends_on_sources_that_moved(
    project: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    with listening() as webhook:
        monkeypatch.setenv("FMN_WEBHOOK", webhook.address)
        computed, version = run()
        assert {("fetch", task) for task in TASKS} < computed
        assert version == "1"
        assert run() == (set(), "1"), "nothing moved"
        (text,) = webhook.texts
        assert text.startswith("fmn: tiny 1 is the new champion")
    monkeypatch.delenv("FMN_WEBHOOK")

    for task, expected in (("sst2", "2"), ("mrpc", "3"), ("stsb", "4")):
        retune(task)
        if task == "sst2":
            project.add("models", "org/sst2", Path("models/sst2"))
        elif task == "mrpc":
            register_expert("mrpc")
        computed, version = run()
        check_one_expert(task, computed)
        assert version == expected

    table = pq.read_table("sets/sst2/train.parquet")
    pq.write_table(table.slice(0, 50), "sets/sst2/train.parquet")
    computed, version = run()
    of_experts = {stage for stage in computed if stage[1] in TASKS}
    # The expert's labels are checked again on the new rows.
    assert of_experts == {("data", "sst2"), ("fetch", "sst2"), ("fisher", "sst2")}
    assert ("merge", "merged") in computed
    assert run() == (set(), version)

    Path("models/stsb/config.json").unlink()
    with listening() as webhook:
        monkeypatch.setenv("FMN_WEBHOOK", webhook.address)
        with pytest.raises(UserError) as failure:
            run()
    problem = r"params\.yaml:8: sources\.stsb: models/stsb: .*config\.json.*"
    assert re.fullmatch(problem, str(failure.value))
    assert webhook.texts == [f"fmn: params.yaml failed: {failure.value}"]
