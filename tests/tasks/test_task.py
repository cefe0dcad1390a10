"""Definitions of tasks: GLUE's, and those that lie beside their rows."""

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from fmn.errors import UserError
from fmn.store.stage import write_record
from fmn.tasks.metrics import DEFAULT_METRICS, METRICS
from fmn.tasks.task import TASKS, Columns, Task, TaskSettings, get_task, load_task, make_task

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
    [
        ("STS-B", "did you mean 'stsb'"),
        ("translation", "by --dataset, .*tasks are cola, sst2"),
    ],
)
def test_an_unknown_task_is_refused_with_the_names_that_are_known(name: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        get_task(name)


def test_what_is_left_out_has_defaults() -> None:
    for kind, metrics in DEFAULT_METRICS.items():
        labels = () if kind == "regression" else ("a", "b")
        label = "label" if kind else None
        task = Task.model_validate(
            {"name": "t", "problem_type": kind, "columns": Columns(text="x", label=label),
             "labels": labels}
        )  # fmt: skip
        assert task.metrics == metrics
        assert {METRICS[name].higher_is_better for name in metrics} <= {True}
        assert Task.model_validate_json(task.model_dump_json()) == task


def test_a_description_is_read_as_yaml_has_it() -> None:
    settings = TaskSettings.model_validate({"labels": {1: "bad", 2.0: "good", 3: "good"}})
    assert settings.labels == {"1": "bad", "2": "good", "3": "good"}
    assert settings.label_names == ["bad", "good"]
    assert TaskSettings.model_validate({"labels": [1, True]}).labels == ["1", "true"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": []}, "needs two or more labels"),
        ({"problem_type": "regression"}, "a regression task has no labels"),
        ({"metrics": []}, "a task has metrics if it has labels"),
        ({"metrics": ["f1", "f1"]}, "listed twice"),
        ({"metrics": ["pearson"]}, "pearson is not for single_label_classification; choose from"),
        ({"problem_type": "multi_label_classification", "metrics": ["f1"]}, "f1 is not for multi"),
        ({"columns": {"text": "a", "label": None}, "metrics": ["accuracy"]}, "only then"),
        ({"problem_type": None}, "needs a problem type"),
        ({"validation": ["a/b"]}, "must be a name"),
        ({"name": "a/b"}, "name: .*must be a name"),
        ({"lables": ["book"]}, "lables"),
    ],
)
def test_a_definition_that_makes_no_sense_is_refused(change: Any, message: str) -> None:
    with pytest.raises(UserError, match=rf"^task .*: .*{message}"):
        make_task(**(OWN | change))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"metrics": ["acuracy"]}, "did you mean 'accuracy'"),
        ({"metrics": ["f1"], "labels": ["a", "b", "c"]}, "class 1 of two classes, .* f1_macro"),
        ({"metrics": ["mse", "pearson"]}, "less is better of mse, .* metrics of one direction"),
        ({"metrics": ["accuracy"], "columns": {"label": None}}, "metrics need labels"),
        ({"labels": ["a", "a"]}, "'a' is listed twice"),
        ({"labels": ["a", " "]}, "no name"),
        ({"dataset": {"path": "x", "validation_size": 1.5}}, "a share below 1"),
        ({"columns": {"text": "a", "text_pair": "a"}}, "'a' is named twice"),
        (
            {"dataset": {"path": "x", "validation_size": 1, "splits": {"validation": "dev"}}},
            "contradict",
        ),
        ({"max_length": 0}, "greater than or equal to 1"),
    ],
)
def test_a_description_that_makes_no_sense_is_refused(fields: Any, message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        TaskSettings.model_validate(fields)


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
