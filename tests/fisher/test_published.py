"""Statistics beside an expert are taken if they are the ones that would be computed."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import safetensors.torch

from fmn.errors import UserError
from fmn.fisher import files, stages
from fmn.fisher.published import identity, rows_digest
from fmn.fisher.stages import FisherSettings, GramSettings
from fmn.merge.recipe import MergeSettings, read_recipe
from fmn.merge.stages import merge
from fmn.sources.stages import fetch
from fmn.store.artifacts import digest_folder
from fmn.tasks.dataset import read_split
from tests.folders import WORDS, save, tiny_bert, weights
from tests.models.experts import TEXTS, expert, make_task, write_rows
from tests.pipeline import CPU

LABELS = ["a", "b", "c"]
FISHER = FisherSettings(samples=50, **CPU)
GRAM = GramSettings(samples=50, **CPU)
TRUTH = np.random.default_rng(0).integers(0, 3, len(TEXTS))


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An expert as its author has it, with its statistics beside it."""
    work = tmp_path_factory.mktemp("author")
    folder = expert(work / "expert", 3, names=["b", "c", "a"])
    data = write_rows(work / "data", make_task(LABELS), TRUTH)
    # The author's own copy is aligned too.
    fetch(str(folder), out=work / "aligned", task="own")
    publish(work / "aligned", data, folder)
    return folder


def publish(checkpoint: Path, data: Path, folder: Path) -> None:
    (folder / "fmn").mkdir()
    stages.fisher(checkpoint, task="own", data=data, out=data / "fisher.parquet", settings=FISHER)
    stages.gram(checkpoint, task="own", data=data, out=data / "gram.safetensors", settings=GRAM)
    shutil.copy(data / "fisher.parquet", folder / "fmn")
    shutil.copy(data / "gram.safetensors", folder / "fmn")


@pytest.fixture(scope="module")
def mine(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A user's folder: the rows in another order of labels, and the expert aligned with it."""
    work = tmp_path_factory.mktemp("user")
    order = ["c", "a", "b"]
    write_rows(work / "data", make_task(order), np.array([order.index(LABELS[x]) for x in TRUTH]))
    fetch(str(source), out=work / "expert", task="own", data=work / "data")
    return work


def fisher(work: Path, out: Path, settings: FisherSettings = FISHER) -> files.FisherMetadata:
    how: dict[str, Any] = {"task": "own", "data": work / "data", "out": out}
    metadata: files.FisherMetadata = stages.fisher(
        work / "expert", settings=settings, **how
    ).summary
    return metadata


def values(path: Path) -> np.ndarray:
    return np.concatenate(list(files.read_fisher(path)[0].values()))


def test_an_aligned_copy_has_the_statistics_of_its_source(
    source: Path, mine: Path, tmp_path: Path
) -> None:
    assert digest_folder(mine / "expert") != digest_folder(source)
    assert identity(mine / "expert") == identity(source)
    metadata = fisher(mine, tmp_path / "taken.parquet")
    assert str(metadata.published).startswith("taken from ")
    assert metadata.checkpoint.digest == digest_folder(mine / "expert")
    never = FISHER.model_copy(update={"published": "none"})
    computed = fisher(mine, tmp_path / "computed.parquet", never)
    assert computed.published is None
    np.testing.assert_allclose(
        values(tmp_path / "taken.parquet"), values(tmp_path / "computed.parquet"), rtol=1e-4
    )
    how: dict[str, Any] = {"task": "own", "data": mine / "data"}
    outs = [tmp_path / "taken.gram.safetensors", tmp_path / "computed.gram.safetensors"]
    for out, published in zip(outs, ("same", "none"), strict=True):
        settings = GRAM.model_copy(update={"published": published})
        stages.gram(mine / "expert", out=out, settings=settings, **how)
    matrices: list[Mapping[str, Any]] = [safetensors.torch.load_file(out) for out in outs]
    for name, value in matrices[1].items():
        np.testing.assert_allclose(matrices[0][name], value, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"samples": 40}, "of samples 50, and 40 is asked for"),
        ({"seed": 3}, "of seed 0, and 3 is asked for"),
        ({"estimator": "expected"}, "of estimator empirical, and expected is asked for"),
        ({"stratified": True}, "of stratified False, and True is asked for"),
        ({"dtype": "float64"}, "of dtype float32, and float64 is asked for"),
    ],
)
def test_other_settings_are_computed_and_one_line_says_why(
    changes: dict[str, Any], reason: str, mine: Path, tmp_path: Path
) -> None:
    settings = FISHER.model_copy(update=changes)
    metadata = fisher(mine, tmp_path / "f.parquet", settings)
    assert reason in str(metadata.published)
    assert str(metadata.published).startswith("not taken, but computed: ")
    assert metadata.samples == settings.samples


