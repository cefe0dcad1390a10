"""The parameters of a merged model, counted from files; shared ones count once."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import BertConfig, BertForSequenceClassification, BertModel

from fmn.errors import UserError
from fmn.report.frontier import size
from tests.registry.conftest import merge_and_evaluate


def test_a_model_is_counted_as_pytorch_counts_it(tiny_work: Path, tmp_path: Path) -> None:
    model = merge_and_evaluate(tiny_work, tmp_path).model
    tasks = ["mrpc", "sst2", "stsb"]
    encoder = BertModel.from_pretrained(model / "encoder").num_parameters()
    experts = [BertForSequenceClassification.from_pretrained(model / "tasks" / t) for t in tasks]
    counts = [expert.num_parameters() for expert in experts]
    heads = [count - encoder for count in counts]
    merged, apart = size(model, tasks)
    assert merged == pytest.approx((encoder + sum(heads)) / encoder)
    assert apart == pytest.approx(sum(counts) / encoder)
    copy = shutil.copytree(model, tmp_path / "copy")  # which has no hard links any more
    assert size(copy, tasks) == (merged, apart)


def test_a_layer_of_a_tasks_own_counts(tmp_path: Path) -> None:
    shapes = {"encoder": {"a": 60, "b": 40}, "tasks/x": {"a": 60, "b": 40, "head": 5}}
    for name, tensors in shapes.items():
        (tmp_path / name).mkdir(parents=True)
        values = {t: torch.rand(count) for t, count in tensors.items()}
        save_file(values, tmp_path / name / "model.safetensors")
    assert size(tmp_path, ["x"]) == (2.05, 1.05)


def test_a_folder_without_weights_is_no_model(tmp_path: Path) -> None:
    BertConfig().save_pretrained(tmp_path / "encoder")
    with pytest.raises(UserError, match="has no model"):
        size(tmp_path, [])
