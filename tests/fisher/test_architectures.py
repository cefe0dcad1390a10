"""Where mask nodes sit and what they own."""

import re
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import nn
from transformers import AutoModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.pytorch_utils import Conv1D

from fmn.errors import UserError
from fmn.fisher.architectures import (
    ARCHITECTURES,
    Claim,
    NodeValues,
    Site,
    claims,
    mask_sites,
    node_counts,
    own_parts,
    tempered,
    weights,
)
from tests.conftest import ROOT
from tests.tiny import CONFIGS, GENERATORS, tiny_examples, tiny_model

Shapes = dict[str, tuple[int, ...]]


def shapes_of(model: nn.Module) -> Shapes:
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def random_values(model: transformers.PreTrainedModel) -> NodeValues:
    rng = np.random.default_rng(0)
    return {site.site: rng.uniform(0.5, 2, site.nodes) for site in mask_sites(model)}


def spread(
    model: transformers.PreTrainedModel, mapping: str, values: NodeValues
) -> dict[str, np.ndarray]:
    """The weights of every parameter, broadcast to its shape."""
    shapes = shapes_of(model.base_model)
    return {
        name: np.broadcast_to(weights(claim, values), shapes[name])
        for name, claim in claims(model.config, shapes, mapping).items()
    }


def test_every_architecture_has_a_tiny_model() -> None:
    assert {config().model_type for config in [*CONFIGS.values(), *GENERATORS.values()]} == set(
        ARCHITECTURES
    )


@pytest.mark.parametrize("mapping", ["structured", "paper"])
@pytest.mark.parametrize("name", CONFIGS)
def test_every_parameter_is_claimed_once_with_weights_of_its_shape(name: str, mapping: str) -> None:
    model = tiny_model(name)
    shapes = shapes_of(model.base_model)
    by_name = claims(model.config, shapes, mapping)
    assert by_name.keys() == shapes.keys()
    values = random_values(model)
    for parameter, claim in by_name.items():
        weight = weights(claim, values)
        assert weight.dtype == np.float64
        assert np.broadcast_shapes(weight.shape, shapes[parameter]) == shapes[parameter]
    # All that is in a layer belongs to its nodes, but for T5's position biases, which all share.
    universal = [parameter for parameter, claim in by_name.items() if claim == Claim()]
    inside = [name for name in universal if any(map(str.isdigit, name.split(".")))]
    assert all("relative_attention_bias" in parameter for parameter in inside)


@pytest.mark.parametrize("name", CONFIGS)
def test_sites_are_the_inputs_of_projections(name: str) -> None:
    model = tiny_model(name)
    sites = mask_sites(model)
    for site in sites:
        module = model.get_submodule(site.module)
        weight = module.weight
        assert isinstance(weight, torch.Tensor)
        assert weight.shape[0 if isinstance(module, Conv1D) else 1] == site.nodes * site.channels
        assert site.channels == 1 if site.site.node == "neuron" else site.nodes == 4
    counts = {site.site: site.nodes for site in sites}
    assert len(counts) == len(sites)
    assert counts == node_counts(model.config, shapes_of(model.base_model))
    prefix = f"{model.base_model_prefix}."
    own = [site.module for site in mask_sites(model.base_model)]
    assert own == [site.module.removeprefix(prefix) for site in sites]


def check_weights(
    model: transformers.PreTrainedModel, mapping: str, expected: dict[str, Any]
) -> None:
    """Compare the weights of parameters with those expected, which broadcast to their shapes."""
    by_name = spread(model, mapping, random_values(model))
    for name, weight in expected.items():
        wanted = np.broadcast_to(weight, by_name[name].shape)
        np.testing.assert_allclose(by_name[name], wanted, rtol=1e-14, err_msg=name)


