"""Who is in the fleet: records under leases in Redis, and the link to Redis itself.

A record is soft state: it ends with its lease, by the server's clock, and is written again
by its owner when Redis lost it. Epochs grow with every registration of an id, also after
Redis lost everything (they are at least the server's time in us), so that a process that was
paused can never write over its successor. Every process keeps a `Heartbeat`; the gateway and
others read `members`. `RedisLink` is shared with kvstore/index.py; nobody else talks to Redis.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from hashlib import sha1
from typing import Any

from redis.asyncio import BlockingConnectionPool, Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import NoScriptError, RedisError

from paceline.domain.errors import UnavailableError
from paceline.domain.member import Member

logger = logging.getLogger(__name__)

REASON = "redis-unavailable"
MAX_CONNECTIONS = 8
"""Per process and link; further commands wait for a connection, within their deadline."""

_RECORD_TTL_MS = 24 * 3600 * 1000
"""How long Redis keeps the tables of a fleet that nobody announces to any more."""

_SWEEP_AFTER_MS = 60_000
"""A record whose lease ended this long ago is removed."""

_MAX_PAUSE_S = 1.0


class FencedError(UnavailableError):
    """A newer incarnation of this id exists: this one must end."""

    reason = "fenced"


@dataclass(frozen=True, slots=True)
class Script:
    """A Lua script and the digest Redis knows it by."""

    text: str
    sha: str

    @classmethod
    def of(cls, text: str) -> Script:
        """Return the script of a text."""
        # SHA-1 is the name Redis gives a script, no matter of security.
        return cls(text, sha1(text.encode(), usedforsecurity=False).hexdigest())


class RedisLink:
    """Runs scripts on Redis, each call under one deadline."""

    def __init__(
        self, redis_url: str, timeout_s: float, on_call: Callable[[float], None] | None = None
    ) -> None:
        """`on_call` hears how many seconds each call took, whatever came of it."""
        self._timeout_s = timeout_s
        self._on_call = on_call
        pool: BlockingConnectionPool = BlockingConnectionPool.from_url(
            redis_url,
            max_connections=MAX_CONNECTIONS,
            timeout=timeout_s,
            socket_timeout=timeout_s,
            socket_connect_timeout=timeout_s,
            # One retry at once: a pooled connection is stale after Redis restarted.
            retry=Retry(NoBackoff(), 1),
        )
        self._redis = Redis.from_pool(pool)

    async def run(self, script: Script, keys: Sequence[str], args: Sequence[Any]) -> Any:
        """Run a script by its digest, sending its text only where Redis does not know it.

        Raises:
            UnavailableError: Redis does not answer in time, or refuses.
        """
        task = asyncio.current_task()
        num_cancels = task.cancelling() if task is not None else 0
        begun_s = time.monotonic()
        try:
            return await self._call(script, keys, args)
        except (RedisError, OSError, TimeoutError) as error:
            raise UnavailableError(f"Redis: {str(error) or 'timeout'}", reason=REASON) from error
        finally:
            if self._on_call is not None:
                self._on_call(time.monotonic() - begun_s)
            # The client drops a cancellation that arrives while it opens a connection.
            if task is not None and task.cancelling() > num_cancels:
                raise asyncio.CancelledError

    async def _call(self, script: Script, keys: Sequence[str], args: Sequence[Any]) -> Any:
        async with asyncio.timeout(self._timeout_s):
            try:
                return await self._redis.evalsha(script.sha, len(keys), *keys, *args)
            except NoScriptError:
                return await self._redis.eval(script.text, len(keys), *keys, *args)

    async def close(self) -> None:
        """Close all connections."""
        await self._redis.aclose()


# Each script gets the tables  KEYS = leases (id -> expiry, ms), members (id -> JSON), epochs.

_NOW = """
local t = redis.call('TIME')
local now = t[1] * 1000 + math.floor(t[2] / 1000)
"""

_REGISTER = Script.of(
    _NOW
    + """
local last = tonumber(redis.call('HGET', KEYS[3], ARGV[1]) or '0')
local epoch = string.format('%.0f', math.max(last + 1, t[1] * 1000000 + t[2]))
redis.call('HSET', KEYS[3], ARGV[1], epoch)
redis.call('PEXPIRE', KEYS[3], ARGV[2])
return epoch
"""
)

_ANNOUNCE = Script.of(
    _NOW
    + """
local id, epoch, lease, ttl, sweep = ARGV[1], ARGV[2], tonumber(ARGV[4]), ARGV[5], ARGV[6]
local last = tonumber(redis.call('HGET', KEYS[3], id) or '0')
if last > tonumber(epoch) then return 0 end
redis.call('HSET', KEYS[3], id, epoch)
redis.call('HSET', KEYS[2], id, ARGV[3])
redis.call('ZADD', KEYS[1], now + lease, id)
for _, dead in ipairs(redis.call('ZRANGEBYSCORE', KEYS[1], '-inf', now - sweep)) do
  redis.call('ZREM', KEYS[1], dead)
  redis.call('HDEL', KEYS[2], dead)
  redis.call('HDEL', KEYS[3], dead)
end
for _, key in ipairs(KEYS) do redis.call('PEXPIRE', key, ttl) end
return 1
"""
)

_DEREGISTER = Script.of(
    """
if tonumber(redis.call('HGET', KEYS[3], ARGV[1]) or '0') > tonumber(ARGV[2]) then return 0 end
redis.call('ZREM', KEYS[1], ARGV[1])
redis.call('HDEL', KEYS[2], ARGV[1])
return 1
"""
)

_MEMBERS = Script.of(
    _NOW
    + """
