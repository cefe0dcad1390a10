"""The stages that merge experts and re-align heads."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from fmn import __version__
from fmn.errors import UserError, hint
from fmn.fisher import files as statistics
from fmn.fisher.files import GramMetadata, Metadata, StatisticMetadata
from fmn.merge import recipe
from fmn.merge.methods import DAMPING, NEEDS, Needs
from fmn.models import checkpoints, labels
from fmn.models.stages import Device, Dtype
from fmn.report import card
from fmn.store import artifacts, stage
from fmn.store import records as formats
from fmn.store.records import Settings, at_least_one, pairs
from fmn.store.stage import Outcome, Progress
from fmn.tasks import dataset as data
from fmn.tasks import task as tasks

MERGE = 4
REALIGN = 2
NodeMapping = Literal["structured", "paper"]


def _number(text: str) -> float:
    try:
        number = float(text)
    except ValueError as error:
        raise UserError(f"coefficient {text!r} is not a number") from error
    if not math.isfinite(number):
        raise UserError(f"coefficient {text!r} is not finite")
    return number


class MergeSettings(Settings):
    method: str = Field("mask-fisher", description=f"one of {', '.join(NEEDS)}")
    mapping: NodeMapping = Field(
        "structured",
        description="how node weights spread over parameters: structured, or paper (its released code)",
    )
    coefficient: list[str] = Field(
        default_factory=list,
        description="TASK=X: the weight lambda of a task's expert; 1 where it is not given",
    )
    normalise: Literal["auto", "none", "expert", "kind", "site"] = Field(
        "auto",
        description="what an expert's Fisher is divided by: nothing, its mean over all nodes, over a kind of nodes, or"
        " over a kind in one layer; auto: the method's own",
    )
    exponent: Annotated[float, Field(ge=0)] | Literal["auto"] = Field(
        "auto", description="of the Fisher; auto: the method's own"
    )
    damping: float = Field(
        DAMPING, ge=0, le=1, description="factor of the off-diagonal entries of Gram matrices"
    )
    scale: float | Literal["auto"] = Field(
        "auto",
        description="scale of the merged task vector, 1 leaves it; auto: the method's own. Needs the base",
    )
    density: float | None = Field(
        None,
        gt=0,
        le=1,
        description="share of a task vector's entries that ties and dare-ties keep; default: the method's",
    )
    seed: int = Field(0, ge=0, description="seed of the methods that draw at random")

    @field_validator("method")
    @classmethod
    def _known(cls, method: str) -> str:
        if method not in NEEDS:
            raise ValueError(
                f"unknown method {method!r}{hint(method, NEEDS) or '; choose one of ' + ', '.join(NEEDS)}"
            )
        return method

    @property
    def coefficients(self) -> dict[str, float]:
        """lambda by task, for the tasks that state one."""
        return {
            task: _number(text) for task, text in pairs(self.coefficient, "--coefficient").items()
        }

    @model_validator(mode="after")
    def _coefficients_are_numbers(self) -> "MergeSettings":
        try:
            _ = self.coefficients
        except UserError as error:
            raise ValueError(str(error)) from error
        return self


class RefitSettings(Settings):
    texts: int | Literal["all"] = Field(
        256,
        description="unlabeled training texts that a head is fitted on, those first that its expert was not tuned on",
    )
    ridge: Annotated[float, Field(ge=0)] | Literal["auto"] = Field(
        "auto",
        description="how firmly a head is held where it was, relative to what it reads; auto: by leave-one-out on the"
        " same texts",
    )
    seed: int = Field(0, ge=0, description="seed of the texts' draw")

    _some = field_validator("texts")(at_least_one)


class RealignSettings(RefitSettings):
    device: Device = Field("auto", description="auto, cpu, cuda, cuda:1, ...")
    dtype: Dtype = Field(
        "float32", description="precision of the matrix products; auto: bfloat16 where it pays"
    )


def _belongs(path: Path, kind: str, stated: Metadata, task: str, expert: Path, digest: str) -> None:
    """Refuse a statistic of another task, or of another checkpoint than the expert with this digest."""
    title = {"fisher": "Fisher", "gram": "Gram matrices"}[kind]
    if stated.task != task:
        raise UserError(f"{path}: the {title} of task {stated.task}, given for {task}")
    if stated.checkpoint.digest != digest:
        raise UserError(f"{path}: the {title} of another checkpoint than {expert}; make it again")


def _statistics(
    needs: Needs,
    experts: Mapping[str, Path],
    digests: Mapping[str, str],
    fisher_files: Mapping[str, Path],
    gram_files: Mapping[str, Path],
) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """What a method takes beside the experts, as options of `fmn.merged`, and what the recipe says of it.

    Every statistic must be there, and be of the very checkpoint and task that it is given for.
    """
    options: dict[str, Any] = {}
    stated: dict[str, dict[str, Any]] = {"fisher": {}, "gram": {}}

    def take(
        kind: str, option: str, command: str, files: Mapping[str, Path], read: Callable[[Path], Any]
    ) -> None:
        found = {}
        for task, digest in digests.items():
            if task not in files:
                raise UserError(
                    f"--{kind} {task}=FILE is missing: this method weighs by it; `fmn {command}` makes it"
                )
            found[task], metadata = read(files[task])
            _belongs(files[task], kind, metadata, task, experts[task], digest)
            names = (
                "estimator",
                "samples",
                "seed",
                "stratified",
                "dtype",
                "data_digest",
                "threads",
                "key",
            )
            stated[kind][task] = {
                "digest": artifacts.digest_file(files[task]),
                "values": statistics.digest_values(files[task]),
                **metadata.model_dump(include=set(names)),
            }
        options[option] = found

    def nodes(path: Path) -> tuple[Any, Any]:
        values, _, metadata = statistics.read_fisher(path)
        return values, metadata

    def grams(path: Path) -> tuple[Any, Any]:
        from fmn.merge.model import StoredGrams

        headers, metadata = statistics.read_statistic(path, GramMetadata)
        return StoredGrams(headers, metadata.inputs, metadata.transposed), metadata

    if needs.fisher == "nodes":
        take("fisher", "fisher", "fisher", fisher_files, nodes)
    if needs.fisher == "parameters":
        read_full = partial(statistics.read_statistic, record=StatisticMetadata)
        take("fisher", "full_fisher", "full-fisher", fisher_files, read_full)
    if needs.gram:
        take("gram", "grams", "gram", gram_files, grams)
    return options, stated


@dataclass(frozen=True)
class _Inputs:
    """What a merge is made from, checked.

    Attributes:
        experts: digests by task.
        base: digest of the base.
        options: the statistics as `fmn.merged` takes them.
        stated: what the recipe says of them.
    """

    experts: Mapping[str, str]
    base: str | None
    options: Mapping[str, Any]
    stated: Mapping[str, Mapping[str, Any]]

    @property
    def digests(self) -> dict[str, str]:
        named = {f"expert {task}": digest for task, digest in self.experts.items()}
        for kind, entries in self.stated.items():
            named |= {f"{kind} {task}": entry["digest"] for task, entry in entries.items()}
        return named | ({"base": self.base} if self.base else {})


def _inputs(
    experts: Mapping[str, Path],
    fisher_files: Mapping[str, Path],
    gram_files: Mapping[str, Path],
    base: Path | None,
    settings: MergeSettings,
) -> _Inputs:
    digests = {task: artifacts.digest_folder(folder) for task, folder in sorted(experts.items())}
    base_digest = artifacts.digest_folder(base) if base else None
    return _Inputs(
        digests,
        base_digest,
        *_statistics(NEEDS[settings.method], experts, digests, fisher_files, gram_files),
    )


def _described(settings: MergeSettings, *without: str) -> dict[str, Any]:
    """The settings that a merge depends on, but for those named."""
    unused = (
        () if NEEDS[settings.method].fisher == "nodes" else ("mapping", "normalise", "exponent")
    )
    return settings.model_dump(exclude={*unused, *without})


def _tuned_on(expert: Path) -> tuple[int | None, int]:
    """How many training rows an expert was fine-tuned on, and the seed that drew them; (None, 0), all, if not known."""
    manifest = artifacts.read_manifest(expert)
    if manifest is None or manifest["stage"] != "finetune":
        return None, 0
    return int(manifest["info"]["examples"]), int(manifest["info"]["seed"])


def merge(
    experts: Mapping[str, Path],
    fisher_files: Mapping[str, Path],
    base: Path | None,
    out: Path,
    settings: MergeSettings,
    progress: Progress | None = None,
    gram_files: Mapping[str, Path] | None = None,
    coefficients: Path | None = None,
) -> Outcome:
    """The experts merged into the folder ``out``.

    ``coefficients``: a file that `search` made, which gives coefficients and scale.

    Raises UserError when they do not fit one another or their tasks, or when a statistic or the coefficients belong to
    other checkpoints or tasks.
    """
    given = gram_files or {}
    stage.apart(
        out, [*experts.values(), *fisher_files.values(), *given.values(), base, coefficients]
    )
    inputs = _inputs(experts, fisher_files, given, base, settings)
    found = _searched(coefficients, inputs, settings) if coefficients else None
    digests = inputs.digests | ({"coefficients": found["digest"]} if found else {})
    aligned = {
        task: _aligned(experts[task], task, fisher_files.get(task), inputs.experts[task])
        for task in experts
    }
    key = artifacts.content_key("merge", MERGE, _described(settings) | {"labels": aligned}, digests)

    def make() -> None:
        from fmn.merge import model as merged

        checkpoints.check_experts(experts, base)
        lineage: dict[str, Any] = {
            "fmn": __version__,
            "key": key,
            "experts": {
                task: {
                    **stage.lineage(experts[task]),
                    "digest": digest,
                    "settings": stage.tuning(experts[task]),
                    **stage.circumstances(experts[task]),
                }
                for task, digest in inputs.experts.items()
            },
            **inputs.stated,
            "labels": aligned,
            "base": {**stage.lineage(base), "digest": inputs.base} if base else None,
        }
        options = {
            **inputs.options,
            **settings.model_dump(exclude={"coefficient"}),
            "coefficients": settings.coefficients,
            "base": base,
            "labels": {
                task: labels.names_by_output(tasks.task(task), one) for task, one in aligned.items()
            },
        }
        if found:
            lineage["search"] = {name: found[name] for name in ("digest", "score", "uniform")}
            options |= {"coefficients": found["coefficients"], "scale": found["scale"]}
        merged.write(out, experts, recipe=lineage, progress=progress, **options)

    return _run_merged("merge", out, key, make)


def _run_merged(name: str, out: Path, key: str, make: Callable[[], None]) -> Outcome:
    """A stage whose output is a merged model's folder."""

    def current() -> bool:
        try:
            recipe.verify(out)
        except UserError:
            return False
        return bool(recipe.read_recipe(out).get("key") == key)

    outcome = stage.run(name, out, current, make, lambda: recipe.read_recipe(out))
    if not (out / recipe.CARD).is_file():
        card.write(out, None)
    return outcome


