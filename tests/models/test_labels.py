"""Labels in another order: read from names or a list, found in training data, always checked."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fmn.errors import UserError
from fmn.models import checkpoints, labels
from fmn.models.labels import Labels
from fmn.models.predict import predict
from fmn.tasks import dataset
from fmn.tasks.encoding import encode
from fmn.tasks.task import TASKS, Columns, Task, get_task
from tests.folders import edit_config, save, weights
from tests.models.experts import answers, expert, make_task, write_rows

MNLI = get_task("mnli")
UNLABELED = Task(
    name="own", problem_type=None, columns=Columns(text="text", label=None), metrics=()
)
TWO, THREE = make_task(["no", "yes"]), make_task(["red", "green", "blue"])


@pytest.mark.parametrize(
    ("own", "names", "order"),
    [
        ("entailment neutral contradiction", ["contradict", "entail", "neutral"], [1, 2, 0]),
        ("not_equivalent equivalent", ["not_paraphrase", "paraphrase"], [0, 1]),
        ("not_equivalent equivalent", ["Equivalent", "not equivalent"], [1, 0]),
        ("not_duplicate duplicate", ["duplicate", "not-duplicate"], [1, 0]),
        ("negative positive", ["POSITIVE", "NEG"], [1, 0]),
        ("-1 0 1", ["1.0", "-1", "0"], [1, 2, 0]),
        ("1 2 3", ["3", "2", "1"], [2, 1, 0]),
        ("C++ C C#", ["C", "C#", "C++"], [2, 0, 1]),
        ("+ -", ["-", "+"], [1, 0]),
        ("no yes", ["Yes"], [0, 1]),  # a single logit
        ("no yes", ["no"], [1, 0]),
        ("entailment neutral contradiction", ["LABEL_0", "LABEL_1", "LABEL_2"], None),
        ("entailment neutral contradiction", ["entailment", "neutral", "LABEL_2"], None),
        ("entailment neutral contradiction", ["entailment", "entail", "neutral"], None),
        ("entailment neutral contradiction", ["entailment", "neutral"], None),
        ("negative positive", ["acceptable", "unacceptable"], None),
        ("negative positive", [], None),
        ("no yes", ["LABEL_0"], None),
        ("C++ C C#", ["c", "c", "c"], None),
    ],
)
def test_names_that_mean_something_give_the_order(
    own: str, names: list[str], order: list[int] | None
) -> None:
    expected = None if order is None else Labels(order=order, origin="names")
    assert labels.by_names(make_task(own.split()), names) == expected


def test_the_tasks_own_names_mean_themselves() -> None:
    for task in TASKS.values():
        own = labels.by_names(task, task.labels or ("score",))
        assert own is not None
        assert labels.names_by_output(task, own) == list(task.labels or ("score",))


@given(st.permutations(range(3)))
def test_names_by_output_are_read_back_as_the_same_order(order: list[int]) -> None:
    names = labels.names_by_output(MNLI, Labels(order=order, origin="training data"))
    assert labels.by_names(MNLI, names) == Labels(order=order, origin="names")
    assert [names[output] for output in order] == list(MNLI.labels)


def right(folder: Path, order: Sequence[int]) -> np.ndarray:
    """Class ids [N] as an expert answers them, whose output order[label] stands for a label."""
    ids: np.ndarray = answers(folder)[:, list(order)].argmax(axis=1)
    return ids


def decide(folder: Path, task: Task, data: Path | None, names: Sequence[str] = ()) -> Labels:
    return labels.decide(folder, task, data, names=names, device="cpu")


@pytest.fixture(scope="module")
def unnamed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return expert(tmp_path_factory.mktemp("unnamed"), 3)


@pytest.fixture(scope="module")
def turned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An expert whose names say the contrary of what its outputs are."""
    return expert(tmp_path_factory.mktemp("turned"), 2, names=["no", "yes"])


def test_training_data_decide_where_nothing_is_named_and_nothing_without_them(
    unnamed: Path, tmp_path: Path
) -> None:
    data = write_rows(tmp_path / "data", THREE, right(unnamed, [1, 2, 0]))
    decided = decide(unnamed, THREE, data)
    assert (decided.order, decided.origin, decided.rows) == ([1, 2, 0], "training data", 240)
    assert decided.score == 1.0
    assert decided.notes == [
        "own: the outputs are blue, red, green: not named; 100.0% of 240 training rows are right so"
    ]
    for nowhere in (None, tmp_path):
        decided = decide(unnamed, THREE, nowhere)
        assert (decided.order, decided.origin) == ([0, 1, 2], "identity")
        assert "NOT NAMED in config.json, and no data" in decided.notes[0]


