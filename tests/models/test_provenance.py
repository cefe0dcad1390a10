"""Where a checkpoint comes from, and how it was fine-tuned, as its sidecar says."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from fmn.errors import UserError
from fmn.models.provenance import (
    Lineage,
    check_base,
    check_common_base,
    distance,
    lineage,
    rows_tuned_on,
    sample,
    training_metadata,
    tuning,
)
from fmn.store.artifacts import digest_folder
from fmn.store.stage import read_sidecar
from tests.conftest import TASKS, TUNING
from tests.folders import save, tiny_bert, weights


def test_provenance_says_where_an_expert_comes_from(
    tiny_base: Path, tiny_work: Path, tmp_path: Path
) -> None:
    expert, base = tiny_work / "experts" / "sst2", tiny_work / "base"
    training = training_metadata(expert)
    assert training is not None
    assert training.base == lineage(base)
    assert lineage(base).source == lineage(base).revision == str(tiny_base)
    assert (training.task, training.steps, training.threads) == ("sst2", 4, torch.get_num_threads())
    sidecar = read_sidecar(expert)
    assert sidecar is not None
    assert training.data_digest == sidecar.inputs["train"]
    output = f"finetune:{sidecar.key[:16]}"
    assert lineage(expert) == Lineage(source=output, revision=output)
    assert tuning(expert) == TUNING.model_dump(exclude={"device"})
    assert rows_tuned_on(expert) == (128, 0)

    foreign = Path(shutil.copytree(expert, tmp_path / "foreign"))
    (foreign / "fmn.json").unlink()
    digest = f"sha256:{digest_folder(foreign)}"
    assert lineage(foreign) == Lineage(source="folder", revision=digest)
    for folder in (foreign, base):
        assert training_metadata(folder) is None
        assert tuning(folder) == {}
        assert rows_tuned_on(folder) == (None, 0)
    content = json.loads((expert / "fmn.json").read_text())
    content["info"]["examples"] = "many"
    (foreign / "fmn.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"fmn\.json: examples is 'many'"):
        rows_tuned_on(foreign)


def moved(folder: Path, out: Path, share: float) -> Path:
    """A copy whose every weight moved at random by this share of its tensor's size."""
    shutil.copytree(folder, out)
    random = torch.Generator().manual_seed(1)
    state = weights(folder)
    for value in state.values():
        noise = torch.randn(value.shape, generator=random)
        value += share * noise * value.norm() / noise.norm()
    save(out, state)
    return out


@pytest.mark.parametrize(
    ("share", "expected"), [(0.0, 0.0), (0.1, 0.1), (0.5, 0.47), (1.0, 0.82), (2.0, 1.15)]
)
def test_a_distance_is_that_of_all_weights(
    share: float, expected: float, bert: Path, tmp_path: Path
) -> None:
    """It is as computed in float64 from whole tensors."""
    other = moved(bert, tmp_path / "moved", share)
    apart = distance(sample(bert), sample(other))
    assert apart == pytest.approx(expected, abs=0.04)
    names = [n for n in weights(bert) if "layer" in n and n.endswith("weight") and "Norm" not in n]
    parts = []
    for name in names:
        left, right = (weights(folder)[name].double() for folder in (bert, other))
        size = (left.square().sum() + right.square().sum()) / 2
        parts.append(float(((left - right).square().sum() / size).sqrt()))
    parts.sort()
    median = (parts[(len(parts) - 1) // 2] + parts[len(parts) // 2]) / 2
    assert apart == pytest.approx(median, abs=1e-6)


def test_experts_of_their_base_pass(tiny_work: Path) -> None:
    experts = {task: tiny_work / "experts" / task for task in TASKS}
    assert check_common_base(experts, tiny_work / "base") == []
    assert check_common_base(experts) == []
    assert [check_base(expert, tiny_work / "base") for expert in experts.values()] == [[], [], []]


def test_an_expert_of_another_base_is_refused_with_both_figures(bert: Path, tmp_path: Path) -> None:
    other = tiny_bert(tmp_path / "other", seed=1)
    expert = moved(bert, tmp_path / "expert", 0.1)
    figures = r"are 1\.[34]\d of their size apart .* 0\.3, .* 1\.41\); give the model"
    with pytest.raises(UserError, match=rf"{expert}: was not .* the base {other}: .* {figures}"):
        check_base(expert, other)
    (note,) = check_common_base({"sst2": expert, "mrpc": other})
    assert note.startswith(f"expert sst2 ({expert}) and expert mrpc ({other}): perhaps they were")
    with pytest.raises(UserError, match=rf"expert mrpc \({other}\): .* the base {bert}: "):
        check_common_base({"sst2": expert, "mrpc": other}, bert)


def test_an_expert_far_from_its_base_is_a_doubt(bert: Path, tmp_path: Path) -> None:
    far = moved(bert, tmp_path / "far", 1.0)
    (note,) = check_base(far, bert)
    assert note.startswith(f"{far}: perhaps it was not fine-tuned from the base {bert}: ")


def test_one_file_as_two_experts_is_a_doubt(bert: Path, tmp_path: Path) -> None:
    expert, again = (moved(bert, tmp_path / name, 0.1) for name in ("a", "b"))
    (note,) = check_common_base({"sst2": expert, "imdb": again}, bert)
    assert note.startswith(
        f"expert sst2 ({expert}) and expert imdb ({again}) have the same encoder"
    )
    # Where embeddings alone were tuned, the linear maps are the same and the encoders are not.
    state = weights(again)
    state["bert.embeddings.word_embeddings.weight"] += 0.01
    save(again, state)
    assert check_common_base({"sst2": expert, "imdb": again}, bert) == []
