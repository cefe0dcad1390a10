"""The sets of experts that a comparison merges, and its bounds."""

from fmn.experiments import grid


def test_pairs_triples_and_all_without_doubles() -> None:
    assert list(grid.sets(["a", "b", "c"], ["pairs", "triples", "all"])) == [
        "a+b",
        "a+c",
        "b+c",
        "a+b+c",
    ]
    assert grid.sets(["a", "b"], ["all", "pairs"]) == {"a+b": ("a", "b")}
    assert list(grid.sets(["a", "b", "c"], ["all", "c+b"])) == ["c+b", "a+b+c"]


def test_the_bounds_are_the_base_and_the_plain_average() -> None:
    bounds = {name: (each.method, each.scale) for name, each in grid.BOUNDS.items()}
    assert bounds == {"base": ("average", 0), "average": ("average", "auto")}
