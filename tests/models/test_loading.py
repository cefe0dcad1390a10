"""Checkpoints in memory: whole, quiet, in their dtype, with a token to pad with."""

import json
from pathlib import Path

import pytest
import torch

from fmn.errors import UserError
from fmn.models import loading
from tests.folders import save, weights
from tests.tiny import tiny_model


def test_a_classifier_is_loaded_whole_quietly_and_in_float32(
    copy: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    state = weights(copy)
    save(copy, {name: value.half() for name, value in state.items()})
    model = loading.load_model(copy)
    tokenizer = loading.load_tokenizer(copy)
    assert capfd.readouterr() == ("", "")
    assert not model.training
    assert {value.dtype for value in model.parameters()} == {torch.float32}
    assert tokenizer("a fine film")["input_ids"] == [2, 5, 6, 7, 3]
    del state["bert.encoder.layer.1.output.dense.bias"]
    save(copy, state)
    with pytest.raises(UserError, match=r"encoder\.layer\.1\.output\.dense\.bias is missing"):
        loading.load_model(copy)
    (copy / "tokenizer_config.json").write_text("{")
    with pytest.raises(UserError, match="its tokenizer files cannot be used"):
        loading.load_tokenizer(copy)


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

    tokenizer, model = loading.load_tokenizer(tmp_path), loading.load_model(tmp_path)
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
        own = loading.stored_dtype(folder)
        assert own == (dtype if dtype.itemsize == 2 else torch.float32)
        assert {p.dtype for p in loading.load_model(folder, dtype=own).parameters()} == {own}
        assert loading.load_model(folder).dtype == torch.float32
