"""What each merge method costs: its statistics of an expert, and the merge itself.

    python -m benchmarks.methods --params params/study-0.yaml --task sst2 --out DIR [--rounds 3]

Experts, base, data and statistics are those that `fmn compare` left in the profile's work folder.
Every stage runs in a process of its own that has run it once before with another output, so neither
the start of Python nor imports count; memory is the peak of the resident set above what it was
before. Contestants alternate, round by round; figures are medians. DIR gets results.json and
table.md, which `python -m benchmarks.results --add` keeps.
"""

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.results import SPENT, keep, parser, run
from fmn import params
from fmn.merge.methods import METHODS
from fmn.report.wording import markdown

# argv: the stage's kind, its JSON arguments, an output, another output
STAGE = """
from fmn.fisher import stages as fisher_stages
from fmn.merge import stages as merge_stages
kind, arguments, first, out = sys.argv[1], json.loads(sys.argv[2]), *map(Path, sys.argv[3:])
function, settings = {
    "merge": (merge_stages.merge, merge_stages.MergeSettings),
    "fisher": (fisher_stages.fisher, fisher_stages.FisherSettings),
    "full-fisher": (fisher_stages.full_fisher, fisher_stages.FullFisherSettings),
    "gram": (fisher_stages.gram, fisher_stages.GramSettings),
}[kind]
def as_paths(value):
    is_mapping = isinstance(value, dict)
    return {name: Path(path) for name, path in value.items()} if is_mapping else Path(value)
paths = {name: as_paths(value) for name, value in arguments["paths"].items()}
positional = [paths.pop("checkpoint")] if "checkpoint" in paths else []
def work(out):
    options = {**paths, **arguments["options"], "settings": settings(**arguments["settings"])}
    function(*positional, out=out, **options)
work(first)
print(json.dumps(spent(lambda: work(out))))
"""


def measure(kind: str, arguments: Mapping[str, Any], folder: Path) -> dict[str, float]:
    """Seconds, and bytes of memory at the peak, of a stage that writes into `folder`."""
    suffix = {"merge": "", "fisher": ".parquet"}.get(kind, ".safetensors")
    with tempfile.TemporaryDirectory(dir=folder) as place:
        outs = [Path(place) / f"{name}{suffix}" for name in ("first", "out")]
        output = run(sys.executable, SPENT + STAGE, kind, json.dumps(arguments), *outs)
        measured: dict[str, float] = json.loads(output)
        if kind != "merge":
            measured["bytes"] = outs[1].stat().st_size
        return measured


def contestants(profile: Path, task: str, samples: int) -> dict[str, tuple[str, dict[str, Any]]]:
    """Stage and arguments of an expert's statistics, and of the merge with every method."""
    settings = params.load(profile)
    work, names = Path(settings.work), settings.experts.tasks

    def of_all(folder: str, suffix: str = "") -> dict[str, str]:
        return {name: str(work / folder / f"{name}{suffix}") for name in names}

    expert = {"checkpoint": str(work / "experts" / task), "data": str(work / "data")}
    options = {"settings": {"samples": samples}, "options": {"task": task}, "paths": expert}
    chosen: dict[str, tuple[str, dict[str, Any]]] = {
        kind: (kind, options) for kind in ("fisher", "gram", "full-fisher")
    }
    for name, method in METHODS.items():
        paths: dict[str, Any] = {"base": str(work / "base"), "experts": of_all("experts")}
        if method.fisher:
            suffix = {"nodes": ".parquet", "parameters": ".full.safetensors"}[method.fisher]
            paths["fisher"] = of_all("fisher", suffix)
        if method.gram:
            paths["gram"] = of_all("gram", ".gram.safetensors")
        merge = {"settings": {"method": name}, "options": {}, "paths": paths}
        chosen[f"merge, {name}"] = ("merge", merge)
    return chosen


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--params", type=Path, required=True)
    options.add_argument("--task", required=True, help="the expert whose statistics are timed")
    options.add_argument("--samples", type=int, default=64, help="that the statistics take")
    options.add_argument("--rounds", type=int, default=3)
    options.add_argument("--out", type=Path, required=True)
    arguments = options.parse_args()
    chosen = contestants(arguments.params, arguments.task, arguments.samples)
    arguments.out.mkdir(parents=True, exist_ok=True)
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in chosen}
    for _ in range(arguments.rounds):
        for name, (kind, contestant) in chosen.items():
            runs[name].append(measure(kind, contestant, arguments.out))
    medians = {
        name: {key: statistics.median(run[key] for run in each) for key in each[0]}
        for name, each in runs.items()
    }
    keep(arguments.out, {"medians": medians}, table(medians, arguments))


def table(medians: Mapping[str, Mapping[str, float]], arguments: argparse.Namespace) -> str:
    """The tables of the statistics and of the merges."""
    fisher, average = (medians[name]["seconds"] for name in ("fisher", "merge, average"))
    of_statistics, of_merges = [], []
    for name, cost in medians.items():
        seconds, peak = cost["seconds"], f"{cost['peak'] / 1e6:.0f}"
        if "bytes" in cost:
            size = f"{cost['bytes'] / 1e6:.2f}"
            row = [name, f"{seconds:.2f}", f"{seconds / fisher:.1f}", peak, size]
            of_statistics.append(row)
        else:
            name = name.removeprefix("merge, ")
            of_merges.append([name, f"{seconds:.2f}", f"{seconds / average:.1f}", peak])
    statistics_titles = ["statistic", "seconds", "to mask Fisher's", "peak memory, MB", "file, MB"]
    merge_titles = ["method", "seconds", "to average's", "peak memory, MB"]
    return f"""Statistics of one expert ({arguments.task}), {arguments.samples} examples; \
medians of {arguments.rounds} rounds.

{markdown(statistics_titles, of_statistics)}
Merging all experts as `fmn merge` does: inputs checked and digested, the model written and flushed.

{markdown(merge_titles, of_merges)}"""


if __name__ == "__main__":
    main()
