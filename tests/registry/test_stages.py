"""Registration: what a version holds, which is the champion, and how its model is made again."""

import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlflow
import pandas as pd
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from fmn.errors import UserError
from fmn.evaluate.files import predictions_path, read_metrics
from fmn.evaluate.stages import EvaluateSettings, evaluate
from fmn.experiments.files import SearchResult, Trial
from fmn.experiments.stages import CompareSettings, SearchSettings
from fmn.merge.stages import RealignSettings, realign
from fmn.models.stages import predict
from fmn.registry import stages as registry_stages
from fmn.registry.stages import RegistrySettings
from fmn.report.stages import ReportInfo, report
from fmn.report.wording import escaped, points, shown
from fmn.store.stage import Job, check_intact, read_record, run_stage
from fmn.store.yaml_file import read_yaml, to_yaml
from tests.conftest import TASKS
from tests.registry.conftest import Merged, Register, merge_and_evaluate

pytestmark = pytest.mark.usefixtures("store")


def scored(merged: Merged, out: Path, scores: Mapping[str, float], split: str = "") -> Path:
    """The metrics with other scores, or of data with another digest."""
    content = json.loads(merged.metrics.read_text())
    for task, score in scores.items():
        content["tasks"][task]["score"] = score
    all_scores = [entry["score"] for entry in content["tasks"].values()]
    content["score"] = sum(all_scores) / len(all_scores)
    if split:
        content["data"]["sst2"]["splits"]["validation"] = split
    out.write_text(json.dumps(content))
    return out


@pytest.fixture
def params(merged: Merged, tmp_path: Path) -> Path:
    settings = {
        "work": str(merged.model.parent),
        "base": "hf://org/base@main",
        "experts": {"tasks": list(TASKS)},
        "finetune": {task: {"epochs": 1, "learning_rate": 0.001} for task in TASKS},
        "registry": {"name": "demo"},
        "notify": {"webhook": "https://hooks.example/secret"},
    }
    (tmp_path / "params.yaml").write_text(to_yaml(settings))
    return tmp_path / "params.yaml"


def aliases(client: mlflow.MlflowClient, name: str) -> dict[str, str]:
    model = client.get_registered_model(name)
    return {alias: str(version) for alias, version in model.aliases.items()}


def test_a_model_is_registered_once_with_its_metrics(
    register: Register, merged: Merged, client: mlflow.MlflowClient, store: str
) -> None:
    first, second = register(), register()
    assert (first.computed, second.computed) == (True, False)
    assert first.summary == second.summary
    assert register(settings={"tolerance": 0.5}).summary == first.summary
    assert first.summary.store == store
    run = client.get_run(first.summary.run).data
    metrics = json.loads(merged.metrics.read_text())
    assert run.metrics == {
        "score/mean": metrics["score"],
        **{f"score/{task}": metrics["tasks"][task]["score"] for task in TASKS},
        **{f"task/mrpc.{name}": metrics["tasks"]["mrpc"][name] for name in ("accuracy", "f1")},
        **{
            f"task/stsb.{name}": metrics["tasks"]["stsb"][name] for name in ("pearson", "spearmanr")
        },
    }
    assert (run.params["method"], run.params["coefficient.sst2"]) == ("mask-fisher", "1.0")


def test_a_model_with_own_parts_is_served_as_it_was_evaluated_and_as_it_predicts(
    tiny_work: Path, merged: Merged, tmp_path: Path
) -> None:
    experts = {task: tiny_work / "experts" / task for task in TASKS}
    model, metrics, data = tmp_path / "own", tmp_path / "metrics.json", tiny_work / "data"
    how = RealignSettings(texts=40, own_layers=1, device="cpu")
    realign(merged.model, experts=experts, data=data, out=model, settings=how)
    evaluate(model, data=data, out=metrics, settings=EvaluateSettings(device="cpu"))
    check_intact(Path(shutil.copytree(model, tmp_path / "copy")))
    registered = registry_stages.register(
        model, metrics=metrics, data=data, settings=RegistrySettings(name="own")
    ).summary
    served = mlflow.pyfunc.load_model(f"models:/own/{registered.version}")
    table = pd.DataFrame({"text": ["a fine film"], "text_pair": ["the film is fine"]})
    answers = served.predict(table, params={"task": "*"})
    assert answers.task.tolist() == ["mrpc", "stsb"]
    for answer in answers.to_dict("records"):
        alone: Any = predict(model, *table.iloc[0], task=answer["task"])
        assert answer["score"] == pytest.approx(alone.score, abs=1e-5)


