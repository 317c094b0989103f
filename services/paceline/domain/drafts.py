"""What is drafted with: versions of draft models, as the trainer wants and an engine has them.

The trainer sends a DraftPlan, worker/drafts.py fetches what is missing, the engine swaps and
answers with its DraftState.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

MODEL_DRAFTER = "model"
"""The drafting model that everybody may use; others of a bank are "model:NAME"."""
MEDUSA_DRAFTER = "medusa"
"""Heads on the target's hidden states; they have no versions."""

MAX_DRAFTERS = 8
"""Names that models can draft under at a time; each is an arm or two of an engine's controller."""

_LABEL = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


def is_label(text: str) -> bool:
    """Tell whether a bank's member may be named so: other texts would not do in names of arms."""
    return _LABEL.fullmatch(text) is not None


def member_name(label: str) -> str:
    """Return the name of a bank's member for a domain or tenant."""
    return f"{MODEL_DRAFTER}:{label}"


def label_of(drafter: str) -> str:
    """Return what a member of a bank is for; empty for the one that everybody may use."""
    return drafter.partition(":")[2]


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
