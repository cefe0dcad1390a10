"""params.yaml: what is right is read, what is wrong is named."""

import json
import re
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from fmn import params
from fmn.errors import UserError
from fmn.models.stages import FinetuneSettings
from fmn.sources.stages import ExpertSource
from tests.conftest import ROOT

PROFILES = [ROOT / "params.yaml", *sorted((ROOT / "params").glob("*.yaml"))]
GOOD = """
base: hf://org/base
experts: {tasks: [sst2, mrpc]}
sources: {sst2: "hf://org/sst2@main"}
finetune: {mrpc: {epochs: 2}}
registry: {name: demo}
"""
TASK = "tasks: {stars: {dataset: {path: reviews.csv}, columns: {text: review, label: stars}}}\n"
DASK = "runner: dask\naddress: tcp://host:8786\nstorage: "


def load(tmp_path: Path, text: str) -> params.Params:
    path = tmp_path / "params.yaml"
    path.write_text(text)
    return params.load(path)


def comparison(entries: str) -> str:
    return f"compare: {{any: {{{entries}, methods: {{a: {{method: average}}}}}}}}\n"


@pytest.mark.parametrize("path", PROFILES, ids=lambda path: path.stem)
def test_every_shipped_profile_is_valid(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLUE_DIR", "/some/folder")
    profile = params.load(path)
    assert len(profile.experts.tasks) >= 2
    others = [params.load(other) for other in PROFILES if other != path]
    assert profile.work not in {other.work for other in others}, "no run writes over another's"
    assert profile.registry.name not in {other.registry.name for other in others}


def test_the_papers_models_have_profiles() -> None:
    models = ("bert-tiny", "bert-mini", "bert-base", "roberta-base")
    assert {f"paper-{model}" for model in models} <= {path.stem for path in PROFILES}


def test_defaults_fill_what_is_left_out(tmp_path: Path) -> None:
    profile = load(tmp_path, GOOD)
    assert profile.finetune["mrpc"] == FinetuneSettings(epochs=2)
    assert profile.fisher == params.DividedFisherSettings()
    assert profile.merge.coefficients == {}
    assert profile.runner == "local"


def test_a_cluster_is_named_by_its_address_and_a_storage(tmp_path: Path) -> None:
    profile = load(tmp_path, f"{GOOD}{DASK}s3://bucket/fmn\n")
    assert (profile.address, profile.storage) == ("tcp://host:8786", "s3://bucket/fmn")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("fisher: {estimater: batch}", "fisher.estimater: unknown setting; did you mean 'estimat"),
        ("finetune: {mrpc: {epoch: 2}}", "finetune.mrpc.epoch: unknown setting; did you mean 'ep"),
        ("runner: dask\nstorage: s3://bucket/fmn", "runner dask needs `address`"),
        ("runner: dask\naddress: tcp://host:8786", "runner dask needs `storage`"),
        (f"{DASK}/mnt/fmn", "a URL such as s3://bucket/fmn or file:///mnt/fmn"),
        ("realign: {realigned: {texts: 0}}", "at least one example"),
        ("realign: {merged: {}}", "'merged' must be realigned, or begin with realigned-"),
        ("realign: {realigned: {ridge: -1}}", "realign.realigned.ridge"),
        ("merge: {method: fisher}", "for `fmn merge` alone"),
        ("baselines: {a: {method: fisher}}", "for `fmn merge` alone"),
        ("baselines: {a: {coefficient: [rte=2]}}", "'rte' is not one of experts.tasks"),
        ("baselines: {a.b: {}}", "'a.b' must be of letters, digits, underscores and dashes"),
        *(
            (f"baselines: {{{name}: {{}}}}", f"{name!r} is another column's name")
            for name in ("base", "average", "merged", "calibrated", "realigned", "expert", "mean")
        ),
        ("baselines: {mrpc: {}}", "'mrpc' is a task and a model"),
        ("calibrate: {texts: 0}", "calibrate.texts: must be 1 or more, not 0"),
        ("merge: {coefficient: [mrpc=nan]}", "mrpc=nan: not a finite number"),
        ("merge: {coefficient: [rte=2]}", "'rte' is not one of experts.tasks"),
        ("merge: {scale: .inf}", "finite"),
        ("merge: {scale: half}", "merge.scale: must be a number or 'auto', not 'half'"),
        ("realign: {texts: 100}", "realign: holds models by name; write `realign: {realigned: "),
        ("address: tcp://host:8786", "address: is for runner dask; add `runner: dask`"),
        (comparison("sets: [sst2+rte]"), "sst2+rte"),
        (comparison("sets: [sst2]"), "'sst2' is neither one of pairs"),
        (comparison("rows: {rte: 9}"), "'rte' is not one of experts.tasks"),
        (comparison("rows: 0"), "compare.any.rows"),
        ("compare: {any: {methods: {a: {method: avarage}}}}", "did you mean 'average'"),
        ("compare: {../evil: {methods: {a: {method: average}}}}", "'../evil' must be of letters"),
        ('data: {source: "a\\0b"}', r"has the character '\x00'"),
        ("fisher: {seed: " + "9" * 30 + "}", "more than 64 bits"),
        (
            "tasks: {stars: {datasets: {}}}",
            "tasks.stars.datasets: unknown setting; did you mean 'd",
        ),
        (
            "tasks: {a: {dataset: {pth: x}}}",
            "tasks.a.dataset.pth: unknown setting; did you mean 'p",
        ),
        ("tasks: {a: {dataset: {path: x, splits: {trian: y}}}}", "did you mean 'train'?"),
        ("tasks: {a: {dataset: {name: x}}}", "tasks.a.dataset.path: missing"),
        (
            "tasks: {a: {labels: 3}}",
            "tasks.a.labels: must be a list, [A, B] or a section of settings, NAME: VALUE, not 3",
        ),
        ("tasks: {a/b: {}}", "tasks: 'a/b' must be of letters, digits, underscores and dashes"),
        ("tasks: {-a: {}}", "tasks: '-a' must be of letters"),
        ("tasks: {a.b: {}}", "tasks: 'a.b' must be of letters"),
        ("compare: {any: {methods: {a: {methd: ties}}}}", "a.methd: unknown setting; did you mean"),
        ("work: a\nwork: b", "duplicate key"),
        ("work: &a x\ndata: {source: *a}", "anchors and aliases"),
        ("work: !!python/name:os.system x", "tag"),
        ("data: " + "{a: " * 1000, "nested more than"),
        ("fisher: {seed: " + "9" * 5000 + "}", "not valid YAML"),
        ("---\nwork: x", "second document"),
    ],
)
def test_a_mistake_is_one_line_that_names_file_and_setting(
    tmp_path: Path, change: str, message: str
) -> None:
    good = GOOD.replace("finetune: {mrpc: {epochs: 2}}\n", "") if "epoch:" in change else GOOD
    with pytest.raises(UserError) as error:
        load(tmp_path, f"{good}{change}\n")
    assert message in str(error.value)
    assert "params.yaml" in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (
            "[sst2, mrpc]",
            "[sst2, mrcp]",
            "no task 'mrcp' in `tasks`, and GLUE has none; did you mean 'mrpc'; describe it under",
        ),
        ("[sst2, mrpc]", "[sst2, sst2, mrpc]", "twice"),
        ("[sst2, mrpc]", "[]", "experts.tasks: must be a list of at least 1, not"),
        ("[sst2, mrpc]", "[sst2, mrpc, rte]", "'rte' must be under either"),
        ("[sst2, mrpc]", "[sst2]", "'mrpc' is not one of experts.tasks"),
    ],
)
def test_sections_that_do_not_fit_one_another_are_refused(
    tmp_path: Path, old: str, new: str, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        load(tmp_path, GOOD.replace(old, new))


def own(text: str) -> str:
    """Settings with the expert of a task of the user's own in place of mrpc's."""
    sources = GOOD.replace("finetune: {mrpc: {epochs: 2}}\n", "").replace("mrpc", "stars")
    return sources.replace('main"}', 'main", stars: {source: ./stars, labels: [bad, good]}}') + text


def test_a_task_of_the_users_own_and_how_its_expert_is_read(tmp_path: Path) -> None:
    settings = load(tmp_path, own(TASK))
    assert settings.tasks["stars"].columns.text == "review"
    assert settings.sources["sst2"] == ExpertSource(source="hf://org/sst2@main")
    assert settings.sources["stars"].labels == ["bad", "good"]
    assert settings.labelled == ["sst2", "stars"]


UNLABELLED = TASK.replace("label: stars", "label: null")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (UNLABELLED, "estimator: empirical needs labels, which stars.*{estimator: expected}"),
        (UNLABELLED + "fisher: {estimator: batch}", "batch needs labels, which stars does not"),
        (TASK.replace("stars:", "star:"), "no task 'stars' in `tasks`.*; did you mean 'star';"),
        (TASK + "sources: {}", "duplicate key"),
    ],
)
def test_what_does_not_fit_a_task_of_the_users_own_is_refused(
    tmp_path: Path, text: str, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        load(tmp_path, own(text))


def test_a_task_without_labels_is_merged_but_neither_fine_tuned_nor_alone(tmp_path: Path) -> None:
    expected = own(UNLABELLED + "fisher: {estimator: sampled}\n")
    assert load(tmp_path, expected).labelled == ["sst2"]
    tuned = re.sub(r", stars: {source.*}}", "}\nfinetune: {stars: {}}", expected)
    with pytest.raises(
        UserError, match=r"finetune\.stars: its rows have no labels; name an expert"
    ):
        load(tmp_path, tuned)
    alone = re.sub(r'sst2: "hf.*main", ', "", expected).replace("[sst2, stars]", "[stars]")
    with pytest.raises(UserError, match=r"none of experts.tasks has labels.*`fmn merge`"):
        load(tmp_path, alone)


MISTAKES = {
    "a word for a number": (
        "fisher: {samples: many}",
        "fisher.samples: must be a whole number or 'all', not 'many'",
    ),
    "a misspelt choice": (
        "evaluate: {dtype: bfloat61}",
        "evaluate.dtype: must be one of 'auto', 'float32', 'bfloat16' or 'float64', not 'bfloat61'"
        "; did you mean 'bfloat16'?",
    ),
    "an unknown entry": (
        "calibrate:\n  texts: 9\n  ridges: 1",
        "calibrate.ridges: unknown setting; did you mean 'ridge'?",
    ),
    "a value that is too small": (
        "finetune:\n  mrpc:\n    epochs: -1",
        "finetune.mrpc.epochs: must be above 0, not -1",
    ),
    "a text for a section": (
        "evaluate: fast",
        "evaluate: must be a section of settings, NAME: VALUE, not 'fast'",
    ),
    "a task that is not merged": (
        "gram:\n  rte: {}",
        "gram.rte: 'rte' is not one of experts.tasks (sst2, mrpc)",
    ),
    "a key twice": ("fisher: {}\nfisher: {}", 'not valid YAML: found duplicate key "fisher"'),
    "an open bracket": (
        "fisher: {seed: 0\nwork: x",
        "not valid YAML: expected ',' or '}', but got ':' while parsing a flow mapping, which"
        " begins on line 6; see that brackets, quotes and indents match",
    ),
    "a truth that is none": ("fisher: {stratified: maybe}", "must be true or false, not 'maybe'"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_tells_file_line_setting_and_remedy(tmp_path: Path, name: str) -> None:
    change, message = MISTAKES[name]
    good = GOOD.replace("finetune: {mrpc: {epochs: 2}}\n", "") if "epochs" in change else GOOD
    text = good.lstrip() + change + "\n"
    with pytest.raises(UserError) as error:
        load(tmp_path, text)
    lines = text.splitlines()
    number = len(lines)  # the mistake is on the last line
    assert str(error.value).startswith(f"{tmp_path}/params.yaml:{number}: ")
    assert message in str(error.value)


def test_what_is_missing_is_described(tmp_path: Path) -> None:
    with pytest.raises(UserError) as error:
        load(tmp_path, GOOD.replace("base: hf://org/base\n", ""))
    expected = "base: missing; add it: the model that the experts were fine-tuned from"
    assert str(error.value) == f"{tmp_path}/params.yaml: {expected}"


def test_paths_are_relative_to_one_folder_wherever_a_command_is_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    project = tmp_path / "project"
    for folder in ("sub", "params", "other"):
        (project / folder).mkdir(parents=True)
    monkeypatch.chdir(project)
    assert params.project_of(Path("params.yaml")) == project
    assert params.project_of(Path("params/study.yaml")) == project
    monkeypatch.chdir(project / "sub")
    assert params.project_of(Path("../params.yaml")) == project
    assert params.project_of(Path("../params/study.yaml")) == project / "params", "no project"
    (project / "dvc.yaml").touch()
    assert params.project_of(Path("../params/study.yaml")) == project
    assert params.project_of(project / "params.yaml") == project


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3)
    ),
    max_leaves=8,
)
SECTIONS = st.sampled_from([*params.Params.model_fields, "other"])


