"""A worker's engine: continuous batching in steps that take what the step cost says.

It plans as engine/scheduler.py does: all decoding rows, then chunks of prompts in the order they
came, as many tokens as a step takes and, beside streams that were there before, as the pace
allows (engine/chunking.py, the shipped code). A sequence starts when a row is free and its
prompt's KV fits beside what runs; when the KV is full, the last one loses its place, and starts
again with its KV from the store. A prefill worker never decodes, a decode worker may compute
prompts.

**Many steps at once.** While no prompt is computed, nobody starts and nobody ends, steps differ
only by their growing context. Up to `max_steps` of them are one event: the first and the last are
priced, those between lie on a line. With a step cost that is linear in context that is exact;
with a curve it is off where a bend lies between. Who comes in between cuts the run at the end of
the step that is under way. `max_steps` 1 takes every step by itself.

Not modelled: priorities, several outputs of a request, an engine's own prefix cache (its node's
store serves instead), and time for page copies.
"""

from __future__ import annotations

import math
from bisect import insort
from collections.abc import Callable
from typing import Protocol

from paceline.autoscaler.values import Replica
from paceline.cli.simulation.events import EventQueue
from paceline.cli.simulation.rows import DecodingRows
from paceline.cli.simulation.sequence import STORE_BLOCK_TOKENS, Chunk, Sequence, Steps
from paceline.domain.cost import StepShape
from paceline.domain.member import Load
from paceline.engine.chunking import StepPace

CHUNK_UNIT = 8
"""As in engine/scheduler.py."""
MAX_STEPS = 64
_TINY = 1e-9


class EngineOwner(Protocol):
    """Hears what an engine has done; times are those of the event queue."""

    def on_steps(self, steps: int, streams: int, emitted: float, gap_s: float) -> None:
        """Take that streams got `emitted` tokens in each of so many steps, `gap_s` apart."""
        ...

    def on_token(self, sequence: Sequence) -> None:
        """Take that a sequence got its first token on this engine."""
        ...

    def on_end(self, sequence: Sequence) -> None:
        """Take that a sequence got its last token, or failed here."""
        ...

    def on_computed(self, sequence: Sequence) -> None:
        """Take that a prompt is computed that decodes elsewhere."""
        ...

    def on_preempted(self, sequence: Sequence) -> None:
        """Take that a sequence lost its place."""
        ...

    def on_evicted(self, sequences: list[Sequence]) -> None:
        """Take that all are handed over, as was asked for."""
        ...


