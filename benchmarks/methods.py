"""What each merge method costs: its statistics of an expert, and the merge itself; time, memory and bytes side by side.

    python -m benchmarks.methods --params params/study-0.yaml --task sst2 --out DIR [--rounds 3]

Experts, base, data and statistics are those that `fmn compare` left in the profile's work folder. Every stage is run in
a process of its own that has run it once before on other inputs or outputs, so neither the start of Python nor imports
count; memory is the peak of the resident set above what it was before. Contestants alternate, round by round; figures
are medians. DIR gets results.json and table.md, which `python -m benchmarks.results --add` keeps.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.results import keep
from fmn import params
from fmn.merge.methods import METHODS
from fmn.report.results import markdown

ROOT = Path(__file__).resolve().parent.parent

# argv: the stage's kind, its JSON arguments, an output, another output
STAGE = """
import json, shutil, sys, time
from pathlib import Path
from fmn import params
kind, given, first, out = sys.argv[1], json.loads(sys.argv[2]), Path(sys.argv[3]), Path(sys.argv[4])
paths = lambda named: {name: Path(path) for name, path in named.items()}
def work(out):
    if kind == "merge":
        settings = merge_stages.MergeSettings(**given["settings"])
        experts, fisher, gram = (paths(given[name]) for name in ("experts", "fisher", "gram"))
        merge_stages.merge(experts, fisher, Path(given["base"]), out, settings, gram_files=gram)
    else:
        stage, settings = {
            "fisher": (fisher_stages.fisher, fisher_stages.FisherSettings),
            "full-fisher": (fisher_stages.full_fisher, fisher_stages.FullFisherSettings),
            "gram": (fisher_stages.gram, fisher_stages.GramSettings),
        }[kind]
        expert, data = Path(given["expert"]), Path(given["data"])
        stage(expert, task=given["task"], data=data, out=out, settings=settings(**given["settings"]))
def resident(name):
    status = Path("/proc/self/status").read_text()
    return 1024 * next(int(line.split()[1]) for line in status.splitlines() if line.startswith(name))
work(first)
Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
before, began = resident("VmRSS:"), time.perf_counter()
work(out)
seconds = time.perf_counter() - began
print(json.dumps({"seconds": seconds, "peak": resident("VmHWM:") - before}))
"""


def measure(kind: str, given: Mapping[str, Any], folder: Path) -> dict[str, float]:
    """Seconds, and bytes of memory at the peak, of a stage that writes into `folder`."""
    suffix = {"merge": "", "fisher": ".parquet"}.get(kind, ".safetensors")
    with tempfile.TemporaryDirectory(dir=folder) as place:
        outs = [str(Path(place) / f"{name}{suffix}") for name in ("first", "out")]
        done = subprocess.run(
            [sys.executable, "-c", STAGE, kind, json.dumps(given), *outs],
            env={**os.environ, "PYTHONPATH": str(ROOT), "TQDM_DISABLE": "1"},
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        if done.returncode:
            sys.exit(done.stderr[-2000:])
        found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
        if kind != "merge":
            found["bytes"] = Path(outs[1]).stat().st_size
        return found


def contestants(profile: Path, task: str, samples: int) -> dict[str, tuple[str, dict[str, Any]]]:
    """Stage and arguments of the statistics of one expert, and of the merge of all experts with every method."""
    settings = params.load(profile)
    work = Path(settings.work)
    names = settings.experts.tasks
    expert = {"expert": str(work / "experts" / task), "task": task, "data": str(work / "data")}
    found: dict[str, tuple[str, dict[str, Any]]] = {
        kind: (kind, {**expert, "settings": {"samples": samples}})
        for kind in ("fisher", "gram", "full-fisher")
    }
    for method, needs in METHODS.items():
        fisher = {"nodes": ".parquet", "parameters": ".full.safetensors", None: None}[needs.fisher]
        found[f"merge, {method}"] = (
            "merge",
            {
                "settings": {"method": method},
                "experts": {name: str(work / "experts" / name) for name in names},
                "fisher": {name: str(work / "fisher" / f"{name}{fisher}") for name in names}
                if fisher
                else {},
                "gram": {name: str(work / "fisher" / f"{name}.gram.safetensors") for name in names}
                if needs.gram
                else {},
                "base": str(work / "base"),
            },
        )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--params", type=Path, required=True)
    parser.add_argument("--task", required=True, help="the expert whose statistics are timed")
    parser.add_argument("--samples", type=int, default=64, help="examples that the statistics take")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    chosen = contestants(given.params, given.task, given.samples)
    given.out.mkdir(parents=True, exist_ok=True)
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in chosen}
    for _ in range(given.rounds):
        for name, (kind, arguments) in chosen.items():
            runs[name].append(measure(kind, arguments, given.out))
    found = {
        name: {key: statistics.median(one[key] for one in each) for key in each[0]}
        for name, each in runs.items()
    }
    average = found["merge, average"]["seconds"]
    of_one = [
        [name, f"{one['seconds']:.2f}", f"{one['seconds'] / found['fisher']['seconds']:.1f}",
         f"{one['peak'] / 1e6:.0f}", f"{one['bytes'] / 1e6:.2f}"]
        for name, one in found.items() if "bytes" in one
    ]  # fmt: skip
    of_all = [
        [name.removeprefix("merge, "), f"{one['seconds']:.2f}", f"{one['seconds'] / average:.1f}",
         f"{one['peak'] / 1e6:.0f}"]
        for name, one in found.items() if "bytes" not in one
    ]  # fmt: skip
    experts = len(chosen["merge, average"][1]["experts"])
    text = [
        f"Statistics of one expert ({given.task}), {given.samples} examples; medians of {given.rounds} rounds.",
        "",
        markdown(
            ["statistic", "seconds", "to mask Fisher's", "peak memory, MB", "file, MB"], of_one
        ),
        f"Merging {experts} experts as `fmn merge` does: inputs checked and digested, the model written and flushed.",
        "",
        markdown(["method", "seconds", "to average's", "peak memory, MB"], of_all),
    ]
    keep(given.out, {"medians": found}, "\n".join(text))


if __name__ == "__main__":
    main()
