"""An outline has the files, headers and sizes of a checkpoint whose weights stay where they are."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fmn.errors import UserError
from fmn.models import provenance
from fmn.setup.outline import Outline, outline
from fmn.store.headers import tensor_headers
from tests.folders import pickled, save, shards, tiny_bert, weights
from tests.hub_server import Hub

WIDE: dict[str, Any] = {
    "intermediate_size": 20_000
}  # the weights are larger than what is read of them


def described(folder: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """The dtype and the shape of every tensor."""
    return {name: (header.dtype, header.shape) for name, header in tensor_headers(folder).items()}


def outlined(source: str, out: Path) -> Outline:
    out.mkdir()
    return outline(source, out)


@pytest.mark.parametrize("form", ["whole", "shards"])
def test_of_the_hub_only_headers_are_transferred(form: str, hub: Hub, tmp_path: Path) -> None:
    folder = tiny_bert(tmp_path / "bert", **WIDE)
    numbers = sum(value.numel() for value in weights(folder).values())
    if form == "shards":
        shards(folder, weights(folder))
    hub.add("models", "org/bert", folder)
    out = tmp_path / "out"
    facts = outlined("hf://org/bert", out)
    sizes = [file.stat().st_size for file in folder.glob("*.safetensors")]
    assert (facts.download, facts.weights) == (sum(sizes), sum(sizes))
    assert facts.parameters == numbers
    assert described(out) == described(folder)
    assert facts.pinned.startswith("hf://org/bert@")
    assert hub.sent < sum(sizes) / 4
    used = sum(file.stat().st_blocks * 512 for file in out.glob("*.safetensors"))
    assert used < sum(sizes) / 4, "the weights are holes"
    provenance.check_experts({"a": out}, {}, folder)


def test_pickled_weights_are_outlined_by_their_configuration(hub: Hub, tmp_path: Path) -> None:
    folder = tiny_bert(tmp_path / "bert", **WIDE)
    expected = described(folder)
    hub.add("models", "org/bert", pickled(folder, weights(folder)))
    out = tmp_path / "out"
    facts = outlined("hf://org/bert", out)
    assert facts.is_pickled
    assert facts.download == (folder / "pytorch_model.bin").stat().st_size
    assert hub.sent < facts.download / 4
    assert described(out).items() >= expected.items()


def test_old_names_and_local_folders(tmp_path: Path) -> None:
    folder = tiny_bert(tmp_path / "bert")
    expected = described(folder)
    old = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma"): value
        for name, value in weights(folder).items()
    }
    save(folder, old)
    out = tmp_path / "out"
    facts = outlined(str(folder), out)
    assert described(out) == expected
    assert (facts.download, facts.pinned) == (0, str(folder))


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda data: data[:-5], "its header tells of"),
        (lambda data: b"\xff" * 8 + data[8:], "not a safetensors file"),
        (lambda data: data[:8] + b"[" + data[9:], "not a safetensors file"),
        (lambda data: b"", "not a safetensors file"),
    ],
)
def test_a_file_that_is_not_whole_is_refused(
    change: Callable[[bytes], bytes], problem: str, hub: Hub, tmp_path: Path
) -> None:
    folder = tiny_bert(tmp_path / "bert")
    file = folder / "model.safetensors"
    file.write_bytes(change(file.read_bytes()))
    hub.add("models", "org/bert", folder)
    for number, source in enumerate(("hf://org/bert", str(folder))):
        out = tmp_path / f"out{number}"
        with pytest.raises(UserError, match=problem) as caught:
            outlined(source, out)
        assert source in str(caught.value)


def test_a_server_without_ranges_will_do(hub: Hub, tmp_path: Path) -> None:
    folder = tiny_bert(tmp_path / "bert", **WIDE)
    hub.add("models", "org/bert", folder)
    hub.has_ranges = False
    out = tmp_path / "out"
    outlined("hf://org/bert", out)
    assert described(out) == described(folder)
