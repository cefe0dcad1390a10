"""Merging checkpoints, and the merged model's folder as people load it: without our code."""

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModel, AutoTokenizer

from fmn.errors import UserError
from fmn.fisher import architectures
from fmn.fisher.architectures import NodeValues, Site
from fmn.merge import model, stream
from fmn.merge.inputs import Plan, Statistics, matching
from fmn.merge.methods import METHODS, Tuning
from fmn.merge.recipe import MergeSettings, read_recipe
from fmn.merge.rules import rounded
from fmn.store import artifacts
from fmn.store.headers import file_headers
from fmn.tasks.task import Columns, Task, read_task
from tests.folders import edit_config
from tests.merge.experts import LABELS, checkpoints, full_fisher, grams, load, node_fisher, save
from tests.tiny import tiny_model

AVERAGE = MergeSettings(method="average")
LAMBDAS = {"mrpc": 1.0, "stsb": 0.5, "mnli": 2.0}
WEIGHTED = [f"{task}={value}" for task, value in LAMBDAS.items()]
MODELS = {"bert": "structured", "roberta": "paper", "distilbert": "structured", "electra": "paper"}
TEXTS = [[1, 5, 7, 9, 2], [1, 6, 8, 3, 2]]
LOAD = f"""
import json, sys, torch
from transformers import AutoModel, AutoModelForSequenceClassification

def load(kind, folder):
    model, info = kind.from_pretrained(folder, output_loading_info=True)
    names = ("missing_keys", "unexpected_keys", "mismatched_keys")
    return model.eval(), {{name: sorted(info[name]) for name in names}}

result, tasks, folders = {{}}, sys.argv[1].split(","), sys.argv[2:]
for folder in folders:
    result[folder] = {{"encoder": load(AutoModel, folder + "/encoder")[1]}}
    for task in tasks:
        path = f"{{folder}}/tasks/{{task}}"
        model, result[folder][task] = load(AutoModelForSequenceClassification, path)
        with torch.no_grad():
            result[folder][task]["logits"] = model(torch.tensor({TEXTS})).logits.tolist()
assert "fmn" not in sys.modules
print(json.dumps(result))
"""
COMPLETE: dict[str, list[str]] = {"missing_keys": [], "unexpected_keys": [], "mismatched_keys": []}


