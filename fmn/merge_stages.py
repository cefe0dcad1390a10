"""The stages that combine experts: merging, re-aligning heads, searching coefficients, comparing methods."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fmn import __version__, artifacts, card, checkpoints, data, formats, labels, recipe, stage, statistics, tasks
from fmn.errors import UserError
from fmn.methods import NEEDS, Needs
from fmn.params import (
    ComparedSettings,
    CompareSettings,
    MergeSettings,
    RealignSettings,
    SearchSettings,
)
from fmn.stage import Outcome, Progress

if TYPE_CHECKING:
    import numpy as np

    from fmn.batches import Examples
    from fmn.search import Trial
    from fmn.trial import Contender

SEARCH = 2
MERGE = 4
REALIGN = 2
COMPARE = 3
COMPARISON = 2


def _belongs(path: Path, kind: str, stated: Mapping[str, Any], task: str, expert: Path, digest: str) -> None:
    """Refuse a statistic of another task, or of another checkpoint than the expert with this digest."""
    title = {"fisher": "Fisher", "gram": "Gram matrices"}[kind]
    formats.check(stated, formats.Statistic, path, "make it again")
    if stated["task"] != task:
        raise UserError(f"{path}: the {title} of task {stated['task']}, given for {task}")
    if stated["checkpoint"]["digest"] != digest:
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

    def take(kind: str, option: str, command: str, files: Mapping[str, Path], read: Callable[[Path], Any]) -> None:
        found = {}
        for task, digest in digests.items():
            if task not in files:
                raise UserError(f"--{kind} {task}=FILE is missing: this method weighs by it; `fmn {command}` makes it")
            found[task], metadata = read(files[task])
            _belongs(files[task], kind, metadata, task, experts[task], digest)
            names = ("estimator", "samples", "seed", "stratified", "dtype", "data_digest", "threads", "key")
            stated[kind][task] = {
                "digest": artifacts.digest_file(files[task]),
                "values": artifacts.digest_values(files[task]),
                **{name: metadata[name] for name in names if name in metadata},
            }
        options[option] = found

    def nodes(path: Path) -> tuple[Any, Any]:
        values, _, metadata = artifacts.read_fisher(path)
        return values, metadata

    def grams(path: Path) -> tuple[Any, Any]:
        from fmn.merged import StoredGrams

        headers, metadata = statistics.read(path, "gram")
        formats.check(metadata, formats.GramMatrices, path, "make it again")
        return StoredGrams(headers, metadata["inputs"], metadata["transposed"]), metadata

    if needs.fisher == "nodes":
        take("fisher", "fisher", "fisher", fisher_files, nodes)
    if needs.fisher == "parameters":
        read_full = partial(statistics.read, kind="full-fisher")
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
        digests, base_digest, *_statistics(NEEDS[settings.method], experts, digests, fisher_files, gram_files)
    )


def _described(settings: MergeSettings, *without: str) -> dict[str, Any]:
    """The settings that a merge depends on, but for those named."""
    unused = () if NEEDS[settings.method].fisher == "nodes" else ("mapping", "normalise", "exponent")
    return settings.model_dump(exclude={*unused, *without})


def search(
    experts: Mapping[str, Path],
    fisher_files: Mapping[str, Path],
    gram_files: Mapping[str, Path],
    base: Path | None,
    folder: Path,
    out: Path,
    merging: MergeSettings,
    settings: SearchSettings,
    progress: Progress | None = None,
) -> Outcome:
    """Coefficients for a merge, found by search, as a JSON file that `merge` takes.

    They are chosen by the mean over tasks of the score relative to the expert's, on rows of the training splits below
    ``folder``, those that the expert was not fine-tuned on where there are some; equal coefficients are the first
    trial. Trials are logged to MLflow, and kept beside ``out``: a search that was killed, or is given a larger budget,
    goes on from them.

    Raises UserError as `merge` does, and where an expert scores nothing that others could be compared with.
    """
    stage.apart(out, [*experts.values(), *fisher_files.values(), *gram_files.values(), base, folder])
    searched = settings.scale_range is not None
    for option, given in (("coefficient", merging.coefficient), ("scale", searched and merging.scale != "auto")):
        if given:
            raise UserError(f"--{option}: the search is to find it; leave it out")
    if len(experts) < 2 and not searched:
        raise UserError("one expert has no coefficients to search; give more as --expert TASK=DIR, or --scale-range")
    if searched and base is None:
        raise UserError("--scale-range needs the model that the experts were tuned from; give --base DIR")
    inputs = _inputs(experts, fisher_files, gram_files, base, merging)
    found = {task: tasks.task(task) for task in sorted(experts)}
    tuned_on = {task: _tuned_on(path) for task, path in sorted(experts.items())}
    described = {
        "merge": _described(merging, "coefficient"),
        **settings.model_dump(exclude={"trials", "experiment", "device"}),
        "tuned on": {task: list(rows) for task, rows in tuned_on.items()},
    }
    rows = {f"data {name}": data.digests(folder, task, ["train"])["train"] for name, task in found.items()}
    study = artifacts.content_key("search", SEARCH, described, {**inputs.digests, **rows})
    key = artifacts.content_key("search", SEARCH, {"study": study, "trials": settings.trials}, {})

    def compute() -> Mapping[str, Any]:
        from fmn import merged, registry, search, trial

        checkpoints.check_experts(experts, base)
        options = {**inputs.options, **merging.model_dump(exclude={"coefficient"}), "base": base}
        scale = merged.scale(experts, **options)
        encoder = merged.recombiner(experts, searched or scale != 1, **options)
        limit = (stage.limit(settings.rows), settings.search_seed, settings.device, settings.dtype)
        contenders = {
            name: trial.contender(experts[name], task, folder, "train", *limit, tuned_on[name])
            for name, task in found.items()
        }
        for name, one in contenders.items():
            if one.score <= 0:
                raise UserError(
                    f"expert {name}: scores {one.score:.3f} on {len(one.examples)} rows of its training data, which no"
                    " merge can be compared with; give more --rows, or a better expert"
                )

        def attempt(coefficients: Mapping[str, float], scale: float) -> dict[str, float]:
            return trial.relative_scores(contenders, encoder(coefficients, scale), settings.device, settings.dtype)

        params = {**described["merge"], **settings.model_dump(exclude={"trials", "experiment"}), "scale": scale}

        def log(done: "Sequence[Trial]") -> None:
            registry.log_trials(
                [_metrics(one) for one in done],
                name=f"search {', '.join(found)}",
                experiment=settings.experiment,
                key=study,
                params={**params, "tasks": ", ".join(found)},
            )
            if progress:
                progress(len(done), settings.trials)

        trials = search.search(
            attempt, list(found), settings.scale_range, scale=scale, trials=settings.trials,
            seed=settings.search_seed, file=out.with_name(f".{out.name}.trials"), name=study, report=log,
        )  # fmt: skip
        best, uniform = max(trials, key=lambda one: one.score), trials[0]
        return {
            "coefficients": best.coefficients,
            "scale": best.scale,
            "score": best.score,
            "uniform": uniform.score,
            "tasks": {
                name: {"expert": one.score, "uniform": uniform.scores[name], "found": best.scores[name]}
                for name, one in contenders.items()
            },
            "rows": {name: len(one.examples) for name, one in contenders.items()},
            "experts": inputs.experts,
            "merge": _described(merging, "coefficient", "scale"),
            "trials": [
                {"coefficients": one.coefficients, "scale": one.scale, "score": one.score, "tasks": one.scores}
                for one in trials
            ],
        }

    return stage.run_json("search", out, key, compute)


def _tuned_on(expert: Path) -> tuple[int | None, int]:
    """How many training rows an expert was fine-tuned on, and the seed that drew them; (None, 0), all, if not known."""
    manifest = artifacts.read_manifest(expert)
    if manifest is None or manifest["stage"] != "finetune":
        return None, 0
    return int(manifest["info"]["examples"]), int(manifest["info"]["seed"])


def _metrics(one: "Trial") -> dict[str, float]:
    """A trial as MLflow shows it."""
    return {
        "score": one.score,
        "scale": one.scale,
        **{f"coefficient.{name}": value for name, value in one.coefficients.items()},
        **{f"relative.{name}": value for name, value in one.scores.items()},
    }


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
    stage.apart(out, [*experts.values(), *fisher_files.values(), *given.values(), base, coefficients])
    inputs = _inputs(experts, fisher_files, given, base, settings)
    found = _searched(coefficients, inputs, settings) if coefficients else None
    digests = inputs.digests | ({"coefficients": found["digest"]} if found else {})
    aligned = {task: _aligned(experts[task], task, fisher_files.get(task), inputs.experts[task]) for task in experts}
    key = artifacts.content_key("merge", MERGE, _described(settings) | {"labels": aligned}, digests)

    def make() -> None:
        from fmn import merged

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
            "labels": {task: labels.names_by_output(tasks.task(task), one) for task, one in aligned.items()},
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
        raise UserError(f"{model}: its heads are re-aligned already; give the model that they were re-aligned from")
    found = {name: tasks.task(name) for name in made["tasks"]}
    for name in found:
        if name not in experts:
            raise UserError(f"--expert {name}=DIR is missing: its head is fitted to what it answers")
        if made.get("experts", {}).get(name, {}).get("digest") != artifacts.digest_folder(experts[name]):
            raise UserError(f"expert {name}: {experts[name]} is not what {model} was merged from; give that one")
    tuned_on = {name: _tuned_on(experts[name]) for name in found}
    inputs = {f"data {name}": data.digests(folder, task, ["train"])["train"] for name, task in found.items()}
    parent = artifacts.digest_file(model / recipe.RECIPE)
    described = {**settings.model_dump(exclude={"device"}), "tuned on": {n: list(rows) for n, rows in tuned_on.items()}}
    key = artifacts.content_key("realign", REALIGN, described, {"merged": parent, **inputs})

    def make() -> None:
        from fmn import heads, merged, trial

        changed, fits = {}, {}
        for done, (name, task) in enumerate(found.items()):
            examples = trial.unlabeled(
                experts[name], task, folder, stage.limit(settings.texts), settings.seed, tuned_on[name]
            )
            expert, together = (
                checkpoints.load_classifier(path) for path in (experts[name], recipe.task_folder(model, name))
            )
            own, read = (
                heads.features(each, examples, device=settings.device, dtype=settings.dtype)
                for each in (expert, together)
            )
            fit = heads.refit(own, read, *heads.last_map(expert), settings.ridge)
            changed[name] = heads.tensors(expert, fit)
            fits[name] = {"texts": len(examples), "ridge": fit.ridge, "before": fit.before, "after": fit.after}
            if progress:
                progress(done + 1, len(found))
        stated = {"merged": parent, **settings.model_dump(exclude={"device"}), "data": inputs, "tasks": fits}
        merged.with_heads(out, model, changed, {"fmn": __version__, "key": key, "realign": stated})

    return _run_merged("realign", out, key, make)


def _searched(file: Path, inputs: _Inputs, settings: MergeSettings) -> dict[str, Any]:
    """What `search` found, with the file's digest; UserError where it was for another merge than this."""
    found = artifacts.read_json(file, formats.Found, "`fmn search` makes coefficients")
    if settings.coefficient or settings.scale != "auto":
        raise UserError(f"--coefficients {file} gives coefficients and scale; leave out --coefficient and --scale")
    if wrong := artifacts.differing(found["experts"], inputs.experts):
        raise UserError(f"{file}: coefficients of other experts than these (see {wrong}); search again")
    wanted, there = _described(settings, "coefficient", "scale"), found["merge"]
    if wrong := next((name for name in {**wanted, **there} if wanted.get(name) != there.get(name)), None):
        raise UserError(f"{file}: coefficients for a merge with another {wrong}; search again, or merge like that")
    return {**found, "digest": artifacts.digest_file(file)}


