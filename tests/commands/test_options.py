"""Options of commands, from the signatures and docstrings of stage functions."""

from pathlib import Path

import pytest

from fmn.cli import app
from fmn.commands.options import _paths_by_name
from fmn.errors import UserError
from tests.test_cli import COMMANDS, fmn


@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_of_a_command_has_a_help_text(
    capsys: pytest.CaptureFixture[str], command: str
) -> None:
    fmn(command, "--help")
    assert "--json" in capsys.readouterr().out
    arguments = app[command].assemble_argument_collection(parse_docstring=True)
    visible = [argument for argument in arguments if argument.show and not argument.children]
    assert visible
    assert not [argument.name for argument in visible if not argument.parameter.help]


@pytest.mark.parametrize(
    ("command", "options"),
    [
        ("run", {"--params": "-p", "--verbose": "-v"}),
        ("compare", {"--params": "-p", "--verbose": "-v"}),
        ("fisher", {"--out": "-o"}),
        ("init", {"--out": "-o"}),
        ("register", {"--out": "-o", "--params": "-p"}),
    ],
)
def test_options_have_short_forms(command: str, options: dict[str, str]) -> None:
    names = [argument.names for argument in app[command].assemble_argument_collection()]
    for long, short in options.items():
        assert any({long, short} <= {*each} for each in names), (command, long)


def test_paths_are_named_one_by_one_or_by_their_folder(tmp_path: Path) -> None:
    for name in ("a.parquet", "b.parquet", "a.gram.safetensors", ".hidden.parquet"):
        (tmp_path / name).touch()
    fisher = _paths_by_name([str(tmp_path)], "fisher", None)
    assert fisher == {name: tmp_path / f"{name}.parquet" for name in "ab"}
    assert _paths_by_name([str(tmp_path)], "fisher", {"b": Path("x")}) == {"b": fisher["b"]}
    assert _paths_by_name([str(tmp_path)], "gram", None) == {"a": tmp_path / "a.gram.safetensors"}
    assert _paths_by_name(["a=x", "b=y"], "experts", None) == {"a": Path("x"), "b": Path("y")}
    with pytest.raises(UserError, match=r"--expert .*: neither NAME=PATH nor a folder of them"):
        _paths_by_name([str(tmp_path)], "experts", None)
    with pytest.raises(UserError, match="--expert none: no such folder"):
        _paths_by_name(["none"], "experts", None)
