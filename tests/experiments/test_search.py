"""Search of coefficients: equal ones first, and resumed as if never interrupted."""

import math
from collections.abc import Mapping
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fmn.errors import UserError
from fmn.experiments import search
from fmn.experiments.files import Trial

NAMES = ("cola", "mrpc", "sst2")


def hill(weights: Mapping[str, float], scale: float) -> dict[str, float]:
    """Scores that are best where cola's coefficient is nine times mrpc's, and the scale is 1.5."""
    distance = (math.log(weights["cola"] / weights["mrpc"]) - math.log(9)) ** 2 + (scale - 1.5) ** 2
    return dict.fromkeys(weights, 1 - distance / 100)


def run(file: Path, trials: int = 14, seed: int = 0, attempt: search.Attempt = hill) -> list[Trial]:
    return search.search(
        attempt, NAMES, (0.5, 3.0), trials=trials, seed=seed, file=file, name="study"
    )


@given(st.lists(st.floats(1 / search.RATIO, search.RATIO), max_size=5))
def test_coefficients_have_the_given_ratios_and_sum_to_their_number(ratios: list[float]) -> None:
    tasks = [f"task{number}" for number in range(len(ratios) + 1)]
    values = search.coefficients(tasks, ratios)
    assert sum(values.values()) == pytest.approx(len(tasks))
    assert [values[task] / values["task0"] for task in tasks[1:]] == pytest.approx(ratios)


@pytest.mark.parametrize(
    ("ends", "nearest"), [((0.5, 3.0), 1.2), ((1.5, 3.0), 1.5), ((0.0, 0.5), 0.5), (None, 1.2)]
)
def test_equal_coefficients_come_first(
    tmp_path: Path, ends: tuple[float, float] | None, nearest: float
) -> None:
    (trial,) = search.search(
        hill, NAMES, ends, scale=1.2, trials=1, seed=0, file=tmp_path / "new" / "a?%b", name="study"
    )
    assert trial.coefficients == dict.fromkeys(NAMES, 1.0)
    assert trial.scale == nearest
    assert (tmp_path / "new" / "a?%b").is_file()


def test_it_finds_better_ones_and_repeats_exactly_with_the_seed(tmp_path: Path) -> None:
    trials = run(tmp_path / "a", 30)
    best = max(trials, key=lambda trial: trial.score)
    assert 1 - best.score < 0.2 * (1 - trials[0].score)
    assert best.coefficients["cola"] > 3 * best.coefficients["mrpc"]
    assert run(tmp_path / "b") == trials[:14]
    assert run(tmp_path / "c", seed=1)[1:] != trials[1:14]


def test_a_smaller_budget_is_the_beginning_of_a_larger_one(tmp_path: Path) -> None:
    few = run(tmp_path / "trials", 7)
    more = run(tmp_path / "trials")
    assert more[:7] == few
    assert more == run(tmp_path / "unbroken")
    assert run(tmp_path / "trials", 3) == few[:3]


@pytest.mark.parametrize(("done", "is_killed"), [(0, False), (0, True), (11, False), (11, True)])
def test_an_interrupted_search_goes_on_as_if_it_never_was(
    tmp_path: Path, done: int, is_killed: bool
) -> None:
    tried: list[float] = []

    def interrupted(weights: Mapping[str, float], scale: float) -> dict[str, float]:
        tried.append(scale)
        if len(tried) == done + 1:
            raise KeyboardInterrupt
        return hill(weights, scale)

    file = tmp_path / "trials"
    with pytest.raises(KeyboardInterrupt):
        run(file, attempt=interrupted)
    if is_killed:  # which leaves a trial that is running for ever
        search._open_study(file, "study", dict.fromkeys(["mrpc/cola", "sst2/cola"], 1.0)).ask()
    trials = run(file, attempt=interrupted)
    assert len(tried) == 15, "only the trial that was interrupted is repeated"
    assert trials == run(tmp_path / "unbroken")


<<<<<<< HEAD
def test_a_file_of_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "trials").write_text("years of work")
    with pytest.raises(UserError, match="not a file of trials; remove it"):
        run(tmp_path / "trials", 4)
    assert (tmp_path / "trials").read_text() == "years of work"
=======
def test_a_damaged_journal_is_begun_anew(tmp_path: Path) -> None:
    (tmp_path / "trials").write_text("not a journal\n")
    assert run(tmp_path / "trials", 4) == run(tmp_path / "sound", 4)


@pytest.fixture(scope="module", autouse=True)
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    patch = pytest.MonkeyPatch()
    patch.setenv(
        "MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path_factory.mktemp('store') / 'mlflow.db'}"
    )
    yield registry.tracking_uri()
    patch.undo()


def stage(
    work: Path,
    out: Path,
    merging: MergeSettings | None = None,
    settings: SearchSettings = SEARCH,
    tasks: tuple[str, ...] = TASKS,
    progress: Progress | None = None,
) -> Outcome:
    return experiments_stages.search(
        {task: work / "experts" / task for task in tasks},
        {task: work / "fisher" / f"{task}.parquet" for task in tasks},
        {},
        work / "base",
        work / "data",
        out,
        merging or MergeSettings(),
        settings,
        progress,
    )


