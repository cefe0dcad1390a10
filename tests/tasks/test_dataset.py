"""From the files of a folder to rows, and from rows to tokens."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from fmn.errors import UserError
from fmn.tasks import dataset
from fmn.tasks.batches import pad_batch
from fmn.tasks.rows import check_rows
from fmn.tasks.task import get_task
from tests.conftest import ROOT
from tests.hub_server import Hub
from tests.tasks.rows import mrpc_columns, write_split

MRPC, SST2, MNLI = get_task("mrpc"), get_task("sst2"), get_task("mnli")


@pytest.fixture(scope="module")
def tokenizer(tiny_base: Path) -> PreTrainedTokenizerBase:
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(tiny_base)
    return tokenizer


def test_folders_of_tasks_or_of_a_task_and_shards_in_order_are_read(tmp_path: Path) -> None:
    write_split(tmp_path / "all" / "mrpc", mrpc_columns())
    for folder in (tmp_path / "all", tmp_path / "all" / "mrpc"):
        assert dataset.read_split(folder, MRPC, "train").to_pydict() == mrpc_columns()
    for shard in range(2):
        write_split(tmp_path, mrpc_columns(idx=[shard, shard]), f"train-0000{shard}-of-00002")
    assert len(dataset.split_files(tmp_path, MRPC, "train")) == 2
    assert dataset.read_split(tmp_path, MRPC, "train")["idx"].to_pylist() == [0, 0, 1, 1]


def test_missing_and_damaged_files_are_named(tmp_path: Path) -> None:
    message = r"validation\.parquet: no such file; write it with `fmn data mrpc`"
    with pytest.raises(UserError, match=message):
        dataset.read_split(tmp_path, MRPC, "validation")
    (tmp_path / "train.parquet").write_bytes(b"nonsense")
    with pytest.raises(UserError, match=r"train\.parquet: not Parquet"):
        dataset.read_split(tmp_path, MRPC, "train")
    texts = pa.array(["a", "b"])
    twice = pa.Table.from_arrays([texts, texts, texts], names=["sentence", "label", "label"])
    pq.write_table(twice, tmp_path / "train.parquet")
    with pytest.raises(UserError, match="Multiple matches"):
        dataset.read_split(tmp_path, SST2, "train")


def test_one_of_mnlis_validation_splits_suffices(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="validation_mismatched"):
        dataset.validation_splits(tmp_path, MNLI)
    columns = {"premise": ["a"], "hypothesis": ["b"], "label": [2]}
    write_split(tmp_path, columns, "validation_mismatched")
    assert dataset.validation_splits(tmp_path, MNLI) == ("validation_mismatched",)
    assert not dataset.has_split(tmp_path, MNLI, "validation_matched")


def test_glue_comes_from_the_hub_at_its_revision_and_then_from_the_cache(tmp_path: Path) -> None:
    code = """
import sys; from fmn.errors import UserError; from fmn.tasks import dataset, task
try: print(dataset.download_glue(task.get_task("mrpc"), sys.argv[1])[1])
except UserError as error: print(error)"""

    def download(revision: str) -> str:  # a process of its own, as the Hub's address is read once
        environment = hub.environment(tmp_path / "home") | {"PYTHONPATH": str(ROOT)}
        command = [sys.executable, "-c", code, revision]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        assert not done.stderr
        return done.stdout.removesuffix("\n")

    for split in ("train", "validation", "test"):
        write_split(tmp_path / "repo" / "mrpc", mrpc_columns(), f"{split}-00000-of-00001")
    with Hub() as hub:
        commit = hub.add("datasets", dataset.HUB, tmp_path / "repo")
        assert download("main") == commit
        assert not [request for request in hub.requests if "mrpc/test" in request]
        other_commit = hub.add("datasets", dataset.HUB, {"mrpc/train-0.parquet": b""})
        assert [download("main"), download(commit)] == [other_commit, commit]
        assert download("0" * 40).startswith("nyu-mll/glue@0000")
    assert download(commit) == commit, "the Hub is not needed any more"


def test_tokens_are_those_of_the_tokenizer(tokenizer: PreTrainedTokenizerBase) -> None:
    rows = check_rows(pa.table(mrpc_columns(sentence1=["a dog barks", "it"])), MRPC, "here")
    examples = dataset.tokenize(tokenizer, MRPC, rows)
    expected = tokenizer(["a dog barks", "it"], ["c", "d"], padding=True, return_tensors="pt")
    batch = pad_batch(examples, np.arange(2))
    assert batch.inputs.keys() == expected.keys()
    assert all((batch.inputs[name] == expected[name]).all() for name in expected)
    assert examples.labels.tolist() == [0, 1]
    second = dataset.tokenize(tokenizer, MRPC, rows, rows=np.array([1]))
    assert list(second.inputs["input_ids"]) == [[], examples.inputs["input_ids"][1]]
    unlabelled = dataset.tokenize(tokenizer, MRPC, rows.drop_columns(["label"]))
    assert unlabelled.labels.tolist() == [0, 0]


def test_long_pairs_lose_the_end_of_the_longer_text(tokenizer: PreTrainedTokenizerBase) -> None:
    columns = mrpc_columns(sentence1=["dog " * 300, "dog"], sentence2=["cat " * 20, "cat"])
    examples = dataset.tokenize(tokenizer, MRPC, pa.table(columns))
    assert examples.lengths.tolist() == [128, 5]
    cat = tokenizer("cat", add_special_tokens=False)["input_ids"][0]
    assert examples.inputs["input_ids"][0].count(cat) == 20
    short = dataset.tokenize(
        tokenizer, MRPC.model_copy(update={"max_length": 16}), pa.table(columns)
    )
    assert short.lengths.tolist() == [16, 5]
    texts = ["", "word " * 200_000, "\0\u202e\U0001f600"]  # empty, enormous and odd
    rows = check_rows(pa.table({"sentence": texts, "label": [0, 1, 0]}), SST2, "here")
    assert dataset.tokenize(tokenizer, SST2, rows).lengths.tolist()[:2] == [2, 128]