def _aligned(expert: Path, task: str, fisher_file: Path | None, digest: str) -> labels.Labels:
    """How an expert's outputs stand for the task's labels, without data: by names, or as its Fisher artifact says."""
    found = tasks.task(task)
    named = labels.by_names(found, labels.output_names(expert))
    if named is not None or fisher_file is None:
        return named or labels.as_they_stand(found)
    large = fisher_file.suffix == ".safetensors"
    stated = statistics.read(fisher_file, "full-fisher")[1] if large else artifacts.read_fisher(fisher_file)[2]
    _belongs(fisher_file, "fisher", stated, task, expert, digest)
    recorded: labels.Labels | None = stated.get("labels", {}).get(task)
    return recorded or labels.as_they_stand(found)


@lru_cache(maxsize=16)
def _contender(_expert: str, _data: str, checkpoint: Path, task: str, *rest: Any) -> "Contender":
    """`trial.contender`, once a process for the cells that share it; the digests see to it that it is the same."""
    from fmn import trial

    return trial.contender(checkpoint, tasks.task(task), *rest)


@lru_cache(maxsize=16)
def _unlabeled(_train: str, contender: tuple[Any, ...], texts: int | None, seed: int) -> "tuple[Examples, np.ndarray]":
    """`trial.unlabeled` and what the expert's head reads of them, once a process; never the rows that it is tried on.

    Args:
        contender: the arguments of `_contender`.
    """
    from fmn import heads, trial

    _, _, checkpoint, _, folder, split, _, _, device, dtype, tuned_on = contender
    one = _contender(*contender)
    without = one.rows if split == "train" else ()
    examples = trial.unlabeled(checkpoint, one.task, folder, texts, seed, tuned_on, without)
    return examples, heads.features(one.model, examples, device=device, dtype=dtype)


