"""safetensors in, safetensors out, in bounded memory: no model is loaded, no tensor is held whole unless a method must.

Everything that can be checked from the headers is checked before the first byte is written. Then the output is written
in file-offset order, a few megabytes at a time: every expert's rows are read into a buffer that stays, merged, and
handed to a thread that takes their sha256 and writes them to their place in a file of full size.
"""

import json
import math
import os
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial, reduce
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from fmn.errors import UserError
from fmn.merge.rules import Method, Part, Regression, Settings, rescale
from fmn.models.headers import TensorHeader

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
WORKING_SET = 12 * 2**20  # bytes, in float64, of all that is held of one part
SHARD_BYTES = 5 * 10**9
FLUSHED = 8 * 2**20  # bytes between two requests to begin writing to the disk
BATCH = 2 * 2**20  # bytes, or one piece more, that are hashed and written together
IN_FLIGHT = 8  # batches merged but not yet hashed and written
KEPT = (
    31 * 2**20
)  # bytes; a block of this size, once freed, makes glibc keep what is freed after it

Progress = Callable[[int, int], None]


class Slot(NamedTuple):
    """A tensor of an output file."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class Span(NamedTuple):
    """A rectangle of a tensor seen as [rows, columns] whose elements are consecutive in the file."""

    rows: slice
    columns: slice


@dataclass(frozen=True)
class Parameter:
    """A parameter to merge: where every expert's is stored, the base's if it takes part, and every expert's statistics.

    Attributes:
        fisher: the full Fisher information of the parameter, where the method takes it.
        regression: what a regression needs of a matrix, where the method is one.
    """

    slot: Slot
    experts: tuple[TensorHeader, ...]
    base: TensorHeader | None
    fisher: tuple[TensorHeader, ...] = ()
    regression: "StoredRegression | None" = None


@dataclass(frozen=True)
class StoredRegression:
    """`fmn.merge.Regression` on the disk. `moments`: of each expert, [n, n]."""

    moments: tuple[TensorHeader, ...]
    weights: Tensor
    transposed: bool


@dataclass(frozen=True)
class Recipe:
    """How to merge.

    Attributes:
        method: one of `fmn.merge.METHODS`.
        settings: of the method; every sequence that has an item an expert is in the order of its tasks.
        scale: of the merged task vector; 1 leaves it.
        shares: a parameter's name to every expert's share, float64 [experts, ...], broadcastable against the parameter.
    """

    method: Method
    settings: Settings
    scale: float
    shares: Callable[[str], Tensor]


class Read(Protocol):
    def __call__(
        self, stored: TensorHeader, first: int, shape: tuple[int, ...], seat: int | None = None
    ) -> Tensor: ...


@contextmanager
def reading(files: Iterable[Path]) -> Iterator[Read]:
    """A function to read consecutive elements, from ``first`` on, of a tensor in one of the files.

    They come in memory of their own or, with a ``seat``, in memory that the next reading into the same seat overwrites:
    fresh memory costs as much as the reading. Files are not mapped, as pages of a map count as the process's memory.
    """
    seats: dict[int | None, tuple[Tensor, memoryview]] = {}
    with ExitStack() as stack:
        opened = {
            file: stack.enter_context(file.open("rb", buffering=0)).fileno() for file in set(files)
        }

        def read(
            stored: TensorHeader, first: int, shape: tuple[int, ...], seat: int | None = None
        ) -> Tensor:
            dtype = DTYPES[stored.dtype]
            taken = seats.get(seat)
            if taken is None or taken[0].dtype != dtype or taken[0].shape != shape:
                tensor = torch.empty(shape, dtype=dtype)
                taken = tensor, tensor.view(-1).view(torch.uint8).numpy().data
                if seat is not None:
                    seats[seat] = taken
            tensor, view = taken
            position = stored.start + first * dtype.itemsize
            while view:
                got = os.preadv(opened[stored.file], [view], position)
                if got == 0:
                    raise UserError(
                        f"{stored.file}: ends before its header says it does; get the file again"
                    )
                view, position = view[got:], position + got
            return tensor

        yield read


def plan(
    experts: Mapping[str, Mapping[str, TensorHeader]], base: Mapping[str, TensorHeader] | None
) -> list[Parameter]:
    """The parameters to merge, in the order of the output file, after a check that all experts have the same ones.

    The output's dtype is the widest of the experts' (float16 with bfloat16 gives float32). Parameters are ordered by
    falling size of their dtype, then by name, as safetensors does, so the result does not depend on the experts' order.

    Args:
        experts: tensors by name, by task.
        base: the same of the base model. It may hold more, but must hold every floating-point tensor of the experts.

    Raises:
        UserError: naming the expert and the tensor that is missing, is extra, or has another shape or dtype.
    """
    first, *others = experts
    names = experts[first]
    for task in others:
        for name in sorted({*names, *experts[task]}):
            if (name in names) != (name in experts[task]):
                has, lacks = (first, task) if name in names else (task, first)
                raise UserError(
                    f"expert {lacks}: lacks tensor {name}, which expert {has} has; merge like with like"
                )
    return sorted(
        (
            _parameter(name, {task: tensors[name] for task, tensors in experts.items()}, base)
            for name in names
        ),
        key=lambda parameter: (-parameter.slot.dtype.itemsize, parameter.slot.name),
    )


def _parameter(
    name: str, experts: Mapping[str, TensorHeader], base: Mapping[str, TensorHeader] | None
) -> Parameter:
    first = next(iter(experts.values()))
    sources = dict(experts)
    floating = all(
        stored.dtype in DTYPES and DTYPES[stored.dtype].is_floating_point
        for stored in experts.values()
    )
    if base is not None and floating:
        if name not in base:
            raise UserError(
                f"base: lacks tensor {name}, which the experts have; give the base they were tuned from"
            )
        sources["base"] = base[name]
    for task, stored in sources.items():
        who = "base" if task == "base" else f"expert {task}"
        if stored.dtype not in DTYPES:
            raise UserError(
                f"{who}: tensor {name} has dtype {stored.dtype}, which cannot be merged; convert it"
            )
        if stored.shape != first.shape:
            shapes = (
                f"{list(stored.shape)}, not {list(first.shape)} as in expert {next(iter(experts))}"
            )
            raise UserError(
                f"{who}: tensor {name} has shape {shapes}; merge experts of one base model"
            )
        if not floating and stored.dtype != first.dtype:
            raise UserError(
                f"{who}: tensor {name} has dtype {stored.dtype}, not {first.dtype} as in expert {next(iter(experts))}"
            )
    dtype = reduce(torch.promote_types, (DTYPES[stored.dtype] for stored in experts.values()))
    return Parameter(Slot(name, dtype, first.shape), tuple(experts.values()), sources.get("base"))


def merge(parameters: Sequence[Parameter], recipe: Recipe) -> Iterator[Tensor]:
    """The merged parameters one after another, as consecutive flat pieces in their output dtype.

    Raises:
        UserError: where an expert or the base holds NaN or Inf, naming it and the tensor; where the merged values do
            not fit the output's dtype; where experts differ in a tensor of integers.
    """
    files = {file for parameter in parameters for file in _files(parameter)}
    # Fresh pages cost more than the sums. Having freed a block of this size, glibc no longer gives smaller ones back to
    # the system and asks for them again (mallopt(3), M_MMAP_THRESHOLD, "dynamic").
    torch.empty(KEPT, dtype=torch.uint8)
    with reading(files) as read, nullcontext() if recipe.method.rows else _one_thread():
        for parameter in parameters:
            if not parameter.slot.dtype.is_floating_point:
                yield from _same(parameter, recipe.settings.tasks, read)
                continue
            shares = _columns(recipe.shares(parameter.slot.name), parameter.slot.shape)
            passes = partial(_parts, parameter, recipe, shares, read)
            measured = recipe.method.measure(passes) if math.prod(parameter.slot.shape) else None
            for part in passes():
                merged = _combined(part, recipe, measured)
                piece = merged.to(parameter.slot.dtype)
                if not (_surely_fits(merged, piece.dtype) or finite(piece)):
                    _refuse_not_finite(part)
                    # The difference of two float32 may overflow where their mean does not.
                    wide = replace(part, experts=tuple(expert.double() for expert in part.experts))
                    piece = _combined(wide, recipe, measured).to(parameter.slot.dtype)
                    if not finite(piece):
                        raise UserError(
                            f"tensor {part.name}: merged values do not fit {NAMES[piece.dtype]}; use a smaller --scale"
                        )
                yield piece.flatten()


def _combined(part: Part, recipe: Recipe, measured: Any) -> Tensor:
    merged = recipe.method.combine(part, measured)
    return (
        merged
        if recipe.scale == 1 or part.base is None
        else rescale(merged, part.base, recipe.scale)
    )


def _surely_fits(tensor: Tensor, dtype: torch.dtype) -> bool:
    """Whether all is finite and fits a dtype, as no element is above the norm; False where that does not tell."""
    return float(torch.linalg.vector_norm(tensor)) < torch.finfo(dtype).max / 2


def _refuse_not_finite(part: Part) -> None:
    tasks = part.settings.tasks
    sources = [(f"expert {task}", tensor) for task, tensor in zip(tasks, part.experts, strict=True)]
    sources += [("base", part.base)] if part.base is not None else []
    sources += [
        (f"the full Fisher of {task}", tensor)
        for task, tensor in zip(tasks, part.fisher, strict=False)
    ]
    for who, tensor in sources:
        if not finite(tensor):
            raise UserError(f"{who}: tensor {part.name} holds NaN or Inf; it cannot be merged")


def effective_number(parameters: Sequence[Parameter]) -> float:
    """How many times averaging shrinks the squared length of the task vectors: ``mean_j |tau_j|^2 / |mean_j tau_j|^2``.

    The number of experts where their task vectors are orthogonal and equally long, 1 where they are the same. One pass
    over all parameters that have a base.
    """
    files = {file for parameter in parameters for file in _files(parameter)}
    single = together = 0.0
    count = len(parameters[0].experts)
    with reading(files) as read, _one_thread():
        for parameter in parameters:
            if parameter.base is None:
                continue
            total = math.prod(parameter.slot.shape)
            for span in _spans(total, 1, WORKING_SET // 8 // (count + 3)):
                where = span.rows.start, (span.rows.stop - span.rows.start,)
                base = read(parameter.base, *where, count).float()
                added = torch.zeros_like(base)
                for seat, stored in enumerate(parameter.experts):
                    vector = read(stored, *where, seat).float() - base
                    single += float(vector.dot(vector))
                    added += vector
                together += float(added.dot(added))
    return count * single / together if together else 1.0


@contextmanager
def _one_thread() -> Iterator[None]:
    """Sums over parts that fit the cache gain nothing from threads, and wait long for them on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _sources(parameter: Parameter) -> tuple[TensorHeader, ...]:
    base = () if parameter.base is None else (parameter.base,)
    return (*parameter.experts, *base, *parameter.fisher)


