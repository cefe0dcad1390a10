"""The reference pages of the documentation's site, from the code; a hook of mkdocs.

The pages are never files: mkdocs takes their text as it is made here, at each build.
"""

import importlib
import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from pydantic import BaseModel, SecretStr
from pydantic.fields import FieldInfo

ROOT = Path(__file__).parent.parent
ROOMS = ("rows", "models", "sources", "fisher", "merge", "evaluate", "experiments", "report")
BEHIND = ("registry", "setup")  # rooms that the command line calls, listed after the others


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the reference pages."""
    for name, text in (("settings", settings()), ("commands", commands()), ("python", python())):
        files.append(File.generated(config, f"reference/{name}.md", content=text))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """A link to a file of the repository that is no page becomes the file's name."""
    return re.sub(r"\[([^\]]+)\]\(\.\./[^)]+\)", r"`\1`", markdown)


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")


# ---------------------------------------------------------------------------------------------
# Settings


def settings() -> str:
    """Every setting: of each section its own table, after that of the file's top level."""
    from fmn.params import Params

    parts = [
        "# Settings",
        "Every setting of `params.yaml`. The same as a JSON schema, for editors: `fmn schema`.",
    ]
    places: dict[type[BaseModel], str] = {Params: ""}  # where a section is described
    queue: list[type[BaseModel]] = [Params]
    for model in queue:  # which grows
        for name, field in model.model_fields.items():
            for kind, suffix in _sections(field.annotation):
                if kind not in places:
                    places[kind] = f"{places[model]}.{name}{suffix}".removeprefix(".")
                    queue.append(kind)
    for model, place in places.items():
        parts += [f"## {place or 'The file'}", "| setting | values | default | |"]
        parts.append("|---|---|---|---|")
        for name, field in model.model_fields.items():
            values = _cell(_kind(field.annotation))
            for kind, _ in _sections(field.annotation):
                anchor = places[kind].lower().replace(".", "")
                values = values.replace("a section", f"[a section](#{anchor})")
            cells = [values, _default(field), _cell(field.description or "")]
            parts.append(f"| `{name}` | {' | '.join(cells)} |")
    return "\n".join(
        f"\n{part}\n" if part.startswith(("#", "Every")) else part for part in parts
    ).replace("| setting", "\n| setting")


def _sections(kind: Any, suffix: str = "") -> Iterator[tuple[type[BaseModel], str]]:
    """The sections that a setting's type holds, and what stands between them and its name."""
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        yield kind, suffix
    is_named = get_origin(kind) is dict
    for inner in get_args(kind):
        yield from _sections(inner, f"{suffix}.NAME" if is_named else suffix)


def _kind(kind: Any) -> str:
    """A type in words."""
    arguments = get_args(kind)
    if get_origin(kind) is Literal:
        return ", ".join(f"`{each}`" for each in arguments)
    if get_origin(kind) in (Union, UnionType):
        return " or ".join(_kind(each) for each in arguments if each is not type(None))
    if get_origin(kind) is dict:
        return f"NAME: {_kind(arguments[1])}"
    if get_origin(kind) in (list, tuple):
        return f"list of {_kind(arguments[0])}"
    if get_origin(kind):  # Annotated, or a subscripted type that only narrows
        return _kind(arguments[0])
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        return "a section"
    names = {str: "text", int: "whole number", float: "number", bool: "`true`, `false`"}
    return names.get(kind, "text" if kind is SecretStr else "any")


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "must be there"
    value = field.get_default(call_default_factory=True)
    if isinstance(value, BaseModel) or value in (None, {}, [], ()):
        return ""
    if isinstance(value, dict):
        return ", ".join(f"`{name}`" for name in value)
    return f"`{str(value).lower() if isinstance(value, bool) else value}`"


# ---------------------------------------------------------------------------------------------
# Command line


def commands() -> str:
    """Every command with its usage, what it does and its options."""
    from fmn.cli import app

    parts = ["# Command line", "Each command explains itself too: `fmn COMMAND --help`."]
    for name in sorted(name for name in app if not name.startswith("-")):
        command = app[name]
        if not command.default_command:
            continue
        lines = inspect.cleandoc(command.default_command.__doc__ or "").partition("Args:")[0]
        parts += [f"## fmn {name}", _as_markdown(lines.strip())]
        rows = ["| option | default | |", "|---|---|---|"]
        for each in command.assemble_argument_collection(parse_docstring=True):
            if not each.show:
                continue
            ours = [name for name in each.names if not name.startswith(("--no-", "--empty-"))]
            names = ", ".join(f"`{name}`" for name in ours)
            default = each.field_info.default
            is_plain = isinstance(default, str | int | float | Path) and default not in ("", False)
            shown = f"`{default}`" if is_plain else ""
            rows.append(f"| {names} | {shown} | {_cell(each.parameter.help or '')} |")
        parts.append("\n".join(rows))
    return "\n\n".join(parts) + "\n"


def _as_markdown(text: str) -> str:
    """A docstring's text, in which a command stands as a paragraph of its own."""
    return re.sub(r"^(fmn .*)$", r"```bash\n\1\n```", text, flags=re.MULTILINE)


# ---------------------------------------------------------------------------------------------
# Python


def python() -> str:
    """The public names of each room, whose docstrings mkdocstrings renders."""
    parts = [
        "# Python",
        "Every stage is a function from files to files; the commands are these functions. What is"
        " not listed here may change without notice.",
    ]
    for room in (*ROOMS, *BEHIND):
        package = importlib.import_module(f"fmn.{room}")
        parts += [f"## fmn.{room}", inspect.cleandoc(package.__doc__ or "")]
        for name in package.__all__:
            value = getattr(package, name)
            if inspect.isfunction(value) or inspect.isclass(value):
                parts.append(f"::: {value.__module__}.{value.__name__}")
    return "\n\n".join(parts) + "\n"
