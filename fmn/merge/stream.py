"""safetensors files read and written at the speed of a copy, in bounded memory.

Rows of tensors are read into buffers that are used again, as fresh memory costs as much as the
reading. A thread hashes and writes while the next rows are merged.
"""

import json
import math
import os
import resource
import shutil
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from hashlib import sha256
from io import FileIO
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor

from fmn.errors import UserError
from fmn.store.artifacts import digest_file
from fmn.store.headers import INDEX, TensorHeader, file_headers, write_json

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
SHARD_BYTES = 5 * 10**9  # of tensors in a file, as Transformers has it
BATCH_BYTES = 2 * 2**20  # hashed and written together, as a thread takes long to wake up
MOST_OPEN = 256  # files that are read
BATCHES = 8  # merged but not yet hashed and written
WORKING_SET = 12 * 2**20  # bytes, in float64, of all that is in memory of one piece of a parameter

Files = Mapping[str, Sequence["TensorSpec"]]
"""Tensors by file name."""


class TensorSpec(NamedTuple):
    """A tensor of an output file."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


Read = Callable[[TensorHeader, slice | None, int | None], Tensor]
"""A function of (tensor, rows, buffer) that reads rows of a stored tensor, or all rows for None.
They stay valid until the next reading into the buffer with the same number; forever for None."""


@contextmanager
def reading() -> Iterator[Read]:
    """A function that reads rows of tensors from their files.

    Files are not memory-mapped, as mapped pages count as the process's memory. At most MOST_OPEN
    files are open, and at most half of what the system allows; the least recently read is closed.
    """
    buffers: dict[int | None, Tensor] = {}
    files: dict[Path, FileIO] = {}  # the most recently read is the last
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]  # -1: no limit
    most = min(MOST_OPEN, max(1, limit // 2)) if limit > 0 else MOST_OPEN

    def opened(path: Path) -> FileIO:
        file = files.pop(path, None)
        if file is None:
            if len(files) >= most:
                files.pop(next(iter(files))).close()
            file = FileIO(path)
        files[path] = file
        return file

    try:

        def read(header: TensorHeader, rows: slice | None, buffer: int | None) -> Tensor:
            dtype, first, shape = DTYPES[header.dtype], 0, header.shape
            if rows is not None:
                first, shape = rows.start, (rows.stop - rows.start, *shape[1:])
            size = math.prod(shape) * dtype.itemsize
            memory = buffers.get(buffer)
            if buffer is None or memory is None or len(memory) < size:
                memory = buffers[buffer] = torch.empty(size, dtype=torch.uint8)
            view = memory.numpy().data[:size]
            position = header.start + first * math.prod(shape[1:]) * dtype.itemsize
            descriptor = opened(header.file).fileno()
            while view:
                count = os.preadv(descriptor, [view], position)
                if count == 0:
                    raise UserError(
                        f"{header.file}: ends before its header says it does; get the file again"
                    )
                view, position = view[count:], position + count
            return memory[:size].view(dtype).view(shape)

        yield read
    finally:
        for file in files.values():
            file.close()


def held(headers: Iterable[TensorHeader]) -> Read:
    """Read these tensors into memory; returns a function that gives rows of them."""
    headers = set(headers)
    with reading() as read:
        tensors = {header: read(header, None, None) for header in headers}
    return lambda header, rows, _: tensors[header] if rows is None else tensors[header][rows]


def row_slices(shape: tuple[int, ...], limit: int) -> Iterator[slice | None]:
    """Consecutive rows of a tensor, of at most ``limit`` elements or one row; None for a scalar."""
    if not shape:
        yield None
    elif math.prod(shape):
        step = max(1, limit // math.prod(shape[1:]))
        for row in range(0, shape[0], step):
            yield slice(row, min(row + step, shape[0]))


def stored_pieces(headers: Iterable[TensorHeader], read: Read) -> Iterator[Tensor]:
    """Stored tensors one after another, as flat pieces."""
    for stored in headers:
        for rows in row_slices(stored.shape, WORKING_SET // 8):
            yield read(stored, rows, None).flatten()


def shards(specs: Sequence[TensorSpec], limit: int = SHARD_BYTES) -> list[list[TensorSpec]]:
    """Divide tensors, in order, among files of at most ``limit`` bytes, or of one larger tensor."""
    files: list[list[TensorSpec]] = [[]]
    size = 0
    for spec in specs:
        if files[-1] and size + spec.bytes > limit:
            files.append([])
            size = 0
        files[-1].append(spec)
        size += spec.bytes
    return files


def shard_names(count: int) -> list[str]:
    """The names that Transformers gives to the files of a checkpoint."""
    if count == 1:
        return ["model.safetensors"]
    return [f"model-{number:05}-of-{count:05}.safetensors" for number in range(1, count + 1)]


def index(files: Files) -> dict[str, Any]:
    """The content of ``model.safetensors.index.json`` for these files."""
    total = sum(spec.bytes for specs in files.values() for spec in specs)
    names = {spec.name: file for file, specs in files.items() for spec in specs}
    return {"metadata": {"total_size": total}, "weight_map": names}


def header(specs: Sequence[TensorSpec]) -> bytes:
    """The first bytes of a safetensors file that holds these tensors one after another."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    start = 0
    for name, dtype, shape in specs:
        end = start + math.prod(shape) * dtype.itemsize
        entries[name] = {"dtype": NAMES[dtype], "shape": shape, "data_offsets": [start, end]}
        start = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors begin at a multiple of eight
    return len(text).to_bytes(8, "little") + text