def test_structured_bert() -> None:
    model = tiny_model("bert")
    values = random_values(model)
    neuron, head = values[Site(1, "neuron")], values[Site(1, "head")]
    by_head = np.repeat(head, 6)
    in_layer: dict[str, Any] = {
        "attention.output.dense.weight": by_head,
        "intermediate.dense.weight": neuron[:, None],
        "intermediate.dense.bias": neuron,
        "output.dense.weight": neuron,
    }
    for name in ("query", "key", "value"):
        in_layer[f"attention.self.{name}.weight"] = by_head[:, None]
        in_layer[f"attention.self.{name}.bias"] = by_head
    for name in ("dense.bias", "LayerNorm.weight", "LayerNorm.bias"):
        in_layer[f"attention.output.{name}"] = head.mean()
        in_layer[f"output.{name}"] = neuron.mean()
    check_weights(model, "structured", {f"encoder.layer.1.{n}": w for n, w in in_layer.items()})
    means = [values[Site(i, "head")].mean() + values[Site(i, "neuron")].mean() for i in range(2)]
    others = ("embeddings.word_embeddings.weight", "embeddings.LayerNorm.bias", "pooler.dense.bias")
    check_weights(model, "structured", dict.fromkeys(others, np.mean(means)))


def test_paper_bert_differs_from_structured_in_three_modules_a_layer() -> None:
    model = tiny_model("bert")
    modules = {
        "attention.self.value.weight": "head",
        "attention.self.value.bias": "head",
        "attention.output.dense.weight": "head",
        "output.dense.weight": "neuron",
    }
    values = random_values(model)
    means = {
        f"encoder.layer.{i}.{name}": values[Site(i, node)].mean()
        for i in range(2)
        for name, node in modules.items()
    }
    check_weights(model, "paper", spread(model, "structured", values) | means)


def test_key_and_value_rows_of_grouped_heads_weigh_the_mean_of_their_group() -> None:
    model = tiny_model("llama")
    values = random_values(model)
    head, neuron = values[Site(0, "head")], values[Site(0, "neuron")]
    groups = np.repeat([head[:2].mean(), head[2:].mean()], 8)[:, None]
    expected = {
        "self_attn.q_proj": np.repeat(head, 8)[:, None],
        "self_attn.k_proj": groups,
        "self_attn.v_proj": groups,
        "self_attn.o_proj": np.repeat(head, 8),
        "mlp.gate_proj": neuron[:, None],
        "mlp.up_proj": neuron[:, None],
    }
    check_weights(model, "structured", {f"layers.0.{n}.weight": w for n, w in expected.items()})


def test_fused_projections_are_claimed_part_by_part() -> None:
    model = tiny_model("modernbert")
    values = random_values(model)
    head, neuron = values[Site(0, "head")], values[Site(0, "neuron")]
    rows, mean = np.repeat(head, 6), np.full(24, head.mean())
    gated = np.tile(neuron, 2)[:, None]
    for mapping, value in (("structured", rows), ("paper", mean)):
        fused = np.concatenate([rows, rows, value])[:, None]
        expected = {"layers.0.attn.Wqkv.weight": fused, "layers.0.mlp.Wi.weight": gated}
        check_weights(model, mapping, expected)


def test_transposed_weights_are_claimed_on_the_other_axis() -> None:
    model = tiny_model("gpt2")
    values = random_values(model)
    head, neuron = np.repeat(values[Site(1, "head")], 6), values[Site(1, "neuron")]
    expected = {
        "attn.c_attn.weight": np.tile(head, 3),
        "attn.c_attn.bias": np.tile(head, 3),
        "attn.c_proj.weight": head[:, None],
        "mlp.c_fc.weight": neuron,
        "mlp.c_proj.weight": neuron[:, None],
    }
    check_weights(model, "structured", {f"h.1.{name}": w for name, w in expected.items()})


def test_shared_layers_are_one_layer_and_decoder_layers_follow_the_encoders() -> None:
    albert = [site.site for site in mask_sites(tiny_model("albert"))]
    assert albert == [Site(0, "head"), Site(0, "neuron")]
    assert {site.site.layer for site in mask_sites(tiny_model("albert-groups"))} == {0, 1}
    decoder = [site for site in mask_sites(tiny_model("t5")) if site.site.layer == 2]
    assert [site.site.node for site in decoder] == ["head", "cross_head", "neuron"]
    assert all(site.module.startswith("transformer.decoder.block.0.") for site in decoder)


