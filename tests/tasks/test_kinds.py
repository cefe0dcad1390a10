"""The table of kinds agrees with Transformers."""

import pytest
import transformers

from fmn.tasks.kinds import KINDS, KindName, kind_of_class


@pytest.mark.parametrize("kind", KINDS)
def test_the_classes_that_an_auto_class_loads_are_of_its_kind(kind: KindName) -> None:
    mapping = getattr(transformers, KINDS[kind].auto_class)._model_mapping
    configs = {
        "image-classification": transformers.ViTConfig,
        "token-classification": transformers.BertConfig,
    }
    config = configs.get(kind, transformers.BartConfig)
    assert kind_of_class(mapping[config].__name__) == kind


def test_a_class_is_of_the_kind_with_the_longest_ending() -> None:
    assert kind_of_class("GPT2LMHeadModel") == "text-generation"
    assert kind_of_class("GPT2Model") == "sentence-similarity"
    assert kind_of_class("BertForMaskedLM") is None


def test_what_is_optional_is_a_column_and_kinds_without_labels_have_no_head() -> None:
    for facts in KINDS.values():
        assert {*facts.optional} <= {*facts.columns}
        assert facts.problem_types or not facts.has_head
        assert "sampled" in facts.estimators
