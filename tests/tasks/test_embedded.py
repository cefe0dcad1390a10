"""The miniature GLUE that fmn writes itself."""

import re
import subprocess
import sys
from collections import Counter
from random import Random

import pytest

from fmn.errors import UserError
from fmn.store.artifacts import canonical, digest_bytes
from fmn.tasks import vocabulary
from fmn.tasks.embedded import HELD_OUT, SIZES, Draw, Row, Word, generate, scene
from fmn.tasks.task import task

Splits = dict[str, list[Row]]


@pytest.fixture(scope="module", params=list(SIZES))
def made(request: pytest.FixtureRequest) -> tuple[str, Splits]:
    return request.param, generate(task(request.param))


def texts(rows: list[Row]) -> set[str]:
    return {text for pair, _ in rows for text in pair}


def test_the_five_tasks_have_the_stated_rows_without_repetition(made: tuple[str, Splits]) -> None:
    name, splits = made
    assert {split: len(rows) for split, rows in splits.items()} == {
        "train": SIZES[name].train,
        "validation": SIZES[name].validation,
    }
    assert all(len({pair for pair, _ in rows}) == len(rows) for rows in splits.values())
    assert {len(pair) for rows in splits.values() for pair, _ in rows} == {len(task(name).columns)}


def test_validation_shares_no_sentence_with_training_and_has_words_of_its_own(
    made: tuple[str, Splits],
) -> None:
    _, splits = made
    assert not texts(splits["train"]) & texts(splits["validation"])
    train, validation = (
        set(re.findall(r"[a-z]+", " ".join(texts(splits[split])).lower()))
        for split in ("train", "validation")
    )
    assert len(validation - train) > 10


def test_labels_are_valid_and_balanced(made: tuple[str, Splits]) -> None:
    name, splits = made
    for rows in splits.values():
        labels = [label for _, label in rows]
        if task(name).regression:
            assert 0.0 <= min(labels) < 1.0
            assert max(labels) == 5.0
            assert len(set(labels)) > 15
        else:
            shares = [number / len(rows) for number in Counter(labels).values()]
            assert set(labels) == {0.0, 1.0}
            assert min(shares) > 0.35


def test_sentences_are_well_formed_and_short(made: tuple[str, Splits]) -> None:
    name, splits = made
    for text in texts(splits["train"]):
        assert not re.search(
            r"[\[\]{}<>|/=]|  | [.,?]\B" if name != "sst2" else r"[\[\]{}<>|/=]|  ", text
        ), text
        assert re.fullmatch(r"[a-z].* \. " if name == "sst2" else r"[A-Z0-9].*[.?]", text), text
        assert len(text.split()) <= 25


def test_only_unacceptable_sentences_break_the_article_rule(made: tuple[str, Splits]) -> None:
    _, splits = made
    for text in texts(splits["train"]):
        assert not re.search(r"\ba [aeio]", text), text
        assert not re.search(r"\ban [^aeiou]", text), text


@pytest.mark.parametrize("name", list(SIZES))
def test_the_same_seed_makes_the_same_rows_in_another_process(name: str) -> None:
    code = (
        "import sys; from fmn.store.artifacts import *; from fmn.tasks.embedded import generate; from fmn.tasks.task import task;"
        "print(digest_bytes(canonical(generate(task(sys.argv[1]), 3))))"
    )
    made = subprocess.run(
        [sys.executable, "-c", code, name], capture_output=True, text=True, check=True
    )
    assert made.stdout.strip() == digest_bytes(canonical(generate(task(name), 3)))


def test_another_seed_makes_other_rows() -> None:
    assert generate(task("sst2"), 0)["train"] != generate(task("sst2"), 1)["train"]


def test_a_task_that_is_not_embedded_is_refused_with_the_ones_that_are() -> None:
    with pytest.raises(UserError, match=r"cola.*--source hub"):
        generate(task("mnli"))


def test_training_never_draws_a_held_out_word() -> None:
    draw = Draw(Random(0), whole=False)
    held_out = vocabulary.CITIES.split()[HELD_OUT - 1 :: HELD_OUT]
    drawn = {str(draw.words(vocabulary.CITIES)[0]) for _ in range(2000)}
    assert drawn == set(vocabulary.CITIES.split()) - set(held_out)


@pytest.mark.parametrize(
    ("word", "form", "result"),
    [
        ("apple", "a", "an apple"),
        ("uniform", "a", "a uniform"),
        ("ugly", "a", "an ugly"),
        ("goose", "s", "geese"),
        ("cherry", "s", "cherries"),
        ("couch", "s", "couches"),
        ("boy", "s", "boys"),
        ("wash", "s", "washes"),
        ("carry", "ed", "carried"),
        ("play", "ed", "played"),
        ("drive", "ed", "drove"),
        ("drive", "en", "driven"),
        ("like", "ed", "liked"),
        ("drop", "ing", "dropping"),
        ("write", "ing", "writing"),
        ("buy", "", "buy"),
    ],
)
def test_words_inflect(word: str, form: str, result: str) -> None:
    assert format(Word(word), form) == result


def test_a_template_makes_its_choices_and_fills_its_slots() -> None:
    draw = Draw(Random(0), whole=True)
    made = {
        draw.text("[the|{w:a}] [[very |]old ]{w} , {w:s}.", {"w": Word("owl")}) for _ in range(200)
    }
    starts, middles = ("The", "An owl"), ("very old owl", "old owl")
    assert made == {f"{start} {middle}, owls." for start in starts for middle in middles}


def test_the_near_misses_of_a_scene_differ_from_what_they_are_near() -> None:
    draw = Draw(Random(0), whole=True)
    for _ in range(300):
        slots = scene(draw)
        for name in ("thing", "verb", "who", "place", "name", "city", "company"):
            assert slots[name] != slots[f"{name}2"]
        numbers = vocabulary.NUMBERS.split()
        assert (
            numbers.index(slots["n_less"])
            < numbers.index(slots["n"])
            < numbers.index(slots["n_more"])
        )
