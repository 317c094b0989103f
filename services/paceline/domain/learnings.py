"""What serving leaves for training: captured tokens, and what drafts brought.

The engine makes them, workers carry them to Redis and to the trainer. Arrays are little-endian
bytes, since values of this package know no numeric library; samples hold token ids, no text.

Shape legend: N captured tokens, K tokens named at each, E hidden size.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import IntEnum

from blake3 import blake3

_TENANT_BYTES = 8


def tenant_digest(cache_salt: bytes) -> bytes:
    """Return what stands for a tenant in samples and outcomes."""
    return blake3(cache_salt).digest(_TENANT_BYTES)


class TokenOrigin(IntEnum):
    """How a token came about, as one byte."""

    UNDRAFTED = 0
    """Nothing was drafted at its position."""
    ACCEPTED = 1
    """A drafted token that the target agreed with."""
    CORRECTED = 2
    """Drawn where the draft was refused."""
    BONUS = 3
    """Drawn behind a draft that was accepted to its end."""


@dataclass(frozen=True, slots=True)
class Sample:
    """A run of generated tokens with the target's distributions that they were drawn from.

    token_ids:  [context .... | captured: N]
                 first_position              distribution i is that of token num_context + i
    """

    tenant: bytes
    """Digest of the tenant's salt; tells tenants apart without naming them."""
    domain: str
    """The client's label of the traffic; empty without one."""
    draft_version: str
    """Version of the draft model that drafted for the sequence last; empty without one."""
    temperature: float
    first_position: int
    """Of the first token in its sequence."""
    token_ids: tuple[int, ...]
    num_context: int
    """At least 1."""
    top: int
    """K."""
    top_ids: bytes
    """int32 [N][K], the likeliest tokens, best first."""
    top_probs: bytes
    """float16 [N][K], their probabilities at temperature 1, before sampling parameters."""
    tail_mass: bytes
    """float16 [N], mass of all other tokens."""
    origins: bytes
    """[N] TokenOrigin."""
    hidden: bytes = field(default=b"", repr=False)
    """float16 [N][E], final hidden states behind which the tokens were drawn; empty unless asked
    for."""

    @property
    def num_captured(self) -> int:
        """N."""
        return len(self.token_ids) - self.num_context


@dataclass(frozen=True, slots=True)
class SequenceOutcome:
    """What one version of a draft model brought for a sequence that ended; numbers only."""

    drafter: str
    draft_version: str
    tenant: bytes
    domain: str
    num_rounds: int
    """Passes that verified drafts with tokens of this version."""
    num_tried: int
    """Positions at which one of its tokens was put to the test: its parent was accepted."""
    num_accepted: int
    """Those at which one of its tokens was accepted."""
    num_emitted: int
    """Tokens emitted by those passes."""
