"""The served model's own file: heads by task over one encoder in memory."""

from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING

import pandas as pd
import pytest
import torch
from mlflow.exceptions import MlflowException

from fmn.registry import tracking
from tests.conftest import TASKS
from tests.registry.conftest import Merged

if TYPE_CHECKING:
    from fmn.registry.served import MergedModel

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:mlflow")


@pytest.fixture
def packed(merged: Merged, tmp_path: Path) -> Path:
    tracking.pack(merged.model, tmp_path / "packed")
    return tmp_path / "packed"


def test_all_tasks_share_one_encoder(packed: Path) -> None:
    from fmn.registry.served import load_tasks

    assert len(list(packed.rglob("model.safetensors"))) == 1
    models = load_tasks(packed)
    assert sorted(models) == sorted(TASKS)
    assert len({id(model.base_model) for model in models.values()}) == 1
    weights = [weight for model in models.values() for weight in model.parameters()]
    assert not any(weight.is_meta for weight in weights)


def test_answers_are_in_the_tasks_words() -> None:
    from fmn.registry.served import answers

    first, second = answers(torch.tensor([[0.0, 3.0], [2.0, 0.0]]), {0: "no", 1: "yes"})
    assert (first["label"], second["label"]) == ("yes", "no")
    assert list(first["probabilities"]) == ["no", "yes"]
    assert first["probabilities"]["yes"] == first["score"]
    assert answers(torch.tensor([[2.5]]), {0: "score"}) == [
        {"label": "score", "score": 2.5, "probabilities": {}}
    ]


@pytest.fixture
def model(packed: Path) -> "MergedModel":
    from fmn.registry.served import MergedModel

    loaded = MergedModel()
    loaded.load_context(SimpleNamespace(artifacts={"merged": str(packed)}))  # type: ignore[arg-type]
    return loaded


def ask(model: "MergedModel", task: str, **columns: list[str | None]) -> pd.DataFrame:
    return model.predict(None, pd.DataFrame(columns), {"task": task})  # type: ignore[arg-type]


def test_a_batch_is_answered_as_each_of_its_texts_alone(model: "MergedModel") -> None:
    texts = [f"a film {'that is long ' * (n % 7)}number {n}" for n in range(70)]
    together = ask(model, "sst2", text=list(texts))
    assert len(together) == 70
    for row in (0, 33, 69):
        alone = ask(model, "sst2", text=[texts[row]])
        assert together.score[row] == pytest.approx(alone.score[0], abs=1e-5)


def test_no_texts_are_no_answers(model: "MergedModel") -> None:
    assert list(ask(model, "sst2", text=[])) == ["label", "score", "probabilities"]
    assert len(ask(model, "sst2", text=[])) == 0


def test_a_second_text_is_there_for_tasks_on_pairs_and_only_for_them(model: "MergedModel") -> None:
    assert len(ask(model, "mrpc", text=["a", "b"], text_pair=["c", "d"])) == 2
    assert len(ask(model, "sst2", text=["a", "b"], text_pair=[None, None])) == 2
    for columns in ({"text": ["a"]}, {"text": ["a", "b"], "text_pair": ["c", None]}):
        with pytest.raises(MlflowException, match="task mrpc takes pairs"):
            ask(model, "mrpc", **columns)
    with pytest.raises(MlflowException, match="task sst2 takes one text"):
        ask(model, "sst2", text=["a"], text_pair=["b"])


def test_an_encoder_in_several_files_is_served(packed: Path) -> None:
    from safetensors.torch import load_file, save_file

    from fmn.registry.served import load_tasks

    weights = load_tasks(packed)["sst2"].base_model.state_dict()
    file = packed / "encoder" / "model.safetensors"
    tensors = load_file(file)
    file.unlink()
    names = sorted(tensors)
    for number, part in enumerate((names[:9], names[9:]), 1):
        shard = file.with_name(f"model-0000{number}-of-00002.safetensors")
        save_file({name: tensors[name] for name in part}, shard)
    again = load_tasks(packed)["sst2"].base_model.state_dict()
    assert all(torch.equal(again[name], weight) for name, weight in weights.items())
