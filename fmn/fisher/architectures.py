"""Where mask nodes sit in a Transformer, and which rows or columns of which parameters they own.

An architecture is an entry of data in `ARCHITECTURES`. Everything below reads that table: `mask_sites` says which
modules' inputs the mask nodes multiply, `claims` which nodes weigh each parameter of the encoder in a merge.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import product
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from fmn.errors import UserError

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel


class Site(NamedTuple):
    """The mask nodes of one kind in one layer. `node`: "head", "neuron" or "cross_head"."""

    layer: int
    node: str


NodeValues = dict[Site, np.ndarray]
"""A value for each mask node: float64 [nodes] for each site."""


@dataclass(frozen=True)
class Block:
    """The mask nodes of one kind and the modules around them, by their path below the layer.

    `output`: the projection whose input the nodes multiply.
    `inputs`: the projections that compute the nodes; those that a model does not have are passed over. Each is written
    "rows module", where the letters of `rows` say what its output rows are, one after another: q (a head each),
    k, v (a key-value head each: a group of heads under grouped-query attention), u (a neuron each).
    `norms`: normalisations before or after that belong to the block.
    `transposed`: weights are stored [in, out].
    """

    node: str
    output: str
    inputs: tuple[str, ...]
    norms: tuple[str, ...] = ()
    transposed: bool = False


@dataclass(frozen=True)
class Stack:
    """Layers of one kind. `path`: of a layer below the base model, {} for its number."""

    path: str
    blocks: tuple[Block, ...]


_BERT_FEED_FORWARD = Block(
    "neuron", "output.dense", ("u intermediate.dense",), ("output.LayerNorm",)
)
_PROJECTIONS = ("q self_attn.q_proj", "k self_attn.k_proj", "v self_attn.v_proj")
_PROJECTION_NORMS = ("self_attn.q_norm", "self_attn.k_norm", "input_layernorm")
_GATED = ("u mlp.gate_proj", "u mlp.up_proj")

_BERT = Stack(
    "encoder.layer.{}",
    (
        Block(
            "head",
            "attention.output.dense",
            ("q attention.self.query", "k attention.self.key", "v attention.self.value"),
            ("attention.output.LayerNorm",),
        ),
        _BERT_FEED_FORWARD,
    ),
)
_LLAMA = Stack(
    "layers.{}",
    (
        Block("head", "self_attn.o_proj", _PROJECTIONS, _PROJECTION_NORMS),
        Block("neuron", "mlp.down_proj", _GATED, ("post_attention_layernorm",)),
    ),
)
_GEMMA = Stack(
    "layers.{}",
    (
        Block(
            "head",
            "self_attn.o_proj",
            _PROJECTIONS,
            (*_PROJECTION_NORMS, "post_attention_layernorm"),
        ),
        Block(
            "neuron",
            "mlp.down_proj",
            _GATED,
            ("pre_feedforward_layernorm", "post_feedforward_layernorm"),
        ),
    ),
)


def _t5(stack: str, attentions: tuple[tuple[str, str], ...]) -> Stack:
    """The encoder or decoder of T5: its attentions in order (node, module), then the feed-forward, plain or gated."""
    blocks = [
        Block(
            node,
            f"layer.{i}.{module}.o",
            (f"q layer.{i}.{module}.q", f"k layer.{i}.{module}.k", f"v layer.{i}.{module}.v"),
            (f"layer.{i}.layer_norm",),
        )
        for i, (node, module) in enumerate(attentions)
    ]
    last = f"layer.{len(attentions)}"
    dense = f"{last}.DenseReluDense"
    feed = Block(
        "neuron",
        f"{dense}.wo",
        tuple(f"u {dense}.{wi}" for wi in ("wi", "wi_0", "wi_1")),
        (f"{last}.layer_norm",),
    )
    return Stack(f"{stack}.block.{{}}", (*blocks, feed))


ARCHITECTURES: Mapping[str, tuple[Stack, ...]] = {
    **dict.fromkeys(("bert", "roberta", "xlm-roberta", "camembert", "electra"), (_BERT,)),
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3"), (_LLAMA,)),
    **dict.fromkeys(("gemma2", "gemma3_text"), (_GEMMA,)),
    "distilbert": (
        Stack(
            "transformer.layer.{}",
            (
                Block(
                    "head",
                    "attention.out_lin",
                    ("q attention.q_lin", "k attention.k_lin", "v attention.v_lin"),
                    ("sa_layer_norm",),
                ),
                Block("neuron", "ffn.lin2", ("u ffn.lin1",), ("output_layer_norm",)),
            ),
        ),
    ),
    "mpnet": (
        Stack(
            "encoder.layer.{}",
            (
                Block(
                    "head",
                    "attention.attn.o",
                    ("q attention.attn.q", "k attention.attn.k", "v attention.attn.v"),
                    ("attention.LayerNorm",),
                ),
                _BERT_FEED_FORWARD,
            ),
        ),
    ),
    "albert": (
        Stack(
            "encoder.albert_layer_groups.{}.albert_layers.{}",
            (
                Block(
                    "head",
                    "attention.dense",
                    ("q attention.query", "k attention.key", "v attention.value"),
                    ("attention.LayerNorm",),
                ),
                Block("neuron", "ffn_output", ("u ffn",), ("full_layer_layer_norm",)),
            ),
        ),
    ),
    "deberta-v2": (
        Stack(
            "encoder.layer.{}",
            (
                Block(
                    "head",
                    "attention.output.dense",
                    (
                        "q attention.self.query_proj",
                        "k attention.self.key_proj",
                        "v attention.self.value_proj",
                        "q attention.self.pos_query_proj",
                        "k attention.self.pos_key_proj",
                    ),
                    ("attention.output.LayerNorm",),
                ),
                _BERT_FEED_FORWARD,
            ),
        ),
    ),
    "modernbert": (
        Stack(
            "layers.{}",
            (
                Block("head", "attn.Wo", ("qkv attn.Wqkv",), ("attn_norm",)),
                Block("neuron", "mlp.Wo", ("uu mlp.Wi",), ("mlp_norm",)),
            ),
        ),
    ),
    "gpt2": (
        Stack(
            "h.{}",
            (
                Block("head", "attn.c_proj", ("qkv attn.c_attn",), ("ln_1",), transposed=True),
                Block("neuron", "mlp.c_proj", ("u mlp.c_fc",), ("ln_2",), transposed=True),
            ),
        ),
    ),
    "t5": (
        _t5("encoder", (("head", "SelfAttention"),)),
        _t5("decoder", (("head", "SelfAttention"), ("cross_head", "EncDecAttention"))),
    ),
    "vit": (
        Stack(
            "layers.{}",
            (
                Block(
                    "head",
                    "attention.o_proj",
                    ("q attention.q_proj", "k attention.k_proj", "v attention.v_proj"),
                    ("layernorm_before",),
                ),
                Block("neuron", "mlp.fc2", ("u mlp.fc1",), ("layernorm_after",)),
            ),
        ),
    ),
}


@dataclass(frozen=True)
class MaskSite:
    """A module of the model whose input [..., nodes * channels] the mask nodes of `site` multiply."""

    site: Site
    module: str
    nodes: int
    channels: int


@dataclass(frozen=True)
class Part:
    """Some consecutive entries of a parameter along one axis, and the nodes that weigh them.

    The `nodes` of `site` fall into `groups` runs of equal length; the mean of each run weighs an equal share of the
    `entries`. So as many groups as nodes weigh rows by node, one group weighs all by the mean of the site.
    """

    site: Site
    nodes: int
    groups: int
    entries: int


@dataclass(frozen=True)
class Claim:
    """Which nodes weigh a parameter: the `parts` of its axis `axis`, in order, or of no axis (one weight for it whole).

    No parts at all: the universal weight, the mean over layers of the sum of the layer's site means.
    """

    ndim: int = 0
    axis: int | None = None
    parts: tuple[Part, ...] = ()


@dataclass(frozen=True)
class _Place:
    """A block in the layer of a model: `path` of the layer below the base model, `nodes` of its site."""

    path: str
    block: Block
    site: Site
    nodes: int


def mask_sites(model: "PreTrainedModel") -> tuple[MaskSite, ...]:
    """The modules of `model` whose inputs the mask nodes multiply, with `module` a path in `model` itself.

    Raises UserError for an architecture that is neither described nor recognised.
    """
    base = model.base_model
    prefix = "" if base is model else f"{model.base_model_prefix}."
    shapes = {name: tuple(parameter.shape) for name, parameter in base.named_parameters()}
    return tuple(
        MaskSite(
            place.site,
            f"{prefix}{place.path}.{place.block.output}",
            place.nodes,
            width // place.nodes,
        )
        for place in _places(model.config, shapes)
        for width in (_width(place.block, shapes[f"{place.path}.{place.block.output}.weight"]),)
    )


def node_counts(
    config: "PretrainedConfig", shapes: Mapping[str, tuple[int, ...]]
) -> dict[Site, int]:
    """How many mask nodes every site of a model has; `shapes` as for `claims`."""
    return {place.site: place.nodes for place in _places(config, shapes)}


def claims(
    config: "PretrainedConfig", shapes: Mapping[str, tuple[int, ...]], mapping: str
) -> dict[str, Claim]:
    """For every parameter of an encoder, the nodes that weigh it.

    `shapes`: the parameters by their names in the base model ("encoder.layer.0.attention.self.query.weight").
    `mapping`: "structured" (each node weighs the rows and columns it owns) or "paper" (value, attention output and
    feed-forward down projections are weighed by layer means, as in the released code of arXiv 2403.09891).
    Raises UserError for an architecture that is neither described nor recognised.
    """
    if mapping not in ("structured", "paper"):
        raise UserError(f"mapping {mapping!r} is unknown: choose structured or paper")
    found = dict.fromkeys(shapes, Claim())
    for place in _places(config, shapes):
        for tensor, claim in _place_claims(place, config, shapes, mapping == "structured"):
            found[tensor] = claim
    return found


def weights(claim: Claim, values: NodeValues) -> np.ndarray:
    """The weights of a parameter, float64, broadcastable against it: shape [], or ones but for the claimed axis.

    Raises UserError where `values` has not the nodes of the claim.
    """
    if not claim.parts:
        layers = {site.layer for site in values}
        return np.asarray(sum(float(np.mean(nodes)) for nodes in values.values()) / len(layers))
    runs = [np.repeat(_groups(part, values), part.entries // part.groups) for part in claim.parts]
    if claim.axis is None:
        return runs[0].reshape(())
    return np.concatenate(runs).reshape(
        [-1 if axis == claim.axis else 1 for axis in range(claim.ndim)]
    )


def output_weights(claim: Claim, values: NodeValues, transposed: bool = False) -> np.ndarray:
    """The weights of a matrix's output rows, float64 [rows], or [1] where all rows have the same.

    A matrix whose columns the nodes own, not its rows (a projection after mask nodes), has their mean.
    `transposed`: the matrix is stored [in, out].
    """
    if claim.axis is None or claim.axis == (1 if transposed else 0):
        return np.ravel(weights(claim, values))
    return np.array([np.mean([np.mean(values[part.site]) for part in claim.parts])])


def tempered(values: NodeValues, normalise: str, exponent: float) -> NodeValues:
    """An expert's Fisher information to a power, then divided so that experts can be compared.

    `normalise`: "none"; "expert": by its universal weight (see `weights`); "kind": by its mean over all nodes of a
    kind; "site": by its mean over the nodes of a kind in one layer. Experts differ in the scale of their losses, and
    without a common scale the one with the largest loss would own every node. All-zero Fisher information stays so.
    """
    raised = {site: np.asarray(nodes, np.float64) ** exponent for site, nodes in values.items()}
    if normalise == "none":
        return raised
    if normalise == "expert":
        scales = dict.fromkeys(raised, float(weights(Claim(), raised)))
    else:
        groups: dict[Site | str, list[np.ndarray]] = {}
        group = {site: site.node if normalise == "kind" else site for site in raised}
        for site, nodes in raised.items():
            groups.setdefault(group[site], []).append(nodes)
        scales = {site: float(np.concatenate(groups[group[site]]).mean()) for site in raised}
    return {site: nodes / (scales[site] or 1.0) for site, nodes in raised.items()}


def _groups(part: Part, values: NodeValues) -> np.ndarray:
    """The mean of each group of the part's nodes, [groups]."""
    layer, node = part.site
    nodes = np.asarray(values.get(part.site, ()), dtype=np.float64)
    if len(nodes) != part.nodes:
        raise UserError(
            f"the Fisher information has {len(nodes)} {node} nodes in layer {layer}, the model {part.nodes}: "
            "it is that of another model"
        )
    means: np.ndarray = nodes.reshape(part.groups, -1).mean(
        axis=1
    )  # [nodes] -> [groups, run] -> [groups]
    return means


