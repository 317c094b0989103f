"""What a draft registry knows of its versions: origin, scores, and what was decided.

trainer/registry.py keeps them, rpc/record_codec.py carries them to operators.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class DraftStage(Enum):
    """Where a version stands."""

    CANDIDATE = "candidate"
    """Trained or offered, not judged yet."""
    REFUSED = "refused"
    """By the gate."""
    CANARY = "canary"
    """On trial with a share of sequences."""
    ACTIVE = "active"
    """In use."""
    RETIRED = "retired"
    """Was in use until a better one came."""
    ROLLED_BACK = "rolled-back"
    """Was on trial or in use and was taken back."""


@dataclass(frozen=True, slots=True)
class DraftScore:
    """What was measured of a version on one domain, against the version that was active."""

    domain: str
    """Empty for all together."""
    num_positions: int
    """Positions compared."""
    acceptance: float
    """Of this version, in [0, 1]."""
    incumbent_acceptance: float
    """Of the other on the same positions."""
    difference_low: float
    """Lower bound of the difference at the gate's confidence."""
    difference_high: float


@dataclass(frozen=True, slots=True)
class DraftDecision:
    """Something that was decided about a version."""

    at_s: float
    """Seconds since 1970."""
    stage: DraftStage
    """Where it stood afterwards."""
    reason: str
    """Stable, lower-kebab."""
    detail: str = ""
    """The figures that it was decided by."""


@dataclass(frozen=True, slots=True)
class DraftRecord:
    """Everything known of a version."""

    version: str
    """The first digits of its digest."""
    digest: str
    """Of configuration and weights, hexadecimal."""
    number: int
    """Counts versions of a registry."""
    drafter: str
    """The drafter it is for."""
    parent: str
    """The version it was trained from; empty for none."""
    created_s: float
    """Seconds since 1970."""
    stage: DraftStage
    is_floor: bool = False
    """Whether it is the one that always stays."""
    is_pinned: bool = False
    """Whether it stays active whatever comes."""
    num_bytes: int = 0
    """Size of its files."""
    num_samples: int = 0
    """Samples it learned from, those of its ancestors not counted."""
    num_tokens: int = 0
    """Captured tokens in them."""
    rank: int = 0
    """Of what it learned over its parent, matrix by matrix; 0 where all weights were learned."""
    scores: tuple[DraftScore, ...] = ()
    """All domains together first."""
    decisions: tuple[DraftDecision, ...] = ()
    """Oldest first."""
