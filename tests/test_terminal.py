"""What a person at a terminal sees."""

import pytest

from fmn.terminal import progress_bar, say, show_table


def test_lines_are_printed_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    line = "data/[odd]/name " + "x" * 300
    say(line, 7)
    assert capsys.readouterr().out == f"{line}\n7\n"


def test_a_table_aligns_numbers(capsys: pytest.CaptureFixture[str]) -> None:
    show_table(["task", "score"], [["mrpc", "9.5"], ["stsb", "81.0"]])
    header, first, second = capsys.readouterr().out.splitlines()
    assert header.split() == ["task", "score"]
    assert first.index("9.5") + 3 == second.index("81.0") + 4


def test_a_table_is_as_wide_as_it_is_in_any_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    show_table(["task", *(f"method {number}" for number in range(8))], [["mrpc", *["81.0 ±1.2 (97.3)"] * 8]])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2
    assert lines[1].count("81.0 ±1.2 (97.3)") == 8


def test_progress_is_silent_where_there_is_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    with progress_bar("working") as progress:
        progress(1, 2)
    said = capsys.readouterr()
    assert (said.out, said.err) == ("", "")
