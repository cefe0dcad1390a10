"""Where a checkpoint comes from, and how it was fine-tuned, as its sidecar says."""

from pathlib import Path

from fmn.models import provenance
from fmn.store.artifacts import digest_folder
from tests.conftest import TUNING


def test_an_expert_of_fmns_says_how_it_was_fine_tuned(tiny_work: Path) -> None:
    expert = tiny_work / "experts" / "sst2"
    assert provenance.lineage(expert).source.startswith("finetune:")
    assert provenance.tuning(expert)["learning_rate"] == TUNING.learning_rate
    assert provenance.rows_tuned_on(expert) == (TUNING.examples, TUNING.seed)


def test_a_checkpoint_that_was_fetched_names_its_source(tiny_work: Path, tiny_base: Path) -> None:
    lineage = provenance.lineage(tiny_work / "base")
    assert lineage.source == str(tiny_base)
    assert provenance.training_metadata(tiny_work / "base") is None


def test_any_other_folder_is_known_by_its_content(bert: Path) -> None:
    lineage = provenance.lineage(bert)
    assert (lineage.source, lineage.revision) == ("folder", f"sha256:{digest_folder(bert)}")
    assert provenance.rows_tuned_on(bert) == (None, 0)
    assert provenance.tuning(bert) == {}
