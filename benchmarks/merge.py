"""Our merge beside plain file copies and beside mergekit's linear merge, on the same files.

    python -m benchmarks.merge --work DIR --out DIR [--rounds 5] [--experts 4 16]
    python -m benchmarks.merge --work DIR --out DIR --llama 28 --rounds 1 --no-mergekit --cold

Experts of BERT-base's sizes in fp32, or with `--llama LAYERS` of Llama 3.2 3B's sizes in bf16 and
in shards, are written below DIR; their weights are slices of one random block. Every round runs
each contestant once, in a process of its own, copy first, so the page cache is warm for all others;
with `--cold` the inputs are dropped from it before each. Times are of the work alone, without
starting Python or importing libraries (each contestant first merges two tiny experts); memory is
the peak of the resident set above what it was when the work began.

- copy: every input read through one buffer, and the bytes of one of them written and flushed.
- average, mask-fisher: `write_model` within what `run_stage` does for a folder: it also writes the
  heads, takes the digests of all files, and flushes them to the disk.
- mergekit: its linear merge through its own Python interface, from an environment made for it; it
  does not flush, so the time until its files are flushed is given too.

mergekit's tensors must equal those of `average` to 1e-6, else the benchmark fails.
"""

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import venv
from pathlib import Path
from typing import Any

from benchmarks.results import SPENT, keep, parser, ratio, run, spread, summary
from fmn.report.wording import markdown

MERGEKIT = ("torch==2.13.0", "mergekit")
UNITS = ("seconds", "seconds until all is on the disk", "cpu seconds")

MEASURE = """
import os
inputs, out, tiny = sys.argv[2:-2], sys.argv[-2], sys.argv[-1]
work([f"{tiny}/0", f"{tiny}/1"], out)  # imports whatever it needs
shutil.rmtree(out)
cost = spent(lambda: work(inputs, out))
began = time.perf_counter()
for path in Path(out).rglob("*"):
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)
cost["seconds until all is on the disk"] = cost["seconds"] + time.perf_counter() - began
print(json.dumps(cost))
"""
COPY = """
import os, shutil, sys
from pathlib import Path
def work(inputs, out):
    os.makedirs(out)
    buffer = memoryview(bytearray(4 << 20))
    for name in inputs:
        for path in sorted(Path(name).glob("*.safetensors")):
            with open(path, "rb", buffering=0) as source:
                if name != inputs[0]:
                    while source.readinto(buffer):
                        pass
                    continue
                with open(f"{out}/{path.name}", "wb", buffering=0) as target:
                    while count := source.readinto(buffer):
                        target.write(buffer[:count])
                    os.fsync(target.fileno())
"""
OURS = """
import shutil, sys
from pathlib import Path
import numpy as np
from fmn.fisher.architectures import Site
from fmn.merge.inputs import Statistics
from fmn.merge.model import write_model
from fmn.merge.recipe import MergeSettings
from fmn.models import checkpoints
from fmn.store import artifacts
method = sys.argv[1]
def fisher(folder, tasks):
    config = checkpoints.load_config(folder)
    random = np.random.default_rng(0)
    sizes = {"head": config.num_attention_heads, "neuron": config.intermediate_size}
    layers = range(config.num_hidden_layers)
    return {
        task: {
            Site(layer, node): random.gamma(1.0, size=size)
            for layer in layers
            for node, size in sizes.items()
        }
        for task in tasks
    }
def work(inputs, out):
    experts = {Path(name).name: Path(name) for name in inputs}
    statistics = Statistics(fisher(Path(inputs[0]), experts) if method == "mask-fisher" else {})
    with artifacts.scratch_folder(Path(out)) as folder:
        write_model(folder, experts, MergeSettings(method=method), statistics=statistics)
        artifacts.digest_files(folder)
        artifacts.publish_folder(folder, Path(out))
"""
THEIRS = """
import shutil, sys
from mergekit.config import MergeConfiguration
from mergekit.merge import run_merge
from mergekit.options import MergeOptions
def work(inputs, out):
    config = MergeConfiguration.model_validate({
        "merge_method": "linear",
        "dtype": sys.argv[1],
        "parameters": {"weight": 1.0},
        "models": [{"model": name} for name in inputs],
    })
    run_merge(config, out, MergeOptions(copy_tokenizer=False, write_model_card=False))
"""
MAKE = """
import json, sys
from pathlib import Path
import torch
from transformers import AutoModelForSequenceClassification, BertConfig, LlamaConfig
from fmn.merge import stream
kind, layers, width, *outs = sys.argv[1:]
layers, width = int(layers), int(width)
if kind == "llama":
    config = LlamaConfig(
        num_hidden_layers=layers, hidden_size=24 * width, intermediate_size=64 * width,
        num_attention_heads=24, num_key_value_heads=8, vocab_size=128256 if width > 1 else 99,
        tie_word_embeddings=True, num_labels=2, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        dtype="bfloat16",
    )
    dtype = torch.bfloat16
else:
    config = BertConfig(
        num_hidden_layers=layers, hidden_size=12 * width, intermediate_size=48 * width,
        num_labels=2, vocab_size=30522 if width > 1 else 99, dtype="float32",
    )
    dtype = torch.float32
with torch.device("meta"):
    model = AutoModelForSequenceClassification.from_config(config)
config.architectures = [type(model).__name__]
state = sorted(model.state_dict().items())
slots = [stream.TensorSpec(name, dtype, tuple(tensor.shape)) for name, tensor in state]
block = (0.02 * torch.randn(1 << 24, generator=torch.Generator().manual_seed(0))).to(dtype)
def pieces(seed):
    at = seed * 1_000_003  # every tensor of every expert begins elsewhere in the block
    for slot in slots:
        left = slot.bytes // dtype.itemsize
        while left:
            at %= len(block) - 1
            piece = block[at : at + min(left, 1 << 20)]
            yield piece
            at, left = at + len(piece), left - len(piece)
for seed, out in enumerate(map(Path, outs)):
    out.mkdir(parents=True)
    files = stream.shards(slots)
    names = stream.shard_names(len(files))
    parts = pieces(seed)
    for name, file in zip(names, files):
        stream.write_file(out / name, file, parts)
    if len(files) > 1:
        index = stream.index(dict(zip(names, files)))
        (out / "model.safetensors.index.json").write_text(json.dumps(index))
    config.save_pretrained(out)
    (out / "vocab.txt").write_text("[PAD]\\n")
print(sum(slot.bytes for slot in slots))
"""
COMPARE = """
import sys
from pathlib import Path
import torch
from safetensors import safe_open
def tensors(path):
    with safe_open(path, "pt") as file:
        for name in file.keys():
            yield name.removeprefix("bert.").removeprefix("model."), file.get_tensor(name)
encoder, theirs = map(Path, sys.argv[1:])
ours = {name: tensor for path in encoder.glob("*.safetensors") for name, tensor in tensors(path)}
worst, compared = 0.0, 0
for path in theirs.glob("*.safetensors"):
    for name, tensor in tensors(path):
        if name in ours:
            worst, compared = max(worst, float((tensor - ours[name]).abs().max())), compared + 1
assert compared == len(ours), (compared, len(ours))
print(worst)
"""