def test_other_rows_are_computed_unless_any_will_do(mine: Path, tmp_path: Path) -> None:
    order = ["c", "a", "b"]
    write_rows(tmp_path / "data", make_task(order), TRUTH)  # the author's ids, of other names
    shutil.copytree(mine / "expert", tmp_path / "expert")
    assert "of other training rows" in str(fisher(tmp_path, tmp_path / "f.parquet").published)
    settings = FISHER.model_copy(update={"published": "any"})
    metadata = fisher(tmp_path, tmp_path / "g.parquet", settings)
    assert str(metadata.published).startswith("taken from ")
    shutil.rmtree(tmp_path / "data")
    write_rows(tmp_path / "data", make_task(order, max_length=5), (TRUTH + 1) % 3)
    assert "of another max_length" in str(fisher(tmp_path, tmp_path / "h.parquet").published)


def test_statistics_of_other_weights_or_damaged_ones_are_not_taken(
    source: Path, mine: Path, tmp_path: Path
) -> None:
    for number, name in enumerate(
        ("bert.encoder.layer.0.output.dense.weight", "classifier.weight", "classifier.bias")
    ):
        other = tmp_path / f"other{number}"
        shutil.copytree(source, other)
        tensors = weights(other)
        tensors[name].view(-1)[0] += 0.1
        save(other, tensors)
        assert identity(other) != identity(source), name
    copy = Path(shutil.copytree(source, tmp_path / "copy"))
    (copy / "README.md").write_text("another card")
    assert identity(copy) == identity(source)
    vocabulary = copy / "tokenizer.json"
    vocabulary.write_text(vocabulary.read_text().replace("w7", "x7"))
    assert identity(copy) != identity(source)
    work = tmp_path / "work"
    fetch(str(tmp_path / "other0"), out=work / "expert", task="own", data=mine / "data")
    shutil.copytree(mine / "data", work / "data")
    assert "of other weights than the expert's" in str(fisher(work, work / "f.parquet").published)
    (tmp_path / "other1" / "fmn" / "fisher.parquet").write_bytes(b"PAR1")
    fetch(str(tmp_path / "other1"), out=work / "expert", task="own", data=mine / "data")
    assert "not a Fisher artifact" in str(fisher(work, work / "g.parquet").published)


def test_statistics_of_texts_that_were_read_otherwise_are_not_taken(tmp_path: Path) -> None:
    """The same weights and vocabulary, in capital and small letters or in small ones alone."""
    words = (*WORDS, "Fine")
    folders = []
    for is_lower in (False, True):
        folders.append(tiny_bert(tmp_path / f"{is_lower}", words=words, vocab_size=len(words)))
        settings = {"tokenizer_class": "BertTokenizer", "do_lower_case": is_lower}
        (folders[-1] / "tokenizer_config.json").write_text(json.dumps(settings))
    assert identity(folders[0]) != identity(folders[1])
    settings["tokenizer_class"] = "BertTokenizerFast"  # the same by another name
    again = Path(shutil.copytree(folders[1], tmp_path / "again"))
    (again / "tokenizer_config.json").write_text(json.dumps(settings))
    assert identity(again) == identity(folders[1])


def test_the_identity_is_that_of_shards_and_of_a_single_logit(tmp_path: Path) -> None:
    whole, shards = expert(tmp_path / "a", 3), expert(tmp_path / "b", 3, shards="20KB")
    assert len(list(shards.glob("*.safetensors"))) > 1
    assert identity(whole) == identity(shards)
    logit = expert(tmp_path / "logit", 1)
    data = write_rows(tmp_path / "data", make_task(["no", "yes"]), TRUTH % 2)
    (data / "train.parquet").unlink()
    fetch(str(logit), out=tmp_path / "two", task="own", data=data)
    assert weights(tmp_path / "two")["classifier.weight"].shape[0] == 2
    assert identity(logit) == identity(tmp_path / "two")


def test_the_digest_of_rows_knows_neither_columns_nor_files(mine: Path, source: Path) -> None:
    author = source.parent / "data"
    first, second = make_task(LABELS), make_task(["c", "a", "b"])
    rows = read_split(author, first, "train")
    assert rows_digest(first, rows) == rows_digest(
        second, read_split(mine / "data", second, "train")
    )
    renamed = rows.rename_columns(["words", "label"][: rows.num_columns] + rows.column_names[2:])
    columns = first.columns.model_copy(update={"text": "words"})
    assert rows_digest(first.model_copy(update={"columns": columns}), renamed) == rows_digest(
        first, rows
    )
    assert rows_digest(first, rows.slice(1)) != rows_digest(first, rows)
    assert pq.read_table(author / "train.parquet").num_rows == len(TEXTS)


def test_a_merge_takes_the_file_beside_an_expert(mine: Path, source: Path, tmp_path: Path) -> None:
    experts = {"own": mine / "expert"}
    beside = {"own": mine / "expert" / "fmn" / "fisher.parquet"}
    settings = MergeSettings(method="mask-fisher")
    merge(experts=experts, fisher=beside, out=tmp_path / "merged", settings=settings)
    assert read_recipe(tmp_path / "merged").fisher["own"].samples == 50
    other = tmp_path / "other"
    shutil.copytree(mine / "expert", other)
    tensors = weights(other)
    tensors["classifier.weight"][0, 0] += 1
    save(other, tensors)
    (other / "fmn.json").unlink()
    with pytest.raises(UserError, match="of another checkpoint"):
        merge(experts={"own": other}, fisher=beside, out=tmp_path / "x", settings=settings)
