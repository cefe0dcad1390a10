"""safetensors in, safetensors out: bytes, dtypes, refusals, and the bound on memory."""

import hashlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from fmn.errors import UserError
from fmn.merge import stream
from fmn.merge.methods import NEEDS
from fmn.merge.rules import METHODS, Settings
from fmn.merge.stream import Recipe, Slot
from fmn.models.headers import TensorHeader, tensor_headers
from fmn.store import machine

GENERATOR = torch.Generator().manual_seed(0)


def checkpoint(folder: Path, tensors: Mapping[str, Tensor]) -> dict[str, TensorHeader]:
    folder.mkdir(parents=True)
    save_file(dict(tensors), folder / "model.safetensors", {"format": "pt"})
    return tensor_headers(folder)


def random(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=GENERATOR).to(dtype)


def even(count: int) -> Tensor:
    return torch.full((count,), 1 / count, dtype=torch.float64)


def merge(
    out: Path,
    experts: Mapping[str, Mapping[str, TensorHeader]],
    base: Mapping[str, TensorHeader] | None = None,
    method: str = "average",
    scale: float = 1.0,
    shares: Any = None,
) -> dict[str, Tensor]:
    """Merge into one file and load it with the safetensors library."""
    parameters = stream.plan(experts, base)
    settings = Settings(tuple(experts), (1.0,) * len(experts), NEEDS[method].density or 1.0, 0)
    recipe = Recipe(METHODS[method], settings, scale, shares or (lambda name: even(len(experts))))
    digest = stream.write_file(
        out, [parameter.slot for parameter in parameters], stream.merge(parameters, recipe)
    )
    assert digest == hashlib.sha256(out.read_bytes()).hexdigest()
    return load_file(out)


SHAPES: dict[str, tuple[int, ...]] = {
    "matrix": (7, 5),
    "tall": (60, 3),
    "wide": (2, 90),
    "vector": (13,),
    "scalar": (),
    "empty": (0, 4),
    "hollow": (4, 0),
    "cube": (4, 3, 2),
}


