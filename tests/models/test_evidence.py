"""What labelled rows say of an expert's outputs."""

from collections.abc import Sequence
from itertools import permutations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fmn.models.evidence import weigh
from fmn.tasks.task import Columns, Task, get_task

SEVERAL = Task(
    name="tags",
    problem_type="multi_label_classification",
    columns=Columns(text="text"),
    labels=("a", "b", "c", "d"),
)


def classes(count: int) -> Task:
    names = tuple(f"class {number}" for number in range(count))
    return Task(name="classes", columns=Columns(text="text"), labels=names)


def outputs(
    truth: np.ndarray, accuracy: float, meanings: Sequence[int], seed: int = 0
) -> np.ndarray:
    """Logits [N, C] of a model with a share of labels right; output o means label meanings[o]."""
    random = np.random.default_rng(seed)
    answers = np.where(
        random.random(len(truth)) < accuracy, truth, random.integers(0, len(meanings), len(truth))
    )
    return np.eye(len(meanings))[answers][:, list(meanings)]  # [N, labels] to [N, outputs]


@pytest.mark.parametrize(("count", "rows"), [(2, 512), (3, 512), (7, 512), (20, 512), (77, 512)])
def test_any_order_of_any_number_of_labels_is_found(count: int, rows: int) -> None:
    random = np.random.default_rng(count)
    truth = random.integers(0, count, rows)
    meanings = random.permutation(count).tolist() if count > 2 else [1, 0]
    evidence = weigh(classes(count), outputs(truth, 0.8, meanings), truth, range(count))
    assert evidence.contradicts
    assert [meanings[output] for output in evidence.best] == list(range(count))
    assert evidence.scores[1] == pytest.approx(0.8 + 0.2 / count, abs=0.07)
    assert evidence.scores[0] < 0.5
    again = weigh(classes(count), outputs(truth, 0.8, meanings), truth, evidence.best)
    assert not again.contradicts
    assert again.scores == (evidence.scores[1],) * 2
    assert not again.is_chance


def test_two_labels_of_twenty_that_are_swapped_are_found() -> None:
    truth = np.random.default_rng(0).integers(0, 20, 512)
    meanings = [1, 0, *range(2, 20)]
    evidence = weigh(classes(20), outputs(truth, 0.8, meanings), truth, range(20))
    assert evidence.contradicts
    assert evidence.best == meanings


@given(st.permutations(range(3)), st.floats(0, 1), st.integers(0, 99))
def test_the_best_order_is_that_of_a_search_over_all(
    meanings: list[int], accuracy: float, seed: int
) -> None:
    truth = np.random.default_rng(seed).integers(0, 3, 60)
    logits = outputs(truth, accuracy, meanings, seed)
    answers = logits.argmax(axis=1)
    scores = {
        order: float((np.array(order)[truth] == answers).mean()) for order in permutations(range(3))
    }
    evidence = weigh(classes(3), logits, truth, [0, 1, 2])
    assert evidence.scores[1] == scores[tuple(evidence.best)] == max(scores.values())
    assert evidence.scores[0] == scores[0, 1, 2]
    if scores[0, 1, 2] == evidence.scores[1]:
        assert evidence.best == [0, 1, 2], "of equals, what is there stays"


def test_experts_that_are_right_are_hardly_ever_contradicted() -> None:
    for seed in range(300):
        random = np.random.default_rng(seed)
        truth = random.integers(0, 4, 100)
        logits = outputs(truth, 0.1 * random.random(), range(4), seed)  # hardly better than chance
        assert not weigh(classes(4), logits, truth, range(4)).contradicts


def test_an_order_that_is_not_clearly_better_does_not_contradict() -> None:
    truth = np.random.default_rng(0).integers(0, 2, 512)
    answers = truth.copy()
    answers[:270] = 1 - answers[:270]  # 47 % right as they stand, 53 % the other way
    evidence = weigh(get_task("sst2"), np.eye(2)[answers], truth, [0, 1])
    assert (evidence.best, evidence.contradicts, evidence.is_chance) == ([1, 0], False, True)
    assert evidence.scores == pytest.approx((242 / 512, 270 / 512))


@pytest.mark.parametrize(
    ("share", "better"), [(1.0, False), (0.0, False), (0.5, False), (0.8, True)]
)
def test_an_expert_must_beat_the_most_frequent_label(share: float, better: bool) -> None:
    truth = (np.arange(500) < 350).astype(np.int64)
    answers = np.where(np.arange(500) < 400, truth, 1 - truth)  # 80 % of the rows
    if not better:
        answers = (np.arange(500) % 10 < 10 * share).astype(np.int64)
    evidence = weigh(get_task("sst2"), np.eye(2)[answers], truth, [0, 1])
    assert evidence.is_chance is not better
    assert evidence.guess == 0.7


