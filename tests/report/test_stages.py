"""The stages that write a report and a comparison: what they read, write and refuse."""

import json
import re
from html import unescape
from pathlib import Path
from typing import Any

import pytest

from fmn import __version__
from fmn.errors import UserError
from fmn.evaluate import files as evaluate_files
from fmn.fisher.files import CheckpointOrigin, FisherMetadata, write_fisher
from fmn.report import stages, wording
from fmn.report.page import git_commit, registry_page
from fmn.report.results import Evaluated
from fmn.store import artifacts
from fmn.store.stage import Sidecar, sidecar_path, write_record
from tests import reports
from tests.report.test_comparison import CELLS

TASKS = ("cola", "sst2")
MERGED = ("base", "average", "merged")
Run = dict[str, Any]  # arguments of the stage


def add_sidecar(out: Path, stage: str, seconds: float, also: Path | None = None) -> None:
    """Write the sidecar that a stage leaves beside a file, or in a folder."""
    paths = [path for path in (out, also) if path and path.is_file()]
    files = {path.name: artifacts.digest_file(path) for path in paths}
    sidecar = Sidecar(
        stage=stage, key="", files=files or artifacts.digest_files(out), seconds=seconds
    )
    sidecar_path(out).write_text(sidecar.model_dump_json())


def write_metrics(path: Path, evaluated: Evaluated, model: Path | None = None) -> Path:
    predictions = evaluate_files.predictions_path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    evaluate_files.write_predictions(predictions, evaluated.answers)
    digest = artifacts.digest_folder(model) if model else ""
    write_record(path, evaluated.metrics.model_copy(update={"model": digest}))
    add_sidecar(path, "evaluate", 4.25, predictions)
    return path


def write_model(folder: Path, method: str, fisher: dict[str, Path]) -> Path:
    entries = {
        task: {"samples": 8, "estimator": "empirical", "digest": artifacts.digest_file(path)}
        for task, path in fisher.items()
    }
    folder.mkdir(parents=True)
    recipe = reports.recipe(TASKS, method, fisher=entries if method == "mask-fisher" else {})
    write_record(folder / "merge.json", recipe)
    add_sidecar(folder, "merge", 0.5)
    return folder


@pytest.fixture
def run(tmp_path: Path) -> Run:
    fisher = {task: tmp_path / f"{task}.parquet" for task in TASKS}
    for task, values in reports.fisher(TASKS, layers=2, heads=3, neurons=5).items():
        origin = CheckpointOrigin(digest="")
        metadata = FisherMetadata(task=task, checkpoint=origin, samples=8, estimator="empirical")
        write_fisher(fisher[task], values, None, metadata)
        add_sidecar(fisher[task], "fisher", 9.5)
    experts, merged = reports.run(TASKS, count=50)
    methods = dict.fromkeys(MERGED, "average") | {"merged": "mask-fisher"}
    models = {name: write_model(tmp_path / name, methods[name], fisher) for name in MERGED}
    metrics = tmp_path / "metrics"
    return {
        "fisher": fisher,
        "models": models,
        "merged": {n: write_metrics(metrics / f"{n}.json", merged[n], models[n]) for n in MERGED},
        "experts": {t: write_metrics(metrics / f"{t}.json", experts[t]) for t in TASKS},
    }


def test_the_folder_holds_page_pictures_numbers_and_cards(run: Run, tmp_path: Path) -> None:
    out = tmp_path / "report"
    sidecar_path(run["fisher"]["sst2"]).unlink()
    outcome = stages.report(**run, out=out)
    assert outcome.computed
    assert json.loads((out / "results.json").read_text()) == outcome.summary.results
    assert outcome.summary.header == ["task", *MERGED, "expert"]
    assert outcome.summary.notes[0].startswith("score in %")
    assert "| task | base | average | merged | expert |" in (out / "table.md").read_text()
    scores = (out / "scores.csv").read_text().splitlines()
    assert scores[0] == "scored,score"
    assert len(scores) == 1 + len(outcome.summary.body) * 4
    assert (out / "costs.csv").read_text().splitlines() == [
        "stage,name,seconds",
        "fisher,cola,9.5",
        *(f"merge,{name},0.5" for name in MERGED),
        *(f"evaluate,{name},4.25" for name in (*TASKS, *MERGED)),
    ]
    assert {path.name for path in (out / "cards").iterdir()} == {f"{name}.md" for name in MERGED}
    card = (out / "cards" / "merged.md").read_text()
    assert "merged with mask-fisher" in card
    assert all(f"- {wording.escaped(line)}" in card for line in outcome.summary.verdict)
    assert outcome.summary.verdict[0] not in (out / "cards" / "average.md").read_text()
    assert "| sst2 | accuracy | validation |" in card
    page = unescape((out / "report.html").read_text()).replace("\N{NO-BREAK SPACE}", " ")
    assert outcome.summary.headline == "merged"
    for words in ("One model for cola and sst2", "Who owns what", *outcome.summary.verdict):
        assert words in page, words
    pictures = {path.stem for path in (out / "pictures").iterdir()}
    assert pictures == {"scores", "heads", "owners", "costs"}


