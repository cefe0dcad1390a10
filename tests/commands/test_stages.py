"""Commands by workflow: each in a group, with an example that the command line takes."""

import shlex

import pytest

from fmn.cli import app, main
from fmn.commands.stages import COMMANDS, EXAMPLES


def test_every_command_has_an_example() -> None:
    assert {name for name in app if not name.startswith("-")} == {*EXAMPLES}
    assert {*COMMANDS} < {*EXAMPLES}


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_is_taken_and_shown(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    for example in EXAMPLES[name].split("; "):
        program, command, *words = shlex.split(example.partition(" > ")[0])
        assert (program, command) == ("fmn", name)
        app.parse_args([command, *words], exit_on_error=False, print_error=False)
    main([name, "--help"])
    assert EXAMPLES[name] in " ".join(capsys.readouterr().out.split())


def test_help_shows_groups_in_the_order_of_work(capsys: pytest.CaptureFixture[str]) -> None:
    main(["--help"])
    text = capsys.readouterr().out
    groups = ["Start here", "Experts and data", "Merging", "Scores and answers", "Registry"]
    places = [text.index(group) for group in groups]
    assert places == sorted(places)
    assert text.index(" init ") < text.index(" check ") < text.index(" run ")
