"""The generator of the miniature GLUE, and the rows in the checkout."""

import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pandas as pd
import pyarrow.parquet as pq
import pytest

from fmn.tasks.task import get_task
from tests.conftest import ROOT

FOLDER = ROOT / "data" / "miniature_glue"
NAMES = ("cola", "sst2", "mrpc", "stsb", "rte")
SPLITS = ("train", "validation")
ODD = r"[\[\]{}<>|/=]|  |\ba [aeio]|\ban [^aeiou]"  # no character or article of a sentence

TOPICS = {split: FOLDER / "topics" / f"{split}.csv" for split in ("train", "dev")}


def texts(name: str, split: str) -> list[tuple[str, ...]]:
    """The one or two texts of each row in the checkout."""
    table = pq.read_table(FOLDER / name / f"{split}.parquet")
    columns = [table[column].to_pylist() for column in get_task(name).text_columns]
    return list(zip(*columns, strict=True))


def test_the_rows_in_the_checkout_are_those_that_the_generator_writes(tmp_path: Path) -> None:
    for seed in ("0", "1"):
        command = [sys.executable, str(FOLDER / "generate.py"), "--out", str(tmp_path / seed)]
        subprocess.run([*command, "--seed", seed], check=True)
    for file in (f"{name}/{split}.parquet" for name in NAMES for split in SPLITS):
        rows = pq.read_table(FOLDER / file)
        assert pq.read_table(tmp_path / "0" / file).equals(rows)
        assert not pq.read_table(tmp_path / "1" / file).equals(rows)
    for path in TOPICS.values():
        written = [tmp_path / seed / "topics" / path.name for seed in ("0", "1")]
        assert [file.read_bytes() == path.read_bytes() for file in written] == [True, False]


@pytest.mark.parametrize("name", NAMES)
def test_validation_shares_no_sentence_with_training_and_has_words_of_its_own(name: str) -> None:
    rows = [texts(name, split) for split in SPLITS]
    assert all(len(set(split)) == len(split) for split in rows), "no row occurs twice"
    train, validation = ({text for row in split for text in row} for split in rows)
    assert not train & validation
    words = [set(re.findall("[a-z]+", " ".join(each).lower())) for each in (train, validation)]
    assert len(words[1] - words[0]) > 10
    is_review = name == "sst2"
    for text in train:
        assert not re.search(ODD, text), text
        assert re.fullmatch(r"[a-z].* \. " if is_review else r"[A-Z0-9].*[.?]", text), text
        assert is_review or not re.search(r" [.,?]\B", text), text


@pytest.mark.parametrize("name", NAMES)
def test_labels_are_balanced(name: str) -> None:
    for split in SPLITS:
        labels = pq.read_table(FOLDER / name / f"{split}.parquet")["label"].to_pylist()
        if name == "stsb":
            assert 0.0 <= min(labels) < 1.0 < max(labels) == 5.0
        else:
            assert min(Counter(labels).values()) > 0.35 * len(labels)
            assert set(labels) == {0, 1}


def test_topics_are_headlines_with_the_names_of_five_labels() -> None:
    splits = [pd.read_csv(path) for path in TOPICS.values()]
    for split in splits:
        assert list(split) == ["headline", "topic"]
        assert split["headline"].is_unique
        shares = split["topic"].value_counts(normalize=True)
        assert set(shares.index) == {"sports", "science", "cooking", "travel", "money"}
        assert shares.between(0.17, 0.23).all()
        assert not split["headline"].str.contains(ODD).any()
        assert split["headline"].str.match(r"[A-Z]").all()
    assert not set(splits[0]["headline"]) & set(splits[1]["headline"])