def test_a_report_of_metrics_alone_has_what_they_give(run: Run, tmp_path: Path) -> None:
    out = tmp_path / "report"
    summary = stages.report(merged={"only": run["merged"]["merged"]}, out=out).summary
    assert summary.header == ["task", "only"]
    assert {path.stem for path in (out / "pictures").iterdir()} == {"scores", "costs"}


def test_a_second_report_computes_nothing_and_a_clock_is_no_part_of_it(
    run: Run, tmp_path: Path
) -> None:
    out = tmp_path / "report"
    first = stages.report(**run, out=out)
    add_sidecar(run["models"]["merged"], "merge", 1e6)
    again = stages.report(**run, out=out)
    assert (again.computed, again.summary) == (False, first.summary)
    (out / "table.md").write_text("another")
    assert stages.report(**run, out=out).computed


def test_the_page_says_when_with_what_and_which_model_is_registered(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    stages.report(**run, out=tmp_path / "report", registry="my model")
    page = unescape((tmp_path / "report" / "report.html").read_text())
    assert (
        '<th scope="col" class="chosen">merged <span class="badge">registered</span></th>' in page
    )
    assert '<a href="http://127.0.0.1:5000/#/models/my%20model">a version of my model</a>' in page
    assert "The copy in the registry, beside the model's version" in page
    assert re.search(r"<dt>written</dt><dd>20\d\d-\d\d-\d\d \d\d:\d\d UTC</dd>", page)
    assert f"<dt>fmn</dt><dd>version {__version__}</dd>" in page
    assert "<dt>model</dt><dd>merged: mask-fisher, mapping structured, normalise kind" in page
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "https://me:secret@registry.example/")
    assert registry_page("a/b", "3") == "https://registry.example/#/models/a%2Fb/versions/3"
    monkeypatch.chdir("/")
    assert git_commit() is None


def test_tasks_stand_in_one_order(run: Run, tmp_path: Path) -> None:
    turned = {kind: dict(reversed([*paths.items()])) for kind, paths in run.items()}
    other = turned | {"merged": run["merged"], "models": run["models"]}
    pages = []
    for name, arguments in (("one", run), ("other", other)):
        summary = stages.report(**arguments, out=tmp_path / name).summary
        assert [row[0] for row in summary.body] == [*TASKS, "mean"]
        page = (tmp_path / name / "report.html").read_text()
        pages.append(re.sub(r"<dt>written</dt><dd>[^<]+", "", page))
    first, second = (page.partition("What it cost</h2>")[0] for page in pages)
    assert first == second


def test_what_does_not_belong_together_is_refused(run: Run, tmp_path: Path) -> None:
    out = tmp_path / "report"
    merged, models = run["merged"], run["models"]
    for more, message in (
        ({"merged": {}}, "no metrics file of a merged model"),
        ({"merged": {"expert": merged["merged"]}}, "choose another"),
        ({"models": {"other": models["merged"]}}, "no metrics of it"),
        (
            {"experts": {"sst2": run["experts"]["cola"]}},
            "--expert sst2=.*: the metrics of cola, not of",
        ),
        ({"headline": "other"}, "--headline other: no metrics of it"),
        ({"models": {"merged": models["base"]}}, r"merged.json: not the metrics of .*base"),
        ({"fisher": {"sst2": run["fisher"]["cola"]}}, "cola.parquet: not the Fisher that merged"),
        ({"merged": {"merged": tmp_path / "nowhere.json"}, "models": {}}, "nowhere.json"),
    ):
        with pytest.raises(UserError, match=message):
            stages.report(**run | more, out=out)
    assert not out.exists()
    with pytest.raises(UserError, match="would change"):
        stages.report(**run, out=models["merged"] / "report")


def test_a_comparison_has_tables_for_people_and_machines(tmp_path: Path) -> None:
    out, cells = tmp_path / "tables", {}
    for name, row in CELLS.items():
        for method, content in row.items():
            cells[f"{name}/{method}"] = path = tmp_path / f"{name}-{method}.json"
            write_record(path, content)
    outcome = stages.comparison(cells=cells, out=out)
    assert outcome.computed
    assert outcome.summary.header == ["method", "pairs", "all", "mean", "95 % interval", "seconds"]
    assert outcome.summary.results["mine"]["pairs"] == pytest.approx(0.85)
    text = (out / "table.md").read_text()
    assert "| expert | 80.0 | 80.0 | 80.0 | 80.0 |\n" in text
    assert "| mine | 90.0 | 80.0 | 60.0 |\n| expert | 100.0 | 100.0 | 100.0 |\n" in text
    assert "| mine | +" in text
    numbers = json.loads((out / "results.json").read_text())
    assert numbers["sets"]["cola+rte"]["mine"]["rte"]["relative"] == 0.8
    assert {path.name for path in (out / "pictures").iterdir()} == {"methods.svg", "pairs.svg"}
    page = unescape((out / "report.html").read_text())
    assert "2 ways to merge cola, rte and sst2" in page
    assert page.count("mine") > 5
    assert not stages.comparison(cells=cells, out=out).computed
