"""Moves blocks between the engine's pages and the shared KV store.

Saving: a full block is queued when it is computed and written as soon as a slot is granted;
its page is held until then, or until a sequence needs the page more. Loading: the host is
asked which blocks of a waiting sequence the store has, pins them, and the engine copies them
into pages when the sequence starts. Everything here is best effort: a block that cannot be
moved in time is computed again. Which sequences ask is lookups.py's; engine.py and
admission.py call this file.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from paceline.engine.blocks import BlockPool
from paceline.engine.events import LoadedEvent, SavedEvent
from paceline.engine.lookups import Lookups
from paceline.engine.ports import BlockArena, PageMemory, Slot, StoredBlock
from paceline.engine.request import Request, Sequence

SAVE_TIMEOUT_S = 2.0
"""How long a block waits for a slot before it is given up."""

SAVE_BYTES_PER_STEP = 8 << 20
"""Most bytes written between two steps; copying and hashing them takes 2 to 3 ms."""


@dataclass(slots=True)
class _Save:
    request: Request
    page: int
    key: bytes
    num_tokens: int
    is_tail: bool
    deadline_s: float


class KvExchange:
    """Pending saves and lookups over one arena; without an arena it does nothing."""

    def __init__(
        self,
        pool: BlockPool,
        memory: PageMemory,
        block_size: int,
        root: bytes,
        monotonic: Callable[[], float],
    ) -> None:
        """`monotonic` times the copying."""
        self._monotonic = monotonic
        self._pool = pool
        self._memory = memory
        self._block_size = block_size
        self._root = root
        self._arena: BlockArena | None = None
        self._slots: deque[Slot] = deque()
        self._saves: deque[_Save] = deque()
        self.lookups = Lookups()

    @property
    def is_attached(self) -> bool:
        """Whether there is a store to talk to."""
        return self._arena is not None

    @property
    def can_write(self) -> bool:
        """Whether `write_saves` would write something right now."""
        return self._arena is not None and bool(self._saves) and bool(self._slots)

    @property
    def held_pages(self) -> list[int]:
        """Pages held for saves that are not written yet."""
        return [save.page for save in self._saves]

    def num_saves_of(self, request: Request) -> int:
        """Count a request's blocks that are queued and not written."""
        return sum(save.request is request for save in self._saves)

    def attach(self, arena: BlockArena | None) -> None:
        """Use another arena, or none; slots and pins of the old one are void."""
        if self._arena is not None:
            self._arena.close()
        self._arena = arena
        self._slots.clear()
        self.lookups.void()
        if arena is None:
            while self._saves:
                self._done(self._saves.popleft())

    def grant(self, slots: list[Slot]) -> None:
        """Take slots to write into."""
        if self._arena is not None:
            self._slots.extend(slots)

    def next_deadline_s(self) -> float | None:
        """When the earliest open lookup or save is given up, or None."""
        deadlines = [self._saves[0].deadline_s] if self._saves else []
        lookup_s = self.lookups.next_deadline_s()
        return min([*deadlines, *([] if lookup_s is None else [lookup_s])], default=None)

    # -- saving ---------------------------------------------------------------------------

    def queue_saves(self, sequence: Sequence, now_s: float) -> None:
        """Queue the blocks of a sequence that became full since the last call."""
        num_full = sequence.num_computed // self._block_size
        if self._arena is None or num_full <= sequence.num_stored:
            return
        keys = sequence.block_keys(num_full, self._block_size)
        for block in range(sequence.num_stored, num_full):
            self._queue(sequence, sequence.pages[block], keys[block], self._block_size, now_s)
        sequence.num_stored = num_full

    def queue_tail(self, sequence: Sequence, now_s: float) -> None:
        """Queue the partial last block of a prompt under its request-scoped key."""
        num_tokens = sequence.num_computed % self._block_size
        if self._arena is not None and num_tokens:
            key = sequence.tail_key(self._block_size)
            self._queue(sequence, sequence.pages[-1], key, num_tokens, now_s, is_tail=True)

    def write_saves(self, now_s: float) -> list[SavedEvent]:
        """Write queued blocks while slots last; give up those that waited too long."""
        if not self._saves:
            return []
        started_s = self._monotonic()
        saved: dict[str, list[StoredBlock]] = {}
        budget = max(1, SAVE_BYTES_PER_STEP // self._memory.page_bytes)
        while self._arena is not None and self._saves and self._slots and budget > 0:
            budget -= 1
            block = self._write(self._arena, self._saves[0], self._slots.popleft())
            if block is not None:
                save = self._saves.popleft()
                saved.setdefault(save.request.spec.request_id, []).append(block)
                self._done(save)
        while self._saves and self._saves[0].deadline_s <= now_s:
            self._done(self._saves.popleft())
        return [SavedEvent(id_, tuple(blocks), started_s) for id_, blocks in saved.items()]

    def reclaim(self) -> bool:
        """Give up the oldest save that alone holds its page; False when there is none."""
        for save in self._saves:
            if self._pool.num_holders(save.page) == 1:
                self._saves.remove(save)
                self._done(save)
                return True
        return False

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

    def _write(self, arena: BlockArena, save: _Save, slot: Slot) -> StoredBlock | None:
        """Fill and seal a slot; None for one that is not in the arena."""
        length = self._memory.page_bytes
        try:
            payload = arena.payload(slot.offset, length)
        except ValueError:
            return None
        self._memory.read_page(save.page, payload)
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

    def load(self, sequence: Sequence, num_local: int) -> tuple[int, list[LoadedEvent]]:
        """Copy found blocks behind the sequence's `num_local` own ones into new pages.

            keys    [ local hits ... | found in the store ...... | tail ]
            pages   [ shared ....... | allocated and filled here ....... ]

        Returns the tokens gained and the event that ends the pins. A block whose bytes are
        not what was written ends the loading; it is computed instead.
        """
        lookup = self.lookups.pop(sequence)
        if lookup is None or not lookup.blocks:
            return 0, []
        assert lookup.id is not None, "answered before it was asked"
        by_key = {block.key: block for block in lookup.blocks}
        gained, used, corrupt, started_s = 0, 0, [], self._monotonic()
        num_full, num_tail = divmod(sequence.max_cached, self._block_size)
        wanted = [(k, self._block_size) for k in sequence.block_keys(num_full, self._block_size)]
        wanted = [*wanted[num_local:], (lookup.tail_key, num_tail)]
        for key, num_tokens in wanted:
            block = by_key.get(key)
            page = self._pool.allocate() if block is not None and key else None
            if block is None or page is None:
                break
            if block.num_tokens != num_tokens or not self._fill(page, block):
                self._pool.free([page])
                corrupt.append(key)
                break
            sequence.pages.append(page)
            sequence.num_computed += num_tokens
            gained, used = gained + num_tokens, used + 1
        num_bytes = used * self._memory.page_bytes
        ended_s = self._monotonic()
        loaded = LoadedEvent(lookup.id, tuple(corrupt), used, num_bytes, started_s, ended_s)
        return gained, [loaded]

    def _fill(self, page: int, block: StoredBlock) -> bool:
        """Copy one block into a page; tell whether its bytes are what was written."""
        arena, length = self._arena, self._memory.page_bytes
        if arena is None:
            return False
        try:
            self._memory.write_page(page, arena.payload(block.slot.offset, length))
        except ValueError:
            return False
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
