"""Convert the rows of a task to a model's inputs."""

import json
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from fmn.errors import UserError
from fmn.store.headers import first_words
from fmn.tasks.batches import IGNORED, Examples
from fmn.tasks.dataset import label_array
from fmn.tasks.images import ImageReader, Pixels
from fmn.tasks.task import Task

if TYPE_CHECKING:
    import pyarrow as pa


def encode(
    processor: Any,
    task: Task,
    table: "pa.Table",
    rows: np.ndarray | None = None,
    *,
    scored: bool = False,
) -> Examples:
    """Encode the rows of a table of `read_split`; without labels, labels are zeros.

    Args:
        processor: the tokenizer, or the image processor.
        task: the rows' task.
        table: the rows.
        rows: only these rows are encoded, the others are empty; default: all.
        scored: whether the examples will be scored (`fmn.evaluate.metrics.answers`); sentence
            pairs are then two examples.
    """
    return _ENCODE[task.task](processor, task, table, rows, scored)


def _of_texts(
    tokenizer: Any, task: Task, table: "pa.Table", rows: np.ndarray | None, _scored: bool
) -> Examples:
    """Encode one or two texts; with too many tokens, the longer text loses its end."""
    wanted = _wanted(table, rows)
    encoded: Mapping[str, list[list[int]]] = tokenizer(
        *(table[name].take(wanted).to_pylist() for name in task.text_columns),
        truncation="longest_first",
        max_length=task.max_length,
        padding=False,
        return_attention_mask=False,
    )
    inputs = {name: _at(wanted, values, table.num_rows) for name, values in encoded.items()}
    pad = padding(tokenizer)
    return Examples(inputs, label_array(task, table), {name: pad[name] for name in inputs})


def _of_sentences(
    tokenizer: Any, task: Task, table: "pa.Table", rows: np.ndarray | None, scored: bool
) -> Examples:
    """Encode one text of each row, alternating between first and second texts.

    Rows to be scored: all first texts, then all second texts. `tokenizer` comes from
    `load_processor`, which sets the model's limit of tokens.
    """
    wanted, count = _wanted(table, rows), table.num_rows
    columns = [table[name].take(wanted).to_pylist() for name in task.text_columns]
    texts = list(columns[0])
    for place, row in enumerate(wanted):
        texts[place] = columns[row % len(columns)][place]
    labels = label_array(task, table)
    if scored:
        texts = [text for column in columns for text in column]
        wanted = [row + count * number for number in range(len(columns)) for row in wanted]
        labels = np.tile(labels, len(columns))
    encoded: Mapping[str, list[list[int]]] = tokenizer(
        [tokenizer.prompt + text for text in texts],
        truncation=True,
        max_length=min(task.max_length, tokenizer.model_max_length),
        padding=False,
        return_attention_mask=False,
    )
    inputs = {name: _at(wanted, values, len(labels)) for name, values in encoded.items()}
    pad = padding(tokenizer)
    return Examples(inputs, labels, {name: pad[name] for name in inputs})


def _of_images(
    reader: ImageReader, task: Task, table: "pa.Table", rows: np.ndarray | None, _scored: bool
) -> Examples:
    """Encode images; they are decoded when their pixels are read."""
    wanted = _wanted(table, rows)
    contents = table[task.input_columns["image"]].take(wanted).to_pylist()
    everything = _at(wanted, contents, table.num_rows)
    pixels = Pixels(reader, everything, range(table.num_rows), task.name)
    return Examples({"pixel_values": pixels}, label_array(task, table), {}, reader.tokens)


def _of_words(
    tokenizer: Any, task: Task, table: "pa.Table", rows: np.ndarray | None, scored: bool
) -> Examples:
    """Encode words and their tags; the first token of a word has the word's tag.

    A text with too many tokens loses whole words at its end. For rows to be scored, labels are
    int64 [N, W, 2]: for each word, the position of its first token (-1 if it was cut off), and its
    tag. Both are IGNORED after a text's last word.
    """
    if not tokenizer.is_fast:
        raise UserError(
            f"{tokenizer.name_or_path}: its tokenizer does not say which word a token is of; save"
            " it as tokenizer.json (use_fast=True)"
        )
    wanted = _wanted(table, rows)
    words = table[task.columns.tokens].take(wanted).to_pylist()
    tags = table["label"].take(wanted).to_pylist() if "label" in table.column_names else None
    encoded = tokenizer(
        words, is_split_into_words=True, padding=False, return_attention_mask=False, verbose=False
    )
    inputs: dict[str, list[list[int]]] = {name: [] for name in encoded}
    positions: list[dict[int, int]] = []  # of the first token, by word
    for number in range(len(wanted)):
        places = _fitting(encoded.word_ids(number), task.max_length)
        for name, values in encoded.items():
            inputs[name].append([values[number][place] for place, _ in places])
        first: dict[int, int] = {}
        for position, (_, word) in enumerate(places):
            if word is not None:
                first.setdefault(word, position)
        positions.append(first)
    width = max((len(ids) for ids in inputs["input_ids"]), default=0)
    labels = np.full((table.num_rows, width), IGNORED, np.int64)
    if scored:
        most = max(map(len, words), default=0)
        labels = np.full((table.num_rows, most, 2), IGNORED, np.int64)
    for number, row in enumerate(wanted):
        own = tags[number] if tags else [0] * len(words[number])
        if scored:
            labels[row, : len(own), 0] = [positions[number].get(w, -1) for w in range(len(own))]
            labels[row, : len(own), 1] = own
        else:
            for word, position in positions[number].items():
                labels[row, position] = own[word]
    pad = padding(tokenizer)
    every = {name: _at(wanted, values, table.num_rows) for name, values in inputs.items()}
    return Examples(every, labels, {name: pad[name] for name in inputs})


