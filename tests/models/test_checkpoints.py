"""What a local checkpoint is: configurations, names, experts that fit one another, loading."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BertConfig

from fmn.errors import UserError
from fmn.models import checkpoints
from fmn.tasks.task import TASKS
from tests.folders import SIZES, WORDS, save, tiny_bert, weights
from tests.tiny import CONFIGS, tiny_model

# Configurations


@pytest.mark.parametrize("content", [b"", b"[]", b"[" * 10**5, b"\xff"])
def test_a_config_that_is_no_json_object_is_refused(content: bytes, copy: Path) -> None:
    (copy / "config.json").write_bytes(content)
    with pytest.raises(UserError, match=r"config\.json: not"):
        checkpoints.load_config(copy)


@pytest.mark.parametrize("architecture", [name for name in CONFIGS if name != "vit"])
@pytest.mark.parametrize("prefixed", [True, False])
def test_stored_names_split_into_encoder_and_head(architecture: str, prefixed: bool) -> None:
    model = tiny_model(architecture)
    prefix = f"{model.base_model_prefix}."
    tied = set(model.all_tied_weights_keys)
    state = {name for name in model.state_dict() if name not in tied}
    encoder = {name.removeprefix(prefix) for name in state if name.startswith(prefix)}
    stored = state if prefixed else {name.removeprefix(prefix) for name in state}
    noise = {"cls.predictions.bias", "lm_head.weight", "embeddings.position_ids"}
    names = checkpoints.encoder_names(model.config, stored | noise)
    assert set(names.encoder) == encoder
    assert encoder <= set(getattr(model, model.base_model_prefix).state_dict())
    start = prefix if prefixed else ""
    assert all(stored == start + name for name, stored in names.encoder.items())
    assert set(names.head) == {name for name in state if not name.startswith(prefix)}
    assert all(name == stored for name, stored in names.head.items())


def test_a_tensor_with_and_without_the_prefix_is_refused() -> None:
    config = BertConfig(**SIZES)
    with pytest.raises(UserError, match="are the same tensor"):
        checkpoints.encoder_names(config, ["bert.pooler.dense.bias", "pooler.dense.bias"])


# Experts


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
    checkpoints.check_experts({"mrpc": bert, "stsb": stsb, "mnli": mnli}, TASKS, base)
    checkpoints.check_experts({"sst2": bert}, TASKS)


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
        checkpoints.check_experts({"mrpc": bert, "rte": other}, TASKS)
    assert str(caught.value).startswith(f"rte: {other}")
    assert "\n" not in str(caught.value)


def test_vocabularies_may_differ_by_tokens_and_by_padding(bert: Path, tmp_path: Path) -> None:
    wider = tiny_bert(tmp_path / "wider", seed=1, words=(*WORDS, "more"), vocab_size=12)
    padded = tiny_bert(tmp_path / "padded", seed=2, outputs=1, vocab_size=16)
    (note,) = checkpoints.check_experts({"mrpc": bert, "rte": wider, "stsb": padded}, TASKS, bert)
    lacks = "the base lacks more; mrpc lacks more; stsb lacks more"
    assert note.startswith(f"vocabularies differ: {lacks}; embeddings")
    assert checkpoints.check_experts({"mrpc": bert, "stsb": padded}, TASKS) == []
    other = tiny_bert(tmp_path / "other", vocab_size=12, words=(*WORDS, "less"))
    with pytest.raises(UserError, match=r"cola: .*'less' has id 10, that of 'more' \(rte\)"):
        checkpoints.check_experts({"rte": wider, "cola": other}, TASKS)
    apart = tiny_bert(tmp_path / "apart", vocab_size=12, words=(*WORDS, "[unused]", "less"))
    (apart / "vocab.txt").write_text("\n".join([*WORDS, "more", "less"]) + "\n")
    assert len(checkpoints.check_experts({"rte": wider, "cola": apart}, TASKS)) == 1


def test_experts_without_parts_are_named(bert: Path, copy: Path, tmp_path: Path) -> None:
    def refused(problem: str, experts: dict[str, Path], base: Path | None = None) -> None:
        with pytest.raises(UserError, match=problem):
            checkpoints.check_experts(experts, TASKS, base)

    state = weights(copy)
    encoder = {name: value for name, value in state.items() if not name.startswith("classifier")}
    save(copy, encoder)
    refused(r"rte: .*no classification head", {"mrpc": bert, "rte": copy})
    checkpoints.check_experts({"mrpc": bert}, TASKS, copy)
    (copy / "vocab.txt").unlink()
    refused(r"the base: .* has no tokenizer files", {"mrpc": bert}, copy)
    (copy / "adapter_config.json").write_text("{}")
    refused("adapter beside a model", {"mrpc": bert}, copy)
    (copy / "config.json").unlink()
    refused(r"rte: .*PEFT adapter; `fmn fetch`", {"mrpc": bert, "rte": copy})
    refused(r"rte: .*no such folder", {"mrpc": bert, "rte": tmp_path / "none"})
    refused("no experts", {})


# Loading


def test_a_classifier_is_loaded_whole_quietly_and_in_float32(
    copy: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    state = weights(copy)
    save(copy, {name: value.half() for name, value in state.items()})
    model = checkpoints.load_model(copy)
    tokenizer = checkpoints.load_tokenizer(copy)
    assert capfd.readouterr() == ("", "")
    assert not model.training
    assert {value.dtype for value in model.parameters()} == {torch.float32}
    assert tokenizer("a fine film")["input_ids"] == [2, 5, 6, 7, 3]
    del state["bert.encoder.layer.1.output.dense.bias"]
    save(copy, state)
    with pytest.raises(UserError, match=r"encoder\.layer\.1\.output\.dense\.bias is missing"):
        checkpoints.load_model(copy)
    (copy / "tokenizer_config.json").write_text("{")
    with pytest.raises(UserError, match="its tokenizer files cannot be used"):
        checkpoints.load_tokenizer(copy)


def test_a_model_without_padding_token_pads_with_its_end_of_text(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary, special = {"<end>": 0, "<unk>": 1, "fine": 2, "film": 3}, {"unk_token": "<unk>"}
    words = Tokenizer(models.WordLevel(vocabulary, **special))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<end>", **special)
    tokenizer.save_pretrained(tmp_path)
    model = tiny_model("gpt2")
    model.config.pad_token_id, model.config.eos_token_id = None, 0
    model.config.save_pretrained(tmp_path)
    save(tmp_path, model.float().state_dict())

    tokenizer, model = checkpoints.load_tokenizer(tmp_path), checkpoints.load_model(tmp_path)
    assert tokenizer.pad_token_id == model.config.pad_token_id == 0
    batch = tokenizer(["fine film", "film"], padding=True, return_tensors="pt")
    single = tokenizer("film", return_tensors="pt")
    with torch.no_grad():
        assert torch.allclose(model(**batch).logits[1], model(**single).logits[0], atol=1e-5)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config.get("pad_token_id") is None, "it is set at load time alone"


def test_an_expert_of_narrow_tensors_is_loaded_as_it_is_stored(tmp_path: Path) -> None:
    for number, dtype in enumerate((torch.float16, torch.bfloat16, torch.float32, torch.float64)):
        folder = tmp_path / str(number)
        tiny_model("llama", dtype=dtype).save_pretrained(folder)
        own = checkpoints.stored_dtype(folder)
        assert own == (dtype if dtype.itemsize == 2 else torch.float32)
        assert {p.dtype for p in checkpoints.load_model(folder, dtype=own).parameters()} == {own}
        assert checkpoints.load_model(folder).dtype == torch.float32