@pytest.fixture(params=[8, 300, None], ids=["one element at a time", "a few", "whole"])
def working_set(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param is not None:
        monkeypatch.setattr(stream, "WORKING_SET", request.param)


@pytest.mark.usefixtures("working_set")
@pytest.mark.parametrize("method", ["average", "ties", "dare-ties", "iso-c"])
def test_the_result_does_not_depend_on_the_parts(method: str, tmp_path: Path) -> None:
    torch.manual_seed(3)
    values = [{name: torch.randn(shape) for name, shape in SHAPES.items()} for _ in range(4)]
    *experts, base = (
        checkpoint(tmp_path / str(number), tensors) for number, tensors in enumerate(values)
    )
    given = dict(zip("abc", experts, strict=True))
    got = merge(tmp_path / "out", given, base, method)
    stream.WORKING_SET, kept = 1 << 24, stream.WORKING_SET
    try:
        whole = merge(tmp_path / "whole", given, base, method)
    finally:
        stream.WORKING_SET = kept
    for name, shape in SHAPES.items():
        assert tuple(got[name].shape) == shape
        torch.testing.assert_close(got[name], whole[name], rtol=1e-6, atol=1e-6)
        if method == "average":
            mean = torch.stack([tensors[name].double() for tensors in values[:3]]).mean(0)
            torch.testing.assert_close(got[name], mean.float(), rtol=1e-6, atol=1e-6)


@pytest.mark.usefixtures("working_set")
def test_shares_by_row_column_and_leading_axis(tmp_path: Path) -> None:
    values = [{name: random(*shape) for name, shape in SHAPES.items()} for _ in range(2)]
    experts = {
        task: checkpoint(tmp_path / task, tensors)
        for task, tensors in zip("ab", values, strict=True)
    }
    shapes = {"matrix": (7, 1), "tall": (1, 3), "wide": (1, 90), "vector": (13,), "cube": (1, 3, 1)}
    first = {name: torch.rand(shapes.get(name, ()), dtype=torch.float64) for name in SHAPES}
    got = merge(
        tmp_path / "out", experts, shares=lambda name: torch.stack([first[name], 1 - first[name]])
    )
    for name, share in first.items():
        expected = share * values[0][name].double() + (1 - share) * values[1][name].double()
        torch.testing.assert_close(got[name], expected.float(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("one", "two", "out"),
    [
        (torch.float32, torch.float32, torch.float32),
        (torch.float16, torch.float16, torch.float16),
        (torch.bfloat16, torch.bfloat16, torch.bfloat16),
        (torch.float16, torch.bfloat16, torch.float32),
        (torch.bfloat16, torch.float32, torch.float32),
        (torch.float64, torch.float32, torch.float64),
    ],
)
def test_the_widest_dtype_is_written(
    one: torch.dtype, two: torch.dtype, out: torch.dtype, tmp_path: Path
) -> None:
    values = [random(6, 5, dtype=dtype) for dtype in (one, two)]
    experts = {
        task: checkpoint(tmp_path / task, {"w": value})
        for task, value in zip("ab", values, strict=True)
    }
    got = merge(tmp_path / "out", experts)["w"]
    assert got.dtype == out
    mean = torch.stack([value.double() for value in values]).mean(0).to(out)
    tolerance = (
        2e-7 if out == torch.float32 else 0.0
    )  # narrower ones are rounded once, from float32
    torch.testing.assert_close(got, mean, rtol=tolerance, atol=tolerance)


@pytest.mark.usefixtures("working_set")
def test_a_single_expert_and_equal_ones_come_out_bit_for_bit(tmp_path: Path) -> None:
    values = {name: random(*shape) for name, shape in SHAPES.items()}
    values |= {
        f"{name} {dtype}": values[name].to(dtype)
        for name in SHAPES
        for dtype in (torch.half, torch.bfloat16)
    }
    expert = checkpoint(tmp_path / "expert", values)
    for tasks in ("a", "abc"):
        got = merge(tmp_path / tasks, dict.fromkeys(tasks, expert))
        assert all(torch.equal(got[name], value) for name, value in values.items())


def test_tensors_are_laid_out_as_the_safetensors_library_does(tmp_path: Path) -> None:
    tensors = {
        "b": random(3),
        "a": random(2, dtype=torch.bfloat16),
        "c": random(1),
        "n": torch.arange(3),
    }
    headers = checkpoint(tmp_path / "a", tensors)
    merge(tmp_path / "out", {"a": headers})
    assert (tmp_path / "out").read_bytes()[8:] == (
        tmp_path / "a" / "model.safetensors"
    ).read_bytes()[8:]
    with safe_open(tmp_path / "out", "pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_integers_are_kept_where_all_agree(tmp_path: Path) -> None:
    experts = {
        task: checkpoint(tmp_path / task, {"ids": torch.arange(9), "w": random(2)}) for task in "ab"
    }
    assert torch.equal(merge(tmp_path / "out", experts)["ids"], torch.arange(9))
    experts["c"] = checkpoint(tmp_path / "c", {"ids": torch.arange(1, 10), "w": random(2)})
    with pytest.raises(UserError, match="expert c: tensor ids of integers differs from expert a's"):
        merge(tmp_path / "two", experts)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"w": random(2, 3)}, "expert b: lacks tensor v, which expert a has"),
        (
            {"w": random(2, 3), "v": random(4), "x": random(1)},
            "expert a: lacks tensor x, which expert b has",
        ),
        (
            {"w": random(3, 2), "v": random(4)},
            r"expert b: tensor w has shape \[3, 2\], not \[2, 3\] as in expert a",
        ),
        (
            {"w": random(2, 3).int(), "v": random(4)},
            "expert b: tensor w has dtype I32, not F32 as in expert a",
        ),
        (
            {"w": random(2, 3).to(torch.float8_e4m3fn), "v": random(4)},
            "dtype F8_E4M3, which cannot be merged",
        ),
    ],
)
def test_experts_that_do_not_match_are_named(
    changed: dict[str, Tensor], message: str, tmp_path: Path
) -> None:
    experts = {
        "a": checkpoint(tmp_path / "a", {"w": random(2, 3), "v": random(4)}),
        "b": checkpoint(tmp_path / "b", changed),
    }
    with pytest.raises(UserError, match=message):
        stream.plan(experts, None)


