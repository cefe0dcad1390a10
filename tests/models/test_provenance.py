"""Where a checkpoint comes from, and how it was fine-tuned, as its sidecar says."""

import json
import shutil
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fmn.errors import UserError
from fmn.models.provenance import (
    Lineage,
    check_base,
    check_common_base,
    check_experts,
    likeness,
    lineage,
    rows_tuned_on,
    sample,
    training_metadata,
    tuning,
)
from fmn.store.artifacts import digest_folder
from fmn.store.stage import read_sidecar
from fmn.tasks.task import TASKS as DEFINITIONS
from fmn.tasks.task import Columns, make_task
from tests.conftest import TASKS, TUNING
from tests.folders import WORDS, edit_config, save, tiny_bert, weights
from tests.kinds import piece_tokenizer
from tests.tiny import GENERATORS, tiny_generator, tiny_model


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


def test_an_expert_with_its_bases_encoder_is_a_doubt(bert: Path) -> None:
    (note,) = check_base(bert, bert)
    assert f"has the encoder of the base {bert}, weight for weight" in note


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


def test_experts_of_one_base_pass(bert: Path, tmp_path: Path) -> None:
    stsb = tiny_bert(tmp_path / "stsb", seed=1, outputs=1)
    mnli = tiny_bert(tmp_path / "mnli", seed=2, outputs=3)
    # Other dtypes can be merged.
    save(mnli, {name: value.half() for name, value in weights(mnli).items()})
    state = weights(bert)
    base = Path(shutil.copytree(bert, tmp_path / "base"))
    encoder = {name[5:]: value for name, value in state.items() if name.startswith("bert.")}
    encoder["embeddings.position_ids"] = torch.arange(16)
    save(base, encoder)
    check_experts({"mrpc": bert, "stsb": stsb, "mnli": mnli}, DEFINITIONS, base)
    check_experts({"sst2": bert}, DEFINITIONS)


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"outputs": 3}, "a head of 3 outputs, rte needs 2"),
        ({"hidden_size": 12}, "hidden_size is 12, not 8"),
        ({"num_attention_heads": 4}, "num_attention_heads is 4, not 2"),
        ({"num_hidden_layers": 1}, "num_hidden_layers is 1, not 2"),
        ({"words": (*WORDS[:6], "film", "fine", *WORDS[8:])}, "the id of token 'film' is 6, not 7"),
        ({"words": (*WORDS, "more")}, "ids up to 10, the model 10 embeddings"),
    ],
)
def test_experts_that_do_not_fit_are_named(
    changes: dict[str, Any], problem: str, bert: Path, tmp_path: Path
) -> None:
    other = tiny_bert(tmp_path / "other", **changes)
    with pytest.raises(UserError, match=problem) as caught:
        check_experts({"mrpc": bert, "rte": other}, DEFINITIONS)
    assert str(caught.value).startswith(f"rte: {other}")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("kind", "changes", "trait"),
    [
        ("bert", {"layer_norm_eps": 0.1}, "layer_norm_eps"),
        ("bert", {"is_decoder": True}, "is_decoder"),
        ("bert", {"hidden_dropout_prob": 0.3, "classifier_dropout": 0.2, "not_read": "x"}, None),
        ("llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}, "rope_param"),
        ("llama", {"rope_theta": 10000, "rms_norm_eps": 1e-6, "pad_token_id": 2}, None),
        ("llama", {"rms_norm_eps": 1e-2}, "rms_norm_eps"),
        ("mistral", {"sliding_window": 9}, "sliding_window"),
        ("gemma2", {"attn_logit_softcapping": 5.0}, "attn_logit_softcapping"),  # a classifier
        ("bart", {"scale_embedding": True}, "scale_embedding"),
        ("t5", {"dense_act_fn": "gelu"}, "dense_act_fn"),
    ],
)
def test_entries_that_change_what_is_computed_are_the_same(
    kind: str, changes: dict[str, Any], trait: str | None, tmp_path: Path
) -> None:
    """Merged weights would be read by one configuration, and the others without a word."""
    generates = kind in GENERATORS
    model = tiny_generator(kind) if generates else tiny_model(kind, 2)
    columns = Columns(prompt="p", completion="c", label=None)
    own = {"task": "text2text-generation" if kind in ("t5", "bart") else "text-generation"}
    tasks = {n: make_task(n, columns=columns, **own) for n in "ab"} if generates else DEFINITIONS
    names = [*tasks][:2]
    folders = {name: tmp_path / name for name in names}
    for folder in folders.values():
        model.save_pretrained(folder)
        piece_tokenizer(folder)
    edit_config(folders[names[1]], **changes)
    if trait is None:
        check_experts(folders, tasks)
        return
    with pytest.raises(UserError, match=f"were not fine-tuned from one base: {trait}"):
        check_experts(folders, tasks)


def test_vocabularies_may_differ_by_tokens_and_by_padding(bert: Path, tmp_path: Path) -> None:
    wider = tiny_bert(tmp_path / "wider", seed=1, words=(*WORDS, "more"), vocab_size=12)
    padded = tiny_bert(tmp_path / "padded", seed=2, outputs=1, vocab_size=16)
    (note,) = check_experts({"mrpc": bert, "rte": wider, "stsb": padded}, DEFINITIONS, bert)
    lacks = "the base lacks more; mrpc lacks more; stsb lacks more"
    assert note.startswith(f"vocabularies differ: {lacks}; embeddings")
    assert check_experts({"mrpc": bert, "stsb": padded}, DEFINITIONS) == []
    other = tiny_bert(tmp_path / "other", vocab_size=12, words=(*WORDS, "less"))
    with pytest.raises(UserError, match=r"cola: .*'less' has id 10, that of 'more' \(rte\)"):
        check_experts({"rte": wider, "cola": other}, DEFINITIONS)
    apart = tiny_bert(tmp_path / "apart", vocab_size=12, words=(*WORDS, "[unused]", "less"))
    (apart / "vocab.txt").write_text("\n".join([*WORDS, "more", "less"]) + "\n")
    assert len(check_experts({"rte": wider, "cola": apart}, DEFINITIONS)) == 1


def test_experts_without_parts_are_named(bert: Path, copy: Path, tmp_path: Path) -> None:
    def refused(problem: str, experts: dict[str, Path], base: Path | None = None) -> None:
        with pytest.raises(UserError, match=problem):
            check_experts(experts, DEFINITIONS, base)

    state = weights(copy)
    encoder = {name: value for name, value in state.items() if not name.startswith("classifier")}
    save(copy, encoder)
    refused(r"rte: .*no classification head", {"mrpc": bert, "rte": copy})
    check_experts({"mrpc": bert}, DEFINITIONS, copy)
    (copy / "vocab.txt").unlink()
    refused(r"the base: .* has no tokenizer files", {"mrpc": bert}, copy)
    (copy / "adapter_config.json").write_text("{}")
    refused("adapter beside a model", {"mrpc": bert}, copy)
    (copy / "config.json").unlink()
    refused(r"rte: .*PEFT adapter; `fmn fetch`", {"mrpc": bert, "rte": copy})
    refused(r"rte: .*no such folder", {"mrpc": bert, "rte": tmp_path / "none"})
    refused("no experts", {})
