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
from fmn.fisher.stages import GramSettings
from fmn.sources.stages import FetchSettings
from fmn.tasks.task import TaskSettings
from tests.conftest import ROOT

PROFILE: dict[str, Any] = {
    "work": "runs/one",
    "base": "hf://org/base",
    "experts": {"tasks": ["sst2", "mrpc"]},
    "sources": {"sst2": "hf://org/sst2"},
    "finetune": {"mrpc": {"epochs": 2}},
    "gram": {"sst2": {}},
    "realign": {"realigned": {"texts": 8}, "realigned-more": {"texts": 9}},
    "baselines": {"paper": {"mapping": "paper"}},
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
        *(f"merge {name}" for name in ("base", "average", "paper", "merged")),
        "realign realigned",
        "realign realigned-more",
        "evaluate-expert sst2",
        "evaluate-expert mrpc",
        *(f"evaluate {name}" for name in ("base", "average", "paper", "merged")),
        "evaluate realigned",
        "evaluate realigned-more",
        "report",
        "register",
    ]


def test_a_node_needs_those_that_write_what_it_reads() -> None:
    nodes = listed()
    needs = {node.title: titles(graph.needs(node, nodes)) for node in nodes}
    assert needs["fetch-base"] == []
    assert needs["fetch sst2"] == ["fetch-base", "data sst2"]
    assert needs["finetune mrpc"] == ["fetch-base", "data mrpc"]
    assert needs["fisher sst2"] == ["data sst2", "fetch sst2"]
    assert set(needs["merge merged"]) == {
        "fetch-base",
        "data sst2",
        "data mrpc",
        "fetch sst2",
        "finetune mrpc",
        "fisher sst2",
        "fisher mrpc",
        "gram sst2",
    }
    assert set(needs["evaluate merged"]) == {"merge merged", "data sst2", "data mrpc"}
    assert set(needs["realign realigned"]) >= {"merge merged", "finetune mrpc", "data mrpc"}
    assert {"realign realigned", "report", "evaluate realigned"} <= set(needs["register"])
    order = titles(nodes)
    assert all(order.index(need) < order.index(title) for title in needs for need in needs[title])


def test_a_fisher_in_parts_is_one_more_stage_for_each_part() -> None:
    nodes = listed(fisher={"parts": 2, "samples": 9})
    assert [title for title in titles(nodes) if title.startswith("fisher")] == [
        *("fisher-part sst2 1", "fisher-part sst2 2", "fisher sst2"),
        *("fisher-part mrpc 1", "fisher-part mrpc 2", "fisher mrpc"),
    ]
    needs = {node.title: titles(graph.needs(node, nodes)) for node in nodes}
    assert needs["fisher-part sst2 2"] == ["data sst2", "fetch sst2"]
    assert needs["fisher sst2"][-2:] == ["fisher-part sst2 1", "fisher-part sst2 2"]
    for node in nodes:
        inspect.signature(node.function).bind(**node.arguments)


@pytest.mark.parametrize(
    ("changes", "columns", "source", "model"),
    [
        ({}, ["merged", "realigned", "realigned-more"], "merged", "realigned"),
        ({"realign": {}}, ["merged"], "", "merged"),
        ({"realign": {}, "calibrate": {}}, ["merged", "calibrated"], "", "calibrated"),
        ({"realign": {"realigned-x": {}}, "calibrate": {"texts": 9}},
         ["merged", "calibrated", "realigned-x"], "calibrated", "realigned-x"),
    ],
)  # fmt: skip
def test_the_last_steps_model_is_registered_and_reported(
    changes: dict[str, Any], columns: list[str], source: str, model: str
) -> None:
    nodes = {node.title: node for node in listed(**changes)}
    models = Path("runs/one/models")
    report, register = nodes["report"].arguments, nodes["register"].arguments
    assert list(report["merged"]) == ["base", "average", "paper", *columns]
    assert report["headline"] == model
    assert report["models"][model] == register["model"] == models / model
    assert register["metrics"] == report["merged"][model]
    assert register["card"] == Path(f"runs/one/report/cards/{model}.md")
    aligned = [node for node in nodes.values() if node.stage == "realign"]
    assert {node.arguments["model"] for node in aligned} <= {models / source}
    if "calibrate" in changes:
        assert nodes["calibrate calibrated"].arguments["model"] == models / "merged"


@pytest.mark.parametrize(
    "changes",
    [{"merge": {"method": "regmean"}}, {"baselines": {"other": {"method": "fisher-regmean"}}}],
)
def test_gram_matrices_are_computed_where_a_merge_takes_them(changes: dict[str, Any]) -> None:
    nodes = {
        node.title: node.arguments for node in listed(gram={"mrpc": {"samples": 7}}, **changes)
    }
    assert nodes["gram sst2"]["settings"] == GramSettings()
    assert nodes["gram mrpc"]["settings"].samples == 7
    assert set(nodes["merge merged"]["gram"]) == {"sst2", "mrpc"}
    assert not [title for title in titles(listed(gram={})) if title.startswith("gram")]


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


def test_the_settings_for_dvc_hold_the_version_of_every_stage() -> None:
    versions = listed()[0].arguments["versions"]
    for row in PIPELINE:
        name = row.function.__name__.upper()
        source = Path(inspect.getsourcefile(row.function) or "").read_text()
        assert re.search(rf"^{name} = {versions[name]}\b", source, re.MULTILINE)
        assert f"versions.{name}" in graph.dvc_yaml()


def test_dvc_yaml_is_what_the_table_says() -> None:
    assert (ROOT / "dvc.yaml").read_text() == graph.dvc_yaml(), "run `fmn dvc`"


def test_no_setting_reaches_a_shell_but_names_that_were_checked() -> None:
    stages = YAML(typ="safe").load(graph.dvc_yaml())["stages"]
    for stage in stages.values():
        commands = stage.get("do", stage)["cmd"]
        for command in [commands] if isinstance(commands, str) else commands:
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
    assert find("calibrate") == [], "the settings ask for none"
    with pytest.raises(UserError, match="give one of its names: sst2, mrpc"):
        find("fisher", "rte")
