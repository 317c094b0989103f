"""What the gateway knows of the fleet: members, who is suspect, own work in flight, calls.

Polls the membership. While Redis is away the last view is kept, and a member that only
vanished from its records (a flush, a restart of Redis) stays for a moment, until it had time
to announce itself again. Workers that break calls are avoided (suspects.py) and probed.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import grpc
from google.rpc import error_details_pb2  # type: ignore[import-untyped]
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_status import rpc_status

from paceline.domain.errors import (
    DeadlineError,
    ExhaustedError,
    InternalError,
    PacelineError,
    UnavailableError,
)
from paceline.domain.member import Member, ModelCard, Role
from paceline.gateway.channels import Channels
from paceline.gateway.suspects import Incarnation, Suspects
from paceline.process.membership import Membership
from paceline.process.spans import span
from paceline.rpc.channel import map_rpc_error

logger = logging.getLogger(__name__)

POLL_S = 0.1

VANISHED_S = 2.5
"""How long a member without record is believed in: a heartbeat is back within a second."""

WATCH_S = 0.5
"""How often a silent call's worker is checked for having left the fleet."""

PROBE_TIMEOUT_S = 1.0
PROBE_PAUSE_S = 0.1

_ENDLESS: Callable[[], float] = lambda: math.inf  # noqa: E731