@pytest.mark.parametrize("name", ["bert", "llama", "gpt2", "modernbert", "t5-gated", "deberta-v2"])
def test_owned_rows_and_columns_switch_their_node_off(name: str) -> None:
    """Zero in the output projection's columns of a node silences it, as a zero mask would. So its
    rows elsewhere are its own too: changing them then changes nothing."""
    model = tiny_model(name)
    base = model.base_model
    values = {site.site: np.zeros(site.nodes) for site in mask_sites(model)}
    marked = Site(0, "head"), Site(0, "neuron")
    for site in marked:
        # Under grouped attention a key-value row serves its whole group, here the first two heads.
        values[site][: 2 if name == "llama" and site.node == "head" else 1] = 1
    inputs = {"input_ids": torch.tensor([[1, 5, 6, 7, 2]])}
    if name.startswith("t5"):
        inputs["decoder_input_ids"] = torch.tensor([[0, 4, 2]])
    prefix = f"{model.base_model_prefix}."
    sites = [site.module.removeprefix(prefix) for site in mask_sites(model) if site.site in marked]
    outputs = {f"{module}.weight" for module in sites}
    state = base.state_dict()
    owned = {
        parameter: torch.from_numpy(
            np.broadcast_to(weights(claim, values), state[parameter].shape) == 1
        )
        for parameter, claim in claims(model.config, shapes_of(base), "structured").items()
        if -1 in claim.shape
    }
    with torch.no_grad():
        for parameter in owned.keys() & outputs:
            state[parameter][owned[parameter]] = 0
        silenced = base(**inputs).last_hidden_state
        for parameter in owned.keys() - outputs:
            rows = owned[parameter]
            state[parameter][rows] += torch.randn(int(rows.sum()), dtype=torch.float64)
        torch.testing.assert_close(base(**inputs).last_hidden_state, silenced)


class Unknown(transformers.PretrainedConfig):  # type: ignore[misc]
    model_type = "unheard-of"
    hidden_size = 24
    num_attention_heads = 4
    num_key_value_heads: int | None = None


@pytest.mark.parametrize(
    "name", ["bert", "gpt2", "llama", "gemma2", "modernbert", "vit", "mpnet", "distilbert"]
)
def test_an_undescribed_architecture_is_recognised_from_its_modules(name: str) -> None:
    model = tiny_model(name)
    shapes = shapes_of(model.base_model)
    config = Unknown()
    config.num_key_value_heads = getattr(model.config, "num_key_value_heads", None)
    assert claims(config, shapes, "structured") == claims(model.config, shapes, "structured")


@pytest.mark.parametrize(
    ("kind", "norm"),
    [
        ("ernie", "encoder.layer.0.attention.output.LayerNorm"),
        ("olmo2", "layers.0.post_attention_layernorm"),
    ],
)
def test_models_built_like_the_described_ones_need_no_lines_of_their_own(
    kind: str, norm: str
) -> None:
    sizes = {"hidden_size": 24, "intermediate_size": 20, "vocab_size": 30}
    layers = {"num_hidden_layers": 2, "num_attention_heads": 4}
    config = transformers.AutoConfig.for_model(kind, **sizes, **layers, pad_token_id=0)
    model = transformers.AutoModelForSequenceClassification.from_config(config)
    assert kind not in ARCHITECTURES
    sites = [site.site for site in mask_sites(model)]
    assert sites == [Site(i, node) for i in range(2) for node in ("head", "neuron")]
    claim = claims(config, shapes_of(model.base_model), "structured")[f"{norm}.weight"]
    assert claim.parts[0].site == Site(0, "head")


def test_what_no_known_layer_fits_is_refused_with_the_lines_to_add() -> None:
    gpt2, llama = (shapes_of(tiny_model(name).base_model) for name in ("gpt2", "llama"))
    turned = {name: shape[::-1] if name[:2] == "h." else shape for name, shape in gpt2.items()}
    for shapes in (
        {"tower.0.alpha.weight": (8, 8), "tower.0.beta.weight": (8, 8)},
        turned,  # weights stored the other way round
        llama | {"layers.0.mlp.router.weight": (4, 24)},  # a matrix nobody claims
        llama | {"layers.0.self_attn.lambda_q1": (8,)},  # DiffLlama, whose heads are others
    ):
        with pytest.raises(
            UserError, match=r"unheard-of.*architecture: \{layers: .*heads: .*neurons: "
        ):
            claims(Unknown(), shapes, "structured")


