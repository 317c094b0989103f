"""A store in ordinary memory behind the engine's port, for engines of one process."""

from __future__ import annotations

from dataclasses import replace

import xxhash

from paceline.engine.engine import Engine
from paceline.engine.events import (
    EngineEvent,
    FailedEvent,
    LoadedEvent,
    LookupEvent,
    OutputEvent,
    SavedEvent,
)
from paceline.engine.ports import Slot, StoredBlock


class MemoryArena:
    """Slots in a bytearray; what is sealed can be found by key once it is committed."""

    def __init__(self, num_slots: int, slot_bytes: int) -> None:
        self._memory = memoryview(bytearray(num_slots * slot_bytes))
        self._headers: dict[int, tuple[int, bytes, bytes]] = {}
        self.free = [Slot(i * slot_bytes, 1) for i in range(num_slots)]
        self.blocks: dict[bytes, StoredBlock] = {}
        self.pinned: set[int] = set()
        """Lookups whose blocks are pinned."""
        self.is_closed = False

    def payload(self, offset: int, length: int) -> memoryview:
        if self.is_closed or offset < 0 or offset + length > len(self._memory):
            raise ValueError("slot outside of the arena")
        return self._memory[offset : offset + length]

    def seal(
        self,
        offset: int,
        *,
        generation: int,
        key: bytes,
        kv_root: bytes,
        length: int,
        num_tokens: int,
        is_request_scoped: bool,
    ) -> int:
        self._headers[offset] = (generation, key, kv_root)
        return xxhash.xxh3_64_intdigest(self.payload(offset, length))

    def check(
        self,
        offset: int,
        *,
        generation: int,
        key: bytes,
        kv_root: bytes,
        length: int,
        checksum: int,
        data: memoryview,
    ) -> bool:
        is_same = self._headers.get(offset) == (generation, key, kv_root)
        return is_same and xxhash.xxh3_64_intdigest(data) == checksum

    def close(self) -> None:
        self.is_closed = True

    def commit(self, event: SavedEvent) -> None:
        """Make written blocks findable."""
        self.blocks.update({block.key: block for block in event.blocks})

    def find(self, lookup: LookupEvent) -> tuple[StoredBlock, ...]:
        """Pin and return what there is of a lookup."""
        found = []
        for key in lookup.keys:
            if key not in self.blocks:
                break
            found.append(self.blocks[key])
        if lookup.tail_key in self.blocks:
            found.append(self.blocks[lookup.tail_key])
        if found:
            self.pinned.add(lookup.lookup_id)
        return tuple(found)

    def copy_bytes(self, other: MemoryArena) -> None:
        """Hold what another arena of the same size holds; slots in use there are not free."""
        self._memory[:] = other._memory
        self._headers.update(other._headers)
        self.free = list(other.free)

    def corrupt(self, key: bytes) -> None:
        """Flip a bit of a block's bytes."""
        self._memory[self.blocks[key].slot.offset + 3] ^= 0x40

    def outdate(self, key: bytes) -> None:
        """Let a block's reference name a former content of its slot."""
        block = self.blocks[key]
        slot = replace(block.slot, generation=block.slot.generation + 1)
        self.blocks[key] = replace(block, slot=slot)


def run_until_idle(
    engine: Engine, arena: MemoryArena | None = None
) -> dict[str, list[OutputEvent]]:
    """Step until nothing is left, answering the store's part; return outputs by request."""
    outputs: dict[str, list[OutputEvent]] = {}
    for _ in range(100_000):
        if arena is not None and arena.free:
            engine.grant_slots([arena.free.pop()])
        events = engine.step()
        for event in events:
            collect(engine, arena, event, outputs)
        if not events and engine.num_requests == 0:
            return outputs
    raise AssertionError("the engine did not come to rest")


def collect(
    engine: Engine,
    arena: MemoryArena | None,
    event: EngineEvent,
    outputs: dict[str, list[OutputEvent]],
) -> None:
    """Handle one event as a worker would."""
    match event:
        case OutputEvent():
            outputs.setdefault(event.request_id, []).append(event)
        case SavedEvent() if arena is not None:
            arena.commit(event)
        case LookupEvent():
            engine.answer_lookup(event.lookup_id, arena.find(event) if arena else ())
        case LoadedEvent() if arena is not None:
            arena.pinned.discard(event.lookup_id)
        case FailedEvent():
            raise AssertionError(f"{event.request_id} failed: {event.reason}: {event.message}")


def tokens_of(events: list[OutputEvent], index: int = 0) -> list[int]:
    """Join an output's tokens."""
    return [t for e in events for c in e.chunks if c.index == index for t in c.token_ids]
