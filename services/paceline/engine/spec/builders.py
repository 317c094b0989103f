"""Shapes of draft trees: which candidates become nodes, level by level.

    chain     the first candidate only, as long as it is worth it
    static    a fixed number of children per node and level
    dynamic   the nodes of most value, wherever they are (DySpec, arXiv 2410.11744, section 4)
    rsd-c     a fixed number of draws per node and level (RSD, arXiv 2402.14160)
    rsd-s     the draws of a stochastic beam (RSD; Kool et al. 2019, arXiv 1903.06059)
    auto      chains for greedy sequences, dynamic for others

Drawn candidates must not be dropped for the token they brought: every choice is made by values
known before the draw (`Slot.value`), or by the noise of the draw, and siblings kept are the
first of their parent. Guesses (coupled drafts) may be chosen by anything.
A new shape is a class here and a line in BUILDERS.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from types import MappingProxyType
from typing import NamedTuple

from paceline.engine.spec.drafter import DraftBudget
from paceline.engine.spec.growth import Candidates, TreeBuilder, TreeGrowth
from paceline.engine.spec.tree import ROOT, DraftTree, Proposal


class Slot(NamedTuple):
    """A place for a node, with the candidate that would take it.

    Hundreds are made in a round: a dataclass that is frozen takes twice as long.
    """

    token: int
    parent: int
    confidence: float
    value: float
    """As in `DraftTree.values`. Never more than the parent's `value_behind` or the value of the
    sibling before."""
    value_behind: float
    """Probability that the node and all in front of it are accepted; at most `value`."""
    draw: float
    """The candidate's perturbed log-probability, -inf if it was not drawn."""


class Growth:
    """What the shapes share: the nodes so far, and the level whose candidates are wanted."""

    def __init__(self, budget: DraftBudget, source: str) -> None:
        self.budget = budget
        self.nodes: list[Slot] = []
        self._source = source
        self._proposals: dict[int, Proposal] = {}
        self._frontier: Sequence[int] = (ROOT,)
        self._depth = 0

    @property
    def level(self) -> int:
        """Number of tokens from the root to the frontier's nodes."""
        return self._depth

    def frontier(self) -> Sequence[int]:
        """Return the nodes (ROOT first) behind which candidates are wanted; empty ends it."""
        return self._frontier

    def expand(self, candidates: Sequence[Candidates]) -> None:
        """Take the candidates behind each node of the frontier, in its order."""
        slots: list[list[Slot]] = []
        least, most = self._least_value(), self._most_children()
        for node, offered in zip(self._frontier, candidates, strict=True):
            slots.append(self._slots(node, offered, least, most))
            if offered.proposal is not None:
                self._proposals[node] = offered.proposal
        first = len(self.nodes)
        self.nodes += self._choose(slots)
        self._depth += 1
        self._frontier = ()
        if self._depth < self.budget.depth:
            self._frontier = self._promising(range(first, len(self.nodes)))

    def tree(self) -> DraftTree:
        """Return what has grown."""
        kept = self._kept()
        place = {ROOT: ROOT, **{node: i for i, node in enumerate(kept)}}
        slots = [self.nodes[node] for node in kept]
        parents = [slot.parent for slot in slots]
        return DraftTree(
            tokens=tuple(slot.token for slot in slots),
            parents=tuple(place[parent] for parent in parents),
            confidences=tuple(slot.confidence for slot in slots),
            values=tuple(slot.value for slot in slots),
            sources=(self._source,) * len(slots),
            proposals={
                place[node]: replace(self._proposals[node], num_drawn=parents.count(node))
                for node in dict.fromkeys(parents)
                if node in self._proposals
            },
        )

    def _slots(self, node: int, offered: Candidates, least: float, most: int) -> list[Slot]:
        """Return the first `most` places under a node, those that are worth at least so much.

        What is left of its value after the draws before is the value of the next draw: in
        DySpec's words v (1 - R[y]), with R what the draws before left of the proposal.
        """
        behind = 1.0 if node == ROOT else self.nodes[node].value_behind
        slots: list[Slot] = []
        if behind < least:
            return slots
        rate, is_drawn = self.budget.calibration.rate, offered.proposal is not None
        draws = offered.draws or (-math.inf,) * len(offered.tokens)
        left = behind
        places = zip(offered.tokens, offered.confidences, draws, strict=True)
        for token, confidence, draw in islice(places, most):
            right = behind * rate(confidence)
            if is_drawn:
                if left < least:
                    break
                right = min(right, left)
                slots.append(Slot(token, node, confidence, left, right, draw))
                left -= right
            elif right >= least:
                slots.append(Slot(token, node, confidence, right, right, draw))
        return slots

    def _least_value(self) -> float:
        """Return what a place must be worth to be filled."""
        return -math.inf

    def _most_children(self) -> int:
        """Return how many places under a node may be filled, the first ones."""
        return self.budget.nodes

    def _choose(self, slots: list[list[Slot]]) -> list[Slot]:
        """Return the places to fill, given those under each node of the frontier."""
        raise NotImplementedError

    def _promising(self, nodes: Sequence[int]) -> Sequence[int]:
        """Return those of the new nodes behind which candidates are wanted."""
        return nodes if len(self.nodes) < self.budget.nodes else ()

    def _kept(self) -> Sequence[int]:
        """Return the nodes of the final tree, in order."""
        return range(len(self.nodes))