def _place_claims(
    place: _Place,
    config: "PretrainedConfig",
    shapes: Mapping[str, tuple[int, ...]],
    structured: bool,
) -> list[tuple[str, Claim]]:
    """The claims of one block in one layer, by parameter name."""
    block, site, nodes = place.block, place.site, place.nodes
    units = {
        "q": nodes,
        "k": _key_value_heads(config, nodes),
        "v": _key_value_heads(config, nodes),
        "u": nodes,
    }
    mean = Claim(parts=(Part(site, nodes, 1, 1),))
    made: list[tuple[str, Claim]] = []

    def add(module: str, name: str, parts: tuple[Part, ...] | None, axis: int = 0) -> None:
        full = f"{place.path}.{module}.{name}"
        if full in shapes:
            claim = mean if parts is None else Claim(len(shapes[full]), axis, parts)
            made.append((full, claim))

    width = _width(block, shapes[f"{place.path}.{block.output}.weight"])
    add(
        block.output,
        "weight",
        (Part(site, nodes, nodes, width),) if structured else None,
        0 if block.transposed else 1,
    )
    add(block.output, "bias", None)
    for rows, module in (entry.split() for entry in block.inputs):
        shape = shapes.get(f"{place.path}.{module}.weight")
        if shape is None:
            continue
        total = sum(units[row] for row in rows)
        entries = shape[1 if block.transposed else 0]
        if entries % total:
            raise UserError(
                f"{place.path}.{module}.weight has {entries} rows, which {total} nodes cannot share equally"
            )
        parts = tuple(
            Part(
                site,
                nodes,
                units[row] if structured or row != "v" else 1,
                entries * units[row] // total,
            )
            for row in rows
        )
        add(module, "weight", parts, 1 if block.transposed else 0)
        add(module, "bias", parts)
    for module in block.norms:
        add(module, "weight", None)
        add(module, "bias", None)
    return made