def test_a_base_that_does_not_match_is_named(tmp_path: Path) -> None:
    experts = {task: checkpoint(tmp_path / task, {"w": random(2, 3)}) for task in "ab"}
    with pytest.raises(UserError, match="base: lacks tensor w"):
        stream.plan(experts, checkpoint(tmp_path / "one", {"v": random(1)}))
    with pytest.raises(UserError, match=r"base: tensor w has shape \[6\]"):
        stream.plan(experts, checkpoint(tmp_path / "two", {"w": random(6)}))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("where", ["expert b", "base"])
def test_values_that_are_not_finite_are_refused(value: float, where: str, tmp_path: Path) -> None:
    tensors = {
        who: {"w": random(40, 30), "v": random(3)} for who in ("expert a", "expert b", "base")
    }
    tensors[where]["w"][39, 29] = value
    headers = {who: checkpoint(tmp_path / who, given) for who, given in tensors.items()}
    with pytest.raises(UserError, match=f"{where}: tensor w holds NaN or Inf"):
        merge(
            tmp_path / "out",
            {"a": headers["expert a"], "b": headers["expert b"]},
            headers["base"],
            scale=1.5,
        )


WIDTHS = (torch.float32, torch.float16, torch.bfloat16)


@pytest.mark.parametrize("dtype", WIDTHS)
def test_finite_values_whose_sum_is_not_are_accepted(dtype: torch.dtype, tmp_path: Path) -> None:
    values = torch.full((50,), torch.finfo(dtype).max, dtype=dtype)
    experts = {task: checkpoint(tmp_path / task, {"w": values}) for task in "ab"}
    assert torch.equal(merge(tmp_path / "out", experts)["w"], values)


@pytest.mark.parametrize("dtype", WIDTHS)
def test_finite_values_whose_difference_is_not_are_accepted(
    dtype: torch.dtype, tmp_path: Path
) -> None:
    most = torch.finfo(dtype).max
    experts = {
        task: checkpoint(tmp_path / task, {"w": torch.full((50,), value, dtype=dtype)})
        for task, value in (("a", most), ("b", -most))
    }
    assert torch.equal(merge(tmp_path / "out", experts)["w"], torch.zeros(50, dtype=dtype))


def test_an_expert_without_a_share_must_be_finite_too(tmp_path: Path) -> None:
    values = {"a": random(40, 30), "b": random(40, 30), "c": random(40, 30)}
    values["b"][7, 3] = float("inf")
    experts = {task: checkpoint(tmp_path / task, {"w": value}) for task, value in values.items()}
    given = torch.tensor([0.5, 0.0, 0.5], dtype=torch.float64)
    with pytest.raises(UserError, match="expert b: tensor w holds NaN or Inf"):
        merge(tmp_path / "out", experts, shares=lambda name: given)


def test_merged_values_that_do_not_fit_the_dtype_are_refused(tmp_path: Path) -> None:
    experts = {
        task: checkpoint(tmp_path / task, {"w": torch.full((3,), 6e4).half()}) for task in "ab"
    }
    base = checkpoint(tmp_path / "base", {"w": torch.zeros(3).half()})
    with pytest.raises(
        UserError, match=r"tensor w: merged values do not fit F16; use a smaller --scale"
    ):
        merge(tmp_path / "out", experts, base, scale=2.0)


def test_a_file_that_was_cut_after_its_header_was_read_is_refused(tmp_path: Path) -> None:
    experts = {task: checkpoint(tmp_path / task, {"w": random(50)}) for task in "ab"}
    os.truncate(tmp_path / "b" / "model.safetensors", 150)
    with pytest.raises(UserError, match="ends before its header says it does"):
        merge(tmp_path / "out", experts)


