"""Task data: sources, checks, tokens."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from transformers import AutoTokenizer

from fmn.errors import UserError
from fmn.tasks import dataset as data
from fmn.tasks.batches import in_order
from fmn.tasks.task import TASKS, task
from tests.hub_server import Hub


def written(folder: Path, columns: dict[str, Any], split: str = "train") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), folder / f"{split}.parquet")
    return folder


def pair(**changed: Any) -> dict[str, Any]:
    """Two good rows of mrpc, with some columns changed; None takes one out."""
    columns = {
        "sentence1": ["a", "b"],
        "sentence2": ["c", "d"],
        "label": [0, 1],
        "idx": [7, 9],
        **changed,
    }
    return {name: values for name, values in columns.items() if values is not None}


def test_embedded_data_has_exactly_the_hubs_schema(tmp_path: Path) -> None:
    for name in ("sst2", "stsb"):
        one = task(name)
        rows = data.prepare(one, "embedded", tmp_path / name)
        for split in one.splits:
            table = pq.read_table(tmp_path / name / f"{split}.parquet")
            assert table.num_rows == rows[split]
            assert table.column_names == [*one.columns, "label", "idx"]
            assert table.schema.field("label").type == (
                pa.float32() if one.regression else pa.int64()
            )
            assert table.schema.field("idx").type == pa.int32()
            assert table["idx"].to_pylist() == list(range(table.num_rows))


def test_the_same_data_makes_the_same_bytes(tmp_path: Path) -> None:
    for name in ("one", "other"):
        data.prepare(task("rte"), "embedded", tmp_path / name, seed=5)
    data.prepare(task("rte"), str(tmp_path / "one"), tmp_path / "copy")
    files = {
        name: (tmp_path / name / "train.parquet").read_bytes() for name in ("one", "other", "copy")
    }
    assert len(set(files.values())) == 1


def test_a_folder_of_tasks_and_the_folder_of_one_are_read_alike(tmp_path: Path) -> None:
    written(tmp_path / "all" / "mrpc", pair())
    found = data.read(tmp_path / "all", task("mrpc"), "train")
    assert found.equals(data.read(tmp_path / "all" / "mrpc", task("mrpc"), "train"))
    assert found.to_pydict() == pair()


def test_the_hubs_shards_are_read_in_order(tmp_path: Path) -> None:
    for shard in range(2):
        written(tmp_path, pair(idx=[shard, shard]), f"train-0000{shard}-of-00002")
    assert data.read(tmp_path, task("mrpc"), "train")["idx"].to_pylist() == [0, 0, 1, 1]


def test_other_columns_are_left_out_and_types_are_made_exact(tmp_path: Path) -> None:
    columns = pair(
        sentence1=pa.array(["a", "b"], pa.large_string()),
        sentence2=pa.array(["c", "d"]).dictionary_encode(),
        label=pa.array([1, 0], pa.int8()),
        idx=None,
        genre=["x", "y"],
    )
    found = data.read(written(tmp_path, columns), task("mrpc"), "train")
    assert found.schema == data.schema(task("mrpc"))
    assert found.to_pydict() == pair(label=[1, 0], idx=[0, 1])


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (
            {"sentence2": None},
            "no column sentence2; mrpc needs sentence1, sentence2, label and here are sentence1",
        ),
        ({"label": None}, "no column label"),
        ({"sentence1": [1, 2]}, "column sentence1 is of type int64 and must hold text"),
        ({"sentence2": ["a", None]}, "column sentence2 has no value in row 1"),
        (
            {"label": ["no", "yes"]},
            r"is of type string and must hold the ids 0 \(not_equivalent\), 1 \(equivalent\)",
        ),
        ({"label": [0.0, 1.0]}, "is of type double"),
        (
            {"label": [0, 2]},
            r"column label is 2 in row 1; the labels of mrpc are ids: 0 \(not_equivalent\)",
        ),
        ({"label": [None, 1]}, "column label has no value in row 0"),
        ({"label": [-1, -1]}, "-1 in every row, as in GLUE's test splits"),
        ({"idx": ["a", "b"]}, "column idx"),
        ({"sentence1": [], "sentence2": [], "label": [], "idx": []}, "no rows"),
    ],
)
def test_data_that_will_not_do_is_refused_with_its_place(
    changed: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=message) as refused:
        data.read(written(tmp_path, pair(**changed)), task("mrpc"), "train")
    assert str(tmp_path / "train.parquet") in str(refused.value)
    assert "\n" not in str(refused.value)


def test_texts_are_read_without_labels(tmp_path: Path) -> None:
    whole = data.read(written(tmp_path, pair()), task("mrpc"), "train")
    for name, change in (("none", {"label": None}), ("wrong", {"label": [-7] * whole.num_rows})):
        texts = data.read(
            written(tmp_path / name, pair(**change)), task("mrpc"), "train", labelled=False
        )
        assert texts.to_pydict() == whole.select(["sentence1", "sentence2"]).to_pydict()
    with pytest.raises(
        UserError, match="no column sentence2; mrpc needs sentence1, sentence2 and here are"
    ):
        data.read(
            written(tmp_path / "less", pair(sentence2=None)), task("mrpc"), "train", labelled=False
        )


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -0.5, 5.5])
def test_a_similarity_must_be_from_0_to_5(bad: float, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="numbers from 0 to 5"):
        data.read(written(tmp_path, pair(label=[1.0, bad])), task("stsb"), "train")
    assert data.read(written(tmp_path, pair(label=[5, 0])), task("stsb"), "train")[
        "label"
    ].to_pylist() == [5.0, 0.0]


def test_texts_that_are_not_utf_8_or_stand_there_twice_are_refused(tmp_path: Path) -> None:
    texts = pa.Array.from_buffers(
        pa.string(),
        2,
        [None, pa.array([0, 2, 4], pa.int32()).buffers()[1], pa.py_buffer(b"ok\xff\xfe")],
    )
    labels = pa.array([0, 1])
    for columns, says in (
        ({"sentence": texts}, "column sentence holds bytes that are not UTF-8"),
        (
            {"sentence": pa.array([b"a", b"b"])},
            "column sentence is of type binary and must hold text",
        ),
    ):
        table = pa.table({**columns, "label": labels})
        pq.write_table(table, tmp_path / "train.parquet")
        with pytest.raises(UserError, match=says):
            data.read(tmp_path, task("sst2"), "train")
    twice = pa.Table.from_arrays(
        [pa.array(["a", "b"]), labels, labels], names=["sentence", "label", "label"]
    )
    pq.write_table(twice, tmp_path / "train.parquet")
    with pytest.raises(UserError, match="cannot be read as Parquet: Multiple matches"):
        data.read(tmp_path, task("sst2"), "train")


def test_empty_and_enormous_texts_are_texts(tiny_base: Path) -> None:
    columns = {
        "sentence": ["", " ", "a" * 10**6, "word " * 200_000, "\0\u202e\U0001f600"],
        "label": [0, 1, 0, 1, 0],
    }
    table = data.checked(pa.table(columns), task("sst2"), "here")
    lengths = data.tokenize(
        AutoTokenizer.from_pretrained(tiny_base), task("sst2"), table
    ).lengths.tolist()
    assert lengths[:2] == [2, 2]
    assert max(lengths) == 128


def test_missing_and_broken_files_are_said(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"validation\.parquet is missing: write it with `fmn data mrpc`"
    ):
        data.read(tmp_path, task("mrpc"), "validation")
    (tmp_path / "train.parquet").write_bytes(b"nonsense")
    with pytest.raises(UserError, match="cannot be read as Parquet"):
        data.read(tmp_path, task("mrpc"), "train")
    with pytest.raises(UserError, match="no folder"):
        data.prepare(task("mrpc"), str(tmp_path / "nowhere"), tmp_path / "out")


def test_nothing_is_written_where_one_split_is_wrong(tmp_path: Path) -> None:
    written(tmp_path / "in", pair())
    written(tmp_path / "in", pair(label=[0, 9]), "validation")
    with pytest.raises(UserError, match="label is 9"):
        data.prepare(task("mrpc"), str(tmp_path / "in"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_mnli_may_lack_one_of_its_validation_splits_but_not_both(tmp_path: Path) -> None:
    columns = {"premise": ["a"], "hypothesis": ["b"], "label": [2]}
    with pytest.raises(UserError, match="validation_matched or validation_mismatched"):
        data.prepare(task("mnli"), str(written(tmp_path, columns)), tmp_path / "out")
    written(tmp_path, columns, "validation_matched")
    assert data.prepare(task("mnli"), str(tmp_path), tmp_path / "out") == {
        "train": 1,
        "validation_matched": 1,
    }
    assert data.validation_splits(tmp_path, task("mnli")) == ("validation_matched",)


def test_a_digest_follows_the_bytes_of_its_split(tmp_path: Path) -> None:
    written(tmp_path, pair())
    written(tmp_path, pair(), "validation")
    before = data.digests(tmp_path, task("mrpc"), ["train", "validation"])
    written(tmp_path, pair(label=[1, 1]))
    after = data.digests(tmp_path, task("mrpc"), ["train", "validation"])
    assert before["train"] != after["train"]
    assert before["validation"] == after["validation"]
    with pytest.raises(UserError, match="missing"):
        data.digests(tmp_path, task("mrpc"), ["test"])


def prepared_from_hub(
    hub: Hub, home: Path, out: Path, revision: str
) -> subprocess.CompletedProcess[str]:
    """In a process of its own: the Hub's address and caches are read at import."""
    code = (
        "import sys; from pathlib import Path; from fmn import data; from fmn.errors import UserError;"
        "from fmn.tasks.task import task\n"
        "try: print(data.prepare(task('mrpc'), 'hub', Path(sys.argv[1]), revision=sys.argv[2]))\n"
        "except UserError as error: print('refused:', error)"
    )
    command = [sys.executable, "-c", code, str(out), revision]
    return subprocess.run(
        command, env=hub.environment(home), capture_output=True, text=True, check=True
    )


