"""A miniature GLUE that needs no download: five tasks written by a seeded generator from a grammar and a vocabulary.

A *template* is a sentence with `[one|another|]` choices and `{slot:form}` places; a *scene* is what fills the places:
words that belong together (a verb with a thing one can do it to), with their synonyms, opposites, kinds and near
misses beside them. Validation holds words that training never shows (every seventh of each list) and no sentence of
training's.

The same seed gives the same rows on every machine: only `random.Random.random` is used, whose stream Python keeps.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from itertools import count
from random import Random
from types import MappingProxyType
from typing import Any, NamedTuple, TypeVar

from fmn.errors import UserError
from fmn.tasks import vocabulary as v
from fmn.tasks.task import Task

T = TypeVar("T")
Row = tuple[tuple[str, ...], float]  # texts, label

HELD_OUT = 7  # every so-many-th word of a list is kept for validation


class Size(NamedTuple):
    train: int
    validation: int
    noise: float  # share of rows with a wrong label


SIZES: Mapping[str, Size] = MappingProxyType(
    {
        "cola": Size(2400, 500, 0.01),
        "sst2": Size(1500, 500, 0.03),
        "mrpc": Size(1600, 500, 0.02),
        "stsb": Size(1500, 500, 0.0),
        "rte": Size(2400, 500, 0.02),
    }
)


def generate(task: Task, seed: int = 0) -> dict[str, list[Row]]:
    """Rows of each split, (texts, label) each; `UserError` for a task that is not among `SIZES`.

    No text of validation occurs in training, and no row occurs twice.
    """
    if task.name not in SIZES:
        raise UserError(
            f"The embedded data has no {task.name}, only {', '.join(SIZES)}: use --source hub or a folder."
        )
    size = SIZES[task.name]
    write = _WRITERS[task.name]
    known: set[str] = set()  # texts of the splits written before
    splits = {}
    for split, rows in (("train", size.train), ("validation", size.validation)):
        draw = Draw(Random(f"{task.name} {split} {seed}"), whole=split == "validation")  # noqa: S311
        found: dict[tuple[str, ...], float] = {}
        for number in count():
            texts, label = write(draw, number)
            if texts not in found and not known.intersection(texts):
                found[texts] = label
            if len(found) == rows:
                break
        for texts, label in found.items():
            if draw.chance(size.noise):
                found[texts] = 1 - label
        known.update(text for texts in found for text in texts)
        splits[split] = list(found.items())
    return splits


class Draw:
    """Random choices; without `whole`, words held out for validation are never chosen."""

    def __init__(self, random: Random, whole: bool) -> None:
        self._random = random
        self._whole = whole

    def chance(self, probability: float) -> bool:
        return self._random.random() < probability

    def uniform(self, low: float, high: float) -> float:
        return low + (high - low) * self._random.random()

    def pick(self, items: Sequence[T]) -> T:
        return items[int(self._random.random() * len(items))]

    def some(self, items: Sequence[T], number: int) -> list[T]:
        """Different items, in random order."""
        pool = list(items)
        return [pool.pop(int(self._random.random() * len(pool))) for _ in range(number)]

    def entries(self, text: str, number: int) -> list[str]:
        """Different entries of a word list."""
        entries = text.split("|") if "|" in text else text.split()
        return self.some(
            [one for at, one in enumerate(entries) if self._whole or at % HELD_OUT != HELD_OUT - 1],
            number,
        )

    def words(self, text: str, number: int = 1) -> list["Word"]:
        """Different entries of a word list; of an entry `a=b`, one of its synonyms."""
        return [Word(self.pick(entry.split("="))) for entry in self.entries(text, number)]

    def opposites(self, text: str) -> tuple["Word", "Word"]:
        """The two sides of an entry `a/b`, in random order."""
        one, other = self.some(self.entries(text, 1)[0].split("/"), 2)
        return Word(self.pick(one.split("="))), Word(self.pick(other.split("=")))

    def text(self, template: str, slots: Mapping[str, Any]) -> str:
        """A template with its choices made and its slots filled, as a sentence."""
        while "[" in template:
            template = re.sub(
                r"\[([^\[\]]*)\]", lambda found: self.pick(found[1].split("|")), template
            )
        text = " ".join(template.format(**slots).split())
        text = re.sub(r" ([.,?])", r"\1", text)
        return text[:1].upper() + text[1:]


class Word(str):
    """A word that inflects where it stands: `{w:a}` with an article, `{w:s}` as a plural or in the third person,
    `{w:ed}` past, `{w:en}` participle, `{w:ing}`."""

    __slots__ = ()

    def __format__(self, form: str) -> str:
        return _FORMS[form](str(self)) if form else str(self)


def _article(word: str) -> str:
    vowel = word[0] in "aeiou" and not word.startswith(("uni", "use", "one", "eu"))
    return f"{'an' if vowel else 'a'} {word}"


def _plural(word: str) -> str:
    if word in v.IRREGULAR_NOUNS:
        return v.IRREGULAR_NOUNS[word]
    if re.search(r"[^aeiou]y$", word):
        return f"{word[:-1]}ies"
    return f"{word}es" if re.search(r"(s|x|z|ch|sh)$", word) else f"{word}s"


def _past(word: str) -> str:
    if word in v.IRREGULAR_VERBS:
        return v.IRREGULAR_VERBS[word].split()[0]
    if word.endswith("e"):
        return f"{word}d"
    return f"{word[:-1]}ied" if re.search(r"[^aeiou]y$", word) else f"{word}ed"


def _participle(word: str) -> str:
    return v.IRREGULAR_VERBS[word].split()[1] if word in v.IRREGULAR_VERBS else _past(word)


def _progressive(word: str) -> str:
    if word in v.DOUBLED:
        return f"{word}{word[-1]}ing"
    return f"{word[:-1]}ing" if word.endswith("e") and not word.endswith("ee") else f"{word}ing"


_FORMS = {"a": _article, "s": _plural, "ed": _past, "en": _participle, "ing": _progressive}

_SYNONYMS: dict[str, list[str]] = {}
for _text in (
    *v.ROLES.values(),
    *(part for pair in v.THINGS.values() for part in pair),
    v.ADJECTIVES,
    v.MOODS,
):
    for _entry in _text.replace("/", " ").split():
        for _word in _entry.split("="):
            _SYNONYMS.setdefault(_word, []).extend(
                other for other in _entry.split("=") if other != _word
            )


def _synonym(draw: Draw, word: Word) -> Word:
    """A synonym where there is one."""
    return Word(draw.pick(_SYNONYMS.get(word) or [word]))


def scene(draw: Draw) -> dict[str, Word]:
    """Words that make sense together, and their near misses: a 2 marks another of the same kind, `_up` the kind,
    `_syn` a synonym, `_far` one of another kind."""
    role, role2 = draw.some(list(v.ROLES), 2)
    kind, far = draw.some(list(v.THINGS), 2)
    things, verbs = v.THINGS[kind]
    slots: dict[str, Any] = {}
    slots["who"], slots["who_sib"] = draw.words(v.ROLES[role], 2)
    slots["who2"] = draw.words(v.ROLES[role2])[0]
    slots["who_up"], slots["who2_up"] = Word(role), Word(role2)
    slots["thing"], slots["thing2"] = draw.words(things, 2)
    slots["thing_up"] = Word(kind)
    slots["verb"], slots["verb2"] = draw.words(verbs, 2)
    slots["thing_far"], slots["verb_far"] = (
        draw.words(v.THINGS[far][0])[0],
        draw.words(v.THINGS[far][1])[0],
    )
    for name in ("who", "thing", "verb"):
        slots[f"{name}_syn"] = _synonym(draw, slots[name])
    slots["adj"], slots["anti"] = draw.opposites(v.ADJECTIVES)
    slots["adj_syn"] = _synonym(draw, slots["adj"])
    slots["mood"], slots["unmood"] = draw.opposites(v.MOODS)
    slots["colour"] = draw.words(v.COLOURS)[0]
    here = "outdoors" if kind in v.OUTDOORS or draw.chance(0.3) else "indoors"
    slots["place"], slots["place2"] = draw.words(v.PLACES[here], 2)
    slots["time"] = draw.words(v.TIMES)[0]
    slots["day"] = draw.words(v.DAYS)[0]
    slots["woman"] = draw.words(v.WOMEN)[0]
    slots["man"] = draw.words(v.MEN)[0]
    slots["name"], slots["name2"], slots["name3"] = draw.words(f"{v.WOMEN} {v.MEN}", 3)
    slots["surname"] = draw.words(v.SURNAMES)[0]
    slots["city"], slots["city2"] = draw.words(v.CITIES, 2)
    slots["company"], slots["company2"], slots["company3"] = draw.words(v.COMPANIES, 3)
    numbers = v.NUMBERS.split()
    low, middle, high = sorted(draw.some(range(len(numbers)), 3))
    slots["n_less"], slots["n"], slots["n_more"] = (
        Word(numbers[place]) for place in (low, middle, high)
    )
    slots["year"] = Word(int(draw.uniform(1950, 2015)))
    slots["strict"] = draw.words(v.STRICT_VERBS)[0]
    return slots


# --- sst2: one opinion, or two of which the main clause decides.

_OPINIONS = (
    # What the writer thinks is in {yes}, {like} and {gain}; {no} and {loss} say the opposite.
    "the {aspect} is [|so|really|truly|simply|utterly|often] {yes}",
    "[{yes:a}|one truly {yes}|a [thoroughly|quietly|consistently] {yes}] {film} [|about family|from start to finish]",
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


def _sst2(draw: Draw, number: int) -> Row:
    good = number % 2 == 1
    yes, no = (v.GOOD, v.BAD) if good else (v.BAD, v.GOOD)
    gain, loss = (v.VIRTUES, v.VICES) if good else (v.VICES, v.VIRTUES)
    slots: dict[str, Any] = {
        "no": draw.words(no)[0],
        "gain": draw.words(gain)[0],
        "loss": draw.words(loss)[0],
    }
    slots["yes"], slots["yes2"], slots["yes3"] = draw.words(yes, 3)
    slots["aspect"], slots["aspect2"] = draw.words(v.ASPECTS, 2)
    slots["film"] = draw.words(v.FILMS)[0]
    slots["like"] = draw.words(v.LIKE if good else v.DISLIKE)[0]
    return (draw.text(draw.pick(_OPINIONS), slots).lower().replace(",", " ,") + " . ",), float(good)


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


def _cola(draw: Draw, number: int) -> Row:
    good = number % 5 < 3
    right, wrong = draw.pick(_SENTENCES)
    slots = scene(draw)
    sentence, other = draw.text(right, slots), draw.text(wrong, slots)
    if sentence == other:  # a verb whose forms are alike
        return _cola(draw, number)
    return (sentence if good else other,), float(good)


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
        "{name} [managed|was able|remembered|did not fail|did not forget] to {verb} the {thing} {time}.",
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


def _rte(draw: Draw, number: int) -> Row:
    entailed = number % 2 == 0
    premise, right, wrong = draw.pick(_ENTAILMENTS)
    slots = scene(draw)
    return (
        draw.text(premise, slots),
        draw.text(draw.pick(right if entailed else wrong), slots),
    ), float(not entailed)


# --- mrpc: the same news in other words, or news of which one fact differs.


class News(NamedTuple):
    facts: Mapping[str, str]  # slot -> word list
    wordings: tuple[
        str, ...
    ]  # each states every fact; `<...>` may be left out of one sentence of a pair
    swaps: tuple[str, str] | None = None  # two slots that may be exchanged for a different story


_NEWS = (
    News(
        {"a": v.COMPANIES, "b": v.COMPANIES, "n": v.NUMBERS, "day": v.DAYS},
        (
            "{a} [agreed|said it had agreed] to [buy|acquire] {b} for {n} million dollars <on {day}>.",
            "<On {day},> {a} announced [the purchase|the takeover|the acquisition] of {b} for {n} million dollars.",
            "{b} will be [bought|acquired|taken over] by {a} in {n:a} million dollar deal<, it was said on {day}>.",
        ),
        ("a", "b"),
    ),
    News(
        {"a": v.COMPANIES, "n": v.NUMBERS, "m": v.NUMBERS, "day": v.DAYS},
        (
            "[Shares of {a}|{a} shares] [rose|climbed|gained] {n} percent to {m} dollars <on {day}>.",
            "<On {day},> {a} stock was up {n} percent [at|to] {m} dollars.",
            "{a} [jumped|advanced] {n} percent to close at {m} dollars a share <on {day}>.",
        ),
    ),
    News(
        {"a": v.COMPANIES, "n": v.NUMBERS, "m": v.NUMBERS, "day": v.DAYS},
        (
            "[Shares of {a}|{a} shares] [fell|dropped|slid] {n} percent to {m} dollars <on {day}>.",
            "<On {day},> {a} stock was down {n} percent [at|to] {m} dollars.",
            "{a} [lost|shed] {n} percent to close at {m} dollars a share <on {day}>.",
        ),
    ),
    News(
        {
            "name": f"{v.WOMEN} {v.MEN}",
            "s": v.SURNAMES,
            "a": v.COMPANIES,
            "role": v.POSITIONS,
            "day": v.DAYS,
        },
        (
            "{a} [named|appointed] {name} {s} as its [new|next] {role} <on {day}>.",
            "{name} {s} [was named|was appointed|will become] {role} of {a}<, the company said on {day}>.",
            "<On {day},> {a} announced that {name} {s} would be its [new|next] {role}.",
        ),
    ),
    News(
        {"a": v.TEAMS, "b": v.TEAMS, "n": v.NUMBERS, "city": v.CITIES, "day": v.DAYS},
        (
            "{a} [beat|defeated] {b} by {n} [goals|points] in {city} <on {day}>.",
            "<On {day},> {b} lost to {a} by {n} [goals|points] in {city}.",
            "In {city}, {b} were [beaten|defeated] by {a}, who won by {n} [goals|points] <on {day}>.",
        ),
        ("a", "b"),
    ),
    News(
        {"s": v.SURNAMES, "n": v.NUMBERS, "crime": v.CRIMES, "city": v.CITIES, "day": v.DAYS},
        (
            "A [court|judge] in {city} sentenced {s} to {n} years in prison for {crime} <on {day}>.",
            "{s} was [sent to prison|jailed] for {n} years for {crime} by a [court|judge] in {city} <on {day}>.",
            "<On {day},> {s} [received|was given] {n} years in [prison|jail] for {crime} in {city}.",
        ),
    ),
    News(
        {
            "n": v.NUMBERS,
            "who": " ".join(v.ROLES.values()),
            "vehicle": "bus train plane ferry tram helicopter truck",
            "city": v.CITIES,
            "day": v.DAYS,
        },
        (
            "[At least|As many as] {n} {who:s} were [injured|hurt] when a {vehicle} crashed near {city} <on {day}>.",
            "<On {day},> a {vehicle} crash near {city} [injured|left injured] {n} {who:s}.",
            "{n} {who:s} were [wounded|hurt] <on {day}> in the crash of a {vehicle} [outside|near] {city}.",
        ),
    ),
    News(
        {
            "a": v.COMPANIES,
            "product": v.PRODUCTS,
            "country": v.COUNTRIES,
            "n": v.NUMBERS,
            "s": v.SURNAMES,
        },
        (
            "{a} plans to [build|open] {n} {product} [factories|plants] in {country}<, {s} said>.",
            "<{s} said that> {n} {product} [factories|plants] will be [built|opened] in {country} by {a}.",
            "In {country}, {a} is going to [set up|open] {n} [factories|plants] for {product:s}<, according to {s}>.",
        ),
    ),
    News(
        {"a": v.COUNTRIES, "b": v.COUNTRIES, "product": v.PRODUCTS, "n": v.NUMBERS, "day": v.DAYS},
        (
            "{a} [sold|delivered] {n} hundred {product:s} to {b} <on {day}>.",
            "{b} [received|bought] {n} hundred {product:s} from {a} <on {day}>.",
            "<On {day},> {n} hundred {product:s} were [sold|delivered] to {b} by {a}.",
        ),
        ("a", "b"),
    ),
)


def _mrpc(draw: Draw, number: int) -> Row:
    same = number % 9 < 5
    news = draw.pick(_NEWS)
    facts: dict[str, Any] = {}
    while len(set(facts.values())) < len(news.facts):  # no two slots with one word
        facts = {slot: draw.words(words)[0] for slot, words in news.facts.items()}
    other = dict(facts)
    first, second = draw.some(news.wordings, 2)
    droppable = set(re.findall(r"{(\w+)", "".join(re.findall(r"<(.*?)>", first))))
    if not same and news.swaps and draw.chance(0.3):
        a, b = news.swaps
        other[a], other[b] = facts[b], facts[a]
    elif not same:
        for slot in draw.some(
            [slot for slot in facts if slot not in droppable], draw.pick((1, 1, 2))
        ):
            other[slot] = next(
                word for word in draw.words(news.facts[slot], 2) if word != facts[slot]
            )
    shorter = draw.chance(0.4)
    first, second = (
        re.sub(r"<(.*?)>", "" if drop else r"\1", wording)
        for wording, drop in ((first, False), (second, shorter))
    )
    pair = draw.some((draw.text(first, facts), draw.text(second, other)), 2)
    return (pair[0], pair[1]), float(same)


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


def _stsb(draw: Draw, number: int) -> Row:
    slots = scene(draw)
    changed = dict(slots)
    cost = draw.uniform(-0.4, 0.4)
    for part in draw.some(("who", "verb", "thing", "adj", "place"), number % 6):
        _, instead, distance = draw.pick([change for change in _CHANGES if change[0] == part])
        changed[part] = slots[instead]
        if instead == "thing_far":  # with a verb that fits it
            changed["verb"] = slots["verb_far"]
        cost += distance
    label = min(5.0, max(0.0, 5.0 - cost))
    texts = (draw.text(draw.pick(_CAPTIONS), slots), draw.text(draw.pick(_CAPTIONS), changed))
    return texts, round(label * 5) / 5


_WRITERS: Mapping[str, Callable[[Draw, int], Row]] = MappingProxyType(
    {"sst2": _sst2, "cola": _cola, "rte": _rte, "mrpc": _mrpc, "stsb": _stsb}
)
