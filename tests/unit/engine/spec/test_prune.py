"""Cutting keeps, of all sets of as many nodes, the most valuable one, and the best number."""

from __future__ import annotations

from itertools import combinations

from hypothesis import given, settings
from hypothesis import strategies as st

from paceline.domain.cost import StepShape
from paceline.engine.spec.prune import prune
from paceline.engine.spec.step_times import StepTimes
from paceline.engine.spec.tree import EMPTY_TREE, ROOT, DraftTree
from tests.unit.engine.spec.simulated import COMPUTE_BOUND, MEMORY_BOUND, SMALL_CPU


@st.composite
def trees(draw: st.DrawFn) -> DraftTree:
    """A tree whose values fall along its paths."""
    parents: list[int] = []
    values: list[float] = []
    for node in range(draw(st.integers(0, 5))):
        parents.append(draw(st.integers(ROOT, node - 1)))
        above = 1.0 if parents[-1] == ROOT else values[parents[-1]]
        values.append(above * draw(st.floats(0.05, 1.0)))
    size = len(parents)
    tokens = tuple(range(size))
    also = {node: (f"also {node}",) for node in draw(st.sets(st.integers(0, 4))) if node < size}
    return DraftTree(
        tokens, tuple(parents), (0.5,) * size, tuple(values), ("any",) * size, also=also
    )


@settings(max_examples=60, deadline=None)
@given(
    drafts=st.lists(trees(), min_size=1, max_size=2),
    cost=st.sampled_from([MEMORY_BOUND, SMALL_CPU, COMPUTE_BOUND]),
    spent_s=st.sampled_from([0.0, 1e-3]),
)
def test_no_other_set_of_nodes_is_faster(
    drafts: list[DraftTree], cost: object, spent_s: float
) -> None:
    times = StepTimes(cost).of(StepShape(rows=2, attended=600))  # type: ignore[arg-type]
    values = [v for tree in drafts for v in tree.values]
    kept = prune(drafts, times, spent_s)

    def rate(chosen: tuple[float, ...]) -> float:
        return (2 + sum(chosen)) / (times.at(len(chosen)) + spent_s)

    best = max(rate(c) for n in range(len(values) + 1) for c in combinations(values, n))
    assert abs(rate(tuple(v for t in kept for v in t.values)) - best) < 1e-9 * best
    for tree, part in zip(drafts, kept, strict=True):
        # Tokens are their nodes' numbers: every path is a path of the whole tree.
        for node, token in enumerate(part.tokens):
            above = ROOT if part.parents[node] == ROOT else part.tokens[part.parents[node]]
            assert tree.parents[token] == above
            assert part.values[node] == tree.values[token]
            assert part.proposers(node) == tree.proposers(token)


def test_nothing_stays_nothing() -> None:
    times = StepTimes(SMALL_CPU).of(StepShape(rows=1, attended=10))
    assert prune([EMPTY_TREE, EMPTY_TREE], times, 1e-3) == [EMPTY_TREE] * 2