def test_run_and_version_say_what_the_model_was_made_from(
    register: Register, merged: Merged, client: mlflow.MlflowClient
) -> None:
    registered = register().summary
    run = client.get_run(registered.run)
    version = client.get_model_version(registered.name, registered.version)
    recipe = json.loads((merged.model / "merge.json").read_text())
    data = json.loads(merged.metrics.read_text())["data"]
    assert run.data.tags["expert.mrpc"] == recipe["experts"]["mrpc"]["digest"]
    assert run.data.tags["fisher.mrpc"] == recipe["fisher"]["mrpc"]["values"]
    assert run.data.tags["tasks"] == "mrpc, sst2, stsb"
    assert version.tags == {
        "tasks": "mrpc, sst2, stsb",
        "method": "mask-fisher",
        "score": f"{100 * run.data.metrics['score/mean']:.2f} %",
        "decision": "champion",
    }
    experiment = client.get_experiment(run.info.experiment_id)
    assert experiment.tags["mlflow.note.content"].startswith("Runs of fmn.")
    assert "`champion`" in str(client.get_registered_model(registered.name).description)
    assert run.inputs is not None
    inputs = {(it.dataset.name, it.tags[0].value): it.dataset for it in run.inputs.dataset_inputs}
    assert set(inputs) == {(task, part) for task in TASKS for part in ("training", "validation")}
    digests = data["sst2"]["splits"]["validation"], recipe["fisher"]["sst2"]["data_digest"]
    assert digests[0].startswith(inputs["sst2", "validation"].digest)
    assert digests[1].startswith(inputs["sst2", "training"].digest)
    assert json.loads(str(inputs["sst2", "validation"].source))["tags"]["split"] == "validation"


def test_a_version_of_a_later_step_tells_the_settings_of_every_step(
    merged: Merged, tiny_work: Path, client: mlflow.MlflowClient, tmp_path: Path
) -> None:
    experts = {task: tiny_work / "experts" / task for task in TASKS}
    rows, model, metrics = tiny_work / "data", tmp_path / "realigned", tmp_path / "realigned.json"
    settings = RealignSettings(texts=16, device="cpu")
    realign(merged.model, experts=experts, data=rows, out=model, settings=settings)
    evaluate(model, data=rows, out=metrics, settings=EvaluateSettings(device="cpu"))
    later = RegistrySettings(name="later")
    registered = registry_stages.register(model, metrics=metrics, settings=later, data=rows).summary
    run = client.get_run(registered.run).data
    assert (run.params["method"], run.params["realign.texts"]) == ("mask-fisher", "16")
    recipe = json.loads((model / "merge.json").read_text())
    assert recipe["realign"]["merged"] == read_metrics(merged.metrics).model
    origins = dict(row[:2] for row in registry_stages.read_lineage("models:/later/1").table)
    assert origins["merged head sst2"] == "re-aligned"


def test_report_and_card_are_kept_and_shown(
    register: Register, client: mlflow.MlflowClient, tmp_path: Path
) -> None:
    report, card = tmp_path / "report", tmp_path / "card.md"
    report.mkdir()
    (report / "report.html").write_text("<p>")
    card.write_text("---\ntags: [fmn]\n---\n\n# Three tasks\n")
    registered = register("reported", report=report, card=card).summary
    files = [file.path for file in client.list_artifacts(registered.run, "report")]
    assert files == ["report/report.html"]
    assert mlflow.artifacts.load_text(f"runs:/{registered.run}/README.md") == card.read_text()
    description = str(client.get_model_version("reported", "1").description)
    assert description.startswith("**Champion**: the first version.\n\n| task&emsp;| score")
    assert "\n| sst2&emsp;| text&emsp;| negative, positive&emsp;| 128 |" in description
    assert "\n| stsb&emsp;| text and text_pair&emsp;| a number&emsp;| 128 |" in description