def compare(
    experts: Mapping[str, Path],
    fisher_files: Mapping[str, Path],
    gram_files: Mapping[str, Path],
    base: Path,
    folder: Path,
    out: Path,
    merging: ComparedSettings,
    settings: CompareSettings,
    tuned_on: Mapping[str, tuple[int | None, int]],
) -> Outcome:
    """A cell of a comparison: some experts merged in one way, in memory, and tried on their tasks.

    Args:
        tuned_on: by task, how many training rows the expert was fine-tuned on and the seed that drew them.
    """
    needs = NEEDS[merging.method]
    digests = {task: artifacts.digest_folder(path) for task, path in sorted(experts.items())}
    options, stated = _statistics(needs, experts, digests, fisher_files, gram_files)
    splits = {
        task: data.validation_splits(folder, tasks.task(task))[0] if settings.split == "validation" else "train"
        for task in digests
    }
    inputs = {f"expert {task}": digest for task, digest in digests.items()} | {"base": artifacts.digest_folder(base)}
    inputs |= {f"{kind} {task}": entry["digest"] for kind, entries in stated.items() for task, entry in entries.items()}
    inputs |= {task: data.digests(folder, tasks.task(task), [split])[split] for task, split in splits.items()}
    realign = merging.realign
    train = {task: data.digests(folder, tasks.task(task), ["train"])["train"] for task in digests} if realign else {}
    inputs |= {f"train {task}": digest for task, digest in train.items()}
    described = {
        "merge": merging.model_dump(exclude=set() if realign else {"realign"}),
        "rows": {
            **settings.model_dump(include={"split", "seed", "dtype"}),
            "rows": {task: settings.rows_of(task) for task in digests},
        },
        "tuned on": {task: list(tuned_on[task]) for task in digests} if realign or settings.split == "train" else None,
    }
    key = artifacts.content_key("compare", COMPARE, described, inputs)

    def compute() -> Mapping[str, Any]:
        from fmn import merged, trial
        from fmn.evaluate import answers, score

        started = time.monotonic()
        how = merging.model_dump(exclude={"coefficient", "estimator", "realign"})
        how |= {**options, "coefficients": merging.coefficients, "base": base}
        encoder = merged.in_memory(experts, **how)
        seconds = time.monotonic() - started
        entries = {}
        for task, split in splits.items():
            where = (settings.device, settings.dtype)
            drawn = (stage.limit(settings.rows_of(task)), settings.seed)
            asked = (digests[task], inputs[task], experts[task], task, folder, split, *drawn, *where, tuned_on[task])
            one, head = _contender(*asked), None
            if realign:
                texts = _unlabeled(train[task], asked, stage.limit(realign.texts), realign.seed)
                started = time.monotonic()
                head = trial.realigned(one, encoder, *texts, realign.ridge, *where)
                seconds += time.monotonic() - started
            outputs = trial.logits(one, encoder, *where, head)
            reached = score(one.task, outputs, one.examples.labels)["score"]
            entries[task] = {
                "score": reached,
                "expert": one.score,
                "relative": reached / one.score if one.score > 0 else None,
                "labels": one.examples.labels.tolist(),
                "predictions": answers(one.task, outputs, one.examples.labels).predicted.tolist(),
                "expert predictions": answers(one.task, one.logits, one.examples.labels).predicted.tolist(),
            }
        return {"tasks": entries, "seconds": seconds}

    return stage.run_json("compare", out, key, compute)


def write_comparison(cells: Mapping[str, Mapping[str, Path]], out: Path) -> Outcome:
    """The tables of a comparison in the folder ``out``, from its cells' files by set and method."""
    inputs = {
        f"{name}/{method}": artifacts.digest_file(stage.there(path))
        for name, row in cells.items()
        for method, path in row.items()
    }
    key = artifacts.content_key("comparison", COMPARISON, {"order": list(inputs)}, inputs)

    def fill(target: Path) -> Mapping[str, Any]:
        from fmn import comparison

        read = {
            name: {method: artifacts.read_json(path, formats.Cell) for method, path in row.items()}
            for name, row in cells.items()
        }
        return comparison.write(target, read)

    return stage.run_folder("comparison", out, key, fill)
