"""The estimators against brute force, and what they promise about batches, breaks and the model."""

from functools import partial
from pathlib import Path
from typing import Any, cast
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from scipy.stats import norm, spearmanr
from torch import Tensor
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from fmn.errors import UserError
from fmn.fisher import mask_nodes
from fmn.fisher.architectures import mask_sites
from fmn.fisher.loss import ESTIMATORS, uniform_draws
from fmn.fisher.mask_nodes import (
    BATCH_SIZE,
    Estimate,
    PartialSums,
    combined,
    estimate,
)
from fmn.models.embedding import Modules, SentenceEncoder
from fmn.models.predict import hooked
from fmn.tasks.batches import IGNORED, Examples, select
from fmn.tasks.kinds import ProblemType
from fmn.tasks.task import LossName
from tests.fisher.problems import (
    MANY_LABELS,
    ONE_LABEL,
    PROBLEMS,
    VALUE,
    labelled,
    logits_of,
    loss,
    losses,
    squares,
)
from tests.tiny import CONFIGS, GENERATORS, tiny_examples, tiny_generator, tiny_model, tiny_texts

# Others compute normalisations or rotations in float32 whatever their weights are.
DOUBLE_THROUGHOUT = {
    *("bert", "roberta", "xlm-roberta", "camembert", "electra", "distilbert", "mpnet", "albert"),
    *("albert-groups", "deberta-v2", "deberta-v3", "gpt2", "vit"),
}


def run(
    model: PreTrainedModel,
    examples: Examples,
    estimator: str = "expected",
    problem_type: LossName = ONE_LABEL,
    **options: Any,
) -> Estimate:
    """An estimate on the CPU, in float64 unless said otherwise."""
    options = {"device": "cpu", "dtype": "float64", **options}
    return estimate(model, examples, estimator=estimator, problem_type=problem_type, **options)


def flat(result: Estimate) -> np.ndarray:
    return np.concatenate(list(result.fisher.values()))


def errors(result: Estimate) -> np.ndarray:
    assert result.stderr is not None
    return np.concatenate(list(result.stderr.values()))


def mask_hooks(model: PreTrainedModel) -> tuple[list[Tensor], list[Any]]:
    """Masks of ones, and the hooks that put them into a model."""
    sites = mask_sites(model)
    masks = [torch.ones(site.nodes, dtype=torch.float64, requires_grad=True) for site in sites]
    hooks = [
        (
            model.get_submodule(site.module),
            lambda _, args, mask=mask, channels=site.channels: (
                args[0] * mask.repeat_interleave(channels),
                *args[1:],
            ),
        )
        for site, mask in zip(sites, masks, strict=True)
    ]
    return masks, hooks


def masked(model: PreTrainedModel, examples: Examples, row: int) -> tuple[list[Tensor], Tensor]:
    """Masks that were put into the model, and the logits [C] of one example."""
    masks, hooks = mask_hooks(model)
    with hooked(hooks):
        return masks, logits_of(model, examples, row)


def by_brute_force(
    model: PreTrainedModel, examples: Examples, estimator: str, problem_type: ProblemType
) -> np.ndarray:
    """The squared mask gradients of every example by itself, [N, P]."""
    terms = []
    for row, label in enumerate(examples.labels):
        masks, logits = masked(model, examples, row)
        terms.append(torch.cat(squares(losses(problem_type, logits, label, estimator), masks)))
    return torch.stack(terms).numpy()


def completion_losses(
    model: PreTrainedModel, examples: Examples, row: int, draws: Tensor | None = None
) -> tuple[list[Tensor], Tensor]:
    """Masks that were put into the model, and the loss of an example's labelled tokens.

    With `draws` [T], labels are those of the model's distribution with these quantiles.
    """
    example = examples.take(np.array([row]))
    inputs = {name: torch.tensor(values) for name, values in example.inputs.items()}  # no padding
    total, labels = torch.zeros((), dtype=torch.float64), torch.tensor(example.labels[0])
    masks, hooks = mask_hooks(model)
    with hooked(hooks):
        logits = model(**inputs).logits[0]  # [T, C], of all tokens
    for place, token in enumerate(labels.tolist()):
        if token == IGNORED:
            continue
        p = logits[place].softmax(0)
        if draws is not None:
            token = int((p.detach().cumsum(0) < draws[place]).sum())
        total = total - p[token].log()
    return masks, total


