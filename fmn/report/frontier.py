"""How many parameters a merged model stores, beside what it keeps of the experts' scores."""

from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import NamedTuple

from fmn.store import artifacts
from fmn.store.headers import TensorHeader, file_headers, tensor_headers


class Size(NamedTuple):
    """Parameters for all tasks together, in units of one encoder.

    Attributes:
        merged: what the merged model's folder stores: the encoder, and what each task has itself.
        apart: what a model of its own for each task would store.
    """

    merged: float
    apart: float


def size(model: Path, tasks: list[str]) -> Size:
    """The size of a merged model's folder, from the headers of its files.

    A file that lies in several folders, which is a hard link there, counts once.

    Raises:
        UserError: the encoder or a task has no safetensors weights.
    """
    files = [path for path in artifacts.visible(model).values() if path.suffix == ".safetensors"]
    unique = {artifacts.digest_file(path): path for path in files}
    encoder = _count(tensor_headers(model / "encoder"))
    apart = sum(_count(tensor_headers(model / "tasks" / task)) for task in tasks)
    stored = sum(_count(file_headers(path)) for path in unique.values())
    return Size(stored / encoder, apart / encoder)


def _count(headers: Mapping[str, TensorHeader]) -> int:
    return sum(prod(header.shape) for header in headers.values())
