"""What is drafted with: versions of draft models, as the trainer wants and an engine has them.

The trainer sends a DraftPlan, worker/drafts.py fetches what is missing, the engine swaps and
answers with its DraftState.
"""

from __future__ import annotations

from dataclasses import dataclass

MODEL_DRAFTER = "model"
"""The drafting model that everybody may use; others of a bank are "model:NAME"."""
MEDUSA_DRAFTER = "medusa"
"""Heads on the target's hidden states; they have no versions."""


@dataclass(frozen=True, slots=True)
class DraftFile:
    """A version as workers fetch it."""

    version: str
    digest: str
    """Of configuration and weights, hexadecimal (engine/weights.model_digest)."""
    num_bytes: int


@dataclass(frozen=True, slots=True)
class DraftEntry:
    """What one drafter is to use."""

    drafter: str
    active: DraftFile
    canary: DraftFile | None = None
    """A version on trial."""
    canary_share: float = 0.0
    """Share of sequences that use it, in [0, 1]."""


@dataclass(frozen=True, slots=True)
class StagedDraft:
    """A version that lies ready on this machine."""

    drafter: str
    version: str
    directory: str
    """Of its checkpoint."""
    share: float
    """Of the drafter's sequences; shares of a drafter add up to 1."""


@dataclass(frozen=True, slots=True)
class HeldDraft:
    """A version that an engine drafts with."""

    drafter: str
    version: str


@dataclass(frozen=True, slots=True)
class DraftState:
    """What an engine drafts with now, and how it came to it."""

    held: tuple[HeldDraft, ...] = ()
    num_swaps: int = 0
    """Since the engine's start."""
    max_swap_stall_s: float = 0.0
    """Longest time that a swap kept a step waiting."""
    error: str = ""
    """Why the last change failed; empty if it did not."""
