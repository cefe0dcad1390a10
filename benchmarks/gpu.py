"""Everything of docs/performance.md that a GPU computes, in one command of less than 9 minutes.

    python -m benchmarks.gpu --out DIR            # on a machine with a GPU
    python -m benchmarks.results --add gpu DIR --command "python -m benchmarks.gpu"
    python -m benchmarks.gpu --small --out DIR    # the same code with tiny models, on any machine
    python -m benchmarks.gpu --goals --out DIR    # measures nothing: the goals alone

The classifiers are those of `benchmarks.fisher`, on texts of mrpc; the Llama has random weights,
which are made on the device, and texts of random tokens.
"""

import argparse
import gc
import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import transformers
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForSequenceClassification, LlamaConfig, PreTrainedModel

from benchmarks import fisher
from benchmarks.results import DOCS, keep, parser
from fmn.fisher import gram, mask_nodes
from fmn.merge.calibrate import calibrated_encoder
from fmn.merge.recipe import CalibrationSettings
from fmn.merge.rules import regress
from fmn.models.predict import predict
from fmn.report.wording import markdown
from fmn.tasks.batches import Examples
from fmn.tasks.kinds import SINGLE

DTYPES = ("float32", "bfloat16")
SECONDS = 8 * 60  # nothing new begins later than that
GIB = 2**30


class Sizes(NamedTuple):
    """What is measured with.

    Attributes:
        texts, rounds, exact: of the mask Fisher, and texts of the full Fisher.
        width: of the maps that are solved for, by as many rows and four times as many.
        llama: hidden size, layers, feed-forward size, heads, vocabulary.
        long: texts of the Llama, and their tokens.
    """

    texts: int
    rounds: int
    exact: int
    width: int
    calibration: int
    llama: tuple[int, int, int, int, int]
    long: tuple[int, int]


FULL = Sizes(2048, 3, 4, 768, 256, (4096, 32, 11008, 32, 32000), (256, 512))
SMALL = Sizes(16, 1, 1, 32, 8, (32, 2, 48, 4, 100), (4, 16))
# By figure: what is measured, and the goal on an H100 or H200.
GOALS: Mapping[str, tuple[str, float | None]] = {
    "minilm float32 released": ("MiniLM, float32: mask Fisher / released method", 8),
    "bert-base float32 released": ("bert-base, float32: mask Fisher / released method", 8),
    "minilm bfloat16 released": ("MiniLM, bfloat16: mask Fisher / released method", None),
    "bert-base bfloat16 released": ("bert-base, bfloat16: mask Fisher / released method", None),
    "bert-base float32 full": ("bert-base, float32: mask Fisher / full Fisher", 321.7),
    "bert-base bfloat16 full": ("bert-base, bfloat16: mask Fisher / full Fisher", 321.7),
    "bert-base float32 floor": ("bert-base, float32: share of the floor", 0.5),
    "bert-base bfloat16 floor": ("bert-base, bfloat16: share of the floor", 0.5),
    "bert-base float32 forward": ("bert-base, float32: forward passes an estimate costs", None),
    "bert-base bfloat16 forward": ("bert-base, bfloat16: forward passes an estimate costs", None),
    "gram": ("bert-base, bfloat16: Gram matrices, examples a second", None),
    "evaluation": ("bert-base, bfloat16: evaluation, examples a second", None),
    "solves": ("RegMean, 4 experts, every row with weights of its own: seconds", None),
    "calibration": ("bert-base, 2 experts, 256 texts each: calibration, seconds", None),
    "llama seconds": ("Llama of 7 B, 256 texts of 512 tokens: mask Fisher, seconds", None),
    "llama GiB": ("the same: peak memory, GiB", 80),
    "llama floor": ("the same: share of the floor", None),
}
AT_MOST = {"llama GiB"}


