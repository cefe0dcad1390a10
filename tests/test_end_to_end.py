"""All stages on tiny experts: nothing is computed twice, and nothing that is wrong is used."""

import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import pipeline

from fmn.errors import UserError
from fmn.evaluate.stages import EvaluateSettings, evaluate
from fmn.fisher.stages import fisher
from fmn.merge.stages import MergeSettings, RealignSettings, merge, realign
from fmn.models.stages import finetune
from fmn.registry.stages import RegistrySettings, register
from fmn.report.stages import report
from fmn.rows.stages import DataSettings, data
from fmn.store import artifacts
from fmn.store.stage import Outcome
from tests.conftest import FISHER, TASKS, TUNING
from tests.folders import fill
from tests.projects import OWN_PROFILE, flow, make_own_project, read_rows, repro, write_rows

DATA = DataSettings(source="embedded")
EVALUATE = EvaluateSettings(device="cpu", dtype="float32")
REALIGN = RealignSettings(texts=16, device="cpu")


def experts_of(work: Path) -> dict[str, Any]:
    """What a merge reads."""
    return {
        "experts": {task: work / "experts" / task for task in TASKS},
        "fisher": {task: work / "fisher" / f"{task}.parquet" for task in TASKS},
        "base": work / "base",
    }


def stages(work: Path) -> dict[str, tuple[Path, Callable[..., Outcome]]]:
    """Every stage, in order: where its output lies, and the stage with all arguments but `out`."""
    inputs, rows, merged = experts_of(work), work / "data", work / "merged"
    experts, statistics, base = inputs.values()
    metrics = {task: work / f"{task}.json" for task in TASKS}
    calls: dict[str, tuple[Path, Callable[..., Outcome]]] = {}
    for task in TASKS:
        expert, own = experts[task], dict[str, Any](task=task, data=rows)
        score = partial(evaluate, expert, data=rows, tasks=[task], settings=EVALUATE)
        calls |= {
            f"data {task}": (rows / task, partial(data, task, settings=DATA)),
            f"finetune {task}": (expert, partial(finetune, base, **own, settings=TUNING)),
            f"fisher {task}": (statistics[task], partial(fisher, expert, **own, settings=FISHER)),
            f"evaluate {task}": (metrics[task], score),
        }
    scored, models = {"merged": work / "merged.json"}, {"merged": merged}
    align = partial(realign, merged, experts=experts, data=rows, settings=REALIGN)
    write = partial(report, merged=scored, models=models, experts=metrics, fisher=statistics)
    return calls | {
        "merge": (merged, partial(merge, **inputs)),
        "realign": (work / "realigned", align),
        "evaluate": (scored["merged"], partial(evaluate, merged, data=rows, settings=EVALUATE)),
        "report": (work / "report", write),
    }


def run_all(work: Path) -> set[str]:
    """Call every stage; returns the names of those that computed something."""
    return {name for name, (out, call) in stages(work).items() if call(out=out).computed}


