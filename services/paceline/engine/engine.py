"""The engine: submit, cancel, step. The page to read first.

`step` admits waiting sequences (own prefix cache, then the KV store), plans one iteration,
runs it, books the result and writes finished blocks to the store. One thread owns all of it;
worker/engine_process.py calls it in a loop and carries its events to the worker.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import dropwhile
from typing import Protocol

from paceline.domain.blocks import salt_key, tail_key
from paceline.domain.errors import AlreadyExistsError, InternalError, InvalidRequestError
from paceline.domain.request import FinishReason, GenerationSpec, TokenChunk
from paceline.engine.events import EngineEvent, EngineLoad, FailedEvent, OutputEvent
from paceline.engine.kv_exchange import KvExchange
from paceline.engine.ports import BlockArena, PageMemory, Slot, StoredBlock
from paceline.engine.request import Phase, Request, Sequence
from paceline.engine.scheduler import Scheduler
from paceline.engine.step import SampledToken, StepPlan, StepResult


class StepRunner(PageMemory, Protocol):
    """Executes plans on tensors; engine/runner.py is the implementation."""

    def run(self, plan: StepPlan) -> StepResult:
        """Compute one step."""
        ...


class Engine:
    """Continuous batching over one runner."""

    def __init__(
        self,
        runner: StepRunner,
        scheduler: Scheduler,
        *,
        kv_root: bytes,
        monotonic: Callable[[], float],
    ) -> None:
        self._runner = runner
        self._scheduler = scheduler
        self._kv_root = kv_root
        self._monotonic = monotonic
        self._block_size = scheduler.block_size
        self._exchange = KvExchange(scheduler.pool, runner, scheduler.block_size, kv_root)
        self._requests: dict[str, Request] = {}
        self._events: list[EngineEvent] = []
        self._num_arrivals = 0
        self._num_sequences = 0
        self._num_steps = 0
        self._last_step_s = 0.0

    # -- commands -------------------------------------------------------------------------

    def submit(
        self,
        spec: GenerationSpec,
        *,
        is_prefill_only: bool = False,
        resumed: Mapping[int, tuple[int, ...]] | None = None,
        finished_indices: frozenset[int] = frozenset(),
        fleet_id: str | None = None,
    ) -> None:
        """Queue a request; `fleet_id` keys its tail block and defaults to its own id.

        Raises:
            AlreadyExistsError: a request with this id runs.
            InvalidRequestError: the prompt is empty or does not fit.
        """
        if spec.request_id in self._requests:
            raise AlreadyExistsError(f"request {spec.request_id} is running")
        longest = max((len(t) for t in (resumed or {}).values()), default=0)
        num_tokens = len(spec.prompt_token_ids) + longest
        if not 0 < num_tokens < self._scheduler.max_context_tokens:
            limit = self._scheduler.max_context_tokens
            raise InvalidRequestError(
                "prompt", f"{num_tokens} prompt tokens, the context holds {limit}"
            )
        self._num_arrivals += 1
        request = Request(
            spec=spec,
            key=salt_key(spec.cache_salt),
            root=self._kv_root,
            arrival=self._num_arrivals,
            fleet_id=spec.request_id if fleet_id is None else fleet_id,
            is_prefill_only=is_prefill_only,
            resumed=dict(resumed or {}),
            finished_indices=finished_indices,
        )
        self._requests[spec.request_id] = request
        indices = [i for i in range(spec.n) if i not in finished_indices]
        if is_prefill_only:
            indices = [0]
        if not indices:
            self._end_request(request)
            return
        request.is_forked = len(indices) == 1
        first = self._new_sequence(request, indices[0])
        if request.is_forked and not is_prefill_only:
            first.token_ids.extend(request.resumed.get(indices[0], ()))
        self._scheduler.add(first)

    def cancel(self, request_id: str, index: int | None = None) -> None:
        """End a request, or one of its outputs; unknown ids are ignored. Frees pages at once."""
        request = self._requests.get(request_id)
        if request is None:
            return
        if index is not None and not request.is_forked:
            # Before the fork all outputs are one sequence: remember not to make this one.
            request.finished_indices |= {index}
            if len(request.finished_indices) < request.spec.n:
                return
        for sequence in request.sequences:
            if index is None or sequence.index == index or not request.is_forked:
                self._finish(sequence, FinishReason.CANCELLED)
        if request.is_finished:
            self._end_request(request)

    def attach_arena(self, arena: BlockArena | None) -> None:
        """Use another KV store memory, or none."""
        self._exchange.attach(arena)

    def grant_slots(self, slots: list[Slot]) -> None:
        """Take slots of the KV store to write into."""
        self._exchange.grant(slots)

    def answer_lookup(self, lookup_id: int, blocks: tuple[StoredBlock, ...]) -> None:
        """Take the store's answer to a LookupEvent."""
        self._events += self._exchange.answer(lookup_id, blocks)

    # -- stepping -------------------------------------------------------------------------

    @property
    def has_work(self) -> bool:
        """Whether `step` would do something right now."""
        s, now = self._scheduler, self._monotonic()
        return any(q.num_remaining > 0 for q in s.running) or any(
            not self._exchange.is_waiting_for(q, now) for q in s.waiting
        )

    def next_deadline_s(self) -> float | None:
        """When `step` should be called again although nothing else happened."""
        return self._exchange.next_deadline_s()

    def step(self) -> list[EngineEvent]:
        """Do one iteration and return what happened since the last call."""
        now = self._monotonic()
        self._admit(now)
        self._settle_leaders(now)
        plan = self._scheduler.plan()
        if plan is None and any(s.num_remaining > 0 for s in self._scheduler.running):
            # Pages held for the store are the only ones left to take back.
            self._exchange.drop_saves()
            plan = self._scheduler.plan()
        if plan is not None:
            self._run(plan, now)
            self._settle_leaders(now)
        self._events += self._exchange.write_saves(self._monotonic())
        self._settle_leaders(now)
        events, self._events = self._events, []
        return events

    def load(self) -> EngineLoad:
        """Report how busy the engine is."""
        s = self._scheduler
        pending = sum(max(0, q.num_remaining - 1) for q in [*s.waiting, *s.running])
        return EngineLoad(
            num_waiting=len(s.waiting),
            num_running=len(s.running),
            pending_prefill_tokens=pending,
            free_blocks=s.pool.num_available,
            total_blocks=s.pool.num_pages,
            context_tokens=sum(q.num_computed for q in s.running),
            last_step_s=self._last_step_s,
            num_preemptions=s.num_preemptions,
            num_steps=self._num_steps,
            num_evictions=s.pool.num_evictions,
        )

    def check_integrity(self) -> list[str]:
        """Check every book of the engine; an empty list means all hold."""
        problems = self._scheduler.check_integrity(self._exchange.held_pages)
        queued = {s.id for s in [*self._scheduler.waiting, *self._scheduler.running]}
        for request in self._requests.values():
            alive = {s.id for s in request.sequences if s.phase is not Phase.FINISHED}
            if not alive <= queued:
                problems.append(f"request {request.spec.request_id}: sequences in no queue")
            if not alive and not request.num_unsaved:
                problems.append(f"request {request.spec.request_id}: over and not ended")
        return problems

    @property
    def num_requests(self) -> int:
        """Requests that are not over."""
        return len(self._requests)

    # -- inside a step --------------------------------------------------------------------

    def _admit(self, now_s: float) -> None:
        """Start waiting sequences in order while slots and pages last."""
        for sequence in list(self._scheduler.waiting):
            if not self._scheduler.can_admit():
                return
            if self._exchange.is_attached and not sequence.has_looked_up:
                self._look_up(sequence, now_s)
            if self._exchange.is_waiting_for(sequence, now_s):
                continue
            num_local = self._scheduler.match_prefix(sequence)
            if not self._scheduler.has_room(sequence):
                self._scheduler.put_back(sequence)
                return
            self._start(sequence, num_local, now_s)

    def _start(self, sequence: Sequence, num_local: int, now_s: float) -> None:
        request = sequence.request
        in_store = [b.key for b in self._exchange.found_blocks(sequence)]
        gained, events = self._exchange.load(sequence, num_local)
        self._events += events
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

    def _look_up(self, sequence: Sequence, now_s: float) -> None:
        """Ask the store for what the own cache does not have."""
        request = sequence.request
        limit = sequence.target if sequence.is_leader else sequence.target - 1
        num_full = limit // self._block_size
        keys = sequence.block_keys(num_full, self._block_size)
        tail = b""
        if not request.is_prefill_only:
            find = self._scheduler.pool.find
            keys = list(dropwhile(lambda key: find(key) is not None, keys))
            tail = self._tail_key(sequence) if sequence.num_output == 0 else b""
        if not keys and not tail:
            sequence.has_looked_up = True
            return
        event = self._exchange.ask(sequence, keys, tail, now_s)
        if event is not None:
            self._events.append(event)

    def _tail_key(self, sequence: Sequence) -> bytes:
        """Return the key of the partial block in front of the last prompt token, or b""."""
        request, size = sequence.request, self._block_size
        last = sequence.num_prompt - 1
        num_full = last // size
        if last % size == 0:
            return b""
        keys = sequence.block_keys(num_full, size)
        parent = keys[-1] if keys else request.root
        tokens = sequence.token_ids[num_full * size : last]
        return tail_key(request.key, parent, tokens, request.fleet_id)

    def _settle_leaders(self, now_s: float) -> None:
        """Fork or finish sequences that computed the prompt for others."""
        for leader in [s for s in self._scheduler.running if s.is_leader]:
            if leader.num_remaining > 0:
                continue
            if not leader.request.is_prefill_only:
                self._fork(leader)
                continue
            if not leader.has_queued_tail:
                leader.has_queued_tail = True
                key = self._tail_key(leader)
                if key:
                    self._exchange.queue_tail(leader, key, now_s)
            if leader.request.num_unsaved == 0:
                self._finish(leader, None)
                self._end_request(leader.request)

    def _fork(self, leader: Sequence) -> None:
        request = leader.request
        request.is_forked = True
        indices = [i for i in range(request.spec.n) if i not in request.finished_indices]
        leader.index = indices[0]
        siblings = [self._new_sequence(request, index) for index in indices[1:]]
        for sequence in [leader, *siblings]:
            sequence.token_ids.extend(request.resumed.get(sequence.index, ()))
        self._scheduler.fork(leader, siblings)

    def _run(self, plan: StepPlan, now_s: float) -> None:
        try:
            result = self._runner.run(plan)
        except InternalError as error:
            self._fail_rows(plan, error)
            return
        self._num_steps += 1
        self._last_step_s = result.elapsed_s
        chunks: dict[str, list[TokenChunk]] = {}
        touched: dict[str, Request] = {}
        advanced = self._scheduler.commit(plan, result)
        for (sequence, _), sampled in zip(advanced, result.sampled, strict=True):
            self._exchange.queue_saves(sequence, now_s)
            request = sequence.request
            touched[request.spec.request_id] = request
            if sampled is not None:
                chunk = self._take_token(sequence, sampled)
                chunks.setdefault(request.spec.request_id, []).append(chunk)
        for request_id, request in touched.items():
            self._report(request, tuple(chunks.get(request_id, ())))

    def _take_token(self, sequence: Sequence, sampled: SampledToken) -> TokenChunk:
        reason = self._scheduler.finish_reason(sequence)
        if reason is not None:
            self._finish(sequence, reason)
        return TokenChunk(
            index=sequence.index,
            token_ids=(sampled.token_id,),
            logprobs=() if sampled.logprobs is None else (sampled.logprobs,),
            finish_reason=reason,
            target_steps=1,
        )

    def _report(self, request: Request, chunks: tuple[TokenChunk, ...]) -> None:
        """Tell the host about a request; hits come with the first report."""
        is_over = request.is_finished and not request.is_prefill_only
        is_first = not request.has_reported_hits
        request.has_reported_hits = True
        self._events.append(
            OutputEvent(
                request_id=request.spec.request_id,
                chunks=chunks,
                local_hit_tokens=request.local_hit_tokens if is_first else 0,
                store_hit_tokens=request.store_hit_tokens if is_first else 0,
                computed_tokens=max((s.num_computed for s in request.sequences), default=0),
                is_finished=is_over,
            )
        )
        if is_over:
            del self._requests[request.spec.request_id]

    def _end_request(self, request: Request) -> None:
        """Report the end of a request that ended outside a step."""
        self._events.append(
            OutputEvent(
                request_id=request.spec.request_id,
                local_hit_tokens=0 if request.has_reported_hits else request.local_hit_tokens,
                store_hit_tokens=0 if request.has_reported_hits else request.store_hit_tokens,
                computed_tokens=max(len(request.spec.prompt_token_ids) - 1, 0),
                is_finished=True,
            )
        )
        self._requests.pop(request.spec.request_id, None)

    def _finish(self, sequence: Sequence, reason: FinishReason | None) -> None:
        self._events += self._exchange.forget(sequence)
        self._scheduler.finish(sequence, reason)

    def _fail_rows(self, plan: StepPlan, error: InternalError) -> None:
        """End the requests of a step that could not be computed; the others go on."""
        ids = {row.sequence_id for row in plan.rows}
        for request in list(self._requests.values()):
            if any(s.id in ids for s in request.sequences):
                for sequence in request.sequences:
                    self._finish(sequence, FinishReason.ERROR)
                del self._requests[request.spec.request_id]
                self._events.append(
                    FailedEvent(request.spec.request_id, error.reason, error.message)
                )

    def _new_sequence(self, request: Request, index: int) -> Sequence:
        self._num_sequences += 1
        sequence = Sequence(
            id=self._num_sequences,
            request=request,
            index=index,
            token_ids=list(request.spec.prompt_token_ids),
        )
        request.sequences.append(sequence)
        return sequence


def _common_prefix(keys: list[bytes], others: list[bytes]) -> int:
    """Count the leading keys that are among the others in the same order."""
    count = 0
    for key, other in zip(keys, others, strict=False):
        if key != other:
            break
        count += 1
    return count
