"""Our merge beside plain file copies and beside mergekit's linear merge, on the same files in one run.

    python benchmarks/merge.py --work DIR --out result.json [--rounds 5] [--experts 4] [--layers 12] [--no-mergekit]

Experts of BERT-base's sizes with random weights are written below DIR. Every round runs each contestant once, in a
process of its own, copy first, so the page cache is warm for all others. Times are of the work alone, without starting
Python or importing libraries; memory is the peak of the resident set above what it was when the work began.

- copy: every input read through one buffer, and the bytes of one of them written and flushed to the disk.
- average, mask-fisher: `fmn.merged.write`, which also flushes to the disk, takes digests and writes the heads.
- mergekit: its linear merge through its own Python interface, from an environment made for it below DIR.

mergekit's tensors must equal those of `average` to 1e-6, else the benchmark fails.
"""

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import time
import venv
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
MERGEKIT = ("torch==2.13.0", "mergekit")

MEASURE = """
import json, time
from pathlib import Path
def resident(name):
    status = Path("/proc/self/status").read_text()
    return 1024 * next(int(line.split()[1]) for line in status.splitlines() if line.startswith(name))
Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
before, began, cpu = resident("VmRSS:"), time.perf_counter(), time.process_time()
work()
spent = {"seconds": time.perf_counter() - began, "cpu seconds": time.process_time() - cpu}
print(json.dumps({**spent, "bytes": resident("VmHWM:") - before}))
"""
COPY = """
import os, sys
def work():
    inputs, out = sys.argv[1:-1], sys.argv[-1]
    buffer = memoryview(bytearray(4 << 20))
    with open(out, "wb", buffering=0) as target:
        for number, name in enumerate(inputs):
            with open(f"{name}/model.safetensors", "rb", buffering=0) as source:
                while count := source.readinto(buffer):
                    if number == 0:
                        target.write(buffer[:count])
        os.fsync(target.fileno())
"""
OURS = """
import sys
from pathlib import Path
import numpy as np
from fmn import merged
from fmn.architectures import Site
method, *inputs, out = sys.argv[1:]
experts = {Path(name).name: Path(name) for name in inputs}
config = merged.checkpoints.load_config(Path(inputs[0]))
random = np.random.default_rng(0)
sizes = {"head": config.num_attention_heads, "neuron": config.intermediate_size}
fisher = {
    task: {
        Site(layer, node): random.gamma(1.0, size=size)
        for layer in range(config.num_hidden_layers)
        for node, size in sizes.items()
    }
    for task in experts
}
def work():
    merged.write(Path(out), experts, method=method, fisher=fisher if method == "mask-fisher" else None)
"""
THEIRS = """
import sys
import yaml
from mergekit.config import MergeConfiguration
from mergekit.merge import run_merge
from mergekit.options import MergeOptions
*inputs, out = sys.argv[1:]
config = MergeConfiguration.model_validate({
    "merge_method": "linear",
    "dtype": "float32",
    "parameters": {"weight": 1.0},
    "models": [{"model": name} for name in inputs],
})
def work():
    run_merge(config, out, MergeOptions(copy_tokenizer=False, write_model_card=False))
"""
MAKE = """
import sys
from pathlib import Path
import torch
from transformers import BertConfig, BertForSequenceClassification
layers, *outs = sys.argv[1:]
for seed, out in enumerate(outs):
    torch.manual_seed(seed)
    BertForSequenceClassification(BertConfig(num_hidden_layers=int(layers))).save_pretrained(out)
    (Path(out) / "vocab.txt").write_text("[PAD]\\n")
"""
COMPARE = """
import sys
import torch
from safetensors import safe_open
def tensors(path):
    with safe_open(path, "pt") as file:
        for name in file.keys():
            yield name.removeprefix("bert."), file.get_tensor(name)
ours = dict(tensors(sys.argv[1]))
worst, compared = 0.0, 0
for path in sys.argv[2:]:
    for name, tensor in tensors(path):
        if name in ours:
            worst, compared = max(worst, float((tensor - ours[name]).abs().max())), compared + 1
assert compared == len(ours), (compared, len(ours))
print(worst)
"""