def test_a_full_disk_is_found_before_anything_is_written(tmp_path: Path) -> None:
    def never() -> Iterator[Tensor]:
        raise AssertionError
        yield

    with pytest.raises(OSError, match=r"File too large|No space left") as caught:
        stream.write_file(tmp_path / "out", [Slot("w", torch.float32, (1 << 44,))], never())
    told = str(machine.refusal(caught.value, tmp_path / "out"))
    assert re.match(rf"{tmp_path / 'out'}: (no space left|a file larger than)", told)


def test_shards_hold_the_slots_in_order() -> None:
    slots = [
        Slot(name, torch.float32, (size,)) for name, size in zip("abcd", (1, 2, 9, 1), strict=True)
    ]
    assert [[slot.name for slot in file] for file in stream.shards(slots, 12)] == [
        ["a", "b"],
        ["c"],
        ["d"],
    ]
    assert stream.shard_names(3)[1] == "model-00002-of-00003.safetensors"
    stated = stream.index({"x": slots[:2], "y": slots[2:]})
    assert stated == {
        "metadata": {"total_size": 52},
        "weight_map": {"a": "x", "b": "x", "c": "y", "d": "y"},
    }


MEASURE = """
import json, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import torch
from fmn.merge import stream
from fmn.models.headers import tensor_headers
from fmn.merge.rules import METHODS, Settings
def peak():
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM")) * 1024
folder, method = Path(sys.argv[2]), METHODS[sys.argv[3]]
tasks = tuple("abcd")
shares = torch.full((4,), 0.25, dtype=torch.float64)
Path("/proc/self/clear_refs").write_text("5")
before = peak()
parameters = stream.plan({task: tensor_headers(folder / task) for task in tasks}, tensor_headers(folder / "base"))
recipe = stream.Recipe(method, Settings(tasks, (1.0,) * 4, 0.2, 0), 1.5, lambda name: shares)
pieces = stream.merge(parameters, recipe)
stream.write_file(folder / "out", [parameter.slot for parameter in parameters], pieces)
print(peak() - before)
"""


@pytest.mark.slow
@pytest.mark.parametrize("method", ["average", "ties", "dare-ties", "iso-c"])
def test_memory_is_bounded_whatever_the_size(method: str, tmp_path: Path) -> None:
    tensors = {"embedding": random(120_000, 512)}  # 246 MB
    for who in ("a", "b", "c", "d", "base"):
        checkpoint(tmp_path / who, {name: tensor + len(who) for name, tensor in tensors.items()})
    root = str(Path(stream.__file__).parents[2])
    command = [sys.executable, "-c", MEASURE, root, str(tmp_path), method]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert int(json.loads(done.stdout)) < 256e6


def test_the_effective_number_of_task_vectors(tmp_path: Path) -> None:
    base = {"m": torch.zeros(4, 3), "v": torch.zeros(5), "i": torch.arange(3)}
    first, second = torch.zeros(4, 3), torch.zeros(4, 3)
    first[0, 0], second[1, 2] = 2.0, 2.0
    folders = {
        "base": base,
        "a": {**base, "m": first},
        "b": {**base, "m": second},
        "c": {**base, "m": -first},
    }
    headers = {name: checkpoint(tmp_path / name, tensors) for name, tensors in folders.items()}

    def number(*experts: str) -> float:
        given = {f"{place}{name}": headers[name] for place, name in enumerate(experts)}
        return stream.effective_number(stream.plan(given, headers["base"]))

    assert number("a", "b") == pytest.approx(2)
    assert number("a", "a", "a") == pytest.approx(1)
    assert number("a") == pytest.approx(1)
    assert number("a", "a", "b") == pytest.approx(9 / 5)
    assert number("a", "c") == 1, "they cancel: there is nothing to scale"
    assert number("base", "base") == 1
