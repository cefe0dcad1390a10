"""Statistics of an expert that are as large as it is, as safetensors with their lineage in the header.

The mask Fisher has a number a node and goes to Parquet (`fmn.artifacts`). The full diagonal Fisher and Gram matrices go
here: float32 tensors by name, read a slice at a time when experts are merged. What they were made from stands as JSON
in the file's metadata, under ``fmn``, with the sha256 of the tensors' bytes.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fmn.artifacts import canonical, digest_file, whole_file
from fmn.errors import UserError
from fmn.headers import TensorHeader, read_file

if TYPE_CHECKING:
    from torch import Tensor

FORMAT = 1
COMMANDS = {"full-fisher": "fmn full-fisher", "gram": "fmn gram"}


def write(path: Path, kind: str, tensors: "Mapping[str, Tensor]", metadata: Mapping[str, Any]) -> None:
    """Write float32 tensors and what they were made from; `kind`: one of COMMANDS."""
    from hashlib import sha256

    from safetensors.torch import save_file

    kept = {name: tensors[name].float().contiguous() for name in sorted(tensors)}
    digest = sha256()
    for tensor in kept.values():  # in the order in which the file has them
        digest.update(tensor.numpy().data)
    stated = {**metadata, "kind": kind, "format": FORMAT, "digest": digest.hexdigest()}
    with whole_file(path) as file:
        save_file(kept, file, {"fmn": canonical(stated).decode()})


def read(path: Path, kind: str) -> tuple[dict[str, TensorHeader], dict[str, Any]]:
    """Where the tensors lie, by name, and what they were made from.

    Raises UserError for a file that is not of this kind or was damaged.
    """
    remedy = f"`{COMMANDS[kind]}` makes one"
    if not path.is_file():
        raise UserError(f"{path}: no such {kind} file; {remedy}")
    headers, metadata = read_file(path)
    try:
        stated = json.loads(metadata["fmn"])
        found, digest = stated["kind"], stated["digest"]
    except (KeyError, ValueError, TypeError, RecursionError) as error:
        raise UserError(f"{path}: holds no statistic of fmn's; {remedy}") from error
    if found != kind or stated.get("format") != FORMAT:
        raise UserError(f"{path}: holds {found} of format {stated.get('format')}, not {kind} of {FORMAT}; {remedy}")
    start = min((header.start for header in headers.values()), default=0)
    if digest_file(path, start) != digest:
        raise UserError(f"{path}: its content is not what was written; make it again")
    return headers, stated


def is_current(path: Path, kind: str, key: str) -> bool:
    """Whether a statistic was made for this content key and is still what was written."""
    try:
        return bool(read(path, kind)[1].get("key") == key)
    except UserError:
        return False
