"""Statistics as large as an expert: whole or absent, with lineage, read back or refused."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from fmn.errors import UserError
from fmn.fisher import files as statistics
from fmn.store import artifacts


@pytest.fixture
def written(tmp_path: Path) -> Path:
    path = tmp_path / "a.safetensors"
    statistics.write(
        path,
        "gram",
        {"b": torch.eye(3), "a": torch.arange(6.0).reshape(2, 3)},
        {"key": "k", "task": "rte"},
    )
    return path


def test_what_is_written_is_read_back_by_any_reader(written: Path) -> None:
    headers, stated = statistics.read(written, "gram")
    assert {name: header.shape for name, header in headers.items()} == {"a": (2, 3), "b": (3, 3)}
    assert (stated["key"], stated["task"], stated["kind"]) == ("k", "rte", "gram")
    assert torch.equal(load_file(written)["b"], torch.eye(3))
    assert statistics.is_current(written, "gram", "k")
    assert not statistics.is_current(written, "gram", "other")
    artifacts.check_replaceable(written)


def test_damage_and_mix_ups_are_refused(written: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"holds gram .*, not full-fisher"):
        statistics.read(written, "full-fisher")
    data = bytearray(written.read_bytes())
    data[-1] ^= 1
    written.write_bytes(data)
    with pytest.raises(UserError, match="not what was written"):
        statistics.read(written, "gram")
    assert not statistics.is_current(written, "gram", "k")
    written.write_bytes(data[:-4])
    with pytest.raises(UserError, match="not a valid safetensors file"):
        statistics.read(written, "gram")
    artifacts.check_replaceable(written)
    with pytest.raises(UserError, match="no such gram file; `fmn gram` makes one"):
        statistics.read(tmp_path / "b.safetensors", "gram")


def test_no_bit_of_a_statistic_flips_unnoticed(written: Path) -> None:
    content = written.read_bytes()
    for place in range(0, len(content), 3):
        changed = bytearray(content)
        changed[place] ^= 1 << place % 7
        written.write_bytes(changed)
        assert not statistics.is_current(written, "gram", "k"), place


def test_a_model_is_no_statistic_and_is_not_replaced(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"a": torch.ones(2)}, path, {"format": "pt"})
    with pytest.raises(UserError, match="no statistic of fmn's"):
        statistics.read(path, "gram")
    with pytest.raises(UserError, match="did not make"):
        artifacts.check_replaceable(path)
    artifacts.write_cost(path, "gram", 1)  # so fmn made one here, whatever became of it
    artifacts.check_replaceable(path)


def test_an_empty_file_may_be_replaced(tmp_path: Path) -> None:
    for name in ("a.safetensors", "a.json", "a.parquet"):
        (tmp_path / name).touch()
        artifacts.check_replaceable(tmp_path / name)


def test_metadata_that_are_no_numbers_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    stated = '{"kind": "gram", "format": 2, "digest": "d", "samples": NaN}'
    save_file({"a": torch.ones(2)}, path, {"fmn": stated})
    assert not statistics.is_current(path, "gram", "k")
