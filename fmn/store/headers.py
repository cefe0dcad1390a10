"""Read headers of safetensors files and the index of shards: where each tensor's bytes are.

The library validates a file, but does not return the tensors' positions. No tensor is loaded.
Format: https://github.com/huggingface/safetensors#format (8 bytes little-endian header length, a
JSON header of that length, then the tensors' bytes without gaps).
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from textwrap import shorten
from typing import Any, NamedTuple

from safetensors import SafetensorError, safe_open

from fmn.errors import UserError
from fmn.store.artifacts import check_folder

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
PICKLED = "pytorch_model.bin"


class TensorHeader(NamedTuple):
    """The position of a tensor: its bytes are ``file[start:end]``, row-major."""

    file: Path
    dtype: str  # the format's name, such as "F32"
    shape: tuple[int, ...]
    start: int
    end: int


def read_file(path: Path) -> tuple[dict[str, TensorHeader], dict[str, str]]:
    """Every tensor of one safetensors file by name, and the file's metadata.

    Raises:
        UserError: the file cannot be read, or is not a valid safetensors file.
    """
    try:
        with safe_open(path, framework="numpy"):  # validates the file
            pass
        with path.open("rb") as stream:
            begin = 8 + int.from_bytes(stream.read(8), "little")
            header = json.loads(stream.read(begin - 8))
    except SafetensorError as error:
        problem = f"not a valid safetensors file: {first_words(error)}"
        raise UserError(f"{path}: {problem}; get it again") from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read; get it again") from error
    metadata: dict[str, str] = header.pop("__metadata__", {})
    tensors = {}
    for name, entry in header.items():
        start, end = (begin + offset for offset in entry["data_offsets"])
        tensors[name] = TensorHeader(path, entry["dtype"], tuple(entry["shape"]), start, end)
    return tensors, metadata


def file_headers(path: Path) -> dict[str, TensorHeader]:
    """Every tensor of one safetensors file by name; raises as `read_file` does."""
    return read_file(path)[0]


def tensor_headers(folder: Path) -> dict[str, TensorHeader]:
    """Every tensor of a checkpoint folder by its stored name.

    Raises:
        UserError: there are no safetensors weights, a file is not valid, or the index over the
            shards does not fit them.
    """
    names = names_in(folder)
    if WEIGHTS in names:
        return file_headers(folder / WEIGHTS)
    if INDEX not in names:
        remedy = "`fmn fetch` makes it of adapters and of other forms of weights"
        raise UserError(f"{folder}: has no {WEIGHTS}; {remedy}")
    shard_of = weight_map(folder / INDEX)
    shards = [file_headers(folder / shard) for shard in sorted(set(shard_of.values()))]
    tensors = {name: header for shard in shards for name, header in shard.items()}
    is_doubled = sum(map(len, shards)) > len(tensors)
    if is_doubled or shard_of != {name: header.file.name for name, header in tensors.items()}:
        raise UserError(f"{folder / INDEX}: does not fit the shards; save the checkpoint again")
    return tensors


def weight_map(index: Path) -> dict[str, str]:
    """The file name of each tensor's shard, from an index.

    Raises:
        UserError: the index is not valid, or has a shard that is not beside it.
    """
    shard_of = read_json(index).get("weight_map")
    if not isinstance(shard_of, dict) or not shard_of:
        raise UserError(f"{index}: has no weight_map; get the checkpoint again")
    for tensor, shard in shard_of.items():
        if not re.fullmatch(r"\w[\w.-]*\.safetensors", str(shard)):
            problem = f"{tensor!r:.80} is in {shard!r:.80}, which is no file of weights beside it"
            raise UserError(f"{index}: {problem}; get the checkpoint again")
    return shard_of


def json_value(path: Path) -> Any:
    """Read JSON from a file of unknown origin; `UserError` if it is not JSON."""
    try:
        return json.loads(path.read_bytes())
    except OSError as error:
        raise UserError(f"{path}: cannot be read; get the file again") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not JSON ({error!s:.80}); get the file again") from error


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object from a file of unknown origin; `UserError` if it is something else."""
    content = json_value(path)
    if not isinstance(content, dict):
        raise UserError(f"{path}: not a JSON object; get the file again")
    return content


def names_in(folder: Path) -> set[str]:
    """The names in a folder; `UserError` if there is no such folder."""
    check_folder(folder)
    return {path.name for path in folder.iterdir()}


def first_words(error: BaseException) -> str:
    """What another library says, as it fits into one line of ours."""
    return shorten(str(error), 160, placeholder=" ...") or type(error).__name__


def write_json(path: Path, content: Mapping[str, Any] | Sequence[Any]) -> None:
    """Write JSON as Transformers does: indented, with a newline at the end."""
    path.write_text(json.dumps(content, indent=2) + "\n")


def json_entries(content: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Every plain value inside a JSON value, as (keys joined by dots, value)."""
    if isinstance(content, dict):
        for name, value in content.items():
            yield from json_entries(value, f"{path}.{name}" if path else name)
    elif isinstance(content, list):
        for value in content:
            yield from json_entries(value, path)
    else:
        yield path, content
