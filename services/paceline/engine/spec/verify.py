"""Which part of a draft the target would have produced itself.

Coupled: at every node the target draws its token with the noise of that position, as it would
without a draft; a child is accepted if it is that token. Output is token for token what it is
without speculation, whatever was proposed.

Recursive rejection: children are accepted or refused one after the other so that the output
has the target's distribution (RSD, arXiv 2402.14160; DySpec, arXiv 2410.11744). It accepts a
drawn chain with probability 1 - d, d the total variation between draft and target, where
coupled drafts reach between (1 - d) / (1 + d) and that; but tokens depend on the draft.
Shape legend: V vocabulary, K tokens of a proposal or draws at a node, P positions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from paceline.engine.spec.tree import ROOT, DraftTree, Proposal

Floats = npt.NDArray[np.float64]


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


def verify_rejection(
    tree: DraftTree, target: Callable[[int], Floats], uniforms_PK: Floats
) -> Verdict:
    """Accept children so that the emitted tokens are distributed as the target's.

    Args:
        tree: the draft; its drawn children were drawn from its proposals without replacement.
        target: gives the target's probabilities [V] behind a node; asked for the nodes of the
            accepted path and the root only.
        uniforms_PK: [1 + depth, 1 + most children of a node] in (0, 1), independent of each
            other and of the draft (`sampling.noise.verifier_uniforms`).

    Raises:
        ValueError: a row on the way has no distribution (NaN).
    """
    path: list[int] = []
    node = ROOT
    children = tree.children()
    while True:
        siblings = children.get(node, ())
        uniforms_K = uniforms_PK[len(path)]
        residual = Residual(target(node), tree.proposals.get(node))
        for child, uniform in zip(siblings, uniforms_K, strict=False):
            token = tree.tokens[child]
            if uniform < residual.acceptance(token) or not residual.refuse(token):
                break
        else:
            return Verdict(tuple(path), residual.draw(uniforms_K[len(siblings)]))
        path.append(child)
        node = child


class Residual:
    """What the next token is drawn from, given that all children tried so far were refused.

    A drawn child y is accepted with probability min(1, R[y] / D[y]), with R what is left of
    the target's distribution and D of the proposal. Refused, it leaves R = max(R - D, 0) and D
    without y, both normalised. A point mass is accepted with probability R[y] and else taken
    out of R. By induction over the children the token is distributed as R, whatever D is.
    """

    def __init__(self, target_V: Floats, proposal: Proposal | None) -> None:
        # Neither sums to 1 later on: their sums are kept beside them.
        self._left_V = target_V.copy()
        self._left = float(target_V.sum())
        if not self._left > 0.0:
            raise ValueError("the target has no distribution at a node")
        self._num_drawn = proposal.num_drawn if proposal else 0
        self._tokens_K = np.array(proposal.tokens if proposal else (), dtype=np.int64)
        self._drawn_K = np.array(proposal.probs if proposal else (), dtype=np.float64)
        self._drawn = float(self._drawn_K.sum())

    @property
    def probs_V(self) -> Floats:
        """The distribution that is left."""
        return self._left_V / self._left

    def acceptance(self, token: int) -> float:
        """Return the probability with which the next child is to be accepted."""
        ratio = float(self._left_V[token]) / self._left
        drawn = self._probability_of_draw(token)
        return ratio if drawn is None else min(1.0, ratio / drawn)

    def refuse(self, token: int) -> bool:
        """Take the child out, or return False where nothing would be left.

        That can only be rounding: what is left is then the proposal, or the point mass itself,
        and the child was to be accepted for certain.
        """
        drawn = self._probability_of_draw(token)
        self._num_drawn = max(self._num_drawn - 1, 0)
        if drawn is None:
            self._left_V[token] = 0.0
        else:
            share_K = self._drawn_K * (self._left / self._drawn)
            self._left_V[self._tokens_K] = np.maximum(self._left_V[self._tokens_K] - share_K, 0.0)
            self._drawn_K[self._tokens_K == token] = 0.0
            self._drawn = float(self._drawn_K.sum())
        self._left = float(self._left_V.sum())
        return self._left > 0.0

    def draw(self, uniform: float) -> int:
        """Return a token of what is left."""
        cumulated_V = self._left_V.cumsum()
        # The first sum above: its token has a share, as those without leave the sum as it is.
        return int(cumulated_V.searchsorted(uniform * cumulated_V[-1], side="right"))

    def _probability_of_draw(self, token: int) -> float | None:
        """Return the child's probability in what is left of the proposal.

        None for a point mass, and for a token that cannot have been drawn: as a point mass it
        does no harm.
        """
        if not self._num_drawn or not self._drawn > 0.0:
            return None
        share = float(self._drawn_K[self._tokens_K == token].sum())
        return share / self._drawn if share > 0.0 else None
