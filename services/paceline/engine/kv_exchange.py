"""Moves blocks between the engine's pages and the shared KV store.

Saving: a full block is queued when it is computed and written as soon as a slot is granted;
its page is held until then. Loading: the host is asked which blocks of a waiting sequence
the store has, pins them, and the engine copies them into pages when the sequence starts.
Everything here is best effort: a block that cannot be moved in time is computed again.
engine.py calls this file once per step.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from paceline.engine.blocks import BlockPool
from paceline.engine.events import LoadedEvent, LookupEvent, SavedEvent
from paceline.engine.ports import BlockArena, PageMemory, Slot, StoredBlock
from paceline.engine.request import Request, Sequence

LOOKUP_TIMEOUT_S = 4.0
"""How long a sequence waits for the store's answer; above the store's own pull deadline (2 s)."""

SAVE_TIMEOUT_S = 2.0
"""How long a block waits for a slot before it is given up."""

MAX_LOOKUPS = 8
"""Waiting sequences that may hold pins at a time, so that a long queue cannot pin the arena."""


@dataclass(slots=True)
class _Save:
    request: Request
    page: int
    key: bytes
    num_tokens: int
    is_tail: bool
    deadline_s: float


@dataclass(slots=True)
class _Lookup:
    sequence_id: int
    tail_key: bytes
    deadline_s: float
    blocks: tuple[StoredBlock, ...] | None = None


class KvExchange:
    """Pending saves and lookups over one arena; without an arena it does nothing."""

    def __init__(self, pool: BlockPool, memory: PageMemory, block_size: int, root: bytes) -> None:
        self._pool = pool
        self._memory = memory
        self._block_size = block_size
        self._root = root
        self._arena: BlockArena | None = None
        self._slots: deque[Slot] = deque()
        self._saves: deque[_Save] = deque()
        self._lookups: dict[int, _Lookup] = {}
        self._next_lookup = 1

    @property
    def is_attached(self) -> bool:
        """Whether there is a store to talk to."""
        return self._arena is not None

    @property
    def held_pages(self) -> list[int]:
        """Pages held for saves that are not written yet."""
        return [save.page for save in self._saves]

    def attach(self, arena: BlockArena | None) -> None:
        """Use another arena, or none; slots of the old one are void."""
        if self._arena is not None:
            self._arena.close()
        self._arena = arena
        self._slots.clear()
        for lookup in self._lookups.values():
            lookup.blocks = ()
        if arena is None:
            self.drop_saves()

    def grant(self, slots: list[Slot]) -> None:
        """Take slots to write into."""
        if self._arena is not None:
            self._slots.extend(slots)

    # -- saving ---------------------------------------------------------------------------

    def queue_saves(self, sequence: Sequence, now_s: float) -> None:
        """Queue the blocks of a sequence that became full since the last call."""
        if self._arena is None:
            return
        num_full = sequence.num_computed // self._block_size
        keys = sequence.block_keys(num_full, self._block_size)
        for block in range(sequence.num_stored, num_full):
            self._queue(sequence, sequence.pages[block], keys[block], self._block_size, now_s)
        sequence.num_stored = max(sequence.num_stored, num_full)

    def queue_tail(self, sequence: Sequence, key: bytes, now_s: float) -> None:
        """Queue the partial last block of a prompt under its request-scoped key."""
        num_tokens = sequence.num_computed % self._block_size
        if self._arena is not None and num_tokens:
            self._queue(sequence, sequence.pages[-1], key, num_tokens, now_s, is_tail=True)

    def write_saves(self, now_s: float) -> list[SavedEvent]:
        """Write queued blocks while slots last; give up those that waited too long."""
        saved: dict[str, list[StoredBlock]] = {}
        while self._arena is not None and self._saves and self._slots:
            save = self._saves.popleft()
            saved.setdefault(save.request.spec.request_id, []).append(
                self._write(self._arena, save, self._slots.popleft())
            )
            self._done(save)
        while self._saves and self._saves[0].deadline_s <= now_s:
            self._done(self._saves.popleft())
        return [SavedEvent(request_id, tuple(blocks)) for request_id, blocks in saved.items()]

    def drop_saves(self) -> None:
        """Give up all queued saves, to free their pages."""
        while self._saves:
            self._done(self._saves.popleft())

    def _queue(
        self,
        sequence: Sequence,
        page: int,
        key: bytes,
        num_tokens: int,
        now_s: float,
        *,
        is_tail: bool = False,
    ) -> None:
        request = sequence.request
        save = _Save(request, page, key, num_tokens, is_tail, now_s + SAVE_TIMEOUT_S)
        request.num_unsaved += 1
        self._pool.share(page)
        self._saves.append(save)
        if len(self._saves) > self._pool.num_pages // 2:
            self._done(self._saves.popleft())

    def _write(self, arena: BlockArena, save: _Save, slot: Slot) -> StoredBlock:
        length = self._memory.page_bytes
        self._memory.read_page(save.page, arena.payload(slot.offset, length))
        checksum = arena.seal(
            slot.offset,
            generation=slot.generation,
            key=save.key,
            kv_root=self._root,
            length=length,
            num_tokens=save.num_tokens,
            is_request_scoped=save.is_tail,
        )
        return StoredBlock(save.key, slot, checksum, save.num_tokens, save.is_tail)

    def _done(self, save: _Save) -> None:
        save.request.num_unsaved -= 1
        self._pool.free([save.page])

    # -- loading --------------------------------------------------------------------------

    def ask(
        self, sequence: Sequence, keys: list[bytes], tail_key: bytes, now_s: float
    ) -> LookupEvent | None:
        """Ask the host for blocks of a waiting sequence; None when too many answers are open."""
        if len(self._lookups) >= MAX_LOOKUPS:
            return None
        lookup_id, self._next_lookup = self._next_lookup, self._next_lookup + 1
        self._lookups[lookup_id] = _Lookup(
            sequence.id, tail_key, now_s + LOOKUP_TIMEOUT_S
        )
        sequence.has_looked_up = True
        return LookupEvent(lookup_id, sequence.request.spec.request_id, tuple(keys), tail_key)

    def answer(self, lookup_id: int, blocks: tuple[StoredBlock, ...]) -> list[LoadedEvent]:
        """Take an answer; one that nobody waits for is handed straight back."""
        lookup = self._lookups.get(lookup_id)
        if lookup is None or lookup.blocks is not None:
            return [LoadedEvent(lookup_id, (), 0, 0)] if blocks else []
        lookup.blocks = blocks
        return []

    def is_waiting_for(self, sequence: Sequence, now_s: float) -> bool:
        """Whether the store's answer for a sequence is still open and not overdue."""
        found = self._find(sequence)
        return found is not None and found[1].blocks is None and now_s < found[1].deadline_s

    def found_blocks(self, sequence: Sequence) -> tuple[StoredBlock, ...]:
        """Return the blocks the store has for a sequence."""
        found = self._find(sequence)
        return (found[1].blocks or ()) if found else ()

    def load(self, sequence: Sequence, num_local: int) -> tuple[int, list[LoadedEvent]]:
        """Copy found blocks behind the sequence's `num_local` own ones into new pages.

            keys    [ local hits ... | found in the store ...... | tail ]
            pages   [ shared ....... | allocated and filled here ....... ]

        Returns the tokens gained and the event that ends the pins. A block whose bytes are
        not what was written ends the loading; it is computed instead.
        """
        found = self._find(sequence)
        if found is None:
            return 0, []
        lookup_id, lookup = found
        del self._lookups[lookup_id]
        by_key = {block.key: block for block in lookup.blocks or ()}
        gained, used, corrupt = 0, 0, []
        limit = sequence.target if sequence.is_leader else sequence.target - 1
        keys = sequence.block_keys(limit // self._block_size, self._block_size)
        for key in [*keys[num_local:], lookup.tail_key]:
            block = by_key.get(key)
            if block is None or sequence.num_computed + block.num_tokens > limit:
                break
            page = self._pool.allocate()
            if page is None:
                break
            if not self._fill(page, block):
                self._pool.free([page])
                corrupt.append(block.key)
                break
            sequence.pages.append(page)
            sequence.num_computed += block.num_tokens
            gained, used = gained + block.num_tokens, used + 1
        if not lookup.blocks:
            return 0, []
        num_bytes = used * self._memory.page_bytes
        return gained, [LoadedEvent(lookup_id, tuple(corrupt), used, num_bytes)]

    def forget(self, sequence: Sequence) -> list[LoadedEvent]:
        """Give back the pins of a sequence that ended while waiting."""
        found = self._find(sequence)
        if found is None:
            return []
        del self._lookups[found[0]]
        return [LoadedEvent(found[0], (), 0, 0)] if found[1].blocks else []

    def next_deadline_s(self) -> float | None:
        """When the earliest open lookup or save is given up, or None."""
        deadlines = [x.deadline_s for x in self._lookups.values() if x.blocks is None]
        deadlines += [self._saves[0].deadline_s] if self._saves else []
        return min(deadlines, default=None)

    def _find(self, sequence: Sequence) -> tuple[int, _Lookup] | None:
        for lookup_id, lookup in self._lookups.items():
            if lookup.sequence_id == sequence.id:
                return lookup_id, lookup
        return None

    def _fill(self, page: int, block: StoredBlock) -> bool:
        """Copy one block into a page; tell whether its bytes are what was written."""
        arena, length = self._arena, self._memory.page_bytes
        if arena is None:
            return False
        self._memory.write_page(page, arena.payload(block.slot.offset, length))
        # The copy is checked, not the slot: a writer may take the slot over at any time.
        return arena.check(
            block.slot.offset,
            generation=block.slot.generation,
            key=block.key,
            kv_root=self._root,
            length=length,
            checksum=block.checksum,
            data=self._memory.view_page(page),
        )