def _key_value_heads(config: "PretrainedConfig", heads: int) -> int:
    return getattr(config, "num_key_value_heads", None) or heads


def _width(block: Block, shape: tuple[int, ...]) -> int:
    """Entries of the input of the block's output projection, from the shape of its weight."""
    return shape[0 if block.transposed else 1]


def _places(config: "PretrainedConfig", shapes: Mapping[str, tuple[int, ...]]) -> list[_Place]:
    """Every block of every layer, layers numbered through all stacks."""
    stacks = ARCHITECTURES.get(config.model_type) or (_recognised(config, shapes),)
    places: list[_Place] = []
    layer = 0
    for stack in stacks:
        for path in _layers(stack.path, shapes):
            for block in stack.blocks:
                shape = shapes.get(f"{path}.{block.output}.weight")
                if shape is None:
                    raise UserError(
                        f"{path}.{block.output}.weight is missing: this is not a whole {config.model_type}"
                    )
                width = _width(block, shape)
                nodes = width if block.node == "neuron" else int(config.num_attention_heads)
                if width % nodes:
                    raise UserError(
                        f"{path}.{block.output} takes {width} channels, which {nodes} heads cannot share"
                    )
                places.append(_Place(path, block, Site(layer, block.node), nodes))
            layer += 1
    if not places:
        expected = ", ".join(stack.path for stack in stacks)
        raise UserError(
            f"no layer of a {config.model_type} found (expected parameters below {expected})"
        )
    return places


