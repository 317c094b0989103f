"""How a learner learns: plain values that travel to its process. No torch."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass

MODEL_BATCH_TOKENS = 2048
"""Tokens of text behind one optimiser step of a small model."""
HEADS_BATCH_TOKENS = 512
"""Tokens behind one optimiser step of heads: they compute on captured tokens only, no context, and
each of them teaches every head."""


@dataclass(frozen=True, slots=True)
class LearnerOptions:
    """Options of one learner."""

    draft: str
    """Directory of the checkpoint to start from, tokenizer included. Of heads it may be empty:
    they start as the target's own head."""
    state: str = ""
    """Directory where the state is kept; empty keeps none."""
    drafter: str = "model"
    """What learns (learnables.py): a small model, or Medusa heads on hidden states."""
    target: str = ""
    """Directory of the target's checkpoint; heads need it."""
    num_heads: int = 4
    """Of new heads: tokens that they draft behind the one that the target draws itself."""
    num_layers: int = 1
    """Residual blocks of each new head; the paper's choice."""
    seed: int = 0
    """Of the order in which samples are met."""
    loss: str = "lk"
    """Name of a loss (losses.py). On the demo model's stream (`paceline bench training`) it was
    level with forward KL where traffic had shifted, where total variation and reverse KL learned
    less, and level with total variation where the draft fitted already."""
    positions: str = "all"
    """Name of a choice of positions (positions.py). On that stream accepted tokens alone learned
    a little less; corrected tokens alone made a draft that fitted worse."""
    learning_rate: float = 2e-4
    """Constant after warm-up, as traffic has no end. On that stream a draft that fitted lost
    acceptance from 3e-4 on, one that did not fit learned faster up to 2e-3."""
    warm_up_steps: int = 8
    """Optimiser steps in which the rate rises, from the start and from every reset: the
    optimiser's moments are empty then."""
    weight_decay: float = 0.0
    """Of matrices; online learning stays near the draft it came from without (OSD)."""
    max_grad_norm: float = 1.0
    batch_tokens: int = MODEL_BATCH_TOKENS
    """Tokens of text behind one optimiser step."""
    micro_step_s: float = 0.025
    """Longest time between two looks at the socket; well below the 50 ms in which a pause has
    to be obeyed."""
    micro_tokens: int | None = None
    """Tokens of every micro-step; None fits them to `micro_step_s` by measurement."""
    replay_bytes: int = 64 << 20
    """Memory for samples; some 250,000 tokens with 32 named of each distribution."""
    recent_ratio: float = 0.5
    """Share of what is learned that is drawn from the last traffic; the rest is drawn from all
    domains alike, so that none is forgotten."""
    max_passes: float = 64.0
    """Times that a token is learned from, on average; then learning waits for new ones. More of
    them make a draft that knows its few samples by heart, and use power for nothing."""
    held_out_every: int = 8
    """One context in so many is kept for judging."""
    judges_first: bool = True
    """Whether texts are judged before they are learned from (first_sight.py)."""
    spike_ratio: float = 3.0
    """Loss over its running median that counts as a spike."""
    spike_steps: int = 4
    """Spikes in a row after which the last good weights come back."""
    snapshot_steps: int = 32
    """Optimiser steps between two copies of good weights."""

    def to_json(self) -> str:
        """Return one line of JSON."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> LearnerOptions:
        """Read what `to_json` wrote.

        Raises:
            ValueError, TypeError: it is none.
        """
        return cls(**json.loads(text))