def test_names_that_contradict_the_data_stop_with_both_figures_and_the_line_that_settles_it(
    turned: Path, tmp_path: Path
) -> None:
    truth = right(turned, [1, 0])
    truth[:30] = 1 - truth[:30]
    data = write_rows(tmp_path / "data", TWO, truth)
    with pytest.raises(UserError) as caught:
        decide(turned, TWO, data)
    message = str(caught.value)
    assert message.startswith(f"own: {turned}: the names of its outputs contradict the data")
    assert "as named 12.5%, turned round 87.5% of 240 training rows" in message
    assert 'sources: {own: {source: ..., labels: ["yes", "no"]}}' in message
    assert "--labels yes no" in message
    settled = decide(turned, TWO, data, ["yes", "no"])
    assert (settled.order, settled.origin, settled.score) == ([1, 0], "settings", 0.875)
    assert settled.notes == ["own: the outputs are yes, no: as the settings say"]


def test_the_users_own_list_wins_over_the_data_with_a_warning(turned: Path, tmp_path: Path) -> None:
    data = write_rows(tmp_path / "data", TWO, right(turned, [0, 1]))
    settled = decide(turned, TWO, data, ["yes", "no"])
    assert (settled.order, settled.score) == ([1, 0], 0.0)
    assert "THE DATA CONTRADICT the list" in settled.notes[1]
    assert "as listed 0.0%, turned round 100.0% of 240 training rows" in settled.notes[1]
    with pytest.raises(UserError, match=r"labels yes, maybe: they must be the task's.*no, yes"):
        decide(turned, TWO, data, ["yes", "maybe"])


def test_names_of_another_task_stop_with_both_lists(turned: Path, tmp_path: Path) -> None:
    for task, problem in (
        (make_task(["spam", "ham"]), "named no, yes, but the task's labels are spam, ham"),
        (THREE, r"a head of 2 outputs, own needs 3 \(no, yes; not red, green, blue\)"),
    ):
        with pytest.raises(UserError, match=problem):
            decide(turned, task, None)
    # Numbers are no words that another name could contradict.
    assert decide(turned, make_task(["0", "1"]), None).origin == "identity"


@pytest.mark.parametrize("is_named", [True, False])
def test_an_expert_at_chance_is_refused_or_told(
    is_named: bool, unnamed: Path, turned: Path, tmp_path: Path
) -> None:
    folder, task = (turned, TWO) if is_named else (unnamed, THREE)
    noise = np.random.default_rng(0).integers(0, task.num_outputs, 240)
    data = write_rows(tmp_path / "data", task, noise)
    if is_named:
        assert "NO BETTER THAN CHANCE" in decide(folder, task, data).notes[0]
    else:
        with pytest.raises(UserError, match="no better than chance in any order of its labels"):
            decide(folder, task, data)


def test_rows_of_one_label_decide_nothing(unnamed: Path, tmp_path: Path) -> None:
    data = write_rows(tmp_path / "data", THREE, np.zeros(240, np.int64))
    decided = decide(unnamed, THREE, data)
    assert (decided.order, decided.origin) == ([0, 1, 2], "identity")
    assert "too few training rows to find them" in decided.notes[0]


def test_an_expert_that_fmn_aligned_is_not_run_again(turned: Path, tmp_path: Path) -> None:
    (tmp_path / "train.parquet").write_bytes(b"never read")
    with pytest.raises(UserError, match="not Parquet"):
        decide(turned, TWO, tmp_path)
    copy = expert(tmp_path / "copy", 2, names=["no", "yes"])
    labels.align(copy, TWO, None)
    assert decide(copy, TWO, tmp_path) == Labels(order=[0, 1], origin="names")


@pytest.mark.parametrize("z_means", [0, 1])
@pytest.mark.parametrize("names", [None, ["LABEL_0"], ["yes"], ["no"]])
def test_a_single_logit_becomes_two_outputs(
    z_means: int, names: list[str] | None, tmp_path: Path
) -> None:
    folder = expert(tmp_path / "expert", 1, names=names)
    z = answers(folder)[:, 0]
    truth = (z > 0).astype(np.int64) if z_means else (z < 0).astype(np.int64)
    data = write_rows(tmp_path / "data", TWO, truth)
    if names and names[0] in TWO.labels and names != [TWO.labels[z_means]]:
        with pytest.raises(UserError, match=r"as named 0\.0%, turned round 100\.0%"):
            labels.load_expert(folder, TWO, data, "cpu")
        return
    model, tokenizer, task, decided = labels.load_expert(folder, TWO, data, "cpu")
    assert decided.order == ([0, 1] if z_means else [1, 0])
    examples = encode(tokenizer, task, dataset.read_split(data, task, "train"))
    logits = predict(model, examples, device="cpu", dtype="float32")
    expected = np.stack([0 * z, z] if z_means else [z, 0 * z], axis=1)
    np.testing.assert_allclose(logits, expected, atol=1e-5)


