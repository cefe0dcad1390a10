"""The outline of a checkpoint: its small files, and its weights as holes below real headers.

A file of weights in an outline has the header and the size of the real one, and its bytes are a
hole of the file system, which takes no room. So every check that reads headers and small files
works on an outline as on the checkpoint, which is not downloaded.
"""

import io
import json
import tempfile
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import IO, Any, NamedTuple

from fmn.errors import UserError
from fmn.models import checkpoints
from fmn.models.headers import PICKLED, WEIGHTS, tensor_headers
from fmn.sources import origin
from fmn.store import hub

LONGEST_HEADER = 100_000_000  # bytes; the library's own limit


class Outline(NamedTuple):
    """What is known of a checkpoint.

    Attributes:
        pinned: its source, such that it means the same bytes tomorrow.
        download: bytes of weights that the Hub has and this machine has not.
        weights: bytes of the weights.
        parameters: how many numbers they are.
        is_pickled: whether the shapes are what config.json says, for want of headers.
    """

    pinned: str
    download: int
    weights: int
    parameters: int
    is_pickled: bool


def outline(source: str, folder: Path, *, statistics: bool = False) -> Outline:
    """Fill an empty folder with the outline of the checkpoint in a source, and of its statistics.

    Raises:
        UserError: as `fmn.sources.origin.copy_checkpoint` does; or a file of weights is not whole.
    """
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        (Path(scratch) / "holes" / "fmn").mkdir(parents=True)  # of statistics beside an expert
        place = origin.locate(source, Path(scratch))
        is_pickled = WEIGHTS not in place.names and origin.weight_files(place) == [PICKLED]
        sizes: dict[str, tuple[int, bool]] = {}

        def local(name: str) -> Path:
            """An outline of a file of weights; any other file itself."""
            path = Path(scratch) / "holes" / name
            if is_pickled and name == WEIGHTS:
                with place.open(PICKLED) as stream:
                    sizes[name] = _size(stream)
                shapes = checkpoints.described_shapes(checkpoints.load_config(folder))
                _write_header(path, {each: ("F32", shape) for each, shape in shapes.items()})
            elif name.endswith(".safetensors"):
                with place.open(name) as stream:
                    sizes[name] = _size(stream)
                    _copy_header(stream, sizes[name][0], path, f"{source}: {name}")
            else:
                return place.local(name)
            return path

        names = place.names - {PICKLED} | ({WEIGHTS} if is_pickled else set())
        outlined = place._replace(names=names, local=local, is_linked=True)
        origin.copy_files(outlined, folder, statistics=statistics)
    return Outline(
        pinned=place.pinned,
        download=sum(size for size, is_remote in sizes.values() if is_remote),
        weights=sum(size for size, _ in sizes.values()),
        parameters=sum(prod(header.shape) for header in tensor_headers(folder).values()),
        is_pickled=is_pickled,
    )


def _size(stream: io.BufferedReader) -> tuple[int, bool]:
    """The bytes of a file, and whether they are on the Hub alone; it is read from its beginning."""
    size = stream.seek(0, io.SEEK_END)
    stream.seek(0)
    return size, isinstance(stream.raw, hub.RemoteFile)


def _copy_header(stream: IO[bytes], size: int, path: Path, place: str) -> None:
    """Write the header of a safetensors file, with tensors under runtime names, and a hole."""
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
    renamed = {origin.runtime_name(name): entry for name, entry in header.items()}
    if len(renamed) < len(header):
        raise UserError(f"{place}: has a LayerNorm by its old and its new name; save it again")
    _write(path, renamed, end)


def _write_header(path: Path, tensors: Mapping[str, tuple[str, tuple[int, ...]]]) -> None:
    """Write a safetensors file of float32 tensors that is a hole below its header."""
    header, end = dict[str, Any](), 0
    for name, (dtype, shape) in tensors.items():
        start, end = end, end + 4 * prod(shape)
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}
    _write(path, header, end)


def _write(path: Path, header: Mapping[str, Any], size: int) -> None:
    content = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(content).to_bytes(8, "little") + content)
        file.truncate(8 + len(content) + size)
