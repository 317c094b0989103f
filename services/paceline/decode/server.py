"""Serves DecodeService: one engine request per call, tokens streamed as steps bring them.

The engine behind it is whatever fits `DecodeEngine`; worker/__main__.py passes the bridge.
A reader that falls behind gets the tokens of several steps in one message; the engine never
waits for it.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from contextlib import aclosing
from typing import Any, Protocol

from paceline.domain.progress import RequestUpdate
from paceline.domain.request import GenerationSpec
from paceline.process.logs import logged_call, request_id_var
from paceline.rpc import codec
from paceline.v1 import worker_pb2

logger = logging.getLogger(__name__)


class DecodeEngine(Protocol):
    """What the role needs of an engine."""

    def decode(
        self,
        spec: GenerationSpec,
        kv_sources: Sequence[str],
        resumed: Mapping[int, tuple[int, ...]],
        finished_indices: frozenset[int],
    ) -> AsyncGenerator[RequestUpdate]:
        """Generate; closing the iterator cancels."""
        ...

    def stop_sequence(self, request_id: str, index: int) -> None:
        """End one output of a running request; unknown ones are ignored."""
        ...


class DecodeServicer:
    """gRPC face of the decode role."""

    def __init__(self, engine: DecodeEngine) -> None:
        self._engine = engine

    async def Decode(
        self, request: worker_pb2.DecodeRequest, context: Any
    ) -> AsyncIterator[worker_pb2.DecodeResponse]:
        """Stream tokens until every output ended."""
        spec = codec.spec_from_proto(request.spec)
        if not request_id_var.get():
            request_id_var.set(spec.request_id)
        updates = self._engine.decode(
            spec,
            list(request.kv_sources),
            codec.resumed_from_proto(request.resumed),
            frozenset(request.finished_indices),
        )
        tokens = drafted = accepted = local = store = 0
        with logged_call(logger, "decode-finished") as fields:
            fields["prompt_tokens"] = len(spec.prompt_token_ids)
            async with aclosing(updates) as open_updates:
                async for update in open_updates:
                    tokens += sum(len(chunk.token_ids) for chunk in update.chunks)
                    drafted += sum(chunk.drafted_tokens for chunk in update.chunks)
                    accepted += sum(chunk.accepted_tokens for chunk in update.chunks)
                    local += update.local_hit_tokens
                    store += update.store_hit_tokens
                    fields["tokens"] = tokens
                    fields["drafted_tokens"], fields["accepted_tokens"] = drafted, accepted
                    fields["local_hit_tokens"], fields["store_hit_tokens"] = local, store
                    yield worker_pb2.DecodeResponse(
                        chunks=[codec.chunk_to_proto(chunk) for chunk in update.chunks],
                        local_hit_tokens=update.local_hit_tokens,
                        store_hit_tokens=update.store_hit_tokens,
                    )

    async def StopSequence(
        self, request: worker_pb2.StopSequenceRequest, context: Any
    ) -> worker_pb2.StopSequenceResponse:
        """End one output."""
        self._engine.stop_sequence(request.request_id, request.index)
        return worker_pb2.StopSequenceResponse()
