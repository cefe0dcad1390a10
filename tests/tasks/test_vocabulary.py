"""The words of the miniature GLUE say what the grammar takes them to say."""

import pytest

from fmn.tasks import vocabulary as v

LISTS = {
    name: text.replace("|", " | ")
    for name, text in vars(v).items()
    if name.isupper() and isinstance(text, str)
}


def words(text: str) -> list[str]:
    """The entries of a list, synonyms and opposites apart."""
    entries = text.split(" | ") if "|" in text else text.replace("/", " ").replace("=", " ").split()
    return [entry.strip() for entry in entries]


@pytest.mark.parametrize("name", LISTS)
def test_no_list_has_a_word_twice(name: str) -> None:
    found = words(LISTS[name])
    assert found
    assert len(found) == len(set(found))


def test_what_praises_does_not_blame() -> None:
    for praise, blame in ((v.GOOD, v.BAD), (v.VIRTUES, v.VICES), (v.LIKE, v.DISLIKE)):
        assert not set(words(praise)) & set(words(blame))


def test_names_of_one_kind_are_no_names_of_another() -> None:
    kinds = [
        set(words(text)) for text in (v.WOMEN, v.MEN, v.CITIES, v.COUNTRIES, v.COMPANIES, v.TEAMS)
    ]
    assert sum(map(len, kinds)) == len(set.union(*kinds))


def test_irregular_forms_are_of_words_that_are_there() -> None:
    verbs = {word for _, doing in v.THINGS.values() for word in words(doing)}
    assert all(len(forms.split()) == 2 for forms in v.IRREGULAR_VERBS.values())
    assert {verb for verb in v.IRREGULAR_VERBS if verb in verbs}
    things = {word for names, _ in v.THINGS.values() for word in words(names)}
    people = {word for names in v.ROLES.values() for word in words(names)} | set(v.ROLES)
    assert set(v.IRREGULAR_NOUNS) - {"man", "woman"} <= things | people
    assert set(v.OUTDOORS) <= set(v.THINGS)
