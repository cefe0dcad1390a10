"""The stages `search` and `compare`."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from sklearn.metrics import f1_score, mean_absolute_error, mean_squared_error, roc_auc_score

from fmn.errors import UserError
from fmn.evaluate.files import read_predictions
from fmn.evaluate.metrics import relative
from fmn.evaluate.stages import EvaluateSettings, evaluate
from fmn.experiments import stages, trial
from fmn.experiments.files import Cell, SearchResult, Source
from fmn.experiments.stages import ComparedSettings, CompareSettings, SearchSettings
from fmn.merge import heads
from fmn.merge import model as merged
from fmn.merge import stages as merge_stages
from fmn.merge.calibrate import calibrated_encoder
from fmn.merge.recipe import Recipe, Search
from fmn.merge.stages import CalibrationSettings, MergeSettings, RealignSettings, RefitSettings
from fmn.models.provenance import rows_tuned_on
from fmn.store import artifacts
from fmn.store.stage import Outcome
from fmn.tasks.task import Columns, get_task, write_task
from tests.conftest import TASKS
from tests.reports import CLASSES, NUMBERS, own_expert, own_task

AVERAGE = ComparedSettings(method="average")
SMALL = SearchSettings(trials=1, rows=8, device="cpu")


def search(
    work: Path,
    out: Path,
    merging: MergeSettings = MergeSettings(),  # noqa: B008
    settings: SearchSettings = SMALL,
    tasks: tuple[str, ...] = TASKS,
    **options: Any,
) -> Outcome[SearchResult]:
    return stages.search(
        experts={task: work / "experts" / task for task in tasks},
        fisher={task: work / "fisher" / f"{task}.parquet" for task in tasks},
        base=work / "base",
        data=work / "data",
        out=out,
        merging=merging,
        settings=settings,
        **options,
    )


def merge(work: Path, out: Path, coefficients: Path | None, **how: Any) -> Recipe:
    """Merge the tiny experts."""
    return merge_stages.merge(
        experts={task: work / "experts" / task for task in TASKS},
        fisher={task: work / "fisher" / f"{task}.parquet" for task in TASKS},
        base=work / "base",
        out=out,
        coefficients=coefficients,
        settings=MergeSettings(**how),
    ).summary


@pytest.mark.parametrize(
    ("how", "ends"),
    [
        ({}, None),
        ({"method": "average"}, (0.5, 2.0)),
        ({"method": "task-arithmetic"}, (0.2, 1.2)),
        ({"method": "ties", "scale": 1.5}, None),
    ],
)
def test_a_merge_takes_the_result(
    tiny_work: Path, tmp_path: Path, how: dict[str, Any], ends: tuple[float, float] | None
) -> None:
    out = tmp_path / "coefficients.json"
    settings = SearchSettings(trials=4, rows=24, device="cpu", scale_range=ends)
    result = search(tiny_work, out, MergeSettings(**how), settings).summary
    assert result.score >= result.uniform == result.trials[0].score
    assert result.score == max(trial.score for trial in result.trials)
    assert sum(result.coefficients.values()) == pytest.approx(len(TASKS))
    method = {name: value for name, value in how.items() if name != "scale"}
    recipe = merge(tiny_work, tmp_path / "merged", out, **method)
    assert (recipe.coefficients, recipe.scale) == (result.coefficients, result.scale)
    assert recipe.search == Search(
        digest=artifacts.digest_file(out), score=result.score, uniform=result.uniform
    )
    if ends is None:  # the scale is that of a merge without coefficients
        assert merge(tiny_work, tmp_path / "plain", None, **how).scale == result.scale > 1


def test_a_second_search_computes_nothing_and_more_trials_go_on(
    tiny_work: Path, tmp_path: Path
) -> None:
    out, done = tmp_path / "coefficients.json", []
    settings = SearchSettings(trials=3, rows=16, device="cpu")
    first = search(tiny_work, out, settings=settings, tasks=TASKS[:2])
    assert first.computed
    elsewhere = settings.model_copy(update={"experiment": "other"})
    assert not search(tiny_work, out, settings=elsewhere, tasks=TASKS[:2]).computed
    more = search(
        tiny_work,
        out,
        settings=settings.model_copy(update={"trials": 5}),
        tasks=TASKS[:2],
        progress=lambda number, total: done.append((number, total)),
    )
    assert done == [(3, 5), (4, 5), (5, 5)]
    assert more.summary.trials[:3] == first.summary.trials
    assert more.summary.study == first.summary.study


def test_validation_data_is_not_read(tiny_work: Path, tmp_path: Path) -> None:
    work = Path(shutil.copytree(tiny_work, tmp_path / "work"))
    for file in (work / "data").rglob("validation*"):
        file.unlink()
    assert search(work, tmp_path / "coefficients.json").computed


def test_an_expert_that_scores_nothing_is_named(tiny_work: Path, tmp_path: Path) -> None:
    settings = SearchSettings(trials=1, rows=1, device="cpu")  # leaves correlations undefined
    with pytest.raises(UserError, match=r"expert \w+: its score is (undefined|0\.000) on 1 rows"):
        search(tiny_work, tmp_path / "coefficients.json", settings=settings)
    assert not (tmp_path / "coefficients.json").exists()


@pytest.mark.parametrize(
    ("how", "settings", "tasks", "message"),
    [
        ({"coefficient": ["sst2=2"]}, SMALL, TASKS, "--coefficient: the search is to find it"),
        ({"method": "auto"}, SMALL, TASKS, "--method auto: coefficients are of one method"),
        ({"scale": 2}, SearchSettings(scale_range=(1, 2)), TASKS, "--scale: the search is to"),
        ({}, SMALL, TASKS[:1], "one expert"),
    ],
)
def test_what_cannot_be_searched_is_refused(
    tiny_work: Path,
    tmp_path: Path,
    how: dict[str, Any],
    settings: SearchSettings,
    tasks: tuple[str, ...],
    message: str,
) -> None:
    with pytest.raises(UserError, match=message):
        search(tiny_work, tmp_path / "c.json", MergeSettings(**how), settings, tasks)
    assert not list(tmp_path.iterdir())


def test_tasks_of_ones_own_are_searched_and_compared(tiny_work: Path, tmp_path: Path) -> None:
    words = ("fine", "dull", "long", "short", "new", "old", "very fine", "very dull")
    index = pa.array(range(8), pa.int32())
    rows: dict[str, Any] = {"text": [f"a {word} film" for word in words], "idx": index}
    sides = {
        CLASSES: (own_task(CLASSES, "f1_macro", "roc_auc", name=CLASSES), [0, 1, 2, 0] * 2),
        NUMBERS: (own_task(NUMBERS, "mse", name=NUMBERS), pa.array([0.5, -1] * 4, pa.float32())),
    }
    experts = {
        name: own_expert(tiny_work, tmp_path, task, {**rows, "label": labels})
        for name, (task, labels) in sides.items()
    }
    base, data, average = tiny_work / "base", tmp_path / "data", ComparedSettings(method="average")
    settings = CompareSettings(methods={"any": average}, device="cpu")
    cell = stages.compare(
        experts=experts, base=base, data=data, out=tmp_path / "cell.json",
        merging=average, settings=settings,
    ).summary  # fmt: skip
    classes, numbers = cell.tasks[CLASSES], cell.tasks[NUMBERS]
    macro = f1_score(classes.labels, classes.predictions, average="macro")
    area = roc_auc_score(classes.labels, classes.scores, multi_class="ovr")
    assert classes.score == pytest.approx((macro + area) / 2)
    error = mean_squared_error(numbers.labels, numbers.predictions)
    of_expert = mean_squared_error(numbers.labels, numbers.expert_predictions)
    assert numbers.relative == pytest.approx(of_expert / error)
    assert (numbers.definition, numbers.scores) == (sides[NUMBERS][0], [])
    result = stages.search(
        experts=experts, data=data, out=tmp_path / "search.json", merging=average,
        settings=SearchSettings(trials=2, rows="all", device="cpu"),
    ).summary  # fmt: skip
    assert {name: entry.expert for name, entry in result.tasks.items()} == pytest.approx(
        {CLASSES: classes.expert, NUMBERS: of_expert}
    )
    assert result.tasks[NUMBERS].uniform == pytest.approx(numbers.relative, rel=1e-4)
    write_task(data / NUMBERS, sides[NUMBERS][0].model_copy(update={"metrics": ("mae",)}))
    again = stages.compare(
        experts=experts, base=base, data=data, out=tmp_path / "cell.json",
        merging=average, settings=settings,
    ).summary  # fmt: skip
    wanted = mean_absolute_error(numbers.labels, numbers.predictions)
    assert again.tasks[NUMBERS].score == pytest.approx(wanted), "another definition"
    bare = sides[NUMBERS][0].model_copy(
        update={"columns": Columns(text="text", label=None), "metrics": ()}
    )
    write_task(data / NUMBERS, bare)
    with pytest.raises(UserError, match="the rows of numbers have no labels to score by"):
        stages.search(experts=experts, data=data, out=tmp_path / "other.json")


def test_a_cell_tries_in_memory_what_the_other_stages_write(
    tiny_work: Path, tmp_path: Path
) -> None:
    work = Path(shutil.copytree(tiny_work, tmp_path / "work"))
    experts = {task: work / "experts" / task for task in TASKS}
    validation = CompareSettings(methods={"any": ComparedSettings(method="average")}, device="cpu")
    train = validation.model_copy(update={"split": "train", "rows": 20})

    def cell(
        name: str,
        settings: CompareSettings,
        texts: Any = None,
        layers: int = 0,
        merging: ComparedSettings = AVERAGE,
    ) -> Outcome[Cell]:
        refit = RefitSettings(texts=texts, own_layers=layers) if texts else None
        return stages.compare(
            experts=experts,
            base=work / "base",
            data=work / "data",
            out=work / f"{name}.json",
            merging=merging.model_copy(update={"realign": refit}),
            settings=settings,
        )

    merge(work, work / "merged", None, method="average")
    data = work / "data"
    for layers in (0, 1):
        how = RealignSettings(texts=40, device="cpu", dtype="float32", own_layers=layers)
        merge_stages.realign(
            work / "merged", experts=experts, data=data, out=work / f"own-{layers}", settings=how
        )
    for model, texts, layers in (("merged", None, 0), ("own-0", 40, 0), ("own-1", 40, 1)):
        tasks = cell(model, validation, texts, layers).summary.tasks
        metrics = work / f"{model}-metrics.json"
        evaluate(work / model, data=data, out=metrics, settings=EvaluateSettings(device="cpu"))
        for task, answered in read_predictions(metrics).items():
            expected = answered.splits["validation"].predicted
            np.testing.assert_allclose(tasks[task].predictions, expected, atol=1e-4)
            score, of_expert = tasks[task].score, tasks[task].expert
            assert tasks[task].relative == relative(answered.task, score, of_expert)
    auto = ComparedSettings(method="auto", device="cpu", dtype="float32")
    for name, settings in (("auto", validation), ("auto-train", train)):
        chosen = cell(name, settings, merging=auto).summary
        assert chosen.auto is not None
        by_hand = ComparedSettings(**chosen.auto.applied(AVERAGE).model_dump())
        assert cell("by-hand", settings, merging=by_hand).summary.tasks == chosen.tasks
    computed = [cell("train", train, texts).computed for texts in ("all", "all", 40)]
    assert computed == [True, False, True]
    for expert in experts.values():  # without which all rows may have been seen
        (expert / artifacts.SIDECAR).unlink()
    with pytest.raises(UserError, match="no training text is left"):
        cell("none", train.model_copy(update={"rows": "all"}), 40)


def test_an_encoder_is_calibrated_before_it_is_tried(tiny_work: Path, tmp_path: Path) -> None:
    experts = {task: tiny_work / "experts" / task for task in ("mrpc", "sst2")}
    data, how = tiny_work / "data", CalibrationSettings(texts=30, target="weights", ridge=1e-6)
    cells = [
        stages.compare(
            experts=experts, base=tiny_work / "base", data=data, out=tmp_path / "cell.json",
            merging=ComparedSettings(method="average", calibrate=calibrate),
            settings=CompareSettings(methods={"any": AVERAGE}, device="cpu", dtype="float32"),
        )
        for calibrate in (None, how)
    ]  # fmt: skip
    assert cells[1].computed
    sources = {
        task: Source(folder, get_task(task), data, "validation", None, 0, "cpu", "float32")
        for task, folder in experts.items()
    }
    loaded = {task: trial.load_expert(source) for task, source in sources.items()}
    examples = {
        task: heads.unlabeled(folder, get_task(task), data, 30, 0, rows_tuned_on(folder))
        for task, folder in experts.items()
    }
    encoder, _ = calibrated_encoder(
        {task: expert.model for task, expert in loaded.items()},
        merged.in_memory(experts, AVERAGE),
        examples,
        settings=how,
        device="cpu",
        dtype="float32",
    )
    for task, expert in loaded.items():
        answers = trial.try_encoder(expert, encoder)
        assert cells[1].summary.tasks[task].predictions == answers.predicted.tolist()
        assert not np.allclose(
            trial.try_encoder(expert, merged.in_memory(experts, AVERAGE)).scores, answers.scores
        )
