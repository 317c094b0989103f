"""Carries captured samples to the stream in Redis, in batches and beside serving.

`push` only queues; one task sends. While Redis is away samples wait, the oldest giving way.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Sequence

from paceline.domain.errors import UnavailableError
from paceline.domain.learnings import Sample
from paceline.process.metrics import Metrics
from paceline.process.sample_stream import SampleStream
from paceline.rpc.draft_codec import sample_to_proto

logger = logging.getLogger(__name__)

MAX_WAITING = 512
"""Samples that wait for Redis: 7 MB at 32 tokens named of each distribution."""

_BATCH_SAMPLES = 32
_PERIOD_S = 0.2
_MAX_PAUSE_S = 5.0


class SamplePublisher:
    """A queue of samples, and the task that empties it."""

    def __init__(
        self,
        stream: SampleStream,
        metrics: Metrics,
        *,
        max_waiting: int = MAX_WAITING,
        period_s: float = _PERIOD_S,
    ) -> None:
        """Hold up to `max_waiting` samples; send every `period_s`."""
        self._stream = stream
        self._metrics = metrics
        self._max_waiting = max_waiting
        self._period_s = period_s
        self._waiting: deque[Sample] = deque()
        self._is_away = False

    @property
    def num_waiting(self) -> int:
        """Samples that were not sent yet."""
        return len(self._waiting)

    def push(self, samples: Sequence[Sample]) -> None:
        """Take samples; never waits."""
        self._waiting.extend(samples)
        self._metrics.capture_samples.inc(len(samples))
        self._metrics.capture_tokens.inc(sum(sample.num_captured for sample in samples))
        self._drop_oldest()

    async def run(self) -> None:
        """Send what waits until cancelled; outlive outages of Redis."""
        pause_s = self._period_s
        while True:
            await asyncio.sleep(pause_s)
            try:
                while self._waiting:
                    await self._send()
                pause_s = self._period_s
                self._note_away(False)
            except UnavailableError as error:
                pause_s = min(2 * pause_s, _MAX_PAUSE_S)
                self._note_away(True, error.message)

    async def _send(self) -> None:
        """Send the oldest ones; they wait on if that fails."""
        count = min(_BATCH_SAMPLES, len(self._waiting))
        batch = [self._waiting.popleft() for _ in range(count)]
        try:
            await self._stream.add([sample_to_proto(s).SerializeToString() for s in batch])
        except UnavailableError:
            self._waiting.extendleft(reversed(batch))
            self._drop_oldest()
            raise

    def _drop_oldest(self) -> None:
        count = max(0, len(self._waiting) - self._max_waiting)
        for _ in range(count):
            self._waiting.popleft()
        self._metrics.capture_dropped.labels("backlog").inc(count)

    def _note_away(self, is_away: bool, error: str = "") -> None:
        if is_away == self._is_away:
            return
        self._is_away = is_away
        if is_away:
            logger.warning("samples-held", extra={"fields": {"error": error}})
        else:
            logger.info("samples-flow", extra={"fields": {"waiting": len(self._waiting)}})
