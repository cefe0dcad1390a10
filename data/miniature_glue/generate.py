"""Writes a miniature GLUE, and `topics`, a task that is not GLUE's, without any download.

All are made from templates and word lists:

    python data/miniature_glue/generate.py [--seed N] [--out FOLDER]

A *template* is a sentence with choices, `[one|another|]`, and slots, `{slot:form}`. A *scene* fills
the slots with words that belong together (a verb and a thing that one can do it to), and gives
their synonyms, opposites, kinds and near misses beside them. The validation split has words that
the training split never uses (every seventh of each list), and shares no sentence with it.

The same seed makes the same rows on every machine: only `random.Random.random` is used, whose
sequence Python guarantees. The files in this folder are those of seed 0.
"""

import argparse
import csv
import re
from collections.abc import Callable, Mapping, Sequence
from itertools import count
from pathlib import Path
from random import Random
from typing import Any, NamedTuple, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq
import words

T = TypeVar("T")
Row = tuple[tuple[str, ...], float]  # texts, label

VALIDATION_EVERY = 7  # every seventh word of a list is for the validation split alone


class MiniatureTask(NamedTuple):
    columns: tuple[str, ...]  # of the texts, as in the Hub's data set nyu-mll/glue
    train: int  # rows
    validation: int
    wrong_labels: float  # share of rows
    label_type: pa.DataType = pa.int64()
    labels: tuple[str, ...] = ()  # names that stand in the file, which is CSV


TASKS = {
    "cola": MiniatureTask(("sentence",), 2400, 500, 0.01),
    "sst2": MiniatureTask(("sentence",), 1500, 500, 0.03),
    "mrpc": MiniatureTask(("sentence1", "sentence2"), 1600, 500, 0.02),
    "stsb": MiniatureTask(("sentence1", "sentence2"), 1500, 500, 0.0, pa.float32()),
    "rte": MiniatureTask(("sentence1", "sentence2"), 2400, 500, 0.02),
    "topics": MiniatureTask(("headline",), 1500, 500, 0.0, labels=tuple(words.TOPICS)),
}


def main() -> None:
    parser = argparse.ArgumentParser(description="Write the miniature GLUE as Parquet files.")
    parser.add_argument("--seed", type=int, default=0, help="another seed makes other rows")
    parser.add_argument(
        "--out",
        type=Path,
        default=Path(__file__).parent,
        help="folder for TASK/train.parquet and TASK/validation.parquet, or train.csv and dev.csv",
    )
    arguments = parser.parse_args()
    for name in TASKS:
        folder = arguments.out / name
        folder.mkdir(parents=True, exist_ok=True)
        for split, rows in generate(name, arguments.seed).items():
            if labels := TASKS[name].labels:
                lines = [(*texts, labels[int(label)]) for texts, label in rows]
                write_csv(folder / f"{split.replace('validation', 'dev')}.csv", lines)
            else:
                file = folder / f"{split}.parquet"
                pq.write_table(as_table(name, rows), file, compression="zstd", store_schema=False)


