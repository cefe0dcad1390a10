"""The model that MLflow serves: one merged encoder, a head a task. Needs torch, transformers and safetensors, not fmn.

MLflow runs this file as it is ("models from code"). The artifact ``merged`` is a folder with ``encoder/`` (config,
weights, tokenizer), ``tasks/TASK/`` (config, ``head.safetensors``) and ``texts.json`` (how many texts a task takes).
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
    """A classifier by task; all of them share one encoder in memory."""
    encoder: torch.nn.Module | None = None
    models = {}
    for task in sorted((folder / "tasks").iterdir()):
        config = AutoConfig.from_pretrained(task, local_files_only=True)
        if encoder is None:
            model = AutoModelForSequenceClassification.from_config(config)
            encoder = model.base_model
            weights: dict[str, torch.Tensor] = {}
            for file in sorted((folder / "encoder").glob("*.safetensors")):
                weights |= load_file(file)
            encoder.load_state_dict(
                {name: weights[name] for name in encoder.state_dict() if name in weights},
                strict=True,
            )
        else:
            with torch.device("meta"):
                model = AutoModelForSequenceClassification.from_config(config)
            setattr(model, model.base_model_prefix, encoder)
        missing, unexpected = model.load_state_dict(
            load_file(task / "head.safetensors"), strict=False, assign=True
        )
        lost = [name for name in missing if not name.startswith(f"{model.base_model_prefix}.")]
        if lost or unexpected:
            raise ValueError(
                f"{task}: the head does not fit its configuration: {[*lost, *unexpected]}"
            )
        models[task.name] = model.eval()
    return models


class MergedModel(PythonModel):
    """Answers a batch of texts for the task named in ``params``."""

    def load_context(self, context: PythonModelContext) -> None:
        folder = Path(context.artifacts["merged"])
        self.tokenizer = AutoTokenizer.from_pretrained(folder / "encoder", local_files_only=True)
        self.models = load_tasks(folder)
        if self.tokenizer.pad_token is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        for model in self.models.values():
            if (
                model.config.pad_token_id is None
            ):  # a batch of unequal lengths needs one to find where each text ends
                model.config.pad_token_id = self.tokenizer.pad_token_id
        self.texts = json.loads((folder / "texts.json").read_text())

    def predict(
        self,
        context: PythonModelContext,
        model_input: pd.DataFrame,
        params: Mapping[str, Any] | None = None,
    ) -> pd.DataFrame:
        """A row per text: its label, the label's probability, and the probability of every label by its name.

        A regression task answers with a score alone.

        Args:
            model_input: columns ``text`` and, for tasks on pairs, ``text_pair``.
            params: ``task``, one of the merged tasks.
        """
        task = (params or {}).get("task") or ""
        if task not in self.models:
            raise _mistake(
                f"task {task!r} is not one of {', '.join(self.models)}; pass params={{'task': ...}}"
            )
        texts = _columns(model_input, task, self.texts[task])
        model, logits = self.models[task], []
        for start in range(0, len(model_input), BATCH):
            batch = [column[start : start + BATCH] for column in texts]
            inputs = self.tokenizer(
                *batch, padding=True, truncation=True, max_length=128, return_tensors="pt"
            )
            with torch.inference_mode():
                logits.append(model(**inputs).logits.float())
        rows = answers(torch.cat(logits), model.config.id2label) if logits else []
        return pd.DataFrame(rows, columns=["label", "score", "probabilities"])


def _columns(table: pd.DataFrame, task: str, texts: int) -> list[list[str]]:
    """The texts that a task takes, a list for each column."""
    paired = table["text_pair"].notna() if "text_pair" in table else pd.Series(False, table.index)
    if texts == 2 and not paired.all():
        raise _mistake(f"task {task} takes pairs: every row needs text and text_pair")
    if texts == 1 and paired.any():
        raise _mistake(f"task {task} takes one text: leave out text_pair")
    return [table[name].tolist() for name in ("text", "text_pair")[:texts]]


def _mistake(message: str) -> MlflowException:
    return MlflowException(message, error_code=INVALID_PARAMETER_VALUE)


def answers(logits: torch.Tensor, names: Mapping[int, str]) -> list[dict[str, Any]]:
    """An answer per row of ``logits`` [N, C]; with one output a score, else label and probabilities."""
    if logits.shape[1] == 1:
        return [
            {"label": "score", "score": value, "probabilities": {}}
            for value in logits[:, 0].tolist()
        ]
    rows = []
    for probabilities in logits.softmax(-1).tolist():
        best = max(range(len(probabilities)), key=probabilities.__getitem__)
        shares = {names[index]: share for index, share in enumerate(probabilities)}
        rows.append({"label": names[best], "score": probabilities[best], "probabilities": shares})
    return rows


mlflow.models.set_model(MergedModel())
