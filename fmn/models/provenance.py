"""Where a checkpoint comes from, and how it was fine-tuned; read from its folder's sidecar."""

from pathlib import Path
from typing import Any

from pydantic import Field

from fmn.models.labels import Labels
from fmn.store import artifacts
from fmn.store.records import Record, parse_record
from fmn.store.stage import read_sidecar, sidecar_path


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
