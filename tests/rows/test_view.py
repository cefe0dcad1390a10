"""What there is to see of tasks."""

import json
from pathlib import Path
from typing import Any

import pytest

from fmn.errors import UserError
from fmn.rows.stages import DataSettings, data
from fmn.rows.view import describe, known_tasks
from fmn.tasks.task import TASKS, TaskSettings, get_task


def settings_of(path: Path, *rows: dict[str, Any], **fields: Any) -> TaskSettings:
    path.write_text(json.dumps(rows))
    return TaskSettings.model_validate({"dataset": {"path": str(path)}, **fields})


def test_own_tasks_stand_after_glues_or_in_their_place(tmp_path: Path) -> None:
    own = {
        "stars": settings_of(tmp_path / "rows.json", labels=["bad", "good"]),
        "sst2": TaskSettings(problem_type="regression"),
    }
    tasks = {task.name: task for task in known_tasks(own)}
    assert list(tasks) == [*TASKS, "stars"]
    assert tasks["stsb"].labels == "a number"
    assert tasks["sst2"].metrics == "pearson, spearmanr"
    assert (tasks["stars"].labels, tasks["stars"].kind) == ("bad, good", "from the data")
    assert tasks["stars"].source == str(tmp_path / "rows.json")


@pytest.mark.parametrize("labels", [["x", "y"], [0.5, 1.5], [["x", "y"], []]])
def test_a_task_is_shown_with_its_first_example(tmp_path: Path, labels: list[Any]) -> None:
    rows = [{"text": f"text {row}", "label": label} for row, label in enumerate(labels * 3)]
    definition = settings_of(tmp_path / "rows.json", *rows)
    view = describe("mine", definition, None, None)
    assert view.example["text"] in [row["text"] for row in rows]
    first = next(row for row in rows if row["text"] == view.example["text"])
    assert view.example["label"] == first["label"]
    data("mine", out=tmp_path / "data" / "mine", definition=definition)
    assert describe("mine", None, None, tmp_path / "data").example == view.example
    assert describe("mine", None, None, tmp_path / "data").task == view.task


def test_glue_is_shown_without_the_hub() -> None:
    view = describe("sst2", None, None, None)
    assert view.task == get_task("sst2")
    assert view.example["label"] in view.task.labels
    assert describe("qqp", None, None, None).example == {}
    assert describe("rte", None, DataSettings(source="embedded"), None).example
    with pytest.raises(UserError, match="task stars: nothing says what it is"):
        describe("stars", None, None, None)
