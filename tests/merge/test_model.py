"""The merged model's folder, as people load it: with Transformers, without our code."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForSequenceClassification, PreTrainedModel

from fmn.errors import UserError
from fmn.fisher import architectures, gram
from fmn.fisher import parameters as diagonal
from fmn.fisher.architectures import NodeValues
from fmn.merge import model as merged
from fmn.merge import recipe
from fmn.merge.methods import NEEDS
from fmn.merge.regmean import rounded
from fmn.merge.rules import LINEAR
from fmn.models.headers import file_headers
from tests.tiny import tiny_examples, tiny_model

LABELS = {"mrpc": 2, "stsb": 1, "mnli": 3}
MODELS = {"bert": "structured", "roberta": "paper", "distilbert": "structured", "electra": "paper"}
LOAD = """
import json, sys, torch
from transformers import AutoModel, AutoModelForSequenceClassification

def load(kind, folder):
    model, found = kind.from_pretrained(folder, output_loading_info=True)
    return model.eval(), {name: sorted(found[name]) for name in ("missing_keys", "unexpected_keys", "mismatched_keys")}

said, tasks, folders = {}, sys.argv[1].split(","), sys.argv[2:]
for folder in folders:
    said[folder] = {"encoder": load(AutoModel, folder + "/encoder")[1]}
    for task in tasks:
        model, said[folder][task] = load(AutoModelForSequenceClassification, f"{folder}/tasks/{task}")
        with torch.no_grad():
            said[folder][task]["logits"] = model(torch.tensor([[1, 5, 7, 9, 2], [1, 6, 8, 3, 2]])).logits.tolist()
assert "fmn" not in sys.modules
print(json.dumps(said))
"""


def save(model: PreTrainedModel, folder: Path, dtype: torch.dtype = torch.float32) -> Path:
    model.to(dtype).save_pretrained(folder)
    (folder / "vocab.txt").write_text("[PAD]\n[CLS]\n[SEP]\n")
    (folder / "tokenizer_config.json").write_text(json.dumps({"name": folder.name}))
    return folder


def experts(
    folder: Path, name: str = "bert", dtype: torch.dtype = torch.float32
) -> dict[str, Path]:
    return {
        task: save(tiny_model(name, labels, seed), folder / task, dtype)
        for seed, (task, labels) in enumerate(LABELS.items())
    }


def fisher(folders: Mapping[str, Path], seed: int = 0) -> dict[str, NodeValues]:
    rng = np.random.default_rng(seed)
    values = {}
    for task, folder in folders.items():
        model = AutoModelForSequenceClassification.from_pretrained(folder)
        values[task] = {
            site.site: rng.gamma(1.0, size=site.nodes) for site in architectures.mask_sites(model)
        }
    return values


def by_hand(
    folders: Mapping[str, Path],
    values: Mapping[str, NodeValues],
    coefficients: Mapping[str, float],
    mapping: str,
) -> dict[str, np.ndarray]:
    """The merged encoder's parameters in float64 numpy."""
    models = {
        task: AutoModelForSequenceClassification.from_pretrained(path).base_model
        for task, path in folders.items()
    }
    tensors = {
        task: {k: v.double().numpy() for k, v in model.state_dict().items()}
        for task, model in models.items()
    }
    first = next(iter(models.values()))
    claims = architectures.claims(
        first.config, {k: v.shape for k, v in first.state_dict().items()}, mapping
    )
    result = {}
    for name, claim in claims.items():
        weight = {
            task: coefficients[task] * architectures.weights(claim, values[task])
            for task in folders
        }
        result[name] = sum(weight[task] * tensors[task][name] for task in folders) / sum(
            weight.values()
        )
    return result


