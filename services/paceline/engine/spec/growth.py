"""The contract of tree builders: how a drafting model's tree grows, level by level.

    growth = builder.start(budget, source)
    while nodes := growth.frontier():
        growth.expand([what the model says behind each of the nodes])
    tree = growth.tree()

A drafter runs its model once per level for the frontiers of all its sequences (model.py);
the shapes are in builders.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from paceline.engine.spec.drafter import DraftBudget
from paceline.engine.spec.tree import DraftTree, Proposal


@dataclass(frozen=True, slots=True)
class Candidates:
    """Possible children of one node, in the order in which they are to be tried.

    Coupled: the tokens that the draft would draw with the noise of that position, likeliest
    first. Recursive rejection: tokens drawn from the draft without replacement, in draw order.
    """

    tokens: tuple[int, ...]
    confidences: tuple[float, ...]
    """The draft's probability that the target's token is this one, given that the node is
    right. With a proposal that is the token's probability in it."""
    draws: tuple[float, ...] = ()
    """Perturbed log-probabilities (log q + Gumbel) of the tokens, falling; for stochastic beams.
    Empty for coupled drafts."""
    proposal: Proposal | None = None
    """The distribution the tokens were drawn from (recursive rejection only); `num_drawn` is
    set by the builder to what it kept."""


class GrownNode(Protocol):
    """A node of a tree that grows."""

    @property
    def token(self) -> int:
        """Its token."""
        ...

    @property
    def parent(self) -> int:
        """Its parent, ROOT for the root's children."""
        ...


class TreeGrowth(Protocol):
    """One tree while it grows."""

    @property
    def nodes(self) -> Sequence[GrownNode]:
        """All nodes so far; their places are the numbers of `frontier`, `tree` has its own."""
        ...

    def frontier(self) -> Sequence[int]:
        """Return the nodes (ROOT first) behind which candidates are wanted; empty ends it."""
        ...

    def expand(self, candidates: Sequence[Candidates]) -> None:
        """Take the candidates behind each node of the frontier, in its order."""
        ...

    def tree(self) -> DraftTree:
        """Return what has grown."""
        ...


class TreeBuilder(Protocol):
    """A shape of trees."""

    def start(self, budget: DraftBudget, source: str, *, is_greedy: bool = False) -> TreeGrowth:
        """Begin a tree whose nodes come from the drafter named `source`, for a sequence that is
        drawn from with or without noise."""
        ...