def test_a_constant_answer_contradicts_nothing() -> None:
    truth = (np.arange(500) < 450).astype(np.int64)
    evidence = weigh(get_task("sst2"), np.eye(2)[np.zeros(500, int)], truth, [0, 1])
    assert evidence.scores == (0.1, 0.9)
    assert (evidence.contradicts, evidence.is_chance) == (False, True)


def test_where_the_metric_says_so_a_rare_label_that_is_found_now_and_then_is_no_guess() -> None:
    truth = (np.arange(500) < 350).astype(np.int64)  # 70 % acceptable
    answers = np.where((np.arange(500) // 7) % 2 == 0, 1, truth)  # half of the others found
    answers[:80] = 0  # at the price of as many errors: 69 % right, Matthews 0.2
    assert 0.65 < (answers == truth).mean() < 0.7

    def is_chance(task: str, answers: np.ndarray) -> bool:
        return weigh(get_task(task), np.eye(2)[answers], truth, [0, 1]).is_chance

    assert not is_chance("cola", answers)
    assert is_chance("sst2", answers)
    for known in (np.ones(500, dtype=int), np.arange(500) % 2):
        assert is_chance("cola", known)


@pytest.mark.parametrize("truth", [[0], [0] * 50, [0, 1], [0, 1, 0, 1]])
def test_rows_that_could_not_tell_a_perfect_expert_from_guessing_decide_nothing(
    truth: list[int],
) -> None:
    labels = np.array(truth)
    for answers in (labels, 1 - labels):
        evidence = weigh(get_task("sst2"), np.eye(2)[answers], labels, [0, 1])
        assert not evidence.contradicts
        assert not evidence.is_chance
        assert not evidence.is_telling


def several(rows: int, noise: float, shift: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
    """Labels of some rows, a rare one among them, and logits [N, C] that know them up to noise."""
    random = np.random.default_rng(0)
    truth = (random.random((rows, 4)) < [0.3, 0.5, 0.05, 0.2]).astype(np.float32)
    return truth, 2 * truth - 1 + noise * random.normal(size=truth.shape) + shift


# An expert that is trained little gives no label a probability above one half.
@pytest.mark.parametrize("shift", [0.0, -9.0])
def test_the_order_of_several_labels_at_once_is_found_by_what_ranks_them(shift: float) -> None:
    truth, logits = several(400, 0.5, shift)
    meanings = [2, 0, 3, 1]
    evidence = weigh(SEVERAL, logits[:, meanings], truth, range(4))
    assert evidence.contradicts
    assert [meanings[output] for output in evidence.best] == [0, 1, 2, 3]
    right = weigh(SEVERAL, logits, truth, range(4))
    assert (right.contradicts, right.is_chance) == (False, False)
    # R-precision over all labels, by sorting.
    hits = sum(
        truth[np.argsort(-logits[:, label])[: int(truth[:, label].sum())], label].sum()
        for label in range(4)
    )
    assert right.scores[0] == evidence.scores[1] == pytest.approx(float(hits / truth.sum()))


def test_several_labels_at_once_may_be_at_chance_or_absent() -> None:
    truth, logits = several(400, 0.5)
    random = np.random.default_rng(1)
    for guesses in (random.normal(size=logits.shape), np.zeros_like(logits)):
        evidence = weigh(SEVERAL, guesses, truth, range(4))
        assert (evidence.contradicts, evidence.is_chance) == (False, True)
    nothing = weigh(SEVERAL, logits, np.zeros_like(truth), range(4))
    assert (nothing.contradicts, nothing.is_chance, nothing.is_telling) == (False, False, False)


@pytest.mark.parametrize(("sign", "noise"), [(1, 0.5), (-1, 0.5), (1, 1e6)])
@pytest.mark.parametrize("scale", [1, 1000])
def test_values_must_not_fall_where_the_labels_rise(sign: int, noise: float, scale: float) -> None:
    random = np.random.default_rng(0)
    truth = random.normal(size=200).astype(np.float32)
    values = scale * (sign * truth + noise * random.normal(size=200)) + 7
    evidence = weigh(get_task("stsb"), values[:, None], truth, [0])
    assert evidence.scores[0] == pytest.approx(np.corrcoef(values, truth)[0, 1])
    assert evidence.contradicts is (sign < 0)
    assert evidence.is_chance is (sign < 0 or noise > 1)


@pytest.mark.parametrize("values", [[1.0], [1.0, 2.0], [1.0] * 9])
def test_values_without_a_correlation_decide_nothing(values: list[float]) -> None:
    logits, truth = np.array(values)[:, None], np.arange(len(values), dtype=np.float32)
    for evidence in (
        weigh(get_task("stsb"), logits, truth, [0]),
        weigh(get_task("stsb"), truth[:, None], logits[:, 0], [0]),
    ):
        assert (evidence.contradicts, evidence.is_chance) == (False, False)
        assert np.isnan(evidence.scores[0])
