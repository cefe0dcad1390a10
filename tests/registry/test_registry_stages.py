"""What ends in MLflow: a registration with its lineage, which can be read again, and a comparison."""

import json
from collections.abc import Iterator
from pathlib import Path

import mlflow
import pytest

from fmn import cli, params
from fmn.errors import UserError
from fmn.evaluate import stages as evaluate_stages
from fmn.evaluate.stages import EvaluateSettings
from fmn.experiments.stages import CompareSettings
from fmn.merge import stages as merge_stages
from fmn.merge.stages import MergeSettings
from fmn.params import Params
from fmn.registry import lineage
from fmn.registry import stages as registry_stages
from fmn.registry import tracking as registry
from fmn.registry.stages import RegistrySettings
from fmn.report import comparison
from fmn.report import stages as report_stages
from fmn.store import artifacts
from fmn.store.stage import Outcome
from tests.conftest import TASKS, TUNING
from tests.report.test_comparison import CELLS


@pytest.fixture(scope="module", autouse=True)
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("store")
    patch = pytest.MonkeyPatch()
    patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{folder / 'mlflow.db'}")
    patch.chdir(folder)
    yield registry.tracking_uri()
    patch.undo()


@pytest.fixture(scope="module")
def work(tiny_work: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A work folder with a merged model and its metrics."""
    work = tmp_path_factory.mktemp("registered") / "work"
    experts = {task: tiny_work / "experts" / task for task in TASKS}
    fisher = {task: tiny_work / "fisher" / f"{task}.parquet" for task in TASKS}
    merge_stages.merge(
        experts=experts,
        fisher=fisher,
        base=tiny_work / "base",
        out=work / "merged",
        settings=MergeSettings(),
    )
    evaluate_stages.evaluate(
        work / "merged",
        [],
        tiny_work / "data",
        work / "merged.json",
        EvaluateSettings(device="cpu"),
    )
    return work


@pytest.fixture(scope="module")
def settings(work: Path, tiny_base: Path) -> Params:
    return Params.model_validate(
        {
            "work": str(work),
            "base": str(tiny_base),
            "experts": {"tasks": list(TASKS)},
            "finetune": dict.fromkeys(TASKS, TUNING.model_dump()),
            "data": {"source": "embedded"},
            "registry": {"name": "demo"},
        }
    )


def register(work: Path, settings: Params | None) -> Outcome:
    return registry_stages.register(
        work / "merged",
        work / "merged.json",
        None,
        None,
        RegistrySettings(name="demo"),
        "params.yaml",
        settings,
    )


def test_a_version_is_registered_with_its_settings_and_what_the_stages_took(
    work: Path, settings: Params, store: str
) -> None:
    artifacts.write_cost(work / "merged", "merge", 2.5)
    outcome = register(work, settings)
    run = mlflow.MlflowClient(store).get_run(outcome.summary["run"])
    assert run.data.metrics["seconds/merge merged"] == 2.5
    assert run.data.tags["profile"] == "params.yaml"
    assert run.data.params["finetune.mrpc.learning_rate"] == "0.001"
    kept = {
        one.path for one in mlflow.MlflowClient(store).list_artifacts(run.info.run_id, "lineage")
    }
    assert kept == {"lineage/merge.json", "lineage/metrics.json", "lineage/params.yaml"}


def test_the_lineage_of_a_version_is_read_again(
    work: Path, settings: Params, tmp_path: Path
) -> None:
    register(work, settings)
    found = registry_stages.read_lineage("models:/demo@champion")
    assert found.uri == "models:/demo/1"
    assert found.recipe == json.loads((work / "merged" / "merge.json").read_text())
    assert found.metrics == artifacts.read_json(work / "merged.json")
    assert {"base", "expert sst2", "fisher mrpc", "data stsb train", "settings"} <= {
        row[0] for row in found.table
    }
    again = params.load(registry_stages.settings_again(found, tmp_path / "out"))
    assert again.work == str(tmp_path / "out" / "work")
    assert again.finetune == settings.finetune
    assert lineage.threads(found.recipe) == 1
    compared = registry_stages.compare_digests(found, work / "merged", work / "merged.json")
    assert compared
    assert all(before == now for _, before, now in compared)


def test_what_differs_from_a_version_is_told(
    work: Path, settings: Params, tiny_work: Path, tmp_path: Path
) -> None:
    register(work, settings)
    found = registry_stages.read_lineage("models:/demo/1")
    experts = {task: tiny_work / "experts" / task for task in TASKS}
    merge_stages.merge(
        experts=experts,
        base=tiny_work / "base",
        out=tmp_path / "other",
        settings=MergeSettings(method="average"),
    )
    compared = registry_stages.compare_digests(found, tmp_path / "other", work / "merged.json")
    wrong = {what for what, before, now in compared if before != now}
    assert wrong == {"merged encoder", *(f"fisher {task}" for task in TASKS)}


def test_what_was_registered_without_settings_cannot_be_made_again(
    work: Path, tiny_work: Path, tmp_path: Path
) -> None:
    registry_stages.register(
        work / "merged", work / "merged.json", None, None, RegistrySettings(name="bare")
    )
    found = registry_stages.read_lineage("models:/bare/1")
    assert found.settings is None
    with pytest.raises(
        UserError, match=r"models:/bare/1: registered without its settings; `fmn register --params"
    ):
        registry_stages.settings_again(found, tmp_path)


def test_a_version_that_fmn_did_not_register_has_no_lineage(store: str, work: Path) -> None:
    client = mlflow.MlflowClient(store)
    client.create_registered_model("foreign")
    client.create_model_version("foreign", str(work))
    with pytest.raises(UserError, match="models:/foreign/1: its run holds no lineage"):
        registry_stages.read_lineage("models:/foreign/1")
    for wrong in ("models:/demo", "demo", "models:/demo/one", "models:/demo/1/2"):
        with pytest.raises(UserError, match="not a registered version; write models:/NAME/VERSION"):
            registry_stages.read_lineage(wrong)


def test_settings_of_another_model_and_metrics_without_their_data_are_refused(
    work: Path, settings: Params, tmp_path: Path
) -> None:
    elsewhere = settings.model_copy(update={"work": str(tmp_path)})
    with pytest.raises(UserError, match="--params: these settings make their models in"):
        register(work, elsewhere)
    content = artifacts.read_json(work / "merged.json")
    del content["data"]
    artifacts.write_json(tmp_path / "old.json", "evaluate", "old", content)
    with pytest.raises(UserError, match=r"old\.json: made by an older fmn"):
        registry_stages.register(
            work / "merged", tmp_path / "old.json", None, None, RegistrySettings(name="demo")
        )


def test_where_a_registration_stands_is_recorded(work: Path, tmp_path: Path) -> None:
    out = tmp_path / "registered.json"
    settings = RegistrySettings(name="stated")
    outcome = registry_stages.register(work / "merged", work / "merged.json", None, out, settings)
    assert artifacts.read_json(out) == outcome.summary
    assert outcome.summary["alias"] == "champion"


def test_a_comparison_is_logged_once_with_a_run_for_each_method(tmp_path: Path, store: str) -> None:
    cells = {
        name: {method: tmp_path / name / f"{method}.json" for method in row}
        for name, row in CELLS.items()
    }
    for name, row in CELLS.items():
        for method, cell in row.items():
            artifacts.write_json(cells[name][method], "compare", name + method, cell)
    report_stages.write_comparison(cells, tmp_path / "tables")
    comparing = CompareSettings.model_validate(
        {
            "methods": {
                "average": {"method": "average"},
                "mine": {"method": "mask-fisher", "scale": 2},
            }
        }
    )
    asked = (
        tmp_path / "tables",
        "methods",
        comparing,
        RegistrySettings(name="demo", experiment="compared"),
    )
    first, second = registry_stages.log_comparison(*asked), registry_stages.log_comparison(*asked)
    assert (first.computed, second.computed) == (True, False)
    assert first.summary == second.summary
    client = mlflow.MlflowClient(store)
    experiment = client.get_experiment_by_name("compared")
    assert experiment is not None
    runs = client.search_runs([experiment.experiment_id])
    parent = next(run for run in runs if run.info.run_id == first.summary["run"])
    children = {run.info.run_name: run.data for run in runs if run is not parent}
    assert {run.data.tags.get("mlflow.parentRunId") for run in runs} == {None, parent.info.run_id}
    means = comparison.summary(CELLS)
    assert set(children) == set(means)
    assert children["mine"].params["scale"] == "2.0"
    assert children["mine"].metrics["pairs"] == pytest.approx(means["mine"]["pairs"].value)
    assert children["mine"].metrics["relative/cola-rte"] == pytest.approx(0.9)
    assert children["mine"].metrics["cola-rte/rte"] == pytest.approx(0.64)
    assert parent.data.metrics["pairs/mine"] == pytest.approx(means["mine"]["pairs"].value)
    assert {one.path for one in client.list_artifacts(parent.info.run_id, "tables")} >= {
        "tables/table.md"
    }


def test_tables_that_were_changed_are_not_logged(tmp_path: Path) -> None:
    comparing = CompareSettings.model_validate({"methods": {"average": {"method": "average"}}})
    with pytest.raises(UserError, match="not the tables of a comparison"):
        registry_stages.log_comparison(
            tmp_path, "methods", comparing, RegistrySettings(name="demo")
        )


def test_the_commands_tell_lineage_and_rollback(
    work: Path, settings: Params, capsys: pytest.CaptureFixture[str]
) -> None:
    register(work, settings)
    cli.main(["reproduce", "models:/demo/1"])
    said = capsys.readouterr().out
    assert "fine-tuned: epochs 1" in said
    cli.main(["reproduce", "models:/demo/1", "--json"])
    stated = json.loads(capsys.readouterr().out)
    assert (stated["version"], stated["tags"]["profile"]) == ("models:/demo/1", "params.yaml")
    assert stated["settings"]["experts"] == {"tasks": list(TASKS)}
    with pytest.raises(SystemExit):
        cli.main(["rollback", "demo"])
    assert capsys.readouterr().err.startswith("fmn: demo: no version was the champion before")
