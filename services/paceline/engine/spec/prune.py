"""Cuts the drafts of one step to the nodes that are worth their time, over all sequences.

Nodes come by falling value; with each the step brings that much more, and takes a little longer.
Kept is the number at which tokens per second are the most. Values fall along paths and, among
drawn siblings, along draws, and are known before a draw brings its token: cutting by them keeps
every tree exact (see `DraftTree.values`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from paceline.engine.spec.step_times import NodeCurve
from paceline.engine.spec.tree import EMPTY_TREE, ROOT, DraftTree


def prune(
    trees: Sequence[DraftTree], times: NodeCurve, spent_s: float, *, least: int = 0
) -> list[DraftTree]:
    """Return the trees without what is not worth it.

    Args:
        trees: drafts of a step.
        times: seconds of the step by the number of nodes.
        spent_s: seconds that went into drafting.
        least: nodes that are kept in any case, as far as there are as many.
    """
    ranked = sorted(
        (-value, i, node) for i, tree in enumerate(trees) for node, value in enumerate(tree.values)
    )
    if not ranked:
        return list(trees)
    expected = float(times.rows)
    count, best = 0, expected / (times.at(0) + spent_s)
    for num, (negated, _, _) in enumerate(ranked, 1):
        expected -= negated
        rate = expected / (times.at(num) + spent_s)
        if rate > best or num <= least:
            count, best = num, max(rate, best)
    if count == len(ranked):
        return list(trees)
    kept: list[set[int]] = [set() for _ in trees]
    for _, i, node in ranked[:count]:
        kept[i].add(node)
    return [_part(tree, nodes) for tree, nodes in zip(trees, kept, strict=True)]


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
    drawn = {parent: children for parent, children in tree.children().items()}
    return DraftTree(
        tokens=tuple([tree.tokens[n] for n in nodes]),
        parents=tuple([place[tree.parents[n]] for n in nodes]),
        confidences=tuple([tree.confidences[n] for n in nodes]),
        values=tuple([tree.values[n] for n in nodes]),
        sources=tuple([tree.sources[n] for n in nodes]),
        proposals={
            place[parent]: replace(
                proposal,
                num_drawn=sum(n in place for n in drawn[parent][: proposal.num_drawn]),
            )
            for parent, proposal in tree.proposals.items()
            if parent in place and parent in drawn
        },
    )