class ChainGrowth(Growth):
    """One path."""

    def _choose(self, slots: list[list[Slot]]) -> list[Slot]:
        return slots[0]

    def _least_value(self) -> float:
        return self.budget.threshold

    def _most_children(self) -> int:
        return 1

    def _promising(self, nodes: Sequence[int]) -> Sequence[int]:
        threshold = self.budget.threshold
        return [n for n in super()._promising(nodes) if self.nodes[n].value_behind >= threshold]


class BranchingGrowth(Growth):
    """So many children per node, by level; where nodes run out, those of most value."""

    def __init__(self, budget: DraftBudget, source: str, branching: Sequence[int]) -> None:
        super().__init__(budget, source)
        self._branching = branching

    def _choose(self, slots: list[list[Slot]]) -> list[Slot]:
        wanted = [slot for siblings in slots for slot in siblings]
        values = [slot.value for slot in wanted]
        return [wanted[i] for i in _largest(values, self.budget.nodes - len(self.nodes))]

    def _most_children(self) -> int:
        return self._branching[min(self.level, len(self._branching) - 1)]


class DynamicGrowth(Growth):
    """The nodes of most value of all levels.

    A place that falls out again takes those behind it along, as they are worth no more; so no
    choice depends on the token of the place it is about.
    """

    def _choose(self, slots: list[list[Slot]]) -> list[Slot]:
        wanted = [slot for siblings in slots for slot in siblings]
        values = [slot.value for slot in (*self.nodes, *wanted)]
        first = len(self.nodes)
        return [wanted[i - first] for i in _largest(values, self.budget.nodes) if i >= first]

    def _promising(self, nodes: Sequence[int]) -> Sequence[int]:
        kept, least = set(self._kept()), self._least_value()
        return [n for n in nodes if n in kept and self.nodes[n].value_behind >= least]

    def _least_value(self) -> float:
        threshold, count = self.budget.threshold, self.budget.nodes
        if len(self.nodes) < count:
            return threshold
        # Only what is worth more finds a place: of equals the first ones are kept.
        border = heapq.nlargest(count, [slot.value for slot in self.nodes])[-1]
        return math.nextafter(max(threshold, border), math.inf)

    def _kept(self) -> Sequence[int]:
        return _largest([slot.value for slot in self.nodes], self.budget.nodes)


