"""What every picture has: markers that tell columns apart, panels in rows, words."""

import pytest

from fmn.report import drawing


def test_every_column_has_a_marker_and_a_colour_of_its_own_wherever_it_stands() -> None:
    look = drawing.look(["base", "a", "merged", "b", "average", "expert"], headline="merged")
    assert (
        len({marker for marker, _ in look.values()})
        == len({colour for _, colour in look.values()})
        == 6
    )
    assert look["merged"] == drawing.HEADLINE
    assert look["base"] == drawing.look(["base"], headline="another")["base"]


@pytest.mark.parametrize(("count", "columns"), [(1, 2), (4, 4), (5, 3), (9, 3)])
def test_panels_stand_in_even_rows_of_at_most_four(count: int, columns: int) -> None:
    figure, axes, found = drawing.panels(count, 1.0)
    assert (len(axes), found) == (count, columns)
    assert all(axis.axison == (axis in axes) for axis in figure.axes)


def test_words_are_listed_as_people_say_them() -> None:
    assert [drawing.listed(words) for words in (["a"], ["a", "b"], ["a", "b", "c"])] == [
        "a",
        "a and b",
        "a, b and c",
    ]
