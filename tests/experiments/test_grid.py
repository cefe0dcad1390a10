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
    methods = grid.bounded({"mine": mine})
    assert list(methods) == ["base", "average", "mine"]
    assert (methods["base"].method, methods["base"].scale) == ("average", 0)
    own = ComparedSettings(method="average", seed=1)
    assert grid.bounded({"mine": mine, "average": own})["average"] == own, (
        "what a profile has itself is taken"
    )
