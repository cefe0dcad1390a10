"""The served model's own file: one encoder for all tasks, each with its tokenizer and settings."""

import base64
import io
import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import pytest
import torch
from mlflow.exceptions import MlflowException
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    AutoImageProcessor,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForSeq2SeqLM,
    AutoModelForTokenClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from fmn.fisher.architectures import mask_sites, own_parts
from fmn.models.labels import load_expert
from fmn.models.predict import complete
from fmn.registry import tracking
from fmn.tasks.task import Columns, Task, get_task, load_task
from tests.conftest import TASKS
from tests.kinds import TASKS as OF_KINDS
from tests.kinds import TEXTS as PIECES
from tests.kinds import images, merged_model
from tests.registry.conftest import Merged
from tests.tiny import CONFIGS, WORDS, tiny_model

if TYPE_CHECKING:
    from fmn.registry.served import MergedModel

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:mlflow")

DEFINITIONS = {name: get_task(name) for name in TASKS}


def load(packed: Path) -> "MergedModel":
    from fmn.registry.served import MergedModel

    model = MergedModel()
    context: Any = SimpleNamespace(artifacts={"merged": str(packed)})
    model.load_context(context)
    return model


def ask(model: "MergedModel", table: Any, task: str = "") -> pd.DataFrame:
    return model.predict(None, pd.DataFrame(table), {"task": task})  # type: ignore[arg-type]


@contextmanager
def passes(classifier: PreTrainedModel, layer: int = 0) -> Iterator[Callable[[], int]]:
    """Counts how often a layer of a model computes within the block."""
    calls: list[int] = []
    hook = inside(classifier, layer).register_forward_hook(lambda *_: calls.append(1))
    yield lambda: len(calls)
    hook.remove()


def inside(classifier: PreTrainedModel, layer: int) -> torch.nn.Module:
    """A module inside a layer, as what is shared may be the layer itself."""
    paths = [site.module for site in mask_sites(classifier) if site.site.node == "head"]
    module: torch.nn.Module = classifier.get_submodule(paths[layer])
    return module


# ---------------------------------------------------------------------------------------------
# Three tasks of one tiny BERT


