"""params.yaml: what is right is read, what is wrong is named."""

import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fmn import params
from fmn.errors import UserError
from fmn.fisher import stages as fisher_stages
from fmn.models import stages as models_stages

ROOT = Path(__file__).parent.parent
PROFILES = [ROOT / "params.yaml", *sorted((ROOT / "params").glob("*.yaml"))]
GOOD = """
base: hf://org/base
experts: {tasks: [sst2, mrpc]}
sources: {sst2: "hf://org/sst2@main"}
finetune: {mrpc: {epochs: 2}}
registry: {name: demo}
"""


def load(tmp_path: Path, text: str) -> params.Params:
    path = tmp_path / "params.yaml"
    path.write_text(text)
    return params.load(path)


@pytest.mark.parametrize("path", PROFILES, ids=lambda path: path.stem)
def test_every_shipped_profile_is_valid(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLUE_DIR", "/some/where")
    profile = params.load(path)
    assert len(profile.experts.tasks) >= 2
    others = [params.load(other) for other in PROFILES if other != path]
    assert profile.work not in {other.work for other in others}, (
        "profiles must not write over one another"
    )
    assert profile.registry.name not in {other.registry.name for other in others}


def test_the_paper_profiles_exist() -> None:
    names = {path.stem for path in PROFILES}
    assert {
        "minilm-glue",
        "paper-bert-tiny",
        "paper-bert-mini",
        "paper-bert-base",
        "paper-roberta-base",
    } <= names


def test_defaults_fill_what_is_not_said(tmp_path: Path) -> None:
    profile = load(tmp_path, GOOD)
    assert profile.finetune["mrpc"] == models_stages.FinetuneSettings(epochs=2)
    assert profile.fisher == fisher_stages.FisherSettings()
    assert profile.merge.coefficients == {}


def test_a_cluster_is_named_by_its_address_and_a_storage(tmp_path: Path) -> None:
    assert load(tmp_path, GOOD).runner == "local"
    profile = load(
        tmp_path, GOOD + "runner: dask\naddress: tcp://host:8786\nstorage: s3://bucket/fmn\n"
    )
    assert (profile.runner, profile.address, profile.storage) == (
        "dask",
        "tcp://host:8786",
        "s3://bucket/fmn",
    )


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (
            "fisher: {estimater: batch}",
            "fisher.estimater: unknown setting; did you mean 'estimator'",
        ),
        ("fisher: {estimator: bath}", "fisher.estimator"),
        ("fisher: {samples: 0}", "at least one example"),
        ("fishr: {}", "fishr: unknown setting; did you mean 'fisher'"),
        ("runner: desk", "runner"),
        ("runner: dask\nstorage: s3://bucket/fmn", "runner dask needs `address`"),
        ("runner: dask\naddress: tcp://host:8786", "runner dask needs `storage`"),
        (
            "runner: dask\naddress: tcp://host:8786\nstorage: /mnt/fmn",
            "a URL such as s3://bucket/fmn or file:///mnt/fmn",
        ),
        ("realign: {realigned: {texts: 0}}", "at least one example"),
        ("realign: {merged: {}}", "'merged' must be realigned, or begin with realigned-"),
        ("realign: {realigned: {ridge: -1}}", "realign.realigned.ridge"),
        ("merge: {method: mask-fischer}", "did you mean 'mask-fisher'"),
        ("merge: {coefficient: [mrpc=x]}", "'x' is not a number"),
        ("merge: {coefficient: [rte=2]}", "'rte' is not one of experts.tasks"),
        ("data: {source: $FMN_NOT_SET}", "FMN_NOT_SET is not set"),
        ("base: other", "base"),
        ("work: &a x\ndata: {source: *a}", "anchors and aliases"),
        ("work: !!python/name:os.system x", "tag"),
        ("work: a\nwork: b", "duplicate key"),
        ("data: " + "[" * 1000, "nested more than"),
        ("data: " + "{a: " * 1000, "nested more than"),
        ("fisher: {seed: " + "9" * 5000 + "}", "not valid YAML"),
        ("fisher: {seed: " + "9" * 30 + "}", "more than 64 bits"),
        ("merge: {scale: .inf}", "finite"),
        ("merge: {coefficient: [mrpc=nan]}", "'nan' is not finite"),
        ('data: {source: "a\\0b"}', "NUL character"),
        (
            "compare: {../../evil: {methods: {a: {method: average}}}}",
            "'../../evil' must be of letters",
        ),
        ("---\nwork: x", "single document"),
    ],
)
def test_a_mistake_is_one_line_that_names_file_and_setting(
    tmp_path: Path, change: str, says: str
) -> None:
    with pytest.raises(UserError) as error:
        load(tmp_path, GOOD + change + "\n")
    assert says in str(error.value)
    assert "params.yaml" in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("[sst2, mrpc]", "[sst2, mrcp]", "unknown task 'mrcp'; did you mean 'mrpc'"),
        ("[sst2, mrpc]", "[sst2, sst2, mrpc]", "twice"),
        ("[sst2, mrpc]", "[]", "names no task"),
        ("[sst2, mrpc]", "[sst2, mrpc, rte]", "'rte' must stand under either"),
        ("[sst2, mrpc]", "[sst2]", "'mrpc' is not one of experts.tasks"),
        ("registry: {name: demo}", "registry: {name: ../demo}", "registry.name"),
        ("base: hf://org/base", "", "base: missing"),
    ],
)
def test_experts_that_do_not_add_up_are_refused(
    tmp_path: Path, old: str, new: str, says: str
) -> None:
    with pytest.raises(UserError, match=says):
        load(tmp_path, GOOD.replace(old, new))


