"""Carries decisions to a target: deadlines, back-off, others who set sizes, and what came of it.

The loop asks it for the sizes that hold and gives it decisions; no error of a target leaves it.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from random import Random
from typing import Literal

from paceline.autoscaler.backoff import Backoff, BackoffRules
from paceline.autoscaler.ownership import Ownership
from paceline.autoscaler.problems import problem
from paceline.autoscaler.targets.base import ScaleTarget, TargetError
from paceline.autoscaler.values import POOLS, Decision, Observation
from paceline.domain.member import Role

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Effect:
    """What came of a decision for one pool."""

    role: Role
    replicas: int
    outcome: Literal["applied", "failed", "waiting"]
    """waiting: for the end of a back-off."""
    reason: str = ""


class Steering:
    """Reads and changes the sizes of pools."""

    def __init__(
        self,
        target: ScaleTarget,
        ownership: Ownership,
        random: Random,
        timeout_s: float,
        on_failure: Callable[[str], None],
        rules: BackoffRules = BackoffRules(),  # noqa: B008
    ) -> None:
        """`on_failure` hears the reason of every failed call."""
        self._target = target
        self._ownership = ownership
        self._timeout_s = timeout_s
        self._on_failure = on_failure
        self._backoffs = {role: Backoff(rules, random) for role in POOLS}
        self._reading = Backoff(rules, random)
        self._sizes: dict[Role, int] = {}
        self._read_problem: str | None = None
        self._failing: dict[Role, str] = {}

    async def read(self, now_s: float) -> tuple[Mapping[Role, int], tuple[str, ...]]:
        """Return the sizes last asked for, and why they are not to be changed or not known.

        While they cannot be read, those of the last time are returned, 0 before the first.
        """
        if self._reading.wait_s(now_s) > 0 and self._read_problem is not None:
            return self._known(), (self._read_problem,)
        try:
            async with asyncio.timeout(self._timeout_s):
                sizes = await self._target.read()
        except Exception as error:
            failure = _declared(error, self._timeout_s)
            self._note_read(failure, now_s)
            return self._known(), (problem(failure.reason, failure.message),)
        self._note_read(None, now_s)
        self._sizes = dict(sizes)
        return self._known(), self._ownership.problems(sizes, now_s)

    async def apply(self, observation: Observation, decision: Decision) -> tuple[Effect, ...]:
        """Bring the pools whose size is another than the decided one to that, all at once."""
        changes = [
            (role, decision.replicas[role])
            for role in POOLS
            if decision.replicas[role] != observation.pools[role].requested
        ]
        now_s = observation.at_s
        return tuple(
            await asyncio.gather(
                *(
                    self._apply(role, size, decision.victims.get(role, ()), now_s)
                    for role, size in changes
                )
            )
        )

    async def _apply(self, role: Role, size: int, victims: tuple[str, ...], now_s: float) -> Effect:
        backoff = self._backoffs[role]
        if (wait_s := backoff.wait_s(now_s)) > 0:
            text = f"{self._failing.get(role, '')}; tried again in {wait_s:.0f} s"
            return Effect(role, size, "waiting", text)
        self._ownership.note_try(role, size)
        try:
            async with asyncio.timeout(self._timeout_s):
                await self._target.apply(role, size, victims)
        except Exception as error:
            failure = _declared(error, self._timeout_s)
            backoff.note_failure(
                now_s, is_retryable=failure.is_retryable, retry_after_s=failure.retry_after_s
            )
            self._note_apply(role, failure)
            return Effect(role, size, "failed", problem(failure.reason, failure.message))
        backoff.note_success()
        self._note_apply(role, None)
        self._ownership.note_applied(role, size)
        self._sizes[role] = size
        return Effect(role, size, "applied")

    def _known(self) -> dict[Role, int]:
        return {role: self._sizes.get(role, 0) for role in POOLS}

    def _note_read(self, failure: TargetError | None, now_s: float) -> None:
        """Count failures; log when reading starts and stops to fail."""
        if failure is None:
            self._reading.note_success()
            if self._read_problem is not None:
                logger.info("target-readable")
            self._read_problem = None
            return
        self._on_failure(failure.reason)
        self._reading.note_failure(
            now_s, is_retryable=failure.is_retryable, retry_after_s=failure.retry_after_s
        )
        line = problem(failure.reason, failure.message)
        if line != self._read_problem:
            fields = {"reason": failure.reason, "error": failure.message}
            logger.warning("target-unreadable", extra={"fields": fields})
        self._read_problem = line

    def _note_apply(self, role: Role, failure: TargetError | None) -> None:
        was = self._failing.pop(role, None)
        if failure is None:
            if was is not None:
                logger.info("target-accepts", extra={"fields": {"pool": role.value}})
            return
        self._on_failure(failure.reason)
        if failure.reason != was:
            fields = {"pool": role.value, "reason": failure.reason, "error": failure.message}
            logger.warning("target-refuses", extra={"fields": fields})
        self._failing[role] = failure.reason


def _declared(error: Exception, timeout_s: float) -> TargetError:
    """Return the error as one that targets declare; others are bugs, kept from the loop."""
    if isinstance(error, TargetError):
        return error
    if isinstance(error, TimeoutError):
        return TargetError(f"no answer within {timeout_s:g} s", reason="target-timeout")
    logger.error("target-bug", exc_info=error)
    return TargetError(f"{type(error).__name__}: {error}", reason="target-failed")