def full_report(merged: Merged, tiny_work: Path, out: Path) -> Path:
    """The report of a run: the merged model beside an average and the experts."""
    cpu = EvaluateSettings(device="cpu")
    experts = {task: out / f"{task}.json" for task in TASKS}
    for task, file in experts.items():
        folder = tiny_work / "experts" / task
        evaluate(folder, data=tiny_work / "data", out=file, settings=cpu, tasks=[task])
    average = merge_and_evaluate(tiny_work, out / "plain", "average")
    report(
        merged={"average": average.metrics, "merged": merged.metrics}, experts=experts,
        models={"average": average.model, "merged": merged.model}, out=out / "report",
        registry="full",
    )  # fmt: skip
    return out / "report"


def test_a_version_shows_its_baselines_and_the_change_against_the_champion(
    register: Register, merged: Merged, tiny_work: Path, client: mlflow.MlflowClient, tmp_path: Path
) -> None:
    folder = full_report(merged, tiny_work, tmp_path)
    levels = {"mrpc": 0.1, "sst2": 0.2, "stsb": -1.0}
    register("full", scored(merged, tmp_path / "before.json", levels), report=folder)
    before = client.get_run(str(client.get_model_version("full", "1").run_id)).data
    assert not [name for name in before.metrics if name.startswith(("expert/", "retained/"))], (
        "a report on other scores says nothing of these"
    )
    registered = register("full", report=folder).summary
    numbers = json.loads((folder / "results.json").read_text())
    run = client.get_run(registered.run).data
    for task in TASKS:
        row = numbers["tasks"][task]
        assert run.metrics[f"expert/{task}"] == row["expert"]["score"]
        assert run.metrics[f"average/{task}"] == row["average"]["score"]
        assert run.metrics[f"retained/{task}"] == row["merged"]["relative"]
    mean = numbers["mean"]["merged"]["relative"]
    assert run.metrics["retained/mean"] == mean
    assert {"time/merge", "time/evaluate"} <= run.metrics.keys()
    assert not [name for name in run.metrics if "/" not in name]
    assert len(run.metrics) < 30
    version = client.get_model_version("full", "2")
    assert version.tags["retained"] == f"{100 * mean:.1f} %"
    description = str(version.description)
    summary = json.loads((folder / "fmn.json").read_text())["info"]
    for words in (
        f"**Champion**: mean score {100 * numbers['mean']['merged']['score']:.2f} %",
        *(f"- {escaped(line)}" for line in summary["verdict"]),
        "expert&emsp;| % of expert&emsp;| average&emsp;| less version 1's |",
        f"\n| mean&emsp;| {shown(numbers['mean']['merged']['score'])}",
    ):
        assert words in description, words
    page = mlflow.artifacts.load_text(f"runs:/{registered.run}/report/report.html")
    assert '/#/models/full/versions/2">Version 2 of full</a>: <b>champion</b>' in page
    change = points(numbers["tasks"]["sst2"]["merged"]["score"] - 0.2)
    assert re.search(rf"20\.0</td>\s*<td>{re.escape(change)}</td>", page)
    own = (folder / "report.html").read_text()
    assert registry_stages.REGISTRATION.search(own), "not written into"
    assert not registry_stages.REGISTRATION.search(page)


@pytest.mark.filterwarnings("ignore::UserWarning:mlflow")
def test_the_code_on_a_versions_page_runs(
    register: Register, client: mlflow.MlflowClient, store: str
) -> None:
    registered = register("shown").summary
    uri = f"models:/shown/{registered.version}"
    description = str(client.get_model_version("shown", registered.version).description)
    code = description.split("```python\n")[1].split("```")[0]
    assert f'load_model("{uri}")' in code
    *lines, last = code.strip().splitlines()
    names: dict[str, Any] = {}
    exec("\n".join([*lines, f"answers = {last}"]), names)  # noqa: S102 - our own page
    assert len(names["answers"]) == 1


