"""From the files of a folder to rows, and from rows to tokens."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from fmn.errors import UserError
from fmn.tasks import dataset
from fmn.tasks.batches import pad_batch
from fmn.tasks.encoding import encode
from fmn.tasks.rows import check_rows
from fmn.tasks.task import Columns, Task, get_task
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


def test_tokens_are_those_of_the_tokenizer(tokenizer: PreTrainedTokenizerBase) -> None:
    rows = check_rows(pa.table(mrpc_columns(sentence1=["a dog barks", "it"])), MRPC, "here")
    examples = encode(tokenizer, MRPC, rows)
    expected = tokenizer(["a dog barks", "it"], ["c", "d"], padding=True, return_tensors="pt")
    batch = pad_batch(examples, np.arange(2))
    assert batch.inputs.keys() == expected.keys()
    assert all((batch.inputs[name] == expected[name]).all() for name in expected)
    assert examples.labels.tolist() == [0, 1]
    second = encode(tokenizer, MRPC, rows, rows=np.array([1]))
    assert list(second.inputs["input_ids"]) == [[], examples.inputs["input_ids"][1]]
    unlabelled = encode(tokenizer, MRPC, rows.drop_columns(["label"]))
    assert unlabelled.labels.tolist() == [0, 0]


def test_long_pairs_lose_the_end_of_the_longer_text(tokenizer: PreTrainedTokenizerBase) -> None:
    columns = mrpc_columns(sentence1=["dog " * 300, "dog"], sentence2=["cat " * 20, "cat"])
    examples = encode(tokenizer, MRPC, pa.table(columns))
    assert examples.lengths.tolist() == [128, 5]
    cat = tokenizer("cat", add_special_tokens=False)["input_ids"][0]
    assert examples.inputs["input_ids"][0].count(cat) == 20
    short = encode(tokenizer, MRPC.model_copy(update={"max_length": 16}), pa.table(columns))
    assert short.lengths.tolist() == [16, 5]
    texts = ["", "word " * 200_000, "\0\u202e\U0001f600"]  # empty, enormous and odd
    rows = check_rows(pa.table({"sentence": texts, "label": [0, 1, 0]}), SST2, "here")
    assert encode(tokenizer, SST2, rows).lengths.tolist()[:2] == [2, 128]


def test_several_labels_are_zeros_and_ones_and_no_labels_are_zeros(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    task = Task(
        name="topics",
        problem_type="multi_label_classification",
        columns=Columns(text="text"),
        labels=("x", "y", "z"),
    )
    rows = check_rows(pa.table({"text": ["a", "b"], "label": [[0, 2], []]}), task, "here")
    labels = encode(tokenizer, task, rows).labels
    assert (labels.dtype, labels.tolist()) == (np.dtype(np.float32), [[1, 0, 1], [0, 0, 0]])
    assert pad_batch(encode(tokenizer, task, rows), np.arange(2)).labels.shape == (2, 3)
    plain = Task(name="plain", columns=Columns(text="text", label=None))
    examples = encode(tokenizer, plain, check_rows(rows, plain, "here"))
    assert (examples.labels.dtype, examples.labels.tolist()) == (np.dtype(np.int64), [0, 0])