def loaded(folders: Iterable[Path], elsewhere: Path) -> dict[str, Any]:
    """What a process without our code says of merged models, by their folders."""
    environment = {**os.environ, "PYTHONPATH": "", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-P", "-c", LOAD, ",".join(LABELS), *map(str, folders)]
    done = subprocess.run(
        command, cwd=elsewhere, env=environment, capture_output=True, text=True, check=True
    )
    said: dict[str, Any] = json.loads(done.stdout)
    return said


def test_every_task_loads_without_our_code_and_answers_as_a_model_put_together_by_hand(
    tmp_path: Path,
) -> None:
    coefficients = {"mrpc": 1.0, "stsb": 0.5, "mnli": 2.0}
    made = {name: (experts(tmp_path / name, name), tmp_path / name / "out") for name in MODELS}
    values = {name: fisher(folders) for name, (folders, _) in made.items()}
    for name, (folders, out) in made.items():
        settings: dict[str, Any] = {
            "mapping": MODELS[name],
            "fisher": values[name],
            "coefficients": coefficients,
        }
        merged.write(out, folders, method="mask-fisher", **settings)
    said = loaded((out for _, out in made.values()), tmp_path)

    for name, (folders, out) in made.items():
        found = said[str(out)]
        # RoBERTa's classifier has no pooler, so its experts have none to merge.
        lacks = ["pooler.dense.bias", "pooler.dense.weight"] if name == "roberta" else []
        assert found["encoder"] == {
            "missing_keys": lacks,
            "unexpected_keys": [],
            "mismatched_keys": [],
        }
        expected = by_hand(folders, values[name], coefficients, MODELS[name])
        for task, folder in folders.items():
            model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
            model.base_model.load_state_dict(
                {key: torch.from_numpy(value).float() for key, value in expected.items()}
            )
            with torch.no_grad():
                logits = model(torch.tensor([[1, 5, 7, 9, 2], [1, 6, 8, 3, 2]])).logits
            torch.testing.assert_close(
                torch.tensor(found[task].pop("logits")), logits, rtol=1e-5, atol=1e-6
            )
            assert found[task] == {"missing_keys": [], "unexpected_keys": [], "mismatched_keys": []}


def test_the_result_does_not_depend_on_the_order_of_the_experts(tmp_path: Path) -> None:
    folders = experts(tmp_path)
    values = fisher(folders)
    for out, order in (("one", list(folders)), ("two", list(folders)[::-1])):
        merged.write(
            tmp_path / out,
            {task: folders[task] for task in order},
            method="mask-fisher",
            fisher={task: values[task] for task in reversed(order)},
        )
    digests = [recipe.read_recipe(tmp_path / out)["files"] for out in ("one", "two")]
    assert digests[0] == digests[1]


def test_the_encoder_is_on_the_disk_once_and_heads_are_the_experts(tmp_path: Path) -> None:
    folders = experts(tmp_path)
    out = tmp_path / "out"
    merged.write(out, folders, method="average", card="# A model\n")
    assert (out / "README.md").read_text() == "# A model\n"
    weights = out / "encoder" / "model.safetensors"
    for task, folder in folders.items():
        assert (recipe.task_folder(out, task) / "model-00001-of-00002.safetensors").samefile(
            weights
        )
        head, expert = (
            load_file(out / "tasks" / task / "model-00002-of-00002.safetensors"),
            load_file(folder / "model.safetensors"),
        )
        assert head.keys() == {"classifier.weight", "classifier.bias"}
        assert all(torch.equal(tensor, expert[name]) for name, tensor in head.items())
        assert (out / "tasks" / task / "vocab.txt").samefile(out / "encoder" / "vocab.txt")
        # A tokenizer file that is not the same in all experts stays each task's own.
        assert json.loads((out / "tasks" / task / "tokenizer_config.json").read_text()) == {
            "name": task
        }


def test_the_recipe_says_how_it_was_made_and_what_the_caller_adds(tmp_path: Path) -> None:
    folders = experts(tmp_path)
    stated = merged.write(
        tmp_path / "out",
        folders,
        method="average",
        coefficients={"mrpc": 3.0},
        recipe={"key": "k", "experts": {"mrpc": {"digest": "d", "revision": "r"}}},
    )
    assert stated == recipe.read_recipe(tmp_path / "out")
    assert {
        name: stated[name]
        for name in ("tasks", "method", "mapping", "coefficients", "scale", "key", "experts")
    } == {
        "tasks": ["mnli", "mrpc", "stsb"],
        "method": "average",
        "mapping": None,
        "coefficients": {"mnli": 1.0, "mrpc": 3.0, "stsb": 1.0},
        "scale": 1.0,
        "key": "k",
        "experts": {"mrpc": {"digest": "d", "revision": "r"}},
    }


@pytest.mark.parametrize("shard_bytes", [1, 20_000])
def test_a_large_encoder_is_written_in_shards_that_load(tmp_path: Path, shard_bytes: int) -> None:
    folders = experts(tmp_path)
    merged.write(tmp_path / "out", folders, method="average", shard_bytes=shard_bytes)
    merged.write(tmp_path / "whole", folders, method="average")
    assert len(list((tmp_path / "out" / "encoder").glob("model-*.safetensors"))) > 1
    for part, auto in (("encoder", AutoModel), ("tasks/mrpc", AutoModelForSequenceClassification)):
        one, two = (
            auto.from_pretrained(tmp_path / out / part).state_dict() for out in ("out", "whole")
        )
        assert one.keys() == two.keys()
        assert all(torch.equal(one[name], two[name]) for name in one)
    recipe.verify(tmp_path / "out")


def test_sharded_experts_merge_as_whole_ones(tmp_path: Path) -> None:
    folders = experts(tmp_path / "whole")
    sharded = {}
    for task, folder in folders.items():
        sharded[task] = tmp_path / "sharded" / task
        AutoModelForSequenceClassification.from_pretrained(folder).save_pretrained(
            sharded[task], max_shard_size=20_000
        )
        assert (sharded[task] / "model.safetensors.index.json").is_file()
    outs = [tmp_path / "one", tmp_path / "two"]
    for out, given in zip(outs, (folders, sharded), strict=True):
        merged.write(out, given, method="average")
    one, two = (recipe.read_recipe(out)["files"]["encoder/model.safetensors"] for out in outs)
    assert one == two


def test_half_precision_experts_give_a_model_that_loads_as_such(tmp_path: Path) -> None:
    out = tmp_path / "out"
    merged.write(out, experts(tmp_path, dtype=torch.bfloat16), method="average")
    for part in ("encoder", "tasks/mrpc"):
        assert json.loads((out / part / "config.json").read_text())["dtype"] == "bfloat16"
    assert AutoModel.from_pretrained(out / "encoder").dtype == torch.bfloat16


def test_a_scale_of_the_merged_task_vector(tmp_path: Path) -> None:
    folders = experts(tmp_path)
    base = save(tiny_model("bert", 2, seed=9), tmp_path / "base")
    merged.write(tmp_path / "out", folders, method="average", base=base, scale=1.5)
    got = load_file(tmp_path / "out" / "encoder" / "model.safetensors")
    origin = AutoModel.from_pretrained(base).state_dict()
    models = [AutoModel.from_pretrained(folder).state_dict() for folder in folders.values()]
    for name, tensor in got.items():
        mean = torch.stack([model[name].double() for model in models]).mean(0)
        expected = origin[name].double() + 1.5 * (mean - origin[name].double())
        torch.testing.assert_close(tensor, expected.float(), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    "name", ["encoder/model.safetensors", "tasks/mrpc/config.json", "encoder/vocab.txt"]
)
def test_verify_names_a_file_that_changed_or_is_missing(tmp_path: Path, name: str) -> None:
    out = tmp_path / "out"
    merged.write(out, experts(tmp_path), method="average", card="a card")
    (out / "README.md").write_text("an edited card")
    recipe.verify(out)
    data = bytearray((out / name).read_bytes())
    data[-2] ^= 1
    (out / name).write_bytes(data)
    with pytest.raises(UserError, match="not what was written there"):
        recipe.verify(out)
    (out / name).unlink()
    with pytest.raises(UserError, match=name):
        recipe.verify(out)


def test_a_merged_model_is_told_from_a_checkpoint(tmp_path: Path) -> None:
    folders = experts(tmp_path)
    merged.write(tmp_path / "out", folders, method="average")
    assert recipe.is_merged(tmp_path / "out")
    assert not recipe.is_merged(folders["mrpc"])
    with pytest.raises(
        UserError, match="no task 'rte' in this merged model; it has mnli, mrpc, stsb"
    ):
        recipe.task_folder(tmp_path / "out", "rte")
    with pytest.raises(UserError, match="not a merged model"):
        recipe.task_folder(folders["mrpc"], "mrpc")


def settings(**changed: Any) -> dict[str, Any]:
    return {"method": "average", **changed}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (settings(method="mask-fischer"), "did you mean mask-fisher"),
        (settings(method="zip"), "choose one of average"),
        (settings(coefficients={"rte": 1.0}), "no such expert"),
        (settings(coefficients={"mrpc": -1.0}), "zero or more"),
        (settings(coefficients={"mrpc": float("nan")}), "finite"),
        (settings(coefficients={"mrpc": 0.0, "stsb": 0.0, "mnli": 0.0}), "all are zero"),
        (settings(scale=1.5), "--base"),
        (settings(method="mask-fisher"), "give --fisher mnli=FILE"),
    ],
)
def test_mistakes_are_named_and_leave_nothing(
    tmp_path: Path, given: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        merged.write(tmp_path / "out", experts(tmp_path), **given)
    assert not list(tmp_path.glob("*out*"))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda nodes: nodes[:-1], "3 head nodes in layer 1"),
        (lambda nodes: -nodes, "negative"),
        (lambda nodes: nodes / 0.0, "infinite"),
    ],
)
@pytest.mark.filterwarnings("ignore:divide by zero")
def test_fisher_that_does_not_fit_is_refused(tmp_path: Path, damage: Any, message: str) -> None:
    folders = experts(tmp_path)
    values = fisher(folders)
    site = architectures.Site(1, "head")
    values["stsb"] = {**values["stsb"], site: damage(values["stsb"][site])}
    with pytest.raises(UserError, match=f"expert stsb: the Fisher information.*{message}"):
        merged.write(tmp_path / "out", folders, method="mask-fisher", fisher=values)