def test_where_a_registration_stands_is_recorded_and_a_lost_version_is_noticed(
    register: Register, merged: Merged, client: mlflow.MlflowClient, tmp_path: Path
) -> None:
    out = tmp_path / "registered.json"
    first = register("recorded", out=out).summary
    assert read_record(out, registry_stages.Registered) == first
    before = out.stat().st_mtime_ns
    register("recorded", out=out)
    assert out.stat().st_mtime_ns == before, "not written again"
    client.delete_registered_model("recorded")
    again = register("recorded", out=out)
    assert again.computed
    assert again.summary.run != first.run
    assert read_record(out, registry_stages.Registered) == again.summary
    with pytest.raises(UserError, match="holds the output of `fmn evaluate`"):
        register(
            "foreign",
            out=shutil.copytree(merged.metrics.parent, tmp_path / "x") / merged.metrics.name,
        )
    assert not client.search_model_versions("name = 'foreign'"), "refused before MLflow is written"


def test_metrics_of_another_model_or_of_some_tasks_are_refused(
    register: Register, merged: Merged, tmp_path: Path
) -> None:
    whole = json.loads(merged.metrics.read_text())
    changes: list[dict[str, Any]] = [{"model": "0" * 64}, {"data": {}}]
    for change in changes:
        (tmp_path / "changed.json").write_text(json.dumps(whole | change))
        with pytest.raises(UserError, match=r"changed\.json: not the metrics of all tasks of"):
            register(metrics=tmp_path / "changed.json")


def test_a_model_that_is_served_otherwise_than_it_was_evaluated_is_not_registered(
    register: Register,
    merged: Merged,
    client: mlflow.MlflowClient,
    tiny_work: Path,
    tmp_path: Path,
) -> None:
    metrics = scored(merged, tmp_path / "metrics.json", {})
    table = pq.read_table(predictions_path(merged.metrics))
    flipped = pc.if_else(
        pc.equal(table["task"], "sst2"), pc.subtract(1.0, table["prediction"]), table["prediction"]
    )
    place = table.column_names.index("prediction")
    pq.write_table(table.set_column(place, "prediction", flipped), predictions_path(metrics))
    settings = {"experiment": "refused"}
    problem = r"task sst2, validation row \d+: the served model answers (posi|nega)tive \(0\..*\),"
    for _ in range(2):  # the second try clears the first away
        with pytest.raises(UserError, match=problem):
            register("refused", metrics, settings, data=tiny_work / "data")
        experiment = client.get_experiment_by_name("refused")
        assert experiment is not None
        runs = client.search_runs([experiment.experiment_id])
        assert [run.info.status for run in runs] == ["FAILED"]
    assert not client.search_model_versions("name = 'refused'")
    accepted = register("refused", settings=settings, data=tiny_work / "data").summary
    assert (accepted.version, accepted.alias) == ("1", "champion")


def test_the_champion_moves_to_a_version_that_is_as_good_and_the_reason_is_told(
    register: Register, merged: Merged, client: mlflow.MlflowClient, tmp_path: Path
) -> None:
    def add(number: int, split: str = "", **scores: float) -> registry_stages.Registered:
        levels = {"mrpc": 0.7, "sst2": 0.8, "stsb": 0.6, **scores}
        metrics = scored(merged, tmp_path / f"{number}.json", levels, split)
        return register("rising", metrics).summary

    first = add(1)
    assert (first.alias, first.reason) == ("champion", "the first version")
    worse = add(2, sst2=0.7)
    assert worse.alias == "challenger"
    assert aliases(client, "rising") == {"champion": "1", "challenger": "2"}
    assert "sst2 is worse by 10.00, tolerance 1.00" in add(3, sst2=0.7, mrpc=0.9).reason
    assert aliases(client, "rising") == {"champion": "1", "challenger": "3"}
    better = add(4, mrpc=0.75)
    assert better.alias == "champion"
    assert aliases(client, "rising") == {"champion": "4"}, "none is the challenger of one that won"
    other = add(5, split="f" * 64, mrpc=1, sst2=1, stsb=1)
    assert other.reason == "not comparable: version 4 was evaluated on other data"
    text = f"{worse.alias}: {worse.reason}"
    assert client.get_model_version("rising", "2").tags["decision"] == "challenger"
    tags = client.get_run(worse.run).data.tags
    assert tags["promotion"] == tags["mlflow.note.content"] == text
    again = register("rising", tmp_path / "2.json")
    assert (again.computed, again.summary) == (False, worse), "decided once"


