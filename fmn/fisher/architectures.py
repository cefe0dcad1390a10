"""The places of mask nodes in a Transformer, and the rows and columns of parameters they weigh.

Each architecture is an entry of the table `ARCHITECTURES`. From it, `mask_sites` returns the
modules whose inputs the mask nodes multiply, `claims` the nodes that weigh each parameter in a
merge, and `own_parts` the parameters of the last layers and of the modules after them. A model that
is not in the table is recognised if its layers consist of blocks that are.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from fmn.errors import UserError
from fmn.tasks.kinds import ARCHITECTURE

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

Shapes = Mapping[str, tuple[int, ...]]
"""Shapes of an encoder's parameters, by name in the base model
("encoder.layer.0.attention.self.query.weight")."""


class Site(NamedTuple):
    """The mask nodes of one kind in one layer. `node`: "head", "neuron" or "cross_head"."""

    layer: int
    node: str


NodeValues = dict[Site, np.ndarray]
"""A value for each mask node: float64 [nodes] for each site."""


@dataclass(frozen=True)
class Block:
    """The mask nodes of one kind in a layer, and the modules around them by path below the layer.

    Modules that a model does not have are skipped, except the output.

    Attributes:
        node: the kind of nodes, as in `Site`.
        output: the projection whose input the nodes multiply.
        inputs: the projections that compute the nodes, as (rows, module). The letters of `rows` are
            the kinds of output rows in order: q (by head), k and v (by key-value head, which
            several heads share in grouped-query attention), u (by neuron).
        norms: normalisations before or after the block that belong to it.
        transposed: whether weights are stored [in, out].
    """

    node: str
    output: str
    inputs: tuple[tuple[str, str], ...]
    norms: tuple[str, ...]
    transposed: bool = False

    def matrix_shape(self, module: str, shapes: Shapes) -> tuple[int, ...] | None:
        """The shape of a module's weight as (out, in); None if there is no such module."""
        shape = shapes.get(f"{module}.weight")
        return shape[::-1] if shape and self.transposed else shape


Architecture = Mapping[str, tuple[Block, ...]]
"""The blocks of a layer, by the layer's path below the base model, which has {} for its number."""

# ---------------------------------------------------------------------------------------------
# The table


def _layers(path: str, *blocks: Block) -> Architecture:
    return {path: blocks}


def _block(node: str, output: str, inputs: str, norms: str, *, transposed: bool = False) -> Block:
    """A block whose inputs are written "PARENT: ROWS=MODULE ...", its norms "MODULE ..."."""
    parent, _, modules = inputs.rpartition(": ")
    pairs = (entry.split("=") for entry in modules.split())
    paths = tuple((rows, f"{parent}.{module}".lstrip(".")) for rows, module in pairs)
    return Block(node, output, paths, tuple(norms.split()), transposed)


def _t5_neurons(layer: str) -> Block:
    dense = f"{layer}.DenseReluDense"
    return _neurons(f"{dense}.wo", f"{dense}: u=wi u=wi_0 u=wi_1", f"{layer}.layer_norm")


_heads, _cross_heads, _neurons = (partial(_block, n) for n in ("head", "cross_head", "neuron"))

