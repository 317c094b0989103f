"""Streams the tokens of a request from a decode worker; when it breaks, from another one.

What the client already has of each output is sent along, so the next worker goes on at the
same position with the same noise: the client sees a pause, no lost or repeated token. KV that
the first worker left in the store is used again.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any

import grpc

from paceline.domain.errors import UnavailableError
from paceline.domain.member import Member
from paceline.domain.request import TokenChunk
from paceline.gateway.context import RequestContext
from paceline.gateway.fleet import FleetView
from paceline.gateway.steps.lookup import LookupStep
from paceline.gateway.steps.route import RouteStep, kv_sources
from paceline.process.metrics import Metrics
from paceline.rpc import codec
from paceline.rpc.metadata import request_metadata
from paceline.v1 import worker_pb2, worker_pb2_grpc

logger = logging.getLogger(__name__)

_STOP_TIMEOUT_S = 1.0


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
            UnavailableError: `max_attempts` workers broke; says how many tokens were sent.
            PacelineError: what a worker answered.
        """
        for attempt in range(1, self._max_attempts + 1):
            worker = ctx.decode_worker
            assert worker is not None
            try:
                async with aclosing(self._stream(ctx, worker)) as chunks:  # type: ignore[type-var]
                    async for chunk in chunks:
                        yield chunk
                return
            except UnavailableError as error:
                self._note_break(ctx, worker, error)
                if attempt == self._max_attempts:
                    raise UnavailableError(
                        f"{attempt} decode workers broke the stream after "
                        f"{ctx.num_output_tokens} tokens",
                        reason="migration-limit",
                    ) from error
            await self._lookup(ctx)
            await self._route(ctx, is_resumed=True)

    async def stop(self, ctx: RequestContext, index: int) -> None:
        """Tell the worker that one of several outputs needs no further tokens."""
        worker = ctx.decode_worker
        assert worker is not None
        stub: Any = worker_pb2_grpc.DecodeServiceStub(self._fleet.channel(worker.address))
        request = worker_pb2.StopSequenceRequest(request_id=ctx.tokens().request_id, index=index)
        try:
            await stub.StopSequence(request, timeout=_STOP_TIMEOUT_S, metadata=request_metadata())
        except grpc.aio.AioRpcError as error:
            # Its tokens are dropped here until the call ends.
            logger.debug("stop-failed", extra={"fields": {"error": error.details()}})

    async def _stream(self, ctx: RequestContext, worker: Member) -> AsyncIterator[TokenChunk]:
        stub: Any = worker_pb2_grpc.DecodeServiceStub(self._fleet.channel(worker.address))
        call = stub.Decode(
            self._request(ctx), timeout=ctx.remaining_s(), metadata=request_metadata()
        )
        uncomputed = 0 if ctx.computed_by else len(ctx.tokens().prompt_token_ids)
        with self._fleet.busy(worker, uncomputed):
            async with aclosing(self._fleet.read(call, worker)) as messages:  # type: ignore[type-var]
                async for message in messages:
                    if not ctx.computed_by:
                        ctx.computed_by = worker.id
                        ctx.cached_tokens = message.local_hit_tokens + message.store_hit_tokens
                    for chunk in message.chunks:
                        if ctx.outputs[chunk.index].finish_reason is None:
                            yield codec.chunk_from_proto(chunk)
        if not ctx.is_finished:
            raise UnavailableError("the stream ended early", reason="stream-incomplete")

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

    def _note_break(self, ctx: RequestContext, worker: Member, error: UnavailableError) -> None:
        self._fleet.suspect(worker)
        if ctx.num_output_tokens:
            ctx.migrations += 1
            self._metrics.migrations.inc()
        fields = {
            "worker": worker.id,
            "reason": error.reason,
            "error": error.message,
            "tokens": ctx.num_output_tokens,
        }
        logger.warning("decode-broken", extra={"fields": fields})