def write_csv(path: Path, lines: Sequence[tuple[str, ...]]) -> None:
    with path.open("w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows([("headline", "topic"), *lines])


def as_table(task_name: str, rows: Sequence[Row]) -> pa.Table:
    """Rows in the columns and types of the Hub's data set."""
    task = TASKS[task_name]
    columns = {
        name: pa.array([texts[place] for texts, _ in rows], pa.string())
        for place, name in enumerate(task.columns)
    }
    labels = pa.array([label for _, label in rows]).cast(task.label_type)
    return pa.table({**columns, "label": labels, "idx": pa.array(range(len(rows)), pa.int32())})


def generate(task_name: str, seed: int) -> dict[str, list[Row]]:
    """The rows of each split of a task. No row occurs twice, and no text in both splits."""
    task = TASKS[task_name]
    write_row = ROW_WRITERS[task_name]
    earlier_texts: set[str] = set()  # of the splits before
    splits = {}
    for split, size in (("train", task.train), ("validation", task.validation)):
        choice = Choice(Random(f"{task_name} {split} {seed}"), all_words=split == "validation")
        rows: dict[tuple[str, ...], float] = {}
        for number in count():
            texts, label = write_row(choice, number)
            if texts not in rows and not earlier_texts.intersection(texts):
                rows[texts] = label
            if len(rows) == size:
                break
        for texts, label in rows.items():
            if choice.happens(task.wrong_labels):
                rows[texts] = 1 - label
        earlier_texts.update(text for texts in rows for text in texts)
        splits[split] = list(rows.items())
    return splits


class Choice:
    """Random choices. Without `all_words`, words of the validation split are never chosen."""

    def __init__(self, random: Random, all_words: bool) -> None:
        self._random = random
        self._all_words = all_words

    def happens(self, probability: float) -> bool:
        return self._random.random() < probability

    def uniform(self, low: float, high: float) -> float:
        return low + (high - low) * self._random.random()

    def pick(self, items: Sequence[T]) -> T:
        return items[int(self._random.random() * len(items))]

    def sample(self, items: Sequence[T], number: int) -> list[T]:
        """Different items, in random order."""
        pool = list(items)
        return [pool.pop(int(self._random.random() * len(pool))) for _ in range(number)]

    def entries(self, word_list: str, number: int) -> list[str]:
        """Different entries of a word list."""
        entries = word_list.split("|") if "|" in word_list else word_list.split()
        last = VALIDATION_EVERY - 1
        allowed = [
            entry
            for place, entry in enumerate(entries)
            if self._all_words or place % VALIDATION_EVERY != last
        ]
        return self.sample(allowed, number)

    def words(self, word_list: str, number: int = 1) -> list["Word"]:
        """Different entries of a word list; of an entry `a=b`, one of the synonyms."""
        return [Word(self.pick(entry.split("="))) for entry in self.entries(word_list, number)]

    def opposites(self, word_list: str) -> tuple["Word", "Word"]:
        """The two sides of an entry `a/b`, in random order."""
        first, second = self.sample(self.entries(word_list, 1)[0].split("/"), 2)
        return Word(self.pick(first.split("="))), Word(self.pick(second.split("=")))

    def fill(self, template: str, slots: Mapping[str, Any]) -> str:
        """A template as a sentence: choices are made, and slots filled."""
        while "[" in template:
            template = re.sub(
                r"\[([^\[\]]*)\]", lambda choices: self.pick(choices[1].split("|")), template
            )
        text = " ".join(template.format(**slots).split())
        text = re.sub(r" ([.,?])", r"\1", text)
        return text[:1].upper() + text[1:]


class Word(str):
    """A word that inflects in a template.

    `{w:a}` with an article, `{w:s}` plural or third person, `{w:ed}` past, `{w:en}` participle,
    `{w:ing}` progressive.
    """

    __slots__ = ()

    def __format__(self, form: str) -> str:
        return _FORMS[form](str(self)) if form else str(self)


def _article(word: str) -> str:
    vowel = word[0] in "aeiou" and not word.startswith(("uni", "use", "one", "eu"))
    return f"{'an' if vowel else 'a'} {word}"


def _plural(word: str) -> str:
    if word in words.IRREGULAR_NOUNS:
        return words.IRREGULAR_NOUNS[word]
    if re.search(r"[^aeiou]y$", word):
        return f"{word[:-1]}ies"
    return f"{word}es" if re.search(r"(s|x|z|ch|sh)$", word) else f"{word}s"


def _past(word: str) -> str:
    if word in words.IRREGULAR_VERBS:
        return words.IRREGULAR_VERBS[word].split()[0]
    if word.endswith("e"):
        return f"{word}d"
    return f"{word[:-1]}ied" if re.search(r"[^aeiou]y$", word) else f"{word}ed"


def _participle(word: str) -> str:
    return words.IRREGULAR_VERBS[word].split()[1] if word in words.IRREGULAR_VERBS else _past(word)


def _progressive(word: str) -> str:
    if word in words.DOUBLED:
        return f"{word}{word[-1]}ing"
    return f"{word[:-1]}ing" if word.endswith("e") and not word.endswith("ee") else f"{word}ing"


_FORMS = {"a": _article, "s": _plural, "ed": _past, "en": _participle, "ing": _progressive}


def _synonyms() -> dict[str, list[str]]:
    """The synonyms of every word that has an entry `a=b` in a list."""
    things = [word_list for pair in words.THINGS.values() for word_list in pair]
    synonyms: dict[str, list[str]] = {}
    for word_list in (*words.ROLES.values(), *things, words.ADJECTIVES, words.MOODS):
        for entry in word_list.replace("/", " ").split():
            alike = entry.split("=")
            for word in alike:
                synonyms.setdefault(word, []).extend(other for other in alike if other != word)
    return synonyms


_SYNONYMS = _synonyms()


def _synonym(choice: Choice, word: Word) -> Word:
    """A synonym if there is one, else the word itself."""
    return Word(choice.pick(_SYNONYMS.get(word) or [word]))


def scene(choice: Choice) -> dict[str, Word]:
    """Words that make sense together, by slot.

    Beside `thing`, for example, stand `thing2`, another of the same kind, `thing_up`, the kind,
    `thing_syn`, a synonym, and `thing_far`, a thing of another kind.
    """
    role, role2 = choice.sample(list(words.ROLES), 2)
    kind, far = choice.sample(list(words.THINGS), 2)
    things, verbs = words.THINGS[kind]
    slots: dict[str, Any] = {}
    slots["who"], slots["who_sib"] = choice.words(words.ROLES[role], 2)
    slots["who2"] = choice.words(words.ROLES[role2])[0]
    slots["who_up"], slots["who2_up"] = Word(role), Word(role2)
    slots["thing"], slots["thing2"] = choice.words(things, 2)
    slots["thing_up"] = Word(kind)
    slots["verb"], slots["verb2"] = choice.words(verbs, 2)
    slots["thing_far"] = choice.words(words.THINGS[far][0])[0]
    slots["verb_far"] = choice.words(words.THINGS[far][1])[0]
    for name in ("who", "thing", "verb"):
        slots[f"{name}_syn"] = _synonym(choice, slots[name])
    slots["adj"], slots["anti"] = choice.opposites(words.ADJECTIVES)
    slots["adj_syn"] = _synonym(choice, slots["adj"])
    slots["mood"], slots["unmood"] = choice.opposites(words.MOODS)
    slots["colour"] = choice.words(words.COLOURS)[0]
    here = "outdoors" if kind in words.OUTDOORS or choice.happens(0.3) else "indoors"
    slots["place"], slots["place2"] = choice.words(words.PLACES[here], 2)
    slots["time"] = choice.words(words.TIMES)[0]
    slots["day"] = choice.words(words.DAYS)[0]
    slots["woman"] = choice.words(words.WOMEN)[0]
    slots["man"] = choice.words(words.MEN)[0]
    slots["name"], slots["name2"], slots["name3"] = choice.words(f"{words.WOMEN} {words.MEN}", 3)
    slots["surname"] = choice.words(words.SURNAMES)[0]
    slots["city"], slots["city2"] = choice.words(words.CITIES, 2)
    slots["company"], slots["company2"], slots["company3"] = choice.words(words.COMPANIES, 3)
    numbers = words.NUMBERS.split()
    low, middle, high = sorted(choice.sample(range(len(numbers)), 3))
    slots["n_less"], slots["n"], slots["n_more"] = (
        Word(numbers[place]) for place in (low, middle, high)
    )
    slots["year"] = Word(int(choice.uniform(1950, 2015)))
    slots["strict"] = choice.words(words.STRICT_VERBS)[0]
    return slots


# --- sst2: one opinion, or two of which the main clause decides.

_OPINIONS = (
    # The writer's opinion is in {yes}, {like} and {gain}; {no} and {loss} are its opposite.
    "the {aspect} is [|so|really|truly|simply|utterly|often] {yes}",
    "[{yes:a}|one truly {yes}|a [thoroughly|quietly|consistently] {yes}] {film} [|about "
    "family|from start to finish]",
    "{yes} and {yes2} , [and|while] the {aspect} is {yes3} [|too|as well]",
    "[this|the] {film} is [anything but|far from|never|hardly|not remotely] {no}",
    "[i|you will|audiences will|most viewers will] {like} the {aspect} [|and the {aspect2}]",
    "[i|we] expected something {no} and got {yes:a} {film} instead",
    "although the {aspect} is {no} , the {film} [as a whole|itself] is {yes}",
    "the {aspect} is {no} , but [in the end|on balance|all in all] this is {yes:a} {film}",
    "{yes} , [despite|in spite of] [its|the] {no} {aspect}",
    "for all its {loss} , the {film} [turns out|proves|remains] {yes}",
    "not even the {no} {aspect} can keep this {film} from being {yes}",
    "the {film} has [plenty of|more than enough|no lack of] {gain}",
    "a {film} [full of|brimming with|rich in] {gain} and [free of|without any] {loss}",
    "it would be {no} if it were not for the {yes} {aspect}",
    "[some may call it|the trailer looked|critics found it] {no} , yet i found it {yes}",
    "the {aspect} [never seems|does not feel|is not] {no} [|for a moment|at any point]",
)


def write_sst2(choice: Choice, number: int) -> Row:
    is_positive = number % 2 == 1
    yes, no = (words.GOOD, words.BAD) if is_positive else (words.BAD, words.GOOD)
    gain, loss = (words.VIRTUES, words.VICES) if is_positive else (words.VICES, words.VIRTUES)
    slots: dict[str, Any] = {
        "no": choice.words(no)[0],
        "gain": choice.words(gain)[0],
        "loss": choice.words(loss)[0],
    }
    slots["yes"], slots["yes2"], slots["yes3"] = choice.words(yes, 3)
    slots["aspect"], slots["aspect2"] = choice.words(words.ASPECTS, 2)
    slots["film"] = choice.words(words.FILMS)[0]
    slots["like"] = choice.words(words.LIKE if is_positive else words.DISLIKE)[0]
    text = choice.fill(choice.pick(_OPINIONS), slots).lower()
    return (text.replace(",", " ,") + " . ",), float(is_positive)


# --- cola: a sentence, or the same with one thing wrong.

_SENTENCES = (
    ("The {who} {verb:ed} the {thing} {place}.", "The {who} {verb:ing} the {thing} {place}."),
    ("The {who} {verb:ed} the {thing} {place}.", "The {who} the {thing} {verb:ed} {place}."),
    ("The {who} {verb:ed} {thing:a} {time}.", "{who} the {verb:ed} {thing:a} {time}."),
    ("{name} {strict:ed} the {thing} {time}.", "{name} {strict:ed} {time}."),
    ("The {who} {strict:ed} the {adj} {thing}.", "The {who} {strict:ed} the {adj}."),
    (
        "The {thing:s} near the {thing_far} are {adj}.",
        "The {thing:s} near the {thing_far} is {adj}.",
    ),
    (
        "The {thing} near the {thing_far:s} is {adj}.",
        "The {thing} near the {thing_far:s} are {adj}.",
    ),
    ("The {who:s} {place} were {mood}.", "The {who:s} {place} was {mood}."),
    ("Each {who} {verb:s} {thing:a}.", "Each {who:s} {verb} {thing:a}."),
    ("Every {who} {verb:s} the {thing}.", "Every {who} {verb} the {thing}."),
    ("The {who} has {verb:en} the {thing}.", "The {who} has {verb} the {thing}."),
    ("The {who} had {verb:en} the {thing} {time}.", "The {who} had {verb:ing} the {thing} {time}."),
    (
        "{name} [will|can|must|should] {verb} the {thing}.",
        "{name} [will|can|must|should] {verb:s} the {thing}.",
    ),
    ("{name} [will|can|must] {verb} the {thing}.", "{name} [will|can|must] to {verb} the {thing}."),
    (
        "The {who} [wants|hopes|plans] to {verb} the {thing}.",
        "The {who} [wants|hopes|plans] {verb} the {thing}.",
    ),
    (
        "The {who} [tried|decided] to {verb} {thing:a}.",
        "The {who} [tried|decided] to {verb:ed} {thing:a}.",
    ),
    ("{name} enjoys {verb:ing} {thing:s}.", "{name} enjoys to {verb} {thing:s}."),
    ("Did the {who} {verb} the {thing}?", "Did the {who} {verb:ed} the {thing}?"),
    ("Which {thing} did {name} {verb} {time}?", "Which {thing} {name} did {verb} {time}?"),
    (
        "The {who} who {verb:ed} the {thing} is {mood}.",
        "The {who} {verb:ed} the {thing} is {mood}.",
    ),
    (
        "The {thing} which the {who} {verb:ed} is {adj}.",
        "The {thing} which the {who} {verb:ed} it is {adj}.",
    ),
    ("{woman} hurt herself {place}.", "{woman} hurt himself {place}."),
    ("{man} saw himself {place}.", "{man} saw herself {place}."),
    ("The {who:s} blamed themselves.", "The {who:s} blamed himself."),
    ("{name} gave the {who} {thing:a}.", "{name} gave {thing:a} the {who}."),
    ("{name} {verb:ed} these {adj} {thing:s}.", "{name} {verb:ed} these {adj} {thing}."),
    ("{name} {verb:ed} {adj:a} {thing}.", "{name} {verb:ed} {adj:a} {thing:s}."),
    ("{name} {verb:ed} the {adj} {thing}.", "{name} {verb:ed} the {thing} {adj}."),
    (
        "{name} is [taller|older|kinder] than {name2}.",
        "{name} is more [taller|older|kinder] than {name2}.",
    ),
    ("{name} is as [tall|old|kind] as {name2}.", "{name} is as [taller|older|kinder] as {name2}."),
    ("There are {n} {thing:s} {place}.", "There is {n} {thing:s} {place}."),
    ("There is {adj:a} {thing} {place}.", "There are {adj:a} {thing} {place}."),
    ("The {thing} was {verb:en} by the {who}.", "The {thing} was {verb:ing} by the {who}."),
    ("The {thing} was {verb:en} {time}.", "The {thing} was {verb} {time}."),
    ("The {who} did not {verb} the {thing}.", "The {who} not {verb:ed} the {thing}."),
    ("The {who} does not {verb} {thing:s}.", "The {who} does not {verb:s} {thing:s}."),
    ("[She|He] {verb:ed} the {thing} {place}.", "[Her|Him] {verb:ed} the {thing} {place}."),
    ("The {who} saw [him|her|them] {place}.", "The {who} saw [he|she|they] {place}."),
    ("{name} {verb:ed} the {thing} and the {thing2}.", "What did {name} {verb} the {thing} and?"),
    ("No {who} has ever {verb:en} the {thing}.", "Some {who} has ever {verb:en} the {thing}."),
    ("Many {thing:s} were {verb:en} {place}.", "Much {thing:s} were {verb:en} {place}."),
    (
        "{name} {verb:ed} the {thing} because it was {adj}.",
        "{name} {verb:ed} the {thing} because was {adj}.",
    ),
    (
        "{name} thinks that the {who} {verb:ed} the {thing}.",
        "{name} thinks that {verb:ed} the {thing}.",
    ),
    (
        "The {who} asked {name} to {verb} the {thing}.",
        "The {who} asked {name} {verb:ing} to the {thing}.",
    ),
)


def write_cola(choice: Choice, number: int) -> Row:
    is_acceptable = number % 5 < 3
    right, wrong = choice.pick(_SENTENCES)
    slots = scene(choice)
    sentence, wrong_sentence = choice.fill(right, slots), choice.fill(wrong, slots)
    if sentence == wrong_sentence:  # the forms of a verb are alike
        return write_cola(choice, number)
    return (sentence if is_acceptable else wrong_sentence,), float(is_acceptable)


# --- rte: what a sentence entails, and what it does not.

_ENTAILMENTS: tuple[tuple[str, tuple[str, ...], tuple[str, ...]], ...] = (
    (
        "The {mood} {who} {verb:ed} {adj:a} {thing} {place}.",
        (
            "The {who} {verb:ed} {thing:a}.",
            "{thing:a} was {verb:en} by the {who}.",
            "The {who} {verb_syn:ed} {thing_syn:a} {place}.",
            "The {who_up} {verb:ed} {thing_up:a}.",
            "The {who} was {mood}.",
            "The {who} was {place}.",
        ),
        (
            "The {who} did not {verb} the {thing}.",
            "The {who} {verb:ed} {thing2:a}.",
            "{thing:a} was {verb:en} by the {who2}.",
            "The {who} was {unmood}.",
            "The {who} {verb:ed} {anti:a} {thing}.",
            "The {who} was {place2}.",
        ),
    ),
    (
        "{name} and {name2} {verb:ed} {n} {thing:s} {place} {time}.",
        (
            "{name} {verb:ed} some {thing:s}.",
            "{name2} {verb:ed} [some|several] {thing:s} {time}.",
            "Two people {verb:ed} {thing:s} {place}.",
            "{n} {thing:s} were {verb:en}.",
            "More than {n_less} {thing:s} were {verb:en} {time}.",
        ),
        (
            "{name} {verb:ed} no {thing:s}.",
            "{name3} {verb:ed} some {thing:s}.",
            "Only {name2} {verb:ed} {thing:s}.",
            "More than {n_more} {thing:s} were {verb:en}.",
            "{name} and {name2} {verb:ed} {thing2:s} {place}.",
        ),
    ),
    (
        "All of the {who:s} {place} {verb:ed} the {adj} {thing}.",
        (
            "Some of the {who:s} {verb:ed} the {thing}.",
            "The {thing} was {verb:en} by the {who:s}.",
            "Every {who} {place} {verb:ed} the {thing}.",
            "The {thing} was {adj}.",
        ),
        (
            "None of the {who:s} {verb:ed} the {thing}.",
            "Some of the {who:s} did not {verb} the {thing}.",
            "Only one {who} {verb:ed} the {thing}.",
            "The {thing} was {anti}.",
        ),
    ),
    (
        "Some of the {who:s} {verb:ed} the {thing} {time}.",
        ("At least one {who} {verb:ed} the {thing}.", "The {thing} was {verb:en} {time}."),
        ("All of the {who:s} {verb:ed} the {thing}.", "No {who} {verb:ed} the {thing}."),
    ),
    (
        "None of the {who:s} {verb:ed} the {adj} {thing} {time}.",
        ("The {who:s} did not {verb} the {thing}.", "No {who} {verb:ed} the {thing}."),
        ("Some of the {who:s} {verb:ed} the {thing}.", "Most {who:s} {verb:ed} the {thing}."),
    ),
    (
        "{name} [managed|was able|remembered|did not fail|did not forget] to {verb} the {thing} "
        "{time}.",
        ("{name} {verb:ed} the {thing}.", "The {thing} was {verb:en} by {name}."),
        ("{name} did not {verb} the {thing}.", "The {thing} was not {verb:en}."),
    ),
    (
        "{name} [failed|was unable|forgot|refused|declined] to {verb} the {thing} {time}.",
        ("{name} did not {verb} the {thing}.", "{name} has not {verb:en} the {thing}."),
        ("{name} {verb:ed} the {thing}.", "The {thing} was {verb:en} by {name}."),
    ),
    (
        "{name} {surname}, {who:a} from {city}, {verb:ed} {thing:a} {time}.",
        (
            "{name} {surname} is {who:a}.",
            "{surname} is {who_up:a} from {city}.",
            "{name} {surname} comes from {city}.",
            "{who:a} {verb:ed} {thing_up:a}.",
        ),
        (
            "{name} {surname} is {who2:a}.",
            "{surname} is {who2_up:a} from {city}.",
            "{name} {surname} comes from {city2}.",
            "{who:a} from {city} {verb:ed} {thing_far:a}.",
        ),
    ),
    (
        "{company} bought {company2} for {n} million dollars [on {day}|in {year}].",
        (
            "{company2} was bought by {company}.",
            "{company} [acquired|took over] {company2}.",
            "{company} paid {n} million dollars for {company2}.",
        ),
        (
            "{company2} bought {company}.",
            "{company} was bought by {company2}.",
            "{company} [acquired|took over] {company3}.",
            "{company} paid {n_more} million dollars for {company2}.",
        ),
    ),
    (
        "{name} {surname}, who was born in {city} in {year}, died in {city2} {time}.",
        (
            "{surname} was born in {city}.",
            "{name} {surname} is dead.",
            "{surname} died in {city2}.",
        ),
        (
            "{surname} was born in {city2}.",
            "{name} {surname} is alive.",
            "{surname} died in {city}.",
        ),
    ),
)


def write_rte(choice: Choice, number: int) -> Row:
    is_entailed = number % 2 == 0
    template, entailed, not_entailed = choice.pick(_ENTAILMENTS)
    slots = scene(choice)
    premise = choice.fill(template, slots)
    hypothesis = choice.fill(choice.pick(entailed if is_entailed else not_entailed), slots)
    return (premise, hypothesis), float(not is_entailed)


# --- mrpc: the same news in other words, or news of which one fact differs.


class News(NamedTuple):
    facts: Mapping[str, str]  # slot -> word list
    # Each states every fact; `<...>` may be left out of one sentence of a pair.
    wordings: tuple[str, ...]
    swaps: tuple[str, str] | None = None  # two slots that may be exchanged for a different story


_NEWS = (
    News(
        {"a": words.COMPANIES, "b": words.COMPANIES, "n": words.NUMBERS, "day": words.DAYS},
        (
            "{a} [agreed|said it had agreed] to [buy|acquire] {b} for {n} million dollars <on "
            "{day}>.",
            "<On {day},> {a} announced [the purchase|the takeover|the acquisition] of {b} for "
            "{n} million dollars.",
            "{b} will be [bought|acquired|taken over] by {a} in {n:a} million dollar deal<, it "
            "was said on {day}>.",
        ),
        ("a", "b"),
    ),
    News(
        {"a": words.COMPANIES, "n": words.NUMBERS, "m": words.NUMBERS, "day": words.DAYS},
        (
            "[Shares of {a}|{a} shares] [rose|climbed|gained] {n} percent to {m} dollars <on "
            "{day}>.",
            "<On {day},> {a} stock was up {n} percent [at|to] {m} dollars.",
            "{a} [jumped|advanced] {n} percent to close at {m} dollars a share <on {day}>.",
        ),
    ),
    News(
        {"a": words.COMPANIES, "n": words.NUMBERS, "m": words.NUMBERS, "day": words.DAYS},
        (
            "[Shares of {a}|{a} shares] [fell|dropped|slid] {n} percent to {m} dollars <on {day}>.",
            "<On {day},> {a} stock was down {n} percent [at|to] {m} dollars.",
            "{a} [lost|shed] {n} percent to close at {m} dollars a share <on {day}>.",
        ),
    ),
    News(
        {
            "name": f"{words.WOMEN} {words.MEN}",
            "s": words.SURNAMES,
            "a": words.COMPANIES,
            "role": words.POSITIONS,
            "day": words.DAYS,
        },
        (
            "{a} [named|appointed] {name} {s} as its [new|next] {role} <on {day}>.",
            "{name} {s} [was named|was appointed|will become] {role} of {a}<, the company said "
            "on {day}>.",
            "<On {day},> {a} announced that {name} {s} would be its [new|next] {role}.",
        ),
    ),
    News(
        {
            "a": words.TEAMS,
            "b": words.TEAMS,
            "n": words.NUMBERS,
            "city": words.CITIES,
            "day": words.DAYS,
        },
        (
            "{a} [beat|defeated] {b} by {n} [goals|points] in {city} <on {day}>.",
            "<On {day},> {b} lost to {a} by {n} [goals|points] in {city}.",
            "In {city}, {b} were [beaten|defeated] by {a}, who won by {n} [goals|points] <on "
            "{day}>.",
        ),
        ("a", "b"),
    ),
    News(
        {
            "s": words.SURNAMES,
            "n": words.NUMBERS,
            "crime": words.CRIMES,
            "city": words.CITIES,
            "day": words.DAYS,
        },
        (
            "A [court|judge] in {city} sentenced {s} to {n} years in prison for {crime} <on "
            "{day}>.",
            "{s} was [sent to prison|jailed] for {n} years for {crime} by a [court|judge] in "
            "{city} <on {day}>.",
            "<On {day},> {s} [received|was given] {n} years in [prison|jail] for {crime} in "
            "{city}.",
        ),
    ),
    News(
        {
            "n": words.NUMBERS,
            "who": " ".join(words.ROLES.values()),
            "vehicle": "bus train plane ferry tram helicopter truck",
            "city": words.CITIES,
            "day": words.DAYS,
        },
        (
            "[At least|As many as] {n} {who:s} were [injured|hurt] when a {vehicle} crashed "
            "near {city} <on {day}>.",
            "<On {day},> a {vehicle} crash near {city} [injured|left injured] {n} {who:s}.",
            "{n} {who:s} were [wounded|hurt] <on {day}> in the crash of a {vehicle} "
            "[outside|near] {city}.",
        ),
    ),
    News(
        {
            "a": words.COMPANIES,
            "product": words.PRODUCTS,
            "country": words.COUNTRIES,
            "n": words.NUMBERS,
            "s": words.SURNAMES,
        },
        (
            "{a} plans to [build|open] {n} {product} [factories|plants] in {country}<, {s} said>.",
            "<{s} said that> {n} {product} [factories|plants] will be [built|opened] in "
            "{country} by {a}.",
            "In {country}, {a} is going to [set up|open] {n} [factories|plants] for "
            "{product:s}<, according to {s}>.",
        ),
    ),
    News(
        {
            "a": words.COUNTRIES,
            "b": words.COUNTRIES,
            "product": words.PRODUCTS,
            "n": words.NUMBERS,
            "day": words.DAYS,
        },
        (
            "{a} [sold|delivered] {n} hundred {product:s} to {b} <on {day}>.",
            "{b} [received|bought] {n} hundred {product:s} from {a} <on {day}>.",
            "<On {day},> {n} hundred {product:s} were [sold|delivered] to {b} by {a}.",
        ),
        ("a", "b"),
    ),
)


def write_mrpc(choice: Choice, number: int) -> Row:
    is_paraphrase = number % 9 < 5
    news = choice.pick(_NEWS)
    facts: dict[str, Any] = {}
    while len(set(facts.values())) < len(news.facts):  # no two slots with one word
        facts = {slot: choice.words(word_list)[0] for slot, word_list in news.facts.items()}
    first, second = choice.sample(news.wordings, 2)
    optional = set(re.findall(r"{(\w+)", "".join(re.findall(r"<(.*?)>", first))))
    other_facts = dict(facts)
    if not is_paraphrase and news.swaps and choice.happens(0.3):
        slot, other_slot = news.swaps
        other_facts[slot], other_facts[other_slot] = facts[other_slot], facts[slot]
    elif not is_paraphrase:
        required = [slot for slot in facts if slot not in optional]
        for slot in choice.sample(required, choice.pick((1, 1, 2))):
            two_words = choice.words(news.facts[slot], 2)
            other_facts[slot] = next(word for word in two_words if word != facts[slot])
    kept_part = "" if choice.happens(0.4) else r"\1"  # the optional part of the second sentence
    sentence = choice.fill(re.sub("<(.*?)>", r"\1", first), facts)
    other_sentence = choice.fill(re.sub("<(.*?)>", kept_part, second), other_facts)
    pair = choice.sample((sentence, other_sentence), 2)
    return (pair[0], pair[1]), float(is_paraphrase)


# --- stsb: what is seen in two pictures; every part that differs costs some of the five points.

_CAPTIONS = (
    "{who:a} is {verb:ing} {adj:a} {thing} {place}.",
    "{place}, {who:a} is {verb:ing} {adj:a} {thing}.",
    "{adj:a} {thing} is being {verb:en} by {who:a} {place}.",
    "{place}, {who:a} {verb:s} {adj:a} {thing}.",
)

# The part, what stands for it in the second caption, and how far that is from the first.
_CHANGES = (
    ("who", "who_syn", 0.1),
    ("who", "who_up", 0.5),
    ("who", "who_sib", 0.9),
    ("who", "who2", 1.3),
    ("verb", "verb_syn", 0.1),
    ("verb", "verb2", 1.2),
    ("thing", "thing_syn", 0.1),
    ("thing", "thing_up", 0.5),
    ("thing", "thing2", 1.0),
    ("thing", "thing_far", 1.8),
    ("adj", "adj_syn", 0.1),
    ("adj", "anti", 0.7),
    ("adj", "colour", 0.5),
    ("place", "place2", 0.7),
)


def write_stsb(choice: Choice, number: int) -> Row:
    slots = scene(choice)
    changed_slots = dict(slots)
    cost = choice.uniform(-0.4, 0.4)
    for part in choice.sample(("who", "verb", "thing", "adj", "place"), number % 6):
        _, substitute, distance = choice.pick([change for change in _CHANGES if change[0] == part])
        changed_slots[part] = slots[substitute]
        if substitute == "thing_far":  # with a verb that fits it
            changed_slots["verb"] = slots["verb_far"]
        cost += distance
    score = min(5.0, max(0.0, 5.0 - cost))
    first = choice.fill(choice.pick(_CAPTIONS), slots)
    second = choice.fill(choice.pick(_CAPTIONS), changed_slots)
    return (first, second), round(score * 5) / 5


# --- topics: what a headline is about, whoever and whatever else is in it.

_HEADLINES = (
    # The topic is that of {who}, {verb} and {thing}; {who2}, {verb2} and {thing2} are of another.
    "[Local|Young|Retired|Unknown] {who} {verb:s} the {adj} {thing}",
    "How to {verb} {thing:a} [|this weekend|in {city}|without any help]",
    "{n} {who:s}, one {adj} {thing}",
    "The {adj} {thing} [of {city}|everybody talks about|that nobody wanted]",
    "[What|How much] {who2:s} know about {thing:s}",
    "{who2:a} [learns|wants|tries] to {verb} {thing:a}",
    "[Why|How] {adj:a} {thing} delights {who2:s}",
    "Forget the {thing2}, {city} wants {thing:a}",
    "No {thing2} for {name}, but {thing:a}",
    "From {thing2} to {thing}: {name} starts again",
    "{city} has too many {thing:s}, says {who2:a}",
    "{name} {verb:ed} the {thing} and [left|forgot] the {thing2}",
    "{thing:a} instead of {thing2:a}: {adj:a} day in {city}",
)


def write_topics(choice: Choice, number: int) -> Row:
    names = list(words.TOPICS)
    label = number % len(names)
    other = choice.pick([place for place in range(len(names)) if place != label])
    slots: dict[str, Any] = {}
    for mark, place in (("", label), ("2", other)):
        who, thing, verb = words.TOPICS[names[place]]
        for slot, word_list in (("who", who), ("thing", thing), ("verb", verb)):
            slots[f"{slot}{mark}"] = choice.words(word_list)[0]
    slots["adj"] = choice.words(words.HEADLINE_ADJECTIVES)[0]
    slots["city"] = choice.words(words.CITIES)[0]
    slots["name"] = choice.words(f"{words.WOMEN} {words.MEN}")[0]
    slots["n"] = choice.words(words.NUMBERS)[0]
    headline = choice.fill(choice.pick(_HEADLINES), slots)
    is_wrong = choice.happens(0.03)  # people disagree on some
    return (headline,), float(other if is_wrong else label)


ROW_WRITERS: Mapping[str, Callable[[Choice, int], Row]] = {
    "sst2": write_sst2,
    "cola": write_cola,
    "rte": write_rte,
    "mrpc": write_mrpc,
    "stsb": write_stsb,
    "topics": write_topics,
}


if __name__ == "__main__":
    main()
