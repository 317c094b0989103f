"""The contract of targets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

from paceline.domain.errors import PacelineError
from paceline.domain.member import Role


class TargetError(PacelineError):
    """A target could not be read or changed; `reason` is one of problems.TARGET_REASONS."""

    reason = "target-failed"

    def __init__(
        self,
        message: str,
        *,
        reason: str,
        is_retryable: bool = True,
        retry_after_s: float = 0.0,
    ) -> None:
        """Say whether the same call may succeed soon, by itself, and when the target itself
        asked for it not to be repeated before.
        """
        super().__init__(message, reason=reason)
        self.is_retryable = is_retryable
        self.retry_after_s = retry_after_s


class ScaleTarget(Protocol):
    """Whoever starts and ends workers."""

    async def read(self) -> Mapping[Role, int]:
        """Return the replicas of each pool that were last asked for, by whomever.

        Raises:
            TargetError: that cannot be found out.
        """
        ...

    async def apply(self, role: Role, replicas: int, victims: Sequence[str]) -> None:
        """Ask for a number of replicas; where the pool shrinks, those of `victims` (member ids)
        go first, in order. Returns once the target has taken it, not once workers are there.

        Raises:
            TargetError: it has not, or that is not known.
        """
        ...

    async def close(self) -> None:
        """Give up connections."""
        ...
