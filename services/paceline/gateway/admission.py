"""Bounds what runs at a time and keeps request ids unique; refuses instead of queueing.

Workers queue admitted requests; this bound is what keeps those queues, and the gateway's
memory, finite.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from paceline.domain.errors import AlreadyExistsError, ExhaustedError

RETRY_AFTER_S = 1.0


class Admission:
    """Counts admitted requests."""

    def __init__(self, max_in_flight: int) -> None:
        self._max_in_flight = max_in_flight
        self._running: set[tuple[str, str]] = set()
        self.num_finished = 0
        self.num_failed = 0

    @property
    def num_running(self) -> int:
        """Admitted requests that did not end."""
        return len(self._running)

    @contextmanager
    def admit(self, tenant: str, request_id: str) -> Iterator[None]:
        """Hold a place while a request runs; ids are compared within a tenant.

        Raises:
            AlreadyExistsError: a running request of the tenant has this id.
            ExhaustedError: all places are taken.
        """
        entry = (tenant, request_id)
        if entry in self._running:
            raise AlreadyExistsError(f"request_id: {request_id!r} is running")
        if len(self._running) >= self._max_in_flight:
            raise ExhaustedError(
                f"{self._max_in_flight} requests are running", retry_after_s=RETRY_AFTER_S
            )
        self._running.add(entry)
        try:
            yield
        except Exception:
            self.num_failed += 1
            raise
        else:
            self.num_finished += 1
        finally:
            self._running.discard(entry)