def main() -> None:
    options = parse()
    sizes = SMALL if options.small else FULL
    transformers.logging.set_verbosity_error()
    torch.manual_seed(0)
    device = torch.device(options.device)
    figures: dict[str, float] = {}
    details: list[dict[str, Any]] = []
    started = time.monotonic()
    if not options.goals:
        sections: list[Callable[[], dict[str, float]]] = [
            lambda: of_llama(sizes, device),
            lambda: of_classifiers(sizes, options, device, details),
            lambda: of_others(sizes, options, device),
            lambda: {"solves": seconds_of_solves(sizes.width, device)},
        ]
        for section in sections:
            if time.monotonic() - started < SECONDS:
                figures |= section()
            gc.collect()
            if device.type == "cuda":
                torch.cuda.empty_cache()
    setting = {} if options.goals else fisher.machine(device)
    numbers = {"setting": setting, "sizes": sizes._asdict(), "figures": figures, "fisher": details}
    keep(options.out, numbers, table(str(setting.get("device", "")), figures, details))


def parse() -> argparse.Namespace:
    options = parser(__doc__)
    options.add_argument("--small", action="store_true", help="tiny models")
    options.add_argument("--goals", action="store_true", help="measure nothing")
    options.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options.add_argument("--glue", type=Path, default=DOCS.parent / "data" / "miniature_glue")
    options.add_argument("--out", type=Path, default=Path("benchmark-results"))
    options.set_defaults(task="mrpc", classes=2)
    return options.parse_args()


def classifier(name: str, options: argparse.Namespace) -> PreTrainedModel:
    """A classifier of `benchmarks.fisher`; with --small a BERT of its names and tiny sizes."""
    if not options.small:
        return fisher.build(name, options.classes)[0]
    config = transformers.BertConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64
    )
    model: PreTrainedModel = AutoModelForSequenceClassification.from_config(config)
    return model.eval()


def texts(sizes: Sizes, options: argparse.Namespace, vocabulary: int) -> Examples:
    """So many texts of mrpc, again from the beginning where there are fewer."""
    options.examples = sizes.texts
    examples = fisher.texts(options, vocabulary)
    return examples.take(np.arange(sizes.texts) % len(examples))


# ---------------------------------------------------------------------------------------------
# What is measured


def of_classifiers(
    sizes: Sizes, options: argparse.Namespace, device: torch.device, details: list[dict[str, Any]]
) -> dict[str, float]:
    """The mask Fisher beside what it is measured against."""
    figures = {}
    for name in ("minilm", "bert-base"):
        model = classifier(name, options).to(device)
        examples = texts(sizes, options, model.config.vocab_size)
        for dtype in DTYPES:
            setting = fisher.Setting(model, examples, device, dtype)
            run = fisher.measure(setting, sizes.rounds, sizes.exact)
            details.append({"model": name, "dtype": dtype, **run})
            for pair, rounds in run["ratios"].items():
                other = pair.removeprefix("estimator / ").removesuffix(" / estimator")
                figures[f"{name} {dtype} {other}"] = rounds["median"]
    return figures


def of_others(sizes: Sizes, options: argparse.Namespace, device: torch.device) -> dict[str, float]:
    """Gram matrices, evaluation and calibration of bert-base."""
    experts = {task: classifier("bert-base", options) for task in ("a", "b")}
    model = experts["a"]
    examples = texts(sizes, options, model.config.vocab_size)
    place: dict[str, Any] = {"device": str(device), "dtype": "bfloat16"}
    few = examples.take(np.arange(min(sizes.calibration, len(examples))))
    encoder = {
        name: (own + other) / 2
        for (name, own), other in zip(
            model.base_model.state_dict().items(),
            experts["b"].base_model.state_dict().values(),
            strict=True,
        )
    }
    settings = CalibrationSettings(texts=sizes.calibration)
    both = dict.fromkeys(experts, few)
    stages: dict[str, Callable[[], object]] = {
        "gram": lambda: gram.estimate(model, examples, **place),
        "evaluation": lambda: predict(model, examples, **place),
        "calibration": lambda: calibrated_encoder(
            experts, encoder, both, settings=settings, **place
        ),
    }
    seconds = {name: best(stage, device) for name, stage in stages.items()}
    rates = {name: len(examples) / seconds[name] for name in ("gram", "evaluation")}
    return rates | {"calibration": seconds["calibration"]}