_BERT_QKV = "attention.self: q=query k=key v=value"
_BERT_HEADS = _heads("attention.output.dense", _BERT_QKV, "attention.output.LayerNorm")
_BERT_NEURONS = _neurons("output.dense", "intermediate: u=dense", "output.LayerNorm")
_BERT = _layers("encoder.layer.{}", _BERT_HEADS, _BERT_NEURONS)
_DEBERTA_QKV = (
    "attention.self: q=query_proj k=key_proj v=value_proj q=pos_query_proj k=pos_key_proj"
)
_DEBERTA_1 = "attention.self: q=in_proj q=q_bias v=v_bias k=pos_proj q=pos_q_proj"  # head by head
_QKV = "self_attn: q=q_proj k=k_proj v=v_proj"
_QK_NORMS = "self_attn.q_norm self_attn.k_norm input_layernorm"
_GATED = "mlp: u=gate_proj u=up_proj"
_LLAMA = _layers(
    "layers.{}",
    _heads("self_attn.o_proj", _QKV, _QK_NORMS),
    _neurons("mlp.down_proj", _GATED, "post_attention_layernorm"),
)
_GEMMA_NORMS = "pre_feedforward_layernorm post_feedforward_layernorm"
_GEMMA = _layers(
    "layers.{}",
    _heads("self_attn.o_proj", _QKV, f"{_QK_NORMS} post_attention_layernorm"),
    _neurons("mlp.down_proj", _GATED, _GEMMA_NORMS),
)
_T5_HEADS = _heads(
    "layer.0.SelfAttention.o", "layer.0.SelfAttention: q=q k=k v=v", "layer.0.layer_norm"
)
_T5_CROSS_HEADS = _cross_heads(
    "layer.1.EncDecAttention.o", "layer.1.EncDecAttention: q=q k=k v=v", "layer.1.layer_norm"
)
_BART_HEADS = _heads("self_attn.out_proj", _QKV, "self_attn_layer_norm")
_BART_CROSS_HEADS = _cross_heads(
    "encoder_attn.out_proj", "encoder_attn: q=q_proj k=k_proj v=v_proj", "encoder_attn_layer_norm"
)
_BART_NEURONS = _neurons("fc2", "u=fc1", "final_layer_norm")
_BART = {
    **_layers("encoder.layers.{}", _BART_HEADS, _BART_NEURONS),
    **_layers("decoder.layers.{}", _BART_HEADS, _BART_CROSS_HEADS, _BART_NEURONS),
}
_T5 = {
    **_layers("encoder.block.{}", _T5_HEADS, _t5_neurons("layer.1")),
    **_layers("decoder.block.{}", _T5_HEADS, _T5_CROSS_HEADS, _t5_neurons("layer.2")),
}

_DENSE_NEURONS = _neurons("mlp.dense_4h_to_h", "mlp: u=dense_h_to_4h", "post_attention_layernorm")


def _by_head(attention: str) -> Block:
    """An attention whose one matrix has the rows of query, key and value head by head."""
    return _heads(f"{attention}.dense", f"{attention}: q=query_key_value", "input_layernorm")


