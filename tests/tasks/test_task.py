"""Definitions of tasks: GLUE's, and those that lie beside their rows."""

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from fmn.errors import UserError
from fmn.store.stage import write_record
from fmn.tasks.task import TASKS, Columns, Task, get_task, load_task

# From the card of the Hub's data set nyu-mll/glue: columns of texts, and label names.
HUB = """
cola sentence unacceptable,acceptable
sst2 sentence negative,positive
mrpc sentence1,sentence2 not_equivalent,equivalent
stsb sentence1,sentence2
qqp question1,question2 not_duplicate,duplicate
mnli premise,hypothesis entailment,neutral,contradiction
qnli question,sentence entailment,not_entailment
rte sentence1,sentence2 entailment,not_entailment
wnli sentence1,sentence2 not_entailment,entailment
"""
OWN: dict[str, Any] = {
    "name": "intents",
    "columns": Columns(text="utterance", label="intent"),
    "labels": ("book", "cancel"),
}


def test_the_nine_tasks_have_the_hubs_columns_and_labels() -> None:
    lines = [
        " ".join((name, ",".join(task.text_columns), ",".join(task.labels))).strip()
        for name, task in TASKS.items()
    ]
    assert lines == HUB.strip().splitlines()
    assert all(name == task.name for name, task in TASKS.items())
    outputs = {name: task.num_outputs for name, task in TASKS.items()}
    assert outputs == dict.fromkeys(TASKS, 2) | {"stsb": 1, "mnli": 3}
    assert [name for name, task in TASKS.items() if task.regression] == ["stsb"]
    mnli = get_task("mnli")
    suffixes = {split: mnli.suffix(split) for split in mnli.validation}
    assert suffixes == {"validation_matched": "", "validation_mismatched": "_mismatched"}


@pytest.mark.parametrize(
    ("name", "message"),
    [("STS-B", "did you mean 'stsb'"), ("translation", "tasks are cola, sst2, mrpc")],
)
def test_an_unknown_task_is_refused_with_the_names_that_are_known(name: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        get_task(name)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": ()}, "needs two or more different labels"),
        ({"problem_type": "regression"}, "a regression task has no labels"),
        ({"metrics": ()}, "metrics"),
        ({"lables": ("book",)}, "lables"),
    ],
)
def test_a_definition_that_makes_no_sense_is_refused(change: Any, message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        Task(**(OWN | change))


def test_a_definition_is_read_where_its_rows_lie(tmp_path: Path) -> None:
    task = Task(**OWN)
    folder = tmp_path / "intents"
    folder.mkdir()
    write_record(folder / "task.json", task)
    assert load_task(tmp_path, "intents") == load_task(folder, "intents") == task
    with pytest.raises(UserError, match=r"task\.json: defines the task intents, not sst2"):
        load_task(folder, "sst2")
    assert load_task(tmp_path, "sst2") == get_task("sst2")


def test_a_damaged_definition_is_refused_by_name(tmp_path: Path) -> None:
    for content, message in (
        ("{", "not JSON"),
        ("{}", "name is missing"),
        ('{"name": "sst2", "columns": {"text": 3}}', "columns.text is 3"),
    ):
        (tmp_path / "task.json").write_text(content)
        with pytest.raises(UserError, match=rf"task\.json: .*{message}.*`fmn data`"):
            load_task(tmp_path, "sst2")
