"""Calibrated encoders, against what each map must meet in plain passes of the models."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from fmn.errors import UserError
from fmn.fisher import architectures
from fmn.merge.calibrate import calibrated_encoder
from fmn.merge.heads import own_part
from fmn.merge.recipe import CalibrationSettings
from fmn.tasks.batches import Examples, by_length
from tests.tiny import tiny_examples, tiny_model

CHAINS = (
    *("bert", "roberta", "electra", "distilbert", "mpnet", "deberta-v2", "deberta-v3"),
    *("modernbert", "gpt2", "llama", "qwen3", "gemma2", "vit"),
)
LABELS = {"a": 3, "b": 1}
FLOAT64: dict[str, Any] = {"device": "cpu", "dtype": "float64"}
Encoder = dict[str, Tensor]


def plain(model: PreTrainedModel) -> PreTrainedModel:
    """The model with the attention that calibration computes with, to the last bits."""
    model.set_attn_implementation("eager")
    model.config.pad_token_id = 0
    return model


class Problem:
    """Two experts of an architecture, the average of their encoders, and texts."""

    def __init__(self, name: str = "bert", count: int = 12) -> None:
        self.experts = {
            task: plain(tiny_model(name, labels, seed))
            for seed, (task, labels) in enumerate(LABELS.items())
        }
        states = [expert.base_model.state_dict() for expert in self.experts.values()]
        self.encoder = {
            key: (states[0][key] + states[1][key]) / 2
            for key, value in states[0].items()
            if value.is_floating_point()
        }
        self.examples = {
            task: tiny_examples(name, count, seed=seed) for seed, task in enumerate(LABELS)
        }

    def calibrated(self, **settings: Any) -> tuple[Encoder, dict[str, float]]:
        return calibrated_encoder(
            self.experts,
            self.encoder,
            self.examples,
            settings=CalibrationSettings(**settings),
            **FLOAT64,
        )


class Pass:
    """What the linear maps read and give in one pass of a model, by path in the base model.

    Of tokens alone: reads are [N, n], outputs are [N, rows] and lead back to the logits.
    """

    def __init__(self, model: PreTrainedModel, examples: Examples) -> None:
        (batch,) = by_length(examples)
        self.reads: dict[str, Tensor] = {}
        self.outputs: dict[str, Tensor] = {}
        mask = batch.inputs.get("attention_mask")
        self.is_token = slice(None) if mask is None else mask.flatten().bool()
        count = 1 if mask is None else mask.numel()
        hooks = []
        for path, module in model.base_model.named_modules():
            is_in_layer = any(part.isdigit() for part in path.split("."))
            if isinstance(module, nn.Linear | Conv1D) and is_in_layer:

                def hook(_m: nn.Module, args: Any, output: Tensor, path: str = path) -> None:
                    if mask is None or args[0].shape[:-1].numel() == count:
                        self.reads.setdefault(path, args[0])
                        self.outputs.setdefault(path, output)

                hooks.append(module.register_forward_hook(hook))
        self.logits = model(**{name: x.double() if x.is_floating_point() else x
                               for name, x in batch.inputs.items()}).logits  # fmt: skip
        for handle in hooks:
            handle.remove()

    def tokens(self, states: Tensor) -> Tensor:
        rows: Tensor = states.flatten(0, -2)[self.is_token]
        return rows

    def gradients(self, v: Tensor) -> dict[str, Tensor]:
        """The squared entries [N, rows] of the gradients of v . logits / std, by map."""
        gradients = torch.autograd.grad((v * self.logits).sum(), list(self.outputs.values()))
        variance = self.logits.detach().var(0, correction=0).mean()
        squares = (self.tokens(each).square() / variance for each in gradients)
        return dict(zip(self.outputs, squares, strict=True))


def with_encoder(model: PreTrainedModel, encoder: Encoder) -> PreTrainedModel:
    model.base_model.load_state_dict(encoder, strict=False)
    return model


def matrix(model: PreTrainedModel, path: str) -> Tensor:
    module: Any = model.base_model.get_submodule(path)
    weight: Tensor = module.weight
    return weight.T if isinstance(module, Conv1D) else weight


@pytest.mark.parametrize("name", CHAINS)
@pytest.mark.parametrize("target", ["outputs", "weights"])
def test_every_map_minimises_its_objective(name: str, target: str) -> None:
    problem, ridge = Problem(name), 0.3
    encoder, _ = problem.calibrated(ridge=ridge, target=target, seed=5)
    own = {task: Pass(problem.experts[task], problem.examples[task]) for task in LABELS}
    squares = {
        task: passed.gradients(
            torch.randn(passed.logits.shape, generator=torch.Generator().manual_seed(5))
        )
        for task, passed in own.items()
    }
    merged = {
        task: with_encoder(plain(tiny_model(name, labels)), encoder)
        for task, labels in LABELS.items()
    }
    read = {task: Pass(merged[task], problem.examples[task]) for task in LABELS}
    before = with_encoder(tiny_model(name), problem.encoder)
    first = own["a"]
    groups = {path: [p for p in first.reads if first.reads[p] is first.reads[path]]
              for path in first.reads}  # fmt: skip
    nodes = {f"{site.layer}.{module}": site.channels
             for site in architectures.mask_sites(problem.experts["a"].base_model)
             for _, module in site.block.inputs}  # fmt: skip
    changed = 0
    for path in own["a"].reads:
        new, old = matrix(merged["a"], path), matrix(before, path)
        size = nodes.get(path, len(new)) if target == "outputs" else len(new)
        for start in range(0, len(new), size):
            rows = slice(start, start + size)
            total, pull = torch.zeros(old.shape[1], old.shape[1]).double(), torch.zeros(()).double()
            for task in LABELS:
                h = read[task].tokens(read[task].reads[path])
                if target == "outputs":
                    of_tokens = [squares[task][p].sum(-1, keepdim=True) for p in groups[path]]
                    g = sum(of_tokens[1:], of_tokens[0])  # [N, 1]
                    g = g * squares[task][path][:, rows].mean() / squares[task][path].mean()
                    lacking = own[task].tokens(own[task].outputs[path])
                    lacking = lacking - read[task].tokens(read[task].outputs[path])
                else:
                    g = torch.ones(len(h), 1).double()
                    lacking = h @ (matrix(problem.experts[task], path) - new).T
                total += h.T @ (g * h) / len(h)
                pull = pull + (g * lacking[:, rows]).T @ h / len(h)
            step = ridge * total.diagonal().mean() * (new - old)[rows]
            rounding = 1e-5 * float(step.detach().abs().max())
            torch.testing.assert_close(pull, step, rtol=0, atol=rounding)
        changed += not torch.equal(new, old)
    assert changed == len(own["a"].reads) > 5


def test_experts_that_are_the_merged_encoder_leave_it_as_it_is() -> None:
    problem = Problem()
    problem.encoder = dict(problem.experts["a"].base_model.state_dict())
    problem.experts["b"] = with_encoder(tiny_model("bert", 1), problem.encoder)
    encoder, errors = problem.calibrated()
    for name, value in problem.encoder.items():
        torch.testing.assert_close(encoder[name], value, rtol=0, atol=1e-12)
    assert max(errors.values()) < 1e-20


def test_an_expert_without_states_of_its_own_is_refused() -> None:
    problem = Problem(count=4)
    with torch.no_grad():
        for value in problem.experts["b"].base_model.parameters():
            value.zero_()
    with pytest.raises(UserError, match="layer 0 cannot be calibrated, as an expert's states"):
        problem.calibrated()


def test_the_answers_of_a_disturbed_encoder_come_back() -> None:
    problem = Problem(count=200)
    expert = problem.experts["a"]
    problem.experts, problem.examples = {"a": expert}, {"a": problem.examples["a"]}
    torch.manual_seed(0)
    problem.encoder = {
        name: value + 0.1 * torch.randn_like(value) * (".layer." in name and value.ndim == 2)
        for name, value in expert.base_model.state_dict().items()
    }
    disturbed = with_encoder(tiny_model("bert"), problem.encoder)
    encoder, errors = problem.calibrated(ridge=1e-6)
    calibrated = with_encoder(tiny_model("bert"), encoder)
    own, before, after = (
        Pass(model, problem.examples["a"]).reads["encoder.layer.1.output.dense"]
        for model in (expert, disturbed, calibrated)
    )
    assert (after - own).square().mean() < 1e-4 * (before - own).square().mean()
    assert errors["a"] < 1e-4


def test_only_matrices_of_layers_change() -> None:
    problem = Problem()
    before = {task: dict(expert.state_dict()) for task, expert in problem.experts.items()}
    copies = {task: {n: t.clone() for n, t in state.items()} for task, state in before.items()}
    encoder, _ = problem.calibrated()
    assert encoder.keys() == problem.encoder.keys()
    for name, value in problem.encoder.items():
        is_map = ".layer." in name and value.ndim == 2
        assert torch.equal(encoder[name], value) != is_map
    for task, expert in problem.experts.items():
        for name, value in expert.state_dict().items():
            assert torch.equal(value, copies[task][name])


def test_an_own_layer_is_calibrated_to_the_merged_layers_below_it() -> None:
    problem = Problem()
    expert, examples = problem.experts["a"], problem.examples["a"]
    state = expert.base_model.state_dict()
    names = [name for name in state if name.startswith(("encoder.layer.1.", "pooler."))]
    plain_own = own_part(expert, problem.encoder, names, 0, examples, seed=0, **FLOAT64)
    own = own_part(expert, problem.encoder, names, 1, examples, seed=0, **FLOAT64)
    errors = {}
    for kind, part in {"plain": plain_own, "calibrated": own}.items():
        assert list(part) == names
        model = with_encoder(plain(tiny_model("bert")), {**problem.encoder, **part})
        difference = Pass(model, examples).logits - Pass(expert, examples).logits
        errors[kind] = float(difference.detach().square().mean())
    assert errors["calibrated"] < errors["plain"]
    for name in names:
        assert torch.equal(plain_own[name], state[name])
        is_map = ".layer." in name and state[name].ndim == 2
        assert torch.equal(own[name], state[name]) != is_map


def test_batches_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = Problem()
    expected, _ = problem.calibrated(target="weights")
    monkeypatch.setattr("fmn.merge.calibrate.tokens_at_once", lambda *_: 20)
    encoder, _ = problem.calibrated(target="weights")
    for name, value in expected.items():
        torch.testing.assert_close(encoder[name], value)


def test_progress_counts_layers() -> None:
    problem = Problem()
    calls: list[tuple[int, int]] = []
    calibrated_encoder(
        problem.experts, problem.encoder, problem.examples, settings=CalibrationSettings(),
        progress=lambda done, total: calls.append((done, total)), **FLOAT64,
    )  # fmt: skip
    assert calls == [(1, 2), (2, 2)]


@pytest.mark.parametrize(
    ("name", "reason"), [("albert", "share their parameters"), ("t5", "a decoder")]
)
def test_other_architectures_are_refused(name: str, reason: str) -> None:
    with pytest.raises(UserError, match=f"calibrate: .* has .*{reason}.*; leave it out"):
        Problem(name).calibrated()


def test_a_task_without_texts_is_refused() -> None:
    problem = Problem()
    problem.examples["b"] = problem.examples["b"].take(np.array([], dtype=int))
    with pytest.raises(UserError, match="b: there are no training texts to calibrate on"):
        problem.calibrated()
