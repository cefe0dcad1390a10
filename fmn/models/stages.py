"""The stage that fine-tunes an expert; and `predict`."""

from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from pydantic import Field, field_validator

from fmn.errors import UserError
from fmn.models import checkpoints, labels, loading
from fmn.models.provenance import TrainingInfo, lineage
from fmn.store import stage
from fmn.store.artifacts import absent
from fmn.store.records import Record, Settings, at_least_one
from fmn.store.stage import Job, Outcome, Progress, no_progress
from fmn.tasks import dataset
from fmn.tasks.encoding import encode
from fmn.tasks.spans import Span, find_spans, words_of
from fmn.tasks.task import Task, in_a_line, load_task, write_task

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa

FINETUNE = 4

Device = str
Dtype = Literal["auto", "float32", "bfloat16", "float64"]


class FinetuneSettings(Settings):
    """How an expert is fine-tuned."""

    epochs: float = Field(3, gt=0, description="passes over the training examples")
    learning_rate: float = Field(5e-5, gt=0, description="peak of the linear schedule")
    batch_size: int = Field(32, ge=1, description="examples per step")
    examples: int | Literal["all"] = Field("all", description="training rows, drawn by the seed")
    seed: int = Field(0, ge=0, description="seed of the head, the order and the dropout")
    device: Device = Field("auto", description="auto, cpu, cuda, cuda:1, ...")
    dtype: Dtype = Field("auto", description="of matrix products; auto: bfloat16 where faster")

    _at_least_one = field_validator("examples")(at_least_one)


class Prediction(Record):
    """A model's answer for one text, or a pair: the most probable label, and its probability.

    For a regression task, `label` is "score", `score` the value, and there are no probabilities.
    For several labels at once, `labels` are those whose probability reaches the task's threshold,
    and `label` lists them.
    """

    label: str
    score: float
    probabilities: dict[str, float] = Field(default_factory=dict)
    labels: list[str] = Field(default_factory=list)


class Tags(Record):
    """A tagger's answer: the label of each word, None for words beyond the task's `max_length`."""

    labels: list[str | None]
    spans: list[Span]


class Embedding(Record):
    """The embedding of a text, as SentenceTransformer gives it."""

    embedding: list[float]


class Similarity(Record):
    """The cosine of two texts' embeddings."""

    score: float


class Completion(Record):
    """A generated text."""

    text: str


class Input(NamedTuple):
    """What `predict` answers: a text, a pair of texts, or the file of an image."""

    text: str | None = None
    text_pair: str | None = None
    image: Path | None = None


Answer = Prediction | Tags | Embedding | Similarity | Completion
"""What `predict` gives, by kind of task."""