def test_the_champion_is_rolled_back_to_the_one_before(
    register: Register, merged: Merged, client: mlflow.MlflowClient, tmp_path: Path
) -> None:
    for number in range(3):
        metrics = scored(merged, tmp_path / f"{number}.json", {"mrpc": 0.7 + number / 10})
        register("falling", metrics)
    change = registry_stages.roll_back("falling")
    assert (change.before, change.champion) == ("3", "2")
    assert registry_stages.roll_back("falling").champion == "1"
    with pytest.raises(UserError, match="falling: no version was the champion before; choose one"):
        registry_stages.roll_back("falling")
    assert registry_stages.roll_back("falling", to="3").before == "1"
    assert aliases(client, "falling") == {"champion": "3"}
    assert client.get_registered_model("falling").tags["champion.history"] == "1 3"
    for version, problem in (("7", "version=7.* not found"), ("3", "version 3 is the champion")):
        with pytest.raises(UserError, match=problem):
            registry_stages.roll_back("falling", to=version)
    with pytest.raises(UserError, match="nothing not found"):
        registry_stages.roll_back("nothing")


def test_what_a_killed_registration_left_is_cleared_away_and_an_undecided_version_is_decided(
    register: Register, client: mlflow.MlflowClient
) -> None:
    first = register("killed")
    key = client.get_run(first.summary.run).data.tags["fmn.key"]
    # As if killed after the version was made and before it was decided on.
    client.delete_model_version_tag("killed", "1", "decision")
    again = register("killed")
    assert (again.summary, again.computed) == (first.summary, True)
    client.delete_model_version_tag("killed", "1", "decision")
    client.delete_registered_model_alias("killed", "champion")
    register("killed")
    assert aliases(client, "killed") == {"champion": "1"}
    # As if killed before there was a version.
    client.delete_registered_model("killed")
    register("killed")
    experiment = client.get_experiment_by_name("fmn")
    assert experiment is not None
    runs = client.search_runs([experiment.experiment_id], f"tags.`fmn.key` = '{key}'")
    assert [run.info.status for run in runs] == ["FINISHED"]


def test_a_version_is_made_again_from_its_settings(
    register: Register, merged: Merged, params: Path, client: mlflow.MlflowClient, tmp_path: Path
) -> None:
    registered = register("again", params=params).summary
    run = client.get_run(registered.run)
    assert run.data.tags["profile"] == str(params)
    assert run.data.params["finetune.mrpc.learning_rate"] == "0.001"
    assert "secret" not in mlflow.artifacts.load_text(f"runs:/{registered.run}/lineage/params.yaml")
    version = registry_stages.read_lineage("models:/again@champion")
    assert (version.uri, version.tags["made"]) == ("models:/again/1", "merged")
    names = {row[0] for row in version.table}
    assert {"base", "expert sst2", "fisher mrpc", "data stsb train", "profile"} <= names
    assert version.lineage.threads == 1
    settings = read_yaml(registry_stages.settings_again(version, tmp_path / "out"))
    assert settings["work"] == str(tmp_path / "out" / "work")
    assert settings["finetune"] == read_yaml(params)["finetune"]
    for name, before, now in registry_stages.compare_digests(version, *merged):
        assert before == now, name


def test_what_differs_from_a_version_is_told(
    register: Register, tiny_work: Path, tmp_path: Path
) -> None:
    register()
    version = registry_stages.read_lineage("models:/demo/1")
    other = merge_and_evaluate(tiny_work, tmp_path, "average")
    compared = registry_stages.compare_digests(version, *other)
    wrong = {what for what, before, now in compared if before != now}
    assert wrong == {"merged encoder", "scores", *(f"fisher {task}" for task in TASKS)}


