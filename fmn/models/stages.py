"""The stage that fine-tunes an expert; and `predict`."""

from functools import partial
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from fmn.errors import UserError
from fmn.models import checkpoints, labels
from fmn.models.provenance import TrainingInfo, lineage
from fmn.store import stage
from fmn.store.records import Record, Settings
from fmn.store.stage import Job, Outcome, Progress, no_progress
from fmn.tasks import dataset
from fmn.tasks.encoding import encode
from fmn.tasks.task import load_task, write_task

FINETUNE = 3

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
        from fmn.tasks import batches

        processor = checkpoints.load_processor(base, definition.task)
        if definition.task == "token-classification":
            processor = checkpoints.for_words(base, processor)
        table = dataset.read_split(data, definition, "train")
        limit = None if settings.examples == "all" else settings.examples
        rows = batches.select(np.zeros(table.num_rows), limit, settings.seed)
        is_pairs = definition.loss == "embedding"
        examples = encode(processor, definition, table.take(rows), scored=is_pairs)
        model = finetune.new_expert(base, definition, settings.seed)
        options = settings.model_dump(exclude={"examples"}) | {"progress": progress}
        losses = finetune.finetune(model, examples, problem_type=definition.loss, **options)
        with checkpoints.quiet():
            # Under today's names, also where files of old have others (ViT).
            model.cpu().save_pretrained(job.path, save_original_format=False)
            processor.save_pretrained(job.path)
        write_task(job.path, definition)
        facts: dict[str, Any] = {"examples": len(rows), "seed": settings.seed}
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


def predict(model: Path, text: str, text_pair: str | None = None, *, task: str) -> Prediction:
    """Answer one text, or a pair of texts, with a merged model.

    Args:
        model: folder of the merged model
        text: the text
        text_pair: the second text, for a task of pairs
        task: the task

    Raises:
        UserError: the model does not have the task, or was changed, or the task takes other texts.
    """
    import torch

    folder = model / "tasks" / task
    if not folder.is_dir():
        raise UserError(f"{model}: not a merged model of task {task}; give one, and its task")
    definition = labels.expert_task(folder, task)
    columns = definition.text_columns
    if (len(columns) == 2) != (text_pair is not None):
        raise UserError(f"task {task}: it takes {len(columns)} texts; give {', '.join(columns)}")
    stage.check_intact(model)
    classifier, tokenizer, definition, _ = labels.load_expert(folder, definition, None)
    inputs = tokenizer(
        text, text_pair, truncation=True, max_length=definition.max_length, return_tensors="pt"
    )
    with torch.inference_mode():
        logits = classifier(**inputs).logits[0].float()  # [C]
    if definition.regression:
        return Prediction(label="score", score=logits.item())
    shares = logits.sigmoid() if definition.multi_label else logits.softmax(-1)
    probabilities = dict(zip(definition.labels, shares.tolist(), strict=True))
    best = max(probabilities, key=probabilities.__getitem__)
    answer = Prediction(label=best, score=probabilities[best], probabilities=probabilities)
    if not definition.multi_label:
        return answer
    above = [name for name, share in probabilities.items() if share >= definition.threshold]
    return answer.model_copy(update={"labels": above, "label": ", ".join(above) or "none"})
