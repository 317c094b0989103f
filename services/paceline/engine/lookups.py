"""Questions of waiting sequences to the KV store: who asks, who waits, who holds pins.

    queued ──asked──> open ──answered──> answered (pins held) ──popped──> gone
       ^                │                    │
       └── withdrawn for a sequence that comes first ──┘

A lookup has one deadline from the moment it is queued, so nobody waits longer than that for
the store, whatever the queue. kv_exchange.py owns it; admission.py asks through it.
"""

from __future__ import annotations

from dataclasses import dataclass

from paceline.engine.events import LoadedEvent, LookupEvent
from paceline.engine.ports import StoredBlock
from paceline.engine.request import Sequence

LOOKUP_TIMEOUT_S = 4.0
"""How long a sequence waits for the store's answer; above the store's own pull deadline (2 s)."""

MAX_LOOKUPS = 8
"""Lookups that may hold pins at a time, so that a long queue cannot pin the arena."""


@dataclass(slots=True)
class Lookup:
    """One sequence's question."""

    sequence: Sequence
    keys: tuple[bytes, ...]
    tail_key: bytes
    deadline_s: float
    id: int | None = None
    """Set when it was asked."""
    blocks: tuple[StoredBlock, ...] | None = None
    """Set when it was answered."""


class Lookups:
    """All lookups of sequences that wait."""

    def __init__(self) -> None:
        self._of_sequence: dict[int, Lookup] = {}
        self._asked: dict[int, Lookup] = {}
        self._next_id = 1

    @property
    def sequence_ids(self) -> list[int]:
        """Sequences with a lookup in any state."""
        return list(self._of_sequence)

    def queue(self, sequence: Sequence, keys: list[bytes], tail_key: bytes, now_s: float) -> None:
        """Note what a waiting sequence wants to know; `ask` does the asking."""
        deadline_s = now_s + LOOKUP_TIMEOUT_S
        self._of_sequence[sequence.id] = Lookup(sequence, tuple(keys), tail_key, deadline_s)

    def ask(self, now_s: float) -> list[LookupEvent | LoadedEvent]:
        """Ask for queued lookups, first in order, as far as `MAX_LOOKUPS` allows.

        One that comes first takes the place of the last that was asked, whose pins go back.
        """
        events: list[LookupEvent | LoadedEvent] = []
        for lookup in self._of_sequence.values():
            if lookup.blocks is None and lookup.deadline_s <= now_s:
                self._asked.pop(lookup.id or 0, None)
                lookup.blocks = ()
        queued = [x for x in self._of_sequence.values() if x.id is None and x.blocks is None]
        for lookup in sorted(queued, key=_order):
            if len(self._asked) >= MAX_LOOKUPS:
                last = max(self._asked.values(), key=_order)
                if _order(last) <= _order(lookup):
                    break
                events += self._release(last)
                last.id, last.blocks = None, None
            lookup.id, self._next_id = self._next_id, self._next_id + 1
            self._asked[lookup.id] = lookup
            request_id = lookup.sequence.request.spec.request_id
            events.append(LookupEvent(lookup.id, request_id, lookup.keys, lookup.tail_key))
        return events

    def answer(self, lookup_id: int, blocks: tuple[StoredBlock, ...]) -> list[LoadedEvent]:
        """Take an answer; one that nobody waits for is handed straight back."""
        lookup = self._asked.get(lookup_id)
        if lookup is None or lookup.blocks is not None:
            return [LoadedEvent(lookup_id, (), 0, 0)] if blocks else []
        lookup.blocks = blocks
        return []

    def is_waiting(self, sequence: Sequence, now_s: float) -> bool:
        """Whether a sequence's lookup has no answer yet and is not overdue."""
        lookup = self._of_sequence.get(sequence.id)
        return lookup is not None and lookup.blocks is None and now_s < lookup.deadline_s

    def found(self, sequence: Sequence) -> tuple[StoredBlock, ...]:
        """Return the blocks the store has for a sequence."""
        lookup = self._of_sequence.get(sequence.id)
        return () if lookup is None else lookup.blocks or ()

    def pop(self, sequence: Sequence) -> Lookup | None:
        """Take a sequence's lookup away, pins and all."""
        lookup = self._of_sequence.pop(sequence.id, None)
        if lookup is not None and lookup.id is not None:
            self._asked.pop(lookup.id, None)
        return lookup

    def forget(self, sequence: Sequence) -> list[LoadedEvent]:
        """Give back the pins of a sequence that ended while waiting."""
        lookup = self.pop(sequence)
        if lookup is None or lookup.id is None or not lookup.blocks:
            return []
        return [LoadedEvent(lookup.id, (), 0, 0)]

    def void(self) -> None:
        """Answer everything with nothing: the store that was asked is gone, pins with it."""
        self._asked.clear()
        for lookup in self._of_sequence.values():
            lookup.blocks = ()

    def next_deadline_s(self) -> float | None:
        """When the earliest lookup without an answer is given up, or None."""
        open_s = [x.deadline_s for x in self._of_sequence.values() if x.blocks is None]
        return min(open_s, default=None)

    def _release(self, lookup: Lookup) -> list[LoadedEvent]:
        assert lookup.id is not None, "released before it was asked"
        del self._asked[lookup.id]
        return [LoadedEvent(lookup.id, (), 0, 0)] if lookup.blocks else []


def _order(lookup: Lookup) -> tuple[int, int, int]:
    return (*lookup.sequence.request.order, lookup.sequence.index)
