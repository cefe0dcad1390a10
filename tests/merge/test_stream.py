"""safetensors files read and written: bytes, pieces, shards."""

import hashlib
import os
import resource
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from fmn.errors import UserError
from fmn.merge import stream
from fmn.merge.model import write_model
from fmn.merge.recipe import MergeSettings
from fmn.merge.stream import TensorSpec
from fmn.store.headers import file_headers
from tests.folders import tiny_bert, weights

TENSORS = {
    "matrix": torch.randn(60, 3),
    "half": torch.randn(2, 90).to(torch.bfloat16),
    "cube": torch.randn(4, 3, 2),
    "scalar": torch.tensor(3.0),
    "empty": torch.zeros(0, 4),
}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    save_file(TENSORS, tmp_path / "model.safetensors", {"format": "pt"})
    return tmp_path / "model.safetensors"


def specs_of(path: Path) -> list[TensorSpec]:
    headers = sorted(file_headers(path).items(), key=lambda item: item[1].start)
    return [TensorSpec(name, stream.DTYPES[each.dtype], each.shape) for name, each in headers]


def pieces_of(path: Path, limit: int, buffer: int | None = None) -> Iterator[Tensor]:
    headers = file_headers(path)
    with stream.reading() as read:
        for spec in specs_of(path):
            for rows in stream.row_slices(spec.shape, limit):
                yield read(headers[spec.name], rows, buffer).flatten()


@pytest.mark.parametrize("limit", [1, 7, 10**6])
def test_a_file_is_written_as_the_safetensors_library_does(file: Path, limit: int) -> None:
    out = file.with_name("out")
    digest = stream.write_file(out, specs_of(file), pieces_of(file, limit))
    assert digest == hashlib.sha256(out.read_bytes()).hexdigest()
    assert out.read_bytes()[8:] == file.read_bytes()[8:]
    with safe_open(out, "pt") as opened:
        assert opened.metadata() == {"format": "pt"}


def test_only_the_pieces_of_a_file_are_taken(file: Path) -> None:
    pieces, specs = pieces_of(file, 7), specs_of(file)
    for number, part in enumerate((specs[:3], specs[3:])):
        stream.write_file(file.with_name(str(number)), part, pieces)
    both = load_file(file.with_name("0")) | load_file(file.with_name("1"))
    assert both.keys() == TENSORS.keys()
    assert all(torch.equal(both[name], tensor) for name, tensor in TENSORS.items())


def test_a_buffer_is_used_again_and_tensors_without_one_are_not_overwritten(file: Path) -> None:
    header = file_headers(file)["matrix"]
    with stream.reading() as read:
        lent, own = read(header, slice(0, 5), 1), read(header, slice(0, 5), None)
        again = read(header, slice(10, 15), 1)
        assert lent.data_ptr() == again.data_ptr()
        assert torch.equal(again, TENSORS["matrix"][10:15])
        assert torch.equal(own, TENSORS["matrix"][:5])


def test_what_is_held_in_memory_is_read_as_from_the_disk(file: Path) -> None:
    headers = file_headers(file)
    read = stream.held(headers.values())
    file.unlink()
    assert all(torch.equal(read(headers[name], None, 0), TENSORS[name]) for name in TENSORS)
    assert torch.equal(read(headers["matrix"], slice(4, 6), 0), TENSORS["matrix"][4:6])


def test_a_file_that_was_cut_after_its_header_was_read_is_refused(file: Path) -> None:
    pieces = pieces_of(file, 7)
    next(pieces)
    os.truncate(file, file.stat().st_size - 50)
    with pytest.raises(UserError, match="ends before its header says it does"):
        list(pieces)


def test_shards_hold_the_tensors_in_order() -> None:
    sizes = zip("abcd", (1, 2, 9, 1), strict=True)
    specs = [TensorSpec(name, torch.float32, (size,)) for name, size in sizes]
    files = stream.shards(specs, 12)
    assert [[spec.name for spec in file] for file in files] == [["a", "b"], ["c"], ["d"]]
    assert stream.shard_names(3)[1] == "model-00002-of-00003.safetensors"
    assert stream.index({"x": specs[:2], "y": specs[2:]}) == {
        "metadata": {"total_size": 52},
        "weight_map": {"a": "x", "b": "x", "c": "y", "d": "y"},
    }


def test_two_hundred_experts_are_merged_with_few_open_files(tmp_path: Path) -> None:
    kinds = [tiny_bert(tmp_path / f"seed-{seed}", seed=seed) for seed in range(2)]
    for number in range(200):
        kind = kinds[number % 4 == 0]  # every fourth is the second
        shutil.copytree(kind, tmp_path / "experts" / f"task-{number:03}")
    experts = {folder.name: folder for folder in (tmp_path / "experts").iterdir()}
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    few = 2 * len([*Path("/proc/self/fd").iterdir()]) + 32  # of which half may be opened
    resource.setrlimit(resource.RLIMIT_NOFILE, (few, limits[1]))
    try:
        write_model(tmp_path / "merged", experts, MergeSettings(method="average"))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    merged = weights(tmp_path / "merged" / "encoder")
    first, second = map(weights, kinds)
    for name, tensor in merged.items():
        expected = (3 * first[f"bert.{name}"] + second[f"bert.{name}"]) / 4
        torch.testing.assert_close(tensor, expected, rtol=1e-5, atol=1e-6)
    assert len(list((tmp_path / "merged" / "tasks").iterdir())) == 200
