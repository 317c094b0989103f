"""Shapes of trees: limits, order, and which nodes they choose."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paceline.engine.spec.builders import BUILDERS, Growth, Shape, beam, branching
from paceline.engine.spec.drafter import DraftBudget
from paceline.engine.spec.growth import Candidates, TreeBuilder
from paceline.engine.spec.tree import ROOT, DraftTree, Proposal
from tests.unit.engine.spec.toys import budget_of, proposal_of, random_model

VOCAB = 6


def build(
    builder: TreeBuilder, budget: DraftBudget, *, is_coupled: bool, seed: int, count: int = 4
) -> DraftTree:
    """Grow a tree of a toy draft."""
    growth = builder.start(budget, "toy")
    assert isinstance(growth, Growth)
    rng = np.random.default_rng(seed)
    levels = 0
    while frontier := growth.frontier():
        levels += 1
        growth.expand([offered(rng, is_coupled, count) for _ in frontier])
    assert levels <= budget.depth
    return growth.tree()


def offered(rng: np.random.Generator, is_coupled: bool, count: int) -> Candidates:
    probs = random_model(int(rng.integers(1000)), VOCAB)(())
    perturbed = np.log(probs) + (0.0 if is_coupled else rng.gumbel(size=VOCAB))
    order = np.argsort(-perturbed)[:count]
    tokens, confidences = tuple(order.tolist()), tuple(probs[order].tolist())
    if is_coupled:
        return Candidates(tokens, confidences)
    return Candidates(tokens, confidences, tuple(perturbed[order].tolist()), proposal_of(probs))


@settings(max_examples=200, deadline=None)
@given(
    name=st.sampled_from(sorted(BUILDERS)),
    nodes=st.integers(1, 20),
    depth=st.integers(1, 6),
    threshold=st.sampled_from([0.0, 0.05, 0.3]),
    is_coupled=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_trees_keep_to_their_budget_and_are_well_formed(
    name: str, nodes: int, depth: int, threshold: float, is_coupled: bool, seed: int
) -> None:
    budget = budget_of(nodes, depth, threshold)
    tree = build(BUILDERS[name](), budget, is_coupled=is_coupled, seed=seed)
    assert len(tree) <= nodes
    assert max(tree.depths, default=0) <= depth
    assert len(tree) > 0 or threshold > 0.0
    columns = (tree.tokens, tree.parents, tree.confidences, tree.values, tree.sources)
    assert {len(column) for column in columns} == {len(tree)}
    for node, parent in enumerate(tree.parents):
        assert parent < node
        assert 0.0 <= tree.values[node] <= (1.0 if parent == ROOT else tree.values[parent])
        if name in ("chain", "dynamic"):
            assert tree.values[node] >= threshold
    for node, siblings in tree.children().items():
        assert len({tree.tokens[s] for s in siblings}) == len(siblings)
        assert [tree.values[s] for s in siblings] == sorted(
            (tree.values[s] for s in siblings), reverse=True
        )
        if is_coupled:
            assert not tree.proposals
        else:
            assert tree.proposals[node].num_drawn == len(siblings)
            assert sum(tree.proposals[node].probs) == pytest.approx(1.0)
    assert is_coupled or tree.proposals.keys() == tree.children().keys()


@settings(max_examples=100, deadline=None)
@given(
    nodes=st.integers(1, 12),
    threshold=st.sampled_from([0.0, 0.02, 0.2]),
    is_coupled=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_dynamic_trees_are_the_most_valuable_ones(
    nodes: int, threshold: float, is_coupled: bool, seed: int
) -> None:
    """Against the heap of DySpec: pop the slot of most value, push its sibling and its child."""
    depth = 3
    table = {
        path: offered(np.random.default_rng((seed, *path)), is_coupled, 4)
        for length in range(depth)
        for path in itertools.product(range(VOCAB), repeat=length)
    }
    budget = budget_of(nodes, depth, threshold)
    growth = BUILDERS["dynamic"]().start(budget, "toy")
    assert isinstance(growth, Growth)
    paths: dict[int, tuple[int, ...]] = {ROOT: ()}
    while frontier := growth.frontier():
        growth.expand([table[paths[node]] for node in frontier])
        for node, slot in enumerate(growth.nodes):
            paths[node] = (*paths[slot.parent], slot.token)
    tree = growth.tree()
    found = {tuple(tree.tokens[n] for n in tree.path_to(node)) for node in range(len(tree))}
    assert found == by_heap(table, budget)


def by_heap(table: dict[tuple[int, ...], Candidates], budget: DraftBudget) -> set[tuple[int, ...]]:
    rate = budget.calibration.rate
    chosen: set[tuple[int, ...]] = set()
    # (value, behind: value of the parent, path of the parent, rank)
    heap = [slot_of(table, (), 1.0, 0, 1.0, rate)]
    while heap and len(chosen) < budget.nodes:
        heap.sort(key=lambda slot: -slot[0])
        value, behind, left, path, rank = heap.pop(0)
        if value < budget.threshold:
            break
        row = table[path]
        right = min(behind * rate(row.confidences[rank]), left)
        child = (*path, row.tokens[rank])
        chosen.add(child)
        if rank + 1 < len(row.tokens):
            further = left - right if row.proposal else behind
            heap.append(slot_of(table, path, behind, rank + 1, further, rate))
        if len(child) < budget.depth:
            heap.append(slot_of(table, child, right, 0, right, rate))
    return chosen


def slot_of(table, path, behind, rank, left, rate):  # type: ignore[no-untyped-def]
    row = table[path]
    value = left if row.proposal else min(behind * rate(row.confidences[rank]), left)
    return value, behind, left, path, rank


def test_a_fixed_branching_is_kept_level_by_level() -> None:
    tree = build(branching(3, 2, 1), budget_of(100, 3), is_coupled=True, seed=1)
    assert [tree.depths.count(depth) for depth in (1, 2, 3)] == [3, 6, 6]
    # Where nodes run out, the likelier parents have children.
    few = build(branching(3, 2, 1), budget_of(5, 3), is_coupled=True, seed=1)
    assert few.tokens[:3] == tree.tokens[:3]
    wanted = sorted(range(3, 9), key=lambda node: -tree.values[node])[:2]
    assert sorted(few.values[3:]) == sorted(tree.values[node] for node in wanted)


def test_a_beam_keeps_its_width() -> None:
    for is_coupled in (True, False):
        tree = build(beam(3), budget_of(9, 3), is_coupled=is_coupled, seed=4)
        assert [tree.depths.count(depth) for depth in (1, 2, 3)] == [3, 3, 3]
        assert len(build(beam(), budget_of(9, 3), is_coupled=is_coupled, seed=4)) == 9


def test_chains_end_where_they_are_not_worth_it() -> None:
    budget = budget_of(8, 8, 0.3)
    for is_coupled in (True, False):
        tree = build(BUILDERS["chain"](), budget, is_coupled=is_coupled, seed=3)
        assert tree.is_chain and 1 <= len(tree) < 8
        assert tree.values[-1] >= 0.3
    # A drawn node's value does not know its token.
    drawn = build(BUILDERS["chain"](), budget, is_coupled=False, seed=3)
    assert drawn.values[0] == 1.0


def test_confidences_count_by_what_they_have_been_worth() -> None:
    budget = budget_of(1, 1)
    for _ in range(500):
        budget.calibration.add(0.9, False)
    growth = BUILDERS["dynamic"]().start(budget, "toy")
    growth.expand([Candidates((4,), (0.9,))])
    assert growth.tree().confidences == (0.9,)
    assert growth.tree().values[0] < 0.05


def test_nodes_without_children_have_no_proposal() -> None:
    growth = Shape(Growth).growth(budget_of(2, 2), "toy")
    assert growth.tree() == DraftTree()
    chain = BUILDERS["chain"]().start(budget_of(2, 2, 0.5), "toy")
    chain.expand([Candidates((1,), (0.2,), (-1.0,), Proposal((1, 2), (0.2, 0.8), 0))])
    assert not chain.frontier(), "the token that was drawn is unlikely"
    assert chain.tree().proposals.keys() == {ROOT}
