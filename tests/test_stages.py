"""Stages: files to files, made once, made again when and only when something they depend on changed."""

import shutil
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file, save_file

from fmn.errors import UserError
from fmn.evaluate import bootstrap as intervals
from fmn.evaluate import files as evaluate_files
from fmn.evaluate import stages as evaluate_stages
from fmn.evaluate.stages import EvaluateSettings
from fmn.fisher import stages as fisher_stages
from fmn.merge import stages as merge_stages
from fmn.merge.stages import MergeSettings
from fmn.models import stages as models_stages
from fmn.models.stages import FinetuneSettings
from fmn.registry import stages as registry_stages
from fmn.registry.stages import RegistrySettings
from fmn.report import stages as report_stages
from fmn.store import artifacts
from fmn.store.stage import Outcome, sidecar_path
from fmn.tasks import stages as tasks_stages
from fmn.tasks import task as tasks
from fmn.tasks.dataset import read
from fmn.tasks.stages import DataSettings
from tests.conftest import FISHER, TASKS, TUNING

EVALUATE = EvaluateSettings(device="cpu")


@pytest.fixture
def work(tiny_work: Path, tmp_path: Path) -> Path:
    """A copy of the tiny work folder that a test may change."""
    return Path(shutil.copytree(tiny_work, tmp_path / "work"))


def experts(work: Path) -> dict[str, Path]:
    return {task: work / "experts" / task for task in TASKS}


def fisher_files(work: Path) -> dict[str, Path]:
    return {task: work / "fisher" / f"{task}.parquet" for task in TASKS}


def merge(work: Path, settings: MergeSettings | None = None) -> Outcome:
    return merge_stages.merge(
        experts(work),
        fisher_files(work),
        work / "base",
        work / "merged",
        settings or MergeSettings(),
    )


def run_all(work: Path) -> dict[str, bool]:
    """Every stage with the settings that `tiny_work` was made with, and whether it computed anything."""
    done = (
        {"fetch": models_stages.fetch(str(work.parent / "source"), work / "base")}
        if (work.parent / "source").exists()
        else {}
    )
    for task in TASKS:
        expert = work / "experts" / task
        done[f"data {task}"] = tasks_stages.prepare(
            task, work / "data" / task, DataSettings(source="embedded")
        )
        done[f"finetune {task}"] = models_stages.finetune(
            work / "base", task, work / "data", expert, TUNING
        )
        done[f"fisher {task}"] = fisher_stages.fisher(
            expert, task=task, data=work / "data", out=fisher_files(work)[task], settings=FISHER
        )
        done[f"evaluate {task}"] = evaluate_stages.evaluate(
            expert, [task], work / "data", work / f"{task}.json", EVALUATE
        )
    done["merge"] = merge(work)
    done["evaluate"] = evaluate_stages.evaluate(
        work / "merged", [], work / "data", work / "merged.json", EVALUATE
    )
    done["report"] = report_stages.write_report(
        {task: work / f"{task}.json" for task in TASKS},
        {"merged": work / "merged.json"},
        fisher_files(work),
        work / "report",
        work,
    )
    return {name: outcome.computed for name, outcome in done.items()}


def test_a_second_run_computes_nothing(work: Path) -> None:
    first = run_all(work)
    assert first["merge"]
    assert first["report"]
    assert not any(run_all(work).values())


@pytest.mark.parametrize(
    ("damaged", "again"),
    [
        ("data/sst2/train.parquet", {"data sst2"}),
        ("experts/mrpc/model.safetensors", {"finetune mrpc"}),
        ("fisher/stsb.parquet", {"fisher stsb"}),
        ("merged/encoder/model.safetensors", {"merge"}),
        ("merged/merge.json", {"merge"}),
        ("merged.json", {"evaluate"}),
        ("merged.predictions.parquet", {"evaluate"}),
        ("report/table.md", {"report"}),
    ],
)
def test_a_damaged_output_alone_is_made_again_with_the_same_bytes(
    work: Path, damaged: str, again: set[str]
) -> None:
    run_all(work)
    path = work / damaged
    before = path.read_bytes()
    path.write_bytes(before[:-1] + bytes([before[-1] ^ 1]))
    assert {name for name, computed in run_all(work).items() if computed} == again
    assert path.read_bytes() == before


