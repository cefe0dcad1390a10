"""Which sets of experts a comparison merges, and what stands beside its methods."""

from fmn.experiments import grid
from fmn.experiments.stages import ComparedSettings


def test_pairs_triples_and_all_without_doubles() -> None:
    assert list(grid.sets(["a", "b", "c"], ["pairs", "triples", "all"])) == [
        "a+b",
        "a+c",
        "b+c",
        "a+b+c",
    ]
    assert grid.sets(["a", "b"], ["all", "pairs"]) == {"a+b": ("a", "b")}
    assert list(grid.sets(["a", "b", "c"], ["all", "c+b"])) == ["c+b", "a+b+c"]


def test_bounds_stand_beside_every_comparison() -> None:
    mine = ComparedSettings(method="ties")
    found = grid.bounded({"mine": mine})
    assert list(found) == ["base", "average", "mine"]
    assert (found["base"].method, found["base"].scale) == ("average", 0)
    own = ComparedSettings(method="average", seed=1)
    assert grid.bounded({"mine": mine, "average": own})["average"] == own, (
        "what a profile has itself is taken"
    )
