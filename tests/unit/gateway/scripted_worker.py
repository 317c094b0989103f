"""Workers that misbehave on purpose: real servers behind the real wire, without an engine.

Each speaks as its role in the fleet: gRPC on loopback, health, a record in Redis kept by a
heartbeat. What it answers is a script; without one it answers as a worker should, with tokens
that depend on prompt, seed, output and position only, so that a resumed stream can be compared.
Scripts are kept per request in a `Stage`, whichever worker the request comes to.
"""

from __future__ import annotations

import asyncio
import itertools
from collections import defaultdict, deque
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from hashlib import blake2b
from typing import Any, Self

import grpc

from paceline.domain.cost import StepCost
from paceline.domain.member import Load, Member, ModelCard, Role
from paceline.process.membership import FencedError, Heartbeat, Membership
from paceline.process.metrics import Metrics
from paceline.rpc.server import create_server
from paceline.v1 import inference_pb2, kvstore_pb2, kvstore_pb2_grpc, worker_pb2, worker_pb2_grpc

CARD = ModelCard(
    name="demo",
    digest="0" * 64,
    kv_root=bytes(range(16)),
    block_size=16,
    block_bytes=4096,
    max_context_tokens=2048,
    vocab_size=4096,
    kv_dtype="f32",
)
COST = StepCost(base_s=0.002, row_s=0.0002, token_s=0.0005, context_s=0.0)

LEASE_S = 0.6

DecodeScript = Callable[[worker_pb2.DecodeRequest, Any], AsyncIterator[worker_pb2.DecodeResponse]]
PrefillScript = Callable[
    [worker_pb2.PrefillRequest, Any], AsyncIterator[worker_pb2.PrefillResponse]
]


def token_at(spec: worker_pb2.GenerationSpec, index: int, position: int) -> int:
    """Return the token of an output at a position, as every worker computes it."""
    prompt = b",".join(b"%d" % token for token in spec.prompt_token_ids)
    text = b"%b|%d|%d|%d" % (prompt, spec.sampling.seed, index, position)
    return 4 + int.from_bytes(blake2b(text, digest_size=4).digest(), "little") % 4000


def chunk_of(
    spec: worker_pb2.GenerationSpec, index: int, start: int, stop: int
) -> worker_pb2.TokenChunk:
    """Return a chunk with the tokens of an output in [start, stop)."""
    stop = min(stop, spec.max_tokens)
    ids = [token_at(spec, index, position) for position in range(start, stop)]
    logprobs = [
        inference_pb2.TokenLogprobs(token_id=token, logprob=-float(position))
        for position, token in enumerate(ids, start=start)
    ]
    is_over = stop == spec.max_tokens
    return worker_pb2.TokenChunk(
        index=index,
        token_ids=ids,
        logprobs=logprobs if spec.logprobs else [],
        finish_reason=inference_pb2.FINISH_REASON_LENGTH if is_over else None,
        target_steps=len(ids),
    )


async def answer(
    request: worker_pb2.DecodeRequest, *, step: int = 1, pause_s: float = 0.0
) -> AsyncIterator[worker_pb2.DecodeResponse]:
    """Answer as a worker should: `step` tokens of each open output per message."""
    spec = request.spec
    resumed = {entry.index: len(entry.token_ids) for entry in request.resumed}
    at = {i: resumed.get(i, 0) for i in range(spec.n) if i not in request.finished_indices}
    while at:
        await asyncio.sleep(pause_s)
        chunks = [chunk_of(spec, index, start, start + step) for index, start in at.items()]
        at = {c.index: at[c.index] + step for c in chunks if not c.finish_reason}
        yield worker_pb2.DecodeResponse(chunks=chunks)


def answering(step: int = 1, pause_s: float = 0.0) -> DecodeScript:
    """Return the script of a good worker."""
    return lambda request, context: answer(request, step=step, pause_s=pause_s)