class FleetView:
    """Live members, and calls to them."""

    def __init__(
        self, membership: Membership, model_name: str, on_redis: Callable[[bool], None]
    ) -> None:
        self._membership = membership
        self._model_name = model_name
        self._on_redis = on_redis
        self._members: dict[str, Member] = {}
        self._vanished: set[str] = set()
        self._seen_s: dict[str, float] = {}
        self._connected_s = 0.0
        self._channels = Channels()
        self._suspects = Suspects()
        self._probes: dict[Incarnation, asyncio.Task[None]] = {}
        self.in_flight: Counter[str] = Counter()
        self.pending_tokens: Counter[str] = Counter()
        self.has_redis = False

    async def run(self) -> None:
        """Refresh the view until cancelled."""
        while True:
            try:
                members = await self._membership.members()
            except UnavailableError:
                self._note_redis(False)
            else:
                self._note_redis(True)
                self._update(members, time.monotonic())
            await self._channels.retain({m.address for m in self._members.values()})
            await asyncio.sleep(POLL_S)

    async def close(self) -> None:
        """End the probes and close all channels."""
        probes = list(self._probes.values())
        for probe in probes:
            probe.cancel()
        await asyncio.gather(*probes, return_exceptions=True)
        await self._channels.close()

    # -- members --------------------------------------------------------------------------

    def members(self, role: Role | None = None) -> list[Member]:
        """Return known members, of one role or all, sorted by id."""
        found = [m for m in self._members.values() if role is None or m.role is role]
        return sorted(found, key=lambda m: m.id)

    def workers(self, role: Role, kv_root: bytes) -> list[Member]:
        """Return workers that may be given work on blocks of this root: same model and layout.

        Those without a record at present are named only where no other is left.
        """
        found = [m for m in self._servers(role, kv_root) if not self.is_suspect(m)]
        return [m for m in found if m.id not in self._vanished] or found

    def last_resorts(self, role: Role, kv_root: bytes) -> list[Member]:
        """Return suspects that answer again, for when `workers` has none."""
        now_s = time.monotonic()
        return [
            m
            for m in self._servers(role, kv_root)
            if self._suspects.may_retry(_incarnation(m), now_s)
        ]

    def node(self, node_id: str) -> Member | None:
        """Return the KV node of that id."""
        member = self._members.get(node_id)
        return member if member is not None and member.role is Role.KVSTORE else None

    def card(self) -> ModelCard | None:
        """Return what the fleet serves: the model of most decode workers, so that workers of
        two checkpoints under one name are never mixed in a request.
        """
        cards = [
            m.model
            for m in self.members(Role.DECODE)
            if m.model is not None and m.model.name == self._model_name and not m.is_draining
        ]
        counts = Counter(card.kv_root for card in cards)
        return max(cards, key=lambda card: counts[card.kv_root], default=None)

    def drafters(self, kv_root: bytes) -> list[str]:
        """Return the names of drafters that decode workers of this model have, sorted."""
        names = {name for m in self._servers(Role.DECODE, kv_root) for name in m.drafters}
        return sorted(names)

    def is_suspect(self, member: Member) -> bool:
        """Whether a call to it broke a moment ago, or it did not answer since."""
        return self._suspects.is_suspect(_incarnation(member), time.monotonic())

    def suspect(self, worker: Member) -> None:
        """Avoid a worker for a while, and probe it: a call to it broke."""
        incarnation = _incarnation(worker)
        self._suspects.note_break(incarnation, time.monotonic())
        logger.warning("worker-suspect", extra={"fields": {"worker": worker.id}})
        if incarnation not in self._probes:
            probe = asyncio.create_task(self._probe(worker), name="probe")
            self._probes[incarnation] = probe
            probe.add_done_callback(lambda _: self._probes.pop(incarnation))

    def has_lost(self, member: Member) -> bool:
        """Whether this incarnation of a member is gone."""
        known = self._members.get(member.id)
        return known is None or known.epoch != member.epoch

    async def wait_for(self, is_there: Callable[[], bool], timeout_s: float) -> bool:
        """Wait until a condition on the view holds; tell whether it does."""
        if is_there():
            return True
        deadline = time.monotonic() + timeout_s
        with span("wait") as waiting:
            while not is_there():
                if time.monotonic() >= deadline:
                    waiting.fail("no-ready-worker")
                    return False
                await asyncio.sleep(POLL_S / 2)
        return True

    # -- calls ----------------------------------------------------------------------------

    def channel(self, address: str) -> AbstractContextManager[grpc.aio.Channel]:
        """Lend the channel to an address for the time of one call."""
        return self._channels.use(address)

    @contextmanager
    def busy(self, worker: Member, prompt_tokens: int = 0) -> Iterator[Callable[[], None]]:
        """Count work on a worker while it lasts, for decisions before its next load report.

        Call what is yielded once the prompt is computed.
        """
        left = prompt_tokens

        def note_computed() -> None:
            nonlocal left
            _add(self.pending_tokens, worker.id, -left)
            left = 0

        _add(self.in_flight, worker.id, 1)
        _add(self.pending_tokens, worker.id, prompt_tokens)
        try:
            yield note_computed
        finally:
            note_computed()
            _add(self.in_flight, worker.id, -1)

    async def stream(
        self,
        worker: Member,
        open_call: Callable[[grpc.aio.Channel], Any],
        patience: Callable[[], float] = _ENDLESS,
    ) -> AsyncIterator[Any]:
        """Make a streaming call and yield its messages; the call ends with the iterator.

        Raises:
            UnavailableError: the worker broke the call, left the fleet, or was silent for
                longer than `patience()` seconds.
            PacelineError: what the worker answered.
        """
        with self._channels.use(worker.address) as channel:
            call = open_call(channel)
            reading: asyncio.Future[Any] | None = None
            is_first = True
            try:
                while True:
                    reading = asyncio.ensure_future(call.read())
                    await self._watch(reading, worker, patience)
                    if reading.cancelled():
                        raise UnavailableError("the channel closed", reason="peer-unavailable")
                    message = reading.result()
                    if message is grpc.aio.EOF:
                        return
                    if is_first:
                        # Later ones say nothing of calls that the worker refused meanwhile.
                        self._suspects.trust(_incarnation(worker))
                        is_first = False
                    yield message
            except grpc.aio.AioRpcError as error:
                raise _meaning(error) from error
            finally:
                _drop(reading)
                call.cancel()

    async def _watch(
        self, reading: asyncio.Future[Any], worker: Member, patience: Callable[[], float]
    ) -> None:
        """Wait for a message as long as it may still come."""
        # Waits are added up instead of looking at the clock: it jumps when we were paused.
        silent_s = 0.0
        while True:
            wait_s = max(0.0, min(WATCH_S, patience() - silent_s))
            if (await asyncio.wait({reading}, timeout=wait_s))[0]:
                return
            silent_s += wait_s
            if self.has_lost(worker):
                raise UnavailableError(f"{worker.id} is gone", reason="worker-lost")
            if silent_s >= patience():
                raise UnavailableError(f"{worker.id} is silent", reason="worker-silent")

    async def _probe(self, worker: Member) -> None:
        """Ask a suspect for its health until it says that work is welcome."""
        incarnation = _incarnation(worker)
        while self._suspects.needs_probe(incarnation) and not self.has_lost(worker):
            with self._channels.use(worker.address) as channel:
                if await _is_healthy(channel):
                    self._suspects.note_answer(incarnation)
                    continue
            await asyncio.sleep(PROBE_PAUSE_S)

    # -- the view -------------------------------------------------------------------------

    def _servers(self, role: Role, kv_root: bytes) -> list[Member]:
        return [
            m
            for m in self.members(role)
            if m.model is not None and m.model.kv_root == kv_root and not m.is_draining
        ]

    def _note_redis(self, is_there: bool) -> None:
        if is_there and not self.has_redis:
            self._connected_s = time.monotonic()
        if is_there != self.has_redis:
            logger.info("redis-state", extra={"fields": {"is_up": is_there}})
            self._on_redis(is_there)
        self.has_redis = is_there

    def _update(self, members: list[Member], now_s: float) -> None:
        fresh = {m.id: m for m in members}
        self._seen_s.update(dict.fromkeys(fresh, now_s))
        vanished = {
            m.id: m
            for m in self._members.values()
            if m.id not in fresh
            and not m.is_draining
            and now_s - max(self._seen_s[m.id], self._connected_s) < VANISHED_S
        }
        self._members = fresh | vanished
        self._vanished = set(vanished)
        self._seen_s = {id_: seen for id_, seen in self._seen_s.items() if id_ in self._members}
        self._suspects.retain({_incarnation(m) for m in self._members.values()})


