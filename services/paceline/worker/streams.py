"""Buffers between the engine and the callers of its requests.

The engine never waits for a caller: news of several steps merge into one update. A stream
holds at most one request's tokens (prompt keys and max_tokens per output), which the context
bounds. bridge.py feeds streams; prefill/ and decode/ drain them.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

from paceline.domain.errors import PacelineError
from paceline.domain.progress import RequestUpdate
from paceline.domain.request import FinishReason, TokenChunk, TokenLogprobs
from paceline.process.spans import NO_SPAN, Span
from paceline.worker.request_trace import RequestTrace


@dataclass(slots=True)
class _Merged:
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    target_steps: int = 0
    drafted_tokens: int = 0
    accepted_tokens: int = 0
    draft_version: str = ""


class RequestStream:
    """News of one request, merged until somebody reads them."""

    def __init__(
        self,
        *,
        reports_published: bool = False,
        log_id: str = "",
        kv_sources: tuple[str, ...] = (),
        span: Span = NO_SPAN,
        trace: RequestTrace | None = None,
    ) -> None:
        self.reports_published = reports_published
        """Whether the caller hears which blocks became readable; so for prefills."""
        self.log_id = log_id
        """Request id under which every hop logs."""
        self.kv_sources = kv_sources
        """KV nodes that the caller knows to hold blocks of the prompt."""
        self.span = span
        """Span of the caller's call."""
        self.trace = trace
        """Hears what the engine does for the request, if that is recorded."""
        self._chunks: dict[int, _Merged] = {}
        self._published: set[bytes] = set()
        self._new_keys: list[bytes] = []
        self._new_tokens = 0
        self._local_hit_tokens = 0
        self._store_hit_tokens = 0
        self._is_finished = False
        self._error: PacelineError | None = None
        self._has_news = asyncio.Event()

    def add_chunk(self, chunk: TokenChunk) -> None:
        """Append tokens of one output."""
        merged = self._chunks.setdefault(chunk.index, _Merged())
        merged.token_ids.extend(chunk.token_ids)
        merged.logprobs.extend(chunk.logprobs)
        merged.target_steps += chunk.target_steps
        merged.drafted_tokens += chunk.drafted_tokens
        merged.accepted_tokens += chunk.accepted_tokens
        merged.draft_version = chunk.draft_version or merged.draft_version
        merged.finish_reason = chunk.finish_reason or merged.finish_reason
        self._has_news.set()

    def add_published(self, key: bytes, num_tokens: int) -> None:
        """Note a block of the request that became readable in the store; once per block."""
        if self.reports_published and key not in self._published:
            self._published.add(key)
            self._new_keys.append(key)
            self._new_tokens += num_tokens
            self._has_news.set()

    def add_hits(self, local_tokens: int, store_tokens: int) -> None:
        """Note prompt tokens that need no computing."""
        self._local_hit_tokens += local_tokens
        self._store_hit_tokens += store_tokens

    def finish(self) -> None:
        """Mark the request as over; what is buffered is still delivered."""
        self._is_finished = True
        self._has_news.set()

    def fail(self, error: PacelineError) -> None:
        """End the stream with an error, unless it is over; what is buffered comes first."""
        self._error = self._error or error
        self._has_news.set()

    async def updates(self) -> AsyncIterator[RequestUpdate]:
        """Yield merged updates until the request is over.

        The caller's own deadline bounds the wait; an engine that dies fails the stream.
        """
        while True:
            await self._has_news.wait()
            self._has_news.clear()
            update = self._take()
            if update != RequestUpdate():
                yield update
            if update.is_finished:
                return
            if self._error is not None:
                raise self._error

    def _take(self) -> RequestUpdate:
        chunks, self._chunks = self._chunks, {}
        keys, self._new_keys = self._new_keys, []
        update = RequestUpdate(
            chunks=tuple(
                TokenChunk(
                    index=index,
                    token_ids=tuple(m.token_ids),
                    logprobs=tuple(m.logprobs),
                    finish_reason=m.finish_reason,
                    target_steps=m.target_steps,
                    drafted_tokens=m.drafted_tokens,
                    accepted_tokens=m.accepted_tokens,
                    draft_version=m.draft_version,
                )
                for index, m in chunks.items()
            ),
            published_keys=tuple(keys),
            published_tokens=self._new_tokens,
            local_hit_tokens=self._local_hit_tokens,
            store_hit_tokens=self._store_hit_tokens,
            is_finished=self._is_finished,
        )
        self._new_tokens = self._local_hit_tokens = self._store_hit_tokens = 0
        return update
