"""Follows the trainer's plan: fetches what is missing, then lets the engine change over.

A version that cannot be had leaves its drafter as it is, is reported, and tried again later.
worker/attendance.py brings plans and the means to fetch.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from pathlib import Path

from paceline.domain.drafts import DraftEntry, DraftFile, StagedDraft
from paceline.domain.errors import PacelineError
from paceline.process.metrics import Metrics
from paceline.worker.draft_files import DraftCache, DraftRefusedError

logger = logging.getLogger(__name__)

Fetch = Callable[[str], AsyncGenerator[tuple[str, bytes]]]
"""Yields (file, next bytes of it) of a version; raises PacelineError."""

_FIRST_PAUSE_S = 0.2
_MAX_PAUSE_S = 10.0

_SLOWEST_BYTES_PER_S = 1 << 20
_FETCH_S = 30.0
"""Longest fetch, beside the time that its bytes take at that rate."""


class DraftFollower:
    """Keeps one engine at the newest plan."""

    def __init__(
        self,
        cache: DraftCache,
        change: Callable[[tuple[StagedDraft, ...]], None],
        metrics: Metrics,
        *,
        local: Sequence[StagedDraft] = (),
        random: random.Random,
    ) -> None:
        """Hand to `change` what is to be drafted with; `local` is what the engine began with."""
        self._cache = cache
        self._change = change
        self._metrics = metrics
        self._random = random
        self._local = {staged.version: Path(staged.directory) for staged in local}
        self._staged = tuple(local)
        self._plan: tuple[DraftEntry, ...] | None = None
        self._has_news = asyncio.Event()
        self.fetch: Fetch | None = None
        """How to fetch while a trainer is there."""
        self.on_error: Callable[[str], None] = lambda error: None
        """Hears why a plan cannot be followed; empty once it is."""

    def follow(self, plan: tuple[DraftEntry, ...]) -> None:
        """Take the newest plan; one that was not begun with is forgotten."""
        if plan != self._plan:
            self._plan = plan
            self._has_news.set()

    async def run(self) -> None:
        """Follow plans until cancelled."""
        pause_s = _FIRST_PAUSE_S
        while True:
            await self._has_news.wait()
            self._has_news.clear()
            errors = await self._apply(self._plan or ())
            self.on_error("; ".join(errors))
            if not errors:
                pause_s = _FIRST_PAUSE_S
                continue
            # Another plan ends the wait.
            try:
                async with asyncio.timeout(pause_s * self._random.uniform(0.5, 1.0)):
                    await self._has_news.wait()
                pause_s = _FIRST_PAUSE_S
            except TimeoutError:
                pause_s = min(2 * pause_s, _MAX_PAUSE_S)
                self._has_news.set()

    async def _apply(self, plan: tuple[DraftEntry, ...]) -> list[str]:
        """Change the engine over as far as versions can be had; return what failed."""
        staged: list[StagedDraft] = []
        errors: list[str] = []
        for entry in plan:
            staged += await self._stage(entry, errors)
        if tuple(staged) != self._staged:
            fields = {"drafts": [f"{s.drafter}={s.version}:{s.share:g}" for s in staged]}
            logger.info("drafts-change", extra={"fields": fields})
            self._change(tuple(staged))
            self._staged = tuple(staged)
        in_use = {each.version for each in staged}
        await asyncio.to_thread(self._cache.make_room, in_use)
        return errors

    async def _stage(self, entry: DraftEntry, errors: list[str]) -> list[StagedDraft]:
        """Return the versions of one drafter; what it has where the active one cannot be had."""
        active = await self._directory(entry.active, errors)
        if active is None:
            return [staged for staged in self._staged if staged.drafter == entry.drafter]
        canary = entry.canary and await self._directory(entry.canary, errors)
        share = entry.canary_share if canary else 0.0
        out = [(entry.active, active, 1 - share)] if share < 1 else []
        if canary and entry.canary and share > 0:
            out.append((entry.canary, canary, share))
        return [StagedDraft(entry.drafter, f.version, str(d), s) for f, d, s in out]

    async def _directory(self, file: DraftFile, errors: list[str]) -> Path | None:
        local = self._local.get(file.version)
        if local is not None:
            return local
        try:
            found = await asyncio.to_thread(self._cache.find, file)
            return found or await self._fetch(file)
        except (PacelineError, OSError) as error:
            reason = error.reason if isinstance(error, PacelineError) else "not-writable"
            self._metrics.draft_fetch_failures.labels(reason).inc()
            fields = {"version": file.version, "reason": reason, "error": str(error)}
            logger.warning("draft-fetch-failed", extra={"fields": fields})
            errors.append(f"{file.version}: {reason}")
            return None

    async def _fetch(self, file: DraftFile) -> Path:
        if self.fetch is None:
            raise DraftRefusedError("no trainer is there", reason="no-trainer")
        incoming = await asyncio.to_thread(self._cache.open, file)
        try:
            async with asyncio.timeout(_FETCH_S + file.num_bytes / _SLOWEST_BYTES_PER_S):
                async with aclosing(self.fetch(file.version)) as pieces:
                    async for name, data in pieces:
                        await asyncio.to_thread(incoming.write, name, data)
                place = await asyncio.to_thread(incoming.finish)
        except TimeoutError as error:
            raise DraftRefusedError("the fetch takes too long", reason="too-slow") from error
        finally:
            await asyncio.to_thread(incoming.remove)
        self._metrics.draft_fetches.inc()
        self._metrics.draft_fetched_bytes.inc(incoming.num_bytes)
        logger.info("draft-fetched", extra={"fields": {"version": file.version}})
        return place