def breaking(after: int, ending: Callable[[Any], Any], step: int = 1) -> DecodeScript:
    """Return a script that sends some good messages and then ends by `ending(context)`."""

    async def script(
        request: worker_pb2.DecodeRequest, context: Any
    ) -> AsyncIterator[worker_pb2.DecodeResponse]:
        left = after
        if left:
            async for message in answer(request, step=step):
                yield message
                left -= 1
                if not left:
                    break
        await ending(context)

    return script


async def early_end(context: Any) -> None:
    """End a call without an error, though outputs are open."""


async def hang(context: Any) -> None:
    """Say nothing any more."""
    await asyncio.Event().wait()


def abort(code: grpc.StatusCode) -> Callable[[Any], Any]:
    """Return an ending by a bare status, as proxies and dying processes send them."""

    async def ending(context: Any) -> None:
        await context.abort(code, "scripted")

    return ending


def fail(error: Exception) -> Callable[[Any], Any]:
    """Return an ending by an error of ours."""

    async def ending(context: Any) -> None:
        raise error

    return ending


async def compute(
    request: worker_pb2.PrefillRequest, context: Any = None
) -> AsyncIterator[worker_pb2.PrefillResponse]:
    """Prefill as a worker should."""
    num_tokens = len(request.spec.prompt_token_ids)
    yield worker_pb2.PrefillResponse(published_keys=[b"k" * 16], published_tokens=16)
    yield worker_pb2.PrefillResponse(published_tokens=num_tokens, is_last=True)


class Stage:
    """The scripts of all workers of a fleet, per request of a client; each plays once."""

    def __init__(self) -> None:
        self._decode: dict[str, deque[DecodeScript]] = defaultdict(deque)
        self._prefill: dict[str, deque[PrefillScript]] = defaultdict(deque)
        self.decode_default: DecodeScript = answering()
        self.prefill_default: PrefillScript = compute

    def decode(self, request_id: str, *scripts: DecodeScript) -> None:
        """Let the next decode calls of a request play these scripts."""
        self._decode[request_id].extend(scripts)

    def prefill(self, request_id: str, *scripts: PrefillScript) -> None:
        """Let the next prefill calls of a request play these scripts."""
        self._prefill[request_id].extend(scripts)

    def next_decode(self, spec: worker_pb2.GenerationSpec) -> DecodeScript:
        scripts = self._decode[client_id(spec)]
        return scripts.popleft() if scripts else self.decode_default

    def next_prefill(self, spec: worker_pb2.GenerationSpec) -> PrefillScript:
        scripts = self._prefill[client_id(spec)]
        return scripts.popleft() if scripts else self.prefill_default


def client_id(spec: worker_pb2.GenerationSpec) -> str:
    """Return the id that the client gave the request."""
    return spec.request_id.rpartition(".")[0]