local ids = redis.call('ZRANGEBYSCORE', KEYS[1], now, '+inf')
local out = {}
for _, id in ipairs(ids) do
  local record = redis.call('HGET', KEYS[2], id)
  if record then out[#out + 1] = record end
end
return out
"""
)


class Membership:
    """Reads and writes the records of one fleet."""

    def __init__(
        self,
        redis_url: str,
        fleet: str,
        *,
        lease_s: float = 3.0,
        timeout_s: float = 1.0,
        on_call: Callable[[float], None] | None = None,
    ) -> None:
        self.lease_s = lease_s
        self._link = RedisLink(redis_url, timeout_s, on_call)
        tag = f"pl:{{{fleet}}}"
        self._keys = [f"{tag}:leases", f"{tag}:members", f"{tag}:epochs"]
        self._epochs: dict[str, int] = {}

    async def register(self, member: Member) -> Member:
        """Start a new incarnation of the member's id and announce it; return it with its epoch.

        Raises:
            UnavailableError: Redis cannot be reached; retrying is the caller's business.
        """
        epoch = await self._link.run(_REGISTER, self._keys, [member.id, _RECORD_TTL_MS])
        registered = replace(member, epoch=int(epoch))
        self._epochs[member.id] = registered.epoch
        await self.announce(registered)
        return registered

    async def announce(self, member: Member) -> None:
        """Renew the lease and publish the record, also where Redis lost it.

        Raises:
            FencedError: a newer incarnation of the id exists.
            UnavailableError: Redis cannot be reached.
        """
        args = [
            member.id,
            member.epoch,
            json.dumps(member.to_json()),
            round(self.lease_s * 1000),
            _RECORD_TTL_MS,
            _SWEEP_AFTER_MS,
        ]
        if await self._link.run(_ANNOUNCE, self._keys, args) == 0:
            raise FencedError(f"{member.id} was registered again by another process")

    async def deregister(self, member: Member) -> None:
        """Remove the record, unless a newer incarnation owns it.

        A member without an epoch means the incarnation that was registered through this object.

        Raises:
            UnavailableError: Redis cannot be reached; the lease ends by itself.
        """
        epoch = member.epoch or self._epochs.get(member.id, 0)
        await self._link.run(_DEREGISTER, self._keys, [member.id, epoch])

    async def members(self) -> list[Member]:
        """Return the members whose lease runs by Redis's clock, sorted by id.

        Raises:
            UnavailableError: Redis cannot be reached.
        """
        records = await self._link.run(_MEMBERS, self._keys, [])
        members = [member for record in records if (member := _parse(record)) is not None]
        return sorted(members, key=lambda member: member.id)

    async def close(self) -> None:
        """Close the connections."""
        await self._link.close()


def _parse(record: bytes) -> Member | None:
    try:
        return Member.from_json(json.loads(record))
    except (KeyError, TypeError, ValueError, AttributeError):
        # Written by another version: not somebody this process can work with.
        logger.debug("member-record-unreadable")
        return None


class Heartbeat:
    """Registers one member and keeps its record true until cancelled."""

    def __init__(
        self,
        membership: Membership,
        get_member: Callable[[], Member],
        period_s: float = 0.1,
        on_state: Callable[[bool], None] | None = None,
    ) -> None:
        """Watch `get_member` every `period_s`; `on_state` hears when Redis goes and comes."""
        self._membership = membership
        self._get_member = get_member
        self._period_s = period_s
        self._on_state = on_state
        self._is_connected: bool | None = None
        self._registered: Member | None = None
        self._announced: Member | None = None
        self._announced_s = 0.0

    @property
    def epoch(self) -> int | None:
        """Epoch of this incarnation; None before the first registration."""
        return None if self._registered is None else self._registered.epoch

    @property
    def is_connected(self) -> bool:
        """Whether the last announcement reached Redis."""
        return self._is_connected is True

    async def run(self) -> None:
        """Announce on change and at least three times per lease; outlive outages of Redis.

        Raises:
            FencedError: another process took the id over.
        """
        pause_s = self._period_s
        while True:
            try:
                await self._beat()
                pause_s = self._period_s
                self._note(True)
            except FencedError:
                raise
            except UnavailableError as error:
                # Slower while Redis is away, but fast enough to be back within a second.
                pause_s = min(2 * pause_s, _MAX_PAUSE_S)
                self._announced = None
                self._note(False, error.message)
            await asyncio.sleep(pause_s)

    async def _beat(self) -> None:
        if self._registered is None:
            self._registered = await self._membership.register(self._get_member())
            self._announced, self._announced_s = self._registered, time.monotonic()
            return
        member = replace(self._get_member(), epoch=self._registered.epoch)
        now_s = time.monotonic()
        if member == self._announced and now_s - self._announced_s < self._membership.lease_s / 3:
            return
        await self._membership.announce(member)
        self._announced, self._announced_s = member, now_s

    def _note(self, is_connected: bool, error: str = "") -> None:
        if is_connected == self._is_connected:
            return
        self._is_connected = is_connected
        if is_connected:
            logger.info("redis-connected", extra={"fields": {"epoch": self.epoch}})
        else:
            logger.warning("redis-lost", extra={"fields": {"error": error}})
        if self._on_state is not None:
            self._on_state(is_connected)