class BeamGrowth(Growth):
    """The largest perturbed log-probabilities of each level; of guesses the most valuable ones.

    With phi the log-probability of a path and g = phi + Gumbel its perturbed one, children's g
    are conditioned so that their largest is their parent's: G = -log(exp(-G_parent) - exp(-Z)
    + exp(-g)) with Z the largest g. They fall as the draws do, so the first draws are kept.
    """

    def __init__(self, budget: DraftBudget, source: str, width: int | None) -> None:
        super().__init__(budget, source)
        self._width = width or max(1, budget.nodes // budget.depth)
        self._phi = {ROOT: 0.0}
        self._perturbed = {ROOT: math.inf}

    def _choose(self, slots: list[list[Slot]]) -> list[Slot]:
        offered = [slot for siblings in slots for slot in siblings]
        scores = [score for siblings in slots for score in self._scores(siblings)]
        count = min(self._width, self.budget.nodes - len(self.nodes))
        chosen = _largest(scores, count)
        for node, i in enumerate(chosen, start=len(self.nodes)):
            phi = self._phi[offered[i].parent]
            self._phi[node] = phi + math.log(max(offered[i].confidence, 1e-300))
            self._perturbed[node] = scores[i]
        return [offered[i] for i in chosen]

    def _scores(self, siblings: Sequence[Slot]) -> list[float]:
        if not siblings or siblings[0].draw == -math.inf:
            return [slot.value for slot in siblings]
        parent = siblings[0].parent
        gumbels = [self._phi[parent] + slot.draw for slot in siblings]
        return [_conditioned(g, gumbels[0], self._perturbed[parent]) for g in gumbels]


def _conditioned(gumbel: float, largest: float, bound: float) -> float:
    """Return `gumbel` moved so that `largest` would be at `bound` (Kool et al., appendix B.3)."""
    if bound == math.inf:
        return gumbel
    if gumbel >= largest:
        return bound
    shift = bound - gumbel + math.log(-math.expm1(gumbel - largest))
    return bound - max(shift, 0.0) - math.log1p(math.exp(-abs(shift)))


def _largest(values: Sequence[float], count: int) -> list[int]:
    """Return the places of the `count` largest values, the first ones of equals, in order."""
    falling = sorted(range(len(values)), key=values.__getitem__, reverse=True)
    return sorted(falling[:count])


@dataclass(frozen=True, slots=True)
class Shape:
    """A builder: how its trees grow."""

    growth: Callable[[DraftBudget, str], Growth]

    def start(self, budget: DraftBudget, source: str, *, is_greedy: bool = False) -> Growth:
        """Begin a tree whose nodes come from the drafter named `source`."""
        del is_greedy
        return self.growth(budget, source)


@dataclass(frozen=True, slots=True)
class BySampling:
    """One builder for greedy sequences, another for those that are drawn with noise.

    Noise makes the second-likeliest token right more often, so that branches pay; a chain asks the
    model for one token per level.
    """

    greedy: TreeBuilder
    drawn: TreeBuilder

    def start(self, budget: DraftBudget, source: str, *, is_greedy: bool = False) -> TreeGrowth:
        """Begin a tree whose nodes come from the drafter named `source`."""
        builder = self.greedy if is_greedy else self.drawn
        return builder.start(budget, source, is_greedy=is_greedy)


def branching(*counts: int) -> Shape:
    """Build so many children per node at the root, the first level, ...; the last goes on."""
    return Shape(partial(BranchingGrowth, branching=counts))


def beam(width: int | None = None) -> Shape:
    """Build `width` nodes per level; None for as many as use the budget up at its depth."""
    return Shape(partial(BeamGrowth, width=width))


BUILDERS: Mapping[str, Callable[[], TreeBuilder]] = MappingProxyType(
    {
        "auto": lambda: BySampling(Shape(ChainGrowth), Shape(DynamicGrowth)),
        "chain": lambda: Shape(ChainGrowth),
        "static": lambda: branching(4, 2, 1),
        "dynamic": lambda: Shape(DynamicGrowth),
        "rsd-c": lambda: branching(2),
        "rsd-s": beam,
    }
)
