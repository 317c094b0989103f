"""Streams the tokens of a request from a decode worker; when it breaks, from another one.

What the client already has of each output is sent along, so the next worker goes on at the
same position with the same noise: the client sees a pause, no lost or repeated token. KV that
the first worker left in the store is used again.
"""

from __future__ import annotations

import logging
import math
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any

import grpc

from paceline.domain.errors import ExhaustedError, PacelineError, UnavailableError
from paceline.domain.member import Member
from paceline.domain.request import FinishReason, TokenChunk
from paceline.gateway.context import RequestContext
from paceline.gateway.fleet import FleetView
from paceline.gateway.steps.lookup import LookupStep
from paceline.gateway.steps.route import RouteStep, kv_sources
from paceline.process.metrics import Metrics
from paceline.process.spans import Attributes, Span, current_span
from paceline.rpc import codec
from paceline.rpc.channel import request_metadata
from paceline.v1 import worker_pb2, worker_pb2_grpc

logger = logging.getLogger(__name__)

_STOP_TIMEOUT_S = 1.0

_GOODBYE_S = 0.5
"""How long a worker that ended every output may take to end the call."""


class DecodeStep:
    """Calls DecodeService."""

    def __init__(
        self,
        fleet: FleetView,
        lookup: LookupStep,
        route: RouteStep,
        metrics: Metrics,
        max_attempts: int,
    ) -> None:
        self._fleet = fleet
        self._lookup = lookup
        self._route = route
        self._metrics = metrics
        self._max_attempts = max_attempts

    async def __call__(self, ctx: RequestContext) -> AsyncIterator[TokenChunk]:
        """Yield chunks until every output of `ctx` has ended.

        The caller books each chunk in `ctx.outputs` before it asks for the next one.

        Raises:
            UnavailableError: `max_attempts` workers broke, or none is left; says how many
                tokens were sent.
            ExhaustedError: `max_attempts` workers were full, and no token was sent.
            PacelineError: what a worker answered.
        """
        attempts: list[Span] = []
        for attempt in range(1, self._max_attempts + 1):
            worker = ctx.decode_worker
            assert worker is not None
            about: Attributes = {
                "paceline.worker": worker.id,
                "paceline.attempt": attempt,
                "paceline.resumed_tokens": ctx.num_output_tokens,
            }
            call = current_span().child("decode", about, kind="client", links=attempts[-1:])
            attempts.append(call)
            try:
                stream = self._stream(ctx, worker, call)
                async with aclosing(stream) as chunks:  # type: ignore[type-var]
                    async for chunk in chunks:
                        yield chunk
                return
            except (UnavailableError, ExhaustedError) as error:
                if ctx.is_finished:
                    return  # Only the end of the call was lost.
                call.fail(error.reason)
                self._note_break(ctx, worker, error)
                if attempt == self._max_attempts:
                    if isinstance(error, ExhaustedError) and not ctx.num_output_tokens:
                        raise
                    raise UnavailableError(
                        f"{attempt} decode workers broke the stream after "
                        f"{ctx.num_output_tokens} tokens",
                        reason="migration-limit",
                    ) from error
            except PacelineError as error:
                call.fail(error.reason)
                raise
            finally:
                call.end()
            await self._find_worker(ctx)

    async def stop(self, ctx: RequestContext, index: int) -> None:
        """Tell the worker that one of several outputs needs no further tokens."""
        worker = ctx.decode_worker
        assert worker is not None
        request = worker_pb2.StopSequenceRequest(request_id=ctx.tokens().request_id, index=index)
        with self._fleet.channel(worker.address) as channel:
            stub: Any = worker_pb2_grpc.DecodeServiceStub(channel)
            try:
                await stub.StopSequence(
                    request, timeout=_STOP_TIMEOUT_S, metadata=request_metadata()
                )
            except grpc.aio.AioRpcError as error:
                # Its tokens are dropped here until the call ends.
                logger.debug("stop-failed", extra={"fields": {"error": error.details()}})

    async def _stream(
        self, ctx: RequestContext, worker: Member, call: Span
    ) -> AsyncIterator[TokenChunk]:
        request, timeout_s = self._request(ctx), ctx.remaining_s()
        is_moved = ctx.num_output_tokens > 0

        def open_call(channel: grpc.aio.Channel) -> Any:
            stub: Any = worker_pb2_grpc.DecodeServiceStub(channel)
            return stub.Decode(request, timeout=timeout_s, metadata=request_metadata(call))

        def patience() -> float:
            return _GOODBYE_S if ctx.is_finished else math.inf

        with self._fleet.busy(worker, _num_uncomputed(ctx)) as note_computed:
            messages = self._fleet.stream(worker, open_call, patience)
            async with aclosing(messages):  # type: ignore[type-var]
                async for message in messages:
                    if ctx.is_finished:
                        return
                    note_computed()
                    if is_moved:
                        is_moved = False
                        ctx.migrations += 1
                        self._metrics.migrations.inc()
                    if not ctx.computed_by:
                        ctx.computed_by = worker.id
                        ctx.note_cached(message.local_hit_tokens + message.store_hit_tokens)
                    for chunk in map(codec.chunk_from_proto, message.chunks):
                        if _is_wanted(ctx, chunk):
                            yield chunk
        if not ctx.is_finished:
            raise UnavailableError("the stream ended early", reason="stream-incomplete")

    async def _find_worker(self, ctx: RequestContext) -> None:
        """Choose where a broken stream goes on."""
        try:
            await self._lookup(ctx)
            await self._route(ctx, is_resumed=True)
        except UnavailableError as error:
            if not ctx.num_output_tokens:
                raise
            message = f"{error.message}; the stream broke after {ctx.num_output_tokens} tokens"
            raise UnavailableError(message, reason=error.reason) from error

    def _request(self, ctx: RequestContext) -> worker_pb2.DecodeRequest:
        resumed = {
            o.index: tuple(o.token_ids)
            for o in ctx.outputs
            if o.token_ids and o.finish_reason is None
        }
        return worker_pb2.DecodeRequest(
            spec=codec.spec_to_proto(ctx.tokens()),
            kv_sources=kv_sources(self._fleet, ctx, ctx.prefill_worker),
            resumed=codec.resumed_to_proto(resumed),
            finished_indices=[o.index for o in ctx.outputs if o.finish_reason is not None],
        )

    def _note_break(self, ctx: RequestContext, worker: Member, error: PacelineError) -> None:
        self._fleet.suspect(worker)
        fields = {
            "worker": worker.id,
            "reason": error.reason,
            "error": error.message,
            "tokens": ctx.num_output_tokens,
        }
        logger.warning("decode-broken", extra={"fields": fields})
        current_span().event(
            "decode-broken", {"paceline.worker": worker.id, "error.type": error.reason}
        )