def test_a_missing_file_says_which(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"none\.yaml"):
        params.load(tmp_path / "none.yaml")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3)
    ),
    max_leaves=8,
)
SECTIONS = st.sampled_from([*params.Params.model_fields, "other"])


@given(st.dictionaries(SECTIONS, JSON, max_size=4) | JSON)
def test_no_content_at_all_raises_anything_but_a_user_error(content: object) -> None:
    try:
        params.validate(content, "params.yaml")
    except UserError as error:
        assert "params.yaml" in str(error)  # noqa: PT017 - either outcome is right


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ("merge: {method: fisher}", "for `fmn merge` alone"),
        ("merge: {method: regmean}", "add 'sst2' to `gram`"),
        ("merge: {method: fisher-regmean}\ngram: {sst2: {}}", "add 'mrpc' to `gram`"),
        ("compare: {one: {sets: [sst2+rte], methods: {a: {method: average}}}}", "sst2+rte"),
        (
            "compare: {one: {sets: [sst2], methods: {a: {method: average}}}}",
            "'sst2' is neither pairs",
        ),
        (
            "compare: {one: {rows: {rte: 9}, methods: {a: {method: average}}}}",
            "'rte' is not one of experts.tasks",
        ),
        ("compare: {one: {rows: 0, methods: {a: {method: average}}}}", "compare.one.rows"),
        ("compare: {one: {methods: {a: {method: avarage}}}}", "did you mean 'average'"),
    ],
)
def test_what_a_method_or_a_comparison_lacks_is_named(tmp_path: Path, more: str, says: str) -> None:
    with pytest.raises(UserError, match=re.escape(says)):
        load(tmp_path, GOOD + more)


def test_rows_of_a_comparison_are_one_number_or_one_a_task(tmp_path: Path) -> None:
    for rows, expected in (("9", [9, 9]), ("all", ["all", "all"]), ("{sst2: 9}", [9, "all"])):
        loaded = load(
            tmp_path,
            GOOD + f"compare: {{one: {{rows: {rows}, methods: {{a: {{method: average}}}}}}}}\n",
        )
        assert [loaded.compare["one"].rows_of(name) for name in ("sst2", "mrpc")] == expected