def mergekit(folder: Path) -> tuple[Path, str] | None:
    """The Python of an environment with mergekit, and its version; None if it does not install.

    The environment is made on first use.
    """
    python = folder / "bin" / "python"
    if not python.exists():
        venv.create(folder, with_pip=True)
    for package in MERGEKIT:  # torch first, so that no other build of it is taken
        install = [str(python), "-m", "pip", "install", "-q", MERGEKIT[0], package]
        if subprocess.run(install, check=False).returncode:
            return None
    version = "import importlib.metadata as m; print(m.version('mergekit'))"
    return python, run(python, version)


def drop(folder: Path) -> None:
    """Take a checkpoint's weights out of the page cache."""
    for path in folder.glob("*.safetensors"):
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def parsed() -> argparse.Namespace:
    """The command line."""
    options = parser(__doc__)
    add = options.add_argument
    add("--work", type=Path, required=True, help="a folder on the disk to measure")
    add("--out", type=Path, required=True)
    add("--rounds", type=int, default=5)
    add("--experts", type=int, nargs="+", default=[4], help="if several: also the memory of each")
    add("--layers", type=int, default=12, help="of the BERT experts")
    add("--llama", type=int, metavar="LAYERS", help="Llama experts; 28 layers have 3.2 billion")
    add("--cold", action="store_true", help="inputs are read from the disk, not the page cache")
    add("--no-mergekit", action="store_true")
    add("--mergekit-env", type=Path, help="where mergekit is or goes; default: below --work")
    return options.parse_args()


def main() -> None:
    arguments = parsed()
    files = arguments.work / "files"
    files.mkdir(parents=True)
    try:
        result = compared(arguments, files)
    finally:
        shutil.rmtree(files)
    keep(arguments.out, result, table(result))
    if result.get("largest difference from mergekit", 0.0) > 1e-6:
        sys.exit("the outputs differ")


