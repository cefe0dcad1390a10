"""Plain YAML: no aliases, no tags, no key twice."""

import io
from pathlib import Path
from typing import Any

from fmn.errors import UserError

DEEPEST = 20  # sections within sections


def read_yaml(path: Path) -> Any:
    """The content of a YAML 1.2 file.

    Raises:
        UserError: the file cannot be read, is not valid, nests too deep, or holds anchors, aliases,
            tags or a key twice.
    """
    from ruamel.yaml import YAML, events
    from ruamel.yaml.error import YAMLError

    try:
        text = path.read_text(encoding="utf-8")
        depth = 0
        for event in YAML(typ="safe", pure=True).parse(io.StringIO(text)):
            if isinstance(event, events.CollectionStartEvent):
                depth += 1
            elif isinstance(event, events.CollectionEndEvent):
                depth -= 1
            if depth > DEEPEST:
                raise UserError(f"{path}: nested more than {DEEPEST} deep; no setting is")
            if isinstance(event, events.AliasEvent) or getattr(event, "anchor", None):
                raise UserError(f"{path}: has an anchor or alias; write the value out")
            if getattr(event, "tag", None):
                raise UserError(f"{path}: has the tag {event.tag}; write a plain value")
        return YAML(typ="safe", pure=True).load(text)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}; --params names the file") from error
    except (YAMLError, ValueError, RecursionError) as error:  # also bad characters, huge numbers
        raise UserError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from error