class ScriptedWorker:
    """One worker: prefill, decode, or the KV node that others are attached to."""

    _numbers = itertools.count(1)

    def __init__(
        self,
        stage: Stage,
        redis_url: str,
        fleet: str,
        role: Role = Role.DECODE,
        *,
        worker_id: str = "",
        node_id: str = "node",
        load: Load | None = None,
        card: ModelCard = CARD,
        cost: StepCost = COST,
        drafters: tuple[str, ...] = (),
        metrics_address: str = "",
    ) -> None:
        self._stage = stage
        self._membership = Membership(redis_url, fleet, lease_s=LEASE_S)
        self._is_node = role is Role.KVSTORE
        self._heartbeat: asyncio.Task[None] | None = None
        self.member = Member(
            id=worker_id or f"{role.value}-{next(self._numbers)}",
            role=role,
            address="",
            pid=0,
            version="test",
            node_id=node_id,
            model=None if self._is_node else card,
            step_cost=None if self._is_node else cost,
            prefill_chunk_tokens=256,
            drafters=drafters,
            metrics_address=metrics_address,
            load=load or Load(),
        )
        self.decode_calls: list[worker_pb2.DecodeRequest] = []
        self.prefill_calls: list[worker_pb2.PrefillRequest] = []
        self.pulls: list[kvstore_pb2.PullRequest] = []
        self.stopped: list[int] = []
        self.num_running = 0
        self.num_cancelled = 0

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.vanish()
        await self._membership.close()

    async def start(self, port: int = 0) -> None:
        """Serve, and join the fleet."""
        await self.serve(port)
        await self.join()

    async def serve(self, port: int = 0, *, is_ready: bool = True) -> None:
        """Serve without being a member yet."""
        self._server = create_server(Metrics("test"), [], [self._add], host="127.0.0.1", port=port)
        await self._server.start()
        self._server.set_ready(is_ready)
        address = self._server.address
        self.member = replace(self.member, address=address)
        if self._is_node:
            self.member = replace(self.member, kv_uri=f"grpc:{address}")

    async def join(self) -> None:
        """Keep a record in the membership."""
        heartbeat = Heartbeat(self._membership, lambda: self.member, period_s=0.05)
        self._heartbeat = asyncio.create_task(heartbeat.run())

    async def fall_silent(self) -> None:
        """Stop the heartbeat; the lease ends by itself."""
        if self._heartbeat is not None:
            self._heartbeat.cancel()
            with suppress(asyncio.CancelledError, FencedError):
                await self._heartbeat
            self._heartbeat = None

    async def kill(self) -> None:
        """End all calls and the server at once; the record stays until its lease ends."""
        await self.fall_silent()
        await self._server.drain(0.0)

    async def vanish(self) -> None:
        """End at once and take the record out of the fleet."""
        await self.kill()
        with suppress(Exception):
            await self._membership.deregister(self.member)

    # -- services -------------------------------------------------------------------------

    def _add(self, server: grpc.aio.Server) -> None:
        worker_pb2_grpc.add_DecodeServiceServicer_to_server(self, server)
        worker_pb2_grpc.add_PrefillServiceServicer_to_server(self, server)
        kvstore_pb2_grpc.add_KvNodeServiceServicer_to_server(_Node(self.pulls), server)

    async def Decode(
        self, request: worker_pb2.DecodeRequest, context: Any
    ) -> AsyncIterator[worker_pb2.DecodeResponse]:
        self.decode_calls.append(request)
        async for message in self._play(self._stage.next_decode(request.spec), request, context):
            yield message

    async def Prefill(
        self, request: worker_pb2.PrefillRequest, context: Any
    ) -> AsyncIterator[worker_pb2.PrefillResponse]:
        self.prefill_calls.append(request)
        async for message in self._play(self._stage.next_prefill(request.spec), request, context):
            yield message

    async def StopSequence(
        self, request: worker_pb2.StopSequenceRequest, context: Any
    ) -> worker_pb2.StopSequenceResponse:
        self.stopped.append(request.index)
        return worker_pb2.StopSequenceResponse()

    async def _play(self, script: Any, request: Any, context: Any) -> AsyncIterator[Any]:
        self.num_running += 1
        try:
            async for message in script(request, context):
                yield message
        except (asyncio.CancelledError, GeneratorExit):
            self.num_cancelled += 1
            raise
        finally:
            self.num_running -= 1


class _Node(kvstore_pb2_grpc.KvNodeServiceServicer):
    def __init__(self, pulls: list[kvstore_pb2.PullRequest]) -> None:
        self._pulls = pulls

    async def Pull(
        self, request: kvstore_pb2.PullRequest, context: Any
    ) -> kvstore_pb2.PullResponse:
        self._pulls.append(request)
        return kvstore_pb2.PullResponse(num_readable=len(request.keys))


def all_running(workers: Sequence[ScriptedWorker]) -> int:
    """Return how many calls run on these workers."""
    return sum(worker.num_running for worker in workers)
