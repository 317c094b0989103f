"""Has the prompt's KV computed and published by the chosen prefill worker.

While chunks become readable at the prefill worker's node, the decode worker's node is asked
to copy them, so that little is left to move when decoding starts. A prefill that breaks is
tried elsewhere and at last left to the decode worker: it costs time, never the request.
"""

from __future__ import annotations

import asyncio
import logging
from contextlib import aclosing
from typing import Any

import grpc

from paceline.domain.blocks import LAYOUT_VERSION
from paceline.domain.errors import ExhaustedError, InternalError, UnavailableError
from paceline.domain.member import Member, ModelCard
from paceline.gateway.context import RequestContext
from paceline.gateway.fleet import FleetView
from paceline.gateway.steps.lookup import LookupStep
from paceline.gateway.steps.route import RouteStep, kv_sources
from paceline.process.spans import Attributes, current_span, span
from paceline.rpc import codec
from paceline.rpc.channel import map_rpc_error, request_metadata
from paceline.v1 import kvstore_pb2, kvstore_pb2_grpc, worker_pb2, worker_pb2_grpc

logger = logging.getLogger(__name__)

MAX_PULLS = 4
"""Copies that run at a time for one request; chunks beyond are pulled by the decode worker."""

PULL_TIMEOUT_S = 2.0

MIN_PATIENCE_S = 5.0
PATIENCE_FACTOR = 10.0
"""How far a prediction of the time to the next message may be off: queues grow meanwhile."""


class PrefillStep:
    """Calls PrefillService."""

    def __init__(
        self, fleet: FleetView, lookup: LookupStep, route: RouteStep, max_attempts: int
    ) -> None:
        self._fleet = fleet
        self._lookup = lookup
        self._route = route
        self._max_attempts = max_attempts

    async def __call__(self, ctx: RequestContext) -> None:
        """Return when the KV is readable in the store, or nobody is left to compute it.

        Raises:
            UnavailableError: no decode worker is left.
            DeadlineError: the request's deadline passed.
        """
        for attempt in range(1, self._max_attempts + 1):
            worker = ctx.prefill_worker
            if worker is None:
                return
            about: Attributes = {"paceline.worker": worker.id, "paceline.attempt": attempt}
            try:
                with span("prefill", about, kind="client"):
                    await self._prefill(ctx, worker)
                return
            except (UnavailableError, ExhaustedError, InternalError) as error:
                fields = {"worker": worker.id, "reason": error.reason, "error": error.message}
                logger.warning("prefill-broken", extra={"fields": fields})
                if isinstance(error, InternalError):
                    break  # It would happen elsewhere too: no reason to suspect the worker.
                self._fleet.suspect(worker)
                await self._lookup(ctx)
                await self._route(ctx)
        ctx.prefill_worker = None

    async def _prefill(self, ctx: RequestContext, worker: Member) -> None:
        spec, timeout_s = ctx.tokens(), ctx.remaining_s()
        request = worker_pb2.PrefillRequest(
            spec=codec.spec_to_proto(spec), kv_sources=kv_sources(self._fleet, ctx, None)
        )

        def open_call(channel: grpc.aio.Channel) -> Any:
            stub: Any = worker_pb2_grpc.PrefillServiceStub(channel)
            return stub.Prefill(request, timeout=timeout_s, metadata=request_metadata())

        patience_s = _patience_s(ctx.predicted_ttft_s, timeout_s)
        hits, is_complete = 0, False
        async with Mover(self._fleet, ctx.card(), worker, ctx.decode_worker) as mover:
            with self._fleet.busy(worker, len(spec.prompt_token_ids)):
                messages = self._fleet.stream(worker, open_call, lambda: patience_s)
                async with aclosing(messages):  # type: ignore[type-var]
                    async for message in messages:
                        hits += message.local_hit_tokens + message.store_hit_tokens
                        is_complete = is_complete or message.is_last
                        mover.move(list(message.published_keys))
        if not is_complete:
            raise UnavailableError("the prefill ended early", reason="prefill-incomplete")
        ctx.computed_by = worker.id
        ctx.note_cached(hits)
        current_span().set({"paceline.cached_prompt_tokens": ctx.cached_tokens})


def _patience_s(predicted_s: float, left_s: float) -> float:
    """Return how long a prefill may be silent before its worker counts as hung.

    Half of the time left stays for the decode worker to compute the prompt itself.
    """
    generous_s = max(MIN_PATIENCE_S, PATIENCE_FACTOR * predicted_s)
    return min(generous_s, max(left_s / 2, 2 * predicted_s))


class Mover:
    """Copies published blocks to the decode worker's node, in the background.

    What is not copied when it ends is left to the decode worker's own lookup.
    """

    def __init__(
        self, fleet: FleetView, model: ModelCard, source: Member, target: Member | None
    ) -> None:
        self._fleet = fleet
        self._model = model
        source_node = fleet.node(source.node_id)
        target_node = fleet.node(target.node_id) if target is not None else None
        self._uri = source_node.kv_uri if source_node is not None else ""
        is_far = target_node is not None and target_node.id != source.node_id
        self._target = target_node if is_far and self._uri else None
        self._pulls: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> Mover:
        return self

    async def __aexit__(self, *_: object) -> None:
        for task in self._pulls:
            task.cancel()
        await asyncio.gather(*self._pulls, return_exceptions=True)

    def move(self, keys: list[bytes]) -> None:
        """Start copying blocks, unless they are there already or too many copies run."""
        if self._target is None or not keys or len(self._pulls) >= MAX_PULLS:
            return
        task = asyncio.create_task(self._pull(self._target.address, keys), name="kv-pull")
        self._pulls.add(task)
        task.add_done_callback(self._pulls.discard)

    async def _pull(self, address: str, keys: list[bytes]) -> None:
        model = self._model
        layout = kvstore_pb2.KvLayout(
            kv_root=model.kv_root,
            layout_version=LAYOUT_VERSION,
            dtype=model.kv_dtype,
            block_size=model.block_size,
            block_bytes=model.block_bytes,
        )
        request = kvstore_pb2.PullRequest(layout=layout, keys=keys, source=self._uri)
        about: Attributes = {"paceline.source": self._uri, "paceline.blocks": len(keys)}
        with (
            span("kv.pull", about, kind="client") as pulling,
            self._fleet.channel(address) as channel,
        ):
            stub: Any = kvstore_pb2_grpc.KvNodeServiceStub(channel)
            try:
                pulled = await stub.Pull(
                    request, timeout=PULL_TIMEOUT_S, metadata=request_metadata()
                )
                pulling.set({"paceline.found_blocks": pulled.num_readable})
            except grpc.aio.AioRpcError as error:
                pulling.fail(map_rpc_error(error).reason)
                fields = {"node": address, "error": error.details()}
                logger.debug("kv-pull-failed", extra={"fields": fields})
