"""A tiny random model of every architecture, with examples it accepts."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np
import torch
import transformers
from transformers import PreTrainedModel

from fmn.tasks.batches import IGNORED, Examples

WORDS = 30
_COMMON: dict[str, Any] = {
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 20,
    "vocab_size": WORDS,
    "max_position_embeddings": 40,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    # The usual 0.02 gives logits that hardly depend on the text.
    "initializer_range": 0.3,
}
_GROUPED = {"num_key_value_heads": 2, "head_dim": 8}
_GEMMA = {**_GROUPED, "query_pre_attn_scalar": 8}
_DEBERTA = {
    **{"relative_attention": True, "pos_att_type": ["p2c", "c2p"]},
    **{"position_buckets": 8, "type_vocab_size": 0},
}
_GROUPS = {"num_hidden_layers": 4, "num_hidden_groups": 2, "inner_group_num": 1}
_T5: dict[str, Any] = {
    **{"d_model": 24, "d_kv": 8, "num_heads": 4, "d_ff": 20},
    **{"num_layers": 2, "num_decoder_layers": 1, "vocab_size": WORDS},
    **{"pad_token_id": 0, "eos_token_id": 2, "decoder_start_token_id": 0},
    "initializer_factor": 1.5,
}


def _config(kind: Any, **more: Any) -> Callable[..., Any]:
    return partial(kind, **{**_COMMON, **more})


CONFIGS: Mapping[str, Callable[..., Any]] = {
    "bert": _config(transformers.BertConfig),
    "roberta": _config(transformers.RobertaConfig),
    "xlm-roberta": _config(transformers.XLMRobertaConfig),
    "camembert": _config(transformers.CamembertConfig),
    "electra": _config(transformers.ElectraConfig, embedding_size=12),
    "distilbert": _config(transformers.DistilBertConfig, hidden_dim=20),
    "mpnet": _config(transformers.MPNetConfig),
    "albert": _config(transformers.AlbertConfig, embedding_size=12, num_hidden_layers=3),
    "albert-groups": _config(transformers.AlbertConfig, embedding_size=12, **_GROUPS),
    "deberta-v2": _config(transformers.DebertaV2Config, **_DEBERTA),
    "deberta-v3": _config(
        transformers.DebertaV2Config, **_DEBERTA, share_att_key=True, norm_rel_ebd="layer_norm"
    ),
    "deberta": _config(transformers.DebertaConfig, **_DEBERTA),
    "modernbert": _config(
        transformers.ModernBertConfig,
        **{"cls_token_id": 1, "sep_token_id": 2, "initializer_cutoff_factor": 2.0},
    ),
    "gpt2": _config(transformers.GPT2Config, n_inner=20),
    "llama": _config(transformers.LlamaConfig, **_GROUPED),
    "mistral": _config(transformers.MistralConfig, **_GROUPED, sliding_window=4),
    "qwen2": _config(transformers.Qwen2Config, num_key_value_heads=2),
    "qwen3": _config(transformers.Qwen3Config, **_GROUPED),
    "gemma2": _config(transformers.Gemma2Config, **_GEMMA),
    "gemma3": _config(transformers.Gemma3TextConfig, **_GEMMA),
    "gpt_neo": partial(
        transformers.GPTNeoConfig,
        **{**_COMMON, "attention_types": [[["global"], 2]], "num_layers": 2, "num_heads": 4},
    ),
    "gptj": partial(
        transformers.GPTJConfig,
        **{
            "n_embd": 24,
            "n_layer": 2,
            "n_head": 4,
            "n_inner": 20,
            "rotary_dim": 2,
            "vocab_size": WORDS,
        },
        **{"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "initializer_range": 0.3},
    ),
    "gpt_neox": _config(transformers.GPTNeoXConfig),
    "bloom": _config(transformers.BloomConfig, n_head=4, n_layer=2),
    "phi": _config(
        transformers.PhiConfig,
        rope_parameters={"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 2 / 3},
    ),
    "phi3": _config(transformers.Phi3Config, num_key_value_heads=2),
    "glm": _config(transformers.GlmConfig, **_GROUPED),
    "starcoder2": _config(transformers.Starcoder2Config, num_key_value_heads=2),
    "opt": _config(transformers.OPTConfig, ffn_dim=20, word_embed_proj_dim=24),
    "t5": partial(transformers.T5Config, **_T5),
    "t5-gated": partial(transformers.T5Config, **_T5, feed_forward_proj="gated-gelu"),
    "vit": _config(transformers.ViTConfig, image_size=8, patch_size=4),
}


_BART: dict[str, Any] = {
    **{"d_model": 24, "encoder_layers": 2, "decoder_layers": 1, "vocab_size": WORDS},
    **{"encoder_attention_heads": 4, "decoder_attention_heads": 2, "max_position_embeddings": 40},
    **{"encoder_ffn_dim": 20, "decoder_ffn_dim": 28, "init_std": 0.3, "pad_token_id": 0},
    **{"bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2},
    **{"forced_eos_token_id": None},
}
GENERATORS: Mapping[str, Callable[..., Any]] = {
    **{name: CONFIGS[name] for name in ("gpt2", "llama", "mistral", "qwen2", "qwen3")},
    **{name: CONFIGS[name] for name in ("t5", "t5-gated")},
    "mt5": partial(transformers.MT5Config, **_T5),
    "umt5": partial(transformers.UMT5Config, **_T5),
    "bart": partial(transformers.BartConfig, **_BART),
    "mbart": partial(transformers.MBartConfig, **_BART),
    "pegasus": partial(transformers.PegasusConfig, **_BART),
    "marian": partial(transformers.MarianConfig, **_BART, decoder_vocab_size=WORDS),
    "m2m_100": partial(transformers.M2M100Config, **_BART),
    "blenderbot": partial(transformers.BlenderbotConfig, **_BART),
}


def tiny_generator(
    name: str, seed: int = 0, dtype: torch.dtype = torch.float64, **settings: Any
) -> PreTrainedModel:
    """A model that generates text, with random biases too."""
    torch.manual_seed(seed)
    config = GENERATORS[name](**settings)
    is_pair = config.is_encoder_decoder
    kind = transformers.AutoModelForSeq2SeqLM if is_pair else transformers.AutoModelForCausalLM
    model = kind.from_config(config)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if tensor.ndim == 1 or name == "final_logits_bias":
                tensor.add_(0.1 * torch.randn_like(tensor))
    return model.to(dtype).eval()


def tiny_texts(name: str, count: int, seed: int = 0) -> Examples:
    """Random prompts and completions as such a model reads them."""
    rng = np.random.default_rng(seed)
    is_pair = GENERATORS[name]().is_encoder_decoder
    prompts, texts = (
        [rng.integers(3, WORDS, length).tolist() for length in rng.integers(1, 9, count)]
        for _ in range(2)
    )
    labels = np.full((count, 16), IGNORED)
    for row, prompt, text in zip(labels, prompts, texts, strict=True):
        answers = [*text, 2]
        start = 0 if is_pair else len(prompt) - 1
        row[start : start + len(answers)] = answers
    if is_pair:
        inputs = {"input_ids": prompts, "decoder_input_ids": [[0, *text] for text in texts]}
    else:
        inputs = {"input_ids": [[*p, *text, 2] for p, text in zip(prompts, texts, strict=True)]}
    return Examples(inputs, labels, dict.fromkeys(inputs, 0))


def tiny_model(
    name: str, num_labels: int = 3, seed: int = 0, dtype: torch.dtype = torch.float64
) -> PreTrainedModel:
    """A model with a classification head. Biases are random too: zeros would hide their paths."""
    torch.manual_seed(seed)
    kind = (
        transformers.AutoModelForImageClassification
        if name == "vit"
        else transformers.AutoModelForSequenceClassification
    )
    model = kind.from_config(CONFIGS[name](num_labels=num_labels))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model.to(dtype).eval()


def tiny_examples(
    name: str, count: int, num_labels: int = 3, seed: int = 0, longest: int = 12
) -> Examples:
    """Random examples, every text of 3 to `longest` tokens; `num_labels` 1 is regression."""
    rng = np.random.default_rng(seed)
    labels = (
        rng.normal(size=count).astype(np.float32)
        if num_labels == 1
        else rng.integers(0, num_labels, count)
    )
    if name == "vit":
        return Examples({"pixel_values": list(rng.normal(size=(count, 3, 8, 8)))}, labels, {})
    texts = [
        [1, *rng.integers(3, WORDS, length - 2).tolist(), 2]
        for length in rng.integers(3, longest + 1, count)
    ]
    return Examples({"input_ids": texts}, labels, {"input_ids": 0})
