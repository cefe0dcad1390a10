"""The stages merge and realign: what they write, when they compute again, what they refuse."""

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from fmn.cli import main
from fmn.errors import UserError
from fmn.evaluate.stages import evaluate
from fmn.fisher import files
from fmn.fisher.stages import fisher
from fmn.merge import heads, model, stages, stream
from fmn.merge.inputs import plan_merge
from fmn.merge.methods import METHODS
from fmn.merge.recipe import Recipe, SearchedCoefficients, read_recipe
from fmn.merge.stages import (
    CalibrateSettings,
    MergeSettings,
    RealignSettings,
    calibrate,
    merge,
    realign,
)
from fmn.models import loading
from fmn.models.provenance import rows_tuned_on
from fmn.sources.stages import fetch
from fmn.store import artifacts
from fmn.store.stage import Outcome, check_intact, read_sidecar, sidecar_path, write_record
from fmn.tasks.dataset import read_split
from fmn.tasks.task import get_task, load_task
from tests.conftest import FISHER, TASKS

AVERAGE = MergeSettings(method="average")
SETTINGS = RealignSettings(texts=40, device="cpu", dtype="float32")
CALIBRATE = CalibrateSettings(texts=40, device="cpu", dtype="float32")


@pytest.fixture
def work(tiny_work: Path, tmp_path: Path) -> Path:
    """A copy of the tiny work folder that a test may change."""
    return Path(shutil.copytree(tiny_work, tmp_path / "work"))


def experts(work: Path) -> dict[str, Path]:
    return {name: work / "experts" / name for name in TASKS}


def merged(work: Path, settings: MergeSettings = AVERAGE, **options: Any) -> Outcome[Recipe]:
    arguments: dict[str, Any] = {
        "experts": experts(work),
        "fisher": {name: work / "fisher" / f"{name}.parquet" for name in TASKS},
        "base": work / "base",
        "out": work / "merged",
    }
    return merge(**{**arguments, **options}, settings=settings)


def realigned(work: Path, settings: RealignSettings = SETTINGS) -> Outcome[Recipe]:
    arguments: dict[str, Any] = {"experts": experts(work), "data": work / "data"}
    return realign(work / "merged", **arguments, out=work / "realigned", settings=settings)


def drop_labels(work: Path) -> None:
    """Remove the labels from all training rows."""
    for name in TASKS:
        table = read_split(work / "data", get_task(name), "train").drop_columns(["label"])
        pq.write_table(table, work / "data" / name / "train.parquet")


def restated(work: Path, **changes: Any) -> None:
    """Let sst2's Fisher information say that it is of a task with these entries."""
    file = work / "fisher" / "sst2.parquet"
    values, stderr, metadata = files.read_fisher(file)
    assert metadata.definition
    definition = metadata.definition.model_copy(update=changes)
    sidecar_path(file).unlink(missing_ok=True)
    files.write_fisher(file, values, stderr, metadata.model_copy(update={"definition": definition}))


def test_statistics_of_another_task_are_refused_or_told(work: Path) -> None:
    restated(work, labels=("positive", "negative"))  # the mask Fisher does not depend on the order
    (note,) = merged(work, MergeSettings()).summary.notes
    assert note.endswith("are positive, negative, the expert's are negative, positive: by name")
    restated(work, max_length=16)
    _, note = merged(work, MergeSettings()).summary.notes
    words = "of texts of at most 16 tokens, the expert's task has 128"
    assert note == f"sst2: its statistics are {words}"
    restated(work, labels=("bad", "good"))
    problem = (
        "sst2: its statistics are of the labels bad, good, its expert is of negative, positive;"
    )
    with pytest.raises(UserError, match=f"^{problem}"):
        merged(work, MergeSettings())


