"""A store in ordinary memory behind the engine's port, for engines of one process."""

from __future__ import annotations

import xxhash

from paceline.engine.engine import Engine
from paceline.engine.events import EngineEvent, LookupEvent, OutputEvent, SavedEvent
from paceline.engine.ports import Slot, StoredBlock


class MemoryArena:
    """Slots in a bytearray; what is sealed can be found by key."""

    def __init__(self, num_slots: int, slot_bytes: int) -> None:
        self._memory = memoryview(bytearray(num_slots * slot_bytes))
        self._slot_bytes = slot_bytes
        self.free = [Slot(i * slot_bytes, 1) for i in range(num_slots)]
        self.blocks: dict[bytes, StoredBlock] = {}

    def payload(self, offset: int, length: int) -> memoryview:
        return self._memory[offset : offset + length]

    def seal(self, offset: int, *, length: int, **_: object) -> int:
        return xxhash.xxh3_64_intdigest(self.payload(offset, length))

    def check(self, offset: int, *, checksum: int, data: memoryview, **_: object) -> bool:
        return xxhash.xxh3_64_intdigest(data) == checksum

    def close(self) -> None:
        return

    def find(self, lookup: LookupEvent) -> tuple[StoredBlock, ...]:
        found = []
        for key in lookup.keys:
            if key not in self.blocks:
                break
            found.append(self.blocks[key])
        if lookup.tail_key in self.blocks:
            found.append(self.blocks[lookup.tail_key])
        return tuple(found)


def run_until_idle(engine: Engine, arena: MemoryArena | None = None) -> dict[str, list[OutputEvent]]:
    """Step until nothing is left, answering the store's part; return outputs by request."""
    outputs: dict[str, list[OutputEvent]] = {}
    for _ in range(100_000):
        if engine.num_requests == 0:
            return outputs
        if arena is not None and arena.free:
            engine.grant_slots([arena.free.pop()])
        for event in engine.step():
            collect(engine, arena, event, outputs)
    raise AssertionError("the engine did not come to rest")


def collect(
    engine: Engine,
    arena: MemoryArena | None,
    event: EngineEvent,
    outputs: dict[str, list[OutputEvent]],
) -> None:
    """Handle one event as a worker would."""
    if isinstance(event, OutputEvent):
        outputs.setdefault(event.request_id, []).append(event)
    elif isinstance(event, SavedEvent) and arena is not None:
        arena.blocks.update({block.key: block for block in event.blocks})
    elif isinstance(event, LookupEvent):
        engine.answer_lookup(event.lookup_id, arena.find(event) if arena else ())


def tokens_of(events: list[OutputEvent], index: int = 0) -> list[int]:
    """Join an output's tokens."""
    return [t for e in events for c in e.chunks if c.index == index for t in c.token_ids]
