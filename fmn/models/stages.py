"""The stages that bring in checkpoints: fetched, or fine-tuned from a base; and prediction."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from fmn.errors import UserError
from fmn.merge import recipe
from fmn.models import checkpoints, sources
from fmn.store import artifacts, stage
from fmn.store.records import Settings
from fmn.store.stage import Outcome, Progress
from fmn.tasks import dataset as data
from fmn.tasks import task as tasks

Device = str
Dtype = Literal["auto", "float32", "bfloat16", "float64"]
FETCH = 1
FINETUNE = 1


class FinetuneSettings(Settings):
    epochs: float = Field(3, gt=0, description="passes over the training examples")
    learning_rate: float = Field(5e-5, gt=0, description="peak of the linear schedule")
    batch_size: int = Field(32, ge=1, description="examples a step")
    examples: int | Literal["all"] = Field(
        "all", description="training rows used at most, drawn by the seed"
    )
    seed: int = Field(0, ge=0, description="seed of the head, the order and the dropout")
    device: Device = Field("auto", description="auto, cpu, cuda, cuda:1, ...")
    dtype: Dtype = Field(
        "auto", description="precision of the matrix products; auto: bfloat16 where it pays"
    )


def fetch(source: str, out: Path, progress: Progress | None = None) -> Outcome:
    """A checkpoint from its source, pinned and verified, as the folder ``out``."""
    stage.apart(out, [Path(source)])
    pinned = sources.resolve(source)
    digest = sources.folder_digest(pinned)
    key = artifacts.content_key(
        "fetch", FETCH, {"source": pinned}, {"folder": digest} if digest else {}
    )

    def fill(folder: Path) -> Mapping[str, Any]:
        return {**sources.fetch(pinned, folder, progress=progress), "source": source}

    return stage.run_folder("fetch", out, key, fill)


def finetune(
    base: Path,
    task: str,
    folder: Path,
    out: Path,
    settings: FinetuneSettings,
    progress: Progress | None = None,
) -> Outcome:
    """An expert for ``task``, fine-tuned from the checkpoint ``base`` on the training split below ``folder``."""
    stage.apart(out, [base, folder])
    found = tasks.task(task)
    inputs = {"base": artifacts.digest_folder(base), **data.digests(folder, found, ["train"])}
    described = settings.model_dump(exclude={"device"})
    key = artifacts.content_key("finetune", FINETUNE, {"task": task, **described}, inputs)

    def fill(target: Path) -> Mapping[str, Any]:
        import torch

        from fmn.models import finetune
        from fmn.tasks import batches

        tokenizer = checkpoints.load_tokenizer(base)
        table = data.read(folder, found, "train")
        rows = batches.select(
            table["label"].to_numpy(), stage.limit(settings.examples), settings.seed
        )
        examples = data.tokenize(tokenizer, found, table.take(rows))
        model = finetune.new_expert(base, found, settings.seed)
        losses = finetune.finetune(
            model,
            examples,
            regression=found.regression,
            progress=progress,
            **settings.model_dump(exclude={"examples"}),
        )
        with checkpoints.no_bars():
            model.cpu().save_pretrained(target)
            tokenizer.save_pretrained(target)
        last = losses[-max(1, len(losses) // 10) :]
        return {
            "task": task,
            "base": stage.lineage(base),
            **described,
            "data_digest": inputs["train"],
            "examples": len(rows),
            "threads": torch.get_num_threads(),
            "steps": len(losses),
            "loss": sum(last) / len(last),
        }

    return stage.run_folder("finetune", out, key, fill)


def predict(model: Path, task: str, text: str, second: str | None) -> dict[str, Any]:
    """A merged model's answer for one text, or a pair: its label, its score, all probabilities."""
    import torch

    found = tasks.task(task)
    if (len(found.columns) == 2) != (second is not None):
        raise UserError(f"task {task} takes {len(found.columns)} texts: {', '.join(found.columns)}")
    stage.check_intact(model)
    folder = recipe.task_folder(model, task)
    classifier = checkpoints.load_classifier(folder).eval()
    inputs = checkpoints.load_tokenizer(folder)(
        text, second, truncation=True, max_length=data.MAX_LENGTH, return_tensors="pt"
    )
    with torch.inference_mode():
        logits = classifier(**inputs).logits[0].float()  # [C]
    if found.regression:
        return {"label": "score", "score": logits.item()}
    shares = {
        classifier.config.id2label[label]: share
        for label, share in enumerate(logits.softmax(-1).tolist())
    }
    best = max(shares, key=shares.__getitem__)
    return {"label": best, "score": shares[best], "probabilities": shares}
