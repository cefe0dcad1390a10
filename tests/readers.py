"""What reads files that somebody else wrote, for `tests.fuzz` and for tests with random content."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

from fmn.errors import UserError
from fmn.evaluate.files import read_metrics
from fmn.fisher import files as statistics
from fmn.merge import recipe
from fmn.rows import images, label_values
from fmn.rows.formats import read_files
from fmn.rows.prepare import prepare
from fmn.rows.sources import find_files
from fmn.sources import adapters, forms
from fmn.store import artifacts, headers
from fmn.store.stage import read_sidecar
from fmn.tasks.task import DatasetSettings, TaskSettings

LONGEST = 2000  # characters of a message


def read_rows(path: Path, **definition: object) -> None:
    """Read a file of rows as columns, and as the rows of a task."""
    files = find_files(DatasetSettings(path=str(path)))
    for table in map(read_files, files.values()):
        for name in table.columns:
            table.values(name, "t")
    prepare("t", TaskSettings.model_validate(definition), files, str(path))


def read_label_values(path: Path) -> None:
    """Read a list of cells as the labels of each kind of task."""
    try:
        cells = json.loads(path.read_bytes())
    except (ValueError, RecursionError):
        return
    values = label_values.plain_values(cells if isinstance(cells, list) else [cells])
    for kind in (None, "multi_label_classification", "regression"):
        definition = TaskSettings.model_validate({"problem_type": kind} if kind else {})
        try:
            labels = label_values.read_labels(values, (), definition, str(path))
            label_values.encode(values, labels, str(path), "column label")
        except UserError as error:
            check(error, path.parent)
    words = [label_values.word_list(value) or [] for value in values]
    label_values.tags(values, words, str(path), "label")


def read_adapter(path: Path) -> None:
    """Read the configuration of an adapter."""
    adapters._problem(headers.read_json(path))
    adapters.base_source(path.parent)


def read_adapter_weights(path: Path) -> None:
    """Read the weights of an adapter."""
    try:
        adapters._tensors(path.parent)
    except UserError as error:
        raise UserError(f"{path.parent}: {error}") from error  # as `adapters.merge` does


def check(error: UserError, folder: Path) -> None:
    """A message is a line that names the file."""
    message = str(error)
    if len(message.splitlines()) != 1 or str(folder) not in message or len(message) > LONGEST:
        raise AssertionError(f"not a line that names the file: {message!r}") from error


READERS: list[tuple[str, Callable[[Path], object]]] = [
    (headers.WEIGHTS, headers.file_headers),
    (headers.INDEX, headers.weight_map),
    (artifacts.SIDECAR, lambda path: read_sidecar(path.parent)),
    ("metrics.json", read_metrics),
    (recipe.RECIPE, lambda path: recipe.read_recipe(path.parent)),
    (headers.WEIGHTS, lambda path: statistics.read_statistic(path, statistics.GramMetadata)),
    ("rows.csv", read_rows),
    ("rows.tsv", read_rows),
    ("rows.jsonl", read_rows),
    ("rows.conll", partial(read_rows, task="token-classification")),
    ("rows.parquet", read_rows),
    ("rows.csv.gz", read_rows),
    ("image.png", lambda path: images.checked([path.read_bytes()], str(path))),
    ("labels.json", read_label_values),
    (forms.ADAPTER_CONFIG, read_adapter),
    (forms.ADAPTER_WEIGHTS[0], read_adapter_weights),
    ("rows.tagged.jsonl", partial(read_rows, task="token-classification")),
]
"""The name of a file, and what reads it. Its number is the first byte of an input of `fuzz`."""


def number(name: str) -> int:
    """The number of what reads a file of this name."""
    return [each for each, _ in READERS].index(name)


def attempt(number: int, content: bytes, folder: Path) -> None:
    """Read bytes as a file of a kind: they are read, or refused in a line."""
    name, read = READERS[number % len(READERS)]
    path = folder / name
    path.write_bytes(content)
    try:
        read(path)
    except UserError as error:
        check(error, folder)
    finally:
        path.unlink()
