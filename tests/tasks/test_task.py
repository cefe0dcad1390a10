"""Definitions of tasks: GLUE's, and those that lie beside their rows."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from pydantic import ValidationError

from fmn.errors import UserError
from fmn.store.stage import write_record
from fmn.tasks.task import TASKS, Columns, Task, get_task, load_task

# The columns and label names on the card of the Hub's data set nyu-mll/glue.
HUB = {
    "cola": (("sentence",), ("unacceptable", "acceptable")),
    "sst2": (("sentence",), ("negative", "positive")),
    "mrpc": (("sentence1", "sentence2"), ("not_equivalent", "equivalent")),
    "stsb": (("sentence1", "sentence2"), ()),
    "qqp": (("question1", "question2"), ("not_duplicate", "duplicate")),
    "mnli": (("premise", "hypothesis"), ("entailment", "neutral", "contradiction")),
    "qnli": (("question", "sentence"), ("entailment", "not_entailment")),
    "rte": (("sentence1", "sentence2"), ("entailment", "not_entailment")),
    "wnli": (("sentence1", "sentence2"), ("not_entailment", "entailment")),
}
OWN: dict[str, Any] = {
    "name": "intents",
    "columns": Columns(text="utterance", label="intent"),
    "labels": ("book", "cancel"),
    "metrics": ("f1", "accuracy"),
    "max_length": 64,
}


def test_the_nine_tasks_have_the_hubs_columns_and_labels() -> None:
    assert {name: (task.text_columns, task.labels) for name, task in TASKS.items()} == HUB
    assert all(name == task.name for name, task in TASKS.items())


@pytest.mark.parametrize(("name", "outputs"), [("stsb", 1), ("mnli", 3), ("rte", 2)])
def test_the_head_has_an_output_for_each_label_or_one_for_a_number(name: str, outputs: int) -> None:
    assert get_task(name).num_outputs == outputs
    assert get_task(name).regression == (name == "stsb")


def test_mnli_has_two_validation_splits_and_the_others_one() -> None:
    mnli = get_task("mnli")
    assert mnli.splits == ("train", "validation_matched", "validation_mismatched")
    assert [mnli.suffix(split) for split in mnli.validation] == ["", "_mismatched"]
    others = {task.splits for task in TASKS.values() if task.name != "mnli"}
    assert others == {("train", "validation")}


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("SST-2", r"did you mean sst2\?"),
        ("STS-B", r"did you mean stsb\?"),
        ("mprc", r"did you mean mrpc\?"),
        ("translation", "choose one of cola, sst2, mrpc"),
    ],
)
def test_an_unknown_task_is_refused_with_the_names_that_are_known(name: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        get_task(name)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": ()}, "needs two or more different labels"),
        ({"labels": ("book", "book")}, "needs two or more different labels"),
        ({"problem_type": "regression"}, "a regression task has no labels"),
        ({"metrics": ()}, "metrics"),
        ({"max_length": 0}, "max_length"),
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
        with pytest.raises(UserError, match=rf"task\.json: .*{message}.*`fmn data sst2`"):
            load_task(tmp_path, "sst2")


def test_importing_tasks_imports_nothing_heavy() -> None:
    code = (
        "import sys, fmn.tasks; from fmn.tasks import Task, load_task;"
        "print({'torch', 'pyarrow', 'transformers', 'ruamel.yaml'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_real_glue_has_these_columns_and_label_ids(glue: Path) -> None:
    for name, task in TASKS.items():
        for file in sorted((glue / name).glob("*.parquet")):
            table = pq.read_table(file)
            assert file.stem in task.splits
            assert {*task.text_columns, "label", "idx"} <= set(table.column_names)
            if not task.regression:
                assert set(table["label"].to_pylist()) == set(range(task.num_outputs))
