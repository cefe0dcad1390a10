"""What a person at a terminal sees."""

import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest

from fmn.terminal import loading, progress_bar, say, show_table


def test_lines_are_printed_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    line = "data/[odd]/name " + "x" * 300
    say(line, 7)
    with progress_bar("silent, as this is no terminal") as progress:
        progress(1, 2)
    assert capsys.readouterr() == (f"{line}\n7\n", "")


def test_a_table_aligns_numbers_and_is_as_wide_as_it_has_to_be(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    cells = ["81.0 ±1.2 (97.3)"] * 8
    show_table(["task", *map(str, range(8))], [["mrpc", *cells], ["sst2", *cells[:7], "9.5"]])
    header, first, second = capsys.readouterr().out.splitlines()
    assert header.split() == ["task", *map(str, range(8))]
    assert first.split("  ") == ["mrpc", *cells]
    assert len(second) == len(first)
    assert second.endswith(" 9.5")


NOISY = """
import atexit, os, sys, warnings
from pathlib import Path
from fmn.errors import UserError
from fmn.terminal import complain, only_ours, say

atexit.register(lambda: print("noise at exit", file=sys.stderr))
try:
    with only_ours(Path("logs/run.log")):
        warnings.warn("noise of Python")
        os.write(2, b"noise of a library\\n")
        os.system("echo noise of a process >&2")
        say("a stage")
        raise {error}
except UserError as error:
    complain(str(error))
"""


def noisy(folder: Path, error: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-c", NOISY.format(error=error)]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)


def test_libraries_write_to_a_file_and_we_to_the_terminal(tmp_path: Path) -> None:
    done = noisy(tmp_path, "UserError('a mistake')")
    assert done.stdout == "a stage\n"
    assert done.stderr == "fmn: a mistake\n"
    log = (tmp_path / "logs" / "run.log").read_text()
    for source in ("of Python", "of a library", "of a process", "at exit"):
        assert f"noise {source}" in log

    done = noisy(tmp_path, "KeyError('lost')")
    assert "Traceback" in done.stderr, "an unforeseen error keeps it"
    assert "KeyError: 'lost'" in done.stderr
    assert "noise of" not in done.stderr


def test_what_an_encoding_lacks_is_written_in_characters_that_it_has() -> None:
    code = (
        "from fmn.terminal import complain, plain_characters, say, show_table; plain_characters()\n"
        "say('81.0 ±1.2, é, 語'); show_table(['a'], [['−3 … 4']]); complain('größer')"
    )
    environment = os.environ | {"PYTHONIOENCODING": "ascii"}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=environment, capture_output=True, check=True)
    assert done.stdout.decode("ascii").split() == "81.0 +-1.2, e, ? a -3 ... 4".split()  # noqa: SIM905
    assert done.stderr == b"fmn: gro?er\n"


def test_help_is_readable_without_utf8() -> None:
    environment = os.environ | {"PYTHONIOENCODING": "ascii"}
    command = [sys.executable, "-m", "fmn", "fisher", "--help"]
    done = subprocess.run(command, env=environment, capture_output=True, check=True)
    assert b"--samples" in done.stdout


def test_a_terminal_shows_that_libraries_are_loaded() -> None:
    code = "from fmn.terminal import loading, say; loading(); loading(); say('done')"
    here, there = pty.openpty()
    done = subprocess.run([sys.executable, "-c", code], stdout=there, stderr=there, check=True)
    assert done.returncode == 0
    os.close(there)
    assert os.read(here, 1000).decode() == f"loading ...\r{' ' * 11}\rdone\r\n"


def test_nothing_of_that_reaches_a_file(capfd: pytest.CaptureFixture[str]) -> None:
    loading()
    say("done")
    assert capfd.readouterr() == ("done\n", "")