def write_file(path: Path, specs: Sequence[TensorSpec], pieces: Iterator[Tensor]) -> str:
    """Write a safetensors file and return its sha256.

    Args:
        path: a file that does not exist; after an error it is left incomplete.
        specs: the tensors of the file.
        pieces: their elements in order, flat and cut anywhere; only those of this file are taken.
    """
    start = header(specs)
    digest = sha256(start)
    pending: deque[Future[None]] = deque()

    def write(batch: Sequence[memoryview]) -> None:
        for data in batch:
            digest.update(data)
            file.write(data)

    with path.open("xb") as file, ThreadPoolExecutor(1) as thread:
        file.write(start)
        for batch in _batches(pieces, sum(spec.bytes for spec in specs)):
            pending.append(thread.submit(write, batch))
            if len(pending) > BATCHES:
                pending.popleft().result()
        for future in pending:
            future.result()
    return digest.hexdigest()


def link(source: Path, target: Path) -> None:
    """Make a hard link, or a copy on another file system."""
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def write_split(
    folder: Path, encoder: Mapping[str, TensorHeader], own_parts: Collection[str]
) -> tuple[Files, dict[Path, str]]:
    """Write an encoder's weights so that the tensors in `own_parts`, if any, are in the last file.

    Files that do not change are hard links.

    Returns:
        the tensors of the other files by file name, and the digests of all files.
    """
    sources = {stored.file: file_headers(stored.file) for stored in encoder.values()}
    parts = [
        {name: stored for name, stored in source.items() if name not in own_parts}
        for source in sources.values()
    ]
    rest = {name: encoder[name] for name in own_parts}
    parts = [part for part in (*parts, rest) if part]
    files, digests = {}, {}
    for name, part in zip(shard_names(len(parts)), parts, strict=True):
        target, source = folder / name, next(iter(part.values())).file
        specs = [TensorSpec(key, DTYPES[h.dtype], h.shape) for key, h in part.items()]
        files[name] = sorted(specs, key=lambda spec: (-spec.dtype.itemsize, spec.name))
        if part == sources[source]:
            digests[target] = digest_file(source)
            link(source, target)
        else:
            with reading() as read:
                pieces = stored_pieces([part[spec.name] for spec in files[name]], read)
                digests[target] = write_file(target, files[name], pieces)
    if len(files) > 1:
        write_json(folder / INDEX, index(files))
    return (dict(list(files.items())[:-1]) if rest else files), digests


def write_task(folder: Path, shared: Files, own: Mapping[str, Tensor]) -> None:
    """Write a task's weights: links to files of the encoder, and its own tensors in a last file."""
    parts = list(shared.values())
    if own:  # otherwise the whole model is merged
        parts.append([TensorSpec(n, own[n].dtype, tuple(own[n].shape)) for n in sorted(own)])
    files = dict(zip(shard_names(len(parts)), parts, strict=True))
    for source, name in zip(shared, files, strict=False):
        os.link(folder.parents[1] / "encoder" / source, folder / name)
    if own:
        save_file(dict(own), folder / list(files)[-1], {"format": "pt"})
    if len(files) > 1:
        write_json(folder / INDEX, index(files))


def _batches(pieces: Iterator[Tensor], total: int) -> Iterator[list[memoryview]]:
    """The bytes of the next pieces, ``total`` in all."""
    batch, size = [], 0
    while total > 0:
        data = next(pieces).view(torch.uint8).numpy().data
        batch.append(data)
        size, total = size + len(data), total - len(data)
        if size >= BATCH_BYTES or total <= 0:
            yield batch
            batch, size = [], 0
