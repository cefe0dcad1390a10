"""Method auto: what it measures, what it tries, and that it takes the best."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from fmn.errors import UserError
from fmn.merge import auto, heads, model
from fmn.merge.inputs import Statistics
from fmn.merge.recipe import Auto, MergeSettings
from fmn.tasks.batches import Examples
from tests.merge.experts import LABELS, checkpoints, grams, load, node_fisher, save
from tests.tiny import tiny_examples, tiny_model

SETTINGS = MergeSettings(method="auto", device="cpu", dtype="float32")
EMBEDDINGS = "bert.embeddings.word_embeddings.weight"


def texts(count: int = 40) -> dict[str, Examples]:
    return {
        task: tiny_examples("bert", count, labels, seed)
        for seed, (task, labels) in enumerate(LABELS.items())
    }


def features(seed: int, rows: int = 60) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(rows, 5))


def random_head() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(9)
    return rng.normal(size=(3, 5)), rng.normal(size=3)


def test_the_error_of_own_heads_is_the_share_of_the_variance_that_they_miss() -> None:
    own, merged, (weight, bias) = features(0), features(1), random_head()
    wanted, answers = own @ weight.T + bias, merged @ weight.T + bias
    expected = ((answers - wanted) ** 2).mean() / wanted.var(0).mean()
    assert auto.error(own, merged, weight, bias, "own") == pytest.approx(expected)
    assert auto.error(own, own, weight, bias, "own") == 0
    same = np.ones((6, 5))  # answers that do not vary
    assert auto.error(same, same, weight, None) == auto.error(same, same, weight, None, "own") == 0


def test_refitted_heads_are_measured_on_texts_that_they_were_not_fitted_to() -> None:
    own, (weight, bias) = features(0), random_head()
    turned = own @ np.random.default_rng(2).normal(size=(5, 5)) + 1  # nothing is lost
    assert (
        auto.error(own, turned, weight, bias) < 1e-4 < auto.error(own, turned, weight, bias, "own")
    )
    unrelated = auto.error(own, features(1), weight, bias)
    assert unrelated > 0.9, "as bad as no answer"
    squares = []
    for fitted, others in (
        (slice(0, None, 2), slice(1, None, 2)),
        (slice(1, None, 2), slice(0, None, 2)),
    ):
        new, shift, fit = heads.refit(own[fitted], features(1)[fitted], weight, bias)
        assert shift is not None
        assert fit.texts == 30
        misses = features(1)[others] @ new.T + shift - (own[others] @ weight.T + bias)
        squares.append((misses**2).mean())
    assert unrelated == pytest.approx(np.mean(squares) / (own @ weight.T).var(0).mean())


def test_the_lowest_point_of_a_parabola_is_found_near_the_scales() -> None:
    def at(scales: list[float], vertex: float, sign: int = 1) -> dict[float, float]:
        return {scale: sign * (scale - vertex) ** 2 + 3 for scale in scales}

    assert auto.lowest(at([1.0, 1.2, 1.45], 1.31)) == pytest.approx(1.31)
    assert auto.lowest(at([1.0, 1.2, 1.45, 1.5], 9)) == pytest.approx(1.25 * 1.5)
    assert auto.lowest(at([1.0, 1.2, 1.45], 0)) == pytest.approx(0.8)
    assert auto.lowest(at([1.0, 1.2, 1.45], 1.1, -1)) == 1.45, "no lowest point: the best scale"


def test_where_experts_are_equal_the_average_is_taken(tmp_path: Path) -> None:
    base = save(tiny_model("bert", 2, 9), tmp_path / "base")
    expert = save(tiny_model("bert", 2, 3), tmp_path / "expert")
    experts = dict.fromkeys(LABELS, expert)
    examples = {task: tiny_examples("bert", 40, 2, seed) for seed, task in enumerate(LABELS)}
    statistics = Statistics(node_fisher(experts))
    choice = auto.choose(experts, examples, SETTINGS, base=base, statistics=statistics).auto
    assert (choice.chosen.method, choice.chosen.scale) == ("average", 1)
    assert choice.chosen is choice.candidates[0]
    assert choice.chosen.error < 1e-9


@pytest.mark.parametrize("kind", ["refitted", "own"])
def test_where_averaging_only_shrinks_what_experts_learned_a_larger_scale_is_taken(
    kind: str, tmp_path: Path
) -> None:
    """Each expert changed the words of its own texts, so that twice the average is both experts."""
    origin = tiny_model("bert", 2, 9)
    base, experts, examples = save(origin, tmp_path / "base"), {}, {}
    for number, task in enumerate(("mrpc", "sst2")):
        experts[task] = save(tiny_model("bert", 2, 9), tmp_path / task)
        file = experts[task] / "model.safetensors"
        tensors, own = load_file(file), slice(3 + 10 * number, 13 + 10 * number)
        shape = tensors[EMBEDDINGS][own].shape
        tensors[EMBEDDINGS][own] += torch.randn(shape, generator=torch.Generator().manual_seed(1))
        save_file(tensors, file, {"format": "pt"})
        rng = np.random.default_rng(number)
        ids = [rng.integers(own.start, own.stop, 6).tolist() for _ in range(60)]
        examples[task] = Examples({"input_ids": ids}, np.zeros(60, np.int64), {"input_ids": 0})
    settings = SETTINGS.model_copy(update={"auto_heads": kind})
    choice = auto.choose(experts, examples, settings, base=base).auto
    assert choice.chosen.scale > 1.4
    assert choice.chosen.error < 0.5 * choice.candidates[0].error
    assert set(choice.chosen.tasks) == set(experts)
    assert choice.chosen.error == pytest.approx(np.mean(list(choice.chosen.tasks.values())))
    assert f"error {choice.chosen.error:.3g}" in choice.in_words
    assert "on 60 texts a task" in choice.in_words


def measured(out: Path, experts: Mapping[str, Path], examples: Mapping[str, Examples]) -> float:
    """The error of a merged model as it was written, under the experts' own poolers."""
    errors = []
    for task, folder in experts.items():
        expert, merged = load(folder), load(out / "tasks" / task)
        merged.base_model.pooler.load_state_dict(expert.base_model.pooler.state_dict())
        own, read = (
            heads.features(each, examples[task], device="cpu", dtype="float32")
            for each in (expert, merged)
        )
        errors.append(auto.error(own, read, *heads.last_map(expert)))
    return float(np.mean(errors))


