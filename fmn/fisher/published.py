"""Use statistics that are published beside an expert, and check that they belong to it.

An expert's folder or repository may have ``fmn/fisher.parquet`` and ``fmn/gram.safetensors``. They
replace a computation if checkpoint, settings and rows are the same. docs/statistics.md describes
the files.
"""

import hashlib
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fmn.errors import UserError
from fmn.fisher import files
from fmn.fisher.files import GramMetadata, Metadata
from fmn.models import checkpoints, loading
from fmn.models.checkpoints import EMBEDDING_FILES, FISHER, GRAM, VOCABULARY_FILES
from fmn.store import artifacts
from fmn.store.headers import TensorHeader, tensor_headers
from fmn.tasks.task import Task

if TYPE_CHECKING:
    import pyarrow as pa

NAMES: Mapping[str, str] = {"fisher": FISHER, "gram": GRAM}
"""Where the statistic of a stage lies beside an expert."""
_DENSE = tuple(name for name in EMBEDDING_FILES if "Dense" in name)
_FILES = (*VOCABULARY_FILES, "preprocessor_config.json", "1_Pooling/config.json", *_DENSE)
_CHUNK = 1 << 24
PROBE = "It's a Fine film at the caf\u00e9 \u6f22\u5b57"
"""A text whose tokens tell how case, accents, Chinese letters and the ends of texts are read."""


def identity(checkpoint: Path) -> str:
    """sha256 of the weights and settings of a checkpoint that its statistics depend on.

    It covers the tensors by their names in the base model, the files of vocabulary, image
    processing and pooling, and the settings of tokenisation. It does not depend on the division
    into files, nor on the order of the outputs, which `fmn fetch` may change (it also turns the
    single logit of a binary task into two outputs).

    Raises:
        UserError: the checkpoint cannot be used.
    """
    config, headers = checkpoints.load_config(checkpoint), tensor_headers(checkpoint)
    names = checkpoints.encoder_names(config, headers)
    last = ""
    with suppress(UserError):  # a head that does not end in a linear map has ordered outputs
        last = checkpoints.head_map(config) if names.head else ""
    digest = hashlib.sha256(str(config.model_type).encode())
    for name, stored in sorted((names.encoder | names.head).items()):
        if name not in (f"{last}.weight", f"{last}.bias"):
            digest.update(f"\n{name} {headers[stored].dtype} {headers[stored].shape}\n".encode())
            _read(headers[stored], digest.update)
    outputs: list[bytes] = []
    for name in (f"{last}.weight", f"{last}.bias"):
        if stored := names.head.get(name, ""):
            rows = _rows(headers[stored])
            outputs = [a + b for a, b in zip(outputs, rows, strict=True)] if outputs else rows
    for row in sorted(filter(any, outputs)):  # a row of zeros stands for "not the other"
        digest.update(row)
    for file in _FILES:
        if (checkpoint / file).is_file():
            digest.update(artifacts.digest_file(checkpoint / file).encode())
    if any((checkpoint / file).is_file() for file in VOCABULARY_FILES):
        tokens = loading.load_tokenizer(checkpoint, config)(PROBE)["input_ids"]
        digest.update(repr(list(tokens)).encode())
    if (checkpoint / "modules.json").is_file():
        from fmn.models import embedding

        digest.update(embedding.read_modules(checkpoint).prompt.encode())
    return digest.hexdigest()


def _read(header: TensorHeader, take: Callable[[bytes], object]) -> None:
    with header.file.open("rb") as file:
        file.seek(header.start)
        left = header.end - header.start
        while left:
            part = file.read(min(left, _CHUNK))
            take(part)
            left -= len(part)


def _rows(header: TensorHeader) -> list[bytes]:
    """The bytes of each row of a tensor."""
    parts: list[bytes] = []
    _read(header, parts.append)
    content, count = b"".join(parts), header.shape[0]
    width = len(content) // count
    return [content[row * width : (row + 1) * width] for row in range(count)]


def rows_digest(task: Task, table: "pa.Table") -> str:
    """sha256 of the texts and labels of rows.

    It does not depend on the rows' file, the columns' names, or the order of the task's labels.
    """
    digest = hashlib.sha256()
    for name in task.text_columns:
        digest.update(repr(table[name].to_pylist()).encode())
    if "label" in table.column_names:
        values = table["label"].to_pylist()
        if task.labels:
            values = [_names(task, value) for value in values]
        digest.update(repr(values).encode())
    return digest.hexdigest()


def _names(task: Task, label: Any) -> Any:
    """The name of a label, or of each label in a list; other values stay as they are."""
    if isinstance(label, list):
        names = [_names(task, each) for each in label]
        return sorted(names) if task.multi_label else names
    return task.labels[label] if 0 <= label < len(task.labels) else label


def misfit(path: Path, wanted: Mapping[str, Any], *, any_rows: bool, any_dtype: bool) -> str | None:
    """The reason why a published statistic cannot replace the wanted one; None if it can.

    Args:
        path: the statistic's file.
        wanted: the entries of the metadata of the one that would be computed.
        any_rows, any_dtype: whether it may be of other rows, or in another dtype.
    """
    try:
        stored = read(path)
    except UserError as error:
        return str(error)
    own = wanted["checkpoint"].identity
    if stored.checkpoint.identity != own:
        return "of other weights than the expert's, or of texts that were read otherwise"
    settings = ["estimator", "stratified", "samples", "seed", *([] if any_dtype else ["dtype"])]
    for name in settings:
        value, other = getattr(stored, name, None), wanted.get(name)
        if value != other:
            return f"of {name} {value}, and {other} is asked for"
    if any_rows:
        return None
    if stored.rows != wanted["rows"]:
        return "of other training rows; `published: any` takes it"
    for name in ("task", "problem_type", "max_length"):
        if getattr(stored.definition, name, None) != getattr(wanted["definition"], name):
            return f"of a task of another {name}; `published: any` takes it"
    return None


def read(path: Path) -> Metadata:
    """The metadata of a published statistic; raises as `fmn.fisher.files` does."""
    if path.suffix == ".parquet":
        return files.read_fisher(path)[-1]
    return files.read_statistic(path, GramMetadata)[-1]


def take(path: Path, out: Path, changes: Mapping[str, Any]) -> None:
    """Copy a published statistic; `changes` to its metadata name this run's expert and task."""
    if path.suffix == ".parquet":
        values, stderr, of_fisher = files.read_fisher(path)
        files.write_fisher(out, values, stderr, of_fisher.model_copy(update=dict(changes)))
    else:
        from safetensors.torch import load_file

        of_gram = files.read_statistic(path, GramMetadata)[-1]
        files.write_statistic(out, load_file(path), of_gram.model_copy(update=dict(changes)))


def check(checkpoint: Path, fisher: Path | None, gram: Path | None) -> None:
    """Raise a UserError if statistics do not belong to a checkpoint."""
    if not fisher and not gram:
        raise UserError(
            f"{checkpoint}: is no merged model; give one, or the statistics of an expert (--fisher,"
            " --gram), which are put beside it"
        )
    own = identity(checkpoint)
    for path in (fisher, gram):
        if path and read(path).checkpoint.identity != own:
            raise UserError(f"{path}: of another checkpoint than {checkpoint}; make it again")
