"""The only crossing between a worker's event loop and its engine process.

Starts the engine as a child over a socket pair, carries requests down and news up, and keeps
the last reported load. KV traffic is handed to worker/kv_link.py. Frames are protobuf
(proto/paceline/v1/engine.proto). When the engine dies, every stream fails as retryable and
`run` raises, which ends the worker: its supervisor starts a new one.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import sys
from collections.abc import AsyncIterator, Callable, Mapping, Sequence

from paceline.domain.cost import StepCost
from paceline.domain.errors import InternalError, UnavailableError
from paceline.domain.member import Load
from paceline.domain.progress import RequestUpdate
from paceline.domain.request import GenerationSpec
from paceline.process.metrics import Metrics
from paceline.rpc import codec
from paceline.rpc.frames import FrameReader, encode
from paceline.v1 import engine_pb2, kvstore_pb2
from paceline.worker.streams import RequestStream

logger = logging.getLogger(__name__)

ENGINE_START_TIMEOUT_S = 300.0
"""Loading a large checkpoint from a cold disk takes minutes."""

ENGINE_STOP_TIMEOUT_S = 5.0
"""The engine ends with its current step once the socket closes."""

_INTEGRITY_TIMEOUT_S = 10.0


class EngineBridge:
    """Owns the engine process and the streams of its requests."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._streams: dict[str, RequestStream] = {}
        self._engine_ids: dict[str, str] = {}
        self._num_submitted = 0
        self._sources: dict[str, tuple[str, ...]] = {}
        self._process: asyncio.subprocess.Process | None = None
        self._reader: asyncio.StreamReader | None = None
        self._writer: asyncio.StreamWriter | None = None
        self._frames = FrameReader()
        self._integrity: list[asyncio.Future[engine_pb2.IntegrityReport]] = []
        self._counted: dict[str, int] = {}
        self.load = Load()
        self.on_kv_event: Callable[[engine_pb2.EngineEvent], None] = lambda event: None
        """Receives lookup, loaded and saved events; set by KvLink."""

    # -- life -----------------------------------------------------------------------------

    async def start(self, options_json: str) -> engine_pb2.EngineReady:
        """Start the engine process and wait until it can take requests.

        Raises:
            UnavailableError: it did not come up; the message says why.
        """
        ours, theirs = socket.socketpair()
        with theirs:
            self._process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-m",
                "paceline.worker.engine_process",
                str(theirs.fileno()),
                options_json,
                pass_fds=[theirs.fileno()],
            )
        self._reader, self._writer = await asyncio.open_connection(sock=ours)
        try:
            async with asyncio.timeout(ENGINE_START_TIMEOUT_S):
                event = await self._frames.read(self._reader, engine_pb2.EngineEvent)
        except (TimeoutError, EOFError, ConnectionError) as error:
            raise UnavailableError("the engine did not start", reason="engine-died") from error
        if event.WhichOneof("event") != "ready":
            raise UnavailableError(event.failed.message, reason=event.failed.reason)
        return event.ready

    async def run(self) -> None:
        """Carry events until the engine ends; then fail all streams and raise.

        Raises:
            UnavailableError: the engine process ended.
        """
        assert self._reader is not None
        try:
            while True:
                event = await self._frames.read(self._reader, engine_pb2.EngineEvent)
                self._handle(event)
        except (EOFError, ConnectionError) as error:
            died = UnavailableError("the engine process ended", reason="engine-died")
            for stream in self._streams.values():
                stream.fail(died)
            raise died from error

    async def close(self) -> None:
        """End the engine process and wait for it."""
        if self._writer is not None:
            self._writer.close()
        if self._process is None:
            return
        try:
            async with asyncio.timeout(ENGINE_STOP_TIMEOUT_S):
                await self._process.wait()
        except TimeoutError:
            with contextlib.suppress(ProcessLookupError):
                self._process.kill()
            await self._process.wait()

    def send(self, command: engine_pb2.EngineCommand) -> None:
        """Queue a frame for the engine; it reads between steps, so the queue stays short."""
        if self._writer is None or self._writer.is_closing():
            raise UnavailableError("the engine process ended", reason="engine-died")
        self._writer.write(encode(command))

    # -- requests -------------------------------------------------------------------------

    @property
    def num_requests(self) -> int:
        """Requests that are running or waiting."""
        return len(self._streams)

    def prefill(
        self, spec: GenerationSpec, kv_sources: Sequence[str]
    ) -> AsyncIterator[RequestUpdate]:
        """Compute and publish a prompt's KV; closing the iterator cancels."""
        submit = engine_pb2.SubmitRequest(spec=codec.spec_to_proto(spec), is_prefill_only=True)
        return self._submit(submit, kv_sources)

    def decode(
        self,
        spec: GenerationSpec,
        kv_sources: Sequence[str],
        resumed: Mapping[int, tuple[int, ...]],
        finished_indices: frozenset[int],
    ) -> AsyncIterator[RequestUpdate]:
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

    def sources_of(self, request_id: str) -> tuple[str, ...]:
        """Return the KV sources that came with a request."""
        return self._sources.get(request_id, ())

    def stream_of(self, request_id: str) -> RequestStream | None:
        """Return a running request's stream."""
        return self._streams.get(request_id)

    async def check_integrity(self) -> engine_pb2.IntegrityReport:
        """Ask the engine to check its books."""
        future: asyncio.Future[engine_pb2.IntegrityReport] = (
            asyncio.get_running_loop().create_future()
        )
        self._integrity.append(future)
        self.send(engine_pb2.EngineCommand(check_integrity=engine_pb2.CheckIntegrity()))
        async with asyncio.timeout(_INTEGRITY_TIMEOUT_S):
            return await future

    async def _submit(
        self, submit: engine_pb2.SubmitRequest, kv_sources: Sequence[str]
    ) -> AsyncIterator[RequestUpdate]:
        request_id = submit.spec.request_id
        # A retry may arrive before the break of its first call was noticed here, so the
        # engine knows each call under an id of its own.
        self._num_submitted += 1
        engine_id = f"{request_id}#{self._num_submitted}"
        submit.fleet_request_id, submit.spec.request_id = request_id, engine_id
        stream = RequestStream(reports_published=submit.is_prefill_only)
        self._streams[engine_id] = stream
        self._sources[engine_id] = tuple(kv_sources)
        self._engine_ids[request_id] = engine_id
        try:
            self.send(engine_pb2.EngineCommand(submit=submit))
            async for update in stream.updates():
                yield update
        finally:
            self._forget(request_id, engine_id)

    def _forget(self, request_id: str, engine_id: str) -> None:
        del self._streams[engine_id], self._sources[engine_id]
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
            case "failed":
                stream = self._streams.get(event.failed.request_id)
                if stream is not None:
                    reason, message = event.failed.reason, event.failed.message
                    stream.fail(InternalError(message, reason=reason))
            case "integrity":
                for future in self._integrity:
                    if not future.done():
                        future.set_result(event.integrity)
                self._integrity.clear()

    def _handle_step(self, step: engine_pb2.StepOutput) -> None:
        for output in step.outputs:
            stream = self._streams.get(output.request_id)
            if stream is None:
                continue
            stream.add_hits(output.local_hit_tokens, output.store_hit_tokens)
            for chunk in output.chunks:
                stream.add_chunk(codec.chunk_from_proto(chunk))
            if output.is_finished:
                self.on_request_finished(output.request_id, stream)
        self._note_load(step.load)

    def on_request_finished(self, request_id: str, stream: RequestStream) -> None:
        """End a stream; KvLink postpones it until the request's blocks are committed."""
        stream.finish()

    def _note_load(self, load: engine_pb2.EngineLoad) -> None:
        self.load = Load(
            num_waiting=load.num_waiting,
            num_running=load.num_running,
            pending_prefill_tokens=load.num_pending_prefill_tokens,
            free_blocks=load.num_free_blocks,
            total_blocks=load.num_total_blocks,
            context_tokens=load.num_context_tokens,
        )


def step_cost_of(ready: engine_pb2.EngineReady) -> StepCost:
    """Return the measured step cost that an engine reported."""
    return codec.step_cost_from_proto(ready.step_cost)


def layout_of(ready: engine_pb2.EngineReady) -> kvstore_pb2.KvLayout:
    """Return the KV layout that an engine reported."""
    return ready.layout
