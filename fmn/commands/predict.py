"""The command `predict`: answer one input, a file or standard input, with a folder or a version."""

import base64
import csv
import json
import sys
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Annotated, Any, TextIO

from cyclopts import Parameter

from fmn.commands.options import Json
from fmn.commands.shown import answer_lines, print_json
from fmn.errors import UserError
from fmn.models.stages import (
    Answer,
    Completion,
    Embedding,
    Input,
    Prediction,
    Similarity,
    Tags,
    answers,
)
from fmn.terminal import loading, say

BATCH = 64  # rows that a registered version answers at once
_STDIN = Path("-")
_KINDS: Mapping[str, type[Answer]] = {
    "spans": Tags,
    "probabilities": Prediction,
    "embedding": Embedding,
    "text": Completion,
}
"""The type of an answer, by a column that only its kind of task has."""


def predict(
    model: str,
    text: str | None = None,
    text_pair: str | None = None,
    *,
    task: str,
    image: Path | None = None,
    file: Annotated[
        Path | None, Parameter(name=["--file", "-f"], allow_leading_hyphen=True)
    ] = None,
    as_json: Json = False,
) -> None:
    """Answer a text, a pair of texts or an image with a merged model; or all texts of a file.

    In a file or standard input, every line is a text (with a tab between two texts); a .csv, .tsv
    or .jsonl file has columns text and text_pair. Each answer is a line; with --json, a JSON object
    in a line.

    Args:
        model: folder of the merged model, or models:/NAME/VERSION or models:/NAME@ALIAS
        text: the text; for a task that generates texts, the prompt; default: the lines of a pipe
        text_pair: the second text, for a task of pairs
        task: the task
        image: the file of an image, for a task of images
        file: a file of texts; -: standard input
    """
    loading()
    is_piped = (text, image, file) == (None, None, None) and not sys.stdin.isatty()
    has_many = file is not None or is_piped
    if file and (text or image):
        raise UserError(f"--file {file}: give it alone, without a text or --image")
    inputs = map(_checked, _read(file) if has_many else [Input(text, text_pair, image)])
    is_registered = model.startswith("models:")
    answering = _served(model, inputs, task) if is_registered else answers(
        Path(model), inputs, task=task
    )  # fmt: skip
    for answer in answering:
        if as_json:
            print_json(answer.model_dump(mode="json"), indent=None if has_many else 1)
        else:
            lines = answer_lines(answer)
            say(*([" | ".join(lines)] if has_many else lines))


def _checked(row: Input) -> Input:
    """An input whose texts are UTF-8; UserError for another."""
    for text in (row.text, row.text_pair):
        try:
            (text or "").encode()
        except UnicodeEncodeError as error:
            raise UserError(f"text {text!a:.60}: is not UTF-8; write it as UTF-8") from error
    return row


def _read(file: Path | None) -> Iterator[Input]:
    """Read the inputs from a file, or from standard input."""
    if file is None or file == _STDIN:
        yield from _lines(sys.stdin)
        return
    try:
        with file.open(encoding="utf-8", newline="") as opened:
            yield from _rows(opened, file)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        problem = getattr(error, "strerror", None) or "is not UTF-8"
        problem = f"not csv ({error})" if isinstance(error, csv.Error) else problem
        raise UserError(f"{file}: {problem}; give a file of texts") from error


def _rows(opened: TextIO, file: Path) -> Iterator[Input]:
    suffix = file.suffix.lower()
    if suffix in (".csv", ".tsv"):
        table = csv.DictReader(opened, delimiter="\t" if suffix == ".tsv" else ",")
        yield from (_row(row, f"{file}:{table.line_num}") for row in table)
    elif suffix in (".jsonl", ".ndjson"):
        for number, line in enumerate(opened, 1):
            try:
                row = json.loads(line)
            except ValueError as error:
                raise UserError(f"{file}:{number}: not JSON; write an object a line") from error
            yield _row(row if isinstance(row, dict) else {}, f"{file}:{number}")
    else:
        yield from _lines(opened)


def _row(row: Mapping[str, Any], place: str) -> Input:
    if not isinstance(row.get("text"), str):
        names = ", ".join(map(str, row)) or "none"
        raise UserError(f"{place}: no column text but {names}; call the texts text, text_pair")
    return Input(row["text"], row.get("text_pair"))


def _lines(lines: Iterable[str]) -> Iterator[Input]:
    for line in lines:
        text, tab, pair = line.rstrip("\r\n").partition("\t")
        yield Input(text, pair if tab else None)


def _served(source: str, inputs: Iterator[Input], task: str) -> Iterator[Answer]:
    """The answers of a registered version, batch by batch."""
    import pandas as pd

    from fmn.registry import tracking

    version = tracking.pin(source)
    with tracking.connection(creates=False):
        serve = tracking.load_served_model(version)
    while batch := list(islice(inputs, BATCH)):
        rows = [_served_row(each) for each in batch]
        with tracking.connection():  # turns errors of the model into a UserError
            table = serve(pd.DataFrame(rows), task)
        for row in table.to_dict(orient="records"):
            yield _as_answer({str(name): value for name, value in row.items()})


def _served_row(row: Input) -> dict[str, Any]:
    image = base64.b64encode(row.image.read_bytes()).decode() if row.image else None
    values = {"text": row.text, "text_pair": row.text_pair, "image": image}
    return {name: value for name, value in values.items() if value is not None}


def _as_answer(content: Mapping[str, Any]) -> Answer:
    """Convert a row of a served model's answers to the type of `fmn.models.stages.predict`."""
    kind = next(kind for column, kind in _KINDS.items() if column in content)
    present = {name: value for name, value in content.items() if value is not None}
    if kind is Prediction:
        present.setdefault("label", "score")  # of a regression task
    if kind is Embedding and "score" in present:  # of two texts
        kind = Similarity
    return kind.model_validate(present)