def timed(compute: Callable[[], object], device: torch.device) -> float:
    fisher.synchronize(device)
    started = time.perf_counter()
    compute()
    fisher.synchronize(device)
    return time.perf_counter() - started


def best(compute: Callable[[], object], device: torch.device, rounds: int = 2) -> float:
    """Seconds of the faster of some rounds, after one that fills caches."""
    compute()
    return min(timed(compute, device) for _ in range(rounds))


def seconds_of_solves(width: int, device: torch.device) -> float:
    """Seconds of the regressions of a map of `width` by `width`, and of one of four times as many
    rows, for four experts, where every row has weights of its own."""
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device, dtype=torch.float64)

    grams = [(x := normal(2 * width, width)).T @ x / (2 * width) for _ in range(4)]
    systems = [
        ([normal(rows, width) for _ in grams], normal(4, rows).mul(3).exp())
        for rows in (width, 4 * width)
    ]

    def solve() -> None:
        for experts, weights in systems:
            regress(experts, grams, weights)

    return best(solve, device, rounds=1)


def of_llama(sizes: Sizes, device: torch.device) -> dict[str, float]:
    """The mask Fisher of a Llama-shaped classifier in bfloat16."""
    hidden, layers, inner, heads, vocabulary = sizes.llama
    config = LlamaConfig(
        hidden_size=hidden, num_hidden_layers=layers, intermediate_size=inner,
        num_attention_heads=heads, vocab_size=vocabulary, pad_token_id=0, num_labels=2,
    )  # fmt: skip
    with device:
        model = AutoModelForSequenceClassification.from_config(config, dtype=torch.bfloat16).eval()
    count, length = sizes.long
    rng = np.random.default_rng(0)
    ids = rng.integers(3, vocabulary, (count, length)).tolist()
    examples = Examples({"input_ids": ids}, rng.integers(0, 2, count), {"input_ids": 0})
    options: dict[str, Any] = {"estimator": "empirical", "problem_type": SINGLE}
    options |= {"device": str(device), "dtype": "bfloat16"}

    def estimate(rows: int) -> Callable[[], object]:
        few = examples.take(np.arange(rows))
        return lambda: mask_nodes.estimate(model, few, **options)

    with FlopCounterMode(display=False) as counter:  # warms up, too
        estimate(1)()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    seconds = timed(estimate(count), device)
    peak = fisher.peak(fisher.Setting(model, examples, device, "bfloat16"))
    floor = count * counter.get_total_flops() / peak
    figures = {"llama seconds": seconds, "llama floor": floor / seconds}
    if device.type == "cuda":
        figures["llama GiB"] = torch.cuda.max_memory_allocated(device) / GIB
    return figures


# ---------------------------------------------------------------------------------------------
# The table


def table(device: str, figures: Mapping[str, float], details: list[dict[str, Any]]) -> str:
    """The figures beside the goals, and the details of the mask Fisher."""
    rows = []
    for name, (label, goal) in GOALS.items():
        value = figures.get(name, math.nan)
        measured = "not measured" if math.isnan(value) else f"{value:.3g}"
        is_met = value <= goal if goal and name in AT_MOST else goal and value >= goal
        verdict = "" if goal is None or math.isnan(value) else "yes" if is_met else "no"
        bound = "" if goal is None else f"at {'most' if name in AT_MOST else 'least'} {goal:g}"
        rows.append([label, measured, bound, verdict])
    heading = f"{device}.\n\n" if device else ""
    summary = markdown(["", "measured", "goal on an H100 or H200", "met"], rows)
    return heading + summary + (f"\n{fisher.table(details)}" if details else "")


if __name__ == "__main__":
    main()
