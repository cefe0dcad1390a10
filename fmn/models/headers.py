"""The headers of safetensors files and the index over shards, read and validated; no tensor is loaded.

The safetensors format: https://github.com/huggingface/safetensors#format (8 bytes little-endian header length, a JSON
header of that length, then the tensors' bytes without gaps).
"""

import json
import math
import re
import struct
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from fmn.errors import UserError
from fmn.store import machine

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
PICKLED = "pytorch_model.bin"
PICKLED_INDEX = "pytorch_model.bin.index.json"
# Bytes of an element, by the format's names. Types below a byte are left out: nothing here can merge them.
ITEM_SIZES = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3"), 1),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 2),
    **dict.fromkeys(("U32", "I32", "F32"), 4),
    **dict.fromkeys(("U64", "I64", "F64", "C64"), 8),
}
_LARGEST_HEADER = 100_000_000  # the format's own bound
_LARGEST_JSON = 64_000_000


class TensorHeader(NamedTuple):
    """Where a tensor lies: its bytes are ``file[start:end]``, row-major, of a safetensors dtype such as "F32"."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


def tensor_headers(folder: Path) -> dict[str, TensorHeader]:
    """Every tensor of a checkpoint folder by its stored name, read from the headers alone and validated.

    UserError naming the file and tensor where a header, or the index over the shards, is not consistent with the files.
    """
    files = weight_files(folder)
    if files == [folder / WEIGHTS]:
        return file_headers(folder / WEIGHTS)
    stated = weight_map(folder / INDEX)
    headers: dict[str, TensorHeader] = {}
    for path in files:
        for name, header in file_headers(path).items():
            if name in headers:
                raise UserError(
                    f"{path}: {name!r:.80} is in {headers[name].file.name} too; save the checkpoint again"
                )
            if stated.get(name) != path.name:
                raise UserError(
                    f"{folder / INDEX}: does not say that {name!r:.80} is in {path.name}; save it again"
                )
            headers[name] = header
    if absent := sorted(set(stated) - set(headers)):
        raise UserError(
            f"{folder / INDEX}: {absent[0]!r:.80} is not in {stated[absent[0]]}; get the checkpoint again"
        )
    return headers


def weight_files(folder: Path) -> list[Path]:
    """The files of weights in a folder: one, or its shards; UserError where there are none."""
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder")
    names = {path.name for path in folder.iterdir()}
    if WEIGHTS in names:
        return [folder / WEIGHTS]
    if INDEX not in names:
        remedy = (
            "; `fmn fetch` converts them"
            if any(name.startswith("pytorch_model") for name in names)
            else ""
        )
        raise UserError(
            f"{folder}: has no safetensors weights{remedy}"
            if remedy
            else f"{folder}: {no_weights(names)}"
        )
    return [folder / name for name in sorted(set(weight_map(folder / INDEX).values()))]


def weight_map(index: Path) -> dict[str, str]:
    """Shard by tensor, from an index; shards are plain names beside it."""
    stated = read_json(index).get("weight_map")
    if not isinstance(stated, dict) or not stated:
        raise UserError(f"{index}: has no weight_map; get the checkpoint again")
    suffix = ".bin" if ".bin." in index.name else ".safetensors"
    for tensor, shard in stated.items():
        if not (
            isinstance(shard, str) and re.fullmatch(r"\w[\w.-]*", shard) and shard.endswith(suffix)
        ):
            raise UserError(
                f"{index}: {tensor!r:.80} is said to be in {shard!r:.80}, which is no name of a {suffix} file"
            )
    return stated


def file_headers(path: Path) -> dict[str, TensorHeader]:
    """Every tensor of one file; UserError where its header is not valid or does not fit its size."""
    return read_file(path)[0]


def read_file(path: Path) -> tuple[dict[str, TensorHeader], dict[str, str]]:
    """Every tensor of one file, and its metadata; UserError as `file_headers`."""

    def wrong(what: str) -> UserError:
        return UserError(f"{path}: not a valid safetensors file: {what}; get it again")

    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = struct.unpack("<Q", file.read(8))[0] if size >= 8 else -1
            if not 2 <= length <= min(size - 8, _LARGEST_HEADER):
                raise wrong(
                    f"its header cannot be {length} bytes long" if length >= 0 else "it is cut off"
                )
            text = file.read(length)
    except OSError as error:
        told = f"{path}: cannot be read ({error.strerror}); get it again"
        raise machine.refusal(error, path) or UserError(told) from error
    try:
        header = json.loads(
            text.decode(), object_pairs_hook=_without_duplicates, parse_constant=_refuse_constant
        )
    except (ValueError, RecursionError) as error:
        raise wrong(f"its header is not JSON that can be used ({error!s:.80})") from error
    if not isinstance(header, dict):
        raise wrong("its header is not a JSON object")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(
        isinstance(value, str) for value in metadata.values()
    ):
        raise wrong("its __metadata__ does not map text to text")

    begin = 8 + length
    headers = {}
    for name, entry in header.items():
        if not name.isprintable():
            raise wrong(f"the name {name!r:.80} is not printable")
        if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
            raise wrong(f"{name!r:.80} does not state dtype, shape and data_offsets alone")
        dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
        if not isinstance(dtype, str) or dtype not in ITEM_SIZES:
            raise wrong(f"{name!r:.80} has the unknown dtype {dtype!r:.40}")
        if not _are_counts(shape) or not _are_counts(offsets) or len(offsets) != 2:
            raise wrong(
                f"{name!r:.80} has a shape or data_offsets that are not whole numbers from 0 on"
            )
        start, end = offsets
        if end - start != math.prod(shape) * ITEM_SIZES[dtype]:
            raise wrong(
                f"{name!r:.80} of shape {shape!s:.80} and dtype {dtype} cannot have {end - start} bytes"
            )
        headers[name] = TensorHeader(path, dtype, tuple(shape), begin + start, begin + end)
    position = begin
    for name, one in sorted(headers.items(), key=lambda item: (item[1].start, item[1].end)):
        if one.start != position:
            fault = (
                "overlaps the tensor before it"
                if one.start < position
                else "leaves a gap before it"
            )
            raise wrong(f"{name!r:.80} {fault}")
        position = one.end
    if position != size:
        raise wrong(f"its tensors end at byte {position}, the file at {size}")
    return headers, metadata


def _are_counts(value: Any) -> bool:
    return isinstance(value, list) and all(type(one) is int and 0 <= one < 2**63 for one in value)


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        raise ValueError("a name occurs twice")
    return content


def _refuse_constant(text: str) -> Any:
    raise ValueError(f"{text} is not JSON")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file of bounded size."""
    try:
        if path.stat().st_size > _LARGEST_JSON:
            raise UserError(
                f"{path}: larger than {_LARGEST_JSON // 10**6} MB; not a file of its kind"
            )
        content = json.loads(path.read_bytes(), object_pairs_hook=_without_duplicates)
    except OSError as error:
        raise machine.refusal(error, path) or UserError(
            f"{path}: cannot be read ({error.strerror})"
        ) from error
    except (ValueError, RecursionError) as error:
        raise UserError(
            f"{path}: not JSON that can be used ({error!s:.80}); get the file again"
        ) from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: not a JSON object; get the file again")
    return content


def no_weights(names: Iterable[str]) -> str:
    """What a folder with these names, which has no weights, has instead: the end of a message."""
    if "adapter_config.json" in names:
        return "holds a PEFT adapter alone; merge it into its base (`merge_and_unload`), save that, and give its folder"
    other = sorted(
        name
        for name in names
        if name.endswith((".h5", ".msgpack", ".onnx", ".gguf", ".ot", ".ckpt", ".pt"))
    )
    found = f" (only {other[0]}, which cannot be used)" if other else ""
    return f"has neither {WEIGHTS} nor {PICKLED}{found}; save it with `save_pretrained`"
