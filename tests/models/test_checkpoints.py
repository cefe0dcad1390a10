"""What a local checkpoint is: configurations, names, experts that fit one another, loading."""

from pathlib import Path

import pytest
from transformers import BertConfig

from fmn.errors import UserError
from fmn.models import checkpoints
from tests.folders import SIZES
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


# Loading
