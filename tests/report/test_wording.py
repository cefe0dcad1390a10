"""Numbers, names and tables are as people read them."""

import re
from html import unescape

from markdown_it import MarkdownIt

from fmn.report import wording


def test_a_text_of_a_user_is_a_text_in_markdown_too() -> None:
    html = MarkdownIt("commonmark").enable("table").render
    for text in ("<b>|x", "*a*", "`a|b`", "_a_ b_c", "[a](b)", "a\\|b", "![x](y)", "two\nlines"):
        (cell,) = re.findall("<td>(.*)</td>", html(wording.markdown(["head"], [[text]])))
        assert unescape(cell) == " ".join(text.split())


def test_words_are_as_people_say_them() -> None:
    listed = [wording.listed(words) for words in (["a"], ["a", "b"], ["a", "b", "c"])]
    assert listed == ["a", "a and b", "a, b and c"]
    times = [wording.seconds(seconds) for seconds in (0.04, 9.96, 75, 780)]
    assert times == ["0.0 s", "10.0 s", "75 s", "13 min"]
    assert wording.markdown(["a"], [["b|c"]]) == "| a |\n| --- |\n| b\\|c |\n"
