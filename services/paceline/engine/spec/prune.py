"""Cuts the drafts of one step to the nodes that are worth their time, over all sequences.

Nodes come by falling value; with each the step brings that much more, and takes a little longer.
Kept is the number at which tokens per second are the most. Values fall along paths, so that what
is kept is closed under parents.

Which drawn nodes (trees with proposals) are computed must not depend on their tokens, and the
values behind a drawn node do. These trees stay as they were built, within a budget that was set
before; the others compete for what that leaves.
"""

from __future__ import annotations

from collections.abc import Sequence

from paceline.engine.spec.step_times import NodeCurve
from paceline.engine.spec.tree import EMPTY_TREE, ROOT, DraftTree


def prune(trees: Sequence[DraftTree], times: NodeCurve, spent_s: float) -> list[DraftTree]:
    """Return the trees without what is not worth it.

    Args:
        trees: drafts of a step.
        times: seconds of the step by the number of nodes.
        spent_s: seconds that went into drafting.
    """
    ranked = sorted(
        (-value, i, node)
        for i, tree in enumerate(trees)
        if not tree.proposals
        for node, value in enumerate(tree.values)
    )
    if not ranked:
        return list(trees)
    drawn = [tree for tree in trees if tree.proposals]
    num_drawn = sum(map(len, drawn))
    expected = times.rows + sum(sum(tree.values) for tree in drawn)
    count, best = 0, expected / (times.at(num_drawn) + spent_s)
    for num, (negated, _, _) in enumerate(ranked, 1):
        expected -= negated
        rate = expected / (times.at(num_drawn + num) + spent_s)
        if rate > best:
            count, best = num, rate
    if count == len(ranked):
        return list(trees)
    kept: list[set[int]] = [set() for _ in trees]
    for _, i, node in ranked[:count]:
        kept[i].add(node)
    return [
        tree if tree.proposals else _part(tree, nodes)
        for tree, nodes in zip(trees, kept, strict=True)
    ]


def _part(tree: DraftTree, kept: set[int]) -> DraftTree:
    """Return the tree of some nodes; those whose parent is not among them fall away."""
    if len(kept) == len(tree):
        return tree
    if not kept:
        return EMPTY_TREE
    place = {ROOT: ROOT}
    for node, parent in enumerate(tree.parents):
        if node in kept and parent in place:
            place[node] = len(place) - 1
    nodes = [node for node in place if node != ROOT]
    return DraftTree(
        tokens=tuple([tree.tokens[n] for n in nodes]),
        parents=tuple([place[tree.parents[n]] for n in nodes]),
        confidences=tuple([tree.confidences[n] for n in nodes]),
        values=tuple([tree.values[n] for n in nodes]),
        sources=tuple([tree.sources[n] for n in nodes]),
        also={place[n]: names for n, names in tree.also.items() if n in place},
    )
