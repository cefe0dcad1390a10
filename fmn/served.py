"""The model that MLflow serves: one merged encoder, a head a task. Needs torch, transformers and safetensors, not fmn.

MLflow runs this file as it is ("models from code"). The artifact ``merged`` is a folder with ``encoder/`` (config,
weights, tokenizer) and ``tasks/TASK/`` (config, ``head.safetensors``).
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlflow
import pandas as pd
import torch
from mlflow.pyfunc.model import PythonModel, PythonModelContext
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer, PreTrainedModel

BATCH = 32


def load_tasks(folder: Path) -> dict[str, PreTrainedModel]:
    """A classifier by task; all of them share one encoder in memory."""
    encoder: torch.nn.Module | None = None
    models = {}
    for task in sorted((folder / "tasks").iterdir()):
        config = AutoConfig.from_pretrained(task, local_files_only=True)
        if encoder is None:
            model = AutoModelForSequenceClassification.from_config(config)
            encoder = model.base_model
            weights = load_file(folder / "encoder" / "model.safetensors")
            encoder.load_state_dict(
                {name: weights[name] for name in encoder.state_dict() if name in weights}, strict=True
            )
        else:
            with torch.device("meta"):
                model = AutoModelForSequenceClassification.from_config(config)
            setattr(model, model.base_model_prefix, encoder)
        missing, unexpected = model.load_state_dict(load_file(task / "head.safetensors"), strict=False, assign=True)
        lost = [name for name in missing if not name.startswith(f"{model.base_model_prefix}.")]
        if lost or unexpected:
            raise ValueError(f"{task}: the head does not fit its configuration: {[*lost, *unexpected]}")
        models[task.name] = model.eval()
    return models


class MergedModel(PythonModel):
    """Answers a batch of texts for the task named in ``params``."""

    def load_context(self, context: PythonModelContext) -> None:
        folder = Path(context.artifacts["merged"])
        self.tokenizer = AutoTokenizer.from_pretrained(folder / "encoder", local_files_only=True)
        self.models = load_tasks(folder)

    def predict(
        self, context: PythonModelContext, model_input: pd.DataFrame, params: Mapping[str, Any] | None = None
    ) -> pd.DataFrame:
        """A row per text: its label, the label's probability and all probabilities as JSON; a score for regression.

        Args:
            model_input: columns ``text`` and, for tasks on pairs, ``text_pair``.
            params: ``task``, one of the merged tasks.
        """
        task = (params or {}).get("task") or ""
        if task not in self.models:
            raise ValueError(f"task {task!r} is not one of {', '.join(self.models)}; pass params={{'task': ...}}")
        model = self.models[task]
        texts = model_input["text"].tolist()
        paired = "text_pair" in model_input and model_input["text_pair"].notna().all()
        pairs = model_input["text_pair"].tolist() if paired else None
        logits = []
        for start in range(0, len(texts), BATCH):
            second = pairs[start : start + BATCH] if pairs else None
            inputs = self.tokenizer(
                texts[start : start + BATCH], second, padding=True, truncation=True, max_length=128, return_tensors="pt"
            )
            with torch.inference_mode():
                logits.append(model(**inputs).logits.float())
        return pd.DataFrame(answers(torch.cat(logits), model.config.id2label))


def answers(logits: torch.Tensor, names: Mapping[int, str]) -> list[dict[str, Any]]:
    """An answer per row of ``logits`` [N, C]; with one output a score, else label and probabilities."""
    if logits.shape[1] == 1:
        return [{"label": "score", "score": value, "probabilities": "{}"} for value in logits[:, 0].tolist()]
    rows = []
    for probabilities in logits.softmax(-1).tolist():
        best = max(range(len(probabilities)), key=probabilities.__getitem__)
        shares = {names[index]: round(share, 6) for index, share in enumerate(probabilities)}
        rows.append({"label": names[best], "score": probabilities[best], "probabilities": json.dumps(shares)})
    return rows


mlflow.models.set_model(MergedModel())