def merge(
    work: Path, out: Path, file: Path, settings: MergeSettings | None = None
) -> dict[str, Any]:
    tasks = json.loads(file.read_text())["coefficients"]
    merge_stages.merge(
        experts={task: work / "experts" / task for task in tasks},
        fisher={task: work / "fisher" / f"{task}.parquet" for task in tasks},
        base=work / "base",
        out=out,
        settings=settings or MergeSettings(),
        coefficients=file,
    )
    return recipe.read_recipe(out).model_dump(mode="json", by_alias=True)


@pytest.mark.parametrize(
    ("merging", "ends"),
    [
        (MergeSettings(), None),
        (MergeSettings(method="average"), (0.5, 2.0)),
        (MergeSettings(method="task-arithmetic"), (0.2, 1.2)),
        (MergeSettings(method="ties", scale=1.5), None),
    ],
    ids=lambda value: value.method if isinstance(value, MergeSettings) else "",
)
def test_a_merge_takes_what_was_found(
    tiny_work: Path, tmp_path: Path, merging: MergeSettings, ends: tuple[float, float] | None
) -> None:
    out = tmp_path / "coefficients.json"
    settings = SearchSettings(trials=4, rows=24, device="cpu", scale_range=ends)
    found = stage(tiny_work, out, merging, settings).summary
    assert found["score"] >= found["uniform"] == found["trials"][0]["score"]
    assert found["score"] == max(trial["score"] for trial in found["trials"])
    assert sum(found["coefficients"].values()) == pytest.approx(len(TASKS))
    assert [entry["found"] for entry in found["tasks"].values()] != [0.0] * len(TASKS)
    without = MergeSettings(**merging.model_dump(exclude={"scale"}))
    made = merge(tiny_work, tmp_path / "merged", out, without)
    assert made["coefficients"] == found["coefficients"]
    assert made["scale"] == found["scale"]
    if (
        ends is None
    ):  # as it was asked for, or the method's own, which a merge without coefficients takes too
        experts = {task: tiny_work / "experts" / task for task in TASKS}
        files = {task: tiny_work / "fisher" / f"{task}.parquet" for task in TASKS}
        plain = merge_stages.merge(
            experts=experts,
            fisher=files,
            base=tiny_work / "base",
            out=tmp_path / "plain",
            settings=merging,
        )
        assert found["scale"] == plain.summary.scale > 1
    assert made["search"] == {
        "digest": artifacts.digest_file(out), "score": found["score"], "uniform": found["uniform"]
    }  # fmt: skip


def test_a_second_search_computes_nothing_and_a_larger_budget_goes_on(
    tiny_work: Path, tmp_path: Path, store: str
) -> None:
    out, done = tmp_path / "coefficients.json", []
    settings = SearchSettings(trials=3, rows=16, device="cpu", experiment="budget")
    assert stage(tiny_work, out, settings=settings, tasks=TASKS[:2]).computed
    assert not stage(tiny_work, out, settings=settings, tasks=TASKS[:2]).computed
    before = json.loads(out.read_text())
    more = settings.model_copy(update={"trials": 5})
    outcome = stage(
        tiny_work,
        out,
        settings=more,
        tasks=TASKS[:2],
        progress=lambda number, total: done.append((number, total)),
    )
    assert done == [(3, 5), (4, 5), (5, 5)]
    assert outcome.summary["trials"][:3] == before["trials"]

    import mlflow

    client = mlflow.MlflowClient(store)
    place = client.get_experiment_by_name("budget")
    assert place is not None
    runs = client.search_runs([place.experiment_id])
    parents = [run for run in runs if "mlflow.parentRunId" not in run.data.tags]
    nested = {run.info.run_name: run.data.metrics for run in runs if run not in parents}
    assert len(parents) == 1
    assert parents[0].data.metrics["score"] == outcome.summary["score"]
    assert parents[0].data.params["method"] == "mask-fisher"
    assert len(client.get_metric_history(parents[0].info.run_id, "score")) == 5
    assert len(runs) == 6
    for number, trial in enumerate(outcome.summary["trials"]):
        assert nested[f"trial {number}"]["score"] == trial["score"]
        assert nested[f"trial {number}"]["coefficient.sst2"] == trial["coefficients"]["sst2"]


def test_validation_data_is_not_read(tiny_work: Path, tmp_path: Path) -> None:
    work = Path(shutil.copytree(tiny_work, tmp_path / "work"))
    for file in (work / "data").rglob("validation*"):
        file.unlink()
    assert stage(
        work,
        tmp_path / "coefficients.json",
        settings=SearchSettings(trials=1, rows=8, device="cpu"),
    ).computed


def test_an_expert_that_scores_nothing_is_named(tiny_work: Path, tmp_path: Path) -> None:
    settings = SearchSettings(
        trials=1, rows=1, device="cpu"
    )  # the correlation of a single row is zero
    with pytest.raises(UserError, match=r"expert \w+: scores 0\.000 on 1 rows"):
        stage(tiny_work, tmp_path / "coefficients.json", settings=settings)
    assert not (tmp_path / "coefficients.json").exists()


