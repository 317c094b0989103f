"""The contract of routing policies: values in, a decision with its reason out. No I/O."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from paceline.domain.member import Member


@dataclass(frozen=True, slots=True)
class RoutingRequest:
    """What routing needs to know of a request."""

    num_tokens: int
    """Tokens whose KV is needed: the prompt, and the output so far of a resumed stream."""
    block_size: int
    block_bytes: int
    holders: Mapping[str, int]
    """KV node id -> leading blocks it holds."""
    max_tokens: int = 0
    """Tokens that it may still bring, over all outputs."""
    fitting_drafters: frozenset[str] = frozenset()
    """Drafters that were made for text like its; empty where it does not matter who drafts."""


@dataclass(frozen=True, slots=True)
class FleetLoad:
    """Candidates, and the work this gateway sent that loads do not show yet."""

    prefill: Sequence[Member]
    decode: Sequence[Member]
    in_flight: Mapping[str, int]
    """Worker id -> requests of this gateway on it."""
    pending_tokens: Mapping[str, int]
    """Worker id -> prompt tokens of this gateway it has not computed yet."""
    near_bytes_per_s: float
    """Speed of moving KV on one node."""
    far_bytes_per_s: float
    """Speed of moving KV between nodes."""
    hop_s: float
    """Fixed cost of handing a request from a prefill to a decode worker."""


@dataclass(frozen=True, slots=True)
class Decision:
    """Where a request goes, and the predicted seconds that say why."""

    decode: Member
    prefill: Member | None
    """None: the decode worker computes the prompt itself."""
    predicted_ttft_s: float
    terms: Mapping[str, float]
    """Candidate pair "prefill>decode" -> predicted seconds."""
    saved_s: float = 0.0
    """Decode seconds that a fitting drafter of the chosen worker is taken to save: what the pair
    may have been slower than the best by."""


class RoutingPolicy(Protocol):
    """Chooses workers. `fleet.decode` is never empty."""

    def decide(self, request: RoutingRequest, fleet: FleetLoad) -> Decision:
        """Return the decision."""
        ...