def test_missing_layers_and_unknown_mappings_are_refused() -> None:
    model = tiny_model("bert")
    shapes = shapes_of(model.base_model)
    with pytest.raises(UserError, match="mapping 'other'"):
        claims(model.config, shapes, "other")
    with pytest.raises(UserError, match="no layer of a bert"):
        claims(model.config, {}, "paper")
    missing = "encoder.layer.1.output.dense.weight"
    with pytest.raises(UserError, match=f"{missing} is missing"):
        claims(model.config, {n: s for n, s in shapes.items() if n != missing}, "paper")


HEADS, NEURONS = [Site(0, "head"), Site(1, "head")], [Site(0, "neuron"), Site(1, "neuron")]
FISHER: NodeValues = {
    HEADS[0]: np.array([1.0, 3.0]),
    NEURONS[0]: np.array([10.0, 20.0, 30.0]),
    HEADS[1]: np.array([4.0, 8.0]),
    NEURONS[1]: np.array([0.0, 40.0, 80.0]),
}


@pytest.mark.parametrize("exponent", [1.0, 0.5])
@pytest.mark.parametrize(
    ("normalise", "groups"),
    [("site", [[site] for site in FISHER]), ("kind", [HEADS, NEURONS])],
)
def test_normalised_fisher_has_mean_one_in_its_group_and_keeps_its_proportions(
    normalise: str, groups: list[list[Site]], exponent: float
) -> None:
    normalised = tempered(FISHER, normalise, exponent)
    for group in groups:
        values = np.concatenate([normalised[site] for site in group])
        raised = np.concatenate([FISHER[site] for site in group]) ** exponent
        assert values.mean() == pytest.approx(1)
        np.testing.assert_allclose(values * raised.mean(), raised)


@pytest.mark.parametrize("normalise", ["none", "expert", "kind", "site"])
def test_scale_of_the_loss_is_normalised_away_and_zero_stays_zero(normalise: str) -> None:
    larger = {site: 100 * values for site, values in FISHER.items()}
    scale = 100 if normalise == "none" else 1
    for site, values in tempered(larger, normalise, 1.0).items():
        np.testing.assert_allclose(values, scale * tempered(FISHER, normalise, 1.0)[site])
    zero = {site: np.zeros_like(values) for site, values in FISHER.items()}
    assert not any(values.any() for values in tempered(zero, normalise, 1.0).values())


def chain_of(model: transformers.PreTrainedModel) -> list[str]:
    return list(dict.fromkeys(site.layer for site in mask_sites(model)))


@pytest.mark.parametrize("name", [n for n in CONFIGS if not n.startswith(("albert", "t5"))])
def test_own_parts_are_what_the_last_shared_layer_does_not_depend_on(name: str) -> None:
    model = tiny_model(name)
    model.config.pad_token_id = model.config.pad_token_id or 0
    base = model.base_model
    outputs: list[torch.Tensor] = []
    layer = model.get_submodule(chain_of(model)[0])
    layer.register_forward_hook(
        lambda _, __, output: outputs.append(output[0] if isinstance(output, tuple) else output)
    )
    examples = tiny_examples(name, 1)
    inputs = {key: torch.tensor(np.array(value)) for key, value in examples.inputs.items()}
    logits = model(**inputs).logits
    named = dict(base.named_parameters())
    own = own_parts(model.config, shapes_of(base), layers=1)
    options: dict[str, Any] = {"allow_unused": True, "retain_graph": True}
    reached = torch.autograd.grad(outputs[0].sum(), list(named.values()), **options)
    assert own == [key for key, slope in zip(named, reached, strict=True) if slope is None]
    slopes = torch.autograd.grad(logits.sum(), [named[key] for key in own], **options)
    assert all(slope is not None for slope in slopes)


