"""What an expert costs by the size of its model, measured here, and what many large ones cost on a cluster, computed.

    python -m benchmarks.scale              # measures for some minutes, and writes the tables of docs/scale.md
    python -m benchmarks.scale --write      # writes them anew from docs/results/scale.json

Measured are Llama-shaped classifiers of random weights, in float32 on one core, on random texts of 52 tokens, which is
the mean of GLUE's mrpc. Nothing in the tables is typed by hand.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from transformers import AutoModelForSequenceClassification, LlamaConfig, PreTrainedModel

from benchmarks.results import DOCS, STORE, processor, with_tables
from fmn.fisher import gram
from fmn.fisher import mask_nodes as fisher
from fmn.fisher import parameters as diagonal
from fmn.fisher.files import CheckpointOrigin, FisherMetadata, write_fisher
from fmn.models.predict import predict
from fmn.tasks.batches import Examples

PAGE, KEPT = DOCS / "scale.md", STORE / "scale.json"
# hidden size, layers, feed-forward size; heads are 64 wide, but for the last, whose are 128
SHAPES = {"S": (256, 8, 688), "M": (512, 10, 1376), "L": (768, 12, 2048), "XL": (1024, 16, 2816)}
SEVEN = (4096, 32, 11008)
TOKENS = 52
# Of the quick start's kind: what an expert's Fisher and evaluation read.
FISHER_ROWS, EVALUATED_ROWS = 1024, 1000
EXPERTS, WORKERS = 100, (1, 10, 50)
SUSTAINED = (
    1e14  # operations a second of a worker with an accelerator: an assumption, and said to be one
)
LINK = 1e9  # bytes a second between the storage and a machine: likewise


def config(shape: tuple[int, int, int]) -> LlamaConfig:
    hidden, layers, inner = shape
    return LlamaConfig(
        hidden_size=hidden, num_hidden_layers=layers, intermediate_size=inner, vocab_size=32000, pad_token_id=0,
        num_attention_heads=hidden // (128 if shape == SEVEN else 64), num_labels=2,
    )  # fmt: skip


def linear(shape: tuple[int, int, int]) -> int:
    """Parameters of the layers' linear maps: each costs two operations a token in a forward pass."""
    hidden, layers, inner = shape
    return layers * (4 * hidden * hidden + 3 * hidden * inner)


def gram_bytes(shape: tuple[int, int, int]) -> int:
    """Of the float32 Gram matrices: q, k and v read the same, and so do gate and up."""
    hidden, layers, inner = shape
    return 4 * layers * (3 * hidden * hidden + inner * inner)


def nodes(shape: tuple[int, int, int]) -> int:
    """Mask nodes: heads and neurons."""
    return shape[1] * (int(config(shape).num_attention_heads) + shape[2])


def parameters(shape: tuple[int, int, int]) -> int:
    with torch.device("meta"):
        model = AutoModelForSequenceClassification.from_config(config(shape))
    return sum(parameter.numel() for parameter in model.parameters())


def per_example(examples: int, compute: Callable[[Examples], object], drawn: Examples) -> float:
    """Seconds an example, after one call that is not counted."""
    compute(drawn.take(np.arange(1)))
    started = time.perf_counter()
    compute(drawn.take(np.arange(examples)))
    return (time.perf_counter() - started) / examples


def measure(name: str) -> dict[str, Any]:
    """Seconds an example of every statistic, and the bytes that it is stored in."""
    shape = SHAPES[name]
    torch.manual_seed(0)
    model: PreTrainedModel = AutoModelForSequenceClassification.from_config(config(shape)).eval()
    rng = np.random.default_rng(0)
    texts = [rng.integers(3, 32000, TOKENS).tolist() for _ in range(32)]
    drawn = Examples({"input_ids": texts}, rng.integers(0, 2, len(texts)), {"input_ids": 0})
    count = 32 if shape[0] <= 512 else 8
    how: dict[str, Any] = {"device": "cpu", "dtype": "float32"}
    seconds = {
        "evaluate": per_example(count, lambda some: predict(model, some, **how), drawn),
        "fisher": per_example(
            count,
            lambda some: fisher.estimate(
                model, some, estimator="empirical", regression=False, **how
            ),
            drawn,
        ),
        "gram": per_example(count, lambda some: gram.estimate(model, some, **how), drawn),
        "full-fisher": per_example(
            2,
            lambda some: diagonal.estimate(
                model, some, estimator="empirical", regression=False, **how
            ),
            drawn,
        ),
    }
    two = drawn.take(np.arange(2))
    found = fisher.estimate(model, two, estimator="empirical", regression=False, **how)
    moments = gram.estimate(model, two, **how).moments
    stored = sum(moment.numel() for moment in moments.values()) * 4
    if stored != gram_bytes(shape):
        raise SystemExit(f"{name}: Gram matrices of {stored} bytes, {gram_bytes(shape)} expected")
    origin = CheckpointOrigin(digest="")
    metadata = FisherMetadata(task="mrpc", checkpoint=origin, samples=2, estimator="empirical")
    with tempfile.TemporaryDirectory() as folder:
        write_fisher(Path(folder) / "x.parquet", found.fisher, found.stderr, metadata)
        size = (Path(folder) / "x.parquet").stat().st_size
    whole = sum(parameter.numel() for parameter in model.parameters())
    return {
        "parameters": whole,
        "seconds": seconds,
        "bytes": {"checkpoint": 4 * whole, "fisher": size, "gram": stored},
    }


def number(value: float) -> str:
    """Three digits at most, and a unit of bytes' or parameters' thousands."""
    for unit, scale in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= scale:
            return f"{value / scale:.3g} {unit}"
    return f"{value:.3g} "


