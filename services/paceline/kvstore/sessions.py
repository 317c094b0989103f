"""What one session of a node holds: reserved slots and pinned blocks. store.py owns these.

A session ends with its stream; the leases are a second guard for ends that went unnoticed.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from paceline.kvstore.values import BlockShape, PinnedBlock, Slot


@dataclass(slots=True, eq=False)
class Block:
    """A readable block, or a dropped one that somebody still reads."""

    key: bytes
    shape: BlockShape
    slot: Slot
    checksum: int
    num_tokens: int
    is_request_scoped: bool
    num_pins: int = 0
    is_dropped: bool = False

    def pinned(self) -> PinnedBlock:
        """Return the block as its reader needs it."""
        return PinnedBlock(self.key, self.slot, self.checksum, self.num_tokens)


@dataclass(slots=True)
class Pin:
    """One acquire of one block, until released or `expires_s`."""

    block: Block
    expires_s: float


@dataclass(slots=True)
class Session:
    """Everything that goes back when the session ends."""

    id: str
    shape: BlockShape
    expires_s: float
    reserved: dict[int, int] = field(default_factory=dict)
    """Slot offset -> generation."""
    pins: dict[bytes, deque[Pin]] = field(default_factory=dict)
    """Key -> pins, oldest first."""

    def add_pin(self, block: Block, expires_s: float) -> None:
        """Note a pin; the caller counts it on the block."""
        self.pins.setdefault(block.key, deque()).append(Pin(block, expires_s))

    def pop_pin(self, key: bytes) -> Block | None:
        """Forget the oldest pin of a key and return its block, or None."""
        pins = self.pins.get(key)
        if not pins:
            return None
        block = pins.popleft().block
        if not pins:
            del self.pins[key]
        return block

    def expired_keys(self, now_s: float) -> list[bytes]:
        """Return one key per pin whose lease has ended."""
        return [key for key, pins in self.pins.items() for pin in pins if pin.expires_s <= now_s]
