"""Headers say where the bytes are, or are refused."""

import json
import math
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fmn.errors import UserError
from fmn.store.headers import tensor_headers
from tests.folders import shards, weights


def raw(header: Any, data: bytes = b"", length: int | None = None) -> bytes:
    """The bytes of a safetensors file with this header, which may be wrong."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(start: int, end: int, shape: list[Any] | None = None, dtype: str = "U8") -> Any:
    shape = [end - start] if shape is None else shape
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


@pytest.mark.parametrize(
    "content",
    [
        b"",
        raw({}, length=10**15),
        raw(b"[]"),
        raw(b"[" * 100_000),
        raw({"__metadata__": {"a": 1}}),
        raw({"a": entry(0, 1, dtype="Q4")}, b"."),
        raw({"a": entry(0, 1, [-1])}, b"."),
        raw({"a": entry(2, 1, [1])}, b".."),
        raw({"a": entry(0, 4, [2**62, 4])}, b"...."),
        raw({"a": entry(0, 4, [2], "F32")}, b"...."),
        raw({"a": entry(0, 2), "b": entry(1, 3)}, b"..."),
        raw({"a": entry(0, 1), "b\n": entry(2, 3)}, b"..."),
        raw({"a": entry(0, 9)}, b"."),
    ],
)
def test_lying_headers_are_refused_in_one_line(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(UserError, match=r"model\.safetensors: not a valid safetensors") as caught:
        tensor_headers(tmp_path)
    assert "\n" not in str(caught.value)


DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "I64": torch.int64, "BOOL": torch.bool}
NAMES = st.text(max_size=8).filter(lambda name: name.isprintable() and name != "__metadata__")
TENSORS = st.dictionaries(
    NAMES, st.tuples(st.sampled_from(sorted(DTYPES)), st.lists(st.integers(0, 3), max_size=3))
)


def written(folder: Path, tensors: Mapping[str, tuple[str, list[int]]]) -> bytes:
    state = {name: torch.ones(shape).to(DTYPES[dtype]) for name, (dtype, shape) in tensors.items()}
    safetensors.torch.save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    return (folder / "model.safetensors").read_bytes()


@given(tensors=TENSORS)
@settings(max_examples=60)
def test_headers_say_where_the_bytes_are(
    tmp_path_factory: pytest.TempPathFactory, tensors: Any
) -> None:
    folder = tmp_path_factory.mktemp("headers")
    content = torch.frombuffer(bytearray(written(folder, tensors)), dtype=torch.uint8)
    headers = tensor_headers(folder)
    assert {name: (each.dtype, list(each.shape)) for name, each in headers.items()} == tensors
    for header in headers.values():
        values = content[header.start : header.end].clone().view(DTYPES[header.dtype])
        assert values.numel() == math.prod(header.shape)
        assert bool((values == 1).all())


@given(
    tensors=TENSORS,
    changes=st.lists(st.tuples(st.integers(0, 400), st.integers(0, 255)), min_size=1, max_size=4),
)
@settings(max_examples=150)
def test_damaged_headers_are_refused_or_still_consistent(
    tmp_path_factory: pytest.TempPathFactory, tensors: Any, changes: list[tuple[int, int]]
) -> None:
    folder = tmp_path_factory.mktemp("headers")
    content = bytearray(written(folder, tensors))
    for place, value in changes:
        content[place % len(content)] = value
    (folder / "model.safetensors").write_bytes(content)
    try:
        headers = tensor_headers(folder)
    except UserError:
        return
    size = len(content) - 8 - struct.unpack("<Q", content[:8])[0]
    assert sum(header.end - header.start for header in headers.values()) == size


def test_shards_and_index_must_agree(copy: Path) -> None:
    state = weights(copy)
    shards(copy, state)
    shapes = {name: header.shape for name, header in tensor_headers(copy).items()}
    assert shapes == {name: tuple(value.shape) for name, value in state.items()}
    index = copy / "model.safetensors.index.json"
    weight_map = json.loads(index.read_text())["weight_map"]

    def refused(problem: str, shard_of: Mapping[str, Any]) -> None:
        index.write_text(json.dumps({"weight_map": shard_of}))
        with pytest.raises(UserError, match=problem):
            tensor_headers(copy)

    first, second = sorted(set(weight_map.values()))
    refused("does not fit the shards", weight_map | {"ghost": first})
    refused("does not fit the shards", weight_map | {min(weight_map): second})
    fewer = {name: shard for name, shard in weight_map.items() if name != "classifier.bias"}
    refused("does not fit the shards", fewer)
    refused("cannot be read", weight_map | {"ghost": "model-00003-of-00003.safetensors"})
    for name in ("../x.safetensors", "/etc/x.safetensors", "a/b.safetensors", "x.txt", 7):
        refused("no file of weights beside it", weight_map | {"ghost": name})
    refused("has no weight_map", {})
    doubled = safetensors.torch.load_file(copy / second) | {min(weight_map): torch.ones(1)}
    safetensors.torch.save_file(doubled, copy / second)
    refused("does not fit the shards", weight_map)