def test_a_new_setting_makes_what_depends_on_it_again(work: Path) -> None:
    run_all(work)
    assert merge(work, MergeSettings(mapping="paper")).computed
    changed = run_all(work)
    assert {name for name, computed in changed.items() if computed} == {"merge"}, (
        "back to the first bytes"
    )


def test_the_method_average_depends_neither_on_fisher_nor_on_mapping(work: Path) -> None:
    settings = MergeSettings(method="average", mapping="structured")
    assert merge(work, settings).computed
    shutil.rmtree(work / "fisher")
    (work / "fisher").mkdir()
    assert not merge_stages.merge(
        experts(work),
        {},
        work / "base",
        work / "merged",
        MergeSettings(method="average", mapping="paper"),
    ).computed


def test_the_merged_model_says_where_it_comes_from(work: Path) -> None:
    recipe = merge(work).summary
    assert list(recipe["experts"]) == sorted(TASKS)
    assert recipe["experts"]["mrpc"]["digest"] == artifacts.digest_folder(work / "experts" / "mrpc")
    assert recipe["fisher"]["mrpc"]["digest"] == artifacts.digest_file(fisher_files(work)["mrpc"])
    assert (recipe["method"], recipe["mapping"]) == ("mask-fisher", "structured")
    assert "mrpc" in (work / "merged" / "README.md").read_text()


def test_evaluation_puts_the_metrics_into_the_model_card(work: Path) -> None:
    merge(work)
    metrics = evaluate_stages.evaluate(
        work / "merged", [], work / "data", work / "merged.json", EVALUATE
    ).summary
    assert set(metrics["tasks"]) == set(TASKS)
    card = (work / "merged" / "README.md").read_text()
    assert f"{100 * metrics['tasks']['mrpc']['f1']:.1f}" in card
    assert set(metrics["tasks"]["stsb"]) == {
        "pearson",
        "spearmanr",
        "score",
        "examples",
        "interval",
    }


def test_every_metric_has_its_interval_and_the_predictions_lie_beside(work: Path) -> None:
    merge(work)
    metrics = evaluate_stages.evaluate(
        work / "merged", [], work / "data", work / "merged.json", EVALUATE
    ).summary
    for name, entry in metrics["tasks"].items():
        assert set(entry["interval"]) == {*tasks.task(name).metrics, "score"}
        for metric, (low, high) in entry["interval"].items():
            assert low <= entry[metric] <= high
    low, high = metrics["interval"]
    assert low < metrics["score"] < high
    predictions = evaluate_files.read_predictions(work / "merged.json")
    for name, splits in predictions.items():
        assert intervals.score(tasks.task(name), splits) == pytest.approx(
            metrics["tasks"][name]["score"]
        )
        table = read(work / "data", tasks.task(name), "validation")
        np.testing.assert_array_equal(splits["validation"].labels, table["label"].to_numpy())
    assert intervals.compare(predictions, predictions).p_value == 1.0
    shutil.copyfile(work / "merged.predictions.parquet", work / "other.predictions.parquet")
    evaluate_stages.evaluate(
        work / "experts" / "sst2", ["sst2"], work / "data", work / "merged.json", EVALUATE
    )
    shutil.move(work / "other.predictions.parquet", work / "merged.predictions.parquet")
    with pytest.raises(UserError, match="not the predictions"):
        evaluate_files.read_predictions(work / "merged.json")


def test_lost_predictions_are_made_again(work: Path) -> None:
    expert, out = work / "experts" / "stsb", work / "stsb.json"
    evaluate_stages.evaluate(expert, ["stsb"], work / "data", out, EVALUATE)
    before = [path.read_bytes() for path in (out, evaluate_files.predictions_path(out))]
    evaluate_files.predictions_path(out).unlink()
    assert evaluate_stages.evaluate(expert, ["stsb"], work / "data", out, EVALUATE).computed
    assert [path.read_bytes() for path in (out, evaluate_files.predictions_path(out))] == before