@pytest.fixture(scope="module")
def complete(tiny_work: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A work folder in which every stage has run; not to be changed by a test."""
    work = Path(shutil.copytree(tiny_work, tmp_path_factory.mktemp("complete") / "work"))
    new = {"merge", "realign", "evaluate", "report", *(f"evaluate {task}" for task in TASKS)}
    assert run_all(work) == new
    return work


@pytest.fixture
def work(complete: Path, tmp_path: Path) -> Path:
    """A copy of that folder for a test to change."""
    return Path(shutil.copytree(complete, tmp_path / "work"))


def test_nothing_is_computed_twice(work: Path) -> None:
    assert run_all(work) == set()
    out = work / "merged"
    merge(out=out, **experts_of(work), settings=MergeSettings(mapping="paper"))
    assert run_all(work) == {"merge"}, "the later stages read the same bytes as before"


@pytest.mark.parametrize(
    ("damaged", "stage"),
    [
        ("data/sst2/train.parquet", "data sst2"),
        ("experts/mrpc/model.safetensors", "finetune mrpc"),
        ("fisher/stsb.parquet", "fisher stsb"),
        ("fisher/stsb.parquet.fmn.json", "fisher stsb"),
        ("merged/encoder/model.safetensors", "merge"),
        ("merged/fmn.json", "merge"),
        ("realigned/merge.json", "realign"),
        ("merged.json", "evaluate"),
        ("merged.predictions.parquet", "evaluate"),
        ("report/table.md", "report"),
    ],
)
def test_a_damaged_output_alone_is_computed_again_with_the_same_bytes(
    work: Path, damaged: str, stage: str
) -> None:
    path = work / damaged
    before = path.read_bytes()
    path.write_bytes(before[: len(before) // 2])
    assert run_all(work) == {stage}
    if path.suffix != ".json":  # a sidecar holds the run time
        assert path.read_bytes() == before


def _other_expert(work: Path) -> None:
    settings = TUNING.model_copy(update={"seed": 1})
    expert = work / "experts" / "mrpc"
    finetune(work / "base", task="mrpc", data=work / "data", out=expert, settings=settings)


def _other_merge(work: Path) -> None:
    settings = MergeSettings(mapping="paper")
    merge(out=work / "merged", **experts_of(work), settings=settings)


def _other_fisher(work: Path) -> None:
    settings = FISHER.model_copy(update={"seed": 1})
    expert, out = work / "experts" / "mrpc", work / "fisher" / "mrpc.parquet"
    fisher(expert, task="mrpc", data=work / "data", out=out, settings=settings)


@pytest.mark.parametrize(
    ("change", "stage", "message"),
    [
        (_other_expert, "merge", "of another checkpoint than the expert of mrpc"),
        (_other_expert, "realign", "is not what .*merged was merged from"),
        (_other_merge, "report", r"merged\.json"),
        (_other_fisher, "report", r"mrpc\.parquet: not the Fisher that merged was merged with"),
    ],
)
def test_what_does_not_belong_together_is_refused(
    work: Path, change: Callable[[Path], None], stage: str, message: str
) -> None:
    change(work)
    _, call = stages(work)[stage]
    with pytest.raises(UserError, match=message):
        call(out=work / "new")
    assert not (work / "new").exists()


@pytest.mark.parametrize(
    ("stage", "out"),
    [
        ("finetune sst2", "base"),
        ("finetune sst2", "data"),
        ("fisher sst2", "data/sst2/train.parquet"),
        ("fisher sst2", "experts/sst2/config.json"),
        ("merge", "experts"),
        ("realign", "merged"),
        ("realign", "merged/tasks/new"),
        ("evaluate", "merged/README.md"),
        ("report", "merged"),
        ("report", "merged.json"),
    ],
)
def test_nothing_that_is_read_is_replaced(work: Path, stage: str, out: str) -> None:
    before = artifacts.digest_files(work)
    _, call = stages(work)[stage]
    with pytest.raises(UserError, match="--out"):
        call(out=work / out)
    assert artifacts.digest_files(work) == before


@pytest.mark.parametrize("stage", ["finetune sst2", "fisher sst2", "merge", "evaluate", "report"])
def test_a_full_disk_is_one_line_and_the_next_run_goes_on(
    work: Path, small_disk: Path, stage: str
) -> None:
    whole, call = stages(work)[stage]
    out = small_disk / whole.name
    size = whole.stat().st_size if whole.is_file() else 100_000
    filler = fill(small_disk, size // 3)
    problem = r"(no space left on the disk of| MB free; about) .*; make room"
    with pytest.raises(UserError, match=problem) as caught:
        call(out=out)
    assert "\n" not in str(caught.value)
    assert not out.exists()
    filler.unlink()
    assert call(out=out).computed


@pytest.mark.slow
def test_a_store_on_a_full_disk_registers_once_when_there_is_room(
    work: Path, small_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{small_disk / 'mlflow.db'}")
    settings, metrics = RegistrySettings(name="demo"), work / "merged.json"
    call = partial(register, work / "merged", metrics=metrics, settings=settings)
    for room in (300_000, 2_000_000):  # for a part of MLflow's tables, and of the model's files
        filler = fill(small_disk, room)
        with pytest.raises(UserError, match=r"no space left on the disk of .*; make room"):
            call()
        filler.unlink()
    assert call().summary.version == "1"


def test_a_csv_file_and_two_folders_of_experts_are_merged_scored_and_followed(
    tiny_base: Path, tmp_path: Path
) -> None:
    assert len(OWN_PROFILE.splitlines()) < 25
    project = make_own_project(tmp_path / "project", tiny_base)
    assert "models:/tiny/1" in flow(project)
    assert repro(project) == []

    rows = read_rows(project / "my rows/second.csv")
    classify = pipeline("text-classification", str(project / "models/mood"))
    answers = [answer["label"] for answer in classify([text for text, _ in rows])]
    accuracy = np.mean([answer == mood for answer, (_, mood) in zip(answers, rows, strict=True)])
    assert accuracy > 0.5
    scores = project / "data/tiny/metrics/experts/mood.json"
    scored = json.loads(scores.read_text())["tasks"]["mood"]
    assert (scored["accuracy"], scored["examples"]) == (pytest.approx(accuracy), 30)

    write_rows(project / "my rows/second.csv", rows[:20])
    ran = repro(project, "metrics")
    assert set(ran) == {"data@mood", "fetch@mood", "fisher@mood", "gram", "models", "metrics"}
    assert json.loads(scores.read_text())["tasks"]["mood"]["examples"] == 20