@pytest.mark.parametrize("name", GENERATORS)
def test_generated_text_agrees_with_masks_put_into_the_model(name: str) -> None:
    model, examples = tiny_generator(name), tiny_texts(name, 5)
    draws = torch.from_numpy(uniform_draws(7, np.arange(5), 16))
    rtol = 1e-7 if name in ("gpt2", "bart", "mbart", "pegasus", "marian") else 1e-3
    terms: dict[str, list[Tensor]] = {"empirical": [], "sampled": [], "batch": []}
    for row in range(5):
        for estimator in ("empirical", "sampled"):
            own = draws[row] if estimator == "sampled" else None
            masks, loss_of_row = completion_losses(model, examples, row, own)
            gradient = torch.cat(torch.autograd.grad(loss_of_row, masks))
            terms[estimator].append(gradient.square())
            if estimator == "empirical":
                terms["batch"].append(gradient / 5)
    wanted = {
        "empirical": torch.stack(terms["empirical"]).mean(0),
        "sampled": torch.stack(terms["sampled"]).mean(0),
        "batch": torch.stack(terms["batch"]).sum(0).square(),
    }
    for estimator, values in wanted.items():
        result = run(model, examples, estimator, "tokens", seed=7)
        assert flat(result) == pytest.approx(values.numpy(), rel=rtol, abs=1e-9), estimator
        assert np.count_nonzero(flat(result))


@pytest.mark.parametrize(
    ("name", "mode"), [("bert", "mean"), ("mpnet", "cls"), ("gpt2", "lasttoken"), ("albert", "max")]
)
def test_embeddings_agree_with_masks_put_into_the_model(name: str, mode: str) -> None:
    encoder, examples = tiny_model(name).base_model, tiny_examples(name, 6)
    model = cast("PreTrainedModel", SentenceEncoder(encoder, Modules((mode,), True), Path()))
    probes = norm.ppf(uniform_draws(7, np.arange(6), 24))  # [N, D]
    terms = []
    for row, tokens in enumerate(examples.inputs["input_ids"]):
        masks, hooks = mask_hooks(model)
        with hooked(hooks):
            states = encoder(torch.tensor([tokens])).last_hidden_state[0]  # [T, D], no padding
        pooled = {
            "mean": states.mean(0),
            "cls": states[0],
            "lasttoken": states[-1],
            "max": states.max(0).values,
        }
        embedding = pooled[mode] / pooled[mode].square().sum().sqrt()
        gradients = torch.autograd.grad(torch.from_numpy(probes[row]) @ embedding, masks)
        terms.append(torch.cat(gradients).square().numpy())
    result = run(model, examples, "sampled", "embedding", seed=7)
    np.testing.assert_allclose(flat(result), np.mean(terms, 0), rtol=1e-8, atol=1e-13)
    with pytest.raises(UserError, match="choose from sampled"):
        run(model, examples, "expected", "embedding")


