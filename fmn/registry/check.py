"""Check that a served model answers as the merged model did in its evaluation.

This module does not import MLflow.
"""

import base64
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from io import BytesIO
from pathlib import Path
from subprocess import PIPE, Popen
from tempfile import TemporaryFile
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from fmn.errors import UserError
from fmn.evaluate.files import Metrics, read_predictions
from fmn.evaluate.metrics import Answers, answers
from fmn.models import labels
from fmn.store import artifacts, stage
from fmn.tasks import dataset
from fmn.tasks.batches import IGNORED
from fmn.tasks.encoding import encode
from fmn.tasks.task import Task

if TYPE_CHECKING:
    import pandas as pd
    import pyarrow as pa

ROWS, SEED = 32, 0  # number of rows of each task that are compared, and the seed of their draw
TOLERANCE = 1e-4  # largest difference of probabilities; for values above 1, relative to the value
COARSE = 0.05  # the same for models that were evaluated in bfloat16
# Texts for tasks without rows; in pairs, each with the next one.
SENTENCES = (
    "A warm and funny film.",
    "The plot makes no sense at all, and the second half is far too long.",
    "How do I change my password?",
    "Shares fell by 3.5 % on Monday, after the company had warned of a loss of $20 million.",
    "no",
)

GENERATED, GENERATED_TOKENS = 4, 16  # number of texts to generate, and most tokens of each
SERVED = {"tokens": "words", "prompt": "text"}  # the served model's names of columns

Serve = Callable[..., "pd.DataFrame"]
"""A served model: a function of a table, a task, and further parameters by name."""


class Sample(NamedTuple):
    """Examples of a task, and the merged model's answers to them.

    Attributes:
        task: the task.
        rows: names of the examples, for messages.
        table: the served model's input.
        answers: the answers in the form of the served model's.
    """

    task: Task
    rows: Sequence[str]
    table: "pd.DataFrame"
    answers: Sequence[Mapping[str, Any]]


@contextmanager
def alone() -> Iterator[Callable[[str, str], Serve]]:
    """Start a process without fmn; yields a function that loads a logged model there.

    The function's arguments are the addresses of the model and of MLflow's store. The process ends
    with the block.

    Raises:
        UserError: the process or the model fails.
    """
    script = [sys.executable, "-P", str(Path(__file__).with_name("alone.py"))]
    with (
        TemporaryFile() as errors,
        Popen(script, stdin=PIPE, stdout=PIPE, stderr=errors, text=True) as process,
    ):

        def request(**content: Any) -> Any:
            with suppress(BrokenPipeError):
                print(json.dumps(content), file=process.stdin, flush=True)
            if not (line := process.stdout.readline() if process.stdout else ""):
                errors.seek(0)
                last = errors.read().decode(errors="replace").strip().splitlines()[-1:]
                line = json.dumps({"error": ": ".join([f"it ended ({process.wait()})", *last])})
            answer = json.loads(line)
            if "error" in answer:
                words = " ".join(str(answer["error"]).split())[:400]
                raise UserError(
                    f"the model, as MLflow serves it in a process of its own, fails: {words};"
                    " see that its packages can be imported there. Nothing was registered"
                )
            return answer["rows"]

        def load(uri: str, store: str) -> Serve:
            import pandas as pd

            request(load=uri, store=store)
            return lambda table, task, **params: pd.DataFrame(
                request(rows=table.to_dict("records"), params={"task": task, **params})
            )

        try:
            yield load
        finally:
            process.kill()


def generated_images() -> list[bytes]:
    """Small PNG images with different colours, one for each of `SENTENCES`."""
    from PIL import Image

    files = []
    for number in range(len(SENTENCES)):
        pixels = np.random.default_rng(number).integers(0, 256, (4, 4, 3), dtype=np.uint8)
        file = BytesIO()
        Image.fromarray(pixels).resize((32, 32)).save(file, format="PNG")
        files.append(file.getvalue())
    return files


def as_base64(image: bytes) -> str:
    """The content of an image's file as base64 text."""
    return base64.b64encode(image).decode()


