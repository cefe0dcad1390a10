"""Read and check the rows of a user's task, and complete its definition."""

import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from fmn.errors import UserError
from fmn.rows import images
from fmn.rows.formats import Table, read_files
from fmn.rows.label_values import (
    Labels,
    encode,
    encode_tags,
    is_text,
    plain_values,
    read_labels,
    tags,
    word_list,
)
from fmn.rows.sources import File, used_splits
from fmn.store.records import shortened
from fmn.tasks.batches import random_order
from fmn.tasks.dataset import label_array
from fmn.tasks.kinds import GENERATORS, KINDS, REGRESSION, SINGLE
from fmn.tasks.metrics import default_metrics
from fmn.tasks.rows import schema
from fmn.tasks.task import (
    Columns,
    DatasetSettings,
    Task,
    TaskSettings,
    in_a_line,
    make_task,
    no_span_tag,
)

SHARE = 0.1  # of the rows are split off for validation, if the data have no split for it
# Classes; with more, the column may be something else than a label. So it may with some, where
# rows are few.
MANY, SOME = 50, 8
MESSAGES = "messages"  # the column of a conversation


class Prepared(NamedTuple):
    """A task's definition, its rows by split, and notes for the user."""

    task: Task
    tables: dict[str, pa.Table]
    notes: list[str]
    warnings: list[str]


def prepare(
    name: str, definition: TaskSettings, files: Mapping[str, Sequence[File]], place: str
) -> Prepared:
    """Read a task's rows by the user's description, check them, and complete its definition.

    Args:
        name: the task.
        definition: its description.
        files: the files of each split of its data set.
        place: what messages call the data set.

    Raises:
        UserError: a file, a column, a text or a label is not as it should be; says where.
    """
    if len(problem_types := KINDS[definition.kind].problem_types) == 1:  # labels decide nothing
        definition = definition.model_copy(update={"problem_type": problem_types[0]})
    dataset = definition.dataset or DatasetSettings(path=place)
    if definition.kind != "token-classification":
        _refuse_tagged_words(files)
    train, used = used_splits(dataset, files, place)
    validation = [split for split in used if split != train]
    splits = {"train" if split == train else split: read_files(used[split]) for split in used}
    if not splits:
        raise UserError(f"{place}: neither training nor validation rows; name a split in `splits`")
    if is_chat := any(has_messages(definition, table) for table in splits.values()):
        splits = {split: as_prompts(definition, table) for split, table in splits.items()}
    first = next(iter(splits.values()))
    if definition.kind in GENERATORS:
        label, columns, notes = None, *_generation_columns(definition, first)
    else:
        label, notes = _label_column(definition, first)
        columns = definition.columns.of_kind(definition.kind)
    labels, values = None, dict[str, list[Any]]()
    if label:
        for split, table in splits.items():
            classes = table.classes.get(label, ())
            values[split] = _label_values(definition, table, label, name, classes)
        known = values["train"] if train else [x for each in values.values() for x in each]
        if definition.kind == "token-classification":
            definition = definition.model_copy(update={"problem_type": SINGLE})
            known = [tag for each in known for tag in each]
        labels = read_labels(known, first.classes.get(label, ()), definition, first.place)
    task = _task(name, definition, columns, labels, validation, is_chat)
    tables = {}
    for split, table in splits.items():
        content = _inputs(task, columns, table)
        if labels:
            encode_all = encode_tags if task.task == "token-classification" else encode
            content["label"] = encode_all(values[split], labels, table.place, f"column {label}")
        content["idx"] = range(table.num_rows)
        tables[split] = pa.table(content, schema=schema(task))
    origins = {split: f"of {table.place}" for split, table in splits.items()}
    size = dataset.validation_size or (SHARE if task.has_labels and not validation else None)
    if train and size:
        validation = _split_off(task, tables, size, dataset.seed, place)
        origins["validation"] = f"split off {first.place} by seed {dataset.seed}"
        task = task.model_copy(update={"validation": tuple(validation)})
    counts = [f"{split}: {len(rows)} rows {origins[split]}" for split, rows in tables.items()]
    notes = [*counts, *notes, *_label_notes(task), *_tag_notes(task, definition, place)]
    return Prepared(task, tables, notes, odd_rows(task, tables))


def _label_notes(task: Task) -> list[str]:
    return [f"labels: {in_a_line(task.labels, 20)}"] if task.labels else []


def _tag_notes(task: Task, definition: TaskSettings, place: str) -> list[str]:
    """Notes about tags that do not mark spans; UserError if the task's metric needs spans."""
    if task.task != "token-classification" or not (tag := no_span_tag(task.labels)):
        return []
    if "seqeval_f1" in task.metrics:
        raise UserError(
            f"{place}: metric seqeval_f1 is of spans, and {tag!r} is no tag of one, such as O,"
            " B-PER or I-PER; rename the tag under `labels`, or say metrics: [accuracy]"
        )
    if definition.metrics or not task.has_labels:
        return []
    return [f"scored by accuracy, as {tag!r} is no tag of a span, such as B-PER"]