@pytest.mark.parametrize("name", CONFIGS)
def test_agrees_with_finite_differences(name: str) -> None:
    model, examples = tiny_model(name), tiny_examples(name, 2)
    fast = {key: run(model, examples, key).fisher for key in ("expected", "empirical")}
    is_double = name in DOUBLE_THROUGHOUT
    step, rtol, atol = (1e-5, 1e-5, 1e-11) if is_double else (1e-3, 1e-2, 1e-5)
    with torch.no_grad():
        p = [logits_of(model, examples, row).softmax(0).numpy() for row in range(2)]
        for site in mask_sites(model):
            module = model.get_submodule(site.module)
            weight = module.weight
            assert isinstance(weight, torch.Tensor)
            columns = weight if isinstance(module, Conv1D) else weight.T  # [nodes * channels, out]
            for node in (0, site.nodes // 2, site.nodes - 1):
                own = slice(node * site.channels, (node + 1) * site.channels)
                before = columns[own].clone()
                shifted = []
                for factor in (1 + step, 1 - step):
                    columns[own] = before * factor
                    shifted.append([logits_of(model, examples, row).numpy() for row in range(2)])
                columns[own] = before
                slopes = (np.array(shifted[0]) - np.array(shifted[1])) / (2 * step)  # [2, C]
                centred = [slopes[row] - p[row] @ slopes[row] for row in range(2)]
                expected = np.mean([p[row] @ centred[row] ** 2 for row in range(2)])
                empirical = np.mean([centred[row][examples.labels[row]] ** 2 for row in range(2)])
                for key, value in (("expected", expected), ("empirical", empirical)):
                    own_value = fast[key][site.site][node]
                    np.testing.assert_allclose(own_value, value, rtol=rtol, atol=atol)


@pytest.mark.parametrize("estimator", ["empirical", "expected"])
@pytest.mark.parametrize(("problem_type", "outputs"), [*PROBLEMS, (ONE_LABEL, 20)])
def test_fisher_and_its_error_agree_with_brute_force(
    problem_type: ProblemType, outputs: int, estimator: str
) -> None:
    model, examples = tiny_model("bert", outputs), labelled("bert", 7, problem_type, outputs)
    terms = by_brute_force(model, examples, estimator, problem_type)
    result = run(model, examples, estimator, problem_type)
    deviations = terms.std(0, ddof=1) / np.sqrt(7)
    np.testing.assert_allclose(flat(result), terms.mean(0), rtol=1e-9)
    np.testing.assert_allclose(errors(result), deviations, rtol=1e-7)
    assert result.relative_error == pytest.approx((deviations / terms.mean(0)).mean(), rel=1e-6)
    assert result.samples == 7


@pytest.mark.parametrize(("problem_type", "outputs"), PROBLEMS)
def test_batch_squares_the_gradient_of_the_mean_loss_of_consecutive_examples(
    problem_type: ProblemType, outputs: int
) -> None:
    model = tiny_model("bert", outputs)
    examples = labelled("bert", 2 * BATCH_SIZE + 5, problem_type, outputs)
    gradients = []
    for row, label in enumerate(examples.labels):
        masks, logits = masked(model, examples, row)
        own = loss(problem_type, logits, label)
        gradients.append(torch.cat(torch.autograd.grad(own, masks)).numpy())
    starts = range(0, len(examples), BATCH_SIZE)
    wanted = sum(np.mean(gradients[start : start + BATCH_SIZE], 0) ** 2 for start in starts)
    for dtype, rtol in (("float64", 1e-9), ("float32", 1e-4)):
        result = run(model, examples, "batch", problem_type, dtype=dtype)
        atol = 1e-5 * float(np.median(wanted)) if dtype == "float32" else 0
        np.testing.assert_allclose(flat(result), wanted, rtol=rtol, atol=atol)
        assert result.stderr is None
        assert result.relative_error is None


@pytest.mark.parametrize(("problem_type", "outputs"), PROBLEMS)
def test_sampled_is_unbiased_for_expected(problem_type: ProblemType, outputs: int) -> None:
    model, text = tiny_model("bert", outputs), tiny_examples("bert", 1)  # labels are not read
    examples = text.take(np.zeros(300, dtype=np.int64))
    exact = flat(run(model, text, "expected", problem_type))
    draws = [run(model, examples, "sampled", problem_type, seed=seed) for seed in range(3)]
    for drawn in draws:  # every row has a draw of its own
        assert np.all(np.abs(flat(drawn) - exact) < 4.5 * errors(drawn) + 1e-12)
    assert not np.array_equal(flat(draws[0]), flat(draws[1]))


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_the_result_does_not_depend_on_batches(
    estimator: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, examples = tiny_model("roberta"), tiny_examples("roberta", 70)
    before = flat(run(model, examples, estimator))
    monkeypatch.setattr(mask_nodes, "CHUNK", 2 * BATCH_SIZE)
    monkeypatch.setattr(mask_nodes, "max_batch_tokens", lambda device: 30)
    np.testing.assert_allclose(flat(run(model, examples, estimator)), before, rtol=1e-10)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_parts_of_the_examples_combine_to_the_whole(estimator: str) -> None:
    model, examples = tiny_model("bert"), tiny_examples("bert", 75)
    whole: dict[int, Estimate] = {}
    for samples, count in ((70, 2), (70, 3), (70, 4), (4, 4)):  # 70: three batches of 32
        compute = partial(run, model, examples, estimator, samples=samples, seed=3)
        whole.setdefault(samples, compute())
        parts = [compute(part=(number + 1, count)) for number in range(count)]
        result = combined(parts, estimator)
        assert result.samples == whole[samples].samples == samples
        np.testing.assert_allclose(flat(result), flat(whole[samples]), rtol=1e-10)
        if estimator == "batch":
            assert result.stderr is None
        else:
            np.testing.assert_allclose(errors(result), errors(whole[samples]), rtol=1e-7)


def test_a_sample_is_the_rows_that_select_names_and_their_order_does_not_matter() -> None:
    model, examples = tiny_model("bert"), tiny_examples("bert", 40)
    sample = examples.take(select(examples.labels, 10, 5, True))
    result = flat(run(model, examples, "empirical", samples=10, stratified=True, seed=5))
    np.testing.assert_array_equal(result, flat(run(model, sample, "empirical")))
    backwards = sample.take(np.arange(10)[::-1])
    np.testing.assert_allclose(flat(run(model, backwards, "empirical")), result, rtol=1e-12)


@pytest.mark.parametrize("estimator", ["expected", "batch"])
@pytest.mark.parametrize("samples", [None, 90])
def test_a_killed_run_goes_on_to_the_same_bits(
    estimator: str, samples: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mask_nodes, "max_batch_tokens", lambda device: 64)
    monkeypatch.setattr(mask_nodes, "CHUNK", 64)
    model, examples = tiny_model("bert", dtype=torch.float32), tiny_examples("bert", 100)
    options: dict[str, Any] = {"samples": samples, "dtype": "float32"}
    options["heaviest"] = 0 if estimator == "batch" else 7
    saved: list[PartialSums] = []
    whole = run(model, examples, estimator, save=saved.append, save_seconds=0, **options)
    assert len(saved) > 10
    for sums in saved:
        reported: list[int] = []
        resumed = run(
            model,
            examples,
            estimator,
            resume=sums,
            progress=lambda done, _, reported=reported: reported.append(done),
            **options,
        )
        np.testing.assert_array_equal(flat(resumed), flat(whole))
        assert resumed.samples == whole.samples == saved[-1].done
        assert all(done > sums.done for done in reported)


def test_running_out_of_memory_halves_the_batch() -> None:
    model, examples = tiny_model("bert"), tiny_examples("bert", 30)
    before = flat(run(model, examples))
    sizes: list[int] = []

    def scarce(_module: torch.nn.Module, _args: object, kwargs: dict[str, torch.Tensor]) -> None:
        if kwargs["input_ids"].numel() > 50:
            raise torch.OutOfMemoryError("CUDA out of memory")
        if torch.is_grad_enabled():
            sizes.append(len(kwargs["input_ids"]))

    handle = model.register_forward_pre_hook(scarce, with_kwargs=True)
    np.testing.assert_allclose(flat(run(model, examples)), before, rtol=1e-10)
    assert sum(sizes) == 30 + 1, "and one text that shows what the head reads"
    assert max(sizes) > 2
    handle.remove()


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (MemoryError(), pytest.raises(UserError, match="does not suffice for one example")),
        (RuntimeError("shape mismatch"), pytest.raises(RuntimeError, match="shape mismatch")),
    ],
)
def test_what_halving_does_not_help_is_raised(error: Exception, expected: Any) -> None:
    model = tiny_model("bert")
    with hooked([(model, Mock(side_effect=error))]), expected:
        run(model, tiny_examples("bert", 30))


