"""The KV store of the fleet: which prefix blocks each node holds.

A node keeps what a trace names by prefix ids, whole blocks only, up to its capacity, and lets go
what its eviction policy says (kvstore/policy, the shipped code). Nodes stay when their workers
go. Blocks of one request (its own prompt, its output) are kept by the request itself, see
gateway.py: they live shortly, and nobody else asks for them.
"""

from __future__ import annotations

from paceline.cli.simulation.traces import Arrival
from paceline.kvstore.policy import create_policy

_POLICY = "s3fifo"
"""As in the node's settings."""


class NodeStore:
    """Prefix blocks of one node."""

    def __init__(self, capacity_tokens: int) -> None:
        self._capacity_tokens = capacity_tokens
        self._policy = create_policy(_POLICY)
        self._tokens: dict[bytes, int] = {}
        self._held_tokens = 0

    def num_leading(self, keys: tuple[bytes, ...]) -> int:
        """Count the leading blocks that are here."""
        count = 0
        for key in keys:
            if key not in self._tokens:
                break
            count += 1
        return count

    def put(self, keys: tuple[bytes, ...], block_tokens: int) -> None:
        """Keep blocks; that they are written again is no use of them."""
        for key in keys:
            if key not in self._tokens:
                self._policy.admit(key)
                self._tokens[key] = block_tokens
                self._held_tokens += block_tokens
        while (excess := self._held_tokens - self._capacity_tokens) > 0:
            for key in self._policy.victims(-(-excess // block_tokens), lambda _: True):
                self._held_tokens -= self._tokens.pop(key)

    def read(self, keys: tuple[bytes, ...]) -> None:
        """Count a worker's use of blocks that are here."""
        for key in keys:
            if key in self._tokens:
                self._policy.touch(key)


def prefix_keys(arrival: Arrival) -> tuple[bytes, ...]:
    """Return the names of the prompt's whole blocks."""
    num_whole = arrival.prompt_tokens // arrival.block_tokens
    size = arrival.block_tokens.to_bytes(4)
    return tuple(size + i.to_bytes(8, signed=True) for i in arrival.prefix_ids[:num_whole])