def loaded(folders: Iterable[Path], elsewhere: Path) -> dict[str, Any]:
    """Missing keys and logits of merged models in a process without our code, by folder."""
    environment = {**os.environ, "PYTHONPATH": "", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-P", "-c", LOAD, ",".join(LABELS), *map(str, folders)]
    output = subprocess.check_output(command, cwd=elsewhere, env=environment, text=True)
    result: dict[str, Any] = json.loads(output)
    return result


def by_hand(
    experts: Mapping[str, Path], values: Mapping[str, NodeValues], mapping: str
) -> dict[str, np.ndarray]:
    """The merged encoder's parameters in float64 numpy."""
    encoders = {task: load(folder).base_model for task, folder in experts.items()}
    tensors = {
        task: {name: tensor.double().numpy() for name, tensor in encoder.state_dict().items()}
        for task, encoder in encoders.items()
    }
    first = next(iter(encoders.values()))
    shapes = {name: tuple(tensor.shape) for name, tensor in first.state_dict().items()}
    result = {}
    for name, claim in architectures.claims(first.config, shapes, mapping).items():
        weight = {t: LAMBDAS[t] * architectures.weights(claim, values[t]) for t in experts}
        total = sum(weight[task] * tensors[task][name] for task in experts)
        result[name] = total / sum(weight.values())
    return result


@dataclass
class Written:
    """Merged models: experts, statistics, folder, and what a process without our code loads."""

    experts: Mapping[str, Path]
    out: Path
    values: Mapping[str, NodeValues] = field(default_factory=dict)
    merged: Mapping[str, Tensor] = field(default_factory=dict)
    own: Sequence[str] = ()
    result: dict[str, Any] = field(default_factory=dict)

    def check(self, name: str, shared: Mapping[str, Tensor]) -> None:
        """Every task answers as its expert with these tensors in its encoder."""
        # RoBERTa's classifier has no pooler, so its experts have none to merge.
        lacks = ["pooler.dense.bias", "pooler.dense.weight"] if "roberta" in name else []
        assert self.result["encoder"] == {**COMPLETE, "missing_keys": lacks}
        dtype = next(iter(shared.values())).dtype
        for task, folder in self.experts.items():
            expert = load(folder).to(dtype)
            expert.base_model.load_state_dict(shared, strict=False)
            with torch.no_grad():
                wanted = expert(torch.tensor(TEXTS)).logits
            logits = torch.tensor(self.result[task].pop("logits"), dtype=dtype)
            torch.testing.assert_close(logits, wanted, rtol=1e-5, atol=1e-6)
            assert self.result[task] == COMPLETE


def write_own_parts(folder: Path, experts: Mapping[str, Path], shard_bytes: int) -> Written:
    """The average of experts, which have the last layer for themselves."""
    plain, out, merged = folder / "plain", folder / "own", model.in_memory(experts, AVERAGE)
    recipe = model.write_model(plain, experts, AVERAGE, shard_bytes=shard_bytes)
    shapes = {key: tuple(tensor.shape) for key, tensor in merged.items()}
    own = architectures.own_parts(load(experts["mrpc"]).config, shapes, layers=1)
    states = {task: load(expert).base_model.state_dict() for task, expert in experts.items()}
    parts = {task: {key: state[key] for key in own} for task, state in states.items()}
    heads: dict[str, dict[str, Tensor]] = {task: {} for task in experts}
    model.write_realigned(out, plain, heads, recipe, parts)
    return Written(experts, out, merged=merged, own=own)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Written]:
    """Models by mask Fisher, and averages with own parts ("own ..."), loaded by one process."""
    folder = tmp_path_factory.mktemp("written")
    models = {}
    for name, mapping in MODELS.items():
        experts = checkpoints(folder / name, name)
        values, out = node_fisher(experts), folder / name / "out"
        settings = MergeSettings(mapping=mapping, coefficient=WEIGHTED)
        model.write_model(out, experts, settings, statistics=Statistics(values))
        models[name] = Written(experts, out, values)
    sets = {name: models[name].experts for name in ("bert", "roberta")}
    sets |= {name: checkpoints(folder / name, name) for name in ("deberta-v3", "gpt2")}
    sets["sharded"] = sets["bert"]
    sets["half"] = checkpoints(folder / "half", dtype=torch.bfloat16)
    sets["mixed"] = {**sets["bert"], "mrpc": sets["half"]["mrpc"]}
    for name, folders in sets.items():
        size = 5_000 if name == "sharded" else stream.SHARD_BYTES
        models[f"own {name}"] = write_own_parts(folder / f"own-{name}", folders, size)
    results = loaded([each.out for each in models.values()], folder)
    for each in models.values():
        each.result = results[str(each.out)]
    return models


@pytest.mark.parametrize("name", MODELS)
def test_every_task_loads_without_our_code_and_answers_as_a_model_put_together_by_hand(
    name: str, written: dict[str, Written]
) -> None:
    model = written[name]
    expected = by_hand(model.experts, model.values, MODELS[name])
    model.check(name, {key: torch.from_numpy(value).float() for key, value in expected.items()})


def test_the_result_does_not_depend_on_the_order_of_the_experts(tmp_path: Path) -> None:
    experts = checkpoints(tmp_path)
    statistics = Statistics(node_fisher(experts))
    turned = dict(reversed(experts.items()))
    for name, folders in (("first", experts), ("second", turned)):
        model.write_model(tmp_path / name, folders, MergeSettings(), statistics=statistics)
    first, second = (artifacts.digest_files(tmp_path / name) for name in ("first", "second"))
    assert first == second


