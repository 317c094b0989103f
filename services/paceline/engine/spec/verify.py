"""Which part of a draft the target would have produced itself.

Coupled: at every node the target draws its token with the noise of that position, as it would
without a draft; a child is accepted if it is that token. Output is token for token what it is
without speculation, whatever was proposed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from paceline.engine.spec.tree import ROOT, DraftTree


@dataclass(frozen=True, slots=True)
class Verdict:
    """The accepted path and the target's own token behind it."""

    path: tuple[int, ...]
    token: int


def verify_coupled(tree: DraftTree, drawn: Sequence[int]) -> Verdict:
    """Follow the target's own draws through the tree.

    Args:
        tree: the draft.
        drawn: [1 + nodes] what the target draws behind the root and behind each node.
    """
    path: list[int] = []
    node, token = ROOT, drawn[0]
    children = tree.children()
    while True:
        child = next((c for c in children.get(node, ()) if tree.tokens[c] == token), None)
        if child is None:
            return Verdict(tuple(path), token)
        path.append(child)
        node, token = child, drawn[child + 1]
