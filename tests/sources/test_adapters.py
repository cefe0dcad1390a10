"""A LoRA adapter becomes what PEFT makes of its base, or one clear line."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import safetensors.torch
import torch
import transformers
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from fmn.errors import UserError
from fmn.models import checkpoints
from fmn.models.provenance import CheckpointInfo
from fmn.sources import adapters, stages
from tests.folders import edit_config
from tests.hub_server import Hub
from tests.models.experts import TEXTS, expert
from tests.tiny import tiny_model

BERT = ["query", "value"]
FORMS: dict[str, tuple[str, dict[str, Any]]] = {
    "lora": ("bert", {"target_modules": BERT}),
    "all linear maps": ("bert", {"target_modules": "all-linear"}),
    "regular expression": ("bert", {"target_modules": r".*layer\.1\..*dense"}),
    "rslora": ("bert", {"target_modules": BERT, "use_rslora": True, "lora_alpha": 5}),
    "patterns": (
        "bert",
        {
            **{"target_modules": BERT, "rank_pattern": {"layer.0.attention.self.query": 2}},
            "alpha_pattern": {"value": 3},
        },
    ),
    "dora": ("bert", {"target_modules": BERT, "use_dora": True}),
    "pissa": ("bert", {"target_modules": BERT, "init_lora_weights": "pissa"}),
    "biases": ("bert", {"target_modules": BERT, "bias": "all"}),
    "biases of the adapted": ("bert", {"target_modules": BERT, "bias": "lora_only"}),
    "bias of B": ("bert", {"target_modules": BERT, "lora_bias": True}),
    "embeddings": ("bert", {"target_modules": [*BERT, "word_embeddings"]}),
    "some layers": ("bert", {"target_modules": BERT, "layers_to_transform": [1]}),
    "token rows": ("bert", {"target_modules": BERT, "trainable_token_indices": [3, 5]}),
    "a module to save": ("bert", {"target_modules": BERT, "modules_to_save": ["pooler"]}),
    "fan in, fan out": ("gpt2", {"target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True}),
    "roberta": ("roberta", {"target_modules": BERT}),
    "distilbert": ("distilbert", {"target_modules": ["q_lin", "lin2"]}),
    "llama": ("llama", {"target_modules": ["q_proj", "down_proj"]}),
    "t5": ("t5", {"target_modules": ["q", "wo"]}),
}


@pytest.fixture(scope="module")
def base_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a base model without a head, with a tokenizer, by architecture."""
    folders: dict[str, Path] = {}

    def make(architecture: str) -> Path:
        if architecture not in folders:
            folder = tmp_path_factory.mktemp("bases") / architecture
            expert(folder, 2, architecture=architecture)
            (folder / "model.safetensors").unlink()
            tiny_model(architecture, dtype=torch.float32).base_model.save_pretrained(folder)
            folders[architecture] = folder
        return folders[architecture]

    return make


def adapter(folder: Path, base: Path, outputs: int = 3, **lora: Any) -> Path:
    """A random adapter of a classifier on a base."""
    torch.manual_seed(1)
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=outputs)
    options: dict[str, Any] = {"r": 4, "lora_alpha": 8, "task_type": "SEQ_CLS", **lora}
    adapted = peft.get_peft_model(model, peft.LoraConfig(**options))
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(0.2 * torch.randn_like(parameter))
    adapted.save_pretrained(folder)
    return folder


def edit_adapter(folder: Path, **values: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return safetensors.torch.load_file(folder / "adapter_model.safetensors")


def write_tensors(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    safetensors.torch.save_file(tensors, folder / "adapter_model.safetensors")


def logits(model: Any, tokens: Path) -> torch.Tensor:
    tokenizer = AutoTokenizer.from_pretrained(tokens)
    inputs = tokenizer(TEXTS[:20], padding=True, return_tensors="pt")
    inputs.pop("token_type_ids", None)
    model.config.pad_token_id = tokenizer.pad_token_id
    with torch.inference_mode():
        answer: torch.Tensor = model.eval()(**inputs).logits
    return answer


def by_peft(folder: Path, base: Path, outputs: int = 3) -> Any:
    """The model that PEFT itself merges."""
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=outputs)
    return peft.PeftModel.from_pretrained(model, str(folder)).merge_and_unload()


def fetch(source: str | Path, out: Path, base: Path | None = None) -> CheckpointInfo:
    return stages.fetch(str(source), out=out, base=base).summary


def assert_refused(source: Path, out: Path, base: Path | None, problem: str) -> None:
    with pytest.raises(UserError, match=problem) as caught:
        fetch(source, out, base)
    assert "\n" not in str(caught.value)
    assert ".source." not in str(caught.value)
    assert not out.exists()


@pytest.mark.filterwarnings("ignore")  # of PEFT, as tests build adapters with it
@pytest.mark.parametrize("form", FORMS)
def test_an_adapter_becomes_what_peft_merges(
    form: str, base_of: Callable[[str], Path], tmp_path: Path
) -> None:
    architecture, lora = FORMS[form]
    base = base_of(architecture)
    source = adapter(tmp_path / "adapter", base, **lora)
    info = fetch(source, tmp_path / "out", base)
    assert info.notes == []
    merged = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    oracle = by_peft(source, base)
    state = merged.state_dict()
    for name, value in oracle.state_dict().items():
        torch.testing.assert_close(state[name], value, rtol=1e-5, atol=1e-6, msg=name)
    torch.testing.assert_close(
        logits(merged, tmp_path / "out"), logits(oracle, base), rtol=1e-4, atol=1e-5
    )
    config = checkpoints.load_config(tmp_path / "out")
    assert config.architectures == [type(oracle).__name__]
    assert config.num_labels == 3
    checkpoints.check_tensors(tmp_path / "out", config, head=True)