def realign(
    model: Path,
    experts: Mapping[str, Path],
    folder: Path,
    out: Path,
    settings: RealignSettings,
    progress: Progress | None = None,
) -> Outcome:
    """The merged model ``model`` with every head re-aligned with its encoder (`fmn.heads`), as the folder ``out``.

    Heads are fitted to what the experts answer to texts of the training splits below ``folder``, whose labels are not
    read. Files that stay as they are are hard links to those of ``model``.

    Raises UserError where an expert is missing, or not the one that was merged.
    """
    stage.apart(out, [model, *experts.values(), folder])
    recipe.verify(model)
    made = recipe.read_recipe(model)
    if "realign" in made:
        raise UserError(
            f"{model}: its heads are re-aligned already; give the model that they were re-aligned from"
        )
    found = {name: tasks.task(name) for name in made["tasks"]}
    for name in found:
        if name not in experts:
            raise UserError(
                f"--expert {name}=DIR is missing: its head is fitted to what it answers"
            )
        if made.get("experts", {}).get(name, {}).get("digest") != artifacts.digest_folder(
            experts[name]
        ):
            raise UserError(
                f"expert {name}: {experts[name]} is not what {model} was merged from; give that one"
            )
    tuned_on = {name: _tuned_on(experts[name]) for name in found}
    inputs = {
        f"data {name}": data.digests(folder, task, ["train"])["train"]
        for name, task in found.items()
    }
    parent = artifacts.digest_file(model / recipe.RECIPE)
    described = {
        **settings.model_dump(exclude={"device"}),
        "tuned on": {n: list(rows) for n, rows in tuned_on.items()},
    }
    key = artifacts.content_key("realign", REALIGN, described, {"merged": parent, **inputs})

    def make() -> None:
        from fmn.experiments import trial
        from fmn.merge import heads
        from fmn.merge import model as merged

        changed, fits = {}, {}
        for done, (name, task) in enumerate(found.items()):
            examples = trial.unlabeled(
                experts[name],
                task,
                folder,
                stage.limit(settings.texts),
                settings.seed,
                tuned_on[name],
            )
            expert, together = (
                checkpoints.load_classifier(path)
                for path in (experts[name], recipe.task_folder(model, name))
            )
            own, read = (
                heads.features(each, examples, device=settings.device, dtype=settings.dtype)
                for each in (expert, together)
            )
            fit = heads.refit(own, read, *heads.last_map(expert), settings.ridge)
            changed[name] = heads.tensors(expert, fit)
            fits[name] = {
                "texts": len(examples),
                "ridge": fit.ridge,
                "before": fit.before,
                "after": fit.after,
            }
            if progress:
                progress(done + 1, len(found))
        stated = {
            "merged": parent,
            **settings.model_dump(exclude={"device"}),
            "data": inputs,
            "tasks": fits,
        }
        merged.with_heads(out, model, changed, {"fmn": __version__, "key": key, "realign": stated})

    return _run_merged("realign", out, key, make)