def test_the_labels_that_a_text_has_at_once_are_found_by_what_ranks_them(tmp_path: Path) -> None:
    task = make_task(["a", "b", "c"], "multi_label_classification")
    folder = expert(tmp_path / "expert", 3, problem_type=task.problem_type)
    logits = answers(folder)
    truth = (
        logits[:, [2, 0, 1]] > np.quantile(logits, [0.7, 0.5, 0.9], axis=0).diagonal()[[2, 0, 1]]
    )
    decided = decide(folder, task, write_rows(tmp_path / "data", task, truth))
    assert (decided.order, decided.origin, decided.score) == ([2, 0, 1], "training data", 1.0)
    edit_config(folder, id2label={"0": "a", "1": "b", "2": "c"})
    with pytest.raises(UserError, match=r"as c, a, b|as b, c, a"):
        decide(folder, task, tmp_path / "data")


def test_values_that_fall_where_the_labels_rise_stop(tmp_path: Path) -> None:
    task = make_task([], "regression")
    folder = expert(tmp_path / "expert", 1)
    values = answers(folder)[:, 0]
    decided = decide(folder, task, write_rows(tmp_path / "up", task, 1000 * values))
    assert decided.score == pytest.approx(1.0)
    assert decided.notes == []
    with pytest.raises(UserError, match=r"fall where the labels rise.*240 training rows is -1\.00"):
        decide(folder, task, write_rows(tmp_path / "down", task, 7 - values))


def test_a_correlation_that_is_undefined_is_told_as_none(tmp_path: Path) -> None:
    task = make_task([], "regression")
    folder = expert(tmp_path / "expert", 1)
    values = answers(folder)[:, 0]
    flat = decide(folder, task, write_rows(tmp_path / "flat", task, 0 * values + 2))
    assert flat.score is None
    (note,) = flat.notes
    assert "NOTHING IS KNOWN of how good" in note
    assert note.endswith("the labels are all the same on 240 training rows")
    state = weights(folder)
    state["classifier.weight"] *= 0
    save(folder, state)
    (note,) = decide(folder, task, write_rows(tmp_path / "rows", task, values)).notes
    assert "its values are all the same on 240 training rows" in note


@pytest.mark.parametrize(
    ("problem_type", "outputs", "task", "problem"),
    [
        ("multi_label_classification", 2, TWO, None),
        ("multi_label_classification", 1, TWO, None),
        ("regression", 1, TWO, "expert of regression"),
        ("single_label_classification", 2, make_task(["a", "b"], "multi_label_classification"), ""),
        ("multi_label_classification", 1, make_task([], "regression"), ""),
        ("regression", 2, TWO, ""),
    ],
)
def test_another_problem_type_is_told_or_refused(
    problem_type: str, outputs: int, task: Task, problem: str | None, tmp_path: Path
) -> None:
    folder = expert(tmp_path / "expert", outputs, problem_type=problem_type)
    if problem is None:
        assert any("several labels" in note for note in decide(folder, task, None).notes) is (
            outputs > 1
        )
        return
    with pytest.raises(
        UserError, match=problem or f"expert of {problem_type}.*the task is {task.problem_type}"
    ):
        decide(folder, task, None)


@pytest.mark.parametrize(
    ("outputs", "problem_type", "names", "expected"),
    [
        (3, None, None, ("single_label_classification", ("LABEL_0", "LABEL_1", "LABEL_2"))),
        (1, None, None, ("regression", ())),
        (2, "multi_label_classification", ["a", "b"], ("multi_label_classification", ("a", "b"))),
        (1, "multi_label_classification", ["a"], ("multi_label_classification", ("a",))),
    ],
)
def test_an_expert_tells_what_rows_without_labels_do_not(
    outputs: int,
    problem_type: str | None,
    names: list[str] | None,
    expected: tuple[str, tuple[str, ...]],
    tmp_path: Path,
) -> None:
    folder = expert(tmp_path / "expert", outputs, names=names, problem_type=problem_type)
    for task in (
        labels.expert_task(folder, "own"),
        labels.load_expert(folder, UNLABELED, None).task,
    ):
        assert (task.problem_type, task.labels) == expected
        assert not task.has_labels
    config = checkpoints.load_config(folder)
    if expected[0] == "regression":  # labels of the user's say that it is no regression
        task = labels.complete(UNLABELED, config, ["no", "yes"])
        assert (task.problem_type, task.labels) == ("single_label_classification", ("no", "yes"))


def test_the_definition_in_an_experts_folder_comes_first(tmp_path: Path) -> None:
    folder = expert(tmp_path / "expert", 2, names=["no", "yes"])
    assert labels.expert_task(folder, "sst2") == get_task("sst2")
    labels.align(folder, TWO, None)
    assert labels.expert_task(folder, "own") == TWO