class Engine:
    """Steps of one worker."""

    def __init__(
        self,
        replica: Replica,
        mixed_step_ratio: float,
        events: EventQueue,
        owner: EngineOwner,
        *,
        is_prefill: bool,
        emission: Callable[[float], tuple[float, int]],
        deadline_s: float = math.inf,
        max_steps: int = MAX_STEPS,
    ) -> None:
        """`emission` says tokens and draft nodes per step and sequence at a moment."""
        self.busy_s = 0.0
        """In steps that have ended."""
        self.num_steps = 0
        self._replica = replica
        self._cost = replica.step_cost
        self._pace = StepPace(replica.step_cost, mixed_step_ratio)
        self._events = events
        self._owner = owner
        self._is_prefill = is_prefill
        self._emission = emission
        self._deadline_s = deadline_s
        self._max_steps = max_steps
        self._num_added = 0
        self._waiting: list[tuple[int, Sequence]] = []
        self._computing: list[Sequence] = []
        self._rows = DecodingRows()
        self._pending_tokens = 0
        self._steps: Steps | None = None
        self._version = 0
        self._must_evict = False

    # -- from outside ---------------------------------------------------------------------

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to do."""
        return not (self._waiting or self._computing or self._rows)

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence whose stored KV is at hand; `computed` says how much that is.

        One that lost its place here comes back to where it was in the queue.
        """
        now_s = self._events.now_s
        if not sequence.order:
            self._num_added += 1
            sequence.order = self._num_added
        sequence.target = sequence.context - 1 if self._is_prefill else sequence.context
        sequence.computed = min(sequence.computed, sequence.context - 1)
        sequence.streams_since = 0
        steps = self._steps
        sequence.arrived_step = self.num_steps + (steps.num_ended(now_s) if steps else 0)
        self._enqueue(sequence)
        if steps is None:
            self._begin()
        elif steps.num > 1 and self._can_start(sequence):
            self._cut(steps)

    def evict(self) -> None:
        """Hand all sequences over at the end of the step that is under way."""
        self._must_evict = True
        if self._steps is None:
            self._hand_over()
        elif self._steps.num > 1:
            self._cut(self._steps)

    def load(self) -> Load:
        """Return what a worker reports of itself."""
        steps, emitted = self._steps, 0.0
        if steps is not None and steps.num > 1:
            emitted = steps.emitted * steps.num_ended(self._events.now_s)
        used = self._rows.context(emitted) + sum(s.computed for s in self._computing)
        total = self._replica.kv_tokens // STORE_BLOCK_TOKENS
        return Load(
            num_waiting=len(self._waiting),
            num_running=len(self._rows) + len(self._computing),
            pending_prefill_tokens=max(0, self._pending_tokens),
            free_blocks=max(0, total - used // STORE_BLOCK_TOKENS),
            total_blocks=total,
            context_tokens=used,
        )

    def busy_until_now_s(self) -> float:
        """Return the seconds spent in steps, that under way included."""
        under_way_s = 0.0
        if self._steps is not None:
            under_way_s = self._events.now_s - self._steps.start_s
        return self.busy_s + under_way_s

    # -- starting -------------------------------------------------------------------------

    def _enqueue(self, sequence: Sequence) -> None:
        self._pending_tokens += max(0, sequence.remaining - 1)
        insort(self._waiting, (sequence.order, sequence))

    def _can_start(self, sequence: Sequence) -> bool:
        """Tell whether there is a row, and room for the prompt and a block more for each row."""
        num_running = len(self._rows) + len(self._computing)
        if num_running >= self._replica.max_rows:
            return False
        if not num_running:
            return True
        reserved = self._rows.context() + sum(s.target for s in self._computing)
        reserved += STORE_BLOCK_TOKENS * num_running
        return reserved + sequence.target <= self._replica.kv_tokens

    def _admit(self) -> None:
        now_s = self._events.now_s
        while self._waiting:
            sequence = self._waiting[0][1]
            if now_s - sequence.arrival.at_s > self._deadline_s:
                self._take_first()
                sequence.failure = "deadline"
                self._owner.on_end(sequence)
            elif self._can_start(sequence):
                self._take_first()
                if self._is_prefill and sequence.remaining <= 0:
                    self._computed(sequence)
                elif sequence.remaining > 1 or self._is_prefill:
                    self._pending_tokens += max(0, sequence.remaining - 1)
                    self._computing.append(sequence)
                else:
                    self._rows.join(sequence, is_fresh=True)
            else:
                return

    def _take_first(self) -> None:
        _, sequence = self._waiting.pop(0)
        self._pending_tokens -= max(0, sequence.remaining - 1)

    # -- planning -------------------------------------------------------------------------

    def _begin(self) -> None:
        """Start the next steps, if there is anything to do."""
        self._steps = None
        if self._must_evict:
            self._hand_over()
            return
        self._admit()
        emitted, nodes = self._emission(self._events.now_s)
        while self._lacks_room(emitted):
            self._preempt()
        if self._computing:
            self._steps = self._plan_chunks(emitted, nodes)
        elif self._rows:
            self._steps = self._plan_decoding(emitted, nodes)
        else:
            return
        self._schedule(self._steps)

    def _schedule(self, steps: Steps) -> None:
        self._version += 1
        self._events.at(steps.end_s, self._end, self._version)

    def _cut(self, steps: Steps) -> None:
        """End a run of steps with the one under way."""
        num = min(steps.num, steps.num_ended(self._events.now_s) + 1)
        if num < steps.num:
            steps.num = num
            self._schedule(steps)

    def _plan_decoding(self, emitted: float, nodes: int) -> Steps:
        num = 1
        if not self._rows.fresh:
            to_end = math.ceil(self._rows.until_end() / emitted - _TINY)
            growth = len(self._rows) * emitted
            to_full = int((self._replica.kv_tokens - self._rows.context()) / growth)
            num = max(1, min(self._max_steps, to_end, to_full))
        first_s = self._step_s(nodes, 0.0)
        rise_s = 0.0
        if num > 1:
            rise_s = (self._step_s(nodes, (num - 1) * emitted) - first_s) / (num - 1)
        return Steps(self._events.now_s, first_s, rise_s, num, emitted)

    def _step_s(self, nodes: int, emitted: float) -> float:
        return self._cost.step_s(self._decoding(nodes, self._rows.context(emitted)))

    def _decoding(self, nodes: int, attended: int) -> StepShape:
        rows = len(self._rows)
        return StepShape(
            rows=rows, tree_nodes=nodes * rows, tree_attended=nodes * attended, attended=attended
        )

    def _plan_chunks(self, emitted: float, nodes: int) -> Steps:
        """Fill a step with prompt tokens, as `Scheduler._choose_chunks` does."""
        rows, chunk_tokens = len(self._rows), self._replica.chunk_tokens
        least = min(CHUNK_UNIT, chunk_tokens)
        budget = max(chunk_tokens - rows, least)
        # Drafts are chosen behind the chunks, so the pace does not know them.
        step = self._decoding(0, self._rows.context())
        elder = min((s.streams_since or math.inf for s in self._rows), default=math.inf)
        chunks: list[Chunk] = []
        hopeless = math.inf
        for sequence in self._computing:
            most, start = min(sequence.remaining, budget), sequence.computed
            if most > 0 and elder <= sequence.arrived_step:
                # Where the least chunk does not fit, none fits behind a longer start.
                if start >= hopeless and most >= CHUNK_UNIT:
                    continue
                most = self._pace.chunk_tokens(
                    step, start=start, least=min(least, most), most=most, unit=CHUNK_UNIT
                )
                if not most:
                    hopeless = min(hopeless, start)
            if budget <= 0:
                break
            if most <= 0:
                continue
            chunks.append(Chunk(sequence, most))
            step, budget, least = step.with_chunk(most, start), budget - most, 0
        if nodes and rows:
            shape = self._decoding(nodes, self._rows.context())
            for chunk in chunks:
                shape = shape.with_chunk(chunk.tokens, chunk.sequence.computed)
            step = shape
        return Steps(self._events.now_s, self._cost.step_s(step), emitted=emitted, chunks=chunks)

    # -- booking --------------------------------------------------------------------------

    def _end(self, version: int) -> None:
        """Book the steps that end now, and start the next ones."""
        steps = self._steps
        if version != self._version or steps is None:
            return
        self.num_steps += steps.num
        self.busy_s += self._events.now_s - steps.start_s
        if self._rows:
            self._book_rows(steps)
        for chunk in steps.chunks:
            self._book_chunk(chunk)
        self._begin()

    def _book_rows(self, steps: Steps) -> None:
        rows = self._rows
        rows.advance(steps.emitted * steps.num)
        old = len(rows) - len(rows.fresh)
        if old:
            gap_s = (self._events.now_s - steps.start_s) / steps.num
            self._owner.on_steps(steps.num, old, steps.emitted, gap_s)
        for sequence in rows.fresh:
            self._note_token(sequence)
        rows.fresh.clear()
        for sequence in rows.take_ended():
            self._finish(sequence)

    def _book_chunk(self, chunk: Chunk) -> None:
        sequence = chunk.sequence
        self._pending_tokens -= min(chunk.tokens, max(0, sequence.remaining - 1))
        sequence.computed += chunk.tokens
        if self._is_prefill:
            if sequence.remaining <= 0:
                self._computing.remove(sequence)
                self._computed(sequence)
        elif sequence.remaining == 1:
            self._computing.remove(sequence)
            self._rows.join(sequence, is_fresh=True)
        elif sequence.remaining == 0:
            # The end of a prompt is drawn from in the same step.
            self._computing.remove(sequence)
            sequence.context += 1
            sequence.left -= 1
            self._note_token(sequence)
            if sequence.left > 0:
                self._rows.join(sequence, is_fresh=False)
            else:
                self._finish(sequence)

    def _computed(self, sequence: Sequence) -> None:
        sequence.order = 0
        self._owner.on_computed(sequence)

    def _note_token(self, sequence: Sequence) -> None:
        sequence.streams_since = self.num_steps
        self._owner.on_token(sequence)

    def _finish(self, sequence: Sequence) -> None:
        sequence.context += sequence.left
        sequence.left = 0
        self._owner.on_end(sequence)

    # -- losing a place -------------------------------------------------------------------

    def _lacks_room(self, emitted: float) -> bool:
        if len(self._rows) + len(self._computing) < 2:
            return False
        used = self._rows.context(emitted) + sum(s.computed for s in self._computing)
        return used > self._replica.kv_tokens

    def _preempt(self) -> None:
        """Take the place of whoever came last; what it had is in the store but for a block."""
        last = max([*self._rows, *self._computing], key=lambda s: s.order)
        self._take_out(last)
        last.target = last.context - 1 if self._is_prefill else last.context
        self._owner.on_preempted(last)

    def _take_out(self, sequence: Sequence) -> None:
        if sequence in self._rows:
            self._rows.take_out(sequence)
            sequence.computed = sequence.context - 1
        else:
            self._computing.remove(sequence)
            self._pending_tokens -= max(0, sequence.remaining - 1)
        sequence.computed -= sequence.computed % STORE_BLOCK_TOKENS
        if sequence.paused_s is None and sequence.first_token_s is not None:
            sequence.paused_s = self._events.now_s

    def _hand_over(self) -> None:
        """Give all sequences away, in the order they came."""
        running = sorted([*self._rows, *self._computing], key=lambda s: s.order)
        for sequence in running:
            self._take_out(sequence)
        waiting = [sequence for _, sequence in self._waiting]
        self._waiting.clear()
        self._pending_tokens = 0
        for sequence in (*running, *waiting):
            sequence.order = 0
        if running or waiting:
            self._owner.on_evicted([*running, *waiting])