def compared(arguments: argparse.Namespace, files: Path) -> dict[str, Any]:
    """What the contestants cost; experts and outputs are written into the folder `files`."""
    python, tiny = Path(sys.executable), files / "tiny"
    kind, layers, width, dtype = "bert", arguments.layers, 64, "float32"
    if arguments.llama:
        kind, layers, width, dtype = "llama", arguments.llama, 128, "bfloat16"
    contestants: dict[str, tuple[Path, str, str]] = {
        "copy": (python, COPY, ""),
        "average": (python, OURS, "average"),
        "mask-fisher": (python, OURS, "mask-fisher"),
    }
    environment = arguments.mergekit_env or arguments.work / "mergekit"
    theirs = None if arguments.no_mergekit else mergekit(environment)
    if theirs is not None:
        contestants["mergekit"] = (theirs[0], THEIRS, dtype)

    def measure(name: str, inputs: list[Path]) -> dict[str, float]:
        program, code, setting = contestants[name]
        shutil.rmtree(files / name, ignore_errors=True)
        for folder in inputs if arguments.cold else ():
            drop(folder)
        program_code = SPENT + code + MEASURE
        output = run(program, program_code, setting, *inputs, files / name, tiny)
        measured: dict[str, float] = json.loads(output)
        return measured

    everyone = [files / f"expert{number}" for number in range(max(arguments.experts))]
    run(python, MAKE, kind, 1, 1, tiny / "0", tiny / "1")
    size = int(run(python, MAKE, kind, layers, width, *everyone))
    inputs = everyone[: arguments.experts[0]]
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in contestants}
    for _ in range(arguments.rounds):
        for name, measured in runs.items():
            measured.append(measure(name, inputs))
    result = {
        "model": f"{kind}, {layers} layers, {dtype}",
        "bytes of an expert": size,
        "page cache": "inputs dropped" if arguments.cold else "warm",
        "mergekit": theirs[1] if theirs else "not measured",
        **report(runs, len(inputs)),
    }
    if theirs is not None:
        worst = run(python, COMPARE, files / "average" / "encoder", files / "mergekit")
        result["largest difference from mergekit"] = float(worst)
    if len(arguments.experts) > 1:
        result["peak bytes above start, by number of experts"] = {
            f"{name}, {count}": measure(name, everyone[:count])["peak"]
            for name in ("average", "mask-fisher")
            for count in arguments.experts
        }
    return result


def report(measured: dict[str, list[dict[str, float]]], experts: int) -> dict[str, Any]:
    pairs = [("average", "copy"), ("mask-fisher", "copy")]
    if "mergekit" in measured:
        pairs += [("mergekit", "average"), ("mergekit", "mask-fisher")]
    peaks = {name: max(run["peak"] for run in runs) for name, runs in measured.items()}
    result: dict[str, Any] = {"python": platform.python_version(), "experts": experts}
    result["peak bytes above start"] = peaks
    for unit in UNITS:
        values = {name: [run[unit] for run in runs] for name, runs in measured.items()}
        result[unit] = {name: summary(each) for name, each in values.items()}
        result[f"ratios of {unit}, round by round"] = {
            f"{first} to {second}": ratio(values[first], values[second]) for first, second in pairs
        }
    return result


def table(result: dict[str, Any]) -> str:
    """The tables of `report`'s numbers."""
    copy = "plain copies: every input read, one output written"
    titles = {"copy": copy, "mergekit": "mergekit, linear"}
    times = []
    for name, peak in result["peak bytes above start"].items():
        medians = [f"{result[unit][name]['median']:.2f}" for unit in UNITS]
        times.append([titles.get(name, name), *medians, megabytes(peak)])
    ratios = [result[f"ratios of {unit}, round by round"] for unit in UNITS]
    rows = [[name, *(spread(unit[name]) for unit in ratios)] for name in ratios[0]]
    header = ["seconds", "until flushed to the disk", "CPU seconds"]
    parts = [
        f"{result['experts']} experts ({result['model']}),"
        f" {megabytes(result['bytes of an expert'])} MB each, page cache: {result['page cache']};"
        f" mergekit: {result['mergekit']}; medians.\n",
        markdown(["", *header, "peak memory above start, MB"], times),
        markdown(["round by round", *header], rows),
    ]
    if by_number := result.get("peak bytes above start, by number of experts"):
        sizes = ["", *map(megabytes, by_number.values())]
        parts.append(markdown(["peak memory above start, MB", *by_number], [sizes]))
    return "\n".join(parts)


def megabytes(size: float) -> str:
    return f"{size / 1e6:.0f}"


if __name__ == "__main__":
    main()
