"""How far drafted chains get: one measure for drafts of every kind.

A chain holds a draft's likeliest tokens, and is accepted as far as they are the tokens that the
target drew. On text of the target's own that is what verification would do from every root: as
long as all went well the draft has read just that text. So products of the conditional shares
are the mean length of what is accepted, at any temperature, and

    tokens per pass = 1 + a1 + a1 a2 + a1 a2 a3 + ...

compare.py adds up.

Shape legend: R roots, D depths.
"""

from __future__ import annotations

from typing import Any

import torch

from paceline.trainer.guessing import GuessingModel
from paceline.trainer.texts import Text


class ChainTally:
    """What became of the chains of one draft."""

    def __init__(self, depth: int) -> None:
        """Count chains of `depth` tokens."""
        self._depth = depth
        self._num_roots = 0
        self._agreed_D = torch.zeros(depth, dtype=torch.int64)
        self._accepted_D = torch.zeros(depth, dtype=torch.int64)

    @torch.no_grad()
    def add(self, model: GuessingModel, text: Text) -> None:
        """Add the chains along a text in which every captured position counts."""
        matches_RD = model.chain_matches(text, self._depth)
        self._num_roots += len(matches_RD)
        self._agreed_D += matches_RD.sum(0)
        self._accepted_D += matches_RD.cumprod(1).sum(0)

    def figures(self) -> dict[str, Any]:
        """Return shares by depth, the nearest token first.

        `acceptance_by_depth` is among chains accepted so far, `agreement_by_depth` among all.
        """
        accepted: list[int] = self._accepted_D.tolist()
        tried = [self._num_roots, *accepted[:-1]]
        return {
            "roots": self._num_roots,
            "acceptance_by_depth": [
                round(a / max(1, t), 4) for a, t in zip(accepted, tried, strict=True)
            ],
            "agreement_by_depth": [
                round(a / max(1, self._num_roots), 4) for a in self._agreed_D.tolist()
            ],
            "tokens_per_pass": round(1.0 + sum(accepted) / max(1, self._num_roots), 4),
        }