def _searched(file: Path, inputs: _Inputs, settings: MergeSettings) -> dict[str, Any]:
    """What `search` found, with the file's digest; UserError where it was for another merge than this."""
    found = artifacts.read_json(file, formats.Found, "`fmn search` makes coefficients")
    if settings.coefficient or settings.scale != "auto":
        raise UserError(
            f"--coefficients {file} gives coefficients and scale; leave out --coefficient and --scale"
        )
    if wrong := artifacts.differing(found["experts"], inputs.experts):
        raise UserError(
            f"{file}: coefficients of other experts than these (see {wrong}); search again"
        )
    wanted, there = _described(settings, "coefficient", "scale"), found["merge"]
    if wrong := next(
        (name for name in {**wanted, **there} if wanted.get(name) != there.get(name)), None
    ):
        raise UserError(
            f"{file}: coefficients for a merge with another {wrong}; search again, or merge like that"
        )
    return {**found, "digest": artifacts.digest_file(file)}


def _aligned(expert: Path, task: str, fisher_file: Path | None, digest: str) -> labels.Labels:
    """How an expert's outputs stand for the task's labels, without data: by names, or as its Fisher artifact says."""
    found = tasks.task(task)
    named = labels.by_names(found, labels.output_names(expert))
    if named is not None or fisher_file is None:
        return named or labels.as_they_stand(found)
    large = fisher_file.suffix == ".safetensors"
    stated: Metadata = (
        statistics.read_statistic(fisher_file, StatisticMetadata)[1]
        if large
        else statistics.read_fisher(fisher_file)[2]
    )
    _belongs(fisher_file, "fisher", stated, task, expert, digest)
    recorded = stated.labels.get(task)
    if recorded is None:
        return labels.as_they_stand(found)
    aligned: labels.Labels = recorded.model_dump(by_alias=True)  # type: ignore[assignment]
    return aligned
