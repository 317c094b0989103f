"""The grown tree is the best of all trees within its limits."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paceline.engine.spec.drafters.best_first import grow
from tests.unit.engine.spec.retrieval_cases import assert_well_formed, budget, paths

Known = tuple[int, ...]
RATES = st.dictionaries(
    st.lists(st.integers(0, 2), min_size=1, max_size=4).map(tuple),
    st.floats(0.0, 1.0, allow_subnormal=False),
    max_size=40,
)


@settings(deadline=None)
@given(
    rates=RATES, nodes=st.integers(1, 20), depth=st.integers(1, 4), threshold=st.floats(0.0, 0.6)
)
def test_the_most_valuable_paths_are_chosen(
    rates: dict[Known, float], nodes: int, depth: int, threshold: float
) -> None:
    def children(known: Known) -> list[tuple[int, float, float, Known]]:
        behind = [(*known, token) for token in range(3)]
        return [(path[-1], 0.5, rates[path], path) for path in behind if path in rates]

    # Longest prefix first: a path's value is the product of the rates on it.
    values: dict[Known, float] = {(): 1.0}
    for path in sorted(rates, key=len):
        if path[:-1] in values and len(path) <= depth:
            value = values[path[:-1]] * rates[path]
            if value > 0.0 and value >= threshold:
                values[path] = value
    del values[()]
    limits = budget(nodes, depth, threshold)
    root: Known = ()
    tree = grow(limits, "test", root, children)
    assert_well_formed(tree, limits)
    for path, value in zip(paths(tree), tree.values, strict=True):
        assert value == pytest.approx(values[path])
    assert sorted(tree.values) == pytest.approx(sorted(values.values())[-nodes:])