def test_what_belongs_to_another_merge_is_refused(tiny_work: Path, tmp_path: Path) -> None:
    file = tmp_path / "coefficients.json"
    stage(tiny_work, file, settings=SearchSettings(trials=1, rows=8, device="cpu"), tasks=TASKS[:2])

    def refused(
        says: str, tasks: tuple[str, ...] = TASKS[:2], coefficients: Path = file, **settings: Any
    ) -> None:
        experts = {task: tiny_work / "experts" / task for task in tasks}
        fisher = {task: tiny_work / "fisher" / f"{task}.parquet" for task in tasks}
        with pytest.raises(UserError, match=says):
            merge_stages.merge(experts=experts, fisher=fisher, base=tiny_work / "base", out=tmp_path / "merged", settings=MergeSettings(**settings), coefficients=coefficients)  # fmt: skip
        assert not (tmp_path / "merged").exists()

    refused("other experts than these", TASKS)
    refused("other experts than these", (TASKS[0], TASKS[2]))
    refused("another mapping", mapping="paper")
    refused("another method", method="average")
    refused("leave out --coefficient and --scale", coefficient=["sst2=2"])
    refused("leave out --coefficient and --scale", scale=2.0)
    refused("no such file", coefficients=tmp_path / "nowhere.json")
    artifacts.write_json(tmp_path / "other.json", "evaluate", "key", {"score": 1.0})
    refused("`fmn search` makes coefficients", coefficients=tmp_path / "other.json")
    edited = json.loads(file.read_text()) | {"scale": 2.0}
    (tmp_path / "edited.json").write_text(json.dumps(edited))
    refused("not what was written", coefficients=tmp_path / "edited.json")


@pytest.mark.parametrize(
    ("merging", "settings", "tasks", "says"),
    [
        (
            MergeSettings(coefficient=["sst2=2"]),
            SEARCH,
            TASKS,
            "--coefficient: the search is to find it",
        ),
        (
            MergeSettings(scale=2),
            SearchSettings(scale_range=(1, 2)),
            TASKS,
            "--scale: the search is to find it",
        ),
        (MergeSettings(), SEARCH, TASKS[:1], "one expert"),
    ],
)
def test_what_cannot_be_searched_is_said(
    tiny_work: Path,
    tmp_path: Path,
    merging: MergeSettings,
    settings: SearchSettings,
    tasks: tuple[str, ...],
    says: str,
) -> None:
    with pytest.raises(UserError, match=says):
        stage(tiny_work, tmp_path / "coefficients.json", merging, settings, tasks)
    assert not list(tmp_path.iterdir())


def test_the_command_prints_a_table_and_feeds_merge(
    tiny_work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, merged = tmp_path / "coefficients.json", tmp_path / "merged"
    wholes = [
        "--expert",
        tiny_work / "experts",
        "--fisher",
        tiny_work / "fisher",
        "--base",
        tiny_work / "base",
    ]
    asked = [
        "--trials",
        2,
        "--rows",
        8,
        "--search_seed",
        3,
        "--scale_range",
        0.5,
        2,
        "--device",
        "cpu",
    ]
    command = [
        "search",
        *wholes,
        "--tasks",
        *TASKS[:2],
        "--data",
        tiny_work / "data",
        "--out",
        out,
        *asked,
    ]
    cli.main([str(argument) for argument in command])
    said = capsys.readouterr().out
    for word in (*TASKS[:2], "coefficient", "uniform", "found", "mean", "scale:"):
        assert word in said
    assert "stsb" not in said
    command = [
        "merge",
        *wholes,
        "--tasks",
        *TASKS[:2],
        "--coefficients",
        out,
        "--out",
        merged,
        "--json",
    ]
    cli.main([str(argument) for argument in command])
    assert (
        json.loads(capsys.readouterr().out)["coefficients"]
        == json.loads(out.read_text())["coefficients"]
    )


KILLED = """
import sys
from pathlib import Path
from tests.experiments.test_search import SEARCH, stage
stage(Path(sys.argv[1]), Path(sys.argv[2]), progress=lambda done, total: print(done, flush=True))
"""


@pytest.mark.slow
def test_a_killed_search_gives_the_bytes_of_an_unbroken_one(
    tiny_work: Path, tmp_path: Path
) -> None:
    killed, unbroken = tmp_path / "killed.json", tmp_path / "unbroken.json"
    environment = {**os.environ, "PYTHONPATH": str(Path(search.__file__).parents[2])}
    command = [sys.executable, "-c", KILLED, str(tiny_work), str(killed)]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        while int(next(process.stdout)) < 2:
            pass
        process.kill()
    assert not killed.exists()
    reported: list[int] = []
    stage(tiny_work, killed, progress=lambda done, total: reported.append(done))
    assert 2 <= reported[0] < SEARCH.trials
    stage(tiny_work, unbroken)
    assert killed.read_bytes() == unbroken.read_bytes()
>>>>>>> room-merge