def test_the_encoder_is_on_the_disk_once_and_heads_are_the_experts(tmp_path: Path) -> None:
    experts, out = checkpoints(tmp_path), tmp_path / "out"
    model.write_model(out, experts, AVERAGE)
    assert "mnli, mrpc, stsb" in (out / "README.md").read_text()
    for task, folder in experts.items():
        first, last = sorted((out / "tasks" / task).glob("*.safetensors"))
        assert first.samefile(out / "encoder" / "model.safetensors")
        head, expert = load_file(last), load_file(folder / "model.safetensors")
        assert head.keys() == {"classifier.weight", "classifier.bias"}
        assert all(torch.equal(tensor, expert[name]) for name, tensor in head.items())
        tokenizer = json.loads((out / "tasks" / task / "tokenizer_config.json").read_text())
        assert tokenizer == {"name": task}


@pytest.mark.parametrize(
    ("own", "names"),
    [
        (["sport", "WORLD", "money"], ["sport", "world", "money"]),  # its order stays
        (["LABEL_0", "LABEL_1", "LABEL_2"], ["LABEL_0", "LABEL_1", "LABEL_2"]),
        (["sport", "weather", "money"], ["sport", "weather", "money"]),
    ],
)
def test_outputs_have_the_tasks_names_where_the_experts_are_understood(
    own: list[str], names: list[str], tmp_path: Path
) -> None:
    expert = save(tiny_model("bert", 3), tmp_path / "topics")
    edit_config(expert, id2label=dict(enumerate(own)), label2id={n: i for i, n in enumerate(own)})
    topics = Task(name="topics", columns=Columns(text="t"), labels=("world", "money", "sport"))
    out = tmp_path / "out"
    recipe = model.write_model(out, {"topics": expert}, AVERAGE, definitions={"topics": topics})
    config = AutoConfig.from_pretrained(out / "tasks" / "topics")
    assert [config.id2label[output] for output in range(3)] == names
    assert config.label2id == {name: output for output, name in enumerate(names)}
    assert config.problem_type == topics.problem_type
    assert recipe.definitions["topics"] == read_task(out / "tasks" / "topics") == topics


def test_the_encoder_is_not_read_again_for_its_digest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model.write_model(tmp_path / "out", checkpoints(tmp_path), AVERAGE)
    encoder = tmp_path / "out" / "encoder" / "model.safetensors"
    digest = artifacts.digest_bytes(encoder.read_bytes())
    monkeypatch.setattr(hashlib, "file_digest", None)
    assert artifacts.digest_file(encoder) == digest
    for task in LABELS:
        assert (
            artifacts.digest_file(min((tmp_path / "out" / "tasks" / task).glob("*.s*"))) == digest
        )


def test_sharded_experts_give_a_sharded_encoder_that_loads(tmp_path: Path) -> None:
    experts = checkpoints(tmp_path / "whole")
    for task, folder in experts.items():
        load(folder).save_pretrained(tmp_path / "sharded" / task, max_shard_size=20_000)
    sharded = {task: tmp_path / "sharded" / task for task in experts}
    model.write_model(tmp_path / "out", sharded, AVERAGE, shard_bytes=20_000)
    assert len(list((tmp_path / "out" / "encoder").glob("model-*.safetensors"))) > 1
    merged = model.in_memory(experts, AVERAGE)
    for part in (
        AutoModel.from_pretrained(tmp_path / "out" / "encoder"),
        load(tmp_path / "out" / "tasks" / "mrpc").base_model,
    ):
        tensors = part.state_dict()
        assert merged.keys() == tensors.keys()
        assert all(torch.equal(merged[name], tensor) for name, tensor in tensors.items())