def test_the_model_is_left_as_it_was() -> None:
    model = tiny_model("gpt2", dtype=torch.float32).train()
    model.config.pad_token_id = None
    frozen = next(model.parameters()).requires_grad_(False)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    attributes = {name: set(vars(module)) for name, module in model.named_modules()}
    config, attention = model.config.to_dict(), model.config._attn_implementation
    for dtype in ("bfloat16", "float64"):
        run(model, tiny_examples("gpt2", 6), "empirical", dtype=dtype)
    assert all(module.training for module in model.modules())
    assert (model.config.to_dict(), model.config._attn_implementation) == (config, attention)
    assert [parameter.requires_grad for parameter in model.parameters()].count(False) == 1
    assert not frozen.requires_grad
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert attributes == {name: set(vars(module)) for name, module in model.named_modules()}
    for name, tensor in model.state_dict().items():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, before[name]), name


def test_no_gradient_reaches_a_weight_or_what_lies_below_the_lowest_node() -> None:
    model = tiny_model("bert", dtype=torch.float32)
    queries: list[bool] = []
    model.get_submodule("bert.encoder.layer.0.attention.self.query").register_forward_hook(
        lambda _module, _args, output: queries.append(output.requires_grad)
    )
    run(model, tiny_examples("bert", 3), "empirical", dtype="float32")
    assert not any(queries[1:]), "after one text that shows what the head reads"


