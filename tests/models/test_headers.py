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
from fmn.models.headers import tensor_headers
from tests.folders import shards, weights, weights_of_shard


def raw(header: Any, data: bytes = b"", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(
    start: int, end: int, shape: list[Any] | None = None, dtype: str = "U8"
) -> dict[str, Any]:
    return {
        "dtype": dtype,
        "shape": [end - start] if shape is None else shape,
        "data_offsets": [start, end],
    }


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "cut off"),
        (b"1234567", "cut off"),
        (raw({}, length=10**15), "header cannot be"),
        (raw({}, length=1), "header cannot be"),
        (raw(b"[]"), "not a JSON object"),
        (raw(b"{]"), "not JSON"),
        (raw(b"\xff\xfe{}"), "not JSON"),
        (raw(b"[" * 100_000), "not JSON"),
        (raw(b'{"a": NaN}'), "not JSON"),
        (raw(b'{"a": 1, "a": 2}'), "a name occurs twice"),
        (raw({"__metadata__": {"a": 1}}), "__metadata__"),
        (raw({"a\nb": entry(0, 1)}, b"."), "not printable"),
        (raw(b'{"\\ud800": 1}'), "not printable"),
        (raw({"a": 1}), "'a' does not state"),
        (raw({"a": {**entry(0, 1), "more": 1}}, b"."), "'a' does not state"),
        (raw({"a": entry(0, 1, dtype="Q4")}, b"."), "unknown dtype 'Q4'"),
        (raw({"a": entry(0, 1, dtype=[])}, b"."), "unknown dtype"),  # type: ignore[arg-type]
        (raw({"a": entry(0, 1, [-1])}, b"."), "whole numbers"),
        (raw({"a": entry(0, 1, [True])}, b"."), "whole numbers"),
        (raw({"a": entry(0, 1, [1.0])}, b"."), "whole numbers"),
        (raw({"a": {**entry(0, 1), "data_offsets": [0]}}, b"."), "whole numbers"),
        (raw({"a": entry(2, 1, [1])}, b".."), "cannot have -1 bytes"),
        (raw({"a": entry(0, 4, [2**62, 4])}, b"...."), "cannot have 4 bytes"),
        (raw({"a": entry(0, 4, [2], "F32")}, b"...."), "cannot have 4 bytes"),
        (raw({"a": entry(0, 2), "b": entry(1, 3)}, b"..."), "'b' overlaps"),
        (raw({"a": entry(0, 2), "b": entry(0, 2)}, b".."), "'b' overlaps"),
        (raw({"a": entry(0, 1), "b": entry(2, 3)}, b"..."), "'b' leaves a gap"),
        (raw({"a": entry(1, 2)}, b".."), "'a' leaves a gap"),
        (raw({"a": entry(0, 9)}, b"."), "the file at"),
        (raw({"a": entry(0, 1)}, b".."), "the file at"),
    ],
)
def test_lying_headers_are_refused(content: bytes, says: str, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(UserError, match=says) as caught:
        tensor_headers(tmp_path)
    assert str(tmp_path / "model.safetensors") in str(caught.value)
    assert "\n" not in str(caught.value)


DTYPES = {
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "BOOL": torch.bool,
}
NAMES = st.text(max_size=8).filter(lambda name: name.isprintable() and name != "__metadata__")
TENSORS = st.dictionaries(
    NAMES, st.tuples(st.sampled_from(sorted(DTYPES)), st.lists(st.integers(0, 3), max_size=3))
)


def written(folder: Path, tensors: Mapping[str, tuple[str, list[int]]]) -> bytes:
    state = {name: torch.ones(shape).to(DTYPES[dtype]) for name, (dtype, shape) in tensors.items()}
    safetensors.torch.save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    return (folder / "model.safetensors").read_bytes()


@given(tensors=TENSORS)
@settings(max_examples=60, deadline=None)
def test_headers_say_where_the_bytes_are(
    tmp_path_factory: pytest.TempPathFactory, tensors: Any
) -> None:
    folder = tmp_path_factory.mktemp("headers")
    content = written(folder, tensors)
    headers = tensor_headers(folder)
    assert {name: (one.dtype, list(one.shape)) for name, one in headers.items()} == tensors
    for one in headers.values():
        ones = torch.frombuffer(bytearray(content), dtype=torch.uint8)[one.start : one.end].view(
            DTYPES[one.dtype]
        )
        assert ones.numel() == math.prod(one.shape)
        assert bool((ones == 1).all())


@given(
    tensors=TENSORS,
    changes=st.lists(st.tuples(st.integers(0, 400), st.integers(0, 255)), min_size=1, max_size=4),
)
@settings(max_examples=150, deadline=None)
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
    spans = sorted((one.start, one.end) for one in headers.values())
    assert (
        sum(end - start for start, end in spans)
        == len(content) - 8 - struct.unpack("<Q", content[:8])[0]
    )


def test_shards_and_index_must_agree(copy: Path) -> None:
    state = weights(copy)
    shards(copy, state)
    assert {name: one.shape for name, one in tensor_headers(copy).items()} == {
        k: tuple(v.shape) for k, v in state.items()
    }
    index = copy / "model.safetensors.index.json"
    good = json.loads(index.read_text())

    def refused(says: str, **changes: Any) -> None:
        weight_map = {
            name: file for name, file in (good["weight_map"] | changes).items() if file is not None
        }
        index.write_text(json.dumps({**good, "weight_map": weight_map}))
        with pytest.raises(UserError, match=says):
            tensor_headers(copy)

    refused("'ghost' is not in model-00001", ghost="model-00001-of-00002.safetensors")
    refused("does not say that 'classifier.bias' is in model-0000", **{"classifier.bias": None})
    refused(
        "does not say that",
        **{"classifier.bias": "model-00001-of-00002.safetensors", "bert.pooler.dense.bias": None},
    )
    refused("cannot be read", ghost="model-00003-of-00003.safetensors")
    for name in (
        "../x.safetensors",
        "/etc/x.safetensors",
        "a/b.safetensors",
        "..safetensors",
        "x.bin",
        7,
    ):
        refused("which is no name of a .safetensors file", ghost=name)
    index.write_text(json.dumps({"weight_map": {}}))
    with pytest.raises(UserError, match="has no weight_map"):
        tensor_headers(copy)
    index.write_text(json.dumps(good))
    doubled = weights_of_shard(copy, 2) | {
        "classifier.bias": state["classifier.bias"],
        "x": state["classifier.bias"],
    }
    first = weights_of_shard(copy, 1)
    safetensors.torch.save_file(
        first | {k: v.clone() for k, v in doubled.items()},
        copy / "model-00002-of-00002.safetensors",
    )
    with pytest.raises(UserError, match=r"is in model-00001-of-00002\.safetensors too"):
        tensor_headers(copy)
