"""Make the outline of a checkpoint: its small files, and real headers of weights without weights.

A file of weights in an outline has the header and the size of the real one, and its bytes are a
hole of the file system, which takes no room. So every check that reads headers and small files
works on an outline as on the checkpoint, which is not downloaded.
"""

import io
import json
import shutil
import tempfile
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import IO, Any, NamedTuple

from fmn.errors import UserError
from fmn.models import checkpoints
from fmn.models.checkpoints import FISHER, GRAM
from fmn.sources import adapters, origin
from fmn.sources.forms import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from fmn.sources.origin import Origin
from fmn.store import hub
from fmn.store.headers import WEIGHTS, tensor_headers

LONGEST_HEADER = 100_000_000  # bytes: the limit of the safetensors library


class Outline(NamedTuple):
    """The known facts about a checkpoint.

    Attributes:
        pinned: the source with its revision, which always means the same bytes.
        download: bytes of weights that are on the Hub but not on this machine.
        weights: bytes of the weights.
        parameters: the number of weights.
        is_pickled: the weights have no headers, so the shapes follow from config.json.
        adapter_base: of an adapter, whose tensors are not outlined: the source of its base; ""
            where it names none.
    """

    pinned: str
    download: int
    weights: int
    parameters: int = 0
    is_pickled: bool = False
    adapter_base: str | None = None


def outline(source: str, folder: Path, *, statistics: bool = False) -> Outline:
    """Fill an empty folder with the outline of the checkpoint in a source, and of its statistics.

    Raises:
        UserError: as `fmn.sources.origin.copy_checkpoint` does; or a file of weights is not whole.
    """
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        place = origin.locate(source, Path(scratch))
        files = origin.weight_files(place)
        beside = sorted(place.names & {FISHER, GRAM}) if statistics else []
        parts = [*(name for name in files if not name.endswith(".json")), *beside]
        sizes = {name: _size(place, name) for name in parts}
        if place.is_adapter:
            shutil.copyfile(place.local(ADAPTER_CONFIG), folder / ADAPTER_CONFIG)
            base = adapters.base_source(folder)
            if (name := ADAPTER_WEIGHTS[0]) in files:
                with place.open(name) as stream:
                    _copy_header(stream, sizes[name][0], folder / name, f"{source}: {name}")
            return Outline(place.pinned, _remote(sizes), _all(sizes), adapter_base=base)
        is_pickled = any(name.endswith(".bin") for name in files)
        names = place.names - (set() if statistics else {FISHER, GRAM})
        if is_pickled:
            names = frozenset(name for name in names if ".bin" not in name) | {WEIGHTS}

        def local(name: str) -> Path:
            """The outline of a file of tensors, or the file itself if it is another."""
            path = Path(scratch) / name
            path.parent.mkdir(exist_ok=True)
            if is_pickled and name == WEIGHTS:
                shapes = checkpoints.described_shapes(checkpoints.load_config(folder))
                _write_header(path, shapes)
            elif name.endswith(".safetensors"):
                with place.open(name) as stream:
                    _copy_header(stream, sizes[name][0], path, f"{source}: {name}")
            else:
                return place.local(name)
            return path

        outlined = place._replace(names=names, local=local, is_linked=True)
        origin.copy_origin(outlined, folder, Path(scratch))
    parameters = sum(prod(header.shape) for header in tensor_headers(folder).values())
    return Outline(place.pinned, _remote(sizes), _all(sizes), parameters, is_pickled)


def _size(place: Origin, name: str) -> tuple[int, bool]:
    """The size of a file in bytes, and whether it is only on the Hub."""
    with place.open(name) as stream:
        return stream.seek(0, io.SEEK_END), isinstance(stream.raw, hub.RemoteFile)


def _remote(sizes: Mapping[str, tuple[int, bool]]) -> int:
    return sum(size for size, is_remote in sizes.values() if is_remote)


def _all(sizes: Mapping[str, tuple[int, bool]]) -> int:
    return sum(size for size, _ in sizes.values())


def _runtime_name(name: str) -> str:
    """Today's name of a tensor of BERT; with it, the outline need not be rewritten later."""
    name = name.replace("LayerNorm.gamma", "LayerNorm.weight")
    return name.replace("LayerNorm.beta", "LayerNorm.bias")


def _copy_header(stream: IO[bytes], size: int, path: Path, place: str) -> None:
    """Write a safetensors file with the header of another, runtime names, and a hole for values."""
    length = int.from_bytes(stream.read(8), "little")
    if not 0 < length <= min(LONGEST_HEADER, size - 8):
        raise UserError(f"{place}: not a safetensors file; get it again")
    content = b""
    while part := stream.read(length - len(content)):
        content += part
    try:
        header = json.loads(content)
        end = max((entry["data_offsets"][1] for name, entry in header.items() if name[:2] != "__"))
    except (ValueError, RecursionError, AttributeError, TypeError, KeyError, IndexError) as error:
        raise UserError(f"{place}: not a safetensors file; get it again") from error
    if 8 + length + end != size:
        problem = f"is {size} bytes, and its header tells of {8 + length + end}"
        raise UserError(f"{place}: {problem}; get it again")
    renamed = {_runtime_name(name): entry for name, entry in header.items()}
    if len(renamed) < len(header):  # two tensors of one name: the check of names refuses them
        renamed = header
    _write(path, renamed, end)


def _write_header(path: Path, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Write a safetensors file of float32 tensors with a hole instead of values."""
    header, end = dict[str, Any](), 0
    for name, shape in shapes.items():
        start, end = end, end + 4 * prod(shape)
        header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [start, end]}
    _write(path, header, end)


def _write(path: Path, header: Mapping[str, Any], size: int) -> None:
    content = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(content).to_bytes(8, "little") + content)
        file.truncate(8 + len(content) + size)
