"""A target that changes nothing: what would be done is logged, and journaled by the loop."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence

from paceline.domain.member import Role

logger = logging.getLogger(__name__)


class RecordingTarget:
    """Dry run: pools are what they are, whatever is decided."""

    def __init__(self, count: Callable[[], Mapping[Role, int]]) -> None:
        """`count` returns the workers of each pool that are there."""
        self._count = count
        self._said: dict[Role, tuple[int, int]] = {}

    async def read(self) -> Mapping[Role, int]:
        """Return how many workers are there."""
        return self._count()

    async def apply(self, role: Role, replicas: int, victims: Sequence[str]) -> None:
        """Log what would be asked for, once per change of it."""
        wish = (self._count().get(role, 0), replicas)
        if self._said.get(role) == wish:
            return
        self._said[role] = wish
        fields = {"pool": role.value, "from": wish[0], "to": replicas, "victims": list(victims)}
        logger.info("would-scale", extra={"fields": fields})

    async def close(self) -> None:
        """Do nothing."""
