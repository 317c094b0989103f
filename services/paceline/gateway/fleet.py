"""What the gateway knows of the workers: members, channels, who is suspect, own in-flight work.

Polls the membership. While Redis is away the last view is kept, and a member that only
vanished from its records (a flush, a restart of Redis) stays for a moment, until it had time
to announce itself again. Workers that break calls are left out for a while.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from typing import Any

import grpc

from paceline.domain.errors import UnavailableError
from paceline.domain.member import Member, ModelCard, Role
from paceline.process.membership import Membership
from paceline.rpc.channel import map_rpc_error, open_channel

logger = logging.getLogger(__name__)

POLL_S = 0.1
SUSPECT_S = 2.0
"""How long a worker that broke a call is avoided: about a restart's time."""

VANISHED_S = 2.5
"""How long a member without record is believed in: a heartbeat is back within a second."""

WATCH_S = 0.5
"""How often a silent call's worker is checked for having left the fleet."""

_CLOSE_GRACE_S = 60.0


class FleetView:
    """Live members and channels to them."""

    def __init__(
        self, membership: Membership, model_name: str, on_redis: Callable[[bool], None]
    ) -> None:
        self._membership = membership
        self._model_name = model_name
        self._on_redis = on_redis
        self._members: dict[str, Member] = {}
        self._seen_s: dict[str, float] = {}
        self._connected_s = 0.0
        self._channels: dict[str, grpc.aio.Channel] = {}
        self._closing: set[asyncio.Task[None]] = set()
        self._suspects: dict[tuple[str, int], float] = {}
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
            await asyncio.sleep(POLL_S)

    async def close(self) -> None:
        """Close all channels."""
        for channel in self._channels.values():
            await channel.close()
        for task in self._closing:
            task.cancel()
        await asyncio.gather(*self._closing, return_exceptions=True)

    # -- members --------------------------------------------------------------------------

    def members(self, role: Role | None = None) -> list[Member]:
        """Return known members, of one role or all, sorted by id."""
        found = [m for m in self._members.values() if role is None or m.role is role]
        return sorted(found, key=lambda m: m.id)

    def workers(self, role: Role, kv_root: bytes) -> list[Member]:
        """Return workers that may be given work on blocks of this root: same model and layout."""
        return [
            m
            for m in self.members(role)
            if m.model is not None
            and m.model.kv_root == kv_root
            and not m.is_draining
            and not self.is_suspect(m)
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

    def is_suspect(self, member: Member) -> bool:
        """Whether a call to it broke a moment ago."""
        return self._suspects.get((member.id, member.epoch), 0.0) > time.monotonic()

    def suspect(self, member: Member) -> None:
        """Leave a worker out for a while: a call to it broke."""
        self._suspects[(member.id, member.epoch)] = time.monotonic() + SUSPECT_S
        logger.warning("worker-suspect", extra={"fields": {"worker": member.id}})

    def has_lost(self, member: Member) -> bool:
        """Whether this incarnation of a member is gone."""
        known = self._members.get(member.id)
        return known is None or known.epoch != member.epoch

    async def wait_for(self, is_there: Callable[[], bool], timeout_s: float) -> bool:
        """Wait until a condition on the view holds; tell whether it does."""
        deadline = time.monotonic() + timeout_s
        while not is_there():
            if time.monotonic() >= deadline:
                return False
            await asyncio.sleep(POLL_S / 2)
        return True

    # -- calls ----------------------------------------------------------------------------

    def channel(self, address: str) -> grpc.aio.Channel:
        """Return the channel to an address, opened on first use."""
        if address not in self._channels:
            self._channels[address] = open_channel(address)
        return self._channels[address]

    @contextmanager
    def busy(self, worker: Member, prompt_tokens: int = 0) -> Iterator[None]:
        """Count work on a worker while it lasts, for decisions before its next load report."""
        self.in_flight[worker.id] += 1
        self.pending_tokens[worker.id] += prompt_tokens
        try:
            yield
        finally:
            self.in_flight[worker.id] -= 1
            self.pending_tokens[worker.id] -= prompt_tokens

    async def read(self, call: Any, worker: Member) -> AsyncIterator[Any]:
        """Yield the messages of a streaming call; the call ends with the iterator.

        Raises:
            UnavailableError: the worker broke the call or left the fleet.
            PacelineError: what the worker answered.
        """
        reading: asyncio.Future[Any] | None = None
        try:
            while True:
                reading = asyncio.ensure_future(call.read())
                while not (await asyncio.wait({reading}, timeout=WATCH_S))[0]:
                    if self.has_lost(worker):
                        raise UnavailableError(f"{worker.id} is gone", reason="worker-lost")
                message = reading.result()
                if message is grpc.aio.EOF:
                    return
                yield message
        except grpc.aio.AioRpcError as error:
            raise map_rpc_error(error) from error
        finally:
            if reading is not None:
                reading.cancel()
            call.cancel()

    # -- the view -------------------------------------------------------------------------

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
        self._seen_s = {id_: seen for id_, seen in self._seen_s.items() if id_ in self._members}
        in_use = {m.address for m in self._members.values()}
        for address in [a for a in self._channels if a not in in_use]:
            # Calls that still run on it get to end.
            closing = asyncio.create_task(self._channels.pop(address).close(_CLOSE_GRACE_S))
            self._closing.add(closing)
            closing.add_done_callback(self._closing.discard)
        epochs = {(m.id, m.epoch) for m in self._members.values()}
        self._suspects = {k: v for k, v in self._suspects.items() if k in epochs}