def test_the_hubs_data_set_comes_at_its_revision_quietly(tmp_path: Path) -> None:
    card = """---
configs:
- config_name: mrpc
  data_files:
  - {split: train, path: mrpc/train-*}
  - {split: validation, path: mrpc/validation-*}
---
"""
    for split in ("train", "validation"):
        written(tmp_path / "repo" / "mrpc", pair(), f"{split}-00000-of-00001")
    (tmp_path / "repo" / "README.md").write_text(card)
    with Hub() as hub:
        commit = hub.add("datasets", data.HUB, tmp_path / "repo")
        hub.add("datasets", data.HUB, {"README.md": b"emptied"})
        done = prepared_from_hub(hub, tmp_path / "home", tmp_path / "out", commit)
        assert (done.stdout, done.stderr) == ("{'train': 2, 'validation': 2}\n", "")
        assert data.read(tmp_path / "out", task("mrpc"), "train").to_pydict() == pair()
        refused = prepared_from_hub(hub, tmp_path / "home", tmp_path / "other", "0" * 40)
    assert refused.stdout.startswith("refused: mrpc of nyu-mll/glue at 0000")
    assert refused.stdout.count("\n") == 1
    assert not (tmp_path / "other").exists()


def test_the_hubs_main_is_pinned_to_a_commit_and_followed(tmp_path: Path) -> None:
    card = (
        "---\nconfigs:\n- config_name: sst2\n  data_files:\n  - {split: train, path: t.parquet}\n"
    )
    card += "  - {split: validation, path: t.parquet}\n---\n"
    command = [
        sys.executable,
        "-m",
        "fmn",
        "data",
        "sst2",
        "--source",
        "hub",
        "--out",
        str(tmp_path / "out"),
        "--json",
    ]
    found = []
    with Hub() as hub:
        for text in ("one", "other", "other"):
            folder = tmp_path / text
            pq.write_table(
                pa.table({"sentence": [text], "label": [1], "idx": [0]}),
                folder.with_suffix(".parquet"),
            )
            files = {
                "README.md": card.encode(),
                "t.parquet": folder.with_suffix(".parquet").read_bytes(),
            }
            commit = hub.add("datasets", data.HUB, files)
            environment = {
                **hub.environment(tmp_path / "home"),
                "PYTHONPATH": str(Path(data.__file__).parents[2]),
            }
            done = subprocess.run(
                command, env=environment, capture_output=True, text=True, check=False
            )
            assert not done.stderr
            found.append(json.loads(done.stdout))
            assert found[-1]["revision"] == commit
            assert data.read(tmp_path / "out", task("sst2"), "train")["sentence"].to_pylist() == [
                text
            ]
    assert [one["computed"] for one in found] == [True, True, False]