def run(python: Path, code: str, *arguments: object) -> str:
    """The last line that a program prints."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"}
    command = [str(python), "-c", code, *map(str, arguments)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(done.stderr.splitlines()[-3:])}")
    return done.stdout.splitlines()[-1]


def mergekit(folder: Path) -> tuple[Path, str] | None:
    """The Python of an environment with mergekit, made on first use, and its version; None if it does not install."""
    python = folder / "bin" / "python"
    if not python.exists():
        venv.create(folder, with_pip=True)
    for package in MERGEKIT:  # torch first, so that no other build of it is taken
        done = subprocess.run([python, "-m", "pip", "install", "-q", MERGEKIT[0], package], check=False)
        if done.returncode:
            return None
    version = "import importlib.metadata as m; print(m.version('mergekit'))"
    return python, run(python, version)


def summary(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "least": min(values), "most": max(values)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="a folder on the disk to measure; removed at the end")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--experts", type=int, default=4)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--no-mergekit", action="store_true")
    parser.add_argument(
        "--mergekit-env", type=Path, help="where mergekit is or will be installed; default: below --work"
    )
    given = parser.parse_args()

    here = Path(sys.executable)
    files = given.work / "files"
    inputs = [files / f"expert{number}" for number in range(given.experts)]
    files.mkdir(parents=True)
    try:
        run(here, MAKE + "print()", given.layers, *inputs)
        contestants: dict[str, tuple[Path, str, list[object]]] = {
            "copy": (here, COPY, [*inputs, files / "copy"]),
            "average": (here, OURS, ["average", *inputs, files / "average"]),
            "mask-fisher": (here, OURS, ["mask-fisher", *inputs, files / "mask-fisher"]),
        }
        theirs = None if given.no_mergekit else mergekit(given.mergekit_env or given.work / "mergekit")
        if theirs is not None:
            contestants["mergekit"] = (theirs[0], THEIRS, [*inputs, files / "mergekit"])
        measured: dict[str, list[dict[str, float]]] = {name: [] for name in contestants}
        for _ in range(given.rounds):
            for name, (python, code, arguments) in contestants.items():
                output = files / name
                shutil.rmtree(output) if output.is_dir() else output.unlink(missing_ok=True)
                measured[name].append(json.loads(run(python, code + MEASURE, *arguments)))
        result = report(measured, inputs, theirs[1] if theirs else None)
        if theirs is not None:
            written = sorted((files / "mergekit").glob("*.safetensors"))
            result["largest difference from mergekit"] = float(
                run(here, COMPARE, files / "average" / "encoder" / "model.safetensors", *written)
            )
    finally:
        shutil.rmtree(files)
    given.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))
    if result.get("largest difference from mergekit", 0.0) > 1e-6:
        sys.exit("the outputs differ")


def report(measured: dict[str, list[dict[str, float]]], inputs: list[Path], version: str | None) -> dict[str, Any]:
    pairs = [("average", "copy"), ("mask-fisher", "copy"), ("mergekit", "average"), ("mergekit", "mask-fisher")]
    result: dict[str, Any] = {
        "date": time.strftime("%Y-%m-%d"),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}",
        "load": os.getloadavg(),
        "mergekit": version or "not measured: not asked for, or it could not be installed",
        "experts": len(inputs),
        "bytes of an expert": (inputs[0] / "model.safetensors").stat().st_size,
        "peak bytes above start": {name: max(run["bytes"] for run in runs) for name, runs in measured.items()},
    }
    for unit in ("seconds", "cpu seconds"):
        values = {name: [run[unit] for run in runs] for name, runs in measured.items()}
        result[unit] = {name: summary(each) for name, each in values.items()}
        result[f"ratios of {unit}, round by round"] = {
            f"{one} to {other}": summary([a / b for a, b in zip(values[one], values[other], strict=True)])
            for one, other in pairs
            if one in values
        }
    return result


if __name__ == "__main__":
    main()
