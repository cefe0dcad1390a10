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
        text, depth = path.read_text(encoding="utf-8"), 0
        for event in YAML(typ="safe", pure=True).parse(io.StringIO(text)):
            depth += isinstance(event, events.CollectionStartEvent)
            depth -= isinstance(event, events.CollectionEndEvent)
            has_anchor = isinstance(event, events.AliasEvent) or getattr(event, "anchor", None)
            if has_anchor or getattr(event, "tag", None) or depth > _MAX_DEPTH:
                kinds = (
                    f"anchors and aliases, tags, and sections nested more than {_MAX_DEPTH} deep"
                )
                raise UserError(f"{path}: {kinds} are not read; write plain values")
        return YAML(typ="safe", pure=True).load(text)
    except OSError as error:
        remedy = "--params names the settings file"
        raise UserError(f"{path}: {error.strerror or error}; {remedy}") from error
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
