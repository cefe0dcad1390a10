"""Files that are broken or hostile: they are read, or refused in one line that names them."""

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests import readers
from tests.conftest import ROOT

SEEDS = {path.name: path.read_bytes() for path in sorted((ROOT / "tests/corpus").iterdir())}
FRAGMENTS = (
    *(b"\0", b"\xff\xfe", b"\xef\xbb\xbf", b'"', b"'", b"\n", b"\r", b"\t", b",", b";", b"\n\n"),
    *(b"[", b"]", b"{", b"}", b"\\ud800", b"NaN", b"1e999", b"-1", b"null", b"true", b"[{[1]}]"),
    *(b"9" * 5000, b"[" * 5000, b"x" * 70_000, "\u2028\x1b[31m".encode(), b"\x80"),
)


@given(st.sampled_from(sorted(SEEDS)), st.data())
@settings(max_examples=400)
def test_what_is_changed_in_any_place_is_read_or_refused(
    tmp_path_factory: pytest.TempPathFactory, seed: str, data: Any
) -> None:
    number, content = SEEDS[seed][0], SEEDS[seed][1:]
    for _ in range(data.draw(st.integers(1, 4))):
        start = data.draw(st.integers(0, len(content)))
        length = data.draw(st.sampled_from([0, 0, 1, 4, len(content)]))
        new = data.draw(st.sampled_from(FRAGMENTS) | st.binary(max_size=4))
        content = content[:start] + new + content[start + length :]
    readers.attempt(number, content, tmp_path_factory.getbasetemp())