def test_nan_in_an_expert_is_refused_and_leaves_the_older_model(tmp_path: Path) -> None:
    folders, out = experts(tmp_path), tmp_path / "out"
    merged.write(out, folders, method="average")
    before = recipe.read_recipe(out)
    tensors = load_file(folders["stsb"] / "model.safetensors")
    tensors["bert.encoder.layer.1.output.dense.weight"][3, 5] = float("nan")
    save_file(tensors, folders["stsb"] / "model.safetensors", {"format": "pt"})
    with pytest.raises(
        UserError, match=r"expert stsb: tensor encoder.layer.1.output.dense.weight holds NaN or Inf"
    ):
        merged.write(out, folders, method="average", coefficients={"stsb": 0.0})
    assert recipe.read_recipe(out) == before
    recipe.verify(out)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*folders, "out"])


def test_progress_ends_at_the_whole(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    merged.write(
        tmp_path / "out",
        experts(tmp_path),
        method="average",
        progress=lambda done, total: seen.append((done, total)),
    )
    assert (
        seen[-1][0]
        == seen[-1][1]
        == sum(
            tensor.nbytes
            for tensor in load_file(tmp_path / "out" / "encoder" / "model.safetensors").values()
        )
    )


@pytest.mark.parametrize("method", [name for name, needs in NEEDS.items() if needs.base])
def test_every_method_that_takes_the_base_gives_a_model(method: str, tmp_path: Path) -> None:
    base = save(tiny_model("bert", 2, seed=9), tmp_path / "base")
    out = tmp_path / "out"
    stated = merged.write(out, experts(tmp_path), method=method, base=base, scale=0.5, density=0.4)
    assert stated["density"] == (0.4 if NEEDS[method].density else None)
    recipe.verify(out)
    with pytest.raises(UserError, match="density 0: must be above 0"):
        merged.write(out, experts(tmp_path / "more"), method="ties", base=base, density=0)
    with pytest.raises(UserError, match=f"method {method} needs the model"):
        merged.write(out, experts(tmp_path / "again"), method=method)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("method", [*LINEAR, "ties"])
def test_recombined_encoders_are_those_merged_anew(method: str, name: str, tmp_path: Path) -> None:
    folders, base = experts(tmp_path, name), save(tiny_model(name, 2, seed=9), tmp_path / "base")
    values = fisher(folders)
    for nodes in values.values():
        nodes[min(nodes)][0] = 0.0  # no expert has any there
    options: merged.Options = {
        "method": method,
        "fisher": values,
        "mapping": MODELS[name],
        "base": base,
    }
    recombiners = {
        scaled: merged.recombiner(folders, scaled, **options) for scaled in (False, True)
    }
    rng = np.random.default_rng(0)
    for scale in (1.0, 0.3, 1.7):
        coefficients = {
            task: float(value) for task, value in zip(folders, rng.uniform(0.05, 5, 3), strict=True)
        }
        tried: merged.Options = {**options, "coefficients": coefficients, "scale": scale}
        expected = merged.in_memory(folders, **tried)
        for scaled in {scale != 1, True}:
            found = recombiners[scaled](coefficients, scale)
            assert found.keys() == expected.keys()
            for tensor, value in expected.items():
                torch.testing.assert_close(found[tensor], value, rtol=1e-5, atol=2e-6)


KILLED = """
import os, signal, sys
from pathlib import Path
from fmn.merge import model as merged
folder = Path(sys.argv[1])
experts = {task: folder / task for task in ("mrpc", "stsb", "mnli")}
merged.write(folder / "out", experts, method="average", progress=lambda *_: os.kill(os.getpid(), signal.SIGKILL))
"""


@pytest.mark.slow
def test_a_killed_merge_leaves_nothing_that_looks_finished(tmp_path: Path) -> None:
    folders, out = experts(tmp_path), tmp_path / "out"
    environment = {**os.environ, "PYTHONPATH": str(Path(merged.__file__).parents[2])}
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(tmp_path)], env=environment, check=False
    )
    assert done.returncode == -signal.SIGKILL
    assert not out.exists()
    merged.write(out, folders, method="average")
    recipe.verify(out)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*folders, "out"])


