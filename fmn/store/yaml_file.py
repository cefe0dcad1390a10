"""Read and write YAML files of plain data."""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fmn.errors import UserError
from fmn.store.artifacts import absent

_MAX_DEPTH = 20  # sections within sections of a settings file


def read_yaml(path: Path, option: str = "--params") -> Any:
    """Read plain data from a YAML 1.2 file.

    Args:
        path: the file.
        option: the option that named the file, for messages.

    Raises:
        UserError: the file cannot be read, or has aliases, tags, or a key twice.
    """
    from ruamel.yaml import YAML, events
    from ruamel.yaml.error import YAMLError

    try:
        text, depth = path.read_text(encoding="utf-8"), 0
        for event in YAML(typ="safe", pure=True).parse(io.StringIO(text)):
            depth += isinstance(event, events.CollectionStartEvent)
            depth -= isinstance(event, events.CollectionEndEvent)
            has_anchor = isinstance(event, events.AliasEvent) or getattr(event, "anchor", None)
            if has_anchor or getattr(event, "tag", None) or depth > _MAX_DEPTH:
                kinds = (
                    f"anchors and aliases, tags, and sections nested more than {_MAX_DEPTH} deep"
                )
                line = event.start_mark.line + 1
                raise UserError(f"{path}:{line}: {kinds} are not read; write plain values")
        return YAML(typ="safe", pure=True).load(text)
    except FileNotFoundError as error:
        remedy = f"name another with {option}"
        remedy += ", or let `fmn init` write one" if option == "--params" else ""
        raise UserError(f"{path}: {absent(path, 'file')}; {remedy}") from error
    except OSError as error:
        remedy = f"check the path that {option} names"
        raise UserError(f"{path}: {error.strerror or error}; {remedy}") from error
    except UnicodeDecodeError as error:
        line = 1 + error.object[: error.start].count(b"\n")
        wrong = error.object[error.start]
        raise UserError(f"{path}:{line}: not UTF-8 (byte {wrong:#x}); save it as UTF-8") from error
    except (YAMLError, ValueError, RecursionError) as error:
        # ValueError: a character that YAML does not allow, or a number out of bounds.
        raise UserError(_not_valid(path, error)) from error


def _not_valid(path: Path, error: Exception) -> str:
    """Describe why a file is not YAML, with the line."""
    from ruamel.yaml.error import MarkedYAMLError

    if not isinstance(error, MarkedYAMLError) or not error.problem_mark:
        reason = " ".join(str(error).split()).replace(' in "<file>"', "")
        return f"{path}: not valid YAML: {reason}; write plain text"
    problem = " ".join(str(error.problem).split())
    place = f"{path}:{error.problem_mark.line + 1}: not valid YAML: "
    if "duplicate key" in problem:
        return f"{place}{problem}; remove one of the two"
    if "another document" in problem:
        return f"{place}a second document begins here; keep one"
    begin = error.context_mark
    context = f" {error.context}, which begins on line {begin.line + 1}" if begin else ""
    return f"{place}{problem}{context}; see that brackets, quotes and indents match"


def line_of(path: Path, keys: Sequence[str]) -> int | None:
    """The line of a setting in a YAML file, counted from 1.

    If the file does not have the setting, it is the line of the innermost section that exists.

    Args:
        path: the file.
        keys: the names of the sections and of the setting; positions in lists.
    """
    from ruamel.yaml import YAML
    from ruamel.yaml.nodes import MappingNode, SequenceNode

    try:
        node: Any = YAML(typ="safe", pure=True).compose(path.read_text(encoding="utf-8"))
    except Exception:  # a file that cannot be read is reported elsewhere
        return None
    line = None
    for key in keys:
        if isinstance(node, MappingNode):
            pair = next((pair for pair in node.value if pair[0].value == key), None)
            if pair is None:
                break
            line, node = pair[0].start_mark.line + 1, pair[1]
        elif isinstance(node, SequenceNode) and key.isdecimal() and int(key) < len(node.value):
            node = node.value[int(key)]
            line = node.start_mark.line + 1
        else:
            break
    return line


def to_yaml(content: Mapping[str, Any]) -> str:
    """Convert plain data to YAML, in the order of its keys."""
    from ruamel.yaml import YAML

    text = io.StringIO()
    yaml: Any = YAML(typ="safe", pure=True)
    yaml.default_flow_style = False
    yaml.sort_base_mapping_type_on_output = False
    yaml.dump(dict(content), text)
    return text.getvalue()