def test_mnli_is_scored_on_both_splits(work: Path, tmp_path: Path) -> None:
    folder = tmp_path / "mnli"
    tasks_stages.prepare("mrpc", folder, DataSettings(source="embedded"))
    import pyarrow.parquet as pq

    table = (
        pq.read_table(folder / "train.parquet")
        .slice(0, 40)
        .rename_columns(["premise", "hypothesis", "label", "idx"])
    )
    for split in ("train", "validation_matched", "validation_mismatched"):
        pq.write_table(table, folder / f"{split}.parquet")
    expert = tmp_path / "expert"
    models_stages.finetune(work / "base", "mnli", folder, expert, TUNING)
    entry = evaluate_stages.evaluate(
        expert, ["mnli"], folder, tmp_path / "m.json", EVALUATE
    ).summary["tasks"]["mnli"]
    assert entry["examples"] == entry["examples_mismatched"] == 40
    assert entry["accuracy"] == entry["accuracy_mismatched"] == entry["score"]


def test_data_are_not_read_from_an_address(tmp_path: Path) -> None:
    settings = DataSettings(source="https://user:password@host/data")
    with pytest.raises(UserError, match=r"^data https://host/data: not a folder; name one"):
        tasks_stages.prepare("sst2", tmp_path / "sst2", settings)


def _swap_fisher(work: Path) -> None:
    shutil.copyfile(fisher_files(work)["sst2"], fisher_files(work)["mrpc"])
    sidecar_path(fisher_files(work)["mrpc"]).unlink()


def _other_expert(work: Path) -> None:
    settings = FinetuneSettings(**{**TUNING.model_dump(), "seed": 1})
    models_stages.finetune(
        work / "base", "mrpc", work / "data", work / "experts" / "mrpc", settings
    )


def _no_fisher(work: Path) -> None:
    fisher_files(work)["mrpc"].unlink()


def _rot(work: Path) -> None:
    path = work / "experts" / "mrpc" / "model.safetensors"
    save_file({name: tensor + 1e-3 for name, tensor in load_file(path).items()}, path)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (_swap_fisher, "the Fisher of task sst2, given for mrpc"),
        (_other_expert, "the Fisher of another checkpoint"),
        (_no_fisher, "no such Fisher artifact"),
        (_rot, "not what was written there"),
    ],
)
def test_what_does_not_belong_together_is_not_merged(work: Path, change: object, says: str) -> None:
    assert callable(change)
    change(work)
    with pytest.raises(UserError, match=says):
        merge(work)
    assert not (work / "merged").exists()


def test_a_model_that_is_not_merged_needs_a_task(work: Path) -> None:
    with pytest.raises(UserError, match="--task"):
        evaluate_stages.evaluate(
            work / "experts" / "mrpc", [], work / "data", work / "m.json", EVALUATE
        )


def test_predict_answers_in_the_tasks_own_words(work: Path) -> None:
    merge(work)
    answer = models_stages.predict(work / "merged", "sst2", "a warm and funny film", None)
    assert answer["label"] in ("negative", "positive")
    shares: Mapping[str, float] = answer["probabilities"]
    assert shares.keys() == {"negative", "positive"}
    assert sum(shares.values()) == pytest.approx(1, abs=1e-5)
    assert isinstance(
        models_stages.predict(work / "merged", "stsb", "one text", "another")["score"], float
    )
    with pytest.raises(UserError, match="takes 2 texts"):
        models_stages.predict(work / "merged", "mrpc", "one text", None)
    with pytest.raises(UserError, match="rte"):
        models_stages.predict(work / "merged", "rte", "one text", "another")


@pytest.mark.parametrize(
    "out",
    ["experts", "experts/mrpc", "experts/mrpc/merged", "fisher/mrpc.parquet", "base", "notes", "."],
)
def test_nothing_that_is_read_or_was_not_made_here_is_replaced(
    work: Path, monkeypatch: pytest.MonkeyPatch, out: str
) -> None:
    (work / "notes").mkdir()
    (work / "notes" / "thesis.txt").write_text("years of work")
    monkeypatch.chdir(work)
    before = artifacts.digest_files(work)
    with pytest.raises(UserError, match="--out"):
        merge_stages.merge(
            experts(work), fisher_files(work), work / "base", Path(out), MergeSettings()
        )
    assert artifacts.digest_files(work) == before


