"""Serves PrefillService: one engine request per call, progress streamed per published chunk.

The engine behind it is whatever fits `PrefillEngine`; worker/__main__.py passes the bridge.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing
from typing import Any, Protocol

from paceline.domain.progress import RequestUpdate
from paceline.domain.request import GenerationSpec
from paceline.rpc import codec
from paceline.v1 import worker_pb2


class PrefillEngine(Protocol):
    """What the role needs of an engine."""

    def prefill(
        self, spec: GenerationSpec, kv_sources: Sequence[str]
    ) -> AsyncIterator[RequestUpdate]:
        """Compute and publish a prompt's KV; closing the iterator cancels."""
        ...


class PrefillServicer:
    """gRPC face of the prefill role."""

    def __init__(self, engine: PrefillEngine) -> None:
        self._engine = engine

    async def Prefill(  # noqa: N802 - name of the contract
        self, request: worker_pb2.PrefillRequest, context: Any
    ) -> AsyncIterator[worker_pb2.PrefillResponse]:
        """Stream progress until the prompt's KV is published."""
        spec = codec.spec_from_proto(request.spec)
        published = 0
        async with aclosing(self._engine.prefill(spec, list(request.kv_sources))) as updates:  # type: ignore[type-var]
            async for update in updates:
                published += update.published_tokens
                yield worker_pb2.PrefillResponse(
                    published_keys=update.published_keys,
                    published_tokens=published,
                    local_hit_tokens=update.local_hit_tokens,
                    store_hit_tokens=update.store_hit_tokens,
                    is_last=update.is_finished,
                )