def test_rows_that_are_not_wanted_have_no_tokens(tiny_base: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_base)
    table = pa.table({"sentence": ["a dog", "the cat barks", "it"], "label": [1, 0, 1]})
    whole = data.tokenize(tokenizer, task("sst2"), table)
    few = data.tokenize(tokenizer, task("sst2"), table, rows=np.array([2, 0]))
    assert few.labels.tolist() == [1, 0, 1]
    for name, values in few.inputs.items():
        assert list(values) == [whole.inputs[name][0], [], whole.inputs[name][2]]


def test_tokens_are_the_tokenizers_own(tiny_base: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_base)
    table = data.checked(pa.table(pair(sentence1=["a dog barks", "it"])), task("mrpc"), "here")
    examples = data.tokenize(tokenizer, task("mrpc"), table)
    expected = tokenizer(["a dog barks", "it"], ["c", "d"], padding=True, return_tensors="pt")
    batch = next(in_order(examples, 2))
    assert batch.inputs.keys() == expected.keys()
    assert all((batch.inputs[name] == expected[name]).all() for name in expected)
    assert examples.labels.dtype == np.int64
    single = data.checked(pa.table({"sentence": ["good"], "label": [1]}), task("sst2"), "here")
    assert len(data.tokenize(tokenizer, task("sst2"), single).inputs["input_ids"][0]) == 3


def test_long_pairs_lose_the_end_of_the_longer_text(tiny_base: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_base)
    columns = pair(sentence1=["dog " * 300, "dog"], sentence2=["cat " * 20, "cat"])
    examples = data.tokenize(
        tokenizer, task("mrpc"), data.checked(pa.table(columns), task("mrpc"), "here")
    )
    assert examples.lengths.tolist() == [128, 5]
    cat = tokenizer("cat", add_special_tokens=False)["input_ids"][0]
    assert examples.inputs["input_ids"][0].count(cat) == 20
    short = data.tokenize(
        tokenizer, task("mrpc"), data.checked(pa.table(columns), task("mrpc"), "here"), 16
    )
    assert short.lengths.tolist() == [16, 5]


def test_real_glue_is_read_as_it_is(glue: Path, tmp_path: Path) -> None:
    for name in ("cola", "mrpc", "stsb", "rte", "wnli", "mnli"):
        one = TASKS[name]
        rows = data.prepare(one, str(glue), tmp_path / name)
        for split in rows:
            given = pq.read_table(glue / name / f"{split}.parquet")
            assert data.read(tmp_path, one, split).equals(
                given.select([*one.columns, "label", "idx"]).combine_chunks()
            )
