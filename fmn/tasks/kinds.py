"""The kinds of tasks, by the Hub's names.

Other modules have their own tables by kind: the conversion of rows to a model's inputs
(`fmn.tasks.encoding`), the loss (`fmn.fisher.loss`), and the scores (`fmn.evaluate.metrics`).
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
"""The entry of config.json that describes where a model's mask nodes are
(`fmn.fisher.architectures`). Copies, fine-tuned experts and merged models keep it."""
# Transformers' words.
ProblemType = Literal["single_label_classification", "multi_label_classification", "regression"]
SINGLE: ProblemType = "single_label_classification"
MULTI: ProblemType = "multi_label_classification"
REGRESSION: ProblemType = "regression"
GENERATORS: tuple[KindName, ...] = ("text-generation", "text2text-generation")


class Kind(NamedTuple):
    """The properties of a kind of task.

    Attributes:
        auto_class: the class of Transformers that loads its checkpoints.
        endings: endings of the names of such models' classes in config.json.
        columns: the roles of the columns of an example; those in `optional` may be absent.
        has_head: whether each task has its own head above the merged encoder; otherwise the whole
            model is merged.
        problem_types: the possible problem types; empty if examples need no label.
        estimators: the estimators of its Fisher information. With very many outputs, the exact
            expectation would take too many backward passes.
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
"""All kinds. A model that fits several kinds belongs to the first of them."""


def kind_of_class(name: str) -> KindName | None:
    """The kind of task of a model's class in Transformers; None for a class without a task.

    >>> kind_of_class("BertForTokenClassification"), kind_of_class("BertForMaskedLM")
    ('token-classification', None)
    """
    endings = {end: kind for kind, facts in KINDS.items() for end in facts.endings}
    fitting = [end for end in endings if name.endswith(end)]
    return endings[max(fitting, key=len)] if fitting else None  # LMHeadModel, not Model