@pytest.mark.parametrize(
    "name", ["bert", "roberta", "deberta-v3", "gpt2", "sharded", "half", "mixed"]
)
def test_own_parts_load_without_our_code_and_what_is_shared_is_on_the_disk_once(
    name: str, written: dict[str, Written]
) -> None:
    model = written[f"own {name}"]
    *shared, rest = sorted((model.out / "encoder").glob("*.safetensors"))
    assert load_file(rest).keys() == set(model.own)
    for task in model.experts:
        *linked, last = sorted((model.out / "tasks" / task).glob("*.safetensors"))
        assert all(a.samefile(b) for a, b in zip(linked, shared, strict=True))
        tensors = load_file(last)
        assert set(model.own) < tensors.keys()
        assert {tensors[key].dtype for key in model.own} == {
            model.merged[key].dtype for key in model.own
        }
    if name == "sharded":  # files without own parts are those of the model
        plain = model.out.with_name("plain")
        before = {file.stat().st_ino for file in (plain / "encoder").glob("*.safetensors")}
        assert len([file for file in shared if file.stat().st_ino in before]) > 1
    assert artifacts.digest_file(rest) == artifacts.digest_bytes(rest.read_bytes())
    encoder = AutoModel.from_pretrained(model.out / "encoder").state_dict()
    assert all(torch.equal(encoder[key], tensor) for key, tensor in model.merged.items())
    model.check(name, {k: v for k, v in model.merged.items() if k not in model.own})


def test_half_precision_experts_give_a_model_that_loads_as_such(tmp_path: Path) -> None:
    experts, out = checkpoints(tmp_path, dtype=torch.bfloat16), tmp_path / "out"
    seen: list[tuple[int, int]] = []
    model.write_model(out, experts, AVERAGE, progress=lambda *now: seen.append(now))
    for part in ("encoder", "tasks/mrpc"):
        assert json.loads((out / part / "config.json").read_text())["dtype"] == "bfloat16"
    encoder = AutoModel.from_pretrained(out / "encoder")
    assert encoder.dtype == torch.bfloat16
    assert seen[-1] == (sum(tensor.nbytes for tensor in encoder.parameters()),) * 2


@pytest.mark.parametrize("method", METHODS)
def test_merges_in_memory_are_those_that_are_written(method: str, tmp_path: Path) -> None:
    experts, base = checkpoints(tmp_path), save(tiny_model("bert", 2, 9), tmp_path / "base")
    values: dict[str, Any] = dict(node_fisher(experts))
    if METHODS[method].fisher == "parameters":
        values = dict(full_fisher(experts, tmp_path))
    statistics = Statistics(values, grams(experts, tmp_path) if METHODS[method].gram else {})
    settings = MergeSettings(method=method, coefficient=WEIGHTED, scale=0.5)
    recipe = model.write_model(
        tmp_path / "out", experts, settings, base=base, statistics=statistics
    )
    assert recipe == read_recipe(tmp_path / "out")
    written = load_file(tmp_path / "out" / "encoder" / "model.safetensors")
    merge = model.merger(experts, MergeSettings(method=method), base, statistics)
    for merged in (model.in_memory(experts, settings, base, statistics), merge(LAMBDAS, 0.5)):
        assert merged.keys() == written.keys()
        assert all(torch.equal(merged[name], tensor) for name, tensor in written.items())