def test_experts_of_another_base_and_one_expert_twice(
    work: Path, tiny_base: Path, tmp_path: Path
) -> None:
    """The same wherever the merge is computed: by the command, or in a pipeline by `fetch`."""
    other = Path(shutil.copytree(tiny_base, tmp_path / "other"))
    noise = torch.Generator().manual_seed(7)
    tensors = load_file(other / "model.safetensors")
    tensors = {name: torch.randn(t.shape, generator=noise) * 0.02 for name, t in tensors.items()}
    save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        UserError, match=r"expert mrpc .* was not .* from the base .* weights is -?0\.0\d"
    ):
        merged(work, base=other)
    source = str(work / "experts" / "sst2")
    fetch(source, out=tmp_path / "good", task="sst2", base=work / "base")
    with pytest.raises(UserError, match=rf"^{source}: was not fine-tuned from the base {other}"):
        fetch(source, out=tmp_path / "bad", task="sst2", base=other)
    twice = experts(work) | {"again": tmp_path / "good"}
    (note,) = merged(work, experts=twice).summary.notes
    assert "have the same encoder, weight for weight" in note


def test_the_merged_model_says_where_it_comes_from_and_what_its_files_were(work: Path) -> None:
    recipe = merged(work, MergeSettings()).summary
    assert recipe == read_recipe(work / "merged")
    assert recipe.tasks == sorted(TASKS)
    expert, fisher = recipe.experts["mrpc"], recipe.fisher["mrpc"]
    assert expert.digest == artifacts.digest_folder(work / "experts" / "mrpc")
    assert (expert.settings["epochs"], expert.settings["examples"]) == (1, 128)
    assert recipe.base is not None
    assert recipe.base.digest == artifacts.digest_folder(work / "base")
    assert fisher.digest == artifacts.digest_file(work / "fisher" / "mrpc.parquet")
    assert (fisher.estimator, fisher.samples) == ("empirical", 32)
    assert (recipe.method, recipe.mapping) == ("mask-fisher", "structured")
    assert recipe.definitions["sst2"] == load_task(work / "data", "sst2")
    sidecar = read_sidecar(work / "merged")
    assert sidecar is not None
    assert sidecar.files == artifacts.digest_files(work / "merged")
    assert "`fmn report` writes" in (work / "merged" / "README.md").read_text()


def test_a_damaged_model_is_made_again_with_the_same_bytes(work: Path) -> None:
    merged(work)
    path = work / "merged" / "encoder" / "model.safetensors"
    before = path.read_bytes()
    path.write_bytes(before[:-1] + bytes([before[-1] ^ 1]))
    with pytest.raises(UserError, match="not what was written there"):
        check_intact(work / "merged")
    assert merged(work).computed
    assert path.read_bytes() == before
    assert not merged(work).computed


def test_a_merge_depends_only_on_what_its_method_uses(work: Path) -> None:
    assert merged(work).computed
    plain = MergeSettings(method="average", mapping="paper", seed=3)
    assert not merged(work, plain, fisher={}).computed
    assert merged(work, MergeSettings(method="average", scale=0.9)).computed
    assert merged(work, MergeSettings(mapping="paper")).computed


def _swap_fisher(work: Path) -> None:
    for suffix in (".parquet", ".parquet.fmn.json"):
        source, target = (work / "fisher" / f"{name}{suffix}" for name in ("sst2", "mrpc"))
        shutil.copyfile(source, target)


