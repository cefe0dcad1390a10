"""Where mask nodes sit and what they own."""

import numpy as np
import pytest
import torch
import transformers
from torch import nn

from fmn.errors import UserError
from fmn.fisher import architectures
from fmn.fisher.architectures import (
    ARCHITECTURES,
    Claim,
    NodeValues,
    Site,
    claims,
    mask_sites,
    node_counts,
    weights,
)
from tests.tiny import CONFIGS, tiny_model


def shapes_of(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def random_values(model: transformers.PreTrainedModel) -> NodeValues:
    rng = np.random.default_rng(0)
    return {site.site: rng.uniform(0.5, 2, site.nodes) for site in mask_sites(model)}


def test_every_architecture_has_a_tiny_model() -> None:
    assert {config().model_type for config in CONFIGS.values()} == set(ARCHITECTURES)


@pytest.mark.parametrize("mapping", ["structured", "paper"])
@pytest.mark.parametrize("name", CONFIGS)
def test_every_parameter_is_claimed_once_with_weights_of_its_shape(name: str, mapping: str) -> None:
    model = tiny_model(name)
    shapes = shapes_of(model.base_model)
    found = claims(model.config, shapes, mapping)
    assert found.keys() == shapes.keys()
    values = random_values(model)
    for tensor, claim in found.items():
        weight = weights(claim, values)
        assert weight.dtype == np.float64
        assert np.broadcast_shapes(weight.shape, shapes[tensor]) == shapes[tensor], tensor
    # All that is in a layer belongs to its nodes, but for T5's position biases, which all layers share.
    inside = [
        tensor
        for tensor, claim in found.items()
        if claim == Claim() and any(map(str.isdigit, tensor.split(".")))
    ]
    assert all("relative_attention_bias" in tensor for tensor in inside)


@pytest.mark.parametrize("name", CONFIGS)
def test_sites_are_the_inputs_of_projections(name: str) -> None:
    model = tiny_model(name)
    sites = mask_sites(model)
    for site in sites:
        module = model.get_submodule(site.module)
        transposed = isinstance(module, transformers.pytorch_utils.Conv1D)
        weight = module.weight
        assert isinstance(weight, torch.Tensor)
        assert weight.shape[0 if transposed else 1] == site.nodes * site.channels
        assert site.channels == 1 if site.site.node == "neuron" else site.nodes == 4
    assert len({site.site for site in sites}) == len(sites)
    assert {site.site: site.nodes for site in sites} == node_counts(
        model.config, shapes_of(model.base_model)
    )


def test_a_base_model_alone_has_the_sites_of_the_whole() -> None:
    model = tiny_model("bert")
    assert [site.module.removeprefix("bert.") for site in mask_sites(model)] == [
        site.module for site in mask_sites(model.base_model)
    ]


def scaled(
    model: transformers.PreTrainedModel, mapping: str, values: NodeValues
) -> dict[str, np.ndarray]:
    """The weights of every parameter, broadcast to its shape."""
    shapes = shapes_of(model.base_model)
    return {
        name: np.broadcast_to(weights(claim, values), shapes[name])
        for name, claim in claims(model.config, shapes, mapping).items()
    }


def test_structured_bert() -> None:
    model = tiny_model("bert")
    values = random_values(model)
    found = scaled(model, "structured", values)
    head, neuron = values[Site(1, "head")], values[Site(1, "neuron")]
    layer = "encoder.layer.1."
    by_head = np.repeat(head, 6)
    for name in ("query", "key", "value"):
        np.testing.assert_array_equal(
            found[f"{layer}attention.self.{name}.weight"], np.tile(by_head[:, None], 24)
        )
        np.testing.assert_array_equal(found[f"{layer}attention.self.{name}.bias"], by_head)
    np.testing.assert_array_equal(
        found[f"{layer}attention.output.dense.weight"], np.tile(by_head, (24, 1))
    )
    np.testing.assert_array_equal(
        found[f"{layer}intermediate.dense.weight"], np.tile(neuron[:, None], 24)
    )
    np.testing.assert_array_equal(found[f"{layer}intermediate.dense.bias"], neuron)
    np.testing.assert_array_equal(found[f"{layer}output.dense.weight"], np.tile(neuron, (24, 1)))
    for name in ("dense.bias", "LayerNorm.weight", "LayerNorm.bias"):
        np.testing.assert_allclose(found[f"{layer}attention.output.{name}"], head.mean())
        np.testing.assert_allclose(found[f"{layer}output.{name}"], neuron.mean())
    universal = np.mean(
        [values[Site(i, "head")].mean() + values[Site(i, "neuron")].mean() for i in range(2)]
    )
    for name in (
        "embeddings.word_embeddings.weight",
        "embeddings.LayerNorm.bias",
        "pooler.dense.weight",
    ):
        np.testing.assert_allclose(found[name], universal)


def test_paper_bert_differs_from_structured_in_three_parameters_a_layer() -> None:
    model = tiny_model("bert")
    values = random_values(model)
    found, structured = scaled(model, "paper", values), scaled(model, "structured", values)
    means = {
        f"encoder.layer.{i}.{name}": values[Site(i, node)].mean()
        for i in range(2)
        for name, node in (
            ("attention.self.value.weight", "head"),
            ("attention.self.value.bias", "head"),
            ("attention.output.dense.weight", "head"),
            ("output.dense.weight", "neuron"),
        )
    }
    for name, weight in found.items():
        np.testing.assert_allclose(weight, means.get(name, structured[name]), rtol=1e-14)


def test_key_and_value_rows_of_grouped_heads_weigh_the_mean_of_their_group() -> None:
    model = tiny_model("llama")
    values = random_values(model)
    found = scaled(model, "structured", values)
    head, neuron = values[Site(0, "head")], values[Site(0, "neuron")]
    groups = np.repeat([head[:2].mean(), head[2:].mean()], 8)
    np.testing.assert_array_equal(
        found["layers.0.self_attn.q_proj.weight"][:, 0], np.repeat(head, 8)
    )
    np.testing.assert_array_equal(found["layers.0.self_attn.k_proj.weight"][:, 0], groups)
    np.testing.assert_array_equal(found["layers.0.self_attn.v_proj.weight"][:, 0], groups)
    np.testing.assert_array_equal(found["layers.0.self_attn.o_proj.weight"][0], np.repeat(head, 8))
    np.testing.assert_array_equal(found["layers.0.mlp.gate_proj.weight"][:, 0], neuron)
    np.testing.assert_array_equal(found["layers.0.mlp.up_proj.weight"][:, 0], neuron)


def test_fused_projections_are_claimed_part_by_part() -> None:
    model = tiny_model("modernbert")
    values = random_values(model)
    head, neuron = values[Site(0, "head")], values[Site(0, "neuron")]
    rows = np.repeat(head, 6)
    fused = scaled(model, "structured", values)
    np.testing.assert_array_equal(
        fused["layers.0.attn.Wqkv.weight"][:, 0], np.concatenate([rows, rows, rows])
    )
    np.testing.assert_array_equal(
        fused["layers.0.mlp.Wi.weight"][:, 0], np.concatenate([neuron, neuron])
    )
    paper = scaled(model, "paper", values)
    mean = np.full(24, head.mean())
    np.testing.assert_allclose(
        paper["layers.0.attn.Wqkv.weight"][:, 0], np.concatenate([rows, rows, mean]), rtol=1e-14
    )


def test_transposed_weights_are_claimed_on_the_other_axis() -> None:
    model = tiny_model("gpt2")
    values = random_values(model)
    found = scaled(model, "structured", values)
    head, neuron = values[Site(1, "head")], values[Site(1, "neuron")]
    rows = np.tile(np.repeat(head, 6), 3)
    np.testing.assert_array_equal(found["h.1.attn.c_attn.weight"], np.tile(rows, (24, 1)))
    np.testing.assert_array_equal(found["h.1.attn.c_attn.bias"], rows)
    np.testing.assert_array_equal(found["h.1.attn.c_proj.weight"][:, 0], np.repeat(head, 6))
    np.testing.assert_array_equal(found["h.1.mlp.c_fc.weight"][0], neuron)
    np.testing.assert_array_equal(found["h.1.mlp.c_proj.weight"][:, 0], neuron)


def test_shared_layers_are_one_layer_and_decoder_layers_follow_the_encoders() -> None:
    assert [site.site for site in mask_sites(tiny_model("albert"))] == [
        Site(0, "head"),
        Site(0, "neuron"),
    ]
    assert {site.site.layer for site in mask_sites(tiny_model("albert-groups"))} == {0, 1}
    decoder = [site for site in mask_sites(tiny_model("t5")) if site.site.layer == 2]
    assert [site.site.node for site in decoder] == ["head", "cross_head", "neuron"]
    assert all(site.module.startswith("transformer.decoder.block.0.") for site in decoder)


def test_owned_rows_and_columns_switch_their_node_off() -> None:
    """Zero in every row and column that a node owns silences exactly what a zero mask would: the output projection's
    columns. So the rows belong to the node too: changing them then changes nothing."""
    for name in ("bert", "llama", "gpt2", "modernbert", "t5-gated", "deberta-v2"):
        model = tiny_model(name)
        base = model.base_model
        sites = {site.site: np.zeros(site.nodes) for site in mask_sites(model)}
        marked = Site(0, "head"), Site(0, "neuron")
        for site in marked:
            # Under grouped attention a key-value row serves its whole group, here the first two heads.
            sites[site][: 2 if name == "llama" and site.node == "head" else 1] = 1
        found = claims(model.config, shapes_of(base), "structured")
        state = base.state_dict()
        inputs = {"input_ids": torch.tensor([[1, 5, 6, 7, 2]])}
        if name.startswith("t5"):
            inputs["decoder_input_ids"] = torch.tensor([[0, 4, 2]])
        outputs = {site.module for site in mask_sites(model) if site.site in marked}

        def run() -> torch.Tensor:
            with torch.no_grad():
                hidden: torch.Tensor = base(**inputs).last_hidden_state  # noqa: B023
                return hidden

        prefix = f"{model.base_model_prefix}."
        owned = {
            tensor: torch.from_numpy(
                np.broadcast_to(weights(claim, sites), state[tensor].shape) == 1
            )
            for tensor, claim in found.items()
            if claim.axis is not None
        }
        with torch.no_grad():
            for tensor, rows in owned.items():
                if prefix + tensor.removesuffix(".weight") in outputs:
                    state[tensor][rows] = 0
            silenced = run()
            for tensor, rows in owned.items():
                if prefix + tensor.removesuffix(".weight") not in outputs:
                    state[tensor][rows] += torch.randn(int(rows.sum()), dtype=torch.float64)
        torch.testing.assert_close(run(), silenced)


class _Unknown(transformers.PretrainedConfig):  # type: ignore[misc]
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
    config = _Unknown()
    config.num_key_value_heads = getattr(model.config, "num_key_value_heads", None)
    assert claims(config, shapes, "structured") == claims(model.config, shapes, "structured")


def test_an_unrecognisable_architecture_is_refused_with_the_lines_to_add() -> None:
    shapes = {"tower.0.alpha.weight": (8, 8), "tower.0.beta.weight": (8, 8)}
    with pytest.raises(
        UserError, match=r'unheard-of.*ARCHITECTURES.*two lines, Block\("head".*Block\("neuron"'
    ):
        claims(_Unknown(), shapes, "structured")


def test_weights_stored_the_other_way_round_are_not_taken_for_the_known_ones() -> None:
    shapes = shapes_of(tiny_model("gpt2").base_model)
    turned = {
        name: shape[::-1] if name.startswith("h.") else shape for name, shape in shapes.items()
    }
    with pytest.raises(UserError, match="unheard-of"):
        claims(_Unknown(), turned, "structured")


def test_models_built_like_the_described_ones_need_no_lines_of_their_own() -> None:
    for kind, like in (("ernie", "bert"), ("olmo2", "gemma2")):
        own = {
            name: getattr(CONFIGS["llama"](), name)
            for name in ("hidden_size", "intermediate_size", "vocab_size")
        }
        config = transformers.AutoConfig.for_model(
            kind, **own, num_hidden_layers=2, num_attention_heads=4, num_labels=2, pad_token_id=0
        )
        model = transformers.AutoModelForSequenceClassification.from_config(config)
        found = claims(config, shapes_of(model.base_model), "structured")
        assert kind not in ARCHITECTURES
        assert [site.site for site in mask_sites(model)] == [
            Site(i, node) for i in range(2) for node in ("head", "neuron")
        ]
        after_attention = {
            "bert": "encoder.layer.0.attention.output.LayerNorm",
            "gemma2": "layers.0.post_attention_layernorm",
        }
        assert found[f"{after_attention[like]}.weight"].parts[0].site == Site(0, "head")


def test_a_layer_with_matrices_nobody_claims_is_not_recognised() -> None:
    shapes = shapes_of(tiny_model("llama").base_model)
    shapes["layers.0.mlp.router.weight"] = (4, 24)
    with pytest.raises(UserError, match="unheard-of"):
        claims(_Unknown(), shapes, "structured")


def test_missing_layers_unknown_mappings_and_foreign_values_are_refused() -> None:
    model = tiny_model("bert")
    shapes = shapes_of(model.base_model)
    with pytest.raises(UserError, match="mapping 'other'"):
        claims(model.config, shapes, "other")
    with pytest.raises(UserError, match="no layer of a bert"):
        claims(model.config, {}, "paper")
    torn = {
        name: shape
        for name, shape in shapes.items()
        if name != "encoder.layer.1.output.dense.weight"
    }
    with pytest.raises(UserError, match=r"encoder.layer.1.output.dense.weight is missing"):
        claims(model.config, torn, "paper")
    claim = claims(model.config, shapes, "structured")["encoder.layer.1.intermediate.dense.weight"]
    with pytest.raises(UserError, match="has 0 neuron nodes in layer 1, the model 20"):
        weights(claim, {})
    with pytest.raises(UserError, match="has 19 neuron nodes in layer 1, the model 20"):
        weights(claim, {Site(1, "neuron"): np.ones(19)})


FISHER: NodeValues = {
    Site(0, "head"): np.array([1.0, 3.0]),
    Site(0, "neuron"): np.array([10.0, 20.0, 30.0]),
    Site(1, "head"): np.array([4.0, 8.0]),
    Site(1, "neuron"): np.array([0.0, 40.0, 80.0]),
}


@pytest.mark.parametrize(
    ("normalise", "groups"),
    [
        ("site", [[Site(0, "head")], [Site(1, "head")], [Site(0, "neuron")], [Site(1, "neuron")]]),
        ("kind", [[Site(0, "head"), Site(1, "head")], [Site(0, "neuron"), Site(1, "neuron")]]),
    ],
)
def test_normalised_fisher_has_mean_one_in_its_group_and_keeps_its_proportions(
    normalise: str, groups: list[list[Site]]
) -> None:
    for exponent in (1.0, 0.5):
        found = architectures.tempered(FISHER, normalise, exponent)
        for group in groups:
            values = np.concatenate([found[site] for site in group])
            raised = np.concatenate([FISHER[site] for site in group]) ** exponent
            assert values.mean() == pytest.approx(1)
            np.testing.assert_allclose(values * raised.mean(), raised)


def test_experts_whose_losses_differ_in_scale_alone_become_equal() -> None:
    larger = {site: 100 * values for site, values in FISHER.items()}
    for normalise in ("expert", "kind", "site"):
        one, other = (architectures.tempered(values, normalise, 1.0) for values in (FISHER, larger))
        for site in FISHER:
            np.testing.assert_allclose(one[site], other[site])
    plain = architectures.tempered(larger, "none", 1.0)
    assert all(np.array_equal(plain[site], larger[site]) for site in FISHER)


def test_fisher_that_is_zero_everywhere_stays_zero() -> None:
    nothing = {site: np.zeros_like(values) for site, values in FISHER.items()}
    for normalise in ("none", "expert", "kind", "site"):
        assert not any(
            values.any() for values in architectures.tempered(nothing, normalise, 1.0).values()
        )


def test_rows_of_a_matrix_are_weighed_by_their_nodes_or_by_the_mean_of_the_nodes_before_them() -> (
    None
):
    values: NodeValues = {Site(0, "neuron"): np.array([1.0, 2.0, 6.0])}
    part = architectures.Part(Site(0, "neuron"), 3, 3, 3)
    rows, columns = architectures.Claim(2, 0, (part,)), architectures.Claim(2, 1, (part,))
    assert architectures.output_weights(rows, values).tolist() == [1, 2, 6]
    assert architectures.output_weights(columns, values).tolist() == [3]
    assert architectures.output_weights(columns, values, transposed=True).tolist() == [1, 2, 6]
    assert architectures.output_weights(architectures.Claim(), values).tolist() == [3]
