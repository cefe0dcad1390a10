"""Generated texts as a model's inputs: what is labelled, and what is cut."""

import json
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from tokenizers import Tokenizer, models, processors
from transformers import PreTrainedTokenizerFast

from fmn.errors import UserError
from fmn.tasks.batches import IGNORED, by_length, pad_batch
from fmn.tasks.encoding import chat_prompt, encode
from fmn.tasks.kinds import KindName
from fmn.tasks.task import Columns, Task

LETTERS = {letter: number for number, letter in enumerate(["<pad>", "<s>", "</s>", *"abcdefgh"])}
LETTERS |= {"cd": len(LETTERS)}


def letters(single: str = "$A") -> Any:
    """A tokenizer with a token for each letter, and one for "cd"."""
    words = Tokenizer(models.BPE(LETTERS, [("c", "d")]))
    words.post_processor = processors.TemplateProcessing(
        single=single, special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )


def ids(text: str) -> list[int]:
    return [
        {"^": 1, "$": 2, "#": LETTERS["cd"]}.get(letter, LETTERS.get(letter, 0)) for letter in text
    ]


def task(
    kind: KindName = "text-generation", prompt: str | None = "prompt", size: int = 128
) -> Task:
    columns = Columns(prompt=prompt, completion="completion", label=None)
    return Task(name="own", task=kind, columns=columns, max_length=size)


def encoded(
    prompt: str, completion: str, length: int = 128, single: str = "$A"
) -> tuple[list[int], list[int]]:
    """The tokens of an example, and what its positions answer."""
    table = pa.table({"prompt": [prompt], "completion": [completion]})
    examples = encode(letters(single), task(size=length), table)
    return examples.inputs["input_ids"][0], examples.labels[0].tolist()


@pytest.mark.parametrize(
    ("prompt", "completion", "single", "tokens", "answers"),
    [
        ("ab", "ef", "$A", "abef$", ".ef$."),
        ("ab", "cdf", "$A", "ab#f$", ".#f$."),
        ("ac", "df", "$A", "acdf$", ".df$."),  # together they are "a", "cd", "f"
        ("ab", "e", "<s> $A", "^abe$", "..e$."),
        ("ab", "e", "<s> $A </s>", "^abe$", "..e$."),
        ("", "ef", "<s> $A", "^ef$", "ef$."),
        ("", "ef", "$A", "ef$", "f$."),  # nothing says what the first token is
        ("ab", "", "$A", "ab$", ".$."),
    ],
)
def test_what_is_labelled_is_the_completion_and_the_end(
    prompt: str, completion: str, single: str, tokens: str, answers: str
) -> None:
    wanted = [IGNORED if letter == "." else ids(letter)[0] for letter in answers]
    assert encoded(prompt, completion, single=single) == (ids(tokens), wanted)


TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ 'a' if m.role == 'user' else 'b' }}{{ m.content }}"
    "{{ eos_token if m.role != 'user' }}h{% endfor %}{{ 'b' if add_generation_prompt }}"
)


def test_a_chat_template_makes_prompt_and_answer() -> None:
    tokenizer = letters("<s> $A </s>")  # the template has its own
    earlier = [{"role": "user", "content": "cd"}, {"role": "assistant", "content": "e"}]
    earlier.append({"role": "user", "content": "f"})
    table = pa.table({"prompt": [json.dumps(earlier)], "completion": ["gg"]})
    chat = task().model_copy(update={"chat": True})
    with pytest.raises(UserError, match="no chat template, which messages need; add the chat_temp"):
        encode(tokenizer, chat, table)
    tokenizer.chat_template = TEMPLATE
    examples = encode(tokenizer, chat, table)
    whole = tokenizer.apply_chat_template([*earlier, {"role": "assistant", "content": "gg"}])
    assert examples.inputs["input_ids"] == [whole["input_ids"][:-1]] == [ids("^a#hbe$hafhbgg$")]
    assert examples.labels[0].tolist() == [*[IGNORED] * 11, *ids("gg$"), IGNORED]
    assert chat_prompt(tokenizer, "cd") == "<s>acdhb"
    assert chat_prompt(tokenizer, "[]") == "<s>a[]hb"
    for template, problem in (
        ("{{ raise_exception('roles must alternate') }}", "not take these messages: roles must"),
        ("{{ 'x' if add_generation_prompt else 'y' }}", "does not put an answer right behind"),
    ):
        tokenizer.chat_template = template
        with pytest.raises(UserError, match=problem):
            encode(tokenizer, chat, table)


@pytest.mark.parametrize(
    ("length", "single", "tokens", "answered"),
    [
        (6, "$A", "bcdef$", 2),  # "abcd" without its beginning; "cd" is one token
        (4, "$A", "#ef$", 3),
        (3, "$A", "#ef", 2),
        (2, "$A", "#e", 1),
        (5, "<s> $A", "^#ef$", 3),
        (4, "<s> $A", "^ef$", 3),
    ],
)
def test_a_prompt_loses_its_beginning_and_a_completion_its_end(
    length: int, single: str, tokens: str, answered: int
) -> None:
    own, labels = encoded("abcd", "ef", length, single)
    if length < 6:
        assert own == ids(tokens)
        assert sum(label != IGNORED for label in labels) == answered
    assert len(own) <= length


def test_a_decoder_reads_its_completion_shifted_by_the_start() -> None:
    tokenizer = letters("$A </s>")
    tokenizer.decoder_start_token_id = 0
    table = pa.table({"prompt": ["ab", "abe"], "completion": ["efgh", "f"]})
    examples = encode(tokenizer, task("text2text-generation"), table)
    assert examples.inputs["input_ids"] == [ids("ab$"), ids("abe$")]
    assert examples.inputs["decoder_input_ids"] == [[0, *ids("efgh")], [0, *ids("f")]]
    assert examples.labels.tolist() == [ids("efgh$"), [*ids("f$"), *[IGNORED] * 3]]
    batch = pad_batch(examples, np.array([1]))
    assert batch.inputs["decoder_attention_mask"].tolist() == [[1, 1]]
    assert batch.labels.tolist() == [ids("f$")]
    both = pad_batch(examples, np.arange(2))
    shapes = {name: tuple(value.shape) for name, value in both.inputs.items()}
    assert shapes["input_ids"] == shapes["attention_mask"] == (2, 4)
    assert shapes["decoder_input_ids"] == tuple(both.labels.shape) == (2, 5)


def test_batches_bound_the_tokens_of_encoder_and_decoder_together() -> None:
    tokenizer, random = letters("$A </s>"), np.random.default_rng(0)
    tokenizer.decoder_start_token_id = 0
    texts = ["a" * int(count) for count in random.integers(1, 60, 200)]
    table = pa.table({"prompt": texts[:100], "completion": texts[100:]})
    examples = encode(tokenizer, task("text2text-generation"), table)
    rows = []
    for batch in by_length(examples, tokens=300):
        tokens = sum(v.numel() for n, v in batch.inputs.items() if n.endswith("input_ids"))
        assert tokens <= 300 + len(batch.rows) or len(batch.rows) == 1
        rows += batch.rows.tolist()
    assert sorted(rows) == list(range(100))


def test_rows_that_are_not_wanted_have_no_tokens_and_no_labels() -> None:
    table = pa.table({"completion": ["ab", "cdef", "e"]})
    examples = encode(letters(), task(prompt=None), table, np.array([1]))
    assert examples.inputs["input_ids"] == [[], ids("#ef$"), []]
    assert (examples.labels != IGNORED).sum(1).tolist() == [0, 3, 0]