def statistics_of(
    folders: Mapping[str, Path], where: Path
) -> tuple[dict[str, Any], dict[str, merged.StoredGrams]]:
    """The full Fisher and the Gram matrices of every expert on random texts, on the disk."""
    where.mkdir()
    full, grams = {}, {}
    for seed, (task, folder) in enumerate(folders.items()):
        model = AutoModelForSequenceClassification.from_pretrained(folder)
        examples = tiny_examples("bert", 30, LABELS[task], seed)
        squares = diagonal.estimate(
            model, examples, estimator="expected", regression=task == "stsb", device="cpu"
        )
        save_file(squares, where / f"{task}.full")
        full[task] = file_headers(where / f"{task}.full")
        found = gram.estimate(model, examples, device="cpu")
        save_file(found.moments, where / f"{task}.gram")
        grams[task] = merged.StoredGrams(
            file_headers(where / f"{task}.gram"),
            found.inputs,
            sorted(found.transposed),
        )
    return full, grams


def test_the_full_fisher_weighs_every_entry_by_itself(tmp_path: Path) -> None:
    folders = experts(tmp_path)
    full, _ = statistics_of(folders, tmp_path / "statistics")
    lambdas = {"mrpc": 2.0, "stsb": 0.5, "mnli": 1.0}
    got = merged.in_memory(folders, method="fisher", full_fisher=full, coefficients=lambdas)
    weights = {task: load_file(tmp_path / "statistics" / f"{task}.full") for task in folders}
    for name, tensor in got.items():
        factors = torch.tensor([lambdas[task] for task in folders]).reshape(-1, *[1] * tensor.ndim)
        squares = factors * torch.stack([weights[task][name].double() for task in folders])
        values = torch.stack(
            [load_file(folder / "model.safetensors")[f"bert.{name}"] for folder in folders.values()]
        )
        total = squares.sum(0)
        expected = (squares * values).sum(0) / total
        mean = (factors * values).sum(0) / factors.sum()
        torch.testing.assert_close(
            tensor, torch.where(total > 0, expected, mean).float(), rtol=1e-5, atol=1e-6
        )
    with pytest.raises(UserError, match="expert stsb: no full Fisher information"):
        merged.in_memory(
            folders, method="fisher", full_fisher={task: full[task] for task in ("mrpc", "mnli")}
        )


