"""Experts that do not fit one another, and statistics that do not fit an expert, are named."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from fmn.errors import UserError
from fmn.fisher.architectures import Site
from fmn.merge.inputs import Statistics, matching, plan_merge
from fmn.merge.recipe import MergeSettings
from fmn.models.headers import TensorHeader, file_headers
from tests.merge.experts import checkpoints, node_fisher, save
from tests.tiny import tiny_model


def stored(path: Path, tensors: dict[str, Tensor]) -> dict[str, TensorHeader]:
    save_file(tensors, path)
    return file_headers(path)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (
            {"w": torch.zeros(2, 3)},
            r"expert b: tensor v is missing, another expert's has shape \[4\]",
        ),
        (
            {"w": torch.zeros(2, 3), "v": torch.zeros(4), "x": torch.zeros(1)},
            "expert a: tensor x is missing, another",
        ),
        (
            {"w": torch.zeros(3, 2), "v": torch.zeros(4)},
            r"expert b: tensor w has shape \[3, 2\], another expert's has shape \[2, 3\]",
        ),
    ],
)
def test_experts_that_do_not_match_are_named(
    changed: dict[str, Tensor], message: str, tmp_path: Path
) -> None:
    first = stored(tmp_path / "a", {"w": torch.zeros(2, 3), "v": torch.zeros(4)})
    with pytest.raises(UserError, match=message):
        matching({"expert a": first, "expert b": stored(tmp_path / "b", changed)}, None)


def test_a_base_that_does_not_match_and_a_dtype_that_is_not_merged_are_named(
    tmp_path: Path,
) -> None:
    experts = {"expert a": stored(tmp_path / "a", {"w": torch.zeros(2, 3)})}
    with pytest.raises(UserError, match="base: tensor w is missing"):
        matching(experts, stored(tmp_path / "b", {"v": torch.zeros(1)}))
    folder = save(tiny_model("bert", 2), tmp_path / "mrpc")
    tensors = load_file(folder / "model.safetensors")
    tensors["classifier.bias"] = tensors["classifier.bias"].to(torch.float8_e4m3fn)
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(UserError, match=r"classifier\.bias has dtype F8_E4M3; convert it"):
        plan_merge({"mrpc": folder}, MergeSettings(method="average"))


def test_the_widest_dtype_is_merged_to_and_the_order_is_that_of_the_file(tmp_path: Path) -> None:
    a = stored(tmp_path / "a", {"w": torch.zeros(2).half(), "v": torch.zeros(2).half()})
    b = stored(tmp_path / "b", {"w": torch.zeros(2).bfloat16(), "v": torch.zeros(2).half()})
    specs = [parameter.spec for parameter in matching({"a": a, "b": b}, None)]
    assert [(spec.name, spec.dtype) for spec in specs] == [
        ("w", torch.float32),
        ("v", torch.float16),
    ]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"coefficient": ["rte=1"]}, "--coefficient rte: no such expert; there are mnli, mrpc"),
        ({"coefficient": ["mrpc=0", "stsb=0", "mnli=0"]}, "all are zero"),
        ({"scale": 1.5}, "--scale needs the model .* give --base DIR"),
        ({"method": "ties"}, "method ties needs the model .* give --base DIR"),
    ],
)
def test_options_that_cannot_be_are_named(
    tmp_path: Path, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        plan_merge(checkpoints(tmp_path), MergeSettings(**{"method": "average", **settings}))


def test_statistics_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    experts = checkpoints(tmp_path)
    values = node_fisher(experts)
    values["stsb"][Site(1, "head")] = values["stsb"][Site(1, "head")][:-1]
    with pytest.raises(UserError, match="stsb: the Fisher information has 3 head nodes in layer 1"):
        plan_merge(experts, MergeSettings(), statistics=Statistics(values))
    lacking = Statistics({task: {} for task in experts})
    with pytest.raises(UserError, match="expert mnli: no full Fisher of "):
        plan_merge(experts, MergeSettings(method="fisher"), statistics=lacking)


def test_the_base_is_read_only_if_it_is_needed(tmp_path: Path) -> None:
    experts = checkpoints(tmp_path)
    base = save(tiny_model("roberta", 2, seed=9), tmp_path / "base")  # of another architecture
    plan_merge(experts, MergeSettings(method="average"), base)
    with pytest.raises(UserError, match="base: "):
        plan_merge(experts, MergeSettings(method="average", scale=1.5), base)