@example({"[key]": None})  # pydantic marks names so
@example({"sources": {"[key]": {"[key]": None}, "?": ""}})
@given(st.dictionaries(SECTIONS, JSON, max_size=4) | JSON)
def test_no_content_at_all_raises_anything_but_a_user_error(content: object) -> None:
    try:
        params.validate(content, "params.yaml")
    except UserError as error:
        assert "params.yaml" in str(error)  # noqa: PT017 - either outcome is right


@pytest.mark.parametrize(
    ("rows", "expected"), [("9", [9, 9]), ("all", ["all", "all"]), ("{sst2: 9}", [9, "all"])]
)
def test_rows_of_a_comparison_are_one_number_or_one_per_task(
    tmp_path: Path, rows: str, expected: list[int | str]
) -> None:
    compare = load(tmp_path, GOOD + comparison(f"rows: {rows}")).compare["any"]
    assert [compare.rows_of(name) for name in ("sst2", "mrpc")] == expected


def test_settings_are_written_with_their_defaults_and_without_secrets(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    load(tmp_path, GOOD + "notify: {webhook: 'https://host/hook'}\n")
    out = tmp_path / "settings.json"
    write = partial(params.write_settings, tmp_path / "params.yaml", out=out)
    assert write(versions={"MERGE": 1}).computed
    assert '"estimator": "empirical"' in out.read_text()
    assert '"parts"' not in out.read_text(), "which only says how the work is divided"
    assert "https://host/hook" not in out.read_text()
    assert not params.write_settings(
        tmp_path / "params.yaml", versions={"MERGE": 1}, out=out
    ).computed


def test_written_settings_tell_each_task_and_the_digests_of_its_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    rows, out = Path("reviews.csv"), Path("settings.json")
    folder = Path("glue/sst2/train.parquet")
    folder.parent.mkdir(parents=True)

    def written() -> dict[str, Any]:
        load(tmp_path, own(TASK + "data: {source: glue}\n"))
        params.write_settings(Path("params.yaml"), versions={}, out=out)
        tasks: dict[str, Any] = json.loads(out.read_text())["tasks"]
        return tasks

    rows.write_text("review,stars\n")
    folder.write_bytes(b"rows")
    tasks = written()
    assert list(tasks) == ["sst2", "stars"]
    assert tasks["sst2"]["columns"]["text"] == "sentence"
    for name, file in (("sst2", folder), ("stars", rows)):
        assert tasks[name]["files"] == {str(file): sha256(file.read_bytes()).hexdigest()}
        file.write_bytes(file.read_bytes() + b"more")
        assert written()[name] != tasks[name]