@pytest.mark.parametrize("method", ["regmean", "fisher-regmean"])
def test_regression_of_every_linear_map(method: str, tmp_path: Path) -> None:
    folders = experts(tmp_path)
    _, grams = statistics_of(folders, tmp_path / "statistics")
    nodes = fisher(folders)
    got = merged.in_memory(
        folders,
        method=method,
        grams=grams,
        fisher=nodes,
        normalise="kind",
        exponent=1.0,
        damping=0.7,
    )
    moments = {task: load_file(tmp_path / "statistics" / f"{task}.gram") for task in folders}
    stored = {task: load_file(folder / "model.safetensors") for task, folder in folders.items()}
    values = {task: architectures.tempered(nodes[task], "kind", 1.0) for task in folders}
    heads = {task: values[task][architectures.Site(1, "head")] for task in folders}
    neurons = {task: values[task][architectures.Site(1, "neuron")] for task in folders}
    layer = "encoder.layer.1"
    rows = {  # of 4 heads with 6 channels; 20 neurons; the mean for what follows the nodes
        f"{layer}.attention.self.value": {task: np.repeat(heads[task], 6) for task in folders},
        f"{layer}.attention.output.dense": {
            task: np.full(24, heads[task].mean()) for task in folders
        },
        f"{layer}.intermediate.dense": neurons,
        f"{layer}.output.dense": {task: np.full(24, neurons[task].mean()) for task in folders},
    }
    for module, weights in rows.items():
        if method == "regmean":
            weights = {task: np.ones_like(one) for task, one in weights.items()}
        ratios = np.stack(list(weights.values()))
        if np.ptp(ratios, axis=1).any():  # rows that differ
            ratios = rounded(torch.from_numpy(ratios)).numpy()
        names = {task: grams[task].inputs[module] for task in folders}
        second = {task: moments[task][names[task]].double().numpy() for task in folders}
        second = {task: 0.7 * one + 0.3 * np.diag(np.diag(one)) for task, one in second.items()}
        matrix = {task: stored[task][f"bert.{module}.weight"].double().numpy() for task in folders}
        for row in range(len(matrix["mrpc"])):
            weighed = {
                task: ratio[row] * second[task] for task, ratio in zip(folders, ratios, strict=True)
            }
            target = sum(weighed[task] @ matrix[task][row] for task in folders)
            expected = np.linalg.solve(sum(weighed.values()), target)
            np.testing.assert_allclose(got[f"{module}.weight"][row], expected, rtol=2e-3, atol=2e-3)
    with pytest.raises(UserError, match="expert mnli: no Gram matrices"):
        merged.in_memory(folders, method=method, fisher=nodes)


