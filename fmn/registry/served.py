"""The model that MLflow serves: one encoder, a head for each task. Needs no fmn.

MLflow runs this file as it is ("models from code"). The artifact ``merged`` is a folder with
``encoder/`` (config, weights, tokenizer), ``tasks/TASK/`` (config, ``head.safetensors``) and
``texts.json`` (how many texts each task takes).
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlflow
import pandas as pd
import torch
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import INVALID_PARAMETER_VALUE
from mlflow.pyfunc.model import PythonModel, PythonModelContext
from safetensors.torch import load_file
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
)

BATCH = 32


def load_tasks(folder: Path) -> dict[str, PreTrainedModel]:
    """A classifier for each task; all of them share one encoder in memory."""
    weights: dict[str, torch.Tensor] = {}
    for file in (folder / "encoder").glob("*.safetensors"):
        weights |= load_file(file)
    encoder, models = None, {}
    for task in sorted((folder / "tasks").iterdir()):
        config = AutoConfig.from_pretrained(task, local_files_only=True)
        with torch.device("meta" if encoder else "cpu"):
            model = AutoModelForSequenceClassification.from_config(config)
        if encoder is None:
            encoder = model.base_model
            needed = {name: weights[name] for name in encoder.state_dict() if name in weights}
            encoder.load_state_dict(needed, strict=True)
        setattr(model, model.base_model_prefix, encoder)
        head = load_file(task / "head.safetensors")
        missing, unexpected = model.load_state_dict(head, strict=False, assign=True)
        lost = [name for name in missing if not name.startswith(f"{model.base_model_prefix}.")]
        if lost or unexpected:
            raise ValueError(f"{task}: head and configuration differ: {[*lost, *unexpected]}")
        models[task.name] = model.eval()
    return models


class MergedModel(PythonModel):
    """Answers a batch of texts for the task named in ``params``."""

    def load_context(self, context: PythonModelContext) -> None:
        folder = Path(context.artifacts["merged"])
        self.tokenizer = AutoTokenizer.from_pretrained(folder / "encoder", local_files_only=True)
        if self.tokenizer.pad_token is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        self.models = load_tasks(folder)
        for model in self.models.values():
            if model.config.pad_token_id is None:  # tells where each text of a batch ends
                model.config.pad_token_id = self.tokenizer.pad_token_id
        self.text_counts = json.loads((folder / "texts.json").read_text())

    def predict(
        self,
        context: PythonModelContext,
        model_input: pd.DataFrame,
        params: Mapping[str, Any] | None = None,
    ) -> pd.DataFrame:
        """A row per text: its label, the label's probability, all probabilities by label.

        A regression task answers with a score alone.

        Args:
            context: not used.
            model_input: columns ``text`` and, for tasks on pairs, ``text_pair``.
            params: ``task``, one of the merged tasks.
        """
        task = (params or {}).get("task") or ""
        if task not in self.models:
            known = ", ".join(self.models)
            raise _mistake(f"task {task!r} is not one of {known}; pass params={{'task': ...}}")
        columns = _columns(model_input, task, self.text_counts[task])
        model, logits = self.models[task], []
        for start in range(0, len(model_input), BATCH):
            batch = [column[start : start + BATCH] for column in columns]
            options = {"padding": True, "truncation": True, "max_length": 128}
            inputs = self.tokenizer(*batch, **options, return_tensors="pt")
            with torch.inference_mode():
                logits.append(model(**inputs).logits.float())
        rows = answers(torch.cat(logits), model.config.id2label) if logits else []
        return pd.DataFrame(rows, columns=["label", "score", "probabilities"])


def _columns(table: pd.DataFrame, task: str, text_count: int) -> list[list[str]]:
    """The texts that a task takes, a list per column."""
    is_pair = table["text_pair"].notna() if "text_pair" in table else pd.Series(False, table.index)
    if text_count == 2 and not is_pair.all():
        raise _mistake(f"task {task} takes pairs: every row needs text and text_pair")
    if text_count == 1 and is_pair.any():
        raise _mistake(f"task {task} takes one text: leave out text_pair")
    return [table[name].tolist() for name in ("text", "text_pair")[:text_count]]


def _mistake(message: str) -> MlflowException:
    return MlflowException(message, error_code=INVALID_PARAMETER_VALUE)


def answers(logits: torch.Tensor, labels: Mapping[int, str]) -> list[dict[str, Any]]:
    """An answer for each row of ``logits`` [N, C]; a score alone if C is 1."""
    if logits.shape[1] == 1:
        scores = logits[:, 0].tolist()
        return [{"label": "score", "score": score, "probabilities": {}} for score in scores]
    rows = []
    for row in logits.softmax(-1).tolist():
        probabilities = {labels[index]: probability for index, probability in enumerate(row)}
        label = max(probabilities, key=probabilities.__getitem__)
        score = probabilities[label]
        rows.append({"label": label, "score": score, "probabilities": probabilities})
    return rows


mlflow.models.set_model(MergedModel())
