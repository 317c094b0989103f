"""Grows a draft tree from looked-up continuations, most valuable node first.

trie.py and recycling.py say what may follow a node and how sure that is; this file decides
which of it is worth a place. All nodes are point masses.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from heapq import heappop, heappush
from typing import TypeVar

from paceline.engine.spec.drafter import DraftBudget
from paceline.engine.spec.tree import EMPTY_TREE, ROOT, DraftTree

State = TypeVar("State")


def grow(
    budget: DraftBudget,
    source: str,
    root: State,
    children: Callable[[State], Iterable[tuple[int, float, float, State]]],
) -> DraftTree:
    """Return the most valuable tree within the budget.

    A value is the product of the rates from the root; as no rate is above 1, taking the best
    open node each time is optimal.

    Args:
        budget: nodes, depth and the least value.
        source: name of the drafter.
        root: what the drafter knows at the sequence's last token.
        children: from what is known at a node to (token, confidence, rate, what is known
            there) of each child, tokens distinct; rate is the calibrated confidence.
    """
    threshold, depth_limit, room = budget.threshold, budget.depth, budget.nodes
    tokens: list[int] = []
    parents: list[int] = []
    confidences: list[float] = []
    values: list[float] = []
    # (-value, tie-break, parent, depth, token, confidence, state)
    heap: list[tuple[float, int, int, int, int, float, State]] = []
    num_seen = 0
    node, depth, value, state = ROOT, 0, 1.0, root
    while True:
        if depth < depth_limit:
            for token, confidence, rate, known in children(state):
                worth = value * rate
                if worth > 0.0 and worth >= threshold:
                    num_seen += 1
                    heappush(heap, (-worth, num_seen, node, depth + 1, token, confidence, known))
        if not heap or len(tokens) == room:
            break
        negated, _, parent, depth, token, confidence, state = heappop(heap)
        node, value = len(tokens), -negated
        tokens.append(token)
        parents.append(parent)
        confidences.append(confidence)
        values.append(value)
    if not tokens:
        return EMPTY_TREE
    return DraftTree(
        tuple(tokens),
        tuple(parents),
        tuple(confidences),
        tuple(values),
        (source,) * len(tokens),
    )