def hours(seconds: float) -> str:
    value = seconds / 3600
    return f"{value:,.0f}" if value >= 100 else f"{value:.2g}"


def measured(stored: dict[str, Any]) -> str:
    lines = [
        f"`python -m benchmarks.scale`, {stored['machine']}, {stored['date']};"
        f" one core, float32, {TOKENS} tokens an example.",
        "",
        "| model | parameters | evaluate | fisher | gram | full-fisher | checkpoint | fisher | gram | full-fisher |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for name, found in stored["models"].items():
        shape = "{} wide, {} layers".format(*SHAPES[name])
        times = " | ".join(
            f"{found['seconds'][one]:.3g} s"
            for one in ("evaluate", "fisher", "gram", "full-fisher")
        )
        size = found["bytes"]
        sizes = (size["checkpoint"], size["fisher"], size["gram"], size["checkpoint"])
        lines.append(
            f"| {shape} | {number(found['parameters'])} | {times} | "
            + " | ".join(f"{number(one)}B" for one in sizes)
            + " |"
        )
    last = stored["models"][list(stored["models"])[-1]]
    rate = {
        one: operations(one) * linear(SHAPES[list(stored["models"])[-1]]) / last["seconds"][one]
        for one in ROWS
    }
    lines += [
        "",
        "Seconds are of one example; sizes of one expert. At the largest, evaluation runs at"
        f" {rate['evaluate'] / 1e9:.0f} and the Fisher at {rate['fisher'] / 1e9:.0f} billion operations a second.",
    ]
    return "\n".join(lines)


ROWS = {"fisher": FISHER_ROWS, "evaluate": EVALUATED_ROWS}


def operations(stage: str) -> int:
    """Operations an example for each parameter of the linear maps; the Fisher also goes back through activations."""
    return {"evaluate": 2, "fisher": 4}[stage] * TOKENS


def computed(stored: dict[str, Any]) -> str:
    largest = list(stored["models"])[-1]
    found = stored["models"][largest]
    grown = linear(SEVEN) / linear(SHAPES[largest])
    here = {stage: rows * found["seconds"][stage] * grown for stage, rows in ROWS.items()}
    fast = {
        stage: rows * operations(stage) * linear(SEVEN) / SUSTAINED for stage, rows in ROWS.items()
    }
    whole = parameters(SEVEN)
    checkpoint = 2 * whole
    statistic = found["bytes"]["fisher"] / nodes(SHAPES[largest]) * nodes(SEVEN)
    every = EXPERTS * checkpoint
    lines = [
        f"Computed, not measured, for a Llama {SEVEN[0]} wide with {SEVEN[1]} layers ({number(whole)}, in bfloat16"
        f" {number(checkpoint)}B): the seconds of the largest model above, times the ratio of the linear maps'"
        f" parameters ({grown:.0f});"
        f" {FISHER_ROWS} examples of {TOKENS} tokens for the Fisher and {EVALUATED_ROWS} for the evaluation.",
        "",
        f"| {EXPERTS} experts: hours on | Fisher | evaluation | both |",
        "|---|---:|---:|---:|",
    ]
    for title, took in (
        ("one such core", here),
        (f"{SUSTAINED / 1e12:.0f} Tflop/s (assumed)", fast),
    ):
        for workers in WORKERS:
            times = [EXPERTS * took[stage] / workers for stage in ROWS]
            lines.append(
                f"| {workers} x {title} | "
                + " | ".join(hours(one) for one in (*times, sum(times)))
                + " |"
            )
    lines += [
        "",
        "| bytes moved | |",
        "|---|---:|",
        f"| experts, from the flow's machine to the storage, once | {number(every)}B |",
        f"| experts, from the storage to workers: once, or twice where Fisher and evaluation fall to different ones"
        f" | {number(every)}B to {number(2 * every)}B |",
        f"| mask Fisher, back ({number(statistic)}B an expert) | {number(EXPERTS * statistic)}B |",
        f"| a merged model, out and in again for its evaluation | {number(2 * checkpoint)}B |",
        "",
        f"At {LINK / 1e9:.0f} GB/s (assumed) an expert takes {checkpoint / LINK:.0f} s to a worker; all take"
        f" {hours(every / LINK)} h out of the flow's machine. The Fisher on the assumed worker takes"
        f" {fast['fisher']:.0f} s an expert and its evaluation {fast['evaluate']:.0f} s:"
        " there, moving counts as much as computing.",
        "",
        "| of one expert, stored | float32 |",
        "|---|---:|",
        f"| mask Fisher | {number(statistic)}B |",
        f"| Gram matrices | {number(gram_bytes(SEVEN))}B |",
        f"| full Fisher | {number(4 * whole)}B |",
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--write", action="store_true", help="measure nothing")
    parser.add_argument("--models", nargs="+", default=list(SHAPES), choices=list(SHAPES))
    given = parser.parse_args()
    if not given.write:
        torch.set_num_threads(1)
        transformers.logging.set_verbosity_error()
        models = {}
        for name in given.models:
            models[name] = measure(name)
            print(name, models[name], flush=True)
        stored = {"machine": processor(), "date": time.strftime("%Y-%m-%d"), "models": models}
        KEPT.write_text(json.dumps(stored, indent=1) + "\n")
    stored = json.loads(KEPT.read_text())
    tables = {"measured": measured(stored), "computed": computed(stored)}
    PAGE.write_text(with_tables(PAGE.read_text(), lambda name: tables[name] + "\n"))


if __name__ == "__main__":
    main()
