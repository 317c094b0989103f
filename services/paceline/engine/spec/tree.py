"""A draft: tokens that may follow a sequence, as a tree under its last token.

Node i hangs under node `parents[i]`, or under the root (-1), the sequence's last token. Parents
come before their children. Siblings are tried in the order of their indices.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

ROOT = -1


@dataclass(frozen=True, slots=True)
class Proposal:
    """The distribution that some children of a node were drawn from, without replacement.

    The verifier needs exactly the one that was used: after temperature, truncation and
    whatever else. Tokens that are not named have probability 0. All that are named lie in the
    target's vocabulary.
    """

    tokens: tuple[int, ...]
    probs: tuple[float, ...]
    """Sum to 1."""
    num_drawn: int
    """How many children, the first ones in order, were drawn; later ones are point masses."""


@dataclass(frozen=True, slots=True)
class DraftTree:
    """Proposed tokens; all tuples have one entry per node."""

    tokens: tuple[int, ...] = ()
    parents: tuple[int, ...] = ()
    confidences: tuple[float, ...] = ()
    """The drafter's own probability that a node is right, given that its parent is; in [0, 1]."""
    values: tuple[float, ...] = ()
    """Estimated probability that a node and all in front of it are accepted; of a drawn node,
    that its turn comes: that all in front of it and none of its elder siblings are accepted.
    This is known before its token is drawn, so a tree may be cut to its nodes of most value, a
    drawn node before what hangs under it and before its younger siblings where values tie.
    Cutting drawn nodes by anything that knows their tokens would change the output."""
    sources: tuple[str, ...] = ()
    """Name of the drafter that proposed a node."""
    proposals: Mapping[int, Proposal] = field(default_factory=dict)
    """By parent; children of other parents are all point masses (retrieved, best-of, greedy).
    A point mass is a token that was chosen knowing at most the tokens of its elder siblings."""
    also: Mapping[int, tuple[str, ...]] = field(default_factory=dict)
    """By node, further drafters that proposed it too."""

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def depths(self) -> list[int]:
        """Number of tokens from the root to each node: 1 for the root's children."""
        depths: list[int] = []
        for parent in self.parents:
            depths.append(1 if parent == ROOT else depths[parent] + 1)
        return depths

    def proposers(self, node: int) -> tuple[str, ...]:
        """Return the names of all drafters that proposed a node."""
        return (self.sources[node], *self.also.get(node, ()))

    @property
    def is_chain(self) -> bool:
        """Whether every node hangs under the one before it."""
        return all(parent == i - 1 for i, parent in enumerate(self.parents))

    def children(self) -> dict[int, list[int]]:
        """Return the children of every node that has some, in the order they are tried."""
        children: dict[int, list[int]] = {}
        for node, parent in enumerate(self.parents):
            children.setdefault(parent, []).append(node)
        return children

    def path_to(self, node: int) -> list[int]:
        """Return the nodes from the root's child down to `node`; empty for the root."""
        path: list[int] = []
        while node != ROOT:
            path.append(node)
            node = self.parents[node]
        return path[::-1]


EMPTY_TREE = DraftTree()