def _layers(path: str, shapes: Mapping[str, tuple[int, ...]]) -> list[str]:
    """The paths of a stack's layers, in the order of their numbers."""
    pattern = re.compile(re.escape(path).replace(r"\{\}", r"(\d+)") + r"\.")
    matches = [match for match in map(pattern.match, shapes) if match]
    numbers = {tuple(map(int, match.groups())) for match in matches}
    return [path.format(*layer) for layer in sorted(numbers)]


def _recognised(config: "PretrainedConfig", shapes: Mapping[str, tuple[int, ...]]) -> Stack:
    """The stack of an undescribed model, put together from blocks that described architectures have.

    It must explain every matrix of every numbered layer. Among several that do (they differ in their normalisations),
    the one that explains most and misses least is taken, if it is the only one.
    """
    numbered = [
        match for match in (re.match(r"(.*?)\.\d+\.(.+)", name) for name in shapes) if match
    ]
    matrices = {match[0] for match in numbered if len(shapes[match[0]]) > 1}
    blocks = dict.fromkeys(
        block for stacks in ARCHITECTURES.values() for stack in stacks for block in stack.blocks
    )
    hidden = getattr(config, "hidden_size", None)
    fits: dict[tuple[int, int], list[Stack]] = {}
    for path in sorted({match[1] + ".{}" for match in numbered}):
        for head, neuron in product(blocks, blocks):
            if (head.node, neuron.node) != ("head", "neuron") or set(head.norms) & set(
                neuron.norms
            ):
                continue
            layers = _layers(path, shapes)
            outputs = [
                (shapes.get(f"{layer}.{block.output}.weight"), block)
                for layer in layers
                for block in (head, neuron)
            ]
            if not all(
                shape and shape[1 if block.transposed else 0] == hidden for shape, block in outputs
            ):
                continue
            explained: set[str] = set()
            missing = 0
            for layer, module in product(layers, [*_modules(head), *_modules(neuron)]):
                names = {f"{layer}.{module}.{kind}" for kind in ("weight", "bias")} & shapes.keys()
                explained |= names
                missing += not names
            if matrices <= explained:
                fits.setdefault((len(explained), -missing), []).append(Stack(path, (head, neuron)))
    best = fits[max(fits)] if fits else []
    if len(best) == 1 and getattr(config, "num_attention_heads", None):
        return best[0]
    number = "more than one" if best else "no"
    raise UserError(
        f"model type {config.model_type!r} is not described and {number} known layer fits it: "
        f'add to ARCHITECTURES in fmn/architectures.py an entry "{config.model_type}" with the path of its layers and '
        'two lines, Block("head", ATTENTION OUTPUT PROJECTION, ("q ...", "k ...", "v ..."), (NORMS...)) and '
        'Block("neuron", DOWN PROJECTION, ("u ...",), (NORMS...))'
    )


def _modules(block: Block) -> list[str]:
    return [block.output, *(entry.split()[1] for entry in block.inputs), *block.norms]
