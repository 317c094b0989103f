"""A worker's standing call to the trainer: tells slack, outcomes and state, hears plans.

Finds the trainer through the membership and comes back to it whenever the call ends. Serving
does not depend on it: without a trainer the engine drafts with what it has.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import Any

import grpc

from paceline.domain.cost import StepCost, StepShape
from paceline.domain.drafts import DraftState
from paceline.domain.errors import PacelineError, UnavailableError
from paceline.domain.member import Load
from paceline.domain.slack import Slack
from paceline.process.lifecycle import Tasks
from paceline.process.metrics import Metrics
from paceline.rpc.channel import map_rpc_error, open_channel
from paceline.rpc.draft_codec import entry_from_proto
from paceline.v1 import drafts_pb2, drafts_pb2_grpc
from paceline.worker.drafts import DraftFollower
from paceline.worker.outbox import Outbox

logger = logging.getLogger(__name__)

WRITE_S = 5.0
"""Deadline of one message to the trainer."""
SILENCE_S = 10.0
"""A trainer that says nothing for three of its periods is taken for gone."""
PIECE_S = 10.0
"""Longest wait for the next piece of a file."""

_FIRST_PAUSE_S = 0.1
_MAX_PAUSE_S = 2.0

Trainers = Callable[[], Awaitable[Sequence[str]]]
"""Returns host:port of each trainer of the fleet."""


@dataclass(frozen=True, slots=True)
class Identity:
    """Who attends."""

    worker_id: str
    model_digest: str
    machine: str


@dataclass(frozen=True, slots=True)
class SlackMeter:
    """Says what a load means for whoever would like to compute beside it."""

    step_cost: StepCost
    threads: int
    chunk_tokens: int
    itl_target_s: float

    def slack(self, load: Load, num_unheard: int, last_step_s: float) -> Slack:
        """Return the slack; requests that the engine has not seen yet count as waiting."""
        is_idle = load.num_running == 0 and load.num_waiting == 0
        slack = Slack(
            num_running=load.num_running,
            num_waiting=num_unheard if is_idle else load.num_waiting,
            threads=self.threads,
            last_step_s=last_step_s,
            itl_target_s=self.itl_target_s,
        )
        if not slack.is_busy:
            return slack
        shape = StepShape(rows=load.num_running, attended=load.context_tokens)
        chunk = min(load.pending_prefill_tokens, self.chunk_tokens)
        if chunk:
            shape = shape.with_chunk(chunk, 0)
        return replace(slack, predicted_step_s=self.step_cost.step_s(shape))


class Attendance:
    """Attends at one trainer at a time."""

    def __init__(
        self,
        identity: Identity,
        find_trainers: Trainers,
        outbox: Outbox,
        follower: DraftFollower | None,
        metrics: Metrics,
        random: random.Random,
    ) -> None:
        """Send what lies in the outbox; hand plans to the follower, if the worker drafts."""
        self._identity = identity
        self._find_trainers = find_trainers
        self._outbox = outbox
        self._follower = follower
        self._metrics = metrics
        self._random = random
        self._state = DraftState()
        self._error = ""
        self._num_attempts = 0
        self._last_trouble = ""
        if follower is not None:
            follower.on_error = self._note_error

    def note_state(self, state: DraftState) -> None:
        """Take what the engine drafts with now."""
        self._metrics.draft_swaps.inc(max(0, state.num_swaps - self._state.num_swaps))
        self._metrics.draft_swap_stall_max_seconds.set(state.max_swap_stall_s)
        self._state = state
        self._tell_state()

    async def run(self, tasks: Tasks) -> None:
        """Attend until cancelled."""
        if self._follower is not None:
            tasks.spawn(self._follower.run(), "drafts", is_vital=True)
        pause_s = _FIRST_PAUSE_S
        while True:
            if await self._attend_somewhere():
                pause_s = _FIRST_PAUSE_S
            await asyncio.sleep(pause_s * self._random.uniform(0.5, 1.0))
            pause_s = min(2 * pause_s, _MAX_PAUSE_S)

    async def _attend_somewhere(self) -> bool:
        """Attend at the next of the trainers; tell whether it took us."""
        addresses = await self._find_trainers()
        if not addresses:
            return False
        address = addresses[self._num_attempts % len(addresses)]
        channel = open_channel(address)
        has_begun = False
        try:
            async with aclosing(self._attend(channel)) as plans:
                async for _ in plans:
                    if not has_begun:
                        has_begun, self._last_trouble = True, ""
                        self._metrics.trainer_link_up.set(1)
                        logger.info("trainer-attended", extra={"fields": {"address": address}})
        except PacelineError as error:
            # Said once, not at every attempt.
            if error.message != self._last_trouble:
                self._last_trouble = error.message
                fields = {"address": address, "reason": error.reason, "error": error.message}
                logger.warning("trainer-lost", extra={"fields": fields})
        finally:
            self._metrics.trainer_link_up.set(0)
            await channel.close()
        # One that serves another model must not keep us from the right one.
        self._num_attempts += not has_begun
        return has_begun

    async def _attend(self, channel: grpc.aio.Channel) -> AsyncGenerator[None]:
        """Hold one call; yield at every plan, until the call ends.

        Raises:
            PacelineError: it broke, or was refused.
        """
        stub: Any = drafts_pb2_grpc.DraftServiceStub(channel)
        call = stub.Attend()
        is_heard = asyncio.Event()
        telling = asyncio.create_task(self._tell(call, is_heard), name="telling")
        if self._follower is not None:
            self._follower.fetch = lambda version: _fetch(stub, version)
        try:
            while (response := await _read(call, telling)) is not None:
                is_heard.set()
                if self._follower is not None:
                    self._follower.follow(tuple(map(entry_from_proto, response.entries)))
                yield
        except grpc.aio.AioRpcError as error:
            raise map_rpc_error(error) from error
        finally:
            if self._follower is not None:
                self._follower.fetch = None
            call.cancel()
            telling.cancel()
            await asyncio.gather(telling, return_exceptions=True)

    async def _tell(self, call: Any, is_heard: asyncio.Event) -> None:
        """Say who we are and, once that was answered, all there is to tell."""
        message = self._outbox.introduce()
        message.worker_id = self._identity.worker_id
        message.model_digest = self._identity.model_digest
        message.machine = self._identity.machine
        await _write(call, message)
        # Bounded by the reader, which ends the call when no answer comes.
        await is_heard.wait()
        while True:
            await _write(call, await self._outbox.next())

    def _note_error(self, error: str) -> None:
        self._error = error
        self._tell_state()

    def _tell_state(self) -> None:
        self._outbox.put_state(replace(self._state, error=self._error or self._state.error))


async def _write(call: Any, message: drafts_pb2.AttendRequest) -> None:
    async with asyncio.timeout(WRITE_S):
        await call.write(message)


async def _read(call: Any, telling: asyncio.Task[None]) -> Any:
    """Return the next plan; None once the call is over.

    Raises:
        UnavailableError: silence, or what we say does not arrive.
        grpc.aio.AioRpcError: the call failed.
    """
    reading = asyncio.ensure_future(call.read())
    try:
        done, _ = await asyncio.wait(
            {reading, telling}, timeout=SILENCE_S, return_when=asyncio.FIRST_COMPLETED
        )
        if reading not in done and telling not in done:
            raise UnavailableError("the trainer is silent", reason="trainer-silent")
        if reading not in done:
            # The call's own status says why; give it the moment that it takes to arrive.
            done, _ = await asyncio.wait({reading}, timeout=WRITE_S)
        if reading not in done or reading.cancelled():
            raise UnavailableError("the call broke", reason="peer-unavailable")
        response = reading.result()
        return None if response is grpc.aio.EOF else response
    finally:
        if not reading.done():
            reading.cancel()


async def _fetch(stub: Any, version: str) -> AsyncGenerator[tuple[str, bytes]]:
    call = stub.FetchDraft(drafts_pb2.FetchDraftRequest(version=version))
    try:
        while True:
            async with asyncio.timeout(PIECE_S):
                piece = await call.read()
            if piece is grpc.aio.EOF:
                return
            yield piece.file, piece.data
    except grpc.aio.AioRpcError as error:
        raise map_rpc_error(error) from error
    finally:
        call.cancel()
