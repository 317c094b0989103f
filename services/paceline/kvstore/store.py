"""The books of a node: which slot holds what, for whom, and what goes when space is needed.

Every slot of a slab that serves a layout is exactly one of: free, in quarantine, reserved by
one session, or the place of one block; a block is readable, or dropped and still pinned.
Pure: no bytes, no clock (times are arguments in seconds), no tasks. node.py calls it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from paceline.domain.errors import NotFoundError
from paceline.kvstore.integrity import check_books
from paceline.kvstore.policy.base import KVPolicy
from paceline.kvstore.sessions import Session
from paceline.kvstore.shelves import Shelves
from paceline.kvstore.slots import SlabSpace
from paceline.kvstore.values import BlockShape, PinnedBlock, Slot, WrittenBlock

LEASE_S = 60.0
"""Life of a pin, and of a session that shows no sign of life."""

QUARANTINE_S = 5.0
"""How long a slot rests whose writer vanished: it may still be writing its last block."""

MAX_RESERVED_SHARE = 4
"""One session may hold at most this fraction (1/n) of the arena in empty slots."""


@dataclass(frozen=True, slots=True)
class StoreUsage:
    """How full the store is."""

    num_blocks: int
    used_bytes: int
    capacity_bytes: int
    num_pinned_blocks: int
    num_reserved_slots: int
    num_sessions: int
    num_evicted: int


class BlockStore:
    """Books over the slabs of one arena."""

    def __init__(
        self,
        space: SlabSpace,
        create_policy: Callable[[], KVPolicy],
        *,
        lease_s: float = LEASE_S,
        next_generation: int = 1,
        on_change: Callable[[bytes, bytes, bool], None] | None = None,
    ) -> None:
        """Start empty; `on_change(kv_root, key, is_readable)` hears of blocks of all requests."""
        self.shelves = Shelves(space, create_policy, on_change)
        self.sessions: dict[str, Session] = {}
        self.quarantine: deque[tuple[float, int]] = deque()
        """(end in s, slot offset), in order of their ends."""
        self._geometry = space.geometry
        self._lease_s = lease_s
        self._next_generation = next_generation

    @property
    def next_generation(self) -> int:
        """Use count that the next reserved slot gets."""
        return self._next_generation

    def add_layout(self, shape: BlockShape) -> None:
        """Make blocks of a layout welcome; a known one is left as it is.

        Raises:
            InvalidRequestError, ExhaustedError: the layout cannot be added.
        """
        self.shelves.add_layout(shape, {s.shape.kv_root for s in self.sessions.values()})

    def restore(
        self,
        slab: int,
        shape: BlockShape,
        blocks: Sequence[WrittenBlock],
        unfinished: Sequence[int],
        now_s: float,
    ) -> None:
        """Take over a slab with the blocks found in it; `unfinished` slots rest for a while."""
        self.shelves.restore(slab, shape, blocks, unfinished)
        self.quarantine.extend((now_s + QUARANTINE_S, offset) for offset in unfinished)

    # -- sessions -------------------------------------------------------------------------

    def open_session(self, session_id: str, shape: BlockShape, now_s: float) -> None:
        """Open a session on one layout.

        Raises:
            InvalidRequestError, ExhaustedError: the layout cannot be added.
        """
        assert session_id not in self.sessions, "session opened twice"
        self.add_layout(shape)
        self.sessions[session_id] = Session(session_id, shape, now_s + self._lease_s)

    def touch_session(self, session_id: str, now_s: float) -> None:
        """Note a sign of life.

        Raises:
            NotFoundError: there is no such session (any more).
        """
        self.session(session_id).expires_s = now_s + self._lease_s

    def session(self, session_id: str) -> Session:
        """Return a session.

        Raises:
            NotFoundError: there is no such session (any more).
        """
        session = self.sessions.get(session_id)
        if session is None:
            raise NotFoundError("no such session; attach again", reason="session-unknown")
        return session

    def close_session(
        self, session_id: str, now_s: float, *, quarantine_s: float = QUARANTINE_S
    ) -> None:
        """End a session: pins end, reserved slots rest for `quarantine_s`; unknown is no error."""
        session = self.sessions.pop(session_id, None)
        if session is None:
            return
        for pins in session.pins.values():
            for pin in pins:
                self.shelves.unpin(pin.block)
        for offset in session.reserved:
            if quarantine_s > 0:
                self.quarantine.append((now_s + quarantine_s, offset))
            else:
                self.shelves.slots.give(offset)

    def expire(self, now_s: float) -> list[str]:
        """End overdue pins, sessions and quarantines; return the sessions that ended."""
        while self.quarantine and self.quarantine[0][0] <= now_s:
            self.shelves.slots.give(self.quarantine.popleft()[1])
        ended = [s.id for s in self.sessions.values() if s.expires_s <= now_s]
        for session_id in ended:
            self.close_session(session_id, now_s)
        for session in self.sessions.values():
            for key in session.expired_keys(now_s):
                block = session.pop_pin(key)
                if block is not None:
                    self.shelves.unpin(block)
        return ended

    # -- writing --------------------------------------------------------------------------

    def reserve(self, session_id: str, count: int, now_s: float) -> list[Slot]:
        """Reserve up to `count` slots, evicting where needed.

        Raises:
            NotFoundError: there is no such session.
        """
        self.touch_session(session_id, now_s)
        session = self.session(session_id)
        per_slab = self._geometry.slots_per_slab(session.shape.block_bytes)
        limit = max(1, self._geometry.num_slabs * per_slab // MAX_RESERVED_SHARE)
        slots: list[Slot] = []
        for _ in range(min(count, limit - len(session.reserved))):
            offset = self.shelves.take_slot(self.shelves.layouts[session.shape.kv_root])
            if offset is None:
                break
            slot = Slot(offset, self._next_generation)
            self._next_generation += 1
            session.reserved[offset] = slot.generation
            slots.append(slot)
        return slots

    def owns(self, session_id: str, slot: Slot) -> bool:
        """Tell whether the session may write this slot.

        Raises:
            NotFoundError: there is no such session.
        """
        return self.session(session_id).reserved.get(slot.offset) == slot.generation

    def unreserve(self, session_id: str, slots: Iterable[Slot]) -> None:
        """Take back slots; those that are not the session's are ignored.

        Raises:
            NotFoundError: there is no such session.
        """
        session = self.session(session_id)
        for slot in slots:
            if self.owns(session_id, slot):
                del session.reserved[slot.offset]
                self.shelves.slots.give(slot.offset)

    def commit(self, session_id: str, block: WrittenBlock) -> bool:
        """Make a block in a reserved slot readable; tell whether its key is readable now.

        A slot that is not the session's (any more) changes nothing; if the key is there
        already, the slot is freed and the present block stays.

        Raises:
            NotFoundError: there is no such session.
        """
        session = self.session(session_id)
        layout = self.shelves.layouts[session.shape.kv_root]
        if not self.owns(session_id, block.slot):
            return block.key in layout.blocks
        del session.reserved[block.slot.offset]
        if block.key in layout.blocks:
            self.shelves.slots.give(block.slot.offset)
        else:
            self.shelves.insert(layout, block)
        return True

    # -- reading --------------------------------------------------------------------------

    def acquire(self, session_id: str, key: bytes, now_s: float) -> PinnedBlock | None:
        """Pin a block for a session and count the use; None if it is not there.

        Raises:
            NotFoundError: there is no such session.
        """
        self.touch_session(session_id, now_s)
        session = self.session(session_id)
        layout = self.shelves.layouts[session.shape.kv_root]
        block = layout.blocks.get(key)
        if block is None:
            return None
        block.num_pins += 1
        session.add_pin(block, now_s + self._lease_s)
        if not block.is_request_scoped:
            layout.policy.touch(key)
        return block.pinned()

    def release(self, session_id: str, keys: Iterable[bytes]) -> None:
        """End one pin per key; keys without a pin (its lease has ended) are ignored.

        Raises:
            NotFoundError: there is no such session.
        """
        session = self.session(session_id)
        for key in keys:
            block = session.pop_pin(key)
            if block is not None:
                self.shelves.unpin(block)

    def report_corrupt(self, session_id: str, key: bytes) -> bool:
        """Drop a block that a session read and found wrong; tell whether it was still there.

        Only what the session has pinned counts: a key may have been written anew meanwhile.

        Raises:
            NotFoundError: there is no such session.
        """
        session = self.session(session_id)
        block = self.shelves.layouts[session.shape.kv_root].blocks.get(key)
        pins = session.pins.get(key, ())
        is_read = any(pin.block is block for pin in pins)
        return block is not None and is_read and self.shelves.invalidate(session.shape.kv_root, key)

    # -- reports --------------------------------------------------------------------------

    def usage(self) -> StoreUsage:
        """Return how full the store is."""
        layouts, sessions = self.shelves.layouts.values(), self.sessions.values()
        pinned = {id(p.block) for s in sessions for pins in s.pins.values() for p in pins}
        return StoreUsage(
            num_blocks=sum(len(x.blocks) for x in layouts),
            used_bytes=sum(len(x.blocks) * x.shape.block_bytes for x in layouts),
            capacity_bytes=self._geometry.num_slabs * self._geometry.slab_bytes,
            num_pinned_blocks=len(pinned),
            num_reserved_slots=sum(len(s.reserved) for s in sessions),
            num_sessions=len(self.sessions),
            num_evicted=self.shelves.num_evicted,
        )

    def check_integrity(self) -> list[str]:
        """Return all broken invariants; empty means the books are right."""
        return check_books(self)