def test_what_is_tried_depends_on_what_there_is_and_is_what_would_be_written(
    tmp_path: Path,
) -> None:
    experts, base = checkpoints(tmp_path), save(tiny_model("bert", 2, 9), tmp_path / "base")
    fisher, gram, examples = node_fisher(experts), grams(experts, tmp_path), texts()

    def tried(base: Path | None, statistics: Statistics) -> Auto:
        done: list[tuple[int, int]] = []
        choice, encoder = auto.choose(
            experts, examples, SETTINGS, base=base, statistics=statistics,
            progress=lambda number, total: done.append((number, total)),
        )  # fmt: skip
        settings = choice.applied(SETTINGS)
        for name, tensor in model.in_memory(experts, settings, base, statistics).items():
            torch.testing.assert_close(encoder[name], tensor, rtol=1e-5, atol=1e-6)
        assert [number for number, _ in done] == list(range(1, len(choice.candidates) + 1))
        assert choice.chosen.error == min(each.error for each in choice.candidates)
        return choice

    def methods(choice: Auto) -> list[str]:
        return list(dict.fromkeys(each.method for each in choice.candidates))

    alone, weighed = tried(None, Statistics()), tried(None, Statistics(fisher))
    assert methods(alone) == ["average"]
    assert methods(weighed) == ["average", "mask-fisher"]
    assert {each.scale for each in weighed.candidates} == {1}
    assert methods(tried(None, Statistics(grams=gram))) == ["average", "regmean"]
    full = tried(base, Statistics(fisher, gram))
    weighted = ["average", "mask-fisher", "regmean", "fisher-regmean", "fisher-tsv-m"]
    assert methods(full) == weighted
    assert methods(tried(base, Statistics())) == ["average", "tsv-m"]
    scales = [each.scale for each in full.candidates if each.method == full.chosen.method]
    number = model.effective_number_of(experts, base)
    assert set(np.round(number ** np.array(auto.GROWTHS), 3)) <= set(scales)
    assert len(scales) == len(set(scales))
    statistics = Statistics(fisher, gram)
    model.write_model(
        tmp_path / "out", experts, full.applied(SETTINGS), base=base, statistics=statistics
    )
    assert measured(tmp_path / "out", experts, examples) == pytest.approx(full.chosen.error, 1e-3)


def test_a_task_without_texts_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="mnli: method auto needs two training texts of it"):
        auto.choose(checkpoints(tmp_path), texts(1), SETTINGS)