def test_a_file_that_was_not_made_here_is_not_replaced(work: Path) -> None:
    for name in ("experts/sst2/config.json", "data/sst2/train.parquet", "notes.txt"):
        path = work / name
        path.touch()
        with pytest.raises(UserError, match="--out"):
            evaluate_stages.evaluate(work / "experts" / "sst2", ["sst2"], path, path, EVALUATE)


def test_metrics_of_another_model_are_not_registered(work: Path) -> None:
    merge(work)
    evaluate_stages.evaluate(work / "merged", [], work / "data", work / "merged.json", EVALUATE)
    evaluate_stages.evaluate(work / "merged", ["sst2"], work / "data", work / "part.json", EVALUATE)
    merge(work, MergeSettings(mapping="paper"))
    for metrics in ("merged.json", "part.json"):
        with pytest.raises(UserError, match="not the metrics"):
            registry_stages.register(
                work / "merged", work / metrics, None, None, RegistrySettings(name="demo")
            )


def test_a_part_of_the_tasks_does_not_change_the_card_and_a_lost_card_comes_back(
    work: Path,
) -> None:
    merge(work)
    evaluate_stages.evaluate(work / "merged", [], work / "data", work / "merged.json", EVALUATE)
    card = work / "merged" / "README.md"
    before = card.read_text()
    evaluate_stages.evaluate(work / "merged", ["sst2"], work / "data", work / "part.json", EVALUATE)
    assert card.read_text() == before
    card.unlink()
    assert not merge(work).computed
    assert card.is_file()


def test_a_report_tells_how_models_were_merged_and_what_the_stages_took(work: Path) -> None:
    run_all(work)
    page = (work / "report" / "report.html").read_text()
    for words in (
        "The model merged with mask-fisher",
        "finetune:",
        "Who owns what",
        "What it cost",
    ):
        assert words in page, words
    found = [
        line.split(",") for line in (work / "report" / "costs.csv").read_text().splitlines()[1:]
    ]
    assert [(stage, name) for stage, name, _ in found] == [
        ("fetch", "base"),
        *((stage, task) for stage in ("data", "finetune", "fisher") for task in sorted(TASKS)),
        ("merge", "merged"),
        *(("evaluate", name) for name in (*sorted(TASKS), "merged")),
    ]
    assert all(float(seconds) > 0 for _, _, seconds in found)
    without = report_stages.write_report({}, {"merged": work / "merged.json"}, {}, work / "other")
    assert without.computed
    assert "mask-fisher" not in (work / "other" / "report.html").read_text()


def test_a_report_is_not_of_other_fisher_information_than_the_merge(work: Path) -> None:
    run_all(work)
    settings = FISHER.model_copy(update={"seed": 1})
    fisher_stages.fisher(
        experts(work)["sst2"],
        task="sst2",
        data=work / "data",
        out=fisher_files(work)["sst2"],
        settings=settings,
    )
    with pytest.raises(
        UserError, match=r"sst2\.parquet: not the Fisher that merged was merged with"
    ):
        report_stages.write_report(
            {}, {"merged": work / "merged.json"}, fisher_files(work), work / "other", work
        )
    assert not (work / "other").exists()
    with pytest.raises(UserError, match="choose another"):
        report_stages.write_report({}, {"expert": work / "merged.json"}, {}, work / "other")


def test_a_clock_is_no_part_of_what_an_output_is(work: Path) -> None:
    run_all(work)
    costs = artifacts.read_costs(work)
    assert costs[work / "merged"][0] == "merge"
    before = artifacts.digest_files(work)
    for out in costs:
        artifacts.write_cost(out, costs[out][0], 1e6)
    assert artifacts.digest_files(work) == before
    assert not any(run_all(work).values())
    assert artifacts.read_costs(work)[work / "merged"] == ("merge", 1e6), (
        "a run that computes nothing keeps the cost"
    )
