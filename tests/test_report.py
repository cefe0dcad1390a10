"""The table, the pictures and the model card say what the metrics say."""

import json
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.repocard_data import model_index_to_eval_results

from fmn import report
from fmn.architectures import Site

EXPERTS = {
    "mrpc": {"tasks": {"mrpc": {"accuracy": 0.8, "f1": 0.9, "score": 0.85, "examples": 408}}},
    "cola": {"tasks": {"cola": {"matthews_correlation": 0.0, "score": 0.0, "examples": 1043}}},
}
MERGED: dict[str, dict[str, Any]] = {
    "average": {
        "tasks": {
            "mrpc": {"accuracy": 0.6, "f1": 0.7, "score": 0.65, "examples": 408},
            "cola": {"matthews_correlation": 0.1, "score": 0.1, "examples": 1043},
        }
    },
    "merged": {
        "tasks": {
            "mrpc": {
                "accuracy": 0.7,
                "f1": 0.8,
                "score": 0.75,
                "examples": 408,
                "interval": {"accuracy": [0.651, 0.749], "f1": [0.76, 0.84], "score": [0.71, 0.79]},
            },
            "cola": {"matthews_correlation": 0.2, "score": 0.2, "examples": 1043},
        }
    },
}
RECIPE: dict[str, Any] = {
    "method": "mask-fisher",
    "coefficients": {"cola": 1.0, "mrpc": 0.5},
    "experts": {
        "cola": {"revision": "hf://org/cola@" + "a" * 40, "source": "hf://org/cola"},
        "mrpc": {"revision": "finetune:0123456789abcdef", "source": "finetune"},
    },
}


def test_rows_follow_the_merged_models_tasks_and_are_relative_to_the_experts() -> None:
    table = report.rows(EXPERTS, MERGED)
    assert [row.task for row in table] == ["mrpc", "cola"]
    assert table[0].relative("merged") == pytest.approx(0.75 / 0.85)
    assert table[1].relative("merged") is None, "an expert that scores nothing is no measure"


def test_means_are_over_tasks() -> None:
    means = report.macro(report.rows(EXPERTS, MERGED))
    assert means["expert"] == pytest.approx(0.425)
    assert means["merged"] == {"average": pytest.approx(0.375), "merged": pytest.approx(0.475)}
    assert means["relative"]["average"] == pytest.approx(0.65 / 0.85)


def test_the_table_reads_in_percent() -> None:
    header, body = report.cells(report.rows(EXPERTS, MERGED))
    assert header == ["task", "metric", "examples", "expert", "average", "merged"]
    assert body[0] == ["mrpc", "accuracy + f1", "408", "85.0", "65.0 (76.5)", "75.0 (88.2)"]
    assert body[1][-1] == "20.0"
    assert body[-1][0] == "mean"
    assert report.markdown(header, body).count("\n") == 5


def test_the_folder_holds_table_numbers_and_pictures(tmp_path: Path) -> None:
    fisher = {"mrpc": {Site(layer, "head"): np.arange(4.0) for layer in range(3)}}
    found = report.write(tmp_path, EXPERTS, MERGED, fisher)
    assert json.loads((tmp_path / "results.json").read_text()) == found["results"]
    assert "| mrpc | accuracy + f1 | 408 | 85.0 |" in (tmp_path / "table.md").read_text()
    for picture, words in (("scores.svg", ("mrpc", "cola", "average", "merged")), ("fisher.svg", ("mrpc", "layer"))):
        text = "".join(ET.fromstring((tmp_path / picture).read_text()).itertext())  # noqa: S314 - our own file
        for word in words:
            assert word in text
    first = (tmp_path / "scores.svg").read_bytes()
    report.write(tmp_path, EXPERTS, MERGED, fisher)
    assert (tmp_path / "scores.svg").read_bytes() == first, "the same numbers make the same picture"


def test_the_card_is_one_that_the_hub_reads() -> None:
    card = ModelCard(report.card(RECIPE, MERGED["merged"]))
    content: dict[str, Any] = card.data.to_dict()  # type: ignore[no-untyped-call]
    front = ModelCardData(**content)
    assert front.base_model == ["hf://org/cola@" + "a" * 40]
    assert front.datasets == ["nyu-mll/glue"]
    results = model_index_to_eval_results(content["model-index"])[1]
    found = {(entry.dataset_config, entry.metric_type): entry.metric_value for entry in results}
    assert found == {("mrpc", "accuracy"): 0.7, ("mrpc", "f1"): 0.8, ("cola", "matthews_correlation"): 0.2}
    assert "| mrpc | `finetune:0123456789abcdef` | 0.5 |" in card.text
    assert "| mrpc | validation | accuracy | 408 | 70.0 | 65.1 to 74.9 |" in card.text


def test_a_card_without_metrics_says_nothing_of_them() -> None:
    card = ModelCard(report.card(RECIPE, None))
    assert "model-index" not in card.content
    assert "Scores" not in card.text


def test_every_split_of_mnli_stands_for_itself() -> None:
    entry = {"accuracy": 0.7, "examples": 30, "accuracy_mismatched": 0.6, "examples_mismatched": 20, "score": 0.65}
    spans = {"accuracy": [0.5, 0.8], "accuracy_mismatched": [0.4, 0.7]}
    assert report.measured("mnli", {**entry, "interval": spans}) == [
        ("validation_matched", "accuracy", 0.7, 30, [0.5, 0.8]),
        ("validation_mismatched", "accuracy", 0.6, 20, [0.4, 0.7]),
    ]
    assert report.rows({}, {"merged": {"tasks": {"mnli": entry}}})[0].examples == 50
