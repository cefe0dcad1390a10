"""A model is served only if it answers as it was evaluated."""

import shutil
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from fmn.errors import UserError
from fmn.evaluate.files import predictions_path, read_metrics
from fmn.evaluate.stages import EvaluateSettings, evaluate
from fmn.registry import tracking
from fmn.registry.check import Serve, check_served, same
from fmn.tasks.rows import schema
from fmn.tasks.task import Columns, Task, get_task, write_task
from tests.conftest import TASKS
from tests.kinds import TASKS as KINDS
from tests.kinds import TEXTS, images, merged_model
from tests.registry.conftest import Merged, merge_and_evaluate

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:mlflow")

DEFINITIONS = {name: get_task(name) for name in TASKS}
COLUMNS = Columns(text="text")
COLOUR = Task(name="colour", columns=COLUMNS, labels=("red", "green", "blue"))
TAGS = COLOUR.model_copy(update={"problem_type": "multi_label_classification", "threshold": 0.4})
PRICE = COLOUR.model_copy(update={"problem_type": "regression", "labels": ()})


def answer(scores: list[float], *labels: str) -> dict[str, Any]:
    shares = dict(zip(COLOUR.labels, scores, strict=True))
    return {"labels": [*labels], "score": max(scores), "probabilities": shares}


CLOSE = [0.4, 0.40005, 0.19995]
RED = answer([0.7, 0.2, 0.1], "red")
BOTH = answer([0.9, 0.1, 0.5], "red", "blue")


@pytest.mark.parametrize(
    ("task", "served", "expected", "is_same"),
    [
        (COLOUR, RED, RED, True),
        (COLOUR, answer([0.69995, 0.20005, 0.1], "red"), RED, True),
        (COLOUR, answer([0.6998, 0.2002, 0.1], "red"), RED, False),
        (COLOUR, RED | {"labels": ["green"]}, RED, False),
        # A label may differ only where two are as probable, or one of several at the threshold.
        (COLOUR, answer(CLOSE, "green"), answer(CLOSE, "red"), True),
        (COLOUR, answer(CLOSE, "green"), answer(CLOSE, "blue"), False),
        (COLOUR, RED | {"probabilities": {"LABEL_0": 0.7}}, RED, False),
        (TAGS, BOTH, BOTH, True),
        (TAGS, answer([0.1, 0.1, 0.1]), answer([0.1, 0.1, 0.1]), True),
        (TAGS, BOTH, BOTH | {"labels": ["red"]}, False),
        (TAGS, answer([0.9, 0.1, 0.40005], "red", "blue"), answer([0.9, 0.1, 0.4], "red"), True),
        (TAGS, answer([0.9, 0.1, 0.39995], "red"), answer([0.9, 0.1, 0.4], "red", "blue"), True),
    ],
)
def test_scores_may_differ_by_rounding_and_labels_where_that_decides(
    task: Task, served: dict[str, Any], expected: dict[str, Any], is_same: bool
) -> None:
    assert same(task, served, expected) == is_same


@pytest.mark.parametrize(
    ("value", "expected", "is_same"),
    [(0.5, 0.50009, True), (0.5, 0.5002, False), (800, 800.07, True), (-800, -800.1, False)],
)
def test_a_value_may_differ_by_rounding(value: float, expected: float, is_same: bool) -> None:
    served, wanted = ({"labels": [], "score": x, "probabilities": {}} for x in (value, expected))
    assert same(PRICE, served, wanted) == is_same


def serve(model: Path, folder: Path, tasks: Mapping[str, Task] = DEFINITIONS) -> Serve:
    """A merged model as it is served, without MLflow's store."""
    from fmn.registry.served import MergedModel

    tracking.pack(model, tasks, folder)
    loaded = MergedModel()
    context: Any = SimpleNamespace(artifacts={"merged": str(folder)})
    loaded.load_context(context)
    return lambda table, task, **more: loaded.predict(context, table, {"task": task, **more})


@pytest.fixture(scope="module")
def own(merged: Merged, tmp_path_factory: pytest.TempPathFactory) -> Serve:
    """The merged model, as it is served."""
    return serve(merged.model, tmp_path_factory.mktemp("own") / "packed")


def check(serve: Serve, merged: Merged, data: Path | None, metrics: Path | None = None) -> None:
    file = metrics or merged.metrics
    check_served(serve, merged.model, file, read_metrics(file), DEFINITIONS, data)


def test_a_model_that_answers_as_evaluated_passes(
    own: Serve, merged: Merged, tiny_work: Path
) -> None:
    check(own, merged, tiny_work / "data")
    check(own, merged, None)


def test_a_model_that_was_evaluated_in_bfloat16_passes(
    own: Serve, merged: Merged, tiny_work: Path, tmp_path: Path
) -> None:
    half = EvaluateSettings(device="cpu", dtype="bfloat16")
    metrics = tmp_path / "half.json"
    evaluate(merged.model, data=tiny_work / "data", out=metrics, settings=half)
    check(own, merged, tiny_work / "data", metrics)