def _num_uncomputed(ctx: RequestContext) -> int:
    """Return how many tokens the decode worker computes before the next one comes."""
    if ctx.prefill_worker is not None:
        return 0
    stored = max(ctx.holders.values(), default=0) * ctx.card().block_size
    return max(0, len(ctx.tokens().prompt_token_ids) + ctx.longest_output - stored)


def _is_wanted(ctx: RequestContext, chunk: TokenChunk) -> bool:
    """Tell whether a chunk is news; one that cannot be right breaks the stream.

    Raises:
        UnavailableError: it cannot be right; another worker will do better.
    """
    if chunk.index >= len(ctx.outputs):
        raise UnavailableError(f"no output {chunk.index} was asked for", reason="bad-chunk")
    output, spec = ctx.outputs[chunk.index], ctx.tokens()
    if output.finish_reason is not None:
        return False
    if (
        max(chunk.token_ids, default=0) >= ctx.card().vocab_size
        or len(output.token_ids) + len(chunk.token_ids) > spec.max_tokens
        or (spec.logprobs and len(chunk.logprobs) != len(chunk.token_ids))
        or not spec.stop_token_ids.isdisjoint(chunk.token_ids[:-1])
    ):
        raise UnavailableError(f"a chunk of output {chunk.index} is wrong", reason="bad-chunk")
    if chunk.finish_reason in (FinishReason.CANCELLED, FinishReason.ERROR):
        raise UnavailableError(f"output {chunk.index} ended by itself", reason="output-broken")
    return bool(chunk.token_ids) or chunk.finish_reason is not None