def _fitting(words: list[int | None], most: int) -> list[tuple[int, int | None]]:
    """The positions of the tokens that fit, each with its word or None."""
    own = [word for word in words if word is not None]
    room = max(most - (len(words) - len(own)), 0)
    cut = own[room] if len(own) > room else None  # the first word that does not fit whole
    return [
        (place, word)
        for place, word in enumerate(words)
        if word is None or cut is None or word < cut
    ]


def _wanted(table: "pa.Table", rows: np.ndarray | None) -> list[int]:
    return list(range(table.num_rows)) if rows is None else [int(row) for row in rows]


def _at(rows: list[int], values: list[Any], count: int) -> list[Any]:
    """Put values at some of `count` rows; the others are empty."""
    by_row = dict(zip(rows, values, strict=True))
    return [by_row.get(row, []) for row in range(count)]


def padding(tokenizer: Any) -> dict[str, int]:
    """The padding value of each input; without a padding token it is 0, as a mask covers it."""
    return {
        "input_ids": tokenizer.pad_token_id or 0,
        "token_type_ids": tokenizer.pad_token_type_id,
    }


# ---- generated text ----


def _of_continuations(
    tokenizer: Any, task: Task, table: "pa.Table", rows: np.ndarray | None, _scored: bool
) -> Examples:
    """Encode prompt, completion and end of text as one sequence; prompts have no labels.

    With too many tokens, the prompt loses its first ones. A completion that is too long by itself
    loses its last tokens and the end of text.
    """
    wanted = _wanted(table, rows)
    prompts, completions = _prompts(task, table, wanted), _completions(task, table, wanted)
    if task.chat:
        pairs = zip(prompts, completions, strict=True)
        texts = [(chat_prompt(tokenizer, p), _chat_answer(tokenizer, p, text)) for p, text in pairs]
        prompts, completions = [list(each) for each in zip(*texts, strict=True)] or ([], [])
    together = [prompt + text for prompt, text in zip(prompts, completions, strict=True)]
    options = {"return_attention_mask": False, "add_special_tokens": not task.chat}
    wholes = tokenizer(together, **options)["input_ids"]
    alone = tokenizer(prompts, **options)["input_ids"]
    apart = tokenizer(completions, add_special_tokens=False, return_attention_mask=False)
    end, begin = tokenizer.eos_token_id, tokenizer.bos_token_id
    sequences, answers = [], []
    for whole, prompt, completion in zip(wholes, alone, apart["input_ids"], strict=True):
        prompt = _without(prompt, end)
        if whole[: len(prompt)] == prompt:
            completion = whole[len(prompt) :]
        # Otherwise a token spans both: use the completion tokenised by itself.
        if end is not None and not task.chat:  # a chat template has its own end
            completion = [*_without(completion, end), end]
        completion = completion[: max(1, task.max_length - min(1, len(prompt)))]
        room = task.max_length - len(completion)
        if len(prompt) > room:
            first = prompt[:1] if prompt[0] == begin and room else []
            prompt = first + prompt[len(prompt) - room + len(first) :]
        sequences.append(prompt + completion)
        answers.append(len(completion) if prompt else len(completion) - 1)
    labels = np.full((len(wanted), max(map(len, sequences), default=0)), IGNORED)
    for row, sequence, count in zip(labels, sequences, answers, strict=True):
        if count:  # the label of a position is the next token
            row[len(sequence) - 1 - count : len(sequence) - 1] = sequence[len(sequence) - count :]
    inputs = {"input_ids": _at(wanted, sequences, table.num_rows)}
    pad = {"input_ids": padding(tokenizer)["input_ids"]}
    return Examples(inputs, _labels_at(wanted, labels, table.num_rows), pad)


