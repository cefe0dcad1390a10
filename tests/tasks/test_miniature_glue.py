"""The generator of the miniature GLUE, and the rows in the checkout."""

import importlib
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from random import Random
from typing import Any

import pyarrow.parquet as pq
import pytest

from fmn.tasks.task import get_task
from tests.conftest import ROOT

FOLDER = ROOT / "data" / "miniature_glue"
NAMES = ("cola", "sst2", "mrpc", "stsb", "rte")


@pytest.fixture(scope="module")
def generate() -> Any:
    """The script, as a module."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(FOLDER)
        return importlib.import_module("generate")


def run(out: Path, *options: str) -> None:
    command = [sys.executable, str(FOLDER / "generate.py"), "--out", str(out), *options]
    subprocess.run(command, check=True)


def read(folder: Path, name: str, split: str) -> Any:
    return pq.read_table(folder / name / f"{split}.parquet")


def texts(name: str, split: str) -> set[str]:
    table = read(FOLDER, name, split)
    return {text for column in get_task(name).text_columns for text in table[column].to_pylist()}


def test_the_rows_in_the_checkout_are_those_that_the_generator_writes(tmp_path: Path) -> None:
    run(tmp_path / "seed 0")
    run(tmp_path / "seed 1", "--seed", "1")
    for name in NAMES:
        for split in ("train", "validation"):
            rows = read(FOLDER, name, split)
            assert read(tmp_path / "seed 0", name, split).equals(rows)
            assert not read(tmp_path / "seed 1", name, split).equals(rows)


@pytest.mark.parametrize("name", NAMES)
def test_validation_shares_no_sentence_with_training_and_has_words_of_its_own(name: str) -> None:
    assert not texts(name, "train") & texts(name, "validation")
    train, validation = (
        set(re.findall(r"[a-z]+", " ".join(texts(name, split)).lower()))
        for split in ("train", "validation")
    )
    assert len(validation - train) > 10


@pytest.mark.parametrize("name", NAMES)
def test_labels_are_valid_and_balanced_and_no_row_occurs_twice(name: str) -> None:
    for split in ("train", "validation"):
        table = read(FOLDER, name, split)
        columns = [table[column].to_pylist() for column in get_task(name).text_columns]
        assert len(set(zip(*columns, strict=True))) == table.num_rows
        labels = table["label"].to_pylist()
        if name == "stsb":
            assert 0.0 <= min(labels) < 1.0
            assert max(labels) == 5.0
            assert len(set(labels)) > 15
        else:
            assert set(labels) == {0, 1}
            assert min(Counter(labels).values()) > 0.35 * len(labels)


@pytest.mark.parametrize("name", NAMES)
def test_sentences_are_well_formed_and_short(name: str) -> None:
    is_review = name == "sst2"
    for text in texts(name, "train"):
        assert not re.search(r"[\[\]{}<>|/=]|  ", text), text
        assert is_review or not re.search(r" [.,?]\B", text), text
        assert re.fullmatch(r"[a-z].* \. " if is_review else r"[A-Z0-9].*[.?]", text), text
        assert not re.search(r"\ba [aeio]|\ban [^aeiou]", text), text
        assert len(text.split()) <= 25


def test_training_never_has_a_word_that_is_kept_for_validation(generate: Any) -> None:
    choice = generate.Choice(Random(0), all_words=False)
    cities = generate.words.CITIES.split()
    drawn = {str(choice.words(generate.words.CITIES)[0]) for _ in range(2000)}
    assert drawn == set(cities) - set(cities[6::7])


@pytest.mark.parametrize(
    ("word", "form", "result"),
    [
        ("apple", "a", "an apple"),
        ("uniform", "a", "a uniform"),
        ("goose", "s", "geese"),
        ("cherry", "s", "cherries"),
        ("wash", "s", "washes"),
        ("carry", "ed", "carried"),
        ("play", "ed", "played"),
        ("drive", "ed", "drove"),
        ("drive", "en", "driven"),
        ("drop", "ing", "dropping"),
        ("write", "ing", "writing"),
        ("buy", "", "buy"),
    ],
)
def test_words_inflect(generate: Any, word: str, form: str, result: str) -> None:
    assert format(generate.Word(word), form) == result


def test_a_template_makes_its_choices_and_fills_its_slots(generate: Any) -> None:
    choice = generate.Choice(Random(0), all_words=True)
    template, slots = "[the|{w:a}] [[very |]old ]{w} , {w:s}.", {"w": generate.Word("owl")}
    starts, middles = ("The", "An owl"), ("very old owl", "old owl")
    sentences = {choice.fill(template, slots) for _ in range(200)}
    assert sentences == {f"{start} {middle}, owls." for start in starts for middle in middles}


def test_praise_and_blame_share_no_word(generate: Any) -> None:
    words = generate.words
    for praise, blame in (
        (words.GOOD, words.BAD),
        (words.VIRTUES, words.VICES),
        (words.LIKE, words.DISLIKE),
    ):
        assert not set(praise.split()) & set(blame.split())