def _refuse_tagged_words(files: Mapping[str, Sequence[File]]) -> None:
    for file in (file for each in files.values() for file in each):
        if file.format == "conll":
            raise UserError(
                f"{file.name}: a file of words and tags; say task: token-classification, or give"
                " csv, json or parquet"
            )


def _label_values(
    definition: TaskSettings, table: Table, label: str, task: str, classes: Sequence[str]
) -> list[Any]:
    """The plain values of the label column; for tags, one list per row."""
    values = table.values(label, task)
    if definition.kind != "token-classification":
        return plain_values(values, classes)
    words = _checked_words(table.values(definition.columns.tokens, task), table.place, "tokens")
    by_row = tags(values, words, table.place, f"column {label}")
    flat = iter(plain_values([tag for row in by_row for tag in row], classes))
    return [[next(flat) for _ in row] for row in by_row]


def _label_column(definition: TaskSettings, first: Table) -> tuple[str | None, list[str]]:
    """The column of labels, and what to tell the user if there is none without their word."""
    label = definition.columns.label
    if label != "label" or label in first.columns or definition.metrics:
        return label, []
    columns = in_a_line(first.columns)
    return None, [f"no labels: there is no column {label} in {first.place}, but {columns}"]


def _generation_columns(definition: TaskSettings, first: Table) -> tuple[dict[str, str], list[str]]:
    """The columns of prompts and completions, and notes if there are no prompts."""
    columns = definition.columns.of_kind(definition.kind)
    is_optional = "prompt" in KINDS[definition.kind].optional
    is_named = "prompt" in definition.columns.model_fields_set
    if not is_optional or is_named or "prompt" in first.columns:
        return columns, []
    del columns["prompt"]
    return columns, [f"no prompts: there is no column prompt in {first.place}; texts have none"]


def has_messages(definition: TaskSettings, table: Table) -> bool:
    """Whether the rows of a task that generates texts are conversations."""
    columns = table.columns
    is_other = definition.kind not in GENERATORS or definition.columns.completion in columns
    return MESSAGES in columns and not is_other


def as_prompts(definition: TaskSettings, table: Table) -> Table:
    """A table with a column of messages as prompts, in JSON, and completions: the last messages.

    Raises:
        UserError: the model is no causal one, or a row is no list of messages that ends in one of
            the assistant.
    """
    if definition.kind != "text-generation":
        problem = f"{table.place}: has lists of messages, which are not read for {definition.kind}"
        raise UserError(f"{problem}; write the columns prompt and completion")
    prompts, completions = [], []
    for row, value in enumerate(table.values(MESSAGES, definition.kind)):
        try:
            plain = [{k: v for k, v in each.items() if v is not None} for each in value]
            is_plain = all(
                {*each} == {"role", "content"} and all(map(is_text, each.values()))
                for each in plain
            )
            is_answered = len(plain) > 1 and plain[-1]["role"] == "assistant"
        except (AttributeError, KeyError, TypeError):
            is_plain = is_answered = False
        if not is_plain or not is_answered:
            raise UserError(
                f"{table.place}: column {MESSAGES} is {shortened(value, 80)} in row {row}, not two"
                " or more messages, each of role and content (a text), the last of the role"
                " assistant; write it so, or drop the row"
            )
        prompts.append(json.dumps(plain[:-1], ensure_ascii=False))
        completions.append(plain[-1]["content"])
    names = definition.columns.of_kind(definition.kind)
    columns = {names.get("prompt", "prompt"): prompts, names["completion"]: completions}
    return table._replace(columns=columns)


def _task(
    name: str,
    definition: TaskSettings,
    columns: Mapping[str, str],
    labels: Labels | None,
    validation: Sequence[str],
    is_chat: bool,
) -> Task:
    """The whole definition, with what the data tell. UserError if metrics do not fit it.

    Args:
        columns: the names of the columns in the data, by key.
        is_chat: whether prompts are lists of messages.
    """
    if {*columns.values()} & {"label", "idx"}:  # the rows have columns of these names
        columns = {key: key for key in columns}
    kind = labels.problem_type if labels else definition.problem_type
    names = labels.names if labels else tuple(definition.label_names)
    has_labels = labels or definition.kind in GENERATORS
    metrics = default_metrics(definition.kind, kind) if has_labels else ()
    if metrics == ("seqeval_f1",) and no_span_tag(names):
        metrics = ("accuracy",)
    return make_task(
        name,
        task=definition.kind,
        **({"problem_type": kind} if KINDS[definition.kind].problem_types else {}),
        columns=Columns(**columns, label="label" if labels else None),
        labels=names,
        metrics=tuple(definition.metrics) or metrics,
        validation=tuple(validation),
        threshold=definition.threshold,
        chat=is_chat,
        **definition.model_dump(include={"max_length"}, exclude_unset=True),
    )


