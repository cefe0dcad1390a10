"""Which files of weights are taken, and what pickles become."""

import os
import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from fmn.errors import UserError
from fmn.models import loading
from fmn.models.provenance import CheckpointInfo
from fmn.sources import stages
from fmn.store.headers import tensor_headers
from tests.folders import pickled, save, shards, weights

State = dict[str, torch.Tensor]


def fetch(source: Path, out: Path) -> CheckpointInfo:
    return stages.fetch(str(source), out=out).summary


def pickled_shards(folder: Path, state: State, index: bool) -> None:
    names = sorted(state)
    (folder / "model.safetensors").unlink()
    for number, part in enumerate((names[:10], names[10:]), 1):
        file = folder / f"pytorch_model-0000{number}-of-00002.bin"
        torch.save({name: state[name] for name in part}, file)
    if index:
        (folder / "pytorch_model.bin.index.json").write_text('{"weight_map": {}}')


def without_index(folder: Path, state: State) -> None:
    shards(folder, state)
    (folder / "model.safetensors.index.json").unlink()


FORMS: dict[str, Callable[[Path, State], object]] = {
    "shards": shards,
    "shards without an index": without_index,
    "pickled shards": lambda folder, state: pickled_shards(folder, state, index=True),
    "pickled shards without an index": lambda folder, state: pickled_shards(folder, state, False),
    "pickle": pickled,
}


@pytest.mark.parametrize("form", FORMS)
def test_weights_in_every_form_are_the_same_model(form: str, copy: Path, tmp_path: Path) -> None:
    state = weights(copy)
    FORMS[form](copy, state)
    info = fetch(copy, tmp_path / "out")
    assert info.is_converted == ("pickle" in form)
    assert info.notes == []
    assert tensor_headers(tmp_path / "out").keys() == state.keys()
    loaded = loading.load_model(tmp_path / "out").state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in state.items())
    assert not list((tmp_path / "out").glob("*.bin*"))


@pytest.mark.parametrize("form", ["shards", "shards without an index", "pickled shards"])
def test_a_missing_shard_is_named(form: str, copy: Path, tmp_path: Path) -> None:
    FORMS[form](copy, weights(copy))
    ending = "bin" if "pickled" in form else "safetensors"
    (lost,) = copy.glob(f"*-00002-of-00002.{ending}")
    lost.unlink()
    with pytest.raises(UserError, match=f"copy: .*{lost.name}.*; get"):
        fetch(copy, tmp_path / "out")


def test_shards_of_several_checkpoints_are_refused(copy: Path, tmp_path: Path) -> None:
    FORMS["shards without an index"](copy, weights(copy))
    save(copy, {"a": torch.ones(1)}, "model-00001-of-00003.safetensors")
    with pytest.raises(UserError, match="shards of several checkpoints"):
        fetch(copy, tmp_path / "out")


def test_a_tensor_in_two_shards_is_refused(copy: Path, tmp_path: Path) -> None:
    state = weights(copy)
    FORMS["shards without an index"](copy, state)
    save(copy, state, "model-00001-of-00002.safetensors")
    with pytest.raises(UserError, match=r"model-00001.* and model-00002.* have .* both"):
        fetch(copy, tmp_path / "out")


def test_weights_beside_those_that_are_taken_are_noted(copy: Path, tmp_path: Path) -> None:
    state = weights(copy)
    shards(copy, {name: value + 1 for name, value in state.items()})
    save(copy, state)
    (note,) = fetch(copy, tmp_path / "out").notes
    assert note.startswith("model.safetensors is taken, as Transformers does, and not model-00001")
    loaded = weights(tmp_path / "out")
    assert all(torch.equal(loaded[name], value) for name, value in state.items())


def test_a_pointer_of_git_lfs_is_named(copy: Path, tmp_path: Path) -> None:
    pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 12345\n"
    for name in ("vocab.txt", "model.safetensors"):
        (copy / name).write_text(pointer)
        with pytest.raises(UserError, match=r"is a pointer of Git LFS, .*; run `git lfs pull`"):
            fetch(copy, tmp_path / "out")


def test_a_pickle_that_is_cut_is_refused(copy: Path, tmp_path: Path) -> None:
    FORMS["pickled shards"](copy, weights(copy))
    file = copy / "pytorch_model-00001-of-00002.bin"
    os.truncate(file, random.Random(0).randrange(file.stat().st_size))
    with pytest.raises(UserError, match=r"copy/pytorch_model-00001-of-00002\.bin: is damaged"):
        fetch(copy, tmp_path / "out")
