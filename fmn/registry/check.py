"""Whether a served model answers as the merged model did when it was evaluated. Knows no MLflow."""

import base64
from collections.abc import Callable, Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from fmn.errors import UserError
from fmn.evaluate.files import Metrics, read_predictions
from fmn.evaluate.metrics import Answers, answers
from fmn.models import labels
from fmn.store import artifacts, stage
from fmn.tasks import dataset
from fmn.tasks.encoding import encode
from fmn.tasks.task import Task

if TYPE_CHECKING:
    import pandas as pd

ROWS, SEED = 32, 0  # so many rows of each task are compared, drawn by this seed
TOLERANCE = 1e-4  # of a probability; of a value, relative to it where it is above one
COARSE = 0.05  # the same, where the model was evaluated in bfloat16
# Compared where no rows are at hand, alone or with the next one.
SENTENCES = (
    "A warm and funny film.",
    "The plot makes no sense at all, and the second half is far too long.",
    "How do I change my password?",
    "Shares fell by 3.5 % on Monday, after the company had warned of a loss of $20 million.",
    "no",
)

Serve = Callable[["pd.DataFrame", str], "pd.DataFrame"]
"""The served model: answers (label, labels, score, probabilities) of a table for a task."""


class Sample(NamedTuple):
    """Texts of a task, a column for each of an example's texts, and the merged model's answers."""

    task: Task
    rows: Sequence[str]  # what messages call them
    texts: Sequence[Sequence[str]]
    answers: Answers


def generated_images() -> list[bytes]:
    """As many small PNG images as there are sentences, each in other colours."""
    from PIL import Image

    files = []
    for number in range(len(SENTENCES)):
        pixels = np.random.default_rng(number).integers(0, 256, (4, 4, 3), dtype=np.uint8)
        file = BytesIO()
        Image.fromarray(pixels).resize((32, 32)).save(file, format="PNG")
        files.append(file.getvalue())
    return files


def as_base64(image: bytes) -> str:
    """The content of an image's file as JSON can hold it."""
    return base64.b64encode(image).decode()


def check_served(
    serve: Serve,
    model: Path,
    file: Path,
    metrics: Metrics,
    tasks: Mapping[str, Task],
    data: Path | None,
) -> None:
    """Refuse a served model that answers otherwise than the merged model was evaluated.

    Args:
        serve: the served model.
        model: the merged model's folder.
        file: its metrics file, with the predictions beside it.
        metrics: the content of that file.
        tasks: the model's tasks by name.
        data: the rows that the metrics are of. Without it, and for tasks without labels, the merged
            model itself answers a few sentences.

    Raises:
        UserError: names the first task and row with another answer; or `data` are other rows.
    """
    import pandas as pd

    sidecar = stage.read_sidecar(file)
    dtype = sidecar.settings.get("evaluate", {}).get("dtype") if sidecar else None
    predictions = read_predictions(file) if data else {}
    for task in tasks.values():
        tolerance = TOLERANCE
        if data and task.name in predictions:
            split, evaluated = next(iter(predictions[task.name].splits.items()))
            sample = _evaluated(task, split, evaluated, metrics, data)
            tolerance = COARSE if dtype in ("bfloat16", "auto") else TOLERANCE
        else:
            sample = _sentences(task, model)
        columns = zip(("text", "text_pair"), sample.texts, strict=False)
        served = serve(pd.DataFrame(dict(columns)), task.name).to_dict("records")
        expected = in_words(sample.task, sample.answers)
        for row, answer, wanted in zip(sample.rows, served, expected, strict=True):
            if not same(sample.task, answer, wanted, tolerance):
                raise UserError(
                    f"{model}: task {task.name}, {row}: the served model answers"
                    f" {_shown(answer)}, in evaluation it was {_shown(wanted)}; evaluate it again"
                    " with `fmn evaluate`. Nothing was registered"
                )


def _evaluated(task: Task, split: str, expected: Answers, metrics: Metrics, data: Path) -> Sample:
    """A sample of the rows that the metrics are of, with the answers to them."""
    from fmn.tasks import batches

    files = dataset.split_files(data, task, split)
    digest = artifacts.digest_bytes("".join(map(artifacts.digest_file, files)).encode())
    if digest != metrics.data[task.name].splits[split]:
        problem = f"not the rows of {task.name} that the metrics are of"
        raise UserError(f"{files[0]}: {problem}; give the --data of `fmn evaluate`")
    table = dataset.read_split(data, task, split)
    rows = np.sort(batches.select(np.zeros(table.num_rows), ROWS, SEED))
    texts = [table[column].take(rows).to_pylist() for column in task.text_columns]
    sample = Answers(*(part[rows] for part in expected))
    return Sample(task, [f"{split} row {row}" for row in rows], texts, sample)


def _sentences(task: Task, model: Path) -> Sample:
    """The built-in sentences, as the merged model answers them now."""
    import pyarrow as pa

    from fmn.models.predict import predict

    classifier, tokenizer, complete, _ = labels.load_expert(
        model / "tasks" / task.name, task, None, "cpu"
    )
    texts = [SENTENCES, (*SENTENCES[1:], SENTENCES[0])][: len(task.text_columns)]
    table = pa.table(dict(zip(task.text_columns, texts, strict=True)))
    logits = predict(classifier, encode(tokenizer, task, table), device="cpu", dtype="float32")
    rows = [f"the text {text!r}" for text in SENTENCES]
    return Sample(complete, rows, texts, answers(complete, logits, np.zeros(len(rows), np.int64)))


def in_words(task: Task, answers: Answers) -> list[dict[str, Any]]:
    """Answers as the served model gives them: labels, score, probabilities by label."""
    rows = []
    for predicted, scores in zip(answers.predicted, answers.scores, strict=True):
        chosen = np.flatnonzero(predicted) if task.multi_label else [int(predicted)]
        labels = [] if task.regression else [task.labels[label] for label in chosen]
        probabilities = dict(zip(task.labels, scores.tolist(), strict=not task.regression))
        rows.append({"labels": labels, "score": float(max(scores)), "probabilities": probabilities})
    return rows


def same(
    task: Task, served: Mapping[Any, Any], expected: Mapping[Any, Any], tolerance: float = TOLERANCE
) -> bool:
    """Whether the served model's answer is the expected one, both as `in_words` gives them.

    Scores may differ by `tolerance`, and labels where that decides between them.
    """
    if abs(served["score"] - expected["score"]) > tolerance * max(1.0, abs(expected["score"])):
        return False
    shares, wanted = served["probabilities"], expected["probabilities"]
    if shares.keys() != wanted.keys():
        return False
    if any(abs(shares[name] - wanted[name]) > tolerance for name in wanted):
        return False
    differing = [shares[name] for name in {*served["labels"]} ^ {*expected["labels"]}]
    if task.multi_label:
        return all(abs(share - task.threshold) <= tolerance for share in differing)
    return not differing or bool(max(differing) - min(differing) <= tolerance)


def _shown(answer: Mapping[Any, Any]) -> str:
    """An answer, for a message."""
    if not answer["probabilities"]:
        return f"{answer['score']:.6g}"
    return f"{', '.join(answer['labels']) or 'none'} ({answer['score']:.4f})"
