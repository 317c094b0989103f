"""A request's way through the fleet, as the gateway leads it: route, prefill, hand over, decode.

Where it goes is decided by the shipped routing policy on what a gateway knows: reports up to 0.1 s
old, and its own calls since. Without a decode worker requests are parked until one is ready; they
fail at their deadline. A stream whose worker leaves goes on elsewhere, with the KV that the store
has of it: a pause of the transfer and a step.

KV moves from a node's memory to its workers and between nodes at the profile's speeds. What a
prefill computes is copied on while it computes; what is left behind its last chunk is the larger
of that chunk and what the link has not managed meanwhile. Transfers do not slow each other, nor
the steps beside them; a starting worker is not slowed by loading. One gateway, and no limit on
how many requests it lets in.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

from paceline.cli.simulation.events import EventQueue
from paceline.cli.simulation.fleet import Fleet, Worker
from paceline.cli.simulation.meters import Meters
from paceline.cli.simulation.sequence import STORE_BLOCK_TOKENS, Sequence
from paceline.cli.simulation.store import NodeStore
from paceline.domain.member import Role
from paceline.gateway.routing.base import FleetLoad, RoutingPolicy, RoutingRequest


class Gateway:
    """Leads requests; every one ends exactly once, served or with a reason."""

    def __init__(
        self,
        fleet: Fleet,
        policy: RoutingPolicy,
        events: EventQueue,
        meters: Meters,
        deadline_s: float,
        on_parked: Callable[[], None],
    ) -> None:
        self.num_ended = 0
        self.parked: dict[int, tuple[Sequence, bool]] = {}
        """By id: who waits for a worker, and whether it had begun to stream."""
        self._fleet = fleet
        self._policy = policy
        self._events = events
        self._meters = meters
        self._deadline_s = deadline_s
        self._on_parked = on_parked
        self.in_flight: Counter[str] = Counter()
        """By worker: calls that have not ended."""
        self.pending_tokens: Counter[str] = Counter()
        """By worker: prompt tokens sent there and not computed yet."""
        self._at: dict[int, Worker] = {}
        """Sequence -> worker that has it or will."""
        self._prefill_s: dict[int, float] = {}
        """Sequence -> when its prefill began to wait for its first step."""

    # -- coming in ------------------------------------------------------------------------

    def arrive(self, sequence: Sequence) -> None:
        """Take a new request."""
        self._meters.note_arrival(sequence.arrival, self._events.now_s)
        if sequence.context + sequence.left > self._fleet.profile.replica.kv_tokens:
            sequence.failure = "too-long"
            self.end(sequence)
            return
        self._send(sequence)

    def note_ready(self) -> None:
        """Send those that waited for a worker."""
        waiting, self.parked = self.parked, {}
        for sequence, is_resumed in waiting.values():
            self._send(sequence, is_resumed=is_resumed)

    def _send(self, sequence: Sequence, *, is_resumed: bool = False) -> None:
        """Choose workers, and start with the first of them."""
        now_s, fleet = self._events.now_s, self._fleet
        decode = fleet.ready(Role.DECODE)
        if not decode:
            self._park(sequence, is_resumed)
            return
        holders = self._holders(sequence)
        block_bytes = STORE_BLOCK_TOKENS * fleet.profile.kv_token_bytes
        decision = self._policy.decide(
            RoutingRequest(
                num_tokens=sequence.context,
                block_size=STORE_BLOCK_TOKENS,
                block_bytes=block_bytes,
                holders=holders,
                max_tokens=sequence.left,
            ),
            FleetLoad(
                prefill=[] if is_resumed else [w.seen(now_s) for w in fleet.ready(Role.PREFILL)],
                decode=[w.seen(now_s) for w in decode],
                in_flight=self.in_flight,
                pending_tokens=self.pending_tokens,
                near_bytes_per_s=fleet.profile.near_bytes_per_s,
                far_bytes_per_s=fleet.profile.far_bytes_per_s,
                hop_s=fleet.profile.hop_s,
            ),
        )
        sequence.decode_worker = decision.decode.id
        first = decision.prefill or decision.decode
        best = max(holders.values(), default=0)
        near = holders.get(first.node_id, 0)
        cached = min(best * STORE_BLOCK_TOKENS, sequence.context - 1)
        sequence.computed = cached
        if sequence.cached_tokens is None:
            sequence.cached_tokens = cached
            self._meters.note_cached(sequence.context, cached)
        fetch_s = self._move_s(near * STORE_BLOCK_TOKENS, (best - near) * STORE_BLOCK_TOKENS)
        worker = fleet.workers[first.id]
        self._share(sequence, worker, cached)
        if decision.prefill is not None:
            sequence.prefill_worker = first.id
            self._call(worker, sequence, sequence.context)
        else:
            self._call(worker, sequence, max(0, sequence.context - cached))
        self._deliver(worker, sequence, fetch_s)

    def _park(self, sequence: Sequence, is_resumed: bool) -> None:
        self.parked[sequence.id] = (sequence, is_resumed)
        expiry_s = sequence.arrival.at_s + self._deadline_s
        self._events.at(expiry_s, self._expire, sequence)
        self._on_parked()

    def _expire(self, sequence: Sequence) -> None:
        if self.parked.pop(sequence.id, None) is not None:
            sequence.failure = "no-worker"
            self.end(sequence)

    # -- to a worker and away -------------------------------------------------------------

    def _call(self, worker: Worker, sequence: Sequence, prompt_tokens: int) -> None:
        """Count a call as the gateway does: by requests, and by prompt tokens not computed."""
        self._at[sequence.id] = worker
        self.in_flight[worker.id] += 1
        sequence.claimed_tokens = prompt_tokens
        self.pending_tokens[worker.id] += prompt_tokens

    def _note_computed(self, worker: Worker, sequence: Sequence) -> None:
        self.pending_tokens[worker.id] -= sequence.claimed_tokens
        sequence.claimed_tokens = 0

    def _hang_up(self, sequence: Sequence) -> Worker:
        worker = self._at.pop(sequence.id)
        self._note_computed(worker, sequence)
        self.in_flight[worker.id] -= 1
        return worker

    def _deliver(self, worker: Worker, sequence: Sequence, delay_s: float) -> None:
        """Queue a sequence at a worker once its KV is there."""
        pending = max(0, sequence.context - sequence.computed - 1)
        worker.num_incoming += 1
        worker.incoming_tokens += pending
        self._events.at(self._events.now_s + delay_s, self._queue, worker, sequence, pending)

    def _queue(self, worker: Worker, sequence: Sequence, pending: int) -> None:
        worker.num_incoming -= 1
        worker.incoming_tokens -= pending
        if worker.has_evicted:
            self._hang_up(sequence)
            self._fleet.check_gone(worker)
            self._resume(sequence, worker)
            return
        if worker.role is Role.PREFILL:
            self._prefill_s[sequence.id] = self._events.now_s
        worker.engine.add(sequence)

    def _move_s(self, near_tokens: int, far_tokens: int) -> float:
        profile = self._fleet.profile
        near_s = near_tokens * profile.kv_token_bytes / profile.near_bytes_per_s
        return near_s + far_tokens * profile.kv_token_bytes / profile.far_bytes_per_s

    def _holders(self, sequence: Sequence) -> dict[str, int]:
        """Return how many leading blocks of the store's size each node holds."""
        holders: dict[str, int] = {}
        per_block = sequence.arrival.block_tokens // STORE_BLOCK_TOKENS
        if sequence.prefix:
            for id_, node in self._fleet.nodes.items():
                found = node.num_leading(sequence.prefix) * per_block
                if found:
                    holders[id_] = found
        if sequence.held_by:
            own = sequence.held_tokens // STORE_BLOCK_TOKENS
            holders[sequence.held_by] = max(own, holders.get(sequence.held_by, 0))
        return holders

    # -- what engines tell ----------------------------------------------------------------

    def on_steps(self, steps: int, streams: int, emitted: float, gap_s: float) -> None:
        """Count the pieces that streams got."""
        self._meters.note_gaps(steps * streams, emitted, gap_s)

    def on_computed(self, sequence: Sequence) -> None:
        """Move a computed prompt to its decode worker."""
        source = self._hang_up(sequence)
        self._keep(sequence, source, sequence.context)
        began_s = self._prefill_s.pop(sequence.id)
        self._fleet.check_gone(source)
        target = self._fleet.workers.get(sequence.decode_worker)
        if target is None or not target.is_ready:
            self._send(sequence, is_resumed=True)
            return
        delay_s = self._fleet.profile.hop_s
        delay_s += self._hand_over_s(sequence, source, target, self._events.now_s - began_s)
        sequence.computed = sequence.context - 1
        self._share(sequence, target, sequence.context)
        self._call(target, sequence, 0)
        self._deliver(target, sequence, delay_s)

    def _hand_over_s(
        self, sequence: Sequence, source: Worker, target: Worker, spent_s: float
    ) -> float:
        load_s = self._move_s(sequence.context, 0)
        if source.member.node_id == target.member.node_id:
            return load_s
        there = self._node(target).num_leading(sequence.prefix) * sequence.arrival.block_tokens
        far = max(0, sequence.context - there)
        chunk = min(far, self._fleet.profile.replica.chunk_tokens)
        return load_s + max(self._move_s(0, far) - spent_s, self._move_s(0, chunk))

    def on_token(self, sequence: Sequence) -> None:
        """Note a first token, or that a stream goes on."""
        now_s = self._events.now_s
        worker = self._at[sequence.id]
        self._note_computed(worker, sequence)
        if sequence.first_token_s is None:
            sequence.first_token_s = now_s
            self._meters.note_first_token(now_s - sequence.arrival.at_s)
            if not sequence.prefill_worker:
                self._keep(sequence, worker, sequence.arrival.prompt_tokens)
        elif sequence.paused_s is not None:
            self._meters.note_gaps(1, 1.0, now_s - sequence.paused_s)
        sequence.paused_s = None

    def on_end(self, sequence: Sequence) -> None:
        """Note a last token, or that an engine gave a request up."""
        worker = self._hang_up(sequence)
        self.end(sequence)
        self._fleet.check_gone(worker)

    def on_preempted(self, sequence: Sequence) -> None:
        """Bring a sequence back to the queue it was in, with its KV from the store."""
        worker = self._at[sequence.id]
        self._deliver(worker, sequence, self._move_s(sequence.computed, 0))

    def on_evicted(self, sequences: list[Sequence]) -> None:
        """Find other workers for what a leaving one hands over."""
        for sequence in sequences:
            worker = self._hang_up(sequence)
            self._resume(sequence, worker)
            self._fleet.check_gone(worker)

    def _resume(self, sequence: Sequence, worker: Worker) -> None:
        self._prefill_s.pop(sequence.id, None)
        self._keep(sequence, worker, sequence.computed)
        is_stream = worker.role is Role.DECODE
        if sequence.first_token_s is not None:
            sequence.migrations += 1
        self._send(sequence, is_resumed=is_stream)

    def _keep(self, sequence: Sequence, worker: Worker, tokens: int) -> None:
        """Have a worker's node hold what was computed, for this request and by prefix."""
        sequence.held_by, sequence.held_tokens = worker.member.node_id, tokens
        if sequence.prefix:
            block_tokens = sequence.arrival.block_tokens
            self._node(worker).put(sequence.prefix[: tokens // block_tokens], block_tokens)

    def _share(self, sequence: Sequence, worker: Worker, tokens: int) -> None:
        """Have a worker read the prefix from its node, which copies what it lacks."""
        if sequence.prefix:
            node, block_tokens = self._node(worker), sequence.arrival.block_tokens
            blocks = sequence.prefix[: tokens // block_tokens]
            node.put(blocks, block_tokens)
            node.read(blocks)

    def _node(self, worker: Worker) -> NodeStore:
        return self._fleet.nodes[worker.member.node_id]

    def end(self, sequence: Sequence) -> None:
        """Book the end of a request."""
        assert not sequence.is_ended, f"request {sequence.id} ends twice"
        sequence.is_ended = True
        self.num_ended += 1
        now_s = self._events.now_s
        if not sequence.failure:
            sequence.last_token_s = now_s
            if now_s - sequence.arrival.at_s > self._deadline_s:
                sequence.failure = "deadline"
        self._meters.note_end(sequence)
