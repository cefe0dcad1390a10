"""Every merge method that is offered is there, and says what it needs."""

from fmn.merge.methods import AUTO, NEEDS, PLAIN, tuned
from fmn.merge.rules import METHODS


def test_every_method_has_needs_and_a_computation() -> None:
    assert NEEDS.keys() == METHODS.keys()


def test_a_density_is_a_share() -> None:
    for needs in NEEDS.values():
        assert needs.density is None or 0 < needs.density <= 1


def test_task_vectors_need_the_base() -> None:
    assert NEEDS["ties"].base
    assert NEEDS["mask-fisher"].fisher
    assert not NEEDS["average"].base


def test_without_the_base_or_with_the_papers_mapping_mask_fisher_is_the_plain_rule() -> None:
    auto = ("auto", "auto")
    assert tuned("mask-fisher", "structured", False, *auto) == PLAIN
    assert tuned("mask-fisher", "paper", True, *auto) == PLAIN
    assert tuned("average", "structured", True, *auto) == PLAIN
    assert tuned("mask-fisher", "structured", True, *auto) == AUTO["mask-fisher"]
    assert tuned("fisher-regmean", "structured", False, *auto) == AUTO["fisher-regmean"]._replace(
        growth=0
    )


def test_what_is_given_is_taken() -> None:
    found = tuned("mask-fisher", "paper", True, "expert", 0.5)
    assert (found.normalise, found.exponent) == ("expert", 0.5)


def test_the_scale_is_one_for_equal_experts_and_grows_with_what_averaging_shrinks() -> None:
    for name, tuning in AUTO.items():
        assert tuning.scale(1.0000001) == 1
        assert 1 < tuning.scale(2) <= tuning.scale(4) <= tuning.most, name