ARCHITECTURES: Mapping[str, Architecture] = {
    **dict.fromkeys(("t5", "mt5", "umt5"), _T5),
    **dict.fromkeys(("bart", "mbart", "pegasus", "marian", "m2m_100", "blenderbot"), _BART),
    **dict.fromkeys(("bert", "roberta", "xlm-roberta", "camembert", "electra"), _BERT),
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3"), _LLAMA),
    **dict.fromkeys(("gemma2", "gemma3_text"), _GEMMA),
    "deberta-v2": _layers(
        "encoder.layer.{}",
        _heads("attention.output.dense", _DEBERTA_QKV, "attention.output.LayerNorm"),
        _BERT_NEURONS,
    ),
    "deberta": _layers(
        "encoder.layer.{}",
        _heads("attention.output.dense", _DEBERTA_1, "attention.output.LayerNorm"),
        _BERT_NEURONS,
    ),
    "distilbert": _layers(
        "transformer.layer.{}",
        _heads("attention.out_lin", "attention: q=q_lin k=k_lin v=v_lin", "sa_layer_norm"),
        _neurons("ffn.lin2", "ffn: u=lin1", "output_layer_norm"),
    ),
    "mpnet": _layers(
        "encoder.layer.{}",
        _heads("attention.attn.o", "attention.attn: q=q k=k v=v", "attention.LayerNorm"),
        _BERT_NEURONS,
    ),
    "albert": _layers(
        "encoder.albert_layer_groups.{}.albert_layers.{}",
        _heads("attention.dense", "attention: q=query k=key v=value", "attention.LayerNorm"),
        _neurons("ffn_output", "u=ffn", "full_layer_layer_norm"),
    ),
    "modernbert": _layers(
        "layers.{}",
        _heads("attn.Wo", "attn: qkv=Wqkv", "attn_norm"),
        _neurons("mlp.Wo", "mlp: uu=Wi", "mlp_norm"),
    ),
    "gpt2": _layers(
        "h.{}",
        _heads("attn.c_proj", "attn: qkv=c_attn", "ln_1", transposed=True),
        _neurons("mlp.c_proj", "mlp: u=c_fc", "ln_2", transposed=True),
    ),
    "gpt_neo": _layers(
        "h.{}",
        _heads("attn.attention.out_proj", "attn.attention: q=q_proj k=k_proj v=v_proj", "ln_1"),
        _neurons("mlp.c_proj", "mlp: u=c_fc", "ln_2"),
    ),
    "gptj": _layers(
        "h.{}",
        _heads("attn.out_proj", "attn: q=q_proj k=k_proj v=v_proj", "ln_1"),
        _neurons("mlp.fc_out", "mlp: u=fc_in", ""),
    ),
    "gpt_neox": _layers("layers.{}", _by_head("attention"), _DENSE_NEURONS),
    "bloom": _layers("h.{}", _by_head("self_attention"), _DENSE_NEURONS),
    "phi": _layers(
        "layers.{}",
        _heads("self_attn.dense", _QKV, "input_layernorm"),
        _neurons("mlp.fc2", "mlp: u=fc1", ""),
    ),
    "phi3": _layers(
        "layers.{}",
        _heads("self_attn.o_proj", "self_attn: qkv=qkv_proj", "input_layernorm"),
        _neurons("mlp.down_proj", "mlp: uu=gate_up_proj", "post_attention_layernorm"),
    ),
    "glm": _layers(
        "layers.{}",
        _heads("self_attn.o_proj", _QKV, "input_layernorm"),
        _neurons("mlp.down_proj", "mlp: uu=gate_up_proj", "post_attention_layernorm"),
    ),
    "starcoder2": _layers(
        "layers.{}",
        _heads("self_attn.o_proj", _QKV, "input_layernorm"),
        _neurons("mlp.c_proj", "mlp: u=c_fc", "post_attention_layernorm"),
    ),
    "opt": _layers("decoder.layers.{}", _BART_HEADS, _BART_NEURONS),
    "vit": _layers(
        "layers.{}",
        _heads("attention.o_proj", "attention: q=q_proj k=k_proj v=v_proj", "layernorm_before"),
        _neurons("mlp.fc2", "mlp: u=fc1", "layernorm_after"),
    ),
}

AFTER_LAYERS = (
    *("norm", "final_norm", "layernorm", "final_layernorm", "final_layer_norm", "ln_f", "pooler"),
    *("layer_norm", "post_layernorm", "encoder.ln", "encoder.emb_layer_norm_after"),
    *("decoder.final_layer_norm", "decoder.project_out"),
)
"""What the base models of these architectures have after their last layer, by path."""

# ---------------------------------------------------------------------------------------------
# Where the nodes of a model sit


@dataclass(frozen=True)
class MaskSite:
    """A module whose input [..., nodes * channels] the mask nodes of `site` multiply: the output
    projection of `block` in the layer with the path `layer`."""

    site: Site
    layer: str
    block: Block
    nodes: int
    channels: int

    @property
    def module(self) -> str:
        return f"{self.layer}.{self.block.output}"


def mask_sites(model: "PreTrainedModel") -> tuple[MaskSite, ...]:
    """The modules of `model`, by their paths in it, whose inputs the mask nodes multiply.

    Raises:
        UserError: the architecture is neither in the table nor recognised.
    """
    base = model.base_model
    prefix = "" if base is model else f"{model.base_model_prefix}."
    shapes = {name: tuple(parameter.shape) for name, parameter in base.named_parameters()}
    sites = _sites(model.config, shapes)
    return tuple(replace(site, layer=f"{prefix}{site.layer}") for site in sites)


def node_counts(config: "PretrainedConfig", shapes: Shapes) -> dict[Site, int]:
    """The number of mask nodes of each site of a model."""
    return {site.site: site.nodes for site in _sites(config, shapes)}


