"""Speed and accuracy of `fmn.models.predict` beside those of `transformers.Trainer.predict`.

    python -m benchmarks.evaluate --expert sst2=DIR mrpc=DIR --data path/to/glue --out DIR

The same model predicts the same tokenised validation examples, in rounds in which the contestants
alternate. Trainer's defaults are batches of 8 in the order of the data, each padded to its longest
text, in float32. Agreement is the share of examples with the class that Trainer predicts (for
regression: a value within 0.05, a hundredth of the scale). Needs `accelerate`, as Trainer does.
"""

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch.utils.data import Dataset
from transformers import Trainer, TrainingArguments

from benchmarks.results import keep, ratio, spread
from fmn.evaluate.metrics import answers, score_splits
from fmn.models import labels
from fmn.models.devices import resolve_device, resolve_dtype
from fmn.models.predict import predict
from fmn.report.wording import markdown
from fmn.store.records import pairs
from fmn.tasks import dataset as data
from fmn.tasks.batches import Examples
from fmn.tasks.encoding import encode
from fmn.tasks.task import load_task


class Rows(Dataset[dict[str, Any]]):
    """Examples as Trainer takes them."""

    def __init__(self, examples: Examples) -> None:
        self.examples = examples

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, row: int) -> dict[str, Any]:
        return {name: values[row] for name, values in self.examples.inputs.items()}


def main() -> None:
    options = parse()
    torch.set_num_threads(options.threads)
    transformers.logging.set_verbosity_error()
    results = [
        measure(name, Path(folder), options)
        for name, folder in pairs(options.expert, "--expert").items()
    ]
    numbers = {
        "setting": machine(options.device),
        "examples": options.examples,
        "cpu_time": options.cpu_time,
    }
    keep(options.out, {**numbers, "results": results}, table(results))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--expert", nargs="+", required=True, metavar="TASK=DIR")
    parser.add_argument(
        "--data", type=Path, required=True, help="folder of the tasks' Parquet files"
    )
    parser.add_argument(
        "--examples", type=int, default=1024, help="of a round, at most, drawn at random"
    )
    parser.add_argument(
        "--dtypes", nargs="+", default=["auto"], help="bfloat16 crawls on a CPU that lacks it"
    )
    parser.add_argument(
        "--cpu-time", action="store_true", help="time of this process alone, for a busy machine"
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="auto")
    parser.add_argument(
        "--out", type=Path, required=True, help="a folder for results.json and table.md"
    )
    return parser.parse_args()


def measure(name: str, folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Examples per second in every round, and the agreement of the predictions with Trainer's."""
    task, device = load_task(options.data, name), resolve_device(options.device)
    model, tokenizer, *_ = labels.load_expert(folder, task, options.data, options.device)
    model.to(device)
    table = data.read_split(options.data, task, task.validation[0])
    rows = np.random.default_rng(0).permutation(table.num_rows)[: options.examples]
    examples = encode(tokenizer, task, table.take(rows))
    clock = time.process_time if options.cpu_time else time.perf_counter
    with tempfile.TemporaryDirectory() as scratch:
        settings = TrainingArguments(
            scratch,
            report_to="none",
            disable_tqdm=True,
            use_cpu=device.type == "cpu",
            label_names=["labels"],
        )
        trainer = Trainer(model=model, args=settings, processing_class=tokenizer)

        def by_trainer() -> np.ndarray:
            logits: np.ndarray = trainer.predict(Rows(examples)).predictions
            return logits

        def by_fmn(dtype: str) -> Callable[[], np.ndarray]:
            return lambda: predict(model, examples, device=options.device, dtype=dtype)

        contestants = {
            "Trainer.predict": by_trainer,
            **{f"fmn, {dtype}": by_fmn(dtype) for dtype in options.dtypes},
        }
        logits: dict[str, np.ndarray] = {}
        speeds: dict[str, list[float]] = {name: [] for name in contestants}
        for _ in range(options.rounds):
            for contestant, run in contestants.items():
                start = clock()
                logits[contestant] = run()
                speeds[contestant].append(len(examples) / (clock() - start))
    tolerance = 0.05 if task.regression else 0.0
    answered = {key: answers(task, outputs, examples.labels) for key, outputs in logits.items()}
    trainers = answered["Trainer.predict"].predicted
    return {
        "task": name,
        "examples": len(examples),
        "mean_length": float(examples.lengths.mean()),
        "auto": str(resolve_dtype("auto", device)).removeprefix("torch."),
        "examples_per_second": speeds,
        "ratios": {key: ratio(each, speeds["Trainer.predict"]) for key, each in speeds.items()},
        "agreement": {
            key: float((np.abs(each.predicted - trainers) <= tolerance).mean())
            for key, each in answered.items()
        },
        "scores": {
            key: score_splits(task, {task.validation[0]: each})["score"]
            for key, each in answered.items()
        },
    }


def machine(device: str) -> dict[str, Any]:
    resolved = resolve_device(device)
    return {
        "device": torch.cuda.get_device_name(resolved) if resolved.type == "cuda" else "CPU",
        "cpu": dict(torch.cpu.get_capabilities()),
        "threads": torch.get_num_threads(),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
    }


def table(results: list[dict[str, Any]]) -> str:
    body = [
        [
            "{task}, {examples} examples of {mean_length:.0f} tokens".format(**result),
            contestant.replace("auto", f"auto ({result['auto']})"),
            f"{np.median(speeds):.1f}",
            spread(result["ratios"][contestant]),
            f"{result['agreement'][contestant]:.1%}",
            f"{result['scores'][contestant]:.4f}",
        ]
        for result in results
        for contestant, speeds in result["examples_per_second"].items()
    ]
    return markdown(
        ["task", "by", "examples per second", "times Trainer", "answers as Trainer", "score"], body
    )


if __name__ == "__main__":
    main()
