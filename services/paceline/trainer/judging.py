"""How often each draft would be accepted on held-out samples: what the gate compares in pairs.

All drafts see the same samples; a figure is per sample, so that comparing is paired. Verification
accepts an argmax at temperature 0 and sum_x min(p_T, q_T) of the drafted tokens above (Leviathan
et al. 2023, theorem 3.5).

Shape legend: N positions, K named tokens, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from paceline.trainer.guessing import GuessingModel
from paceline.trainer.texts import Text

_LEAST = 1e-6
"""Probability of a token that has none, for powers."""


@dataclass(frozen=True, slots=True)
class Judged:
    """One draft on one sample."""

    num_positions: int
    num_agreed: int
    """Positions at which the draft's likeliest token is the target's."""
    overlap: float
    """Sum over positions of sum_x min(p_T, q_T), at the sample's temperature (1 for greedy
    samples); what no sample names counts as refused."""
    temperature: float

    @property
    def num_accepted(self) -> float:
        """Expected number of tokens accepted, one drafted at each position."""
        return float(self.num_agreed) if self.temperature == 0.0 else self.overlap


@torch.no_grad()
def judge(model: GuessingModel, text: Text) -> Judged:
    """Return what a draft would have had accepted along a text, over all that it guesses."""
    num_positions, num_agreed, overlap = 0, 0, 0.0
    temperature = text.temperature or 1.0
    for guesses in model.guesses([text]):
        logits_NV, ids_NK = guesses.logits_NV, guesses.target.token_ids_NK
        p_NK = tempered(guesses.target.probs_NK, temperature)
        q_NK = (logits_NV / temperature).softmax(-1).gather(-1, ids_NK)
        num_positions += len(ids_NK)
        # Likeliest first, so column 0 is the target's own choice.
        num_agreed += int((logits_NV.argmax(-1) == ids_NK[:, 0]).sum())
        overlap += float(torch.minimum(p_NK, q_NK).sum())
    return Judged(num_positions, num_agreed, overlap, text.temperature)


def tempered(probs_NK: torch.Tensor, temperature: float) -> torch.Tensor:
    """Return the named tokens' probabilities at a temperature, [N, K].

    The tail is known by its mass alone; it is taken as made of tokens as likely as the last one
    named. They are less likely, so below 1 it comes out too heavy and above 1 too light.
    """
    if temperature == 1.0:
        return probs_NK
    powered_NK = probs_NK ** (1.0 / temperature)
    tail_N = (1.0 - probs_NK.sum(-1)).clamp_min(0.0)
    tail_N = tail_N * probs_NK[:, -1].clamp_min(_LEAST) ** (1.0 / temperature - 1.0)
    return powered_NK / (powered_NK.sum(-1) + tail_N)[:, None]
