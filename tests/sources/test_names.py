"""Tensors get the names and shapes that their model has, or the checkpoint is refused."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForSequenceClassification

from fmn.errors import UserError
from fmn.models import checkpoints, loading
from fmn.models.provenance import CheckpointInfo
from fmn.sources import names, stages
from tests.folders import WORDS, edit_config, pickled, save, shards, weights
from tests.models.experts import answers, expert
from tests.tiny import CONFIGS, tiny_model

State = dict[str, torch.Tensor]


def fetch(source: Path, out: Path) -> CheckpointInfo:
    return stages.fetch(str(source), out=out).summary


def rename(folder: Path, new_name: Callable[[str], str]) -> State:
    """Give the tensors of a folder other names; returns them by their old ones."""
    state = weights(folder)
    save(folder, {new_name(name): value for name, value in state.items()})
    return state


def assert_same(first: State, second: State) -> None:
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def remove_entries(folder: Path, *entries: str) -> None:
    config = json.loads((folder / "config.json").read_text())
    content = {name: value for name, value in config.items() if name not in entries}
    (folder / "config.json").write_text(json.dumps(content))


# Prefixes


@pytest.mark.parametrize("architecture", ["bert", "gpt2", "llama", "albert", "t5", "modernbert"])
@pytest.mark.parametrize(
    "prefix", ["module.", "_orig_mod.", "model.", "net.backbone.", "0.auto_model.", "bert.", "h.0."]
)
def test_a_wrappers_prefix_is_taken_off_and_noted(
    prefix: str, architecture: str, tmp_path: Path
) -> None:
    source = expert(tmp_path / "source", 3, architecture=architecture)
    expected = answers(source)
    state = rename(source, lambda name: prefix + name)
    (note,) = fetch(source, tmp_path / "out").notes
    assert f": {prefix.removesuffix('.')}" in note
    assert_same(weights(tmp_path / "out"), state)
    assert (answers(tmp_path / "out") == expected).all()


@pytest.mark.parametrize("part", ["_fsdp_wrapped_module", "_checkpoint_wrapped_module"])
def test_a_wrappers_part_within_names_is_taken_off(part: str, copy: Path, tmp_path: Path) -> None:
    state = rename(copy, lambda name: name.replace(".output.", f".{part}.output.{part}."))
    shards(copy, {f"module.{part}.{name}": value for name, value in weights(copy).items()})
    (note,) = fetch(copy, tmp_path / "out").notes
    assert part in note
    assert "module" in note
    loaded: State = {}
    for file in (tmp_path / "out").glob("*.safetensors"):
        loaded |= safetensors.torch.load_file(file)
    assert_same(loaded, state)
    loading.load_model(tmp_path / "out")


@given(
    st.lists(st.sampled_from(["module", "model", "net", "bert", "encoder", "layer"]), max_size=3)
)
def test_any_prefix_leaves_the_same_names(parts: list[str]) -> None:
    config = CONFIGS["bert"](num_labels=3)
    model = names.layout(config, transformers.BertForSequenceClassification)
    prefix = "".join(f"{part}." for part in parts)
    renamed = names.runtime_names([prefix + name for name in model.shapes], model, [])
    assert list(renamed.values()) == list(model.shapes)


@pytest.mark.parametrize("architecture", sorted(CONFIGS))
def test_todays_names_stay(architecture: str, tmp_path: Path) -> None:
    model = tiny_model(architecture, dtype=torch.float32)
    layout = names.layout(model.config, type(model))
    notes: list[str] = []
    for stored in (list(model.state_dict()), list(model.base_model.state_dict())):
        assert list(names.runtime_names(stored, layout, notes).values()) == stored
    model.save_pretrained(tmp_path)  # under the names of older versions, for some
    stored = list(weights(tmp_path))
    runtime = set(names.runtime_names(stored, layout, notes).values())
    assert runtime == set(model.state_dict()) - set(layout.ties)
    assert notes == []


def test_two_models_in_one_checkpoint_are_refused(copy: Path, tmp_path: Path) -> None:
    state = weights(copy)
    save(copy, {f"{who}.{name}": state[name] for name in state for who in ("student", "teacher")})
    with pytest.raises(UserError, match=r"student\..* and teacher\..* would both be bert"):
        fetch(copy, tmp_path / "out")
    save(copy, state | {f"ema.{name}": value for name, value in state.items()})
    with pytest.raises(UserError, match=r"bert\..* and ema\..* would both be bert"):
        fetch(copy, tmp_path / "out")


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("bert.encoder.layer.0.attention.self.query.lora_A.default.weight", "not merged"),
        ("bert.encoder.layer.0.attention.self.query.base_layer.weight", "not merged"),
        ("base_model.model.classifier.modules_to_save.default.weight", "not merged"),
        ("bert.encoder.layer.0.output.dense.SCB", "quantized weights"),
        ("bert.encoder.layer.0.output.dense.weight.absmax", "quantized weights"),
    ],
)
def test_unfinished_checkpoints_are_refused(
    name: str, problem: str, copy: Path, tmp_path: Path
) -> None:
    save(copy, weights(copy) | {name: torch.ones(2)})
    with pytest.raises(UserError, match=f"copy: tensor {name} .*{problem}"):
        fetch(copy, tmp_path / "out")


def test_placeholders_of_deepspeed_are_refused(copy: Path, tmp_path: Path) -> None:
    name = "bert.encoder.layer.0.output.dense.weight"
    save(copy, weights(copy) | {name: torch.ones(0)})
    with pytest.raises(UserError, match=rf"{name} is empty, as DeepSpeed ZeRO-3 leaves it"):
        fetch(copy, tmp_path / "out")


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda value: value * torch.nan, r"48 of 48 values of tensor NAME are NaN or infinite"),
        (lambda value: value.half() + 2.0**17, r"48 of 48 values of tensor NAME are NaN or"),
        (lambda value: value.to(torch.int8), r"tensor NAME has dtype I8, no floating-point one"),
    ],
)
def test_weights_that_are_no_numbers_are_refused(
    change: Callable[[torch.Tensor], torch.Tensor], problem: str, copy: Path, tmp_path: Path
) -> None:
    state, name = weights(copy), "classifier.weight"
    save(copy, state | {name: change(state[name])})
    count = state[name].numel()
    with pytest.raises(UserError, match=problem.replace("NAME", name).replace("48", f"{count}")):
        fetch(copy, tmp_path / "out")
    save(copy, state | {"another.weight": state[name] * torch.nan})  # which is not used
    fetch(copy, tmp_path / "out")


def test_matrices_that_are_stored_as_one_are_those_of_the_model(tmp_path: Path) -> None:
    """Files of nomic_bert have query, key and value in one matrix."""
    config = transformers.NomicBertConfig(
        hidden_size=24, num_hidden_layers=2, num_attention_heads=4, head_dim=6, vocab_size=30,
        intermediate_size=20, pad_token_id=0, num_labels=3,
    )  # fmt: skip
    model = AutoModelForSequenceClassification.from_config(config).eval()
    model.save_pretrained(tmp_path / "source", max_shard_size="5KB")
    (note,) = fetch(tmp_path / "source", tmp_path / "out").notes
    assert "attn.Wqkv.weight and its like are stored as the model has them" in note
    assert_same(weights(tmp_path / "out"), dict(model.state_dict()))
    copy = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out").eval()
    tokens = torch.tensor([[1, 5, 6, 2]])
    torch.testing.assert_close(copy(tokens).logits, model(tokens).logits)


# Tied weights


@pytest.fixture
def causal(tmp_path: Path) -> Path:
    """A GPT-2 whose output embeddings are tied to its input embeddings."""
    folder = expert(tmp_path / "causal", 2, architecture="gpt2")
    (folder / "model.safetensors").unlink()
    torch.manual_seed(0)
    transformers.GPT2LMHeadModel(CONFIGS["gpt2"]()).save_pretrained(folder)
    return folder


TIED, STORED = "lm_head.weight", "transformer.wte.weight"


@pytest.mark.parametrize("form", ["as ever", "the other name", "both", "pickled"])
def test_tied_weights_are_stored_once_under_their_own_name(
    form: str, causal: Path, tmp_path: Path
) -> None:
    state = weights(causal)
    stored = {name: value for name, value in state.items() if name != STORED}
    if form == "the other name":
        save(causal, {**stored, TIED: state[STORED]})
    elif form == "both":
        save(causal, {**state, TIED: state[STORED]})
    elif form == "pickled":
        pickled(causal, {**state, TIED: state[STORED]})
    notes = fetch(causal, tmp_path / "out").notes
    assert [STORED in note for note in notes] == ([] if form == "as ever" else [True])
    assert_same(weights(tmp_path / "out"), state)
    loaded = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "out")
    assert loaded.lm_head.weight is loaded.transformer.wte.weight


def test_weights_that_are_tied_in_name_alone_stay_apart(causal: Path, tmp_path: Path) -> None:
    state = weights(causal)
    save(causal, {**state, TIED: state[STORED] + 1})
    (note,) = fetch(causal, tmp_path / "out").notes
    assert "differ though config.json says that they are tied" in note
    assert checkpoints.load_config(tmp_path / "out").tie_word_embeddings is False
    loaded = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "out").state_dict()
    assert torch.equal(loaded[TIED], state[STORED] + 1)
    assert torch.equal(loaded[STORED], state[STORED])


@pytest.mark.parametrize("only", ["encoder.embed_tokens.weight", "decoder.embed_tokens.weight"])
def test_shared_embeddings_of_t5_may_have_any_name(only: str, tmp_path: Path) -> None:
    source = expert(tmp_path / "source", 3, architecture="t5")
    expected, state = answers(source), weights(source)
    (shared,) = (name for name in state if "shared" in name)
    stored = {name: value for name, value in state.items() if name != shared}
    save(source, {**stored, f"transformer.{only}": state[shared]})
    (note,) = fetch(source, tmp_path / "out").notes
    assert "to which it is tied" in note
    assert_same(weights(tmp_path / "out"), state)
    assert (answers(tmp_path / "out") == expected).all()
    save(source, {**state, f"transformer.{only}": state[shared] + 1})
    with pytest.raises(UserError, match="are tied, but differ"):
        fetch(source, tmp_path / "no")


# Vocabularies


EMBEDDINGS = "bert.embeddings.word_embeddings.weight"


def test_rows_of_padding_are_cut(copy: Path, tmp_path: Path) -> None:
    state = weights(copy)
    save(copy, state | {EMBEDDINGS: torch.cat([state[EMBEDDINGS], torch.ones(6, 8)])})
    (note,) = fetch(copy, tmp_path / "out").notes
    assert note == f"{EMBEDDINGS}: 6 rows of padding beyond the 10 tokens are cut"
    assert_same(weights(tmp_path / "out"), state)


def test_rows_of_tokens_are_counted(copy: Path, tmp_path: Path) -> None:
    state = weights(copy)
    state[EMBEDDINGS] = torch.cat([state[EMBEDDINGS], torch.ones(2, 8)])
    save(copy, state)
    (copy / "vocab.txt").write_text("\n".join([*WORDS, "new", "newer"]) + "\n")
    (note,) = fetch(copy, tmp_path / "out").notes
    assert "vocab_size 10, the embeddings have 12 rows" in note
    assert checkpoints.load_config(tmp_path / "out").vocab_size == 12
    assert_same(weights(tmp_path / "out"), state)


def test_output_embeddings_are_cut_with_the_input(causal: Path, tmp_path: Path) -> None:
    edit_config(causal, tie_word_embeddings=False)
    state = weights(causal)
    padding = torch.ones(2, 24)
    padded = {STORED: torch.cat([state[STORED], padding])}
    padded[TIED] = torch.cat([state[STORED] + 1, padding])
    save(causal, state | padded)
    fetch(causal, tmp_path / "out")
    assert_same(weights(tmp_path / "out"), {**state, TIED: state[STORED] + 1})


# What config.json lacks


@pytest.mark.parametrize(
    ("architecture", "entry"),
    [("bert", "BertForSequenceClassification"), ("roberta", "RobertaForSequenceClassification")],
)
def test_a_missing_class_is_read_from_the_tensors(
    architecture: str, entry: str, tmp_path: Path
) -> None:
    source = expert(tmp_path / "source", 5, architecture=architecture)
    expected = answers(source)
    remove_entries(source, "architectures", "id2label", "label2id", "num_labels")
    first, second = fetch(source, tmp_path / "out").notes
    assert entry in first
    assert "its head has 5" in second
    config = checkpoints.load_config(tmp_path / "out")
    assert (config.architectures, config.num_labels) == ([entry], 5)
    assert (answers(tmp_path / "out") == expected).all()


def test_a_class_that_is_not_clear_stays_missing(tmp_path: Path) -> None:
    source = expert(tmp_path / "source", 3)
    state = rename(source, lambda name: name.replace("classifier", "my_head"))
    remove_entries(source, "architectures")
    assert fetch(source, tmp_path / "out").notes == []
    assert not checkpoints.load_config(tmp_path / "out").architectures
    assert len(weights(tmp_path / "out")) == len(state)


def test_a_file_that_changes_is_replaced_and_not_what_it_is_linked_to(
    copy: Path, tmp_path: Path
) -> None:
    rename(copy, lambda name: f"module.{name}")
    before = (copy / "model.safetensors").read_bytes()
    linked = Path(shutil.copytree(copy, tmp_path / "linked", copy_function=lambda a, b: None))
    for path in copy.iterdir():
        (linked / path.name).symlink_to(path)
    fetch(linked, tmp_path / "out")
    assert (copy / "model.safetensors").read_bytes() == before
    model: Any = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    assert torch.equal(model.state_dict()[EMBEDDINGS], weights(copy)[f"module.{EMBEDDINGS}"])
