"""The pipeline is written down once: the flow, `fmn stage` and dvc.yaml follow one table."""

import inspect
import re
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from flows import graph
from flows.graph import PIPELINE, Node
from fmn import params
from fmn.errors import UserError
from fmn.models.stages import FetchSettings
from fmn.tasks.task import TaskSettings
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
STARS = {"dataset": {"path": "reviews.csv"}, "columns": {"text": "review", "label": "stars"}}
PAGES = {"dataset": {"path": "pages.csv"}, "columns": {"label": None}}
OWN: dict[str, Any] = {
    "tasks": {"stars": STARS, "pages": PAGES},
    "experts": {"tasks": ["sst2", "stars", "pages"]},
    "sources": {
        "sst2": "hf://org/sst2",
        "pages": "pages",
        "stars": {"source": "stars", "labels": ["good", "bad"]},
    },
    "finetune": {},
    "fisher": {"estimator": "expected"},
}


def listed(**changes: Any) -> list[Node]:
    return graph.nodes(params.validate({**PROFILE, **changes}, "test"), Path("params.yaml"))


def titles(nodes: list[Node]) -> list[str]:
    return [node.title for node in nodes]


def test_a_settings_file_becomes_nodes_in_order() -> None:
    assert titles(listed()) == [
        "settings",
        "fetch-base",
        "data sst2",
        "data mrpc",
        "fetch sst2",
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
    assert needs["fetch sst2"] == ["data sst2"]
    assert needs["finetune mrpc"] == ["fetch-base", "data mrpc"]
    assert needs["fisher sst2"] == ["data sst2", "fetch sst2"]
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


def test_a_task_of_the_users_own_reaches_the_stages_that_need_its_definition() -> None:
    arguments = {node.title: node.arguments for node in listed(**OWN)}
    assert arguments["data sst2"]["definition"] is None
    assert arguments["data stars"]["definition"] == TaskSettings.model_validate(STARS)
    fetching = arguments["fetch stars"]
    assert (fetching["source"], fetching["task"]) == ("stars", "stars")
    assert fetching["settings"] == FetchSettings(labels=["good", "bad"])
    assert fetching["data"] == Path("runs/one/data/stars")
    assert "task" not in arguments["fetch-base"]
    assert arguments["register"]["data"] == Path("runs/one/data")


def test_a_task_without_labels_is_merged_and_not_scored() -> None:
    nodes = listed(**OWN)
    scored = [node.name for node in nodes if node.stage == "evaluate-expert"]
    assert scored == ["sst2", "stars"]
    arguments = {node.title: node.arguments for node in nodes}
    assert set(arguments["report"]["experts"]) == set(scored)
    assert "pages" in arguments["merge merged"]["experts"]


def test_every_argument_is_one_of_the_stage_function() -> None:
    for node in [*listed(), *listed(**OWN)]:
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


def test_a_stage_is_chosen_for_one_name_or_for_all() -> None:
    find = partial(graph.find_nodes, params.validate(PROFILE, "test"), Path("params.yaml"))
    (node,) = find("fisher", "sst2")
    assert node.arguments["out"] == Path("runs/one/fisher/sst2.parquet")
    assert titles(find("fisher")) == ["fisher sst2", "fisher mrpc"]
    with pytest.raises(UserError, match="did you mean 'fisher'"):
        find("fischer", "sst2")
    with pytest.raises(UserError, match="give one of its names: sst2, mrpc"):
        find("fisher", "rte")