def finetune(
    base: Path,
    *,
    task: str,
    data: Path,
    out: Path,
    settings: FinetuneSettings = FinetuneSettings(),  # noqa: B008 - it is frozen
    progress: Progress = no_progress,
) -> Outcome[TrainingInfo]:
    """Fine-tune a base model on one task, which makes an expert.

    Args:
        base: folder of the base model
        task: the task
        data: folder of the task's rows, or of several tasks'
        out: the folder to write

    Raises:
        UserError: the base or the rows cannot be used, or the loss diverges.
    """
    definition = load_task(data, task)
    if not definition.has_labels:
        raise UserError(f"task {task}: its rows have no labels to fine-tune on; give an expert")
    train = dataset.split_files(data, definition, "train")

    def compute(job: Job) -> TrainingInfo:
        import numpy as np
        import torch

        from fmn.models import finetune

        processor = loading.load_processor(base, definition.task)
        if definition.task == "token-classification":
            processor = loading.for_words(base, processor)
        rows = _training_rows(data, definition, settings)
        is_pairs = definition.loss == "embedding"
        examples = encode(processor, definition, rows, scored=is_pairs)
        model = finetune.new_expert(base, definition, settings.seed)
        options = settings.model_dump(exclude={"examples"}) | {"progress": progress}
        losses = finetune.finetune(model, examples, problem_type=definition.loss, **options)
        with checkpoints.quiet():
            # Today's names of tensors, also where old files have others (ViT).
            model.cpu().save_pretrained(job.path, save_original_format=False)
            processor.save_pretrained(job.path)
        write_task(job.path, definition)
        facts: dict[str, Any] = {"examples": rows.num_rows, "seed": settings.seed}
        facts |= {"steps": len(losses), "threads": torch.get_num_threads()}
        facts |= {"data_digest": job.inputs["train"]}
        loss = float(np.mean(losses[-max(1, len(losses) // 10) :]))
        return TrainingInfo(task=task, base=lineage(base), loss=loss, **facts)

    reads: dict[str, Path | list[Path]] = {"base": base, "train": train}
    keys = {"task": definition, "finetune": settings}
    summary = partial(stage.read_info, record=TrainingInfo)
    return stage.run_stage(
        "finetune", FINETUNE, out, compute,
        reads=reads, settings=keys, summary=summary, is_folder=True,
    )  # fmt: skip


def _training_rows(data: Path, task: Task, settings: FinetuneSettings) -> "pa.Table":
    """The training rows, or as many of them as the settings say, drawn by their seed."""
    import numpy as np

    from fmn.tasks.batches import select

    rows = dataset.read_split(data, task, "train")
    limit = None if settings.examples == "all" else settings.examples
    return rows.take(select(np.zeros(rows.num_rows), limit, settings.seed))


def predict(
    model: Path,
    text: str | None = None,
    text_pair: str | None = None,
    *,
    task: str,
    image: Path | None = None,
) -> Answer:
    """Answer one text, a pair of texts or an image with a merged model.

    Args:
        model: folder of the merged model
        text: the text; for a task that generates texts, the prompt
        text_pair: the second text, for a task of pairs
        task: the task
        image: the file of an image, for a task of images

    Raises:
        UserError: the model does not have the task, or was changed, or the task takes something
            else.
    """
    return next(answers(model, [Input(text, text_pair, image)], task=task))


def answers(model: Path, inputs: Iterable[Input], *, task: str) -> Iterator[Answer]:
    """Answer inputs one by one with a merged model, as `predict` does; it is loaded once."""
    folder = model / "tasks" / task
    if not folder.is_dir():
        tasks = in_a_line(sorted(each.name for each in model.glob("tasks/*")))
        problem = f"has no task {task}" if tasks else "not a merged model"
        remedy = f"its tasks are {tasks}" if tasks else "name its folder, or models:/NAME/VERSION"
        raise UserError(f"{model}: {problem if model.is_dir() else absent(model)}; {remedy}")
    from fmn.models.devices import forward_explained

    definition = labels.expert_task(folder, task)
    expert: labels.Expert | None = None
    for text, text_pair, image in inputs:
        texts = _check_inputs(definition, text, text_pair, image)
        if expert is None:
            stage.check_intact(model)
            expert = labels.load_expert(folder, definition, None, "cpu")
        with forward_explained(expert.model):
            answer = _answer(expert, texts, image)
        yield answer


def _answer(expert: labels.Expert, texts: Sequence[str], image: Path | None) -> Answer:
    if expert.task.task == "token-classification":
        return _tags(expert, texts[0])
    if expert.task.task == "sentence-similarity":
        return _embedding(expert, texts)
    if expert.task.generates:
        from fmn.models.predict import complete

        return Completion(text=complete(expert.model, expert.processor, expert.task, texts[0]))
    return _classes(expert, [image.read_bytes()] if image else texts)


def _check_inputs(
    task: Task, text: str | None, text_pair: str | None, image: Path | None
) -> list[str]:
    """The texts for a task. UserError if it takes others, an image, or none."""
    texts = [each for each in (text, text_pair) if each is not None]
    if task.task == "image-classification":
        if texts or not image:
            raise UserError(f"task {task.name}: it takes an image and no text; give --image FILE")
        if not image.is_file():
            raise UserError(f"{image}: no such file; give --image the file of an image")
        return []
    if image:
        raise UserError(f"task {task.name}: it takes text and no image; leave out --image")
    columns = task.text_columns[:1] if task.generates else task.text_columns
    least = 1 if task.task == "sentence-similarity" else len(columns)
    most = 2 if task.task == "sentence-similarity" else len(columns)
    if not least <= len(texts) <= most:
        number = f"{most} texts" if least > 1 else f"1 text or {most}" if most > 1 else "1 text"
        raise UserError(f"task {task.name}: it takes {number}; give {', '.join(columns)}")
    return texts


def _logits(expert: labels.Expert, columns: Sequence[Any]) -> "np.ndarray":
    """The outputs for one example that has these values in the columns of its task."""
    import pyarrow as pa

    from fmn.models.predict import predict

    table = pa.table(
        {name: [value] for name, value in zip(expert.task.text_columns, columns, strict=True)}
    )
    examples = encode(expert.processor, expert.task, table)
    return predict(expert.model, examples, device="cpu", dtype="float32")


def _classes(expert: labels.Expert, columns: Sequence[Any]) -> Prediction:
    """The classes, or the value, of an example."""
    from scipy import special

    task, logits = expert.task, _logits(expert, columns)[0]  # [C]
    if task.regression:
        return Prediction(label="score", score=float(logits[0]))
    shares = special.expit(logits) if task.multi_label else special.softmax(logits)
    probabilities = dict(zip(task.labels, shares.tolist(), strict=True))
    best = max(probabilities, key=probabilities.__getitem__)
    answer = Prediction(label=best, score=probabilities[best], probabilities=probabilities)
    if not task.multi_label:
        return answer
    above = [name for name, share in probabilities.items() if share >= task.threshold]
    return answer.model_copy(update={"labels": above, "label": ", ".join(above) or "none"})


def _tags(expert: labels.Expert, text: str) -> Tags:
    """The labels of a text's words, and the spans that they make."""
    import pyarrow as pa
    from scipy import special

    from fmn.models.predict import predict

    task, words = expert.task, words_of(text)
    if not words:
        raise UserError(f"task {task.name}: the text is empty; give one with words")
    table = pa.table({task.text_columns[0]: [[text[start:end] for start, end in words]]})
    examples = encode(expert.processor, task, table, scored=True)
    places = examples.labels[0, :, 0]  # the token that answers each word, or -1
    logits = predict(expert.model, examples, device="cpu", dtype="float32")[0]  # [T, C]
    shares = special.softmax(logits, axis=-1)[places]  # [W, C]
    best = shares.argmax(-1)
    names = [
        task.labels[label] if place >= 0 else None
        for label, place in zip(best, places, strict=True)
    ]
    spans = find_spans(text, words, names, shares.max(-1).tolist(), "O" in task.labels)
    return Tags(labels=names, spans=spans)


def _embedding(expert: labels.Expert, texts: Sequence[str]) -> Embedding | Similarity:
    """The embedding of a text, or the cosine of two texts' embeddings."""
    import torch

    tokenizer, task = expert.processor, expert.task
    vectors = []
    for text in texts:
        inputs = tokenizer(
            tokenizer.prompt + text,
            truncation=True,
            max_length=min(task.max_length, tokenizer.model_max_length),
            return_tensors="pt",
        )
        with torch.inference_mode():
            output: Any = expert.model(**inputs)
        vectors.append(output.sentence_embedding[0] if len(texts) == 1 else output.logits[0])
    if len(vectors) == 1:
        return Embedding(embedding=vectors[0].tolist())
    return Similarity(score=float(vectors[0] @ vectors[1]))