def check_served(
    serve: Serve,
    model: Path,
    file: Path,
    metrics: Metrics,
    tasks: Mapping[str, Task],
    data: Path | None,
) -> None:
    """Refuse a served model whose answers differ from the merged model's.

    Args:
        serve: the served model.
        model: the merged model's folder.
        file: its metrics file, with the predictions beside it.
        metrics: the content of that file.
        tasks: the model's tasks by name.
        data: the evaluated rows, whose predictions are compared. Without it, and for tasks without
            labels, the merged model answers a few built-in sentences now.

    Raises:
        UserError: names the first task and row with another answer; or `data` has other rows.
    """
    sidecar = stage.read_sidecar(file)
    dtype = sidecar.settings.get("evaluate", {}).get("dtype") if sidecar else None
    predictions = read_predictions(file) if data else {}
    for task in tasks.values():
        tolerance, options = TOLERANCE, {}
        if task.generates:
            sample = _generated(task, model, data)
            options = {"max_new_tokens": GENERATED_TOKENS}
        elif data and task.name in predictions:
            split, evaluated = next(iter(predictions[task.name].splits.items()))
            sample = _evaluated(task, split, evaluated, metrics, data)
            tolerance = COARSE if dtype in ("bfloat16", "auto") else TOLERANCE
        else:
            sample = _built_in(task, model)
        served = serve(sample.table, task.name, **options).to_dict("records")
        for row, answer, wanted in zip(sample.rows, served, sample.answers, strict=True):
            if not same(sample.task, answer, wanted, tolerance):
                raise UserError(
                    f"{model}: task {task.name}, {row}: the served model answers"
                    f" {_shown(answer)}, in evaluation it was {_shown(wanted)}; evaluate it again"
                    " with `fmn evaluate`. Nothing was registered"
                )


def _evaluated(task: Task, split: str, expected: Answers, metrics: Metrics, data: Path) -> Sample:
    """A sample of the evaluated rows, with their predictions."""
    from fmn.tasks import batches

    files = dataset.split_files(data, task, split)
    digest = artifacts.digest_bytes("".join(map(artifacts.digest_file, files)).encode())
    if digest != metrics.data[task.name].splits[split]:
        problem = f"not the rows of {task.name} that the metrics are of"
        raise UserError(f"{files[0]}: {problem}; give the --data of `fmn evaluate`")
    table = dataset.read_split(data, task, split)
    rows = np.sort(batches.select(np.zeros(table.num_rows), ROWS, SEED))
    expected = Answers(*(part[rows] for part in expected))
    names = [f"{split} row {row}" for row in rows]
    return Sample(task, names, _served_table(task, table.take(rows)), in_words(task, expected))


def _built_in(task: Task, model: Path) -> Sample:
    """The built-in sentences or images, with the merged model's answers."""
    from fmn.models.predict import predict

    expert = labels.load_expert(model / "tasks" / task.name, task, None, "cpu")
    complete, table = _examples(expert.task)
    examples = encode(expert.processor, complete, table, scored=True)
    logits = predict(expert.model, examples, device="cpu", dtype="float32")
    expected = in_words(complete, answers(complete, logits, examples.labels))
    names = [f"the text {text!r}" for text in SENTENCES]
    if task.task == "image-classification":
        names = [f"generated image {number}" for number in range(len(SENTENCES))]
    return Sample(complete, names, _served_table(complete, table), expected)


def _examples(task: Task) -> tuple[Task, "pa.Table"]:
    """A row for each built-in sentence, without labels; and the definition of these rows."""
    import pyarrow as pa

    if task.task == "sentence-similarity" and not task.columns.text_pair:
        columns = task.columns.model_copy(update={"text_pair": f"{task.columns.text}_pair"})
        task = task.model_copy(update={"columns": columns})
    contents: dict[str, Sequence[Any]] = {
        "text_pair": (*SENTENCES[1:], SENTENCES[0]),
        "tokens": [sentence.split() for sentence in SENTENCES],
        "image": generated_images(),
    }
    return task, pa.table({n: contents.get(k, SENTENCES) for k, n in task.input_columns.items()})


