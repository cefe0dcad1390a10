"""Where a checkpoint comes from, and how it was fine-tuned.

Its folder's sidecar says so; the weights tell whether that can be true.
"""

from collections.abc import Iterator, Mapping
from itertools import combinations
from math import prod
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from pydantic import Field

from fmn.errors import UserError
from fmn.models import checkpoints
from fmn.models.headers import tensor_headers
from fmn.models.labels import Labels
from fmn.store import artifacts
from fmn.store.records import Record, parse_record
from fmn.store.stage import read_sidecar, sidecar_path
from fmn.tasks.kinds import KindName

if TYPE_CHECKING:
    from torch import Tensor

SAMPLE = 1 << 14  # values of each matrix that are compared
# Distances, as `distance` measures them: fine-tuning moves weights by a few hundredths of their
# size, and unrelated models are 1.41 apart.
UNRELATED, DOUBTFUL = 1.3, 0.7


class Lineage(Record):
    """Where a checkpoint comes from: its source as given to `fmn fetch`, and the source pinned."""

    source: str
    revision: str


class CheckpointInfo(Lineage):
    """What `fmn fetch` reports.

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
    """Where a checkpoint comes from."""
    sidecar = read_sidecar(folder)
    if sidecar is None:
        return Lineage(source="folder", revision=f"sha256:{artifacts.digest_folder(folder)}")
    if sidecar.stage == "fetch":
        return parse_record(sidecar.info, Lineage, sidecar_path(folder))
    output = f"{sidecar.stage}:{sidecar.key[:16]}"
    return Lineage(source=output, revision=output)


def training_metadata(folder: Path) -> TrainingInfo | None:
    """How a checkpoint was fine-tuned; None if fmn did not fine-tune it."""
    sidecar = read_sidecar(folder)
    if sidecar is None or sidecar.stage != "finetune":
        return None
    return parse_record(sidecar.info, TrainingInfo, sidecar_path(folder))


def tuning(folder: Path) -> dict[str, Any]:
    """The settings that fmn fine-tuned a checkpoint with; empty if it did not."""
    sidecar = read_sidecar(folder)
    return dict(sidecar.settings["finetune"]) if sidecar and sidecar.stage == "finetune" else {}


def rows_tuned_on(expert: Path) -> tuple[int | None, int]:
    """How many training rows an expert was fine-tuned on, and the seed that drew them.

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
                # A classifier may have made a pooler of its own.
                if headers[own].file == file and not name.startswith("pooler."):
                    rows = max(1, SAMPLE // max(1, prod(headers[own].shape[1:])))
                    values[name] = tensors.get_slice(own)[:rows].float()
    return values


def distance(first: Sample, second: Sample) -> float | None:
    """How far two encoders are apart: the median over the linear maps of `|a - b| / size`.

    Size is the root of the mean of `|a|**2` and `|b|**2`, so that equal maps are 0 apart, and
    unrelated ones the root of 2. None if they have no maps in common that are not zero.
    """
    distances = []
    for name in first.keys() & second.keys():
        left, right = first[name], second[name]
        size = float(((left**2).sum() + (right**2).sum()) / 2)
        if left.shape == right.shape and size > 0:
            distances.append((float(((left - right) ** 2).sum()) / size) ** 0.5)
    return median(distances) if distances else None


def check_base(expert: Path, base: Path, kind: KindName | None = None) -> list[str]:
    """Whether an expert was fine-tuned from this base, by the distance of their weights.

    Returns:
        what the user should know.

    Raises:
        UserError: it was fine-tuned from another.
    """
    # The base of models with heads is read as it is: taggers have no pooler, and others do.
    apart = distance(sample(expert, kind), sample(base, _of_base(expert, kind)))
    return list(_judged(apart, f"{expert}", f"the base {base}"))


def check_common_base(experts: Mapping[str, Path], base: Path | None = None) -> list[str]:
    """The same for experts by task; without their base, they are compared with one another."""
    notes: list[str] = []
    samples = {name: sample(folder) for name, folder in experts.items()}
    places = {name: f"expert {name} ({folder})" for name, folder in experts.items()}
    if base is not None:
        own = sample(base, _of_base(next(iter(experts.values())), None))
        for name, place in places.items():
            notes += _judged(distance(samples[name], own), place, f"the base {base}")
    for first, second in combinations(experts, 2):
        apart = distance(samples[first], samples[second])
        if base is None and (figures := _figures(apart)):
            words = "perhaps they were not fine-tuned from one base"
            notes.append(f"{places[first]} and {places[second]}: {words}: {figures}")
        if apart == 0 and _is_same_encoder(experts[first], experts[second]):
            words = "have the same encoder, weight for weight: one may be there by mistake"
            notes.append(f"{places[first]} and {places[second]} {words}")
    return notes


def _of_base(expert: Path, kind: KindName | None) -> KindName | None:
    """What the base of an expert is read as: models without a head are read as what they are."""
    from fmn.tasks.kinds import KINDS

    kind = kind or checkpoints.kind_in(expert)
    return None if KINDS[kind].has_head else kind


def _figures(apart: float | None) -> str:
    """A distance that is doubtful, in words; else nothing."""
    usual = "of one base they are mostly less than 0.3, of unrelated models about 1.41"
    is_doubtful = apart is not None and apart >= DOUBTFUL
    return f"their weights are {apart:.2f} of their size apart ({usual})" if is_doubtful else ""


def _judged(apart: float | None, expert: str, base: str) -> Iterator[str]:
    """What a distance says of whether an expert was fine-tuned from a base."""
    if not (figures := _figures(apart)):
        return
    if apart is not None and apart >= UNRELATED:
        raise UserError(
            f"{expert}: was not fine-tuned from {base}: {figures}; give the model that it was"
            " fine-tuned from, or an expert of this base"
        )
    yield f"{expert}: perhaps it was not fine-tuned from {base}: {figures}"


def _is_same_encoder(first: Path, second: Path) -> bool:
    """Whether two checkpoints have the same encoder, weight for weight."""
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