def test_the_attention_implementation_does_not_matter_and_is_kept() -> None:
    results = []
    for attention in ("eager", "sdpa"):
        model = tiny_model("llama")
        model.set_attn_implementation(attention)
        results.append(flat(run(model, tiny_examples("llama", 6))))
        assert model.config._attn_implementation == attention
    np.testing.assert_allclose(results[0], results[1], rtol=1e-4)


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama"])
def test_bfloat16_stays_close(name: str) -> None:
    model, examples = tiny_model(name, dtype=torch.float32), tiny_examples(name, 200)
    exact, rough = (flat(run(model, examples, dtype=dtype)) for dtype in ("float32", "bfloat16"))
    assert spearmanr(exact, rough).statistic >= 0.998
    assert np.mean(np.abs(rough / exact - 1)) <= 0.02


@pytest.mark.parametrize("estimator", ["empirical", "expected", "sampled"])
def test_the_heaviest_examples_of_a_run_in_bfloat16_are_in_float32(estimator: str) -> None:
    model, examples = tiny_model("bert", dtype=torch.float32), tiny_examples("bert", 60)
    compute = partial(run, model, examples, estimator, samples=50, seed=3)
    exact, rough = compute(dtype="float32"), compute(dtype="bfloat16")
    checked, every = (compute(dtype="bfloat16", heaviest=count) for count in (30, 50))
    before, after = (np.abs(flat(each) / flat(exact) - 1).mean() for each in (rough, checked))
    assert after < 0.7 * before
    np.testing.assert_allclose(flat(every), flat(exact), rtol=1e-5)
    np.testing.assert_allclose(errors(every), errors(exact), rtol=1e-5)
    assert (rough.rounding, every.rounding is None) == (None, estimator == "sampled")
    if checked.rounding is not None:
        assert after / 5 < checked.rounding < 5 * after
        assert every.rounding == pytest.approx(0, abs=1e-9)
        assert compute(dtype="bfloat16", heaviest=4, part=(1, 99)).rounding == 0, "no examples"


def test_a_single_example_has_no_standard_error() -> None:
    result = run(tiny_model("bert"), tiny_examples("bert", 3), samples=1)
    assert (result.stderr, result.relative_error) == (None, None)


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama", "t5", "albert"])
@pytest.mark.parametrize("estimator", ["empirical", "expected"])
def test_layers_that_are_computed_again_give_the_same(name: str, estimator: str) -> None:
    model, examples = tiny_model(name), tiny_examples(name, 6)
    options: dict[str, Any] = {"estimator": estimator, "problem_type": ONE_LABEL, "device": "cpu"}
    options["dtype"] = "float64"
    sizes: dict[bool, int] = {}
    results = []
    for recompute in (False, True):
        saved: list[int] = []  # bytes that the backward pass holds

        def pack(tensor: Tensor, saved: list[int] = saved) -> Tensor:
            saved.append(tensor.nbytes)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            results.append(estimate(model, examples, recompute=recompute, **options).fisher)
        sizes[recompute] = sum(saved)
    for site, values in results[0].items():
        np.testing.assert_allclose(results[1][site], values, rtol=1e-12, atol=0)
    assert sizes[True] < sizes[False] / 2


def test_weights_stored_in_half_precision_are_computed_with_in_single() -> None:
    half, single = (tiny_model("bert", dtype=dtype) for dtype in (torch.bfloat16, torch.float32))
    single.load_state_dict(half.state_dict())
    results = [
        flat(run(model, tiny_examples("bert", 6), dtype="float32")) for model in (half, single)
    ]
    np.testing.assert_array_equal(results[0], results[1])


def test_settings_that_do_not_fit_are_refused() -> None:
    model, examples = tiny_model("bert"), tiny_examples("bert", 4)
    for match, options in (
        ("no dtype 'float8'", {"dtype": "float8"}),
        ("no device 'abacus'", {"device": "abacus"}),
        ("3 outputs, but regression needs one", {"problem_type": VALUE}),
        (r"of shape \[4\], .* takes the shape \[4, 3\]", {"problem_type": MANY_LABELS}),
    ):
        with pytest.raises(UserError, match=match):
            run(model, examples, "empirical", **options)


@pytest.mark.gpu
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_the_gpu_agrees_with_the_cpu(estimator: str) -> None:
    model, examples = tiny_model("bert", dtype=torch.float32), tiny_examples("bert", 100)
    for dtype, rtol in (("float64", 1e-9), ("float32", 1e-3)):
        cpu, gpu = (
            flat(run(model, examples, estimator, dtype=dtype, device=device))
            for device in ("cpu", "cuda")
        )
        np.testing.assert_allclose(gpu, cpu, rtol=rtol, atol=1e-6 * cpu.max())