def test_another_model_is_refused_with_its_task_and_text(
    merged: Merged, tiny_work: Path, tmp_path: Path
) -> None:
    other = merge_and_evaluate(tiny_work, tmp_path, "ties")
    served = serve(other.model, tmp_path / "packed")
    for data in (tiny_work / "data", None):
        place = "validation row [0-9]+" if data else "the text '.*'"
        problem = f"{place}: the served model answers .*, in evaluation it was .*; evaluate it"
        with pytest.raises(UserError, match=f"^{merged.model}: task (mrpc|sst2|stsb), {problem}"):
            check(served, merged, data)


def test_a_task_without_predictions_is_compared_on_sentences(
    own: Serve, merged: Merged, tiny_work: Path, tmp_path: Path
) -> None:
    metrics, texts = tmp_path / "metrics.json", []
    shutil.copy(merged.metrics, metrics)
    table = pq.read_table(predictions_path(merged.metrics))
    others = table.filter(pc.not_equal(table["task"], "sst2"))
    pq.write_table(others, predictions_path(metrics))

    def watched(table: pd.DataFrame, task: str) -> pd.DataFrame:
        texts.append((task, table["text"].iloc[0]))
        return own(table, task)

    check(watched, merged, tiny_work / "data", metrics)
    assert [task for task, text in texts if text == "A warm and funny film."] == ["sst2"]


def test_other_rows_than_the_metrics_are_of_are_refused(
    own: Serve, merged: Merged, tiny_work: Path, tmp_path: Path
) -> None:
    data = Path(shutil.copytree(tiny_work / "data", tmp_path / "data"))
    file = data / "mrpc" / "validation.parquet"
    pq.write_table(pq.read_table(file).slice(1), file)
    with pytest.raises(UserError, match=f"{file}: not the rows of mrpc that the metrics are of"):
        check(own, merged, data)


# ---------------------------------------------------------------------------------------------
# Other kinds of tasks


Kind = tuple[Path, dict[str, Task], Serve]


def kind(folder: Path, *names: str, seed: int = 0) -> Kind:
    """Merged tasks of `tests.kinds`: the folder, their definitions, and the model as served."""
    tasks = {name: KINDS[name] for name in names}
    if len(tasks) == 1:
        tasks["other"] = KINDS[names[0]].model_copy(update={"name": "other"})
    model = merged_model(folder, tasks, seed)
    return model, tasks, serve(model, folder / "packed", tasks)


@pytest.mark.parametrize("names", [["mood", "ner", "similar"], ["flowers"], ["chat"], ["sums"]])
def test_every_kind_is_served_as_the_merged_model_answers_and_another_model_is_refused(
    names: list[str], tmp_path: Path
) -> None:
    model, tasks, own = kind(tmp_path / "own", *names, seed=36)
    _, _, other = kind(tmp_path / "other", *names, seed=32)
    no_metrics: Any = None
    check_served(own, model, tmp_path / "none.json", no_metrics, tasks, None)
    for name, task in tasks.items():
        with pytest.raises(UserError, match=f"task {name}, .*: the served model answers"):
            check_served(other, model, tmp_path / "none.json", no_metrics, {name: task}, None)


@pytest.mark.parametrize(
    ("served", "expected", "tolerance", "is_same"),
    [
        (["O", "B-PER"], ["O", "B-PER"], 1e-4, True),
        ([None, "B-PER"], ["O", "B-PER"], 1e-4, True),
        (["O", "B-LOC"], ["O", "B-PER"], 1e-4, False),
        (["O", "B-LOC"], ["O", "B-PER"], 0.05, True),
        (["B-LOC", "B-LOC"], ["O", "B-PER"], 0.05, False),
    ],
)
def test_labels_of_words_are_the_same_but_for_rounding_in_half_precision(
    served: list[str], expected: list[str], tolerance: float, is_same: bool
) -> None:
    assert same(KINDS["ner"], {"labels": served}, {"labels": expected}, tolerance) == is_same


def test_what_was_evaluated_is_what_is_served(tmp_path: Path) -> None:
    split = [text.split() for text in TEXTS]
    tags: dict[str, Any] = {"tokens": split, "label": [[0] * len(words) for words in split]}
    words: dict[str, Any] = {"text": TEXTS, "text_pair": TEXTS[::-1], "label": [0.1, 0.9, 0.4, 0.7]}
    pictures: dict[str, Any] = {"image": images(3), "label": [0, 1, 2]}
    for name, columns in (("similar", words), ("flowers", pictures), ("ner", tags)):
        model, tasks, own = kind(tmp_path / name, name)
        for task in tasks.values():
            folder = tmp_path / name / "data" / task.name
            folder.mkdir(parents=True)
            write_task(folder, task)
            rows = pa.table({**columns, "idx": range(len(columns["label"]))}).cast(schema(task))
            pq.write_table(rows, folder / "validation.parquet")
        metrics = tmp_path / name / "metrics.json"
        data, cpu = tmp_path / name / "data", EvaluateSettings(device="cpu")
        evaluate(model, data=data, out=metrics, settings=cpu)
        check_served(own, model, metrics, read_metrics(metrics), tasks, data)
        _, _, other = kind(tmp_path / f"{name} too", name, seed=5)
        with pytest.raises(UserError, match=r"validation row [0-3]: the served model answers"):
            check_served(other, model, metrics, read_metrics(metrics), tasks, data)
