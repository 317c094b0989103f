"""How well a draft guesses: agreement with the target along text of the target.

Two figures, both means over positions of answers in texts that were not learned from:

    greedy agreement   argmax q = argmax p: tokens accepted at temperature 0
    overlap            sum_x min(p, q): tokens accepted at temperature 1 by rejection sampling
                       (Leviathan et al. 2023, theorem 3.5)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from paceline.trainer.decoder import DraftModel
from paceline.trainer.texts import Text, pack
from paceline.trainer.train import learned_logits


@dataclass(frozen=True, slots=True)
class Agreement:
    """Means over `num_positions` positions."""

    greedy: float
    overlap: float
    num_positions: int


@torch.no_grad()
def measure(model: DraftModel, texts: Sequence[Text]) -> Agreement:
    """Return the agreement in answers; 0 of everything if there are none.

    Overlap counts the tokens that the texts name; what lies behind them is taken as refused.
    """
    num_positions, num_agreed, overlap = 0, 0, 0.0
    for text in texts:
        batch = pack([[text]], len(text.tokens_T))
        is_answer_N = batch.weights_N >= 1.0
        ids_NK = batch.target.token_ids_NK[is_answer_N]
        probs_NK = batch.target.probs_NK[is_answer_N]
        logits_NV = learned_logits(model, batch)[is_answer_N]
        q_NK = logits_NV.softmax(-1).gather(-1, ids_NK)
        num_positions += len(ids_NK)
        # Likeliest first, so column 0 is the target's own choice.
        num_agreed += int((logits_NV.argmax(-1) == ids_NK[:, 0]).sum())
        overlap += float(torch.minimum(probs_NK, q_NK).sum())
    count = max(1, num_positions)
    return Agreement(num_agreed / count, overlap / count, num_positions)
