"""Makes spans of what the engine tells of one traced request.

    queue ──> engine.prefill ──> engine.decode        by the engine's clock, one after the other
    kv.load, kv.publish                               beside them

bridge.py tells of steps, kv_link.py of blocks; times are those of the machine's monotonic clock
as the engine process read it. Events of a span are bounded: what comes after the first ones is
only counted. Requests that are not traced have no such object.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from paceline.process.spans import Attributes, Span
from paceline.v1 import engine_pb2

MAX_EVENTS = 64
"""Chunks, and drafts, that a span tells one by one."""


@dataclass(slots=True)
class _Drafted:
    """What the drafts of one drafter brought."""

    rounds: int = 0
    drafted: int = 0
    accepted: int = 0


@dataclass(slots=True)
class _Published:
    """Blocks that became readable in the store."""

    started_s: float
    ended_s: float = 0.0
    blocks: int = 0
    commits: int = 0


class RequestTrace:
    """The spans of one request on this worker, under the span of its call."""

    def __init__(self, span: Span, *, block_bytes: int, is_resumed: bool, now_s: float) -> None:
        """Begin when the request is handed to the engine.

        Of one that is resumed the engine computes output as well, and does not say how much.
        """
        self._span = span
        self._is_resumed = is_resumed
        self._block_bytes = block_bytes
        self._queue: Span | None = span.child("queue", start_s=now_s)
        self._prefill: Span | None = None
        self._decode: Span | None = None
        self._published: _Published | None = None
        self._drafted: dict[str, _Drafted] = {}
        self._num_steps = self._num_tokens = self._num_chunks = self._num_rounds = 0
        self._computed_tokens = 0
        self._last_s = now_s

    def note_step(self, output: engine_pb2.RequestOutput, started_s: float, ended_s: float) -> None:
        """Take what a step between two moments brought."""
        if self._queue is not None:
            self._begin(self._queue, output, started_s)
        num_tokens = sum(len(chunk.token_ids) for chunk in output.chunks)
        if self._prefill is not None:
            self._note_chunk(self._prefill, output, started_s, ended_s)
            if num_tokens:
                self._prefill.end(at_s=ended_s)
                self._prefill = None
                self._decode = self._span.child("engine.decode", start_s=ended_s)
                self._decode.event("first-token", at_s=ended_s)
        if num_tokens:
            self._num_steps += 1
            self._num_tokens += num_tokens
            self._last_s = ended_s
        if self._decode is not None:
            self._note_rounds(self._decode, output.rounds, started_s, ended_s)

    def note_loaded(self, loaded: engine_pb2.KvLoaded) -> None:
        """Take blocks that the engine read from the arena."""
        if not loaded.started_s:
            return
        attributes: Attributes = {
            "paceline.blocks": loaded.num_blocks,
            "paceline.bytes": loaded.num_bytes,
            "paceline.corrupt_blocks": len(loaded.corrupt_keys),
            "paceline.transport": "shm",
        }
        loading = self._span.child("kv.load", attributes, start_s=loaded.started_s)
        loading.end(at_s=loaded.ended_s)

    def note_published(self, num_blocks: int, started_s: float, ended_s: float) -> None:
        """Take blocks that the engine began to write, and that became readable."""
        if self._published is None:
            self._published = _Published(started_s)
        self._published.ended_s = max(self._published.ended_s, ended_s)
        self._published.blocks += num_blocks
        self._published.commits += 1

    def close(self) -> None:
        """End what is open: the request is over, or nobody waits for it any more."""
        if self._published is not None:
            self._end_published(self._published)
        if self._queue is not None:
            self._queue.end()
        if self._prefill is not None:
            self._prefill.end(at_s=self._last_s)
        if self._decode is not None:
            self._end_decode(self._decode)

    def _begin(self, queue: Span, output: engine_pb2.RequestOutput, started_s: float) -> None:
        """End the wait with the first step."""
        queue.end(at_s=started_s)
        self._queue, self._last_s = None, started_s
        self._computed_tokens = output.local_hit_tokens + output.store_hit_tokens
        attributes: Attributes = {
            "paceline.local_hit_tokens": output.local_hit_tokens,
            "paceline.store_hit_tokens": output.store_hit_tokens,
        }
        self._prefill = self._span.child("engine.prefill", attributes, start_s=started_s)

    def _note_chunk(
        self, prefill: Span, output: engine_pb2.RequestOutput, started_s: float, ended_s: float
    ) -> None:
        num_new = max(0, output.computed_tokens - self._computed_tokens)
        self._computed_tokens = max(self._computed_tokens, output.computed_tokens)
        if not num_new and not self._is_resumed:
            return
        self._num_chunks += 1
        self._last_s = ended_s
        prefill.set({"paceline.chunks": self._num_chunks})
        if self._num_chunks <= MAX_EVENTS:
            attributes: dict[str, float] = {"paceline.step_s": ended_s - started_s}
            if not self._is_resumed:
                attributes["paceline.tokens"] = num_new
            prefill.event("chunk", attributes, at_s=ended_s)

    def _note_rounds(
        self,
        decode: Span,
        rounds: Iterable[engine_pb2.DraftRound],
        started_s: float,
        ended_s: float,
    ) -> None:
        for draft in rounds:
            total = self._drafted.setdefault(draft.drafter, _Drafted())
            total.rounds += 1
            total.drafted += draft.num_drafted
            total.accepted += draft.num_accepted
            self._num_rounds += 1
            if self._num_rounds <= MAX_EVENTS:
                attributes: Attributes = {
                    "paceline.drafter": draft.drafter,
                    "paceline.drafted_tokens": draft.num_drafted,
                    "paceline.accepted_tokens": draft.num_accepted,
                    "paceline.step_s": ended_s - started_s,
                }
                decode.event("draft", attributes, at_s=ended_s)

    def _end_decode(self, decode: Span) -> None:
        """Tell the sums: of all drafts of each drafter, one event each."""
        for drafter, total in self._drafted.items():
            attributes: Attributes = {
                "paceline.drafter": drafter,
                "paceline.rounds": total.rounds,
                "paceline.drafted_tokens": total.drafted,
                "paceline.accepted_tokens": total.accepted,
            }
            decode.event("drafts", attributes, at_s=self._last_s)
        decode.set({"paceline.steps": self._num_steps, "paceline.tokens": self._num_tokens})
        decode.end(at_s=self._last_s)

    def _end_published(self, published: _Published) -> None:
        attributes: Attributes = {
            "paceline.blocks": published.blocks,
            "paceline.bytes": published.blocks * self._block_bytes,
            "paceline.commits": published.commits,
            "paceline.transport": "shm",
        }
        publishing = self._span.child("kv.publish", attributes, start_s=published.started_s)
        publishing.end(at_s=published.ended_s)
