"""safetensors files read and written at the speed of a copy, in bounded memory.

Rows of tensors are read into buffers that are used again, as fresh memory costs as much as the
reading. A thread hashes and writes while the next rows are merged.
"""

import json
import math
import os
import resource
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from hashlib import sha256
from io import FileIO
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fmn.errors import UserError
from fmn.store.headers import TensorHeader

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
SHARD_BYTES = 5 * 10**9  # of tensors in a file, as Transformers has it
BATCH_BYTES = 2 * 2**20  # hashed and written together, as a thread takes long to wake up
MOST_OPEN = 256  # files that are read
BATCHES = 8  # merged but not yet hashed and written


class TensorSpec(NamedTuple):
    """A tensor of an output file."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


Read = Callable[[TensorHeader, slice | None, int | None], Tensor]
"""(tensor, rows, buffer) to these rows of a stored tensor, or to all of it where they are None. The
next reading into a buffer of the same number overwrites them; into None, nothing does."""


@contextmanager
def reading() -> Iterator[Read]:
    """A function that reads rows of tensors from their files.

    Files are not mapped, as pages of a map count as the process's memory. At most MOST_OPEN are
    open, and half as many as the system allows; those that were read the longest ago are closed.
    """
    buffers: dict[int | None, Tensor] = {}
    files: dict[Path, FileIO] = {}  # those read last are at the end
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]  # -1: there is none
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
    """A function that gives rows of these tensors, all of which it holds in memory."""
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


def shards(specs: Sequence[TensorSpec], limit: int = SHARD_BYTES) -> list[list[TensorSpec]]:
    """The tensors in order, cut into files of at most ``limit`` bytes, or of one larger tensor."""
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


def index(files: Mapping[str, Sequence[TensorSpec]]) -> dict[str, Any]:
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