def _generated(task: Task, model: Path, data: Path | None) -> Sample:
    """Prompts from the rows or the built-in sentences, with the texts that the model generates.

    Predictions of a generative task are scores of reference texts, not generated texts.
    """
    import pandas as pd

    from fmn.models.predict import complete

    prompts: list[str] = [*SENTENCES]
    if data and task.columns.prompt:
        table = dataset.read_split(data, task, dataset.validation_splits(data, task)[0])
        prompts = table[task.columns.prompt].slice(0, ROWS).to_pylist() + prompts
    expert = labels.load_expert(model / "tasks" / task.name, task, None, "cpu")
    texts: dict[str, str] = {}
    for prompt in prompts:
        with suppress(UserError):  # the prompt is too long or empty
            text = complete(expert.model, expert.processor, task, prompt, GENERATED_TOKENS)
            texts[prompt] = text
        if len(texts) == GENERATED:
            break
    if not texts:
        problem = f"task {task.name}: no prompt leaves room for a text in {task.max_length} tokens"
        raise UserError(f"{model}: {problem}; give the task a larger max_length")
    names = [f"the prompt {prompt[:60]!r}" for prompt in texts]
    answers = [{"text": text} for text in texts.values()]
    return Sample(task, names, pd.DataFrame({"text": [*texts]}), answers)


def _served_table(task: Task, table: "pa.Table") -> "pd.DataFrame":
    """Rows of a task in the form of the served model's input."""
    import pandas as pd

    columns = {}
    for key, name in task.input_columns.items():
        values = table[name].to_pylist()
        columns[SERVED.get(key, key)] = (
            [as_base64(value) for value in values] if key == "image" else values
        )
    return pd.DataFrame(columns)


def in_words(task: Task, answers: Answers) -> list[dict[str, Any]]:
    """Convert answers to the served model's form, by kind of task.

    That is: labels of words; a cosine; or labels, score, and probabilities by label.
    """
    if task.task == "token-classification":
        return [
            {"labels": [task.labels[label] for label in row if label != IGNORED]}
            for row in answers.predicted
        ]
    if task.task == "sentence-similarity":
        return [{"score": float(cosine)} for cosine in answers.predicted]
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
    """Whether the served model's answer equals the expected one, both in the form of `in_words`.

    Scores may differ by `tolerance`, and so may labels whose scores differ by no more than that.
    With a coarse tolerance, one word of ten may have another label.
    """
    if task.generates:
        return bool(served["text"] == expected["text"])
    if task.task == "token-classification":
        # Evaluation gives this label to words without tokens.
        none = "O" if "O" in task.labels else task.labels[0]
        pairs = list(zip(served["labels"], expected["labels"], strict=True))
        differing = [wanted for label, wanted in pairs if (label or none) != wanted]
        return len(differing) <= (max(1, len(pairs) // 10) if tolerance >= COARSE else 0)
    if abs(served["score"] - expected["score"]) > tolerance * max(1.0, abs(expected["score"])):
        return False
    if "probabilities" not in expected:
        return True
    shares, wanted = served["probabilities"], expected["probabilities"]
    if shares.keys() != wanted.keys():
        return False
    if any(abs(shares[name] - wanted[name]) > tolerance for name in wanted):
        return False
    other = [shares[name] for name in {*served["labels"]} ^ {*expected["labels"]}]
    if task.multi_label:
        return all(abs(share - task.threshold) <= tolerance for share in other)
    return not other or bool(max(other) - min(other) <= tolerance)


def _shown(answer: Mapping[Any, Any]) -> str:
    """An answer as a message shows it."""
    if "text" in answer:
        return repr(answer["text"][:80])
    if not answer.get("probabilities"):
        return f"{answer['score']:.6g}" if "score" in answer else f"{answer['labels']}"
    return f"{', '.join(answer['labels']) or 'none'} ({answer['score']:.4f})"