def _another_expert(work: Path) -> None:
    path = work / "experts" / "mrpc" / "model.safetensors"
    save_file({name: tensor + 1e-3 for name, tensor in load_file(path).items()}, path)
    (work / "experts" / "mrpc" / "fmn.json").unlink()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_swap_fisher, r"mrpc\.parquet: of task sst2, not mrpc"),
        (_another_expert, r"mrpc\.parquet: of another checkpoint than the expert of mrpc"),
    ],
)
def test_what_does_not_belong_together_is_not_merged(
    work: Path, change: Callable[[Path], None], message: str
) -> None:
    change(work)
    with pytest.raises(UserError, match=message):
        merged(work, MergeSettings())
    assert not (work / "merged").exists()


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ("mask-fisher", r"--fisher mrpc=FILE is missing: .* `fmn fisher` makes it"),
        ("fisher", r"--fisher mrpc=FILE is missing: .* `fmn full-fisher` makes it"),
        ("regmean", r"--gram mrpc=FILE is missing: .* `fmn gram` makes it"),
    ],
)
def test_a_statistic_that_is_missing_is_named(work: Path, method: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        merged(work, MergeSettings(method=method), fisher={})


@pytest.mark.parametrize("out", ["experts/mrpc", "fisher/mrpc.parquet", "notes"])
def test_nothing_that_is_read_or_was_not_made_here_is_replaced(work: Path, out: str) -> None:
    (work / "notes").mkdir()
    (work / "notes" / "thesis.txt").write_text("years of work")
    before = artifacts.digest_files(work)
    with pytest.raises(UserError, match="--out"):
        merged(work, MergeSettings(), out=work / out)
    assert artifacts.digest_files(work) == before


def test_coefficients_of_a_search_are_taken_for_the_merge_they_are_for(work: Path) -> None:
    digests = {name: artifacts.digest_folder(path) for name, path in experts(work).items()}
    searched = SearchedCoefficients(
        coefficients={"sst2": 0.1, "mrpc": 1 / 3, "stsb": 2.0},
        scale=0.9,
        score=0.5,
        uniform=0.4,
        experts=digests,
        merge=AVERAGE.used("coefficient", "scale"),
    )
    write_record(work / "searched.json", searched)
    recipe = merged(work, coefficients=work / "searched.json").summary
    assert (recipe.coefficients, recipe.scale) == (searched.coefficients, 0.9)
    assert recipe.search is not None
    assert recipe.search.score == 0.5
    for settings, message in (
        (MergeSettings(), "of a merge with other settings"),
        (MergeSettings(method="average", scale=1.0), "leave out --coefficient and --scale"),
    ):
        with pytest.raises(UserError, match=message):
            merged(work, settings, coefficients=work / "searched.json")
    other = searched.model_copy(update={"experts": {**digests, "sst2": "0"}})
    write_record(work / "searched.json", other)
    with pytest.raises(
        UserError, match=r"searched\.json: of other experts than these \(see sst2\)"
    ):
        merged(work, coefficients=work / "searched.json")


AUTO = MergeSettings(method="auto", device="cpu", dtype="float32")


def test_auto_takes_the_best_of_several_merges_and_says_so(work: Path) -> None:
    outcome = merged(work, AUTO, data=work / "data")
    recipe = outcome.summary
    assert recipe == read_recipe(work / "merged")
    assert recipe.auto is not None
    chosen, average = recipe.auto.chosen, recipe.auto.candidates[0]
    assert (recipe.method, recipe.scale) == (chosen.method, chosen.scale)
    assert (average.method, average.scale) == ("average", 1)
    assert chosen.error == min(each.error for each in recipe.auto.candidates) <= average.error
    assert set(chosen.tasks) == set(recipe.auto.data) == set(TASKS)
    assert bool(recipe.fisher) == (METHODS[recipe.method].fisher is not None)
    assert recipe.auto.in_words in (work / "merged" / "README.md").read_text()
    elsewhere = AUTO.model_copy(update={"device": "auto"})
    assert not merged(work, elsewhere, data=work / "data").computed
    encoder = work / "merged" / "encoder" / "model.safetensors"
    by_hand = MergeSettings(method=recipe.method, scale=recipe.scale)
    merged(work, by_hand, out=work / "by-hand")
    written = work / "by-hand" / "encoder" / "model.safetensors"
    assert encoder.read_bytes() == written.read_bytes()


def test_auto_reads_no_labels_and_depends_on_the_texts(work: Path) -> None:
    first = merged(work, AUTO, data=work / "data", fisher={}).summary.auto
    assert first is not None
    drop_labels(work)
    second = merged(work, AUTO, data=work / "data", fisher={})
    assert second.computed
    assert second.summary.auto is not None
    assert second.summary.auto.candidates == first.candidates
    assert second.summary.auto.data != first.data


def test_auto_says_what_it_lacks(work: Path) -> None:
    with pytest.raises(UserError, match="--data DIR is missing: method auto measures merges"):
        merged(work, AUTO)
    scaled = AUTO.model_copy(update={"scale": 1.2})
    with pytest.raises(UserError, match="--scale: method auto finds the scale"):
        merged(work, scaled, data=work / "data")
    fisher = {name: work / "fisher" / f"{name}.parquet" for name in TASKS[1:]}
    with pytest.raises(UserError, match="--fisher sst2=FILE is missing"):
        merged(work, AUTO, data=work / "data", fisher=fisher)


def calibrated(work: Path) -> Outcome[Recipe]:
    arguments: dict[str, Any] = {"experts": experts(work), "data": work / "data"}
    return calibrate(work / "merged", **arguments, out=work / "calibrated", settings=CALIBRATE)


def test_calibration_changes_the_maps_of_the_encoder_alone_and_labels_are_never_read(
    work: Path,
) -> None:
    merged(work)
    recipe = calibrated(work).summary
    check_intact(work / "calibrated")
    before, after = (model.read_encoder(work / name) for name in ("merged", "calibrated"))
    for name, tensor in before.items():
        assert after[name].dtype == tensor.dtype
        is_map = ".layer." in name and tensor.ndim == 2
        assert torch.equal(after[name], tensor) != is_map
    encoder = work / "calibrated" / "encoder" / "model.safetensors"
    assert encoder.samefile(work / "calibrated/tasks/sst2/model-00001-of-00002.safetensors")
    for name in TASKS:
        head = f"tasks/{name}/model-00002-of-00002.safetensors"
        assert (work / "calibrated" / head).samefile(work / "merged" / head)
        classifier = loading.load_model(work / "calibrated" / "tasks" / name)
        for key, tensor in after.items():
            assert torch.equal(classifier.base_model.state_dict()[key], tensor)
    assert recipe.calibrate is not None
    assert recipe.calibrate.merged == artifacts.digest_folder(work / "merged")
    assert recipe.calibrate.errors.keys() == set(TASKS)
    first = artifacts.digest_files(work / "calibrated" / "encoder")
    assert not calibrated(work).computed
    drop_labels(work)
    assert calibrated(work).computed
    assert artifacts.digest_files(work / "calibrated" / "encoder") == first


def test_a_model_is_calibrated_before_its_heads_are_re_aligned_and_once(work: Path) -> None:
    merged(work)
    calibrated(work)
    arguments: dict[str, Any] = {"experts": experts(work), "data": work / "data"}
    with pytest.raises(UserError, match="calibrated: it is calibrated already"):
        calibrate(work / "calibrated", **arguments, out=work / "more", settings=CALIBRATE)
    realigned(work)
    with pytest.raises(UserError, match="re-aligned already"):
        calibrate(work / "realigned", **arguments, out=work / "more", settings=CALIBRATE)
    out = realign(work / "calibrated", **arguments, out=work / "both", settings=SETTINGS).summary
    assert out.calibrate == read_recipe(work / "calibrated").calibrate
    assert out.realign is not None
    assert "calibrated" in (work / "both" / "README.md").read_text()


def test_the_last_map_of_every_head_alone_is_new_and_the_encoder_is_on_the_disk_once(
    work: Path,
) -> None:
    merged(work)
    before = artifacts.digest_files(work / "merged")
    recipe = realigned(work, SETTINGS.model_copy(update={"own_pooler": False})).summary
    assert artifacts.digest_files(work / "merged") == before
    check_intact(work / "realigned")
    after = artifacts.digest_files(work / "realigned")
    changed = {name for name in after if after[name] != before[name]}
    new = {f"tasks/{name}/model-00002-of-00002.safetensors" for name in TASKS}
    assert changed == {"merge.json", *new}
    encoder = work / "realigned" / "encoder" / "model.safetensors"
    assert encoder.samefile(work / "merged" / "encoder" / "model.safetensors")
    assert recipe.realign is not None
    assert recipe.realign.merged == artifacts.digest_folder(work / "merged")
    assert recipe.experts == read_recipe(work / "merged").experts
    assert "re-aligned" in (work / "realigned" / "README.md").read_text()
    for name in TASKS:
        old, model = (
            loading.load_model(work / folder / "tasks" / name) for folder in ("merged", "realigned")
        )
        tensors, path = model.state_dict(), heads.last_linear(old)
        differing = {
            key for key, tensor in old.state_dict().items() if not torch.equal(tensor, tensors[key])
        }
        assert differing == {f"{path}.weight", f"{path}.bias"}
        fit = recipe.realign.tasks[name]
        assert fit.after is not None
        assert (fit.texts, fit.ridge > 0, fit.after < fit.before) == (40, True, True)


@pytest.mark.parametrize("layers", [0, 1])
def test_a_task_has_its_experts_own_parts_and_a_head_that_is_fitted_above_them(
    work: Path, layers: int
) -> None:
    merged(work)
    recipe = realigned(work, SETTINGS.model_copy(update={"own_layers": layers})).summary
    check_intact(work / "realigned")
    assert recipe.realign is not None
    assert (recipe.realign.own_pooler, recipe.realign.own_layers) == (True, layers)
    own = ("pooler.", "encoder.layer.1.")[: 1 + layers]
    for name in TASKS:
        folder = work / "realigned" / "tasks" / name
        before, model, expert = (
            loading.load_model(path)
            for path in (work / "merged" / "tasks" / name, folder, work / "experts" / name)
        )
        for key, tensor in model.base_model.state_dict().items():
            origin = expert if key.startswith(own) else before
            is_calibrated = key.startswith("encoder.layer.1.") and tensor.ndim == 2 and layers
            assert torch.equal(tensor, origin.base_model.state_dict()[key]) != is_calibrated
        source = work / "experts" / name
        tuned_on = rows_tuned_on(source)
        texts = heads.unlabeled(source, get_task(name), work / "data", 40, 0, tuned_on)
        read = [
            heads.features(each, texts, device="cpu", dtype="float32") for each in (expert, model)
        ]
        weight, _, fit = heads.refit(read[0], read[1], *heads.last_map(expert))
        np.testing.assert_allclose(heads.last_map(model)[0], weight, atol=1e-6)
        assert recipe.realign.tasks[name].before == pytest.approx(fit.before, rel=1e-5)
    with pytest.raises(UserError, match=r"own_layers is 2, but .* 2 layers"):
        realigned(work, SETTINGS.model_copy(update={"own_layers": 2}))


def test_heads_are_re_aligned_again_only_when_something_they_depend_on_changed(work: Path) -> None:
    merged(work)
    assert (realigned(work).computed, realigned(work).computed) == (True, False)
    first = artifacts.digest_files(work / "realigned" / "tasks")
    drop_labels(work)
    assert realigned(work).computed
    assert artifacts.digest_files(work / "realigned" / "tasks") == first, "labels are not read"
    assert realigned(work, SETTINGS.model_copy(update={"texts": 30})).computed
    merged(work, MergeSettings(method="average", coefficient=["sst2=2"]))
    assert realigned(work).computed


def test_other_experts_than_those_that_were_merged_are_refused(work: Path) -> None:
    merged(work)
    arguments: dict[str, Any] = {"data": work / "data", "out": work / "more", "settings": SETTINGS}
    other = {**experts(work), "sst2": work / "experts" / "mrpc"}
    with pytest.raises(UserError, match=r"expert sst2: .* is not what .*merged was merged from"):
        realign(work / "merged", experts=other, **arguments)
    del other["stsb"], other["sst2"]
    with pytest.raises(UserError, match="--expert sst2=DIR is missing"):
        realign(work / "merged", experts=other, **arguments)
    realigned(work)
    with pytest.raises(UserError, match="re-aligned already"):
        realign(work / "realigned", experts=experts(work), **arguments)


def test_an_expert_with_a_token_more_goes_through_every_stage(work: Path) -> None:
    expert = work / "wide"
    loaded = loading.load_model(work / "experts" / "sst2")
    tokenizer = loading.load_tokenizer(work / "experts" / "sst2")
    tokenizer.add_tokens(["<new>"])
    loaded.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    loaded.save_pretrained(expert)
    tokenizer.save_pretrained(expert)
    shutil.copyfile(work / "experts" / "sst2" / "task.json", expert / "task.json")
    file = work / "wide.parquet"
    fisher(expert, task="sst2", data=work / "data", out=file, settings=FISHER)
    folders = experts(work) | {"sst2": expert}
    files = {name: work / "fisher" / f"{name}.parquet" for name in TASKS} | {"sst2": file}
    settings = MergeSettings(method="auto", device="cpu", dtype="float32")
    arguments: dict[str, Any] = {"experts": folders, "data": work / "data"}
    recipe = merged(work, settings, fisher=files, **arguments).summary
    (note,) = recipe.notes
    assert "mrpc lacks <new>; stsb lacks <new>" in note
    calibrate(work / "merged", **arguments, out=work / "calibrated", settings=CALIBRATE)
    realign(work / "calibrated", **arguments, out=work / "both", settings=SETTINGS)
    own = loaded.get_input_embeddings().weight[-1].detach()
    for task in TASKS:
        answering = loading.load_model(work / "both" / "tasks" / task)
        assert torch.equal(answering.get_input_embeddings().weight[-1].detach(), own)
        tokens = loading.load_tokenizer(work / "both" / "tasks" / task).get_vocab()
        assert ("<new>" in tokens) == (task == "sst2")
    metrics = evaluate(work / "both", data=work / "data", out=work / "metrics.json").summary
    assert set(metrics.tasks) == set(TASKS)


def sparse_llama(folder: Path) -> Path:
    """A Llama of 70 B in shards that are holes below their headers."""
    config = transformers.LlamaConfig(
        hidden_size=8192, num_hidden_layers=80, intermediate_size=28672, num_attention_heads=64,
        num_key_value_heads=8, vocab_size=128256, architectures=["LlamaForCausalLM"],
        pad_token_id=0, tie_word_embeddings=False,
    )  # fmt: skip
    config.save_pretrained(folder)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    specs = [
        stream.TensorSpec(name, tensor.dtype, tuple(tensor.shape))
        for name, tensor in model.state_dict().items()
    ]
    parts = stream.shards(specs)
    files = dict(zip(stream.shard_names(len(parts)), parts, strict=True))
    for name, own in files.items():
        content = stream.header(own)
        with (folder / name).open("wb") as file:
            file.write(content)
            file.truncate(len(content) + sum(spec.bytes for spec in own))
    (folder / "model.safetensors.index.json").write_text(json.dumps(stream.index(files)))
    return folder


def test_a_merge_of_70_b_is_planned_from_headers_and_refused_without_room(
    tmp_path: Path, small_disk: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    experts = {name: sparse_llama(tmp_path / name) for name in ("one", "two")}
    started = time.process_time()
    needed = stages.cost(experts, tmp_path / "out")
    plan = plan_merge(experts, MergeSettings(method="average"))
    assert needed.read == 2 * needed.written
    assert needed.written == sum(spec.bytes for spec in plan.specs) > 140e9
    options = [f"{name}={folder}" for name, folder in experts.items()]
    command = ["merge", "--method", "average", "--out", str(small_disk / "merged"), "--expert"]
    with pytest.raises(SystemExit):
        main([*command, *options])
    assert time.process_time() - started < 30  # nothing of 280 GB was read
    lines = capsys.readouterr().err
    assert "the merge reads 282.2 GB and writes 141.1 GB of 67.1 MB free; about 12 minutes" in lines
    assert "make room" in lines
    assert not (small_disk / "merged").exists()
