"""Read and write files of statistics, with records of their origin.

The mask Fisher, with one number for each node, is a Parquet file. The full Fisher and the Gram
matrices are as large as the expert; they are safetensors files, so that a merge can read slices.
The record is JSON in the file's metadata, under ``fmn``. The files' sha256 is in the sidecar.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeVar

from fmn import __version__
from fmn.errors import UserError
from fmn.store.records import Record, parse_record
from fmn.store.stage import check_intact
from fmn.tasks.task import Task

if TYPE_CHECKING:
    from torch import Tensor

    from fmn.fisher.architectures import NodeValues
    from fmn.store.headers import TensorHeader

METADATA = "fmn"  # key in the metadata of Parquet and safetensors


class CheckpointOrigin(Record):
    """The checkpoint of a statistic: its source, pinned to a revision, and its digest.

    `identity`: of what the statistic depends on (`fmn.fisher.published`); a copy of the checkpoint
    that was aligned with a task has another digest, and the same identity.
    """

    source: str = ""
    revision: str = ""
    digest: str
    identity: str = ""


class Metadata(Record):
    """The origin of a statistic.

    Attributes:
        key: its content key.
        data_digest: of the files of the training split; `rows`: of the texts and labels in them.
        definition: of the task.
        threads: those of the CPU.
        precision: which dtype was chosen, where it was to be, and why.
        published: that it was published beside the expert, or why the one there was not taken.
    """

    key: str = ""
    task: str
    model_type: str = ""
    checkpoint: CheckpointOrigin
    data_digest: str = ""
    rows: str = ""
    definition: Task | None = None
    samples: int
    seed: int = 0
    dtype: str = ""
    device: str = ""
    threads: int = 1
    precision: str | None = None
    published: str | None = None
    fmn: str = __version__


class FisherMetadata(Metadata):
    """Metadata of a mask Fisher. `heads`, `neurons`: per layer; of the largest if layers differ."""

    format: Literal[1] = 1
    estimator: str
    stratified: bool = False
    layers: int = 0
    heads: int = 0
    neurons: int = 0
    relative_stderr: float | None = None


class StatisticMetadata(Metadata):
    """Metadata of a statistic with a value per parameter, such as the full Fisher (see `kind`)."""

    format: Literal[2] = 2
    kind: str = "full-fisher"
    estimator: str


class GramMetadata(Metadata):
    """Of Gram matrices. `inputs`: by linear map, the input that it reads; `transposed`: the maps
    whose weights are stored [in, out]."""

    format: Literal[2] = 2
    kind: Literal["gram"] = "gram"
    inputs: dict[str, str]
    transposed: list[str]


M = TypeVar("M", StatisticMetadata, GramMetadata)


def _not_finite(
    what: str, metadata: "FisherMetadata | StatisticMetadata | GramMetadata"
) -> UserError:
    problem = f"{what} is not finite; see that the weights are, or choose --dtype float64"
    return UserError(f"{metadata.task}: {problem}")


def write_fisher(
    path: Path, fisher: "NodeValues", stderr: "NodeValues | None", metadata: FisherMetadata
) -> None:
    """Write a mask Fisher as Parquet: a row per mask node, sorted by (layer, node, index).

    Args:
        fisher: float64 [nodes] for each site.
        stderr: the same for the standard errors, or None where the estimator has none.
    """
    import numpy as np
    import pyarrow as pa
    import pyarrow.parquet as pq

    sites = sorted(fisher)
    for site in sites:
        if not np.isfinite(fisher[site]).all():
            raise _not_finite(f"the Fisher information of layer {site.layer}", metadata)
    counts = [len(fisher[site]) for site in sites]
    columns = {
        "layer": np.repeat(np.array([site.layer for site in sites], np.int16), counts),
        "node": pa.array(np.repeat([site.node for site in sites], counts)).dictionary_encode(),
        "index": np.concatenate([np.arange(count, dtype=np.int32) for count in counts]),
        "fisher": np.concatenate([fisher[site] for site in sites]),
        "stderr": pa.nulls(sum(counts), pa.float64())
        if stderr is None
        else np.concatenate([stderr[site] for site in sites]),
    }
    table = pa.table(columns).replace_schema_metadata(
        {METADATA: metadata.model_dump_json(by_alias=True)}
    )
    pq.write_table(table, path, compression="zstd", write_page_checksum=True)


def read_fisher(path: Path) -> "tuple[NodeValues, NodeValues | None, FisherMetadata]":
    """Read a mask Fisher: (fisher, stderr or None, metadata), float64 [nodes] by site.

    Raises:
        UserError: it is not a mask Fisher, was damaged, or holds a value that cannot be a Fisher
            information (negative, NaN or infinite).
    """
    import numpy as np
    import pyarrow as pa
    import pyarrow.parquet as pq

    from fmn.fisher.architectures import Site

    remedy = "make it again with `fmn fisher`"
    if not path.is_file():
        raise UserError(f"{path}: no such Fisher artifact; make it with `fmn fisher`")
    check_intact(path)
    types = {"layer": pa.int16(), "node": pa.string(), "index": pa.int32(), "fisher": pa.float64()}
    schema = pa.schema({**types, "stderr": pa.float64()})
    try:
        table = pq.read_table(path, page_checksum_verification=True)
        content = json.loads((table.schema.metadata or {})[METADATA.encode()])
        table = table.select(schema.names).cast(schema)
        if not len(table) or any(table[name].null_count for name in types):
            raise ValueError("no rows, or rows without a value")
    except (pa.ArrowException, OSError, KeyError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: not a Fisher artifact, or damaged; {remedy}") from error
    metadata = parse_record(content, FisherMetadata, path, remedy)
    fisher: NodeValues = {}
    stderr: NodeValues = {}
    for (layer, node), rows in table.to_pandas().groupby(["layer", "node"], sort=False):
        place, values = f"{path}: layer {layer}, {node}", rows["fisher"].to_numpy()
        if not np.array_equal(rows["index"], np.arange(len(rows))):
            raise UserError(f"{place}: rows are not numbered 0, 1, 2, ...; {remedy}")
        for number in np.flatnonzero(~((values >= 0) & np.isfinite(values))):
            value = values[number]
            raise UserError(f"{place} {number}: a Fisher information of {value}; {remedy}")
        site = Site(int(layer), node)
        fisher[site], stderr[site] = values, rows["stderr"].to_numpy()
    return fisher, None if table["stderr"].null_count else stderr, metadata


def write_statistic(
    path: Path, tensors: "Mapping[str, Tensor]", metadata: StatisticMetadata | GramMetadata
) -> None:
    """Write a full Fisher or Gram matrices as float32 safetensors."""
    from safetensors.torch import save_file

    narrow = {name: tensors[name].float().contiguous() for name in sorted(tensors)}
    for name, tensor in narrow.items():
        if not tensor.isfinite().all():
            raise _not_finite(name, metadata)
    save_file(narrow, path, {METADATA: metadata.model_dump_json(by_alias=True)})


def read_statistic(
    path: Path, record: type[M], kind: str = ""
) -> "tuple[dict[str, TensorHeader], M]":
    """The places of the tensors of a full Fisher or of Gram matrices, by name, and the metadata.

    Args:
        record: StatisticMetadata or GramMetadata.
        kind: the kind of statistic, which is also the command that computes it; default: the
            record's own.

    Raises:
        UserError: the file is not such a statistic, or was damaged.
    """
    from fmn.store.headers import read_file

    kind = kind or record.model_fields["kind"].default
    remedy = f"make it with `fmn {kind}`"
    if not path.is_file():
        raise UserError(f"{path}: no such {kind} file; {remedy}")
    check_intact(path)
    try:
        headers, stored = read_file(path)
    except UserError as error:
        raise UserError(f"{path}: not a {kind} file, or damaged; {remedy}") from error
    try:
        content = json.loads(stored[METADATA])
        stored_kind = content["kind"]
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: holds no statistic of fmn's; {remedy}") from error
    if stored_kind != kind:
        raise UserError(f"{path}: is a {stored_kind} file, not {kind}; {remedy}")
    return headers, parse_record(content, record, path, remedy)


def digest_values(path: Path) -> str:
    """sha256 of the numbers in a file of statistics; the same whatever its metadata say."""
    if path.suffix == ".safetensors":
        with path.open("rb") as file:
            header = int.from_bytes(file.read(8), "little")
            file.seek(8 + header)
            return hashlib.file_digest(file, "sha256").hexdigest()
    digest = hashlib.sha256()
    for values in read_fisher(path)[:2]:
        for site, nodes in sorted((values or {}).items()):
            digest.update(repr(tuple(site)).encode() + nodes.tobytes())
    return digest.hexdigest()