def test_gpt2_whose_weights_are_transposed_is_regressed_alike(tmp_path: Path) -> None:
    folders = {
        task: save(tiny_model("gpt2", 2, seed), tmp_path / task)
        for seed, task in enumerate(("mrpc", "rte"))
    }
    grams = {}
    for seed, (task, folder) in enumerate(folders.items()):
        model = AutoModelForSequenceClassification.from_pretrained(folder)
        found = gram.estimate(model, tiny_examples("gpt2", 30, 2, seed), device="cpu")
        save_file(found.moments, tmp_path / f"{task}.gram")
        grams[task] = merged.StoredGrams(
            file_headers(tmp_path / f"{task}.gram"),
            found.inputs,
            sorted(found.transposed),
        )
    got = merged.in_memory(folders, method="regmean", grams=grams, damping=1.0)[
        "h.1.mlp.c_fc.weight"
    ].double()
    second = {
        t: load_file(tmp_path / f"{t}.gram")[grams[t].inputs["h.1.mlp.c_fc"]].double()
        for t in folders
    }
    stored = {
        t: load_file(f / "model.safetensors")["transformer.h.1.mlp.c_fc.weight"].double()
        for t, f in folders.items()
    }
    # At the optimum the outputs' errors are uncorrelated with the inputs: sum_j G_j (W - W_j) = 0.
    residual = torch.stack([second[task] @ (got - stored[task]) for task in folders]).sum(0)
    assert residual.abs().max() < 1e-4 * (second["mrpc"] @ stored["mrpc"]).abs().max()