def _incarnation(member: Member) -> Incarnation:
    return member.id, member.epoch


def _add(counter: Counter[str], key: str, count: int) -> None:
    """Add to a counter that holds no zeros."""
    counter[key] += count
    if not counter[key]:
        del counter[key]


def _drop(reading: asyncio.Future[Any] | None) -> None:
    """End a read that nobody waits for any more; what it brought is of no interest."""
    if reading is not None and not reading.cancel() and not reading.cancelled():
        reading.exception()


async def _is_healthy(channel: grpc.aio.Channel) -> bool:
    stub: Any = health_pb2_grpc.HealthStub(channel)
    try:
        answer = await stub.Check(health_pb2.HealthCheckRequest(), timeout=PROBE_TIMEOUT_S)
    except grpc.aio.AioRpcError:
        return False
    return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)


def _meaning(error: grpc.aio.AioRpcError) -> PacelineError:
    """Return what a worker's failed call means for the request.

    A status without a reason of ours is that of a broken connection or an ending process,
    whatever its code. What the worker refuses was let through here: a bug of ours.
    """
    ours = map_rpc_error(error)
    if isinstance(ours, DeadlineError):
        return ours
    if not _has_reason(error) and error.code() is not grpc.StatusCode.RESOURCE_EXHAUSTED:
        return UnavailableError(ours.message, reason="peer-unavailable")
    if isinstance(ours, UnavailableError | InternalError):
        return ours
    if isinstance(ours, ExhaustedError) and _has_reason(error):
        return ours
    return InternalError(f"a worker refuses: {ours.message}")


def _has_reason(error: grpc.aio.AioRpcError) -> bool:
    status: Any = rpc_status.from_call(error)
    details = status.details if status is not None else ()
    return any(detail.Is(error_details_pb2.ErrorInfo.DESCRIPTOR) for detail in details)
