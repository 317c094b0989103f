"""The engine: submit, cancel, step. The page to read first.

`step` admits waiting sequences (admission.py), plans one iteration (scheduler.py), runs it,
books the result and writes finished blocks to the store (kv_exchange.py). One thread owns all
of it; worker/engine_process.py calls it in a loop and carries its events to the worker.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from paceline.domain.blocks import salt_key
from paceline.domain.drafts import DraftState, StagedDraft
from paceline.domain.errors import AlreadyExistsError, InternalError
from paceline.domain.progress import DraftRound
from paceline.domain.request import FinishReason, GenerationSpec, TokenChunk
from paceline.engine.admission import Admission
from paceline.engine.events import DraftsEvent, EngineEvent, EngineLoad, FailedEvent
from paceline.engine.integrity import check_requests
from paceline.engine.kv_exchange import KvExchange
from paceline.engine.ports import BlockArena, Slot, StepRunner, StoredBlock
from paceline.engine.reports import end_report, learnings_report, load_report, step_report
from paceline.engine.request import Phase, Request, Sequence, check_tokens
from paceline.engine.scheduler import Scheduler
from paceline.engine.spec.report import PacedReport
from paceline.engine.step import SampledToken, StepPlan

if TYPE_CHECKING:
    from paceline.engine.spec.bank import DraftBank
    from paceline.engine.spec.capture import Capture
    from paceline.engine.spec.speculator import Speculator

logger = logging.getLogger(__name__)

_LOADING_POLL_S = 0.01
"""Time between two looks at drafts that load while nothing else happens."""


class Engine:
    """Continuous batching over one runner."""

    def __init__(
        self,
        runner: StepRunner,
        scheduler: Scheduler,
        *,
        kv_root: bytes,
        vocab_size: int,
        monotonic: Callable[[], float],
        speculator: Speculator | None = None,
        capture: Capture | None = None,
        bank: DraftBank | None = None,
    ) -> None:
        """Without a speculator every step brings one token per sequence; a bank changes what
        its models are."""
        self._runner = runner
        self._speculator = speculator
        self._capture = capture
        self._bank = bank
        self._reports = None if speculator is None else PacedReport(speculator.report)
        self._scheduler = scheduler
        self._kv_root = kv_root
        self._vocab_size = vocab_size
        self._monotonic = monotonic
        self._exchange = KvExchange(
            scheduler.pool, runner, scheduler.block_size, kv_root, monotonic
        )
        self._admission = Admission(scheduler, self._exchange)
        self._requests: dict[str, Request] = {}
        self._leaders: list[Sequence] = []
        """Sequences to fork or to finish when their prompt is computed."""
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
        is_traced: bool = False,
    ) -> None:
        """Queue a request; `fleet_id` keys its tail block and defaults to its own id.

        Of one that `is_traced` it is also told who drafted.

        Raises:
            AlreadyExistsError: a request with this id runs.
            InvalidRequestError: the prompt is empty, does not fit, or names unknown tokens.
        """
        if spec.request_id in self._requests:
            raise AlreadyExistsError(f"request {spec.request_id} is running")
        request = Request(
            spec=spec,
            key=salt_key(spec.cache_salt),
            root=self._kv_root,
            arrival=self._num_arrivals + 1,
            fleet_id=spec.request_id if fleet_id is None else fleet_id,
            is_prefill_only=is_prefill_only,
            resumed={} if is_prefill_only else dict(resumed or {}),
            finished_indices=frozenset() if is_prefill_only else finished_indices,
            is_traced=is_traced,
        )
        check_tokens(request, self._scheduler.max_context_tokens, self._vocab_size)
        self._num_arrivals += 1
        self._requests[spec.request_id] = request
        indices = [0] if is_prefill_only else request.open_indices
        if not indices:
            self._end_request(request)
            return
        request.is_forked = len(indices) == 1
        first = self._new_sequence(request, indices[0])
        if first.is_leader:
            self._leaders.append(first)
        self._scheduler.add(first)
        if request.is_forked and not is_prefill_only:
            self._resume([first])

    def cancel(self, request_id: str, index: int | None = None) -> None:
        """End a request, or one of its outputs; unknown ids are ignored. Frees pages at once."""
        request = self._requests.get(request_id)
        if request is None:
            return
        if index is not None and not request.is_forked:
            # Before the fork all outputs are one sequence: remember not to make this one.
            request.finished_indices |= {index}
            if request.open_indices:
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
        self._events += self._exchange.lookups.answer(lookup_id, blocks)

    def change_drafts(self, drafts: tuple[StagedDraft, ...]) -> None:
        """Draft with these models from some later step on, and with no others.

        They are loaded while steps go on. A DraftsEvent tells when they are in use, or why they
        are not; a change that a newer one replaces has none. The first version of a drafter is
        its active one.
        """
        if self._bank is None:
            state = DraftState(error="this engine does not draft with models")
            self._events.append(DraftsEvent(state))
        else:
            self._bank.change(drafts)

    # -- stepping -------------------------------------------------------------------------

    @property
    def has_work(self) -> bool:
        """Whether `step` would do something right now."""
        return (
            bool(self._events)
            or (self._capture is not None and self._capture.has_samples)
            or any(
                s.num_remaining > 0 or not s.request.num_unsaved for s in self._scheduler.running
            )
            or self._exchange.can_write
            or (self._bank is not None and self._bank.is_ready)
            or self._admission.has_candidate(self._monotonic())
        )

    def next_deadline_s(self) -> float | None:
        """When `step` should be called again although nothing else happened."""
        deadline_s = self._exchange.next_deadline_s()
        if self._bank is None or not self._bank.is_loading:
            return deadline_s
        look_s = self._monotonic() + _LOADING_POLL_S
        return look_s if deadline_s is None else min(deadline_s, look_s)

    def step(self) -> list[EngineEvent]:
        """Do one iteration and return what happened since the last call."""
        if self._bank is not None and self._bank.is_ready:
            self._take_drafts(self._bank)
        now_s = self._monotonic()
        self._events += self._admission.admit(now_s)
        self._settle_leaders(now_s)
        plan = self._scheduler.plan(self._exchange.reclaim, self._speculator)
        if plan is not None:
            if self._capture is not None:
                plan = self._capture.choose(plan)
            self._run(plan, now_s)
            self._settle_leaders(now_s)
        self._events += self._exchange.write_saves(self._monotonic())
        self._settle_leaders(now_s)
        self._events += learnings_report(self._speculator, self._capture)
        events, self._events = self._events, []
        return events

    def load(self) -> EngineLoad:
        """Report how busy the engine is."""
        return load_report(
            self._scheduler,
            last_step_s=self._last_step_s,
            num_steps=self._num_steps,
            speculation=None if self._reports is None else self._reports.at(self._monotonic()),
        )

    def check_integrity(self) -> list[str]:
        """Check every book of the engine; an empty list means all hold."""
        problems = self._scheduler.check_integrity(self._exchange.held_pages)
        queued = [*self._scheduler.waiting, *self._scheduler.running]
        problems += check_requests(self._requests, queued, self._exchange.num_saves_of)
        waiting = {s.id for s in self._scheduler.waiting}
        if not set(self._exchange.lookups.sequence_ids) <= waiting:
            problems.append("lookups of sequences that do not wait")
        return problems

    @property
    def num_requests(self) -> int:
        """Requests that are not over."""
        return len(self._requests)

    @property
    def runner(self) -> StepRunner:
        """What computes the steps; for measuring while nothing runs."""
        return self._runner

    @property
    def last_step_s(self) -> float:
        """Seconds that the runner took for the last step."""
        return self._last_step_s

    def close(self) -> None:
        """Wait for what loads; the engine is not used any more."""
        if self._bank is not None:
            self._bank.close()

    # -- inside a step --------------------------------------------------------------------

    def _take_drafts(self, bank: DraftBank) -> None:
        """Draft with other models from this step on."""
        state = bank.take_over()
        if state is not None:
            self._events.append(DraftsEvent(state))
        if self._reports is not None:
            self._reports.expire()

    def _settle_leaders(self, now_s: float) -> None:
        """Fork or finish sequences that computed the prompt for others."""
        if not self._leaders:
            return
        for leader in [s for s in self._scheduler.running if s.is_leader]:
            if leader.num_remaining > 0:
                continue
            if not leader.request.is_prefill_only:
                self._fork(leader)
                continue
            if not leader.has_queued_tail:
                leader.has_queued_tail = True
                self._exchange.queue_tail(leader, now_s)
            if leader.request.num_unsaved == 0:
                self._finish(leader, None)
                self._end_request(leader.request)
        self._leaders = [s for s in self._leaders if s.is_leader and s.phase is not Phase.FINISHED]

    def _fork(self, leader: Sequence) -> None:
        request = leader.request
        request.is_forked = True
        leader.index, *others = request.open_indices
        siblings = [self._new_sequence(request, index) for index in others]
        self._scheduler.fork(leader, siblings)
        self._resume([leader, *siblings])

    def _resume(self, sequences: list[Sequence]) -> None:
        """Let outputs of one request go on from the tokens they had elsewhere."""
        request = sequences[0].request
        chunks: list[TokenChunk] = []
        for sequence in sequences:
            sequence.token_ids.extend(request.resumed.get(sequence.index, ()))
            reason = self._scheduler.finish_reason(sequence)
            if reason is not None:
                self._finish(sequence, reason)
                chunks.append(TokenChunk(sequence.index, (), finish_reason=reason))
        if chunks:
            self._report(request, tuple(chunks))

    def _run(self, plan: StepPlan, now_s: float) -> None:
        try:
            result = self._runner.run(plan)
        except Exception as error:
            # A step is all or nothing to its requests; whatever it was must not end the others.
            logger.exception("step-failed", extra={"fields": {"rows": len(plan.rows)}})
            reason = error.reason if isinstance(error, InternalError) else "step-failed"
            self._fail({row.sequence_id for row in plan.rows}, reason, type(error).__name__)
            return
        self._num_steps += 1
        self._last_step_s = result.elapsed_s
        advanced, failed = self._scheduler.commit(plan, result)
        if self._speculator is not None:
            self._speculator.observe(plan, result, advanced)
        if self._capture is not None:
            self._capture.observe(plan, result, advanced)
        if failed:
            self._fail({s.id for s in failed}, "nan-logits", "the model's numbers are not finite")
        chunks: dict[str, list[TokenChunk]] = {}
        drafts = {
            row.sequence_id: (len(row.tree), len(brought.path))
            for row, brought in zip(plan.rows, result.rows, strict=True)
        }
        for sequence, taken in advanced:
            request_id = sequence.request.spec.request_id
            if request_id not in self._requests:
                continue
            self._exchange.queue_saves(sequence, now_s)
            news = chunks.setdefault(request_id, [])
            if taken:
                news.append(self._take_tokens(sequence, taken, *drafts[sequence.id]))
        for request_id, news in chunks.items():
            self._report(self._requests[request_id], tuple(news))

    def _take_tokens(
        self,
        sequence: Sequence,
        taken: tuple[SampledToken, ...],
        num_drafted: int,
        num_accepted: int,
    ) -> TokenChunk:
        version = ""
        if self._speculator is not None and num_drafted:
            version = self._speculator.drafted_by(sequence.id)
            if sequence.request.is_traced:
                arm = self._speculator.arm_of(sequence.id)
                sequence.request.rounds.append(DraftRound(arm, num_drafted, num_accepted))
        reason = self._scheduler.finish_reason(sequence)
        if reason is not None:
            self._finish(sequence, reason)
        return TokenChunk(
            index=sequence.index,
            token_ids=tuple([token.token_id for token in taken]),
            logprobs=tuple([t.logprobs for t in taken if t.logprobs is not None]),
            finish_reason=reason,
            target_steps=1,
            drafted_tokens=num_drafted,
            accepted_tokens=min(num_accepted, len(taken)),
            draft_version=version,
        )

    def _report(self, request: Request, chunks: tuple[TokenChunk, ...]) -> None:
        """Tell the host about a request; forget one that is over."""
        event = step_report(request, chunks)
        self._events.append(event)
        if event.is_finished:
            del self._requests[event.request_id]

    def _end_request(self, request: Request) -> None:
        self._events.append(end_report(request))
        self._requests.pop(request.spec.request_id, None)

    def _finish(self, sequence: Sequence, reason: FinishReason | None) -> None:
        self._events += self._exchange.lookups.forget(sequence)
        if self._speculator is not None:
            self._speculator.forget(sequence.id)
        if self._capture is not None:
            self._capture.forget(sequence)
        self._scheduler.finish(sequence, reason)

    def _fail(self, sequence_ids: set[int], reason: str, message: str) -> None:
        """End the requests of sequences that could not be computed; the others go on."""
        for request in list(self._requests.values()):
            if any(s.id in sequence_ids for s in request.sequences):
                for sequence in request.sequences:
                    self._finish(sequence, FinishReason.ERROR)
                del self._requests[request.spec.request_id]
                self._events.append(FailedEvent(request.spec.request_id, reason, message))

    def _new_sequence(self, request: Request, index: int) -> Sequence:
        self._num_sequences += 1
        sequence = Sequence(
            id=self._num_sequences,
            request=request,
            index=index,
            token_ids=list(request.spec.prompt_token_ids),
        )
        request.sequences.append(sequence)
        if self._capture is not None:
            self._capture.admit(sequence)
        return sequence