def _files(parameter: Parameter) -> set[Path]:
    moments = parameter.regression.moments if parameter.regression is not None else ()
    return {stored.file for stored in (*_sources(parameter), *moments)}


def _matrix(shape: tuple[int, ...]) -> tuple[int, int]:
    """A tensor's shape as [rows, columns]; a vector is a column."""
    return (shape[0], math.prod(shape[1:])) if shape else (1, 1)


def _columns(shares: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Shares that broadcast against a tensor of this shape, as [experts, rows or 1, columns or 1] of it as a matrix."""
    by_row = math.prod(shares.shape[2:]) == 1
    return (
        shares.reshape(len(shares), -1, 1)
        if by_row
        else shares.expand(*shares.shape[:2], *shape[1:]).flatten(2)
    )


def _spans(rows: int, columns: int, limit: int) -> Iterator[Span]:
    """Consecutive spans of at most ``limit`` elements: whole rows, or pieces of a row that is too long."""
    step = max(1, limit // max(columns, 1))
    width = columns if columns <= limit else limit
    for row in range(0, rows, step):
        for column in range(0, columns, max(width, 1)):
            yield Span(
                slice(row, min(row + step, rows)), slice(column, min(column + width, columns))
            )


def _parts(parameter: Parameter, recipe: Recipe, shares: Tensor, read: Read) -> Iterator[Part]:
    rows, columns = _matrix(parameter.slot.shape)
    sources = _sources(parameter)
    limit = max(1, WORKING_SET // 8 // (len(sources) + 2))
    if recipe.method.rows:
        limit = max(
            limit, columns if rows >= columns or len(parameter.slot.shape) != 2 else rows * columns
        )
    if parameter.regression is not None:
        limit = rows * columns
    for span in _spans(rows, columns, limit):
        height, width = span.rows.stop - span.rows.start, span.columns.stop - span.columns.start
        first = span.rows.start * columns + span.columns.start
        tensors = [
            read(stored, first, (height, width), seat) for seat, stored in enumerate(sources)
        ]
        count = len(parameter.experts)
        part = Part(
            name=parameter.slot.name,
            shape=parameter.slot.shape,
            first=first,
            experts=tuple(tensors[:count]),
            base=tensors[count] if parameter.base is not None else None,
            shares=_cut(shares, span),
            settings=recipe.settings,
            fisher=tuple(tensors[len(tensors) - len(parameter.fisher) :]),
            regression=_regression(parameter.regression, read),
        )
        if not recipe.method.propagates:
            _refuse_not_finite(part)
        yield part


def _regression(stored: StoredRegression | None, read: Read) -> Regression | None:
    if stored is None:
        return None

    def gram(number: int) -> Tensor:
        header = stored.moments[number]
        return read(header, 0, header.shape).double()

    return Regression(gram, stored.weights, stored.transposed)


def _cut(shares: Tensor, span: Span) -> Tensor:
    """The part of [experts, rows or 1, columns or 1] that belongs to a span."""
    shares = shares[:, span.rows] if shares.shape[1] > 1 else shares
    return shares[:, :, span.columns] if shares.shape[2] > 1 else shares


def finite(tensor: Tensor) -> bool:
    """Whether no element is NaN or Inf; one pass over the tensor unless a finite sum overflows."""
    accumulator = torch.float32 if tensor.dtype.itemsize < 4 else tensor.dtype
    return bool(tensor.sum(dtype=accumulator).isfinite()) or bool(tensor.isfinite().all())


def _same(parameter: Parameter, tasks: Sequence[str], read: Read) -> Iterator[Tensor]:
    """A tensor of integers, such as positions: every expert must have the same."""
    for span in _spans(math.prod(parameter.slot.shape), 1, WORKING_SET // 8):
        place = span.rows.start, (span.rows.stop - span.rows.start,)
        piece, *others = (read(stored, *place) for stored in parameter.experts)
        for task, other in zip(tasks[1:], others, strict=True):
            if not torch.equal(piece, other):
                raise UserError(
                    f"expert {task}: tensor {parameter.slot.name} of integers differs from expert {tasks[0]}'s; merge"
                    " experts of one base model"
                )
        yield piece


def copy(tensors: Mapping[str, TensorHeader]) -> Iterator[Tensor]:
    """The tensors as they are stored, one after another, as consecutive flat pieces."""
    with reading(stored.file for stored in tensors.values()) as read:
        for stored in tensors.values():
            for span in _spans(math.prod(stored.shape), 1, WORKING_SET // 8):
                yield read(stored, span.rows.start, (span.rows.stop - span.rows.start,))


def shards(slots: Sequence[Slot], limit: int = SHARD_BYTES) -> list[list[Slot]]:
    """The slots in order, cut into files of at most ``limit`` bytes of tensors, or of one larger tensor."""
    files: list[list[Slot]] = [[]]
    size = 0
    for slot in slots:
        if files[-1] and size + slot.bytes > limit:
            files.append([])
            size = 0
        files[-1].append(slot)
        size += slot.bytes
    return files


def shard_names(count: int) -> list[str]:
    """The names that Transformers gives to the files of a checkpoint."""
    if count == 1:
        return ["model.safetensors"]
    return [f"model-{number:05}-of-{count:05}.safetensors" for number in range(1, count + 1)]


def index(files: Mapping[str, Iterable[Slot]]) -> dict[str, Any]:
    """What ``model.safetensors.index.json`` says of these files."""
    return {
        "metadata": {"total_size": sum(slot.bytes for slots in files.values() for slot in slots)},
        "weight_map": {slot.name: file for file, slots in files.items() for slot in slots},
    }


def header(slots: Sequence[Slot]) -> bytes:
    """The first bytes of a safetensors file that holds these tensors one after another."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    start = 0
    for slot in slots:
        entries[slot.name] = {
            "dtype": NAMES[slot.dtype],
            "shape": list(slot.shape),
            "data_offsets": [start, start + slot.bytes],
        }
        start += slot.bytes
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors begin at a multiple of eight
    return len(text).to_bytes(8, "little") + text


def write_file(
    path: Path,
    slots: Sequence[Slot],
    pieces: Iterator[Tensor],
    advance: Callable[[int], None] | None = None,
) -> str:
    """Write a safetensors file and return its sha256.

    Args:
        path: a file that does not exist; after an error it is left incomplete, so write inside
            `fmn.artifacts.whole_folder`, which also flushes it to the disk.
        slots: what the file holds.
        pieces: the tensors' elements in the order of the slots, cut anywhere; only this file's are taken.
        advance: called with the number of bytes of every batch of pieces that was taken.

    Raises:
        OSError: when the disk has no room for the file, before anything is written.
    """
    start = header(slots)
    total = len(start) + sum(slot.bytes for slot in slots)
    digest = sha256(start)
    pending: deque[Future[None]] = deque()
    with path.open("xb", buffering=0) as file, ThreadPoolExecutor(1) as thread:
        _reserve(file.fileno(), total)
        file.write(start)
        position = len(start)
        for batch in _batches(pieces, total - position):
            pending.append(thread.submit(_hash_and_write, file.fileno(), batch, position, digest))
            size = sum(map(len, batch))
            position += size
            if len(pending) > IN_FLIGHT:
                pending.popleft().result()
            if advance is not None:
                advance(size)
        for future in pending:
            future.result()
    if position != total:
        raise AssertionError(f"{path}: {position} bytes for {total}")
    return digest.hexdigest()


def _reserve(descriptor: int, total: int) -> None:
    """Give the file its full size, and its place on the disk where the system can promise it."""
    if sys.platform == "linux":
        os.posix_fallocate(descriptor, 0, total)
    else:
        os.ftruncate(descriptor, total)


def _batches(pieces: Iterator[Tensor], total: int) -> Iterator[list[memoryview]]:
    """The bytes of the next pieces, ``total`` in all, in lists of about BATCH: a thread takes long to wake up."""
    batch, size = [], 0
    while total > 0:
        data = next(pieces).view(torch.uint8).numpy().data
        batch.append(data)
        size += len(data)
        total -= len(data)
        if size >= BATCH or total <= 0:
            yield batch
            batch, size = [], 0


def _hash_and_write(
    descriptor: int, batch: Sequence[memoryview], position: int, digest: Any
) -> None:
    first = position // FLUSHED
    for data in batch:
        digest.update(data)
        while data:
            done = os.pwrite(descriptor, data, position)
            data, position = data[done:], position + done
    if sys.platform == "linux" and (blocks := position // FLUSHED - first):
        # Linux begins to write these pages to the disk, so the flush at the end has little to wait for. It would drop
        # clean ones, but these are not clean yet.
        os.posix_fadvise(descriptor, first * FLUSHED, blocks * FLUSHED, os.POSIX_FADV_DONTNEED)
