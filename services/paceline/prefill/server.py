"""Serves PrefillService: one engine request per call, progress streamed per published chunk.

The engine behind it is whatever fits `PrefillEngine`; worker/__main__.py passes the bridge.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing
from typing import Any, Protocol

from paceline.domain.progress import RequestUpdate
from paceline.domain.request import GenerationSpec
from paceline.process.logs import logged_call, request_id_var
from paceline.rpc import codec
from paceline.v1 import worker_pb2

logger = logging.getLogger(__name__)


class PrefillEngine(Protocol):
    """What the role needs of an engine."""

    def prefill(
        self, spec: GenerationSpec, kv_sources: Sequence[str]
    ) -> AsyncGenerator[RequestUpdate]:
        """Compute and publish a prompt's KV; closing the iterator cancels."""
        ...


class PrefillServicer:
    """gRPC face of the prefill role."""

    def __init__(self, engine: PrefillEngine) -> None:
        self._engine = engine

    async def Prefill(
        self, request: worker_pb2.PrefillRequest, context: Any
    ) -> AsyncIterator[worker_pb2.PrefillResponse]:
        """Stream progress until the prompt's KV is published."""
        spec = codec.spec_from_proto(request.spec)
        if not request_id_var.get():
            request_id_var.set(spec.request_id)
        published = local = store = 0
        with logged_call(logger, "prefill-finished") as fields:
            fields["prompt_tokens"] = len(spec.prompt_token_ids)
            async with aclosing(self._engine.prefill(spec, list(request.kv_sources))) as updates:
                async for update in updates:
                    published += update.published_tokens
                    local += update.local_hit_tokens
                    store += update.store_hit_tokens
                    fields["published_tokens"] = published
                    fields["local_hit_tokens"], fields["store_hit_tokens"] = local, store
                    yield worker_pb2.PrefillResponse(
                        published_keys=update.published_keys,
                        published_tokens=published,
                        local_hit_tokens=update.local_hit_tokens,
                        store_hit_tokens=update.store_hit_tokens,
                        is_last=update.is_finished,
                    )