@pytest.fixture(scope="session")
def packed(merged: Merged, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Not to be changed by a test."""
    out = tmp_path_factory.mktemp("served") / "packed"
    tracking.pack(merged.model, DEFINITIONS, out)
    return out


@pytest.fixture(scope="session")
def model(packed: Path) -> "MergedModel":
    return load(packed)


def test_all_tasks_share_one_encoder_and_one_tokenizer(packed: Path, model: "MergedModel") -> None:
    assert len(list(packed.rglob("model.safetensors"))) == 1
    assert len(list(packed.rglob("tokenizer.json"))) == 1
    assert sorted(model.tasks) == sorted(TASKS)
    assert len({id(task.processor) for task in model.tasks.values()}) == 1
    weights = [weight for task in model.tasks.values() for weight in task.model.parameters()]
    assert not any(weight.is_meta for weight in weights)
    assert len({id(weight) for weight in weights}) < len(weights)


def test_a_batch_is_answered_as_each_of_its_texts_alone_in_the_callers_order(
    model: "MergedModel",
) -> None:
    texts = [f"a film {'that is long ' * (n % 70)}number {n}" for n in range(140)]
    index = pd.Index([f"row {n % 100}" for n in range(140)], name="mine")
    together = ask(model, pd.DataFrame({"text": texts}, index=index), "sst2")
    pd.testing.assert_index_equal(together.index, index)
    assert list(together.columns) == ["label", "labels", "score", "probabilities"]
    for row in (0, 33, 69, 139):
        alone = ask(model, {"text": [texts[row]]}, "sst2").iloc[0]
        assert together.score.iloc[row] == pytest.approx(alone.score, abs=1e-5)
        assert together.labels.iloc[row] == [alone.label]


def test_no_texts_are_no_answers(model: "MergedModel") -> None:
    assert len(ask(model, {"text": []}, "sst2")) == 0
    assert len(ask(model, {"text": [], "text_pair": [], "task": []})) == 0
    assert list(ask(model, [], "*")) == ["row", "task", "label", "labels", "score", "probabilities"]


def same(left: pd.DataFrame, right: pd.DataFrame) -> None:
    assert left.label.tolist() == right.label.tolist()
    assert left.score.tolist() == pytest.approx(right.score.tolist(), abs=1e-6)


@pytest.mark.parametrize(
    "table",
    [
        {"text": [["a film", "the film"], ["dull", "bright"]]},
        {"text": [("a film", "the film"), np.array(["dull", "bright"])]},
        {"text": [["a film"], "dull"], "text_pair": ["the film", "bright"]},
        [{"text": ["a film", "the film"]}, {"text": "dull", "text_pair": "bright"}],
        # As MLflow passes {"text": ["a film", "dull"], "text_pair": [...]} on, in one row.
        [{"text": ["a film", "dull"], "text_pair": ["the film", "bright"]}],
    ],
)
def test_a_pair_is_two_columns_or_a_list(model: "MergedModel", table: Any) -> None:
    expected = {"text": ["a film", "dull"], "text_pair": ["the film", "bright"]}
    same(ask(model, table, "mrpc"), ask(model, expected, "mrpc"))


def test_a_dictionary_of_lists_is_a_column_of_texts_or_one_pair(model: "MergedModel") -> None:
    columns = [{"text": ["a film", "dull"]}]  # as MLflow passes {"text": ["a film", "dull"]} on
    same(ask(model, columns, "sst2"), ask(model, {"text": ["a film", "dull"]}, "sst2"))
    pair = {"text": ["a film"], "text_pair": ["dull"]}
    same(ask(model, columns, "mrpc"), ask(model, pair, "mrpc"))
    same(ask(model, [{"text": ["a film"]}], "sst2"), ask(model, {"text": ["a film"]}, "sst2"))
    with pytest.raises(MlflowException, match="lists in text, text_pair are not equally long"):
        ask(model, [{"text": ["a", "b", "c"], "text_pair": ["d"]}], "mrpc")


def test_a_task_may_stand_in_each_row(model: "MergedModel") -> None:
    table = {
        "text": ["a film", "dull", "bright"],
        "text_pair": ["the film", None, float("nan")],
        "task": ["mrpc", "sst2", None],
    }
    answers = ask(model, table, "sst2")
    assert answers.task.tolist() == ["mrpc", "sst2", "sst2"]
    same(answers[:1], ask(model, {"text": ["a film"], "text_pair": ["the film"]}, "mrpc"))
    same(answers[1:], ask(model, {"text": ["dull", "bright"]}, "sst2"))


def test_all_tasks_that_fit_answer_each_row(model: "MergedModel") -> None:
    table = pd.DataFrame({"text": ["dull", ["a", "b"], "bright"]}, index=[7, 3, 7])
    with passes(model.tasks["sst2"].model) as count:
        answers = ask(model, table, "*")
    assert count() == 2, "one for single texts, one for pairs"
    assert answers.task.tolist() == ["sst2", "mrpc", "stsb", "sst2"]
    assert (answers.row.tolist(), answers.index.tolist()) == ([0, 1, 1, 2], [7, 3, 3, 7])
    for answer in answers.to_dict("records"):
        alone = ask(model, table.iloc[[answer["row"]]], answer["task"])
        assert alone.score.iloc[0] == pytest.approx(answer["score"], abs=1e-6)
    by_column = ask(model, {"text": ["dull", "bright"], "task": ["*", "sst2"]})
    assert by_column.row.tolist() == [0, 1]


@pytest.mark.parametrize(
    ("value", "what"),
    [
        (None, "text is null"), (float("nan"), "text is null"), (pd.NA, "text is null"),
        (3, "text is a number"), (np.float32(1), "text is a number"), (True, "text is true or"),
        ({"a": "b"}, "text is an object"), (b"a", "text is bytes"), ([], "holds 0 texts"),
        (["a", "b", "c"], "holds 3 texts"), (["a", None], "text is null"),
        ([["a"]], "text is a list"),
    ],
)  # fmt: skip
def test_what_is_not_a_text_is_refused_with_its_row(
    model: "MergedModel", value: Any, what: str
) -> None:
    table = pd.DataFrame({"text": pd.Series(["fine", value], index=[4, 9], dtype=object)})
    with pytest.raises(MlflowException, match=f"^row 9: {what}.*; give") as refusal:
        ask(model, table, "sst2")
    assert refusal.value.error_code == "INVALID_PARAMETER_VALUE", "HTTP 400"
    if isinstance(value, int | dict):
        pair = pd.DataFrame({"text": ["a"], "text_pair": [value]}, index=[9])
        with pytest.raises(MlflowException, match=f"^row 9: {what.replace('text', 'text_pair')}"):
            ask(model, pair, "mrpc")


@pytest.mark.parametrize(
    ("table", "task", "problem"),
    [
        ({"text": ["a"]}, "mrpc", "row 0: task mrpc takes pairs"),
        ({"text": ["a", "b"], "text_pair": ["c", None]}, "mrpc", "row 1: task mrpc takes pairs"),
        ({"text": ["a"], "text_pair": ["b"]}, "sst2", "row 0: task sst2 takes one text"),
        ([{"text": ["a", "b"], "text_pair": "c"}], "mrpc", "row 0: holds 3 texts; give a string"),
        ({"text": ["a"]}, "rte", "task 'rte' is not one of mrpc, sst2, stsb; pass params={'task'"),
        ({"text": ["a"]}, "", "task '' is not one of mrpc, sst2, stsb"),
        ({"text": ["a"], "task": [["sst2"]]}, "", r"task \['sst2'\] is not one of"),
        ({"txt": ["a"]}, "sst2", "no column text, but txt; add it"),
    ],
)
def test_what_a_task_does_not_take_is_refused(
    model: "MergedModel", table: Any, task: str, problem: str
) -> None:
    with pytest.raises(MlflowException, match=problem) as refusal:
        ask(model, table, task)
    assert refusal.value.error_code == "INVALID_PARAMETER_VALUE", "HTTP 400"


@pytest.mark.parametrize(
    ("content", "status", "words"),
    [
        ("text,task\nnull,sst2\n1,sst2\n", 200, '"predictions"'),
        ("text,text_pair,task\na,,sst2\na,b,mrpc\n", 200, '"predictions"'),
        ("text,task\n,sst2\n", 400, "row 0: text is null, not a text"),
        ("text\ngood\n", 400, "task '' is not one of"),
        ("", 400, "no CSV with a line of column names"),
        ('text,task\n"a,sst2\n', 400, "no CSV with a line of column names"),
    ],
)
def test_the_scoring_server_takes_csv(
    packed: Path, monkeypatch: pytest.MonkeyPatch, content: str, status: int, words: str
) -> None:
    from mlflow.pyfunc import scoring_server

    monkeypatch.setattr(scoring_server, "parse_csv_input", None)
    monkeypatch.setenv("__pyfunc_model_path__", "x")
    model = load(packed)
    context: Any = None

    def predict(table: pd.DataFrame, params: Any = None) -> Any:
        return model.predict(context, table, params)

    own = SimpleNamespace(metadata=SimpleNamespace(signature=None), predict=predict)
    answer: Any = scoring_server.invocations
    if status == 200:
        assert words in answer(content, "text/csv", own, None).response
        return
    with pytest.raises(MlflowException) as refused:  # the server answers with its message
        answer(content, "text/csv", own, None)
    assert refused.value.error_code == "INVALID_PARAMETER_VALUE"  # which is a 400
    assert words in str(refused.value)


def test_requests_at_the_same_time_do_not_mix(model: "MergedModel") -> None:
    def one(number: int) -> pd.DataFrame:
        return ask(model, {"text": [f"{number} is a film " * (number % 9 + 1)] * 3}, "*")

    with ThreadPoolExecutor(8) as threads:
        together = list(threads.map(one, range(40)))
    for number, answers in enumerate(together):
        same(answers, one(number))


def test_an_encoder_in_several_files_is_served(packed: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(packed, tmp_path / "copy"))
    file = copy / "encoder" / "model.safetensors"
    tensors = load_file(file)
    file.unlink()
    names = sorted(tensors)
    for number, part in enumerate((names[:9], names[9:]), 1):
        shard = file.with_name(f"model-0000{number}-of-00002.safetensors")
        save_file({name: tensors[name] for name in part}, shard)
    same(ask(load(copy), {"text": ["a"]}, "sst2"), ask(load(packed), {"text": ["a"]}, "sst2"))
    shard.unlink()
    with pytest.raises(ValueError, match="encoder: has no"):
        load(copy)


# ---------------------------------------------------------------------------------------------
# Own tasks and other architectures

LABELS = ("red", "green", "blue")
PAIR = Columns(text="a", text_pair="b")
OWN: Mapping[str, Task] = {
    "colours": Task(name="colours", columns=Columns(text="a"), labels=LABELS),
    "tags": Task(
        name="tags", columns=Columns(text="a", label=None), labels=LABELS, threshold=0.3,
        problem_type="multi_label_classification", metrics=(),
    ),
    "short": Task(name="short", columns=Columns(text="a"), labels=LABELS, max_length=4),
    "price": Task(
        name="price", columns=PAIR, problem_type="regression", metrics=("mse",), max_length=9
    ),
}  # fmt: skip


def word_tokenizer(folder: Path, first: int = 3) -> PreTrainedTokenizerFast:
    """Write a tokenizer of the words w0, w1, ..., which have the ids `first`, ..., in turn."""
    special = {"<pad>": 0, "<s>": 1, "</s>": 2}
    count = WORDS - 3
    words = {f"w{n}": 3 + (n + first - 3) % count for n in range(count)}
    tokenizer = Tokenizer(models.WordLevel({**special, **words}, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> $B </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>",
        model_input_names=["input_ids", "attention_mask"], padding_side="left",
    )  # fmt: skip
    fast.save_pretrained(folder)
    return fast


Own = tuple["MergedModel", dict[str, PreTrainedModel], Path]


def write_tasks(merged: Path, architecture: str, layers: int | None) -> dict[str, PreTrainedModel]:
    """The tasks `OWN` on one encoder, as classifiers; None: without own parts of it."""
    classifiers: dict[str, PreTrainedModel] = {}
    encoder = tiny_model(architecture, dtype=torch.float32).base_model
    encoder.save_pretrained(merged / "encoder")
    word_tokenizer(merged / "encoder")
    shapes = {name: tuple(tensor.shape) for name, tensor in encoder.named_parameters()}
    parts = () if layers is None else own_parts(encoder.config, shapes, layers=layers)
    shared = {name: t for name, t in encoder.state_dict().items() if name not in parts}
    for number, (name, task) in enumerate(OWN.items()):
        classifier = tiny_model(architecture, task.num_outputs, number, torch.float32)
        classifier.base_model.load_state_dict(shared, strict=False)
        prefix = f"{classifier.base_model_prefix}."
        head = {n: t for n, t in classifier.state_dict().items() if not n.startswith(prefix)}
        head |= {n: t for n, t in classifier.base_model.state_dict().items() if n in parts}
        folder = merged / "tasks" / name
        classifier.config.id2label = dict(enumerate(task.labels)) or {0: "score"}
        classifier.config.save_pretrained(folder)
        save_file(head, folder / "model-00002-of-00002.safetensors")
        word_tokenizer(folder)
        classifiers[name] = classifier
    return classifiers


@pytest.fixture
def own(tmp_path: Path) -> Callable[..., Own]:
    """Serves the tasks `OWN` on an encoder: the served model, plain classifiers, the folder."""

    def make(architecture: str, layers: int | None = None) -> Own:
        classifiers = write_tasks(tmp_path / "merged", architecture, layers)
        tracking.pack(tmp_path / "merged", OWN, tmp_path / "packed")
        return load(tmp_path / "packed"), classifiers, tmp_path / "merged"

    return make


TEXTS = ["w0", "w1 w2 w3 w4 w5", "w6 w7 w8", "w9 w9 w9 w9 w9 w9 w9 w9"]


def plain_logits(
    classifier: PreTrainedModel, tokenizer: Any, task: Task, *texts: str
) -> np.ndarray:
    """What a classifier alone gives for one example, [C]."""
    inputs = tokenizer(*texts, return_tensors="pt", truncation=True, max_length=task.max_length)
    with torch.inference_mode():
        logits: np.ndarray = classifier(**inputs).logits[0].numpy()
    return logits


TEXTUAL = [name for name in CONFIGS if name != "vit"]
CHAINS = [name for name in TEXTUAL if not name.startswith(("albert", "t5"))]


@pytest.mark.parametrize(
    ("architecture", "layers"),
    [
        *((name, None) for name in TEXTUAL),
        *((name, 0) for name in ("bert", "albert")),  # which have a pooler
        *((name, 1) for name in CHAINS),
    ],
)
def test_one_pass_of_what_is_shared_gives_every_task_what_a_pass_of_its_own_would(
    architecture: str, layers: int | None, own: Callable[..., Own]
) -> None:
    served, classifiers, merged = own(architecture, layers)
    tokenizer = AutoTokenizer.from_pretrained(merged / "encoder")
    table = {"text": TEXTS, "text_pair": [None, None, None, "w1 w2 w3"]}
    with passes(classifiers["price"]) as alone:
        plain_logits(classifiers["price"], tokenizer, OWN["price"], *TEXTS[:2])
    models = [task.model for task in served.tasks.values()]
    with passes(models[0]) as first, passes(models[0], layer=-1) as last:
        answers = ask(served, table, "*")
    assert first() == 3 * alone(), "texts of 128 tokens, texts of 4, and pairs"
    if layers:
        assert len({id(inside(model, 0)) for model in models}) == 1
        assert len({id(inside(model, -1)) for model in models}) == len(models)
        assert last() == 1, "only its own task computes it"
    assert len(answers) == 3 * 3 + 1
    for answer in answers.to_dict("records"):
        name, row = answer["task"], answer["row"]
        texts = [TEXTS[row], "w1 w2 w3"][: len(OWN[name].text_columns)]
        logits = plain_logits(classifiers[name], tokenizer, OWN[name], *texts)
        if name == "price":
            assert answer["score"] == pytest.approx(logits[0], abs=1e-5)
            continue
        shares = 1 / (1 + np.exp(-logits)) if name == "tags" else np.exp(logits)
        shares = shares if name == "tags" else shares / shares.sum()
        assert list(answer["probabilities"]) == list(LABELS)
        assert list(answer["probabilities"].values()) == pytest.approx(shares, abs=1e-5)
        assert answer["score"] == pytest.approx(shares.max(), abs=1e-5)
        above = shares >= 0.3 if name == "tags" else shares == shares.max()
        expected = [label for label, is_above in zip(LABELS, above, strict=True) if is_above]
        assert answer["labels"] == expected
        assert answer["label"] == (", ".join(expected) or "none")


def test_a_shared_module_above_own_parts_computes_for_each() -> None:
    from fmn.registry.served import Memory

    module, memory = torch.nn.Linear(3, 2), Memory()
    plain = torch.nn.Linear(3, 2)
    plain.load_state_dict(module.state_dict())
    memory.share(module)
    memory.forget()
    first, second = torch.randn(4, 3), torch.randn(4, 3)
    output = module(first)
    assert module(first.clone()) is output
    torch.testing.assert_close(module(second), plain(second))
    torch.testing.assert_close(module(first), plain(first))
    output = module(first)
    memory.forget()
    assert module(first) is not output


def test_each_task_has_its_own_tokenizer_unless_it_is_the_same(
    own: Callable[[str], Own], tmp_path: Path
) -> None:
    _, classifiers, merged = own("bert")
    other = word_tokenizer(merged / "tasks" / "short", first=11)
    word_tokenizer(merged / "tasks" / "tags", first=11)
    tracking.pack(merged, OWN, tmp_path / "again")
    folders = json.loads((tmp_path / "again" / "processors.json").read_text())
    same_as = folders["tags"]
    assert folders == {
        "colours": "encoder", "tags": same_as, "short": same_as, "price": "encoder",
    }  # fmt: skip
    assert len(list((tmp_path / "again").rglob("tokenizer.json"))) == 2
    served = load(tmp_path / "again")
    for name, tokenizer in (("short", other), ("colours", word_tokenizer(tmp_path / "first"))):
        answer = ask(served, {"text": [TEXTS[1]]}, name).iloc[0]
        logits = plain_logits(classifiers[name], tokenizer, OWN[name], TEXTS[1])
        assert answer.label == LABELS[logits.argmax()]
        assert answer.score == pytest.approx(np.exp(logits.max()) / np.exp(logits).sum(), abs=1e-5)


def test_weights_of_half_precision_are_served_in_float32(
    own: Callable[[str], Own], tmp_path: Path
) -> None:
    _, classifiers, merged = own("bert")
    for file in [merged / "encoder" / "model.safetensors", *merged.glob("tasks/*/*.safetensors")]:
        save_file({n: t.bfloat16() for n, t in load_file(file).items()}, file, {"format": "pt"})
    for file in merged.rglob("config.json"):
        file.write_text(json.dumps(json.loads(file.read_text()) | {"dtype": "bfloat16"}))
    tracking.pack(merged, OWN, tmp_path / "half")
    served = load(tmp_path / "half")
    rounded = classifiers["price"].bfloat16().float()
    tokenizer = word_tokenizer(tmp_path / "tokenizer")
    logits = plain_logits(rounded, tokenizer, OWN["price"], TEXTS[0], TEXTS[1])
    table = {"text": [TEXTS[0]], "text_pair": [TEXTS[1]]}
    assert ask(served, table, "price").score[0] == pytest.approx(logits[0], abs=1e-5)


def test_a_text_without_tokens_is_refused(own: Callable[[str], Own], tmp_path: Path) -> None:
    _, _, merged = own("llama")
    for folder in (merged / "encoder", *(merged / "tasks").iterdir()):
        content = json.loads((folder / "tokenizer.json").read_text())
        (folder / "tokenizer.json").write_text(json.dumps(content | {"post_processor": None}))
    tracking.pack(merged, OWN, tmp_path / "bare")
    with pytest.raises(MlflowException, match="row 1: text is empty; give one with words"):
        ask(load(tmp_path / "bare"), {"text": ["w1", ""]}, "colours")


# ---------------------------------------------------------------------------------------------
# Other kinds of tasks


Kinds = tuple["MergedModel", Path]


def serve_kinds(folder: Path, *names: str, seed: int = 0) -> Kinds:
    """The tasks of `tests.kinds` with these names, merged: the served model, and the folder."""
    tasks = {name: OF_KINDS[name] for name in names}
    if len(tasks) == 1:
        tasks["other"] = OF_KINDS[names[0]].model_copy(update={"name": "other"})
    merged = merged_model(folder, tasks, seed)
    tracking.pack(merged, tasks, folder / "packed")
    return load(folder / "packed"), merged


@pytest.fixture(scope="module")
def berts(tmp_path_factory: pytest.TempPathFactory) -> Kinds:
    """A classifier, a tagger and an embedding model of one encoder."""
    return serve_kinds(tmp_path_factory.mktemp("berts"), "mood", "ner", "similar")


@pytest.fixture(scope="module")
def flowers(tmp_path_factory: pytest.TempPathFactory) -> Kinds:
    return serve_kinds(tmp_path_factory.mktemp("flowers"), "flowers")


def test_three_kinds_share_one_encoder(berts: Kinds) -> None:
    served, _ = berts
    models = [task.model for task in served.tasks.values()]
    assert len({id(inside(model, 0)) for model in models[:2]}) == 1
    weights = {id(weight): weight for model in models for weight in model.parameters()}
    total = sum(weight.numel() for weight in weights.values())
    first = sum(weight.numel() for weight in models[0].parameters())
    assert total < 1.1 * first
    with passes(models[0]) as count:
        answers = ask(served, {"text": PIECES}, "*")
    assert count() == 2, "one of texts, and one of texts in words"
    assert answers.task.tolist() == ["mood", "ner", "similar"] * len(PIECES)
    for name in served.tasks:
        alone = ask(served, {"text": PIECES}, name)
        together = answers[answers.task == name].reset_index(drop=True)
        for column in ("label", "labels", "score"):
            if column in alone and name != "similar":
                left, right = alone[column].tolist(), together[column].tolist()
                assert left == (pytest.approx(right, abs=1e-5) if column == "score" else right)
        if name == "similar":
            left, right = alone["embedding"].tolist(), together["embedding"].tolist()
            np.testing.assert_allclose(left, right, atol=1e-5)


def test_words_get_labels_and_labels_make_spans(berts: Kinds) -> None:
    from seqeval.metrics.sequence_labeling import get_entities

    served, merged = berts
    tokenizer = AutoTokenizer.from_pretrained(merged / "tasks" / "ner")
    tagger = AutoModelForTokenClassification.from_pretrained(merged / "tasks" / "ner").eval()
    words = [text.split() for text in PIECES]
    answers = ask(served, {"words": words}, "ner")
    by_text = ask(served, {"text": [text.replace(" ", "  ") for text in PIECES]}, "ner")
    for row, text in enumerate(words):
        lengths = [len(tokenizer(text[:n], is_split_into_words=True)[0]) for n in range(8)]
        fitting = text[: max(n for n, length in enumerate(lengths) if length <= 12)]
        inputs = tokenizer(fitting, is_split_into_words=True, return_tensors="pt")
        with torch.inference_mode():
            shares = tagger(**inputs).logits[0].softmax(-1)
        first = {word: n for n, word in reversed(list(enumerate(inputs.word_ids())))}
        ids = {word: int(shares[n].argmax()) for word, n in first.items() if word is not None}
        labels = [tagger.config.id2label[ids[n]] if n in ids else None for n in range(len(text))]
        assert answers["labels"][row] == labels == by_text["labels"][row]
        spans = answers["spans"][row]
        expected = get_entities([label or "O" for label in labels])
        assert [span["entity"] for span in spans] == [entity for entity, _, _ in expected]
        for span, doubled, (_, start, end) in zip(
            spans, by_text["spans"][row], expected, strict=True
        ):
            joined = " ".join(text)
            assert span["text"] == joined[span["start"] : span["end"]]
            assert span["text"] == " ".join(text[start : end + 1])
            assert doubled["text"] == "  ".join(text[start : end + 1])
            means = [float(shares[first[n]].max()) for n in range(start, end + 1)]
            assert span["score"] == pytest.approx(np.mean(means), abs=1e-5)
    assert None in answers["labels"][2], "a word beyond max_length has none"


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        (["O", "B-A", "I-A", "B-A", "I-B", "O", "I-B"], [[1, 2], [3], [4], [6]]),
        (["B-A", "I-A", "E-A", "S-A", "O", "S-B"], [[0, 1, 2], [3], [5]]),
        (["B-A", "L-A", "U-A", "B-A", None, "I-A"], [[0, 1], [2], [3], [5]]),
        (["A", "A", "O", "A", "B"], [[0, 1], [3], [4]]),
    ],
)
def test_spans_are_those_of_every_scheme_of_labels(
    labels: list[str | None], expected: list[list[int]]
) -> None:
    from fmn.registry.served import _groups

    assert _groups(labels, has_outside=True) == expected


def test_where_every_word_has_a_label_each_is_a_span() -> None:
    from fmn.registry.served import _groups

    assert _groups(["NOUN", "NOUN", "VERB"], has_outside=False) == [[0], [1], [2]]


def test_embeddings_are_those_of_sentence_transformers(berts: Kinds) -> None:
    from sentence_transformers import SentenceTransformer

    served, merged = berts
    plain = SentenceTransformer(str(merged / "tasks" / "similar"), device="cpu")
    expected = plain.encode(PIECES)
    np.testing.assert_allclose(
        ask(served, {"text": PIECES}, "similar")["embedding"].tolist(), expected, atol=1e-5
    )
    pairs = ask(served, {"text": PIECES, "text_pair": PIECES[::-1]}, "similar")
    assert pairs["score"].tolist() == pytest.approx((expected * expected[::-1]).sum(1), abs=1e-5)
    assert pairs["embedding"].tolist() == [None] * len(PIECES)


def as_text(image: bytes) -> str:
    return base64.b64encode(image).decode()


def test_images_are_answered_as_by_plain_transformers(flowers: Kinds) -> None:
    from PIL import Image

    served, merged = flowers
    files = images()
    forms = [as_text(files[0]), f"data:image/png;base64,{as_text(files[1])}", files[2]]
    for name in served.tasks:
        folder = merged / "tasks" / name
        plain = AutoModelForImageClassification.from_pretrained(folder).eval()
        pictures = [Image.open(io.BytesIO(file)).convert("RGB") for file in files]
        inputs = AutoImageProcessor.from_pretrained(folder)(pictures, return_tensors="pt")
        with torch.inference_mode():
            shares = plain(**inputs).logits.softmax(-1).numpy()
        answers = ask(served, {"image": forms}, name)
        answered = [list(row.values()) for row in answers["probabilities"]]
        np.testing.assert_allclose(answered, shares, atol=1e-5)
    assert ask(served, {"image": forms}, "*").task.tolist() == ["flowers", "other"] * 3
    grey, streams = (
        np.arange(400, dtype=np.uint16).reshape(20, 20) % 256,
        [io.BytesIO(), io.BytesIO()],
    )
    Image.fromarray(grey << 8).save(streams[0], format="PNG")  # of 16 bits
    Image.fromarray(grey.astype(np.uint8)).save(streams[1], format="PNG")
    deep, plain_grey = ask(served, {"image": [each.getvalue() for each in streams]}, "flowers")[
        "score"
    ]
    assert deep == plain_grey


def bomb() -> bytes:
    """A PNG of a kilobyte or two that says it has 2,500 million pixels."""
    import zlib

    data = images(1)[0]
    header = b"IHDR" + (50_000).to_bytes(4, "big") * 2 + data[24:29]
    return data[:12] + header + zlib.crc32(header).to_bytes(4, "big") + data[33:]


@pytest.mark.parametrize(
    ("image", "problem"),
    [
        ("/etc/passwd", "image is neither base64 text nor a data: URL"),
        ("https://example.org/a.png", "image is neither base64 text nor a data: URL"),
        ("data:image/png,abcd", "image is neither base64 text nor a data: URL"),
        (as_text(b"%PDF-1.7"), "image is no PNG, .* that can be read"),
        (as_text(images()[0][:200]), "image is no PNG, .* that can be read"),
        (as_text(bomb()), "image (has 50000 x 50000 pixels|is no PNG)"),
        (3, "image is a number; give the file's content"),
        (None, "image is null"),
    ],
)
def test_what_is_no_image_is_refused_with_its_row(flowers: Kinds, image: Any, problem: str) -> None:
    table = pd.DataFrame({"image": [as_text(images()[0]), image]}, dtype=object)
    with pytest.raises(MlflowException, match=f"^row 1: {problem}") as refusal:
        ask(flowers[0], table, "flowers")
    assert refusal.value.error_code == "INVALID_PARAMETER_VALUE", "HTTP 400"


@pytest.mark.parametrize(
    ("name", "auto"), [("chat", AutoModelForCausalLM), ("sums", AutoModelForSeq2SeqLM)]
)
def test_texts_are_generated_as_by_plain_transformers(name: str, auto: Any, tmp_path: Path) -> None:
    served, merged = serve_kinds(tmp_path, name, seed=36)  # which generates texts
    models = [task.model for task in served.tasks.values()]
    assert {p.data_ptr() for p in models[0].parameters()} == {
        p.data_ptr() for p in models[1].parameters()
    }
    tokenizer = AutoTokenizer.from_pretrained(merged / "tasks" / name)
    plain = auto.from_pretrained(merged / "tasks" / name).eval()
    answers = ask(served, {"text": PIECES}, name)
    for text, answer in zip(PIECES, answers["text"], strict=True):
        ids = tokenizer(text, return_tensors="pt")["input_ids"]
        ids = ids[:, :-1] if name == "chat" else ids  # without </s>
        room = 24 - (ids.shape[1] if name == "chat" else 0)
        with torch.inference_mode():
            output = plain.generate(ids, max_new_tokens=room, do_sample=False)[0]
        output = output[ids.shape[1] :] if name == "chat" else output
        assert answer == tokenizer.decode(output, skip_special_tokens=True)
    assert any(answers["text"])
    if name == "chat":  # messages of a template
        own = served.tasks[name]._replace(chat=True)
        own.processor.chat_template = "{% for m in messages %}{{ m.content }} . {% endfor %}"
        served.tasks[name] = own
        messages = json.dumps([{"role": "user", "content": text} for text in PIECES[:2]])
        prompt = tokenizer(f"{PIECES[0]} . {PIECES[1]} . ", add_special_tokens=False)["input_ids"]
        with torch.inference_mode():
            output = plain.generate(torch.tensor([prompt]), max_length=24, do_sample=False)[0]
        text = tokenizer.decode(output[len(prompt) :], skip_special_tokens=True)
        assert ask(served, {"text": [messages]}, name)["text"].tolist() == [text]
        folder = merged / "tasks" / name
        stored = load_task(folder.parent, name).model_copy(update={"chat": True})
        expert = load_expert(folder, stored, None, "cpu")
        expert.processor.chat_template = own.processor.chat_template
        assert complete(expert.model, expert.processor, stored, messages) == text
        served.tasks[name] = own._replace(chat=False)
    table = pd.DataFrame({"text": PIECES})
    params = {"task": name, "max_new_tokens": 2}
    short = served.predict(None, table, params)["text"]  # type: ignore[arg-type]
    assert [len(tokenizer(each)["input_ids"]) <= 4 for each in short] == [True] * len(PIECES)


@pytest.mark.parametrize(
    ("table", "task", "problem"),
    [
        ({"words": [["w1"]]}, "mood", "row 0: task mood takes one text"),
        ({"words": ["w1 w2"]}, "ner", "row 0: words is no list of words"),
        ({"words": [[]]}, "ner", "row 0: text is empty; give one with words"),
        ({"text": ["  "]}, "ner", "row 0: text is empty; give one with words"),
        ({"text": ["a"], "text_pair": ["b"]}, "ner", "row 0: task ner takes one text: leave out"),
        ({"text": ["a"], "words": [["a"]]}, "ner", "row 0: holds text and words; give one"),
        ({"image": ["a"]}, "ner", "there is no column text or words, but image; add it"),
    ],
)
def test_what_a_kind_does_not_take_is_refused(
    berts: Kinds, table: Any, task: str, problem: str
) -> None:
    with pytest.raises(MlflowException, match=problem) as refusal:
        ask(berts[0], table, task)
    assert refusal.value.error_code == "INVALID_PARAMETER_VALUE", "HTTP 400"