def test_the_full_fisher_weighs_every_entry_by_itself(tmp_path: Path) -> None:
    experts = checkpoints(tmp_path)
    statistics = Statistics(full_fisher(experts, tmp_path))
    settings = MergeSettings(method="fisher", coefficient=WEIGHTED)
    merged = model.in_memory(experts, settings, None, statistics)
    weights = {task: load_file(tmp_path / f"{task}.full") for task in experts}
    stored = {task: load_file(folder / "model.safetensors") for task, folder in experts.items()}
    for name, tensor in merged.items():
        factors = torch.tensor([LAMBDAS[task] for task in experts])
        factors = factors.reshape(-1, *[1] * tensor.ndim)
        squares = factors * torch.stack([weights[task][name].double() for task in experts])
        values = torch.stack([stored[task][f"bert.{name}"] for task in experts])
        total = squares.sum(0)
        mean = (factors * values).sum(0) / factors.sum()
        expected = torch.where(total > 0, (squares * values).sum(0) / total, mean).float()
        torch.testing.assert_close(tensor, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("method", ["regmean", "fisher-regmean"])
def test_regression_of_every_linear_map(method: str, tmp_path: Path) -> None:
    experts = checkpoints(tmp_path)
    nodes, gram = node_fisher(experts), grams(experts, tmp_path)
    settings = MergeSettings(method=method, normalise="kind", exponent=1.0, damping=0.7)
    merged = model.in_memory(experts, settings, None, Statistics(nodes, gram))
    stored = {task: load_file(folder / "model.safetensors") for task, folder in experts.items()}
    values = {task: architectures.tempered(nodes[task], "kind", 1.0) for task in experts}
    heads = {task: values[task][Site(1, "head")] for task in experts}
    neurons = {task: values[task][Site(1, "neuron")] for task in experts}
    layer = "encoder.layer.1"
    rows = {  # of 4 heads with 6 channels; 20 neurons; the mean for what follows the nodes
        f"{layer}.attention.self.value": {t: np.repeat(heads[t], 6) for t in experts},
        f"{layer}.attention.output.dense": {t: np.full(24, heads[t].mean()) for t in experts},
        f"{layer}.intermediate.dense": neurons,
        f"{layer}.output.dense": {t: np.full(24, neurons[t].mean()) for t in experts},
    }
    for module, by_task in rows.items():
        ratios = np.stack(list(by_task.values()))
        if method == "regmean":
            ratios = np.ones_like(ratios)
        if np.ptp(ratios, axis=1).any():  # rows that differ
            ratios = rounded(torch.from_numpy(ratios)).numpy()
        second = []
        for task in experts:
            moment = load_file(tmp_path / f"{task}.gram")[gram[task].inputs[module]]
            full = moment.double().numpy()
            second.append(0.7 * full + 0.3 * np.diag(np.diag(full)))
        matrices = [stored[task][f"bert.{module}.weight"].double().numpy() for task in experts]
        for row in range(len(matrices[0])):
            weighed = [r[row] * moment for r, moment in zip(ratios, second, strict=True)]
            target = sum(g @ w[row] for g, w in zip(weighed, matrices, strict=True))
            expected = np.linalg.solve(sum(weighed), target)
            got = merged[f"{module}.weight"][row]
            np.testing.assert_allclose(got, expected, rtol=2e-3, atol=2e-3)


def test_gpt2_whose_weights_are_transposed_is_regressed_alike(tmp_path: Path) -> None:
    experts = {
        task: save(tiny_model("gpt2", labels, seed), tmp_path / task)
        for seed, (task, labels) in enumerate({"mrpc": 2, "stsb": 1}.items())
    }
    gram = grams(experts, tmp_path, "gpt2")
    settings = MergeSettings(method="regmean", damping=1.0)
    name = "h.1.mlp.c_fc"
    merged = model.in_memory(experts, settings, None, Statistics(grams=gram))[f"{name}.weight"]
    second, stored = {}, {}
    for task, folder in experts.items():
        second[task] = load_file(tmp_path / f"{task}.gram")[gram[task].inputs[name]].double()
        tensors = load_file(folder / "model.safetensors")
        stored[task] = tensors[f"transformer.{name}.weight"].double()
    # At the optimum the errors are uncorrelated with the inputs: sum_j G_j (W - W_j) = 0.
    residual = sum(second[task] @ (merged.double() - stored[task]) for task in experts)
    assert isinstance(residual, Tensor)
    assert residual.abs().max() < 1e-4 * (second["mrpc"] @ stored["mrpc"]).abs().max()


@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_wudi_takes_the_matrices_of_linear_maps_alone_however_they_are_stored(
    name: str, tmp_path: Path
) -> None:
    experts = {
        task: save(tiny_model(name, labels, seed), tmp_path / task)
        for seed, (task, labels) in enumerate({"mrpc": 2, "stsb": 1}.items())
    }
    origin = save(tiny_model(name, 2, 9), tmp_path / "base")
    merged = model.in_memory(experts, MergeSettings(method="wudi"), origin)
    base, *tuned = (load(folder).base_model.state_dict() for folder in (origin, *experts.values()))
    turned, linear, embedding = {
        "bert": (False, "encoder.layer.1.output.dense.weight", "embeddings.word_embeddings.weight"),
        "gpt2": (True, "h.1.mlp.c_proj.weight", "wte.weight"),
    }[name]
    mean = (tuned[0][embedding] + tuned[1][embedding]) / 2
    torch.testing.assert_close(merged[embedding], mean)
    vectors = [(each[linear] - base[linear]).double() for each in tuned]
    change = (merged[linear] - base[linear]).double()
    if turned:
        vectors, change = [each.T for each in vectors], change.T
    # At the optimum the gradient is zero: sum_j (tau - tau_j) tau_j^T tau_j / |tau_j|^2 = 0.
    pulls = [(change - each) @ each.T @ each / each.square().sum() for each in vectors]
    assert (pulls[0] + pulls[1]).abs().max() < 1e-3 * pulls[0].abs().max()


@pytest.mark.parametrize("method", ["mask-fisher", "fisher-regmean"])
def test_equal_experts_are_the_result_whatever_auto_stands_for(method: str, tmp_path: Path) -> None:
    expert = save(tiny_model("bert", 2, 3), tmp_path / "mrpc")
    base = save(tiny_model("bert", 2, 9), tmp_path / "base")
    gram = grams({"mrpc": expert}, tmp_path)["mrpc"]
    for tasks in (("mrpc", "rte", "sst2"), ("rte",)):
        experts = dict.fromkeys(tasks, expert)
        statistics = Statistics(node_fisher(experts), dict.fromkeys(tasks, gram))
        merged = model.in_memory(experts, MergeSettings(method=method), base, statistics)
        stored = load_file(expert / "model.safetensors")
        assert all(torch.equal(each, stored[f"bert.{name}"]) for name, each in merged.items())


def test_what_auto_stands_for_is_in_the_recipe(tmp_path: Path) -> None:
    experts, base = checkpoints(tmp_path), save(tiny_model("bert", 2, 9), tmp_path / "base")
    statistics = Statistics(node_fisher(experts))
    recipe = model.write_model(
        tmp_path / "out", experts, MergeSettings(), base=base, statistics=statistics
    )
    assert (recipe.normalise, recipe.exponent, recipe.damping) == ("kind", 1.0, None)
    origin = AutoModel.from_pretrained(base).state_dict()
    states = [AutoModel.from_pretrained(folder).state_dict() for folder in experts.values()]
    vectors = torch.stack(
        [torch.cat([(each[name] - origin[name]).flatten() for name in origin]) for each in states]
    )
    ratio = vectors.square().sum(1).mean() / vectors.mean(0).square().sum()
    assert recipe.scale == pytest.approx(float(ratio) ** 0.5, rel=1e-4)
    paper = MergeSettings(mapping="paper")
    assert model.scale(experts, paper, base, statistics) == 1
    assert model.scale(experts, MergeSettings(), None, statistics) == 1


# ---------------------------------------------------------------------------------------------
# Parameters of many shapes, in pieces

SHAPES: dict[str, tuple[int, ...]] = {
    **{"matrix": (7, 5), "tall": (60, 3), "wide": (2, 90), "vector": (13,)},
    **{"scalar": (), "empty": (0, 4), "cube": (4, 3, 2)},
}


def prepared(
    folder: Path,
    experts: Mapping[str, Mapping[str, Tensor]],
    base: Mapping[str, Tensor] | None = None,
    method: str = "average",
    scale: float = 1.0,
) -> Plan:
    """A merge of tensors that belong to no model."""
    headers = {}
    for task, tensors in {**experts, **({"base": base} if base else {})}.items():
        save_file(dict(tensors), folder / task)
        headers[f"expert {task}"] = file_headers(folder / task)
    origin = headers.pop("expert base", None)
    parameters, lambdas = matching(headers, origin), (1.0,) * len(experts)
    settings = MergeSettings(method=method)
    return Plan(settings, Tuning(), tuple(experts), lambdas, scale, parameters)


def merge(plan: Plan) -> dict[str, Tensor]:
    with stream.reading() as read:
        return model.merged_tensors(plan, model.merged_pieces(plan, read))


def randoms(count: int) -> list[dict[str, Tensor]]:
    return [{name: torch.randn(shape) for name, shape in SHAPES.items()} for _ in range(count)]


@pytest.mark.parametrize("method", ["average", "task-arithmetic", "ties"])
@pytest.mark.parametrize("working_set", [8, 300])
def test_the_result_does_not_depend_on_the_pieces(
    method: str, working_set: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    *values, base = randoms(4)
    plan = prepared(tmp_path, dict(zip("abc", values, strict=True)), base, method, scale=1.5)
    whole = merge(plan)
    monkeypatch.setattr(model, "WORKING_SET", working_set)
    for name, tensor in merge(plan).items():
        torch.testing.assert_close(tensor, whole[name], rtol=1e-6, atol=1e-6)
        if method == "average":
            mean = torch.stack([each[name].double() for each in values]).mean(0)
            scaled = base[name] + 1.5 * (mean - base[name])
            torch.testing.assert_close(tensor, scaled.float(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("working_set", [8, 300, 1 << 24])
def test_fisher_by_row_column_and_leading_axis(
    working_set: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model, "WORKING_SET", working_set)
    values = randoms(2)
    plan = prepared(tmp_path, dict(zip("ab", values, strict=True)), method="mask-fisher")
    shapes = {"matrix": (7, 1), "tall": (1, 3), "wide": (1, 90), "vector": (13,), "cube": (1, 3, 1)}
    fisher = {
        name: [torch.rand(shapes.get(name, ()), dtype=torch.float64) for _ in "ab"]
        for name in SHAPES
    }
    monkeypatch.setattr(Plan, "fisher", lambda plan, parameter: fisher[parameter.spec.name])
    object.__setattr__(plan, "nodes", [{}])
    for name, tensor in merge(plan).items():
        f, (a, b) = fisher[name], (each[name].double() for each in values)
        expected = (f[0] * a + f[1] * b) / (f[0] + f[1])
        torch.testing.assert_close(tensor, expected.float(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_equal_experts_come_out_bit_for_bit_whatever_their_size(
    dtype: torch.dtype, tmp_path: Path
) -> None:
    (values,) = randoms(1)
    values = {name: tensor.to(dtype) for name, tensor in values.items()}
    values["largest"] = torch.full((50,), torch.finfo(dtype).max, dtype=dtype)
    for tasks in ("a", "abc"):
        merged = merge(prepared(tmp_path, dict.fromkeys(tasks, values)))
        assert all(torch.equal(merged[name], value) for name, value in values.items())


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
@pytest.mark.parametrize("source", ["b", "base"])
@pytest.mark.parametrize("method", ["average", "task-arithmetic", "ties", "tsv-m"])
def test_values_that_are_not_finite_are_refused(
    method: str, source: str, value: float, tmp_path: Path
) -> None:
    values = {task: {"w": torch.randn(40, 30)} for task in ("a", "b", "base")}
    values[source]["w"][39, 29] = value
    base = values.pop("base")
    plan = prepared(tmp_path, values, base, method, scale=1.5)
    object.__setattr__(plan, "coefficients", (1.0, 0.0))
    expected = "base" if source == "base" else "expert b"
    with pytest.raises(UserError, match=f"{expected}: tensor w holds NaN or Inf"):
        merge(plan)


def test_merged_values_that_do_not_fit_the_dtype_are_refused(tmp_path: Path) -> None:
    experts = {task: {"w": torch.full((3,), 6e4).half()} for task in "ab"}
    plan = prepared(tmp_path, experts, {"w": torch.zeros(3).half()}, scale=2.0)
    message = r"tensor w: merged values do not fit F16; use a smaller --scale"
    with pytest.raises(UserError, match=message):
        merge(plan)


def test_the_effective_number_of_task_vectors(tmp_path: Path) -> None:
    base = {"m": torch.zeros(4, 3), "v": torch.zeros(5)}
    first, second = torch.zeros(4, 3), torch.zeros(4, 3)
    first[0, 0], second[1, 2] = 2.0, 2.0
    tensors = {"0": {}, "a": {"m": first}, "b": {"m": second}, "c": {"m": -first}}

    def number(names: str) -> float:
        experts = {f"{n}{name}": {**base, **tensors[name]} for n, name in enumerate(names)}
        plan = prepared(tmp_path, experts, base)
        with stream.reading() as read:
            return model.effective_number(plan.parameters, read)

    assert number("ab") == pytest.approx(2)
    assert number("aaa") == pytest.approx(1)
    assert number("a") == pytest.approx(1)
    assert number("aab") == pytest.approx(9 / 5)
    assert number("ac") == 1, "they cancel: there is nothing to scale"
    assert number("00") == 1


MEASURE = """
import sys
from pathlib import Path
from tests.merge.test_model import prepared, torch
from fmn.merge import model, stream
def peak():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) * 1024
folder, method = Path(sys.argv[1]), sys.argv[2]
tensors = {"embedding": torch.randn(120_000, 512)}  # 246 MB
plan = prepared(folder, dict.fromkeys("abcd", tensors), tensors, method, 1.5)
if method == "mask-fisher":
    fisher = [torch.rand(120_000, 1, dtype=torch.float64) for _ in "abcd"]
    model.Plan.fisher = lambda plan, name: fisher
    object.__setattr__(plan, "nodes", [{}])
del tensors
Path("/proc/self/clear_refs").write_text("5")
before = peak()
with stream.reading() as read:
    specs = [parameter.spec for parameter in plan.parameters]
    stream.write_file(folder / "out", specs, model.merged_pieces(plan, read))
print(peak() - before)
"""


@pytest.mark.slow
@pytest.mark.parametrize("method", ["average", "mask-fisher"])
def test_memory_is_bounded_whatever_the_size(method: str, tmp_path: Path) -> None:
    command = [sys.executable, "-c", MEASURE, str(tmp_path), method]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert int(done.stdout) < 128e6


@pytest.mark.parametrize("method", ["average", "ties", "task-arithmetic", "mask-fisher", "fisher"])
def test_a_token_that_one_expert_adds_is_its_own(method: str, tmp_path: Path) -> None:
    experts = checkpoints(tmp_path)
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    others = [f"w{number}" for number in range(25)]
    base = save(tiny_model("bert", 2, seed=9), tmp_path / "base")
    for folder in (*experts.values(), base):
        (folder / "vocab.txt").write_text("\n".join([*words, *others]) + "\n")
    wide = load(experts["mrpc"])
    wide.resize_token_embeddings(33, mean_resizing=False)  # a token, and two rows of padding
    with torch.no_grad():
        wide.get_input_embeddings().weight[30:] = torch.randn(3, 24)
    save(wide, experts["mrpc"])
    (experts["mrpc"] / "vocab.txt").write_text("\n".join([*words, *others, "new"]) + "\n")
    statistics = Statistics(node_fisher(experts))
    if method == "fisher":
        statistics = Statistics(full_fisher(experts, tmp_path))
    out = tmp_path / "out"
    model.write_model(out, experts, MergeSettings(method=method), base=base, statistics=statistics)
    name = "embeddings.word_embeddings.weight"
    merged = model.read_encoder(out)[name]
    own = load_file(experts["mrpc"] / "model.safetensors")[f"bert.{name}"]
    torch.testing.assert_close(merged[30:], own[30:])
    # Without the token, the merge is what it would be without it.
    narrow = load(experts["mrpc"])
    narrow.resize_token_embeddings(30, mean_resizing=False)
    save(narrow, experts["mrpc"])
    (experts["mrpc"] / "vocab.txt").write_text("\n".join([*words, *others]) + "\n")
    if method == "fisher":
        files = {task: dict(each) for task, each in statistics.fisher.items()}
        header = files["mrpc"][name]
        cut = header.end - 3 * (header.end - header.start) // 33
        files["mrpc"][name] = header._replace(shape=(30, 24), end=cut)
        statistics = Statistics(files)
    plain = model.in_memory(experts, MergeSettings(method=method), base, statistics)
    torch.testing.assert_close(merged[:30], plain[name])
    for task in experts:
        folder = out / "tasks" / task
        assert load(folder).config.vocab_size == 33
        tokens = AutoTokenizer.from_pretrained(folder).get_vocab()
        assert ("new" in tokens) == (task == "mrpc")
    assert "new" in AutoTokenizer.from_pretrained(out / "encoder").get_vocab()
