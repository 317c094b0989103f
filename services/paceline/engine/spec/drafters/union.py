"""Merges the trees of several drafters into one (RASD, arXiv 2503.03434).

A path of a later tree is inserted behind the longest prefix of it that is there already. What
an edge is worth is the largest of what its proposers say (value of the node over that of its
parent), where siblings leave each other no more than 1 together, and a node's value is the product
along its path. The largest and not a noisy-or: the proposers learnt from the same text, so that
their agreeing is little further evidence, while any of them may know better than the others. A node
that several propose stays the first's, with its confidence: that is whose calibration learns what
became of it. `DraftTree.also` names the others.

Drawn children (recursive rejection) stay exact under three rules.
 1. Draws are kept of one tree only, the first that has some; it is inserted first, so that its
    draws come before other children of their parent and alone decide where those hang. Draws
    of other trees become point masses, as any token may that was chosen without the target.
 2. Which draws are kept is decided before trees are merged: whether a draw equals what another
    tree proposes must not save it, for then its token would have decided. Their values do not
    rise by agreement either.
 3. Of the draws behind a node the first ones are kept; `num_drawn` says how many.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from paceline.engine.spec.drafter import DraftBudget, DraftContext, Drafter, DrafterNeeds, Round
from paceline.engine.spec.tree import EMPTY_TREE, ROOT, DraftTree, Proposal


class UnionDrafter:
    """Drafts what its parts draft, merged."""

    def __init__(self, parts: Sequence[Drafter], is_owner: bool = True) -> None:
        """Join drafters.

        Args:
            parts: the first is asked first; sources of equal nodes go by this order.
            is_owner: whether the parts hear of steps and ends through the union only. False if
                they also draft on their own and are told already.
        """
        self._parts = tuple(parts)
        self._is_owner = is_owner

    @property
    def name(self) -> str:
        """Names of the parts, joined with "+"."""
        return "+".join(part.name for part in self._parts)

    @property
    def version(self) -> str:
        """Versions of the parts that have one, joined with "+"."""
        return "+".join(part.version for part in self._parts if part.version)

    @property
    def needs(self) -> DrafterNeeds:
        """What any of the parts needs."""
        needs = [part.needs for part in self._parts]
        return DrafterNeeds(max(n.successors for n in needs), any(n.hidden for n in needs))

    @property
    def state_bytes(self) -> int:
        """Memory of what the parts keep."""
        return sum(part.state_bytes for part in self._parts)

    @property
    def state_entries(self) -> int:
        """What the parts keep, each counted its own way."""
        return sum(part.state_entries for part in self._parts)

    def propose(
        self, contexts: Sequence[DraftContext], budgets: Sequence[DraftBudget]
    ) -> list[DraftTree]:
        """Let every part use the whole budget, and keep the best of it all."""
        proposed = [
            part.propose(contexts, [budget.part(part.name) for budget in budgets])
            for part in self._parts
        ]
        return [
            merge(trees, budget)
            for trees, budget in zip(zip(*proposed, strict=True), budgets, strict=True)
        ]

    def observe(self, rounds: Sequence[Round]) -> None:
        """Let every part learn from every step, whoever proposed."""
        if self._is_owner:
            for part in self._parts:
                part.observe(rounds)

    def forget(self, sequence_id: int) -> None:
        """Pass it on."""
        if self._is_owner:
            for part in self._parts:
                part.forget(sequence_id)


def merge(trees: Sequence[DraftTree], budget: DraftBudget) -> DraftTree:
    """Return the best nodes of all trees as one, at most `budget.nodes`, closed under parents.

    Nodes come level by level, siblings as they are to be tried: draws, then falling values. The
    only tree with nodes is returned as it is, if it fits.
    Trees with proposals must come from their drafter as they are: in one that was merged before,
    rule 2 can no longer be kept.
    """
    some = [tree for tree in trees if len(tree)]
    if not some:
        return EMPTY_TREE
    if len(some) == 1 and len(some[0]) <= budget.nodes:
        return some[0]
    drawing = next((tree for tree in some if tree.proposals), None)
    union = _Union()
    if drawing is not None:
        some = [drawing, *(tree for tree in some if tree is not drawing)]
        union.insert_drawn(drawing, _kept(some, budget.nodes))
    for tree in some:
        if tree is not drawing:
            union.insert(tree)
    return union.best(budget)


def _drawn(tree: DraftTree) -> set[int]:
    """Return the nodes that were drawn from a proposal."""
    children = tree.children()
    return {
        node
        for parent, proposal in tree.proposals.items()
        for node in children.get(parent, ())[: proposal.num_drawn]
    }


def _kept(trees: Sequence[DraftTree], num_nodes: int) -> set[int]:
    """Return the drawn nodes of the first tree that are among the best of all, not merged.

    Values are made to fall along draws and paths, which closes what is kept under both.
    """
    first = trees[0]
    drawn = _drawn(first)
    values = list(first.values)
    before: dict[int, float] = {}
    for node, parent in enumerate(first.parents):
        above = 1.0 if parent == ROOT else values[parent]
        if node in drawn:
            above = min(above, before.get(parent, 1.0))
            before[parent] = min(above, values[node])
        values[node] = min(above, values[node])
    ranked = [(-value, 0, node) for node, value in enumerate(values)]
    for i, tree in enumerate(trees[1:], 1):
        ranked += [(-value, i, node) for node, value in enumerate(tree.values)]
    return {node for _, i, node in sorted(ranked)[:num_nodes] if i == 0} & drawn


class _Union:
    """Merged nodes; parents come before their children."""

    def __init__(self) -> None:
        self._tokens: list[int] = []
        self._parents: list[int] = []
        self._edges: list[float] = []
        self._confidences: list[float] = []
        self._sources: list[str] = []
        self._also: dict[int, tuple[str, ...]] = {}
        self._places: dict[tuple[int, int], int] = {}
        self._drawn: dict[int, float] = {}
        """Value by drawn node."""
        self._proposals: dict[int, Proposal] = {}

    def insert(self, tree: DraftTree) -> None:
        """Add all nodes as point masses."""
        places = {ROOT: ROOT}
        for node in range(len(tree)):
            places[node] = self._add(places[tree.parents[node]], tree, node)

    def insert_drawn(self, tree: DraftTree, kept: set[int]) -> None:
        """Add the tree whose draws stay draws, without those not kept and what is behind them."""
        drawn = _drawn(tree)
        places = {ROOT: ROOT}
        for node, parent in enumerate(tree.parents):
            if parent not in places or (node in drawn and node not in kept):
                continue
            place = places[node] = self._add(places[parent], tree, node)
            if node in drawn:
                self._drawn[place] = tree.values[node]
                proposal = self._proposals.get(places[parent])
                num_before = proposal.num_drawn if proposal is not None else 0
                self._proposals[places[parent]] = replace(
                    tree.proposals[parent], num_drawn=num_before + 1
                )

    def best(self, budget: DraftBudget) -> DraftTree:
        """Return the kept draws with the most valuable other nodes."""
        edges = self._edges if self._drawn else self._exclusive()
        values: list[float] = []
        for node, parent in enumerate(self._parents):
            above = 1.0 if parent == ROOT else values[parent]
            values.append(self._drawn.get(node, above * edges[node]))
        chosen: set[int] = set()
        for node in self._drawn:
            while node != ROOT and node not in chosen:
                chosen.add(node)
                node = self._parents[node]
        others = (n for n in range(len(values)) if n not in chosen)
        # Values fall along paths and the sort is stable: parents are chosen before children.
        for node in sorted(others, key=lambda n: -values[n]):
            if len(chosen) == budget.nodes or values[node] < budget.threshold:
                break
            chosen.add(node)
        return self._tree(self._ordered(chosen, values), values)

    def _exclusive(self) -> list[float]:
        """Return the edges, made to leave siblings no more than 1 together.

        One of them at most is right, and each drafter spoke without knowing the others.
        """
        edges = list(self._edges)
        left: dict[int, float] = {}
        for node in sorted(range(len(edges)), key=lambda n: -edges[n]):
            parent = self._parents[node]
            edges[node] = min(edges[node], left.get(parent, 1.0))
            left[parent] = left.get(parent, 1.0) - edges[node]
        return edges

    def _add(self, parent: int, tree: DraftTree, node: int) -> int:
        """Return the place of a node, a new one unless its path is there."""
        above = 1.0 if tree.parents[node] == ROOT else tree.values[tree.parents[node]]
        edge = min(1.0, tree.values[node] / above) if above > 0.0 else 0.0
        place = self._places.setdefault((parent, tree.tokens[node]), len(self._tokens))
        if place < len(self._tokens):
            self._edges[place] = max(self._edges[place], edge)
            self._also[place] = (*self._also.get(place, ()), *tree.proposers(node))
            return place
        self._tokens.append(tree.tokens[node])
        self._parents.append(parent)
        self._edges.append(edge)
        self._confidences.append(tree.confidences[node])
        self._sources.append(tree.sources[node])
        return place

    def _ordered(self, chosen: set[int], values: list[float]) -> list[int]:
        children: dict[int, list[int]] = {}
        for node in sorted(chosen, key=lambda n: (n not in self._drawn, -values[n], n)):
            children.setdefault(self._parents[node], []).append(node)
        order: list[int] = []
        level = children.get(ROOT, [])
        while level:
            order += level
            level = [child for node in level for child in children.get(node, ())]
        return order

    def _tree(self, order: list[int], values: list[float]) -> DraftTree:
        index = {node: i for i, node in enumerate(order)} | {ROOT: ROOT}
        return DraftTree(
            tokens=tuple(self._tokens[n] for n in order),
            parents=tuple(index[self._parents[n]] for n in order),
            confidences=tuple(self._confidences[n] for n in order),
            values=tuple(values[n] for n in order),
            sources=tuple(self._sources[n] for n in order),
            proposals={index[n]: p for n, p in self._proposals.items()},
            also={index[n]: names for n, names in self._also.items() if n in index},
        )
