"""Statistics of an expert that are as large as it is, as safetensors with their lineage in the header.

The mask Fisher has a number a node and goes to Parquet (`fmn.artifacts`). The full diagonal Fisher and Gram matrices go
here: float32 tensors by name, read a slice at a time when experts are merged. What they were made from stands as JSON
in the file's metadata, under ``fmn``, with a sha256 of all that the file says: metadata, header and tensors.
"""

import json
from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fmn.errors import UserError
from fmn.models.headers import TensorHeader, read_file
from fmn.store.artifacts import agrees, canonical, digest_bytes, digest_file, whole_file

if TYPE_CHECKING:
    from torch import Tensor

FORMAT = 2
COMMANDS = {"full-fisher": "fmn full-fisher", "gram": "fmn gram"}


def write(
    path: Path, kind: str, tensors: "Mapping[str, Tensor]", metadata: Mapping[str, Any]
) -> None:
    """Write float32 tensors and what they were made from; `kind`: one of COMMANDS."""
    from safetensors.torch import save_file

    kept = {name: tensors[name].float().contiguous() for name in sorted(tensors)}
    stated = {**metadata, "kind": kind, "format": FORMAT}
    values = sha256()
    for tensor in kept.values():  # in the order in which the file has them
        values.update(tensor.numpy().data)
    shapes = {name: list(tensor.shape) for name, tensor in kept.items()}
    stated["digest"] = _digest(stated, shapes, values.hexdigest())
    with whole_file(path) as file:
        save_file(kept, file, {"fmn": canonical(stated).decode()})


def _digest(stated: Mapping[str, Any], shapes: Mapping[str, list[int]], values: str) -> str:
    """Of metadata, the tensors' shapes in the order of the file, and the sha256 of their bytes."""
    return digest_bytes(canonical([{**stated, "digest": None}, list(shapes.items()), values]))


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
        raise UserError(
            f"{path}: holds {found} of format {stated.get('format')}, not {kind} of {FORMAT}; {remedy}"
        )
    start = min((header.start for header in headers.values()), default=0)
    in_order = sorted(headers.items(), key=lambda one: one[1].start)
    shapes = {name: list(header.shape) for name, header in in_order}
    right = agrees(digest, lambda: _digest(stated, shapes, digest_file(path, start)))
    if not right or {one.dtype for one in headers.values()} - {"F32"}:
        raise UserError(f"{path}: its content is not what was written; make it again")
    return headers, stated


def is_current(path: Path, kind: str, key: str) -> bool:
    """Whether a statistic was made for this content key and is still what was written."""
    try:
        return bool(read(path, kind)[1].get("key") == key)
    except UserError:
        return False
