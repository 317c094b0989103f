"""The books stay right under any sequence of calls: no slot lost, none owned twice."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from paceline.kvstore.policy import POLICIES, create_policy
from paceline.kvstore.store import BlockStore
from paceline.kvstore.values import Slot, WrittenBlock
from tests.unit.kvstore.memory_space import MemorySpace, key_of, shape_of

KEYS = st.integers(0, 30)
SHAPES = (shape_of(1), shape_of(2, 300), shape_of(3, 900))


class StoreMachine(RuleBasedStateMachine):
    """Workers of three layouts share a small arena."""

    policy = "s3fifo"

    def __init__(self) -> None:
        super().__init__()
        self.index: set[tuple[bytes, bytes]] = set()
        self.store = BlockStore(
            MemorySpace(5, 1100, num_backed=4),
            lambda: create_policy(self.policy),
            lease_s=10.0,
            on_change=self.note,
        )
        self.now_s = 0.0
        self.reserved: dict[str, list[Slot]] = {}
        self.num_sessions = 0

    def note(self, kv_root: bytes, key: bytes, is_readable: bool) -> None:
        entry = (kv_root, key)
        assert (entry in self.index) is not is_readable
        (self.index.add if is_readable else self.index.remove)(entry)

    def sessions(self) -> list[str]:
        return sorted(self.store.sessions)

    @rule(shape=st.sampled_from(SHAPES))
    def attach(self, shape: object) -> None:
        self.num_sessions += 1
        name = f"s{self.num_sessions}"
        self.store.open_session(name, shape, self.now_s)  # type: ignore[arg-type]
        self.reserved[name] = []

    @precondition(lambda self: self.sessions())
    @rule(data=st.data(), count=st.integers(1, 6))
    def reserve(self, data: st.DataObject, count: int) -> None:
        name = data.draw(st.sampled_from(self.sessions()))
        slots = self.store.reserve(name, count, self.now_s)
        assert len(slots) <= count
        self.reserved[name] += slots

    @precondition(lambda self: any(self.reserved.get(s) for s in self.sessions()))
    @rule(data=st.data(), number=KEYS, is_tail=st.booleans())
    def commit(self, data: st.DataObject, number: int, is_tail: bool) -> None:
        names = [name for name in self.sessions() if self.reserved[name]]
        name = data.draw(st.sampled_from(names))
        slot = self.reserved[name].pop()
        # A tail's key never equals that of a full block.
        key = key_of(number + 1000 * is_tail)
        block = WrittenBlock(key, slot, 1, 16, is_tail)
        assert self.store.commit(name, block)
        assert self.store.shelves.contains(self.store.session(name).shape.kv_root, key)
        assert self.store.commit(name, block), "a second commit finds the block present"

    @precondition(lambda self: self.sessions())
    @rule(data=st.data(), number=KEYS)
    def commit_of_a_foreign_slot_changes_nothing(self, data: st.DataObject, number: int) -> None:
        name = data.draw(st.sampled_from(self.sessions()))
        root = self.store.session(name).shape.kv_root
        was_there = self.store.shelves.contains(root, key_of(number))
        stale = WrittenBlock(key_of(number), Slot(4096, 10**9), 1, 16)
        assert self.store.commit(name, stale) is was_there

    @precondition(lambda self: self.sessions())
    @rule(data=st.data(), number=KEYS)
    def acquire(self, data: st.DataObject, number: int) -> None:
        name = data.draw(st.sampled_from(self.sessions()))
        root = self.store.session(name).shape.kv_root
        block = self.store.acquire(name, key_of(number), self.now_s)
        assert (block is not None) is self.store.shelves.contains(root, key_of(number))

    @precondition(lambda self: self.sessions())
    @rule(data=st.data(), number=KEYS)
    def release(self, data: st.DataObject, number: int) -> None:
        self.store.release(data.draw(st.sampled_from(self.sessions())), [key_of(number)])

    @precondition(lambda self: self.sessions())
    @rule(data=st.data())
    def give_back_slots(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(self.sessions()))
        slots, self.reserved[name] = self.reserved[name], []
        self.store.unreserve(name, slots)
        self.store.unreserve(name, slots)

    @rule(shape=st.sampled_from(SHAPES), number=KEYS)
    def invalidate(self, shape: object, number: int) -> None:
        root = shape.kv_root  # type: ignore[attr-defined]
        self.store.shelves.invalidate(root, key_of(number))
        assert not self.store.shelves.contains(root, key_of(number))

    @precondition(lambda self: self.sessions())
    @rule(data=st.data(), number=KEYS)
    def report_corrupt(self, data: st.DataObject, number: int) -> None:
        name = data.draw(st.sampled_from(self.sessions()))
        session = self.store.session(name)
        is_pinned = key_of(number) in session.pins
        was_there = self.store.shelves.contains(session.shape.kv_root, key_of(number))
        if self.store.report_corrupt(name, key_of(number)):
            assert is_pinned and was_there

    @precondition(lambda self: self.sessions())
    @rule(data=st.data(), rests=st.booleans())
    def detach(self, data: st.DataObject, rests: bool) -> None:
        name = data.draw(st.sampled_from(self.sessions()))
        self.store.close_session(name, self.now_s, quarantine_s=5.0 if rests else 0.0)

    @rule(seconds=st.sampled_from([0.5, 4.0, 11.0]))
    def pass_time(self, seconds: float) -> None:
        self.now_s += seconds
        self.store.expire(self.now_s)

    @invariant()
    def books_are_right(self) -> None:
        assert self.store.check_integrity() == []

    @invariant()
    def index_is_told_of_every_shared_block(self) -> None:
        shelves = self.store.shelves
        held = {(root, key) for root in shelves.layouts for key in shelves.shared_keys(root)}
        assert held == self.index

    @invariant()
    def pinned_blocks_keep_their_slots(self) -> None:
        free = set(self.store.shelves.slots.free_offsets())
        for session in self.store.sessions.values():
            for pins in session.pins.values():
                assert all(pin.block.slot.offset not in free for pin in pins)


class FifoMachine(StoreMachine):
    """The same under the plain policy."""

    policy = "fifo"


assert set(POLICIES) == {"s3fifo", "fifo"}
TestS3Fifo = StoreMachine.TestCase
TestS3Fifo.settings = settings(max_examples=60, stateful_step_count=50, deadline=None)
TestFifo = FifoMachine.TestCase
TestFifo.settings = settings(max_examples=30, stateful_step_count=50, deadline=None)