def _of_translations(
    tokenizer: Any, task: Task, table: "pa.Table", rows: np.ndarray | None, _scored: bool
) -> Examples:
    """Encode the prompt for the encoder, and the completion, shifted right, for the decoder.

    A prompt or completion with too many tokens loses its last ones.
    """
    start = tokenizer.decoder_start_token_id  # set by `fmn.models.loading.load_processor`
    wanted = _wanted(table, rows)
    encoded = tokenizer(_prompts(task, table, wanted), truncation=True, max_length=task.max_length)[
        "input_ids"
    ]
    targets = tokenizer(text_target=_completions(task, table, wanted))["input_ids"]
    targets = [target[: task.max_length] for target in targets]
    labels = np.full((len(wanted), max(map(len, targets), default=0)), IGNORED)
    for row, target in zip(labels, targets, strict=True):
        row[: len(target)] = target
    shifted = [[start, *target[:-1]] for target in targets]
    inputs = {
        "input_ids": _at(wanted, encoded, table.num_rows),
        "decoder_input_ids": _at(wanted, shifted, table.num_rows),
    }
    pad = dict.fromkeys(inputs, padding(tokenizer)["input_ids"])
    return Examples(inputs, _labels_at(wanted, labels, table.num_rows), pad)


def chat_prompt(tokenizer: Any, prompt: str) -> str:
    """The text that a chat template makes of messages in JSON, or of a user's only message.

    Raises:
        UserError: the tokenizer has no chat template, or it does not fit the messages.
    """
    return _from_template(tokenizer, _messages(prompt), add_generation_prompt=True)


def _chat_answer(tokenizer: Any, prompt: str, completion: str) -> str:
    """The text that a chat template makes of the answer to messages, up to its end of text."""
    answer = {"role": "assistant", "content": completion}
    start, whole = chat_prompt(tokenizer, prompt), [*_messages(prompt), answer]
    text = _from_template(tokenizer, whole)
    if not text.startswith(start):
        raise UserError(
            f"{tokenizer.name_or_path}: its chat template does not put an answer right behind its"
            " prompt; write the columns prompt and completion in place of messages"
        )
    text, end = text[len(start) :], tokenizer.eos_token
    return text[: text.rindex(end) + len(end)] if end and end in text else text


def _messages(prompt: str) -> list[dict[str, str]]:
    try:
        messages = json.loads(prompt)
        are_messages = all({"role", "content"} <= {*each} for each in messages)
        if isinstance(messages, list) and messages and are_messages:
            return messages
    except (TypeError, ValueError):
        pass
    return [{"role": "user", "content": prompt}]


def check_template(tokenizer: Any) -> None:
    """Raise a UserError if a tokenizer has no chat template."""
    if not tokenizer.chat_template:
        raise UserError(
            f"{tokenizer.name_or_path}: its tokenizer has no chat template, which messages need;"
            " add the chat_template.jinja of its base, or write the columns prompt and completion"
        )


def _from_template(tokenizer: Any, messages: list[dict[str, str]], **options: bool) -> str:
    check_template(tokenizer)
    try:
        text: str = tokenizer.apply_chat_template(messages, tokenize=False, **options)
    except Exception as error:  # a template raises any exception
        problem = f"its chat template does not take these messages: {first_words(error)}"
        raise UserError(f"{tokenizer.name_or_path}: {problem}; change the rows") from error
    return text


def _prompts(task: Task, table: "pa.Table", rows: list[int]) -> list[str]:
    name = task.columns.prompt
    prompts: list[str] = table[name].take(rows).to_pylist() if name else [""] * len(rows)
    return prompts


def _completions(task: Task, table: "pa.Table", rows: list[int]) -> list[str]:
    completions: list[str] = table[task.input_columns["completion"]].take(rows).to_pylist()
    return completions


def _without(tokens: list[int], end: int | None) -> list[int]:
    """Remove the end of text, which some tokenizers add."""
    return tokens[:-1] if tokens and tokens[-1] == end else tokens


def _labels_at(rows: list[int], labels: np.ndarray, count: int) -> np.ndarray:
    """Put labels of tokens at some of `count` rows, [count, T]; the others are IGNORED."""
    placed = np.full((count, labels.shape[1]), IGNORED)
    placed[rows] = labels
    return placed


_ENCODE: Mapping[str, Callable[..., Examples]] = {
    "text-classification": _of_texts,
    "token-classification": _of_words,
    "image-classification": _of_images,
    "sentence-similarity": _of_sentences,
    "text-generation": _of_continuations,
    "text2text-generation": _of_translations,
}