def _inputs(task: Task, columns: Mapping[str, str], table: Table) -> dict[str, Any]:
    """The inputs by the task's columns; UserError names the first row with an unusable input.

    Args:
        columns: the names of the columns in the data, by key.
    """
    content = {}
    for key, name in task.input_columns.items():
        source = columns[key]
        values = content[name] = table.values(source, task.name)
        if key == "tokens":
            content[name] = _checked_words(values, table.place, source)
        elif key == "image":
            place, files = f"{table.place}: column {source}", table.columns.get("file", ())
            content[name] = images.checked(values, place, files)
        elif wrong := [row for row, value in enumerate(values) if not is_text(value)]:
            raise UserError(
                f"{table.place}: column {source} is {shortened(values[wrong[0]], 40)} in row"
                f" {wrong[0]}, not a text ({len(wrong)} of {len(values)} rows are so); give a text,"
                " or drop the row"
            )
    return content


def _checked_words(values: Sequence[Any], place: str, source: str) -> list[list[str]]:
    """The words of each row; UserError names the first row that is not a list of words."""
    lists = []
    for row, value in enumerate(values):
        words = word_list(value)
        if words is None or not all(map(is_text, words)):
            raise UserError(
                f"{place}: column {source} is {shortened(value, 40)} in row {row}, not a list of"
                " words; give one, or drop the row"
            )
        lists.append(words)
    return lists


def _split_off(
    task: Task, tables: dict[str, pa.Table], size: float, seed: int, place: str
) -> list[str]:
    """Move rows from "train" to "validation", stratified by class."""
    rows = tables["train"]
    if rows.num_rows == 1:
        return []
    labels = label_array(task, rows)
    has_classes = task.columns.label is not None and task.problem_type != REGRESSION
    order = random_order(labels, seed, stratified=has_classes)
    count = int(size) if size >= 1 else max(1, round(size * len(order)))
    if has_classes and not task.multi_label:
        # The last row of each class in this order stays in training, as far as that is possible.
        _, last = np.unique(labels[order][::-1], return_index=True)
        last = len(order) - 1 - last
        order = np.concatenate([np.delete(order, last), order[last]])
    if not 1 <= count < rows.num_rows:
        raise UserError(
            f"{place}: validation_size {size:g} of {rows.num_rows} rows is {count}, and at most"
            f" {rows.num_rows - 1} can be split off; say another"
        )
    is_validation = np.zeros(rows.num_rows, dtype=bool)
    is_validation[order[:count]] = True
    tables["train"] = rows.filter(pa.array(~is_validation))
    tables["validation"] = rows.filter(pa.array(is_validation))
    return ["validation"]


def odd_rows(task: Task, tables: Mapping[str, pa.Table]) -> list[str]:
    """Warnings about unusual rows that can still be used."""
    lines = []
    texts = {
        split: list(zip(*(_as_texts(rows[name]) for name in task.text_columns), strict=True))
        for split, rows in tables.items()
    }
    trained = set(texts.get("train", ()))
    for split, rows in tables.items():
        needed = [row[-1:] if task.generates else row for row in texts[split]]  # not a prompt
        is_text = task.columns.image is None
        if is_text and (blank := sum(not all(map(str.strip, row)) for row in needed)):
            lines.append(f"{split}: {blank} of {len(rows)} rows have an empty text")
        if len(rows) == 1:
            lines.append(f"{split}: there is one row alone")
        if task.columns.label and len(rows) > 1:
            is_tagged = task.task == "token-classification"
            own = pc.list_flatten(rows["label"]).to_numpy() if is_tagged else None
            lines += _label_warnings(task, split, label_array(task, rows) if own is None else own)
        if split != "train" and (same := sum(row in trained for row in texts[split])):
            lines.append(f"{split}: {same} of {len(rows)} texts are also in training")
    if task.has_labels and not task.validation:
        lines.append("there are no validation rows, so that no model can be scored")
    count, rows = len(task.labels), sum(map(len, tables.values()))
    if count > MANY or count > max(SOME, rows // 2):
        lines.append(
            f"there are {count} labels in {rows} rows; see that columns.label is the labels';"
            " numbers to predict need problem_type: regression"
        )
    if {"-1", "0"} <= {*task.labels}:
        lines.append("-1 is a label here; in many data sets it says that a row has none")
    return lines


def _as_texts(column: pa.ChunkedArray) -> list[str]:
    """The texts of a column; lists of words are joined with blanks."""
    values = column.to_pylist()
    return [" ".join(value) if isinstance(value, list) else value for value in values]


def _label_warnings(task: Task, split: str, labels: np.ndarray) -> list[str]:
    different = np.unique(labels, axis=0)
    if len(different) == 1:
        name = f" {task.labels[different[0]]}" if task.problem_type == SINGLE else ""
        return [f"{split}: every row has the same label{name}"]
    present = np.flatnonzero(labels.any(axis=0)) if task.multi_label else different
    absent = [name for label, name in enumerate(task.labels) if label not in present]
    return [f"{split}: no row has the label {in_a_line(absent)}"] if absent else []
