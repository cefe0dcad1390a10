"""The kinds of tasks, by the Hub's names.

What a kind needs beyond this table lies where it is used, in a function of its own behind a table
by kind: how rows become a model's inputs (`fmn.tasks.encoding`), the loss (`fmn.fisher.loss`), and
how outputs are scored (`fmn.evaluate.metrics`).
"""

from collections.abc import Mapping
from typing import Literal, NamedTuple

KindName = Literal[
    "text-classification",
    "token-classification",
    "image-classification",
    "sentence-similarity",
    "text-generation",
    "text2text-generation",
]
ARCHITECTURE = "fmn_architecture"
"""The entry of config.json that says where a model's mask nodes are (`fmn.fisher.architectures`).
Copies, fine-tuned experts and merged models carry it on."""
# Transformers' words.
ProblemType = Literal["single_label_classification", "multi_label_classification", "regression"]
SINGLE: ProblemType = "single_label_classification"
MULTI: ProblemType = "multi_label_classification"
REGRESSION: ProblemType = "regression"
GENERATORS: tuple[KindName, ...] = ("text-generation", "text2text-generation")


class Kind(NamedTuple):
    """What all tasks of a kind have in common.

    Attributes:
        auto_class: the class of Transformers that loads its checkpoints.
        endings: how the names of such models' classes end, which config.json lists.
        columns: the keys of the columns of an example; those in `optional` may be absent.
        has_head: whether each task has a head of its own above the merged encoder; without, the
            whole model is merged.
        problem_types: what its labels can be; none where an example needs no label.
        estimators: of its Fisher information. With very many outputs, the exact expectation would
            take very many backward passes.
    """

    auto_class: str
    endings: tuple[str, ...]
    columns: tuple[str, ...]
    optional: tuple[str, ...] = ()
    has_head: bool = True
    problem_types: tuple[ProblemType, ...] = ()
    estimators: tuple[str, ...] = ("empirical", "expected", "sampled", "batch")


_OF_TOKENS = ("empirical", "sampled", "batch")

KINDS: Mapping[KindName, Kind] = {
    "text-classification": Kind(
        "AutoModelForSequenceClassification",
        ("ForSequenceClassification",),
        ("text", "text_pair"),
        optional=("text_pair",),
        problem_types=(SINGLE, MULTI, REGRESSION),
    ),
    "token-classification": Kind(
        "AutoModelForTokenClassification",
        ("ForTokenClassification",),
        ("tokens",),
        problem_types=(SINGLE,),
        estimators=_OF_TOKENS,
    ),
    "image-classification": Kind(
        "AutoModelForImageClassification",
        ("ForImageClassification",),
        ("image",),
        problem_types=(SINGLE,),
    ),
    "sentence-similarity": Kind(
        "AutoModel",
        ("Model",),
        ("text", "text_pair"),
        optional=("text_pair",),
        has_head=False,
        problem_types=(REGRESSION,),
        estimators=("sampled",),
    ),
    "text-generation": Kind(
        "AutoModelForCausalLM",
        ("ForCausalLM", "LMHeadModel"),
        ("prompt", "completion"),
        optional=("prompt",),
        has_head=False,
        estimators=_OF_TOKENS,
    ),
    "text2text-generation": Kind(
        "AutoModelForSeq2SeqLM",
        ("ForConditionalGeneration",),
        ("prompt", "completion"),
        has_head=False,
        estimators=_OF_TOKENS,
    ),
}
"""Every kind. A model that several kinds can read is of the first of them."""


def kind_of_class(name: str) -> KindName | None:
    """The kind of the checkpoints of a class of Transformers; None for a base without its use.

    >>> kind_of_class("BertForTokenClassification"), kind_of_class("BertForMaskedLM")
    ('token-classification', None)
    """
    endings = {end: kind for kind, facts in KINDS.items() for end in facts.endings}
    fitting = [end for end in endings if name.endswith(end)]
    return endings[max(fitting, key=len)] if fitting else None  # LMHeadModel is no Model