@pytest.mark.parametrize("method", ["mask-fisher", "fisher-regmean"])
def test_equal_experts_are_the_result_whatever_auto_stands_for(method: str, tmp_path: Path) -> None:
    one = save(tiny_model("bert", 2, 3), tmp_path / "one")
    base = save(tiny_model("bert", 2, 9), tmp_path / "base")
    folders = dict.fromkeys(("mrpc", "rte", "sst2"), one)
    model = AutoModelForSequenceClassification.from_pretrained(one)
    found = gram.estimate(model, tiny_examples("bert", 20, 2), device="cpu")
    save_file(found.moments, tmp_path / "one.gram")
    grams = merged.StoredGrams(file_headers(tmp_path / "one.gram"), found.inputs, ())
    nodes = fisher(folders)
    given: dict[str, Any] = {"fisher": nodes, "grams": dict.fromkeys(folders, grams), "base": base}
    for experts_ in (folders, {"rte": one}):
        got = merged.in_memory(experts_, method=method, **given)
        stored = load_file(one / "model.safetensors")
        assert all(torch.equal(tensor, stored[f"bert.{name}"]) for name, tensor in got.items())


def test_what_auto_stands_for_is_in_the_recipe(tmp_path: Path) -> None:
    folders = experts(tmp_path)
    base = save(tiny_model("bert", 2, seed=9), tmp_path / "base")
    nodes = fisher(folders)
    stated = merged.write(tmp_path / "out", folders, method="mask-fisher", fisher=nodes, base=base)
    assert (stated["normalise"], stated["exponent"]) == ("kind", 1.0)
    origin = AutoModel.from_pretrained(base).state_dict()
    vectors = [
        torch.cat(
            [
                (AutoModel.from_pretrained(folder).state_dict()[name] - origin[name]).flatten()
                for name in origin
            ]
        )
        for folder in folders.values()
    ]
    ratio = (
        torch.stack([vector.square().sum() for vector in vectors]).mean()
        / torch.stack(vectors).mean(0).square().sum()
    )
    assert stated["scale"] == pytest.approx(float(ratio) ** 0.5, rel=1e-4)
    for plain in ({"mapping": "paper", "base": base}, {"mapping": "structured"}):
        stated = merged.write(
            tmp_path / "out", folders, method="mask-fisher", fisher=nodes, **plain
        )
        assert (stated["normalise"], stated["exponent"], stated["scale"]) == ("none", 1.0, 1.0)
