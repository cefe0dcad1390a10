"""Settings as YAML files: plain data in, plain data out."""

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fmn.errors import UserError

_MAX_DEPTH = 20  # sections within sections of a settings file


def read_yaml(path: Path) -> Any:
    """The plain data in a YAML 1.2 file.

    Raises:
        UserError: the file cannot be read, or has aliases, tags, or a key twice.
    """
    from ruamel.yaml import YAML, events
    from ruamel.yaml.error import YAMLError

    try:
        text = path.read_text(encoding="utf-8")
        depth = 0
        for event in YAML(typ="safe", pure=True).parse(io.StringIO(text)):
            depth += isinstance(event, events.CollectionStartEvent) - isinstance(
                event, events.CollectionEndEvent
            )
            if depth > _MAX_DEPTH:
                raise UserError(f"{path}: nested more than {_MAX_DEPTH} deep, which no setting is")
            if isinstance(event, events.AliasEvent) or getattr(event, "anchor", None):
                raise UserError(
                    f"{path}: anchors and aliases are not read here; write the value out"
                )
            if getattr(event, "tag", None):
                raise UserError(
                    f"{path}: the tag {event.tag} is not read here; write a plain value"
                )
        return YAML(typ="safe", pure=True).load(text)
    except OSError as error:
        raise UserError(
            f"{path}: {error.strerror or error}; --params names the settings file"
        ) from error
    except (YAMLError, ValueError, RecursionError) as error:
        # ValueError: a character that YAML does not allow, or a number out of bounds.
        raise UserError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from error


def to_yaml(content: Mapping[str, Any]) -> str:
    """Plain data as YAML, in the order of its keys."""
    from ruamel.yaml import YAML

    text = io.StringIO()
    yaml: Any = YAML(typ="safe", pure=True)
    yaml.default_flow_style = False
    yaml.sort_base_mapping_type_on_output = False
    yaml.dump(dict(content), text)
    return text.getvalue()
