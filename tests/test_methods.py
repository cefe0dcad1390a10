"""Every merge method that is offered is there, and says what it needs."""

from fmn.merge import METHODS
from fmn.methods import NEEDS


def test_every_method_has_needs_and_a_computation() -> None:
    assert NEEDS.keys() == METHODS.keys()


def test_a_density_is_a_share() -> None:
    for needs in NEEDS.values():
        assert needs.density is None or 0 < needs.density <= 1


def test_task_vectors_need_the_base() -> None:
    assert NEEDS["ties"].base
    assert NEEDS["mask-fisher"].fisher
    assert not NEEDS["average"].base