@pytest.mark.parametrize("name", CONFIGS)
def test_the_pooler_alone_is_own_where_there_is_one_and_nothing_if_nothing_is_to_be(
    name: str,
) -> None:
    model = tiny_model(name)
    shapes = shapes_of(model.base_model)
    poolers = {"bert": ["pooler.dense.weight", "pooler.dense.bias"]}
    poolers |= {key: ["pooler.weight", "pooler.bias"] for key in ("albert", "albert-groups")}
    assert own_parts(model.config, shapes) == poolers.get(name, [])
    assert own_parts(model.config, shapes, pooler=False) == []


@pytest.mark.parametrize(
    ("name", "layers", "message"),
    [
        ("bert", 2, "own_layers is 2, but this bert has 2 layers, .*; give at most 1"),
        (
            "albert",
            1,
            "own_layers: albert has layers that share their parameters; leave",
        ),
        ("albert-groups", 1, "layers that share their parameters"),
        ("t5", 1, "t5 has a decoder; leave it out"),
    ],
)
def test_own_layers_that_cannot_be_are_refused(name: str, layers: int, message: str) -> None:
    model = tiny_model(name)
    with pytest.raises(UserError, match=message):
        own_parts(model.config, shapes_of(model.base_model), layers=layers)


SIZES = {
    **{"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "head_dim": 8},
    **{"intermediate_size": 44, "num_key_value_heads": 2, "vocab_size": 50, "pad_token_id": 0},
    **{"d_model": 32, "num_layers": 2, "attention_heads": 4, "ffn_dim": 44, "n_embd": 32},
    **{"n_layer": 2, "n_head": 4, "n_inner": 44, "image_size": 8, "patch_size": 4},
    **{"max_position_embeddings": 64, "word_embed_proj_dim": 32},
}


def listed_architectures(start: str) -> list[str]:
    """The model types that a paragraph of the page on merging lists."""
    page = (ROOT / "docs" / "merging.md").read_text().replace("\n", " ")
    return re.findall(r"`([\w-]+)`", page[page.index(start) :].partition(".")[0])


def test_the_described_architectures_are_those_on_the_page() -> None:
    assert sorted(listed_architectures("Described: ")) == sorted(ARCHITECTURES)


@pytest.mark.parametrize("model_type", listed_architectures("Recognised, "))
def test_the_architectures_on_the_page_are_recognised(model_type: str) -> None:
    config_class = CONFIG_MAPPING[model_type]
    own = config_class()
    sizes = {name: size for name, size in SIZES.items() if hasattr(own, name)}
    config = config_class(**{k: v for k, v in sizes.items() if k not in own.attribute_map})
    with torch.device("meta"):
        model = AutoModel.from_config(config)
    sites = mask_sites(model)
    assert model_type not in ARCHITECTURES
    assert {site.site.node for site in sites} == {"head", "neuron"}
    assert {site.nodes for site in sites if site.site.node == "head"} == {4}


BERT_LIKE = {
    "layers": "encoder.layer.{}",
    "heads": [
        *("attention.output.dense", "attention.self: q=query k=key v=value"),
        "attention.output.LayerNorm",
    ],
    "neurons": ["output.dense", "intermediate: u=dense", "output.LayerNorm"],
}


def test_an_architecture_of_the_settings_is_read_like_one_of_the_table() -> None:
    model = tiny_model("bert")
    shapes = shapes_of(model.base_model)
    expected = claims(model.config, shapes, "structured")
    model.config.fmn_architecture = BERT_LIKE
    model.config.model_type = "unheard-of"
    assert claims(model.config, shapes, "structured") == expected
    sizes = {"hidden_size": 24, "num_attention_heads": 4, "intermediate_size": 20}
    config = CONFIG_MAPPING["xmod"](num_hidden_layers=2, vocab_size=50, languages=["a"], **sizes)
    with torch.device("meta"):
        unknown = AutoModel.from_config(config)
    with pytest.raises(UserError, match="describe it in the settings, architecture: "):
        mask_sites(unknown)
    unknown.config.fmn_architecture = BERT_LIKE
    assert [site.nodes for site in mask_sites(unknown)] == [4, 20, 4, 20]
