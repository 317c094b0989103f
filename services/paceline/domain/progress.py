"""What an engine reports of a running request, between worker, prefill and decode roles."""

from __future__ import annotations

from dataclasses import dataclass

from paceline.domain.request import TokenChunk


@dataclass(frozen=True, slots=True)
class DraftRound:
    """A draft that was verified."""

    drafter: str
    num_drafted: int
    num_accepted: int


@dataclass(frozen=True, slots=True)
class RequestUpdate:
    """News of one request since the last update; several engine steps may be merged."""

    chunks: tuple[TokenChunk, ...] = ()
    published_keys: tuple[bytes, ...] = ()
    """Blocks of the request that became readable in the KV store."""
    published_tokens: int = 0
    """Tokens in `published_keys`."""
    local_hit_tokens: int = 0
    store_hit_tokens: int = 0
    is_finished: bool = False
