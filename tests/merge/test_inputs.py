"""Experts that do not fit one another, and statistics that do not fit an expert, are named."""

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from fmn.errors import UserError
from fmn.fisher.architectures import Site
from fmn.merge import stream
from fmn.merge.inputs import Plan, Statistics, Tokens, matching, plan_merge
from fmn.merge.methods import Tuning
from fmn.merge.model import merged_pieces, merged_tensors
from fmn.merge.recipe import MergeSettings
from fmn.store.headers import TensorHeader, file_headers
from tests.merge.experts import checkpoints, node_fisher, save
from tests.tiny import tiny_generator, tiny_model


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


def test_a_bias_of_zeros_may_be_missing(tmp_path: Path) -> None:
    """Files of BartModel, such as a base's, have no final_logits_bias."""
    experts = {task: tmp_path / task for task in "ab"}
    method = MergeSettings(method="task-arithmetic")
    for number, folder in enumerate(experts.values()):
        model = tiny_generator("bart", number, torch.float32)
        model.get_buffer("final_logits_bias").zero_()
        model.save_pretrained(folder)
    base = tmp_path / "base"
    model.base_model.save_pretrained(base)
    plan = plan_merge(experts, method, base)
    assert {"shared.weight"} == {p.spec.name for p in plan.parameters} - {*layers_of(plan)}
    model.get_buffer("final_logits_bias").fill_(1)
    model.save_pretrained(experts["b"])
    with pytest.raises(UserError, match="final_logits_bias is missing"):
        plan_merge(experts, method, base)


def layers_of(plan: Plan) -> list[str]:
    return [p.spec.name for p in plan.parameters if p.spec.name.startswith(("encoder", "decoder"))]


@st.composite
def vocabularies(draw: st.DrawFn) -> list[tuple[int, int]]:
    """(tokens, rows) of some experts."""
    used = draw(st.lists(st.integers(1, 6), min_size=1, max_size=4))
    return [(tokens, tokens + draw(st.integers(0, 2))) for tokens in used]


@given(sizes=vocabularies())
def test_a_token_s_row_comes_from_those_that_have_the_token(
    sizes: list[tuple[int, int]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("rows")
    tensors = {f"expert {n}": torch.full((rows, 2), 2.0**n) for n, (_, rows) in enumerate(sizes)}
    headers = {each: stored(folder / each, {"w": tensor}) for each, tensor in tensors.items()}
    tokens = {f"expert {n}": Tokens(*each) for n, each in enumerate(sizes)}
    parameters = matching(headers, None, tokens, {"w"} if len(set(sizes)) > 1 else frozenset())
    plan = Plan(
        MergeSettings(method="average"), Tuning(),
        tuple(map(str, range(len(sizes)))), (1.0,) * len(sizes), 1.0, parameters,
    )  # fmt: skip
    with stream.reading() as read:
        merged = merged_tensors(plan, merged_pieces(plan, read))["w"]
    assert len(merged) == max(rows for _, rows in sizes)
    for row, values in enumerate(merged):
        having = [n for n, (used, _) in enumerate(sizes) if row < used]
        having = having or [n for n, (_, rows) in enumerate(sizes) if row < rows]
        if len(set(sizes)) == 1:  # as ever
            having = list(range(len(sizes)))
        expected = sum(2.0**n for n in having) / len(having)
        torch.testing.assert_close(values, torch.full((2,), expected))
