"""The only crossing between a worker's event loop and its engine process.

Starts the engine as a child over a socket pair, carries requests down and news up, and keeps
the last reported load. KV traffic is handed to worker/kv_link.py. Frames are protobuf
(proto/paceline/v1/engine.proto). When the engine dies or hangs, every stream fails as
retryable and `run` raises, which ends the worker: its supervisor starts a new one.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import sys
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable, Iterable, Mapping, Sequence

from paceline.domain.drafts import DraftState, StagedDraft
from paceline.domain.errors import (
    ExhaustedError,
    InternalError,
    InvalidRequestError,
    PacelineError,
    UnavailableError,
)
from paceline.domain.learnings import Sample, SequenceOutcome
from paceline.domain.member import Load
from paceline.domain.progress import RequestUpdate
from paceline.domain.request import GenerationSpec
from paceline.process.logs import request_id_var
from paceline.process.metrics import Metrics
from paceline.process.spans import Span, current_span
from paceline.rpc import codec, draft_codec
from paceline.rpc.frames import FrameReader, encode
from paceline.v1 import engine_pb2
from paceline.worker.request_trace import RequestTrace
from paceline.worker.speculation import SpeculationMetrics, report_from_proto
from paceline.worker.streams import RequestStream

logger = logging.getLogger(__name__)

ENGINE_START_TIMEOUT_S = 300.0
"""Loading a large checkpoint from a cold disk takes minutes."""

ENGINE_STOP_TIMEOUT_S = 5.0
"""The engine ends with its current step once the socket closes."""

MAX_BUFFERED_BYTES = 64 << 20
"""Frames waiting for an engine that does not read; beyond this new requests are refused.
What else is sent (cancellations, answers, slots) is bounded by the requests that run."""

_INTEGRITY_TIMEOUT_S = 10.0
_NUM_LOOKS = 3
"""Looks in vain before the engine counts as hung; one alone can mean that we were paused."""


class EngineBridge:
    """Owns the engine process and the streams of its requests."""

    def __init__(self, metrics: Metrics, *, max_requests: int) -> None:
        """Carry up to `max_requests` requests at a time; more are refused."""
        self._metrics = metrics
        self._max_requests = max_requests
        self._streams: dict[str, RequestStream] = {}
        self._engine_ids: dict[str, str] = {}
        self._num_submitted = 0
        self._process: asyncio.subprocess.Process | None = None
        self._reader: asyncio.StreamReader | None = None
        self._writer: asyncio.StreamWriter | None = None
        self._ready: engine_pb2.EngineReady | None = None
        self._block_bytes = 0
        self._has_ended = False
        self._num_events = 0
        self._frames = FrameReader()
        self._integrity: deque[asyncio.Future[engine_pb2.IntegrityReport]] = deque()
        self._reported = engine_pb2.EngineLoad()
        self._unheard: dict[str, float] = {}
        """When requests came that the engine has said nothing about yet, monotonic."""
        self._speculation = SpeculationMetrics(metrics)
        self.load = Load()
        self.draft_version = ""
        """Active versions of the engine's draft models, joined with "+"; empty without any."""
        self.drafters: tuple[str, ...] = ()
        """Drafters that requests may name."""
        self.on_draft_state: Callable[[DraftState], None] = lambda state: None
        """Hears what the engine drafts with after each change."""
        self.on_kv_event: Callable[[engine_pb2.EngineEvent], None] = lambda event: None
        """Receives lookup, loaded and saved events; set by KvLink."""
        self.on_load: Callable[[], None] = lambda: None
        """Hears that the load changed, or is about to."""
        self.on_learnings: Callable[[Sequence[Sample], Sequence[SequenceOutcome]], None] = (
            lambda samples, outcomes: None
        )
        """Receives what drafts can be trained and judged with."""
        self.on_finished: Callable[[RequestStream], None] = RequestStream.finish
        """Ends the stream of a finished request; KvLink waits for its commits first."""

    # -- life -----------------------------------------------------------------------------

    async def start(
        self, options_json: str, *, service: str = "engine", log_level: str = "INFO"
    ) -> engine_pb2.EngineReady:
        """Start the engine process and wait until it can take requests.

        Raises:
            UnavailableError: it did not come up; the message says why.
        """
        ours, theirs = socket.socketpair()
        try:
            with theirs:
                fd = theirs.fileno()
                module = ["-m", "paceline.worker.engine_process"]
                args = [*module, str(fd), options_json, service, log_level]
                self._process = await asyncio.create_subprocess_exec(
                    sys.executable, *args, pass_fds=[fd]
                )
            self._reader, self._writer = await asyncio.open_connection(sock=ours)
        except BaseException:
            ours.close()
            raise
        try:
            async with asyncio.timeout(ENGINE_START_TIMEOUT_S):
                event = await self._frames.read(self._reader, engine_pb2.EngineEvent)
        except (TimeoutError, EOFError, ConnectionError) as error:
            raise UnavailableError("the engine did not start", reason="engine-died") from error
        if event.WhichOneof("event") != "ready":
            raise UnavailableError(event.failed.message, reason=event.failed.reason)
        self._ready = event.ready
        self._block_bytes = event.ready.layout.block_bytes
        self.draft_version = event.ready.draft_version
        self.drafters = tuple(event.ready.drafters)
        return event.ready

    async def run(self, stall_s: float) -> None:
        """Carry events until the engine ends, or does not answer for `stall_s`; then raise.

        Raises:
            UnavailableError: the engine process ended; all streams have failed.
        """
        assert self._reader is not None
        watch = asyncio.create_task(self._watch(stall_s), name="engine-watch")
        try:
            while True:
                event = await self._frames.read(self._reader, engine_pb2.EngineEvent)
                self._num_events += 1
                self._handle(event)
        except (EOFError, ConnectionError) as error:
            raise _engine_died() from error
        finally:
            watch.cancel()
            self._has_ended = True
            self.fail_streams(_engine_died)
            while self._integrity:
                _settle(self._integrity.popleft(), _engine_died())

    async def close(self) -> None:
        """End the engine process and wait for it."""
        if self._writer is not None:
            self._writer.close()
        if self._process is None:
            return
        try:
            # One that is still loading would not look at its socket for a while.
            async with asyncio.timeout(ENGINE_STOP_TIMEOUT_S if self._ready else 0.0):
                await self._process.wait()
        except TimeoutError:
            self._kill()
            await self._process.wait()

    def fail_streams(self, make_error: Callable[[], PacelineError]) -> None:
        """End all open streams with an error each."""
        for stream in self._streams.values():
            stream.fail(make_error())

    def send(self, command: engine_pb2.EngineCommand) -> None:
        """Queue a frame for the engine, which reads between two steps.

        Raises:
            UnavailableError: the engine process ended.
        """
        if self._has_ended or self._writer is None or self._writer.is_closing():
            raise _engine_died()
        self._writer.write(encode(command))

    async def _watch(self, stall_s: float) -> None:
        """Ask for signs of life, and kill an engine that gives none for `stall_s`."""
        num_misses = 0
        with contextlib.suppress(UnavailableError):
            while num_misses < _NUM_LOOKS:
                num_events = self._num_events
                self.send(engine_pb2.EngineCommand(ping=engine_pb2.Ping()))
                await asyncio.sleep(stall_s / _NUM_LOOKS)
                num_misses = num_misses + 1 if self._num_events == num_events else 0
            logger.error("engine-hung", extra={"fields": {"stall_s": stall_s}})
            self._kill()

    def _kill(self) -> None:
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                self._process.kill()

    # -- requests -------------------------------------------------------------------------

    @property
    def num_unheard(self) -> int:
        """Requests that the engine has said nothing about yet."""
        return len(self._unheard)

    @property
    def last_step_s(self) -> float:
        """Seconds that the engine's last step took."""
        return self._reported.last_step_s

    @property
    def num_requests(self) -> int:
        """Requests that are running or waiting."""
        return len(self._streams)

    def prefill(
        self, spec: GenerationSpec, kv_sources: Sequence[str]
    ) -> AsyncGenerator[RequestUpdate]:
        """Compute and publish a prompt's KV; closing the iterator cancels."""
        submit = engine_pb2.SubmitRequest(spec=codec.spec_to_proto(spec), is_prefill_only=True)
        return self._submit(submit, kv_sources)

    def decode(
        self,
        spec: GenerationSpec,
        kv_sources: Sequence[str],
        resumed: Mapping[int, tuple[int, ...]],
        finished_indices: frozenset[int],
    ) -> AsyncGenerator[RequestUpdate]:
        """Generate tokens; closing the iterator cancels."""
        submit = engine_pb2.SubmitRequest(
            spec=codec.spec_to_proto(spec),
            resumed=codec.resumed_to_proto(resumed),
            finished_indices=sorted(finished_indices),
        )
        return self._submit(submit, kv_sources)

    def stop_sequence(self, request_id: str, index: int) -> None:
        """End one output of a running request; unknown ones are ignored."""
        engine_id = self._engine_ids.get(request_id)
        if engine_id is not None:
            cancel = engine_pb2.CancelRequest(request_id=engine_id, index=index)
            self.send(engine_pb2.EngineCommand(cancel=cancel))

    def change_drafts(self, drafts: Iterable[StagedDraft]) -> None:
        """Let the engine draft with these models and no others; `on_draft_state` hears of it.

        Raises:
            UnavailableError: the engine process ended.
        """
        self.send(engine_pb2.EngineCommand(drafts=draft_codec.change_to_proto(drafts)))

    def stream_of(self, request_id: str) -> RequestStream | None:
        """Return the stream of a running request, by the engine's id of it."""
        return self._streams.get(request_id)

    async def check_integrity(self) -> engine_pb2.IntegrityReport:
        """Ask the engine to check its books.

        Raises:
            UnavailableError: the engine process ended, or does not answer.
        """
        future: asyncio.Future[engine_pb2.IntegrityReport] = (
            asyncio.get_running_loop().create_future()
        )
        self.send(engine_pb2.EngineCommand(check_integrity=engine_pb2.CheckIntegrity()))
        # Answers come in the order of the questions, also to those who left.
        self._integrity.append(future)
        try:
            async with asyncio.timeout(_INTEGRITY_TIMEOUT_S):
                return await future
        except TimeoutError as error:
            raise UnavailableError("the engine is busy", reason="engine-busy") from error

    async def _submit(
        self, submit: engine_pb2.SubmitRequest, kv_sources: Sequence[str]
    ) -> AsyncGenerator[RequestUpdate]:
        self._check(submit)
        request_id = submit.spec.request_id
        # A retry may arrive before the break of its first call was noticed here, so the
        # engine knows each call under an id of its own.
        self._num_submitted += 1
        engine_id = f"{request_id}#{self._num_submitted}"
        submit.fleet_request_id, submit.spec.request_id = request_id, engine_id
        stream = RequestStream(
            reports_published=submit.is_prefill_only,
            log_id=request_id_var.get() or request_id,
            kv_sources=tuple(kv_sources),
            span=current_span(),
            trace=self._begin_trace(current_span(), is_resumed=bool(submit.resumed)),
        )
        submit.is_traced = stream.trace is not None
        self.send(engine_pb2.EngineCommand(submit=submit))
        self._streams[engine_id] = stream
        self._engine_ids[request_id] = engine_id
        self._unheard[engine_id] = time.monotonic()
        self.on_load()
        try:
            async for update in stream.updates():
                yield update
        finally:
            self._forget(request_id, engine_id)

    def _begin_trace(self, span: Span, *, is_resumed: bool) -> RequestTrace | None:
        if not span.is_recording or self._ready is None:
            return None
        block_bytes, now_s = self._ready.layout.block_bytes, time.monotonic()
        return RequestTrace(span, block_bytes=block_bytes, is_resumed=is_resumed, now_s=now_s)

    def _check(self, submit: engine_pb2.SubmitRequest) -> None:
        """Refuse what this worker has no room for, and tokens that would break its engine."""
        assert self._ready is not None and self._writer is not None
        num_buffered = self._writer.transport.get_write_buffer_size()
        if len(self._streams) >= self._max_requests or num_buffered > MAX_BUFFERED_BYTES:
            raise ExhaustedError(f"the worker carries {len(self._streams)} requests")
        largest = max(_token_ids(submit), default=0)
        if largest >= self._ready.vocab_size:
            raise InvalidRequestError(
                "spec", f"token {largest}, the vocabulary has {self._ready.vocab_size}"
            )

    def _forget(self, request_id: str, engine_id: str) -> None:
        stream = self._streams.pop(engine_id)
        if stream.trace is not None:
            stream.trace.close()
        if engine_id in self._unheard:
            del self._unheard[engine_id]
            self.on_load()
        if self._engine_ids.get(request_id) == engine_id:
            del self._engine_ids[request_id]
        # For a request that ended by itself this is a no-op in the engine.
        cancel = engine_pb2.CancelRequest(request_id=engine_id)
        with contextlib.suppress(UnavailableError):
            self.send(engine_pb2.EngineCommand(cancel=cancel))

    # -- events ---------------------------------------------------------------------------

    def _handle(self, event: engine_pb2.EngineEvent) -> None:
        match event.WhichOneof("event"):
            case "step":
                self._handle_step(event.step)
            case "kv_lookup" | "kv_loaded" | "kv_saved":
                self.on_kv_event(event)
            case "learnings":
                self._metrics.capture_seconds.inc(event.learnings.capture_s)
                self.on_learnings(
                    [draft_codec.sample_from_proto(each) for each in event.learnings.samples],
                    [draft_codec.outcome_from_proto(each) for each in event.learnings.outcomes],
                )
            case "failed":
                self._unheard.pop(event.failed.request_id, None)
                stream = self._streams.get(event.failed.request_id)
                if stream is not None:
                    stream.fail(_failure(event.failed))
            case "drafts":
                self.on_draft_state(draft_codec.state_from_proto(event.drafts))
            case "integrity":
                _settle(self._integrity.popleft(), event.integrity)

    def _handle_step(self, step: engine_pb2.StepOutput) -> None:
        for output in step.outputs:
            if output.request_id in self._unheard:
                self._note_started(output.request_id, step.load.last_step_s)
            stream = self._streams.get(output.request_id)
            if stream is None:
                continue
            if stream.trace is not None:
                stream.trace.note_step(output, step.started_s, step.ended_s)
            stream.add_hits(output.local_hit_tokens, output.store_hit_tokens)
            for chunk in output.chunks:
                stream.add_chunk(codec.chunk_from_proto(chunk))
            if output.is_finished:
                self.on_finished(stream)
        self._note_load(step.load)

    def _note_started(self, engine_id: str, last_step_s: float) -> None:
        """Book the end of a request's wait; the step that is reported was its first."""
        waited_s = time.monotonic() - self._unheard.pop(engine_id) - last_step_s
        self._metrics.queue_seconds.observe(max(0.0, waited_s))

    def _note_load(self, load: engine_pb2.EngineLoad) -> None:
        if load.HasField("speculation"):
            self._speculation.note(report_from_proto(load.speculation))
            self.draft_version = load.speculation.draft_version
            names = (drafter.name for drafter in load.speculation.drafters)
            self.drafters = tuple(dict.fromkeys(names))
        self.load = Load(
            num_waiting=load.num_waiting,
            num_running=load.num_running,
            pending_prefill_tokens=load.num_pending_prefill_tokens,
            free_blocks=load.num_free_blocks,
            total_blocks=load.num_total_blocks,
            context_tokens=load.num_context_tokens,
            drafted_tokens=self._speculation.num_drafted,
            accepted_tokens=self._speculation.num_accepted,
        )
        metrics, last = self._metrics, self._reported
        metrics.engine_waiting.set(load.num_waiting)
        metrics.engine_running.set(load.num_running)
        metrics.engine_free_blocks.set(load.num_free_blocks)
        metrics.engine_total_blocks.set(load.num_total_blocks)
        metrics.engine_cached_bytes.set(load.num_cached_blocks * self._block_bytes)
        if load.num_steps > last.num_steps:
            metrics.engine_step_seconds.observe(load.last_step_s)
        metrics.engine_preemptions.inc(load.num_preemptions - last.num_preemptions)
        metrics.engine_evictions.inc(load.num_evictions - last.num_evictions)
        self._reported = load
        self.on_load()


def _token_ids(submit: engine_pb2.SubmitRequest) -> Iterable[int]:
    yield from submit.spec.prompt_token_ids
    for resumed in submit.resumed:
        yield from resumed.token_ids


def _failure(failed: engine_pb2.RequestFailed) -> PacelineError:
    if failed.reason == InvalidRequestError.reason:
        return InvalidRequestError("spec", failed.message)
    return InternalError(failed.message, reason=failed.reason)


def _engine_died() -> UnavailableError:
    return UnavailableError("the engine process ended", reason="engine-died")


def _settle(
    future: asyncio.Future[engine_pb2.IntegrityReport],
    result: engine_pb2.IntegrityReport | PacelineError,
) -> None:
    if future.done():
        return
    if isinstance(result, PacelineError):
        future.set_exception(result)
    else:
        future.set_result(result)
