"""The origin of a checkpoint, and the settings of its fine-tuning.

Both come from the sidecar in its folder. Its weights show whether the base named there can be true.
"""

import re
from collections.abc import Iterator, Mapping
from functools import cache
from itertools import combinations
from math import prod, sqrt
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from pydantic import Field

from fmn.errors import UserError
from fmn.models import checkpoints, loading
from fmn.models.labels import Labels
from fmn.store import artifacts
from fmn.store.headers import tensor_headers
from fmn.store.records import Record, parse_record
from fmn.store.stage import read_sidecar, sidecar_path
from fmn.tasks.kinds import KindName
from fmn.tasks.task import Task, in_a_line

if TYPE_CHECKING:
    from torch import Tensor

SAMPLE = 1 << 14  # values of each matrix that are compared
# After fine-tuning, weights mostly correlate with the base above 0.95. Unrelated models correlate
# by chance alone: below UNRELATED, or four standard errors if few values are compared.
UNRELATED, DOUBTFUL = 0.05, 0.75


# Sizes that merged models must share, under names that every configuration has.
_TRAITS = (
    *("model_type", "hidden_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "head_dim", "intermediate_size"),
    *("max_position_embeddings", "type_vocab_size", "hidden_act"),
)
# Further entries of a configuration that change what the encoder computes from the same weights.
_COMPUTED = re.compile(
    "(?!classifier|summary|pooler)"
    "((rope|rotary|no_rope|sliding_window|layer_types|attention_(types|window)|window_size"
    "|local_attention|is_decoder|use_bidirectional|scale|query_pre_attn|relative|max_relative"
    "|pos_att|position_b|alibi|use_parallel|parallel_attn|qk_layernorm|do_layer_norm"
    "|apply_residual|feed_forward_proj)"
    r"|\w*(eps|epsilon|_act|act_fn|activation|activation_function|softcapping|multiplier"
    r"|logits?_scal\w+)$)"
)


class Lineage(Record):
    """Where a checkpoint comes from: its source as given to `fmn fetch`, and the source pinned."""

    source: str
    revision: str


class CheckpointInfo(Lineage):
    """The result of `fmn fetch`.

    Attributes:
        is_converted: whether the weights were pickled.
        labels: how the outputs stood for the labels of a task, before they were put into its order.
        notes: what was changed in the checkpoint that Transformers would not change by itself.
    """

    model_type: str
    is_converted: bool = False
    labels: Labels | None = None
    notes: list[str] = Field(default_factory=list)

    @property
    def messages(self) -> list[str]:
        """What the user should know of the checkpoint."""
        return [*self.notes, *(self.labels.notes if self.labels else ())]


class TrainingInfo(Record):
    """What `fmn finetune` reports of an expert.

    Attributes:
        base: where the base model comes from.
        data_digest: digest of the training split.
        examples: training rows that were used; `seed` drew them.
        threads: of the CPU. Sums in another number of threads round otherwise.
        loss: mean over the last tenth of the steps.
    """

    task: str
    examples: int
    seed: int
    base: Lineage
    data_digest: str
    threads: int
    steps: int
    loss: float


def lineage(folder: Path) -> Lineage:
    """Read the origin of a checkpoint."""
    sidecar = read_sidecar(folder)
    if sidecar is None:
        return Lineage(source="folder", revision=f"sha256:{artifacts.digest_folder(folder)}")
    if sidecar.stage == "fetch":
        return parse_record(sidecar.info, Lineage, sidecar_path(folder))
    output = f"{sidecar.stage}:{sidecar.key[:16]}"
    return Lineage(source=output, revision=output)


def training_metadata(folder: Path) -> TrainingInfo | None:
    """Read how a checkpoint was fine-tuned; None if fmn did not fine-tune it."""
    sidecar = read_sidecar(folder)
    if sidecar is None or sidecar.stage != "finetune":
        return None
    return parse_record(sidecar.info, TrainingInfo, sidecar_path(folder))


def tuning(folder: Path) -> dict[str, Any]:
    """The settings that fmn fine-tuned a checkpoint with; empty if it did not."""
    sidecar = read_sidecar(folder)
    return dict(sidecar.settings["finetune"]) if sidecar and sidecar.stage == "finetune" else {}


def rows_tuned_on(expert: Path) -> tuple[int | None, int]:
    """The number of training rows an expert was fine-tuned on, and the seed of their draw.

    (None, 0), which stands for all rows, if that is not known.
    """
    training = training_metadata(expert)
    return (training.examples, training.seed) if training else (None, 0)


# ---------------------------------------------------------------------------------------------
# By content

Sample = Mapping[str, "Tensor"]
"""Values of the linear maps of an encoder, by their names in the base model."""


def sample(folder: Path, kind: KindName | None = None) -> Sample:
    """The first values of every linear map of a checkpoint's encoder, at most `SAMPLE` of each.

    Args:
        kind: what the checkpoint is read as; default: its own kind.
    """
    from safetensors import safe_open

    config, headers = checkpoints.load_config(folder), tensor_headers(folder)
    kind = kind or checkpoints.kind_in(folder, config)
    stored = checkpoints.stored_names(folder, config, kind).encoder
    maps = {name: stored[name] for name in checkpoints.linear_maps(config, kind) if name in stored}
    values = {}
    for file in {headers[name].file for name in maps.values()}:
        with safe_open(file, framework="pt") as tensors:
            for name, own in maps.items():
                # Fine-tuning may have added a pooler to a classifier.
                if headers[own].file == file and not name.startswith("pooler."):
                    rows = max(1, SAMPLE // max(1, prod(headers[own].shape[1:])))
                    values[name] = tensors.get_slice(own)[:rows].float()
    return values


class Likeness(NamedTuple):
    """How alike two encoders are: the correlation of so many of their weights."""

    correlation: float
    weights: int

    @property
    def is_doubtful(self) -> bool:
        """Whether the two encoders may come from different bases."""
        return self.correlation < DOUBTFUL

    @property
    def is_unrelated(self) -> bool:
        """Whether the two encoders surely come from different bases."""
        return self.correlation < max(UNRELATED, 4 / sqrt(self.weights))

    def __str__(self) -> str:
        usual = "of one base it is mostly above 0.95, of unrelated models about 0"
        return f"the correlation of their weights is {self.correlation:.2f} ({usual})"


def likeness(first: Sample, second: Sample) -> Likeness | None:
    """The mean over the linear maps, by size, of the cosine between the two encoders' values.

    None if they have no maps in common that are not zero.
    """
    total, count = 0.0, 0
    for name in first.keys() & second.keys():
        left, right = first[name], second[name]
        if left.shape == right.shape and (size := float(left.norm() * right.norm())) > 0:
            total += left.numel() * float((left * right).sum()) / size
            count += left.numel()
    return Likeness(total / count, count) if count else None


def check_base(expert: Path, base: Path, kind: KindName | None = None) -> list[str]:
    """Check by the weights that an expert was fine-tuned from a base.

    Returns:
        notes for the user about doubts.

    Raises:
        UserError: the expert was fine-tuned from another base.
    """
    # The base of models with heads is read as it is: taggers have no pooler, and others do.
    alike = likeness(sample(expert, kind), sample(base, _of_base(expert, kind)))
    return [*_judged(alike, f"{expert}", f"the base {base}"), *_untrained(alike, expert, base)]


def check_common_base(experts: Mapping[str, Path], base: Path | None = None) -> list[str]:
    """Check by the weights that experts, by task, have one base; returns notes about doubts.

    Experts with the same encoder are noted too. Without the base, the experts are compared with one
    another.

    Raises:
        UserError: an expert was fine-tuned from another base.
    """
    notes: list[str] = []
    samples = {name: sample(folder) for name, folder in experts.items()}
    places = {name: f"expert {name} ({folder})" for name, folder in experts.items()}
    if base is not None:
        own = sample(base, _of_base(next(iter(experts.values())), None))
        for name, place in places.items():
            alike = likeness(samples[name], own)
            notes += _judged(alike, place, f"the base {base}")
            notes += _untrained(alike, experts[name], base)
    for first, second in combinations(experts, 2):
        pair = f"{places[first]} and {places[second]}"
        alike = likeness(samples[first], samples[second])
        if base is None and alike and alike.is_doubtful:
            notes.append(f"{pair}: perhaps they were not fine-tuned from one base: {alike}")
        if _is_same_encoder(alike, experts[first], experts[second]):
            words = "have the same encoder, weight for weight: one may be there by mistake"
            notes.append(f"{pair} {words}")
    return notes


def _of_base(expert: Path, kind: KindName | None) -> KindName | None:
    """What the base of an expert is read as: models without a head are read as what they are."""
    from fmn.tasks.kinds import KINDS

    kind = kind or checkpoints.kind_in(expert)
    return None if KINDS[kind].has_head else kind


def _judged(alike: Likeness | None, expert: str, base: str) -> Iterator[str]:
    """A note if an expert may have another base; UserError if it surely has."""
    if alike and alike.is_unrelated:
        raise UserError(
            f"{expert}: was not fine-tuned from {base}: {alike}; give the model that it was"
            " fine-tuned from, or an expert of this base"
        )
    if alike and alike.is_doubtful:
        yield f"{expert}: perhaps it was not fine-tuned from {base}: {alike}"


def _untrained(alike: Likeness | None, expert: Path, base: Path) -> list[str]:
    """A note if an expert's encoder is its base's."""
    if not _is_same_encoder(alike, expert, base):
        return []
    return [f"{expert}: has the encoder of the base {base}, weight for weight: was it fine-tuned?"]


def _is_same_encoder(alike: Likeness | None, first: Path, second: Path) -> bool:
    """Whether two checkpoints, alike by a sample of weights, have the same, weight for weight."""
    if not alike or alike.correlation < 0.999:
        return False
    sides = []
    for folder in (first, second):
        headers, config = tensor_headers(folder), checkpoints.load_config(folder)
        names = checkpoints.stored_names(folder, config, checkpoints.kind_in(folder, config))
        sides.append({name: headers[stored] for name, stored in names.encoder.items()})
    left, right = sides
    return all(
        checkpoints.equal(left[name], right[name])
        for name in left.keys() & right.keys()
        if not name.startswith("pooler.")
    )


def check_experts(
    experts: Mapping[str, Path], tasks: Mapping[str, Task], base: Path | None = None
) -> list[str]:
    """Refuse experts that cannot be merged, from headers and small files alone.

    All must have the architecture, sizes and encoder tensors of the base (or of the first expert)
    and mean the same by the same token, and each needs a head that fits its task. Raises
    `UserError` that names the task, the folder and what differs.

    Returns:
        what the user should know of them.
    """
    if not experts:
        raise UserError("no experts were given; name at least one, TASK=DIR")
    folders = {"the base": base} if base is not None else {}
    folders |= experts
    expected: dict[str, Any] = {}
    kinds = {name: task.task for name, task in tasks.items()}
    for name, folder in folders.items():
        try:
            kind = kinds.get(name) or next(iter(kinds.values()), None)  # of the base
            traits = _traits(folder, tasks.get(name), kind)
        except UserError as error:
            raise UserError(f"{name}: {error}") from error
        expected = expected or traits
        for trait in traits | expected if traits != expected else ():
            value, other = traits.get(trait, "absent"), expected.get(trait, "absent")
            if value != other:
                raise UserError(
                    f"{name}: {folder} and {next(iter(folders.values()))} were not fine-tuned from"
                    f" one base: {trait} is {value}, not {other}; choose experts of the same base"
                )
    embedding = {name: experts[name] for name, task in tasks.items() if task.loss == "embedding"}
    if embedding:
        from fmn.models.embedding import check_agreement

        check_agreement(embedding)
    return check_vocabularies(folders)


def check_vocabularies(folders: Mapping[str, Path]) -> list[str]:
    """Refuse checkpoints that do not mean the same by one token; notes tokens that some lack.

    Raises:
        UserError: names the tokens, or those that no tokenizer has together.
    """
    ids: dict[str, int] = {}
    owners: dict[int, tuple[str, str]] = {}  # by id: a token, and the model that has it
    vocabularies: dict[str, Mapping[str, int]] = {}
    for name, folder in folders.items():
        try:
            tokens = vocabularies[name] = loading.vocabulary(folder)
        except UserError as error:
            raise UserError(f"{name}: {error}") from error
        for token, number in sorted(tokens.items()):
            other, owner = owners.setdefault(number, (token, name))
            if ids.setdefault(token, number) != number:
                problem = f"the id of token {token!r:.40} is {number}, not {ids[token]}"
            elif token != other:
                problem = (
                    f"the token {token!r:.40} has id {number}, that of {other!r:.40} ({owner})"
                )
            else:
                continue
            remedy = "choose experts that mean the same by each token"
            raise UserError(f"{name}: {folder}: {problem}; {remedy}")
    lacking = {name: sorted(ids.keys() - tokens.keys()) for name, tokens in vocabularies.items()}
    lacking = {name: tokens for name, tokens in lacking.items() if tokens and ids}
    if not lacking:
        return []
    words = "; ".join(f"{name} lacks {in_a_line(tokens)}" for name, tokens in lacking.items())
    if len(lacking) == len(folders):
        raise UserError(f"no tokenizer has all tokens: {words}; add them to one expert")
    return [f"vocabularies differ: {words}; embeddings of such tokens come from those with them"]


@cache
def _entries(model_type: str) -> frozenset[str]:
    """The entries of the configurations of a type of models; none if it has no defaults."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    try:
        return frozenset(CONFIG_MAPPING[model_type]().to_dict())
    except Exception:  # these classes raise many kinds of errors
        return frozenset()


def _traits(folder: Path, task: Task | None, kind: KindName | None) -> dict[str, Any]:
    """What must be equal among checkpoints that are merged, by what messages call it."""
    config = checkpoints.load_config(folder)
    if task is not None:
        checkpoints.check_kind(folder, config, task)
    kind = kind or checkpoints.kind_of(config)
    checkpoints.check_tensors(folder, config, head=task is not None, kind=kind)
    if task is not None and not checkpoints.is_single_logit(config, task):
        checkpoints.check_head(folder, config, task)
    sizes = {name: getattr(config, name, None) for name in _TRAITS}
    known = _entries(config.model_type)  # this version of Transformers does not read others
    entries = config.to_dict().items()
    sizes |= {name: value for name, value in entries if name in known and _COMPUTED.match(name)}
    # Vocabularies may differ (`check_vocabularies`).
    tensors = checkpoints.shapes_but_vocabulary(config, kind)
    shapes = {name: shape for name, shape in tensors.items() if not name.startswith("pooler.")}
    return sizes | shapes