def test_what_cannot_be_made_again_is_told(
    register: Register, merged: Merged, client: mlflow.MlflowClient, tmp_path: Path
) -> None:
    register("bare")
    version = registry_stages.read_lineage("models:/bare/1")
    with pytest.raises(UserError, match=r"models:/bare/1: registered without its settings; `fmn"):
        registry_stages.settings_again(version, tmp_path)
    client.create_registered_model("foreign")
    client.create_model_version("foreign", str(merged.model))
    with pytest.raises(UserError, match="models:/foreign/1: its run holds no lineage"):
        registry_stages.read_lineage("models:/foreign/1")
    for wrong in ("models:/demo", "demo", "models:/demo/one", "models:/demo/1/2"):
        with pytest.raises(UserError, match="not a registered version; write models:/NAME/VERSION"):
            registry_stages.read_lineage(wrong)


def nested_runs(client: mlflow.MlflowClient, experiment: str, run: str) -> dict[str, Any]:
    """The data by name of the runs in an experiment, which are all nested in one."""
    entity = client.get_experiment_by_name(experiment)
    assert entity is not None
    runs = client.search_runs([entity.experiment_id])
    nested = {str(it.info.run_name): it.data for it in runs if it.info.run_id != run}
    assert {data.tags["mlflow.parentRunId"] for data in nested.values()} == {run}
    return nested


def test_a_comparison_is_logged_once_with_a_run_for_each_method(
    tmp_path: Path, client: mlflow.MlflowClient
) -> None:
    means = {"average": {"pairs": 0.8, "mean": 0.7}, "mine": {"pairs": 0.9, "mean": 0.85}}
    tables = tmp_path / "tables"

    def write(job: Job) -> ReportInfo:
        (job.path / "table.md").write_text("| a | b |")
        return ReportInfo(header=[], body=[], notes=[], results=means)

    run_stage("comparison", 1, tables, write, reads={}, settings={}, summary=str, is_folder=True)
    methods: Any = {"average": {"method": "average"}, "mine": {"method": "ties", "scale": 2}}
    options: dict[str, Any] = {
        "title": "methods",
        "comparing": CompareSettings(methods=methods),
        "settings": RegistrySettings(name="demo", experiment="compared"),
    }
    first = registry_stages.log_comparison(tables, **options)
    second = registry_stages.log_comparison(tables, **options)
    assert (first.computed, second.computed) == (True, False)
    assert first.summary == second.summary
    nested = nested_runs(client, "compared", first.summary.run)
    assert {method: data.metrics for method, data in nested.items()} == {
        method: {f"retained/{kind}": value for kind, value in row.items()}
        for method, row in means.items()
    }
    assert nested["mine"].params["scale"] == "2.0"
    assert mlflow.artifacts.load_text(f"runs:/{first.summary.run}/tables/table.md") == "| a | b |"
    (tables / "table.md").write_text("changed")
    with pytest.raises(UserError, match=r"table\.md: not what was written there"):
        registry_stages.log_comparison(tables, **options)
    with pytest.raises(UserError, match="not the tables of a comparison"):
        registry_stages.log_comparison(tmp_path, **options)


def test_a_search_is_logged_once_with_a_run_for_each_trial(client: mlflow.MlflowClient) -> None:
    trials = [
        Trial(coefficients={"mrpc": x, "sst2": 1}, scale=1, score=x, tasks={"mrpc": x, "sst2": x})
        for x in (0.5, 0.75, 0.25)
    ]
    result = SearchResult(
        coefficients=trials[1].coefficients, scale=1, score=0.75, uniform=0.5, tasks={},
        experts={"mrpc": "1" * 64, "sst2": "2" * 64}, rows={}, merge={"method": "average"},
        trials=trials, study="3" * 64,
    )  # fmt: skip
    settings = SearchSettings(trials=3, experiment="searched")
    first = registry_stages.log_search(result, settings)
    assert registry_stages.log_search(result, settings).summary == first.summary
    run = client.get_run(first.summary.run).data
    assert (run.params["method"], run.params["trials"]) == ("average", "3")
    assert run.metrics["score/mean"] == 0.75
    nested = nested_runs(client, "searched", first.summary.run)
    assert [nested[f"trial {n}"].metrics["score/mean"] for n in range(3)] == [0.5, 0.75, 0.25]
    assert nested["trial 2"].metrics["coefficient/mrpc"] == 0.25
