"""The served model's own file: heads by task over one encoder in memory."""

import json
from pathlib import Path

import pytest
import torch

from fmn import merge_stages, registry
from fmn.params import MergeSettings
from tests.conftest import TASKS

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:mlflow")


@pytest.fixture
def packed(tiny_work: Path, tmp_path: Path) -> Path:
    experts = {task: tiny_work / "experts" / task for task in TASKS}
    merge_stages.merge(experts, {}, None, tmp_path / "merged", MergeSettings(method="average"))
    return registry.pack(tmp_path / "merged", tmp_path / "packed")


def test_the_encoder_is_packed_once(packed: Path) -> None:
    assert len(list(packed.rglob("model.safetensors"))) == 1
    assert sorted(path.parent.name for path in packed.rglob("head.safetensors")) == sorted(TASKS)


def test_all_tasks_share_one_encoder(packed: Path) -> None:
    from fmn.served import load_tasks

    models = load_tasks(packed)
    assert sorted(models) == sorted(TASKS)
    assert len({id(model.base_model) for model in models.values()}) == 1
    assert not any(parameter.is_meta for model in models.values() for parameter in model.parameters())


def test_answers_are_in_the_tasks_words() -> None:
    from fmn.served import answers

    first, second = answers(torch.tensor([[0.0, 3.0], [2.0, 0.0]]), {0: "no", 1: "yes"})
    assert (first["label"], second["label"]) == ("yes", "no")
    assert json.loads(first["probabilities"])["yes"] == pytest.approx(first["score"], abs=1e-6)
    assert answers(torch.tensor([[2.5]]), {0: "score"}) == [{"label": "score", "score": 2.5, "probabilities": "{}"}]
