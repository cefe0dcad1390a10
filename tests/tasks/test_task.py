"""GLUE's tasks as data."""

import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from fmn.errors import UserError
from fmn.tasks.task import TASKS, task

# The columns and label names on the Hub's data card of nyu-mll/glue.
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


def test_all_nine_tasks_have_the_hubs_columns_and_labels() -> None:
    assert {name: (one.columns, one.labels) for name, one in TASKS.items()} == HUB
    assert all(name == one.name for name, one in TASKS.items())


@pytest.mark.parametrize(("name", "outputs"), [("stsb", 1), ("mnli", 3), ("rte", 2)])
def test_the_head_has_an_output_for_each_label_or_one_for_a_score(name: str, outputs: int) -> None:
    assert task(name).num_outputs == outputs
    assert task(name).regression == (name == "stsb")


def test_mnli_is_validated_on_two_splits_and_the_others_on_one() -> None:
    assert task("mnli").splits == ("train", "validation_matched", "validation_mismatched")
    assert {one.splits for one in TASKS.values() if one.name != "mnli"} == {("train", "validation")}


@pytest.mark.parametrize(
    ("wrong", "meant"), [("SST-2", "sst2"), ("STS-B", "stsb"), ("mprc", "mrpc"), ("sst_2", "sst2")]
)
def test_a_misspelt_task_is_met_with_the_right_name(wrong: str, meant: str) -> None:
    with pytest.raises(UserError, match=f"did you mean {meant}"):
        task(wrong)


def test_an_unknown_task_is_met_with_all_names() -> None:
    with pytest.raises(UserError, match="cola, sst2, mrpc"):
        task("translation")


def test_importing_the_tasks_imports_nothing_heavy() -> None:
    code = "import sys, fmn.tasks; print({'torch', 'numpy', 'pyarrow', 'transformers'} & set(sys.modules))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "set()"


def test_real_glue_has_these_columns_and_label_ids(glue: Path) -> None:
    for name, one in TASKS.items():
        for file in sorted((glue / name).glob("*.parquet")):
            table = pq.read_table(file)
            assert file.stem in one.splits
            assert {*one.columns, "label", "idx"} <= set(table.column_names)
            if not one.regression:
                assert set(table["label"].to_pylist()) == set(range(one.num_outputs))
