"""Starts waiting sequences: own prefix cache first, then the KV store, then a place to run.

One pass over the queue per step, in order. A sequence for which there is no room holds up
those behind it, so that nobody is passed for ever; one that waits for the store does not.
engine.py calls this file at the start of a step.
"""

from __future__ import annotations

from itertools import dropwhile

from paceline.engine.events import EngineEvent
from paceline.engine.kv_exchange import KvExchange
from paceline.engine.request import Sequence
from paceline.engine.scheduler import Scheduler


class Admission:
    """Decides about the waiting sequences of one scheduler."""

    def __init__(self, scheduler: Scheduler, exchange: KvExchange) -> None:
        self._scheduler = scheduler
        self._exchange = exchange
        self._block_size = scheduler.block_size

    def has_candidate(self, now_s: float) -> bool:
        """Whether a sequence could start now if there is room; the others wait for the store."""
        for num_asking, sequence in enumerate(self._scheduler.waiting):
            if self._scheduler.num_startable(sequence) <= num_asking:
                return False
            if not self._exchange.lookups.is_waiting(sequence, now_s):
                return True
        return False

    def admit(self, now_s: float) -> list[EngineEvent]:
        """Start what can start; return the questions to the store and the ends of pins."""
        scheduler, events, num_asking = self._scheduler, list[EngineEvent](), 0
        if not scheduler.waiting:
            # Nobody who waits, nobody who asks: the usual step.
            return events
        for sequence in list(scheduler.waiting):
            if scheduler.num_startable(sequence) <= num_asking:
                break
            if self._exchange.is_attached and not sequence.has_looked_up:
                self._look_up(sequence, now_s)
            if self._exchange.lookups.is_waiting(sequence, now_s):
                num_asking += 1
                continue
            num_local = scheduler.match_prefix(sequence)
            if not scheduler.make_room(sequence):
                scheduler.put_back(sequence)
                break
            events += self._start(sequence, num_local, now_s)
        return [*events, *self._exchange.lookups.ask(now_s)]

    def _start(self, sequence: Sequence, num_local: int, now_s: float) -> list[EngineEvent]:
        request = sequence.request
        in_store = [block.key for block in self._exchange.lookups.found(sequence)]
        gained, events = self._exchange.load(sequence, num_local)
        self._scheduler.register_loaded(sequence)
        num_full = sequence.num_computed // self._block_size
        keys = sequence.block_keys(num_full, self._block_size)
        # A prefill must leave all its blocks in the store, also those it had at hand; other
        # sequences save only what they compute themselves.
        sequence.num_stored = (
            _common_prefix(keys, in_store) if request.is_prefill_only else num_full
        )
        if sequence.num_output == 0 and not request.has_reported_hits:
            request.local_hit_tokens = num_local * self._block_size
            request.store_hit_tokens = gained
        self._scheduler.start(sequence)
        self._exchange.queue_saves(sequence, now_s)
        return list[EngineEvent](events)

    def _look_up(self, sequence: Sequence, now_s: float) -> None:
        """Let a sequence ask the store for what the own cache does not have."""
        keys = sequence.block_keys(sequence.max_cached // self._block_size, self._block_size)
        tail = b""
        if not sequence.request.is_prefill_only:
            find = self._scheduler.pool.find
            keys = list(dropwhile(lambda key: find(key) is not None, keys))
            tail = sequence.tail_key(self._block_size) if sequence.num_output == 0 else b""
        sequence.has_looked_up = True
        if keys or tail:
            self._exchange.lookups.queue(sequence, keys, tail, now_s)


def _common_prefix(keys: list[bytes], others: list[bytes]) -> int:
    """Count the leading keys that are among the others in the same order."""
    count = 0
    for key, other in zip(keys, others, strict=False):
        if key != other:
            break
        count += 1
    return count
