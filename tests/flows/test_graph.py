"""The pipeline is written down once: the flow, `fmn stage` and dvc.yaml follow one table."""

import inspect
import re
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from flows import graph
from flows.graph import PIPELINE, Node
from fmn import params
from fmn.errors import UserError
from tests.conftest import ROOT

PROFILE: dict[str, Any] = {
    "work": "runs/one",
    "base": "hf://org/base",
    "experts": {"tasks": ["sst2", "mrpc"]},
    "sources": {"sst2": "hf://org/sst2"},
    "finetune": {"mrpc": {"epochs": 2}},
    "gram": {"sst2": {}},
    "realign": {"realigned": {"texts": 8}},
    "registry": {"name": "demo"},
}


def listed(**changes: Any) -> list[Node]:
    return graph.nodes(params.validate({**PROFILE, **changes}, "test"), Path("params.yaml"))


def titles(nodes: list[Node]) -> list[str]:
    return [node.title for node in nodes]


def test_a_settings_file_becomes_nodes_in_order() -> None:
    assert titles(listed()) == [
        "settings",
        "fetch-base",
        "fetch sst2",
        "data sst2",
        "data mrpc",
        "finetune mrpc",
        "fisher sst2",
        "fisher mrpc",
        "gram sst2",
        "evaluate-expert sst2",
        "evaluate-expert mrpc",
        "merge base",
        "merge average",
        "merge merged",
        "evaluate base",
        "evaluate average",
        "evaluate merged",
        "realign realigned",
        "evaluate-realigned realigned",
        "report",
        "register",
    ]


def test_a_node_needs_those_that_write_what_it_reads() -> None:
    nodes = listed()
    needs = {node.title: titles(graph.needs(node, nodes)) for node in nodes}
    assert needs["fetch-base"] == []
    assert needs["finetune mrpc"] == ["fetch-base", "data mrpc"]
    assert needs["fisher sst2"] == ["fetch sst2", "data sst2"]
    assert set(needs["merge merged"]) == {
        "fetch-base",
        "fetch sst2",
        "finetune mrpc",
        "fisher sst2",
        "fisher mrpc",
        "gram sst2",
    }
    assert set(needs["evaluate merged"]) == {"merge merged", "data sst2", "data mrpc"}
    assert {"merge merged", "report", "evaluate merged"} <= set(needs["register"])
    order = titles(nodes)
    assert all(order.index(need) < order.index(title) for title in needs for need in needs[title])


def test_every_argument_is_one_of_the_stage_function() -> None:
    for node in listed():
        inspect.signature(node.function).bind(**node.arguments)


@pytest.mark.parametrize("row", PIPELINE, ids=lambda row: row.name)
def test_a_stage_has_a_version_that_dvc_compares(row: graph.Row) -> None:
    source = Path(inspect.getsourcefile(row.function) or "").read_text()
    assert re.search(rf"^{row.function.__name__.upper()} = \d+$", source, re.MULTILINE)


def test_dvc_yaml_is_what_the_table_says() -> None:
    assert (ROOT / "dvc.yaml").read_text() == graph.dvc_yaml(), "run `make dvc`"


def test_no_setting_reaches_a_shell_but_names_that_were_checked() -> None:
    stages = YAML(typ="safe").load(graph.dvc_yaml())["stages"]
    for stage in stages.values():
        command = stage.get("do", stage)["cmd"]
        assert command.startswith("fmn stage ")
        assert command.count("${") <= 1
        assert "${work}" not in command


def test_an_unknown_stage_or_name_is_refused_with_what_there_is() -> None:
    settings = params.validate(PROFILE, "test")
    node = graph.find_node(settings, Path("params.yaml"), "fisher", "sst2")
    assert node.arguments["out"] == Path("runs/one/fisher/sst2.parquet")
    with pytest.raises(UserError, match="did you mean 'fisher'"):
        graph.find_node(settings, Path("params.yaml"), "fischer", "sst2")
    with pytest.raises(UserError, match="give one of its names: mrpc, sst2"):
        graph.find_node(settings, Path("params.yaml"), "fisher", "rte")
