"""The stage that writes a task's rows."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import Field, field_validator

from fmn.errors import UserError
from fmn.models import sources
from fmn.store import artifacts, stage
from fmn.store.records import Settings
from fmn.store.stage import Outcome
from fmn.tasks import dataset as data
from fmn.tasks import task as tasks

Source = str
DATA = 1


class DataSettings(Settings):
    source: Source = Field(
        "hub",
        description="hub (nyu-mll/glue), embedded (the miniature GLUE that fmn makes), or a folder; $NAME is read"
        " from the environment",
    )
    revision: str = Field("main", description="revision of the Hub's data set")
    seed: int = Field(0, ge=0, description="seed of the embedded data")

    @field_validator("source")
    @classmethod
    def _from_environment(cls, source: str) -> str:
        if not source.startswith("$"):
            return source
        value = os.environ.get(source[1:])
        if not value:
            raise ValueError(
                f"the environment variable {source[1:]} is not set; it names the folder of the data"
            )
        return value


def prepare(task: str, out: Path, settings: DataSettings) -> Outcome:
    """A task's splits as Parquet in the folder ``out``."""
    stage.apart(out, [Path(settings.source)])
    found = tasks.task(task)
    source, revision = settings.source, settings.revision
    described = {"task": task, "source": source}
    inputs = {}
    if source == "embedded":
        described["seed"] = str(settings.seed)
    elif source == "hub":
        described["revision"] = revision = sources.resolve_dataset(data.HUB, revision)
    else:
        if "://" in source:
            raise UserError(f"data {source}: not a folder; name one, or embedded, or hub")
        described["source"] = "folder"
        inputs = data.digests(
            Path(source), found, ["train", *data.validation_splits(Path(source), found)]
        )
    key = artifacts.content_key("data", DATA, described, inputs)

    def fill(folder: Path) -> Mapping[str, Any]:
        rows = data.prepare(found, source, folder, seed=settings.seed, revision=revision)
        return {**described, "source": source, "rows": rows}

    return stage.run_folder("data", out, key, fill)
