"""Where requests wait while no worker can take them: in order, bounded in number and time.

A fleet scaled to zero has nobody to send a request to, but an autoscaler that sees how many are
parked (`num_parked`, in the gateway's record) and wakes workers. Without one a wait is worth a
restart's time only. Those that wait go on in the order in which they came, as far as what each
waits for is there. main spawns `run`; pipeline.py and steps/route.py wait.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass

from paceline.domain.errors import DeadlineError, ExhaustedError, UnavailableError
from paceline.gateway.fleet import FleetView
from paceline.gateway.settings import GatewaySettings
from paceline.process.spans import span

POLL_S = 0.05

RETRY_AFTER_S = 5.0
"""What refused clients are told: about the time that a worker takes to start."""


@dataclass(slots=True, eq=False)
class _Ticket:
    """One that waits."""

    is_there: Callable[[], bool]
    since_s: float
    limit_s: float
    """How long it may wait; grows once somebody can wake workers, never shrinks."""
    answer: asyncio.Future[None]


class Parking:
    """The waiting requests of one gateway."""

    def __init__(
        self,
        can_wake: Callable[[], bool],
        is_reached: Callable[[], bool],
        *,
        max_parked: int,
        park_s: float,
        restart_s: float,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        """Waits last `park_s` while `can_wake()` says that workers may be started, else
        `restart_s`. Nobody who waits goes on before `is_reached()`: calls that are made before
        a connection stands are sent in any order."""
        self._can_wake = can_wake
        self._is_reached = is_reached
        self._max_parked = max_parked
        self._park_s = park_s
        self._restart_s = restart_s
        self._monotonic = monotonic
        self._tickets: list[_Ticket] = []
        self._is_closed = False

    @property
    def num_parked(self) -> int:
        """Requests that wait."""
        return len(self._tickets)

    async def wait(self, is_there: Callable[[], bool], timeout_s: float) -> None:
        """Wait until something is there.

        Raises:
            ExhaustedError: too many wait already.
            UnavailableError: no worker brought it in time, or the gateway ends.
            DeadlineError: `timeout_s` passed before.
        """
        # Whoever comes while others wait goes behind them, even if it could go on at once.
        if not self._tickets and is_there():
            return
        if self._is_closed:
            raise _ending()
        if len(self._tickets) >= self._max_parked:
            raise ExhaustedError(
                f"{self._max_parked} requests wait for a worker",
                retry_after_s=RETRY_AFTER_S,
                reason="parking-full",
            )
        answer: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        ticket = _Ticket(is_there, self._monotonic(), self._limit_s(), answer)
        self._tickets.append(ticket)
        try:
            with span("parked"):
                async with asyncio.timeout(timeout_s):
                    await answer
        except TimeoutError as error:
            raise DeadlineError("the deadline passed") from error
        finally:
            # Not before its turn, so that nobody overtakes those that were told to go on.
            self._tickets.remove(ticket)

    def release(self) -> None:
        """Let go on who can, in order, and give up those whose time is over."""
        if not self._tickets:
            return
        now_s, limit_s, is_reached = self._monotonic(), self._limit_s(), self._is_reached()
        for ticket in self._tickets:
            ticket.limit_s = max(ticket.limit_s, limit_s)
            if ticket.answer.done():
                continue
            if is_reached and ticket.is_there():
                ticket.answer.set_result(None)
            elif now_s - ticket.since_s >= ticket.limit_s:
                ticket.answer.set_exception(UnavailableError("no decode worker is ready"))

    async def run(self) -> None:
        """Release again and again until cancelled."""
        while True:
            self.release()
            await asyncio.sleep(POLL_S)

    def close(self) -> None:
        """Refuse those that wait and whoever would have to: nobody will be woken for them."""
        self._is_closed = True
        for ticket in self._tickets:
            if not ticket.answer.done():
                ticket.answer.set_exception(_ending())

    def _limit_s(self) -> float:
        return self._park_s if self._can_wake() else self._restart_s


def create_parking(fleet: FleetView, settings: GatewaySettings) -> Parking:
    """Return the parking of a gateway."""
    return Parking(
        lambda: fleet.can_wake,
        fleet.reach_decoders,
        max_parked=settings.max_parked,
        park_s=settings.park_s,
        restart_s=settings.wait_for_worker_s,
    )


def _ending() -> UnavailableError:
    return UnavailableError("the gateway stops", reason="gateway-stopping")