def _sites(config: "PretrainedConfig", shapes: Shapes) -> list[MaskSite]:
    """Every block of every layer. A decoder's layers are numbered on from the encoder's."""
    architecture = _architecture(config, shapes)
    layers = [
        (layer, blocks)
        for path, blocks in architecture.items()
        for layer in _layer_paths(path, shapes)
    ]
    sites = []
    for number, (layer, blocks) in enumerate(layers):
        for block in blocks:
            shape = block.matrix_shape(f"{layer}.{block.output}", shapes)
            if shape is None:
                raise UserError(
                    f"{layer}.{block.output}.weight is missing in this {config.model_type}; give a "
                    "complete checkpoint"
                )
            width = shape[1]
            heads = config.num_attention_heads  # of the encoder
            if layer.startswith("decoder."):
                heads = getattr(config, "decoder_attention_heads", heads)
            nodes = width if block.node == "neuron" else int(heads)
            sites.append(MaskSite(Site(number, block.node), layer, block, nodes, width // nodes))
    if not sites:
        raise UserError(
            f"no layer of a {config.model_type} (expected are parameters below "
            f"{', '.join(architecture)}); give a complete checkpoint"
        )
    return sites


def _layer_paths(path: str, shapes: Shapes) -> list[str]:
    """The paths of the layers, in the order of their numbers."""
    pattern = re.compile(re.escape(path).replace(r"\{\}", r"(\d+)") + r"\.")
    matches = filter(None, map(pattern.match, shapes))
    numbers = {tuple(map(int, match.groups())) for match in matches}
    return [path.format(*layer) for layer in sorted(numbers)]


def own_parts(
    config: "PretrainedConfig", shapes: Shapes, *, pooler: bool = True, layers: int = 0
) -> list[str]:
    """The parameters of an encoder that each task has for itself; tasks share all others.

    Args:
        config, shapes: of the encoder.
        pooler: whether a task has its own pooler, if the encoder has one.
        layers: the number of last layers that a task has for itself; with one or more, it also has
            its own final normalisation and pooler.

    Returns:
        names in the base model, in the order of `shapes`.

    Raises:
        UserError: the encoder does not have more layers than that, or its layers are not a chain in
            which each has its own parameters.
    """
    paths = ["pooler"] if pooler else []
    if layers:
        chain, kind = layer_chain(config, shapes, "own_layers"), config.model_type
        if layers >= len(chain):
            problem = f"own_layers is {layers}, but this {kind} has {len(chain)} layers"
            raise UserError(f"{problem}, and tasks must share one; give at most {len(chain) - 1}")
        paths = [*chain[-layers:], *AFTER_LAYERS]
    return [name for name in shapes if name.startswith(tuple(f"{path}." for path in paths))]


def layer_chain(
    config: "PretrainedConfig", shapes: Shapes, setting: str, remedy: str = "leave it out"
) -> list[str]:
    """The paths of an encoder's layers if each layer reads the output of the layer before it.

    Args:
        setting, remedy: what needs such layers, and what to do where there are none.

    Raises:
        UserError: there are a decoder's layers too, or layers that share their parameters.
    """
    architecture = _architecture(config, shapes)
    chain = [layer for path in architecture for layer in _layer_paths(path, shapes)]
    if config.is_encoder_decoder or len(chain) != config.num_hidden_layers:
        why = "a decoder" if config.is_encoder_decoder else "layers that share their parameters"
        raise UserError(f"{setting}: {config.model_type} has {why}; {remedy}")
    return chain


def _architecture(config: "PretrainedConfig", shapes: Shapes) -> Architecture:
    if not isinstance(getattr(config, "num_attention_heads", 1), int):
        problem = f"a {config.model_type} has another number of heads in each of its stages"
        raise UserError(f"{problem}; use a method without mask nodes, such as average or regmean")
    if own := getattr(config, ARCHITECTURE, None):  # as the settings describe it
        turned = {"transposed": own.get("transposed", False)}
        blocks = _heads(*own["heads"], **turned), _neurons(*own["neurons"], **turned)
        return _layers(own["layers"], *blocks)
    return ARCHITECTURES.get(config.model_type) or _recognised(config, shapes)


def _recognised(config: "PretrainedConfig", shapes: Shapes) -> Architecture:
    """Recognise the layers of a model that is not in the table, from the blocks in the table.

    If several combinations fit (they differ in their normalisations), it is the one that explains
    most parameters and misses fewest modules; UserError if that is not unique.
    """
    layers = [blocks for entry in ARCHITECTURES.values() for blocks in entry.values()]
    known = dict.fromkeys(block for blocks in layers for block in blocks)
    heads, neurons = ([b for b in known if b.node == node] for node in ("head", "neuron"))
    numbered = (re.match(r"(.*?)\.\d+\..+", name) for name in shapes)
    paths = dict.fromkeys(f"{match[1]}.{{}}" for match in numbered if match)
    scores: dict[tuple[str, Block, Block], tuple[int, int]] = {}
    for path, *pair in product(paths, heads, neurons):
        if score := _score(path, tuple(pair), shapes, getattr(config, "hidden_size", None)):
            scores[path, *pair] = score
    best = [layer for layer, score in scores.items() if score == max(scores.values())]
    if len(best) == 1 and getattr(config, "num_attention_heads", None):
        path, *pair = best[0]
        return {path: tuple(pair)}
    raise UserError(
        f"model type {config.model_type!r} is not known and {'more than one' if best else 'no'} "
        "known layer fits it; describe it in the settings, architecture: {layers: PATH.{}, heads: "
        "[OUTPUT PROJECTION, 'PARENT: q=... k=... v=...', NORMS], neurons: [DOWN PROJECTION, "
        "'PARENT: u=...', NORMS]}"
    )


def _score(
    path: str, blocks: tuple[Block, ...], shapes: Shapes, hidden_size: int | None
) -> tuple[int, int] | None:
    """How well layers fit a model: (parameters explained, -modules missing).

    None if they do not: every matrix of every numbered layer must be explained.
    """
    if len({block.transposed for block in blocks}) > 1:  # a model stores all its matrices alike
        return None
    explained: set[str] = set()
    missing = 0
    for layer, block in product(_layer_paths(path, shapes), blocks):
        shape = block.matrix_shape(f"{layer}.{block.output}", shapes)
        if shape is None or shape[0] != hidden_size:
            return None
        for module in (block.output, *(module for _, module in block.inputs), *block.norms):
            names = {f"{layer}.{module}.{kind}" for kind in ("weight", "bias")} & shapes.keys()
            explained |= names
            missing += not names
    # DiffLlama's vectors lambda_q and lambda_k mix heads with one another.
    inside = {n: len(shape) for n, shape in shapes.items() if re.search(r"\.\d+\.", n)}
    matrices = {n for n, axes in inside.items() if axes > 1 or re.search(r"\.lambda_[qk]\d", n)}
    norms = [norm for block in blocks for norm in block.norms]
    fits = matrices <= explained and len(set(norms)) == len(norms)
    return (len(explained), -missing) if fits else None


# ---------------------------------------------------------------------------------------------
# The parameters that each node weighs


@dataclass(frozen=True)
class Part:
    """A range of a parameter's entries along one axis, and the nodes that weigh them.

    The nodes of `site` are divided into `groups` of equal size, and the `entries` likewise; the
    mean of a group of nodes weighs its group of entries. With as many groups as nodes, each node
    weighs its own entries; with one group, the site's mean weighs all.
    """

    site: Site
    groups: int
    entries: int


@dataclass(frozen=True)
class Claim:
    """The nodes that weigh a parameter.

    Attributes:
        shape: the shape of the weights: (-1, 1) by row, (1, -1) by column, (-1,) by entry of a
            bias, () one weight for the whole parameter.
        parts: the ranges along the axis -1, in order. Empty: the universal weight, which is the
            mean over layers of the sum of their site means.
    """

    shape: tuple[int, ...] = ()
    parts: tuple[Part, ...] = ()


def claims(config: "PretrainedConfig", shapes: Shapes, mapping: str) -> dict[str, Claim]:
    """For every parameter of an encoder, the nodes that weigh it.

    Args:
        mapping: "structured" (each node weighs the rows and columns it owns) or "paper" (value,
            attention output and feed-forward down projections are weighed by layer means, as in the
            released code of arXiv 2403.09891).

    Raises:
        UserError: the architecture is neither in the table nor recognised.
    """
    if mapping not in ("structured", "paper"):
        raise UserError(f"mapping {mapping!r} is unknown: choose structured or paper")
    by_name: dict[str, Claim] = {}
    for site in _sites(config, shapes):
        for module, weight, bias in _claims_of(site, config, shapes, mapping == "structured"):
            path = f"{site.layer}.{module}"
            by_name |= {f"{path}.weight": weight, f"{path}.bias": bias, path: bias}
    return {name: by_name.get(name, Claim()) for name in shapes}


def _claims_of(
    site: MaskSite, config: "PretrainedConfig", shapes: Shapes, structured: bool
) -> Iterator[tuple[str, Claim, Claim]]:
    """The modules of a site by path below the layer, with the claims of weight and bias."""
    block, nodes = site.block, site.nodes
    by_row, by_column = ((1, -1), (-1, 1)) if block.transposed else ((-1, 1), (1, -1))
    mean = Claim((), (Part(site.site, 1, 1),))
    owned = Claim(by_column, (Part(site.site, nodes, nodes * site.channels),))
    yield block.output, owned if structured else mean, mean
    key_value_heads = getattr(config, "num_key_value_heads", None) or nodes
    units = {"q": nodes, "k": key_value_heads, "v": key_value_heads, "u": nodes}
    groups = {**units, "v": key_value_heads if structured else 1}
    for letters, module in block.inputs:
        path = f"{site.layer}.{module}"  # of a module, or of a bias that has none
        if shape := block.matrix_shape(path, shapes) or shapes.get(path):
            rows = shape[0] // sum(units[letter] for letter in letters)  # of a unit
            parts = tuple(Part(site.site, groups[unit], rows * units[unit]) for unit in letters)
            yield module, Claim(by_row, parts), Claim((-1,), parts)
    for module in block.norms:
        yield module, mean, mean


def weights(claim: Claim, values: NodeValues) -> np.ndarray:
    """The weights of a parameter, float64, of the claim's shape."""
    if not claim.parts:
        layers = {site.layer for site in values}
        return np.asarray(sum(float(np.mean(nodes)) for nodes in values.values()) / len(layers))
    runs = []
    for part in claim.parts:
        means = values[part.site].reshape(part.groups, -1).mean(axis=1)  # [nodes] -> [groups]
        runs.append(np.repeat(means, part.entries // part.groups))
    return np.concatenate(runs).reshape(claim.shape)


def tempered(values: NodeValues, normalise: str, exponent: float) -> NodeValues:
    """Raise an expert's Fisher information to a power, and divide it to a common scale.

    The scales of experts' losses differ; without a common scale, the expert with the largest loss
    would determine every node. Fisher information that is zero everywhere stays zero.

    Args:
        values: the Fisher information, float64 [nodes] by site.
        normalise: the divisor. "none": 1; "expert": the universal weight (see `Claim`); "kind":
            the mean over all nodes of a kind; "site": the mean over a kind in one layer.
        exponent: the power.
    """
    raised = {site: np.asarray(nodes, np.float64) ** exponent for site, nodes in values.items()}
    if normalise == "none":
        return raised

    def scale(site: Site) -> float:
        if normalise == "expert":
            return float(weights(Claim(), raised))
        same = [s for s in raised if s == site or (normalise == "kind" and s.node == site.node)]
        return float(np.concatenate([raised[s] for s in same]).mean())

    return {site: nodes / (scale(site) or 1.0) for site, nodes in raised.items()}
