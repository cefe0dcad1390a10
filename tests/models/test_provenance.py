"""Where a checkpoint comes from, and how it was fine-tuned, as its sidecar says."""

import json
import shutil
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import torch

from fmn.errors import UserError
from fmn.models.provenance import (
    Lineage,
    check_base,
    check_common_base,
    likeness,
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


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 1.0, 3.0])
def test_likeness_is_the_correlation_of_weights(share: float, bert: Path, tmp_path: Path) -> None:
    """It is as computed in float64 from whole tensors, and as the noise leaves it."""
    other = moved(bert, tmp_path / "moved", share)
    alike = likeness(sample(bert), sample(other))
    assert alike is not None
    assert alike.correlation == pytest.approx(1 / (1 + share**2) ** 0.5, abs=0.05)
    names = [n for n in weights(bert) if "layer" in n and n.endswith("weight") and "Norm" not in n]
    left, right = (
        [weights(folder)[name].double().ravel() for name in names] for folder in (bert, other)
    )
    cosines = [float(a @ b / a.norm() / b.norm()) for a, b in zip(left, right, strict=True)]
    mean = np.average(cosines, weights=[len(values) for values in left])
    assert alike.correlation == pytest.approx(mean, abs=1e-6)
    assert alike.weights == sum(map(len, left))
    assert (alike.is_doubtful, alike.is_unrelated) == (share > 0.8, False)


def test_random_models_are_unrelated(tmp_path: Path) -> None:
    models = [sample(tiny_bert(tmp_path / f"{seed}", seed=seed)) for seed in range(12)]
    for first, second in combinations(models, 2):
        alike = likeness(first, second)
        assert alike
        assert alike.is_unrelated


def test_experts_of_their_base_pass(tiny_work: Path) -> None:
    experts = {task: tiny_work / "experts" / task for task in TASKS}
    assert check_common_base(experts, tiny_work / "base") == []
    assert check_common_base(experts) == []
    assert [check_base(expert, tiny_work / "base") for expert in experts.values()] == [[], [], []]


def test_an_expert_of_another_base_is_refused_with_both_figures(bert: Path, tmp_path: Path) -> None:
    other = tiny_bert(tmp_path / "other", seed=1)
    expert = moved(bert, tmp_path / "expert", 0.1)
    figures = r"weights is -?0\.\d\d \(.* 0\.95, .* about 0\); give the model"
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
