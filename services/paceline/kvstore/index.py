"""Which node holds which block: soft state in Redis, one answer per round trip.

Per kv_root, in one hash slot of a cluster (tag `pl:{<fleet>:<root>}`):

    :leases          node -> "epoch expiry_ms"   a node counts only while its lease runs
    :b:<key>         node -> epoch               holders of a block
    :n:<node>        set of keys                 what a node published, for its removal

Entries may be stale in both directions; whoever fetches finds out. All of it expires by
itself. Nodes write (publisher.py), gateways look up.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

from paceline.domain.errors import UnavailableError
from paceline.process.membership import REASON, FencedError, RedisLink, Script

MAX_KEYS_PER_CALL = 512
"""Bounds one script's run to about a millisecond of Redis's only thread."""

ENTRY_TTL_S = 900.0
"""Life of an entry that its node does not publish again; dead nodes' entries go by this."""

BREAK_S = 0.5
"""How long calls fail at once after one that failed."""

_NOW = """
local t = redis.call('TIME')
local now = t[1] * 1000 + math.floor(t[2] / 1000)
"""

# A write of an incarnation that has a successor changes nothing.
_FENCE = """
local lease = redis.call('HGET', KEYS[1], ARGV[1])
if lease and tonumber(string.match(lease, '^%d+')) > tonumber(ARGV[2]) then return -1 end
"""

_PUBLISH = Script.of(
    _FENCE
    + """
for i = 3, #KEYS do
  redis.call('HSET', KEYS[i], ARGV[1], ARGV[2])
  redis.call('PEXPIRE', KEYS[i], ARGV[3])
  redis.call('SADD', KEYS[2], ARGV[i + 1])
end
redis.call('PEXPIRE', KEYS[2], ARGV[3])
return 1
"""
)

_WITHDRAW = Script.of(
    _FENCE
    + """
for i = 3, #KEYS do
  local epoch = redis.call('HGET', KEYS[i], ARGV[1])
  if epoch and tonumber(epoch) <= tonumber(ARGV[2]) then redis.call('HDEL', KEYS[i], ARGV[1]) end
  redis.call('SREM', KEYS[2], ARGV[i + 1])
end
return 1
"""
)

_RENEW = Script.of(
    _NOW
    + _FENCE
    + """
local had = 0
if lease and string.match(lease, '^%d+') == ARGV[2] then had = 1 end
local expiry = string.format('%.0f', now + ARGV[3])
redis.call('HSET', KEYS[1], ARGV[1], ARGV[2] .. ' ' .. expiry)
local all = redis.call('HGETALL', KEYS[1])
for i = 1, #all, 2 do
  local ends = tonumber(string.match(all[i + 1], '%d+$'))
  if ends < now - 60000 then redis.call('HDEL', KEYS[1], all[i]) end
end
redis.call('PEXPIRE', KEYS[1], ARGV[4])
return had
"""
)

_LOOKUP = Script.of(
    _NOW
    + """
local live, count, open = {}, {}, 0
local leases = redis.call('HGETALL', KEYS[1])
for i = 1, #leases, 2 do
  local epoch, ends = string.match(leases[i + 1], '^(%d+) (%d+)$')
  if tonumber(ends) >= now then live[leases[i]] = epoch; count[leases[i]] = 0; open = open + 1 end
end
for i = 2, #KEYS do
  if open == 0 then break end
  local holders = redis.call('HGETALL', KEYS[i])
  open = 0
  for j = 1, #holders, 2 do
    local node = holders[j]
    if live[node] == holders[j + 1] and count[node] == i - 2 then
      count[node] = i - 1
      open = open + 1
    end
  end
end
local out = {}
for node, n in pairs(count) do
  if n > 0 then out[#out + 1] = node; out[#out + 1] = n end
end
return out
"""
)

_CLEAR = Script.of(
    _FENCE
    + """
if lease then redis.call('HDEL', KEYS[1], ARGV[1]) end
return redis.call('SPOP', KEYS[2], ARGV[3])
"""
)


class BlockIndex:
    """The index of one fleet. Calls fail within `timeout_s`, and at once while Redis is away."""

    def __init__(
        self,
        redis_url: str,
        fleet: str,
        *,
        timeout_s: float = 0.5,
        on_call: Callable[[float], None] | None = None,
    ) -> None:
        self._fleet = fleet
        self._link = RedisLink(redis_url, timeout_s, on_call)
        self._breaker = Breaker(BREAK_S)

    async def publish(
        self, kv_root: bytes, node_id: str, epoch: int, keys: Sequence[bytes]
    ) -> None:
        """Announce that the node holds these blocks.

        Raises:
            FencedError: a newer incarnation of the node exists.
            UnavailableError: Redis cannot be reached.
        """
        args: list[str | int] = [node_id, epoch, round(ENTRY_TTL_S * 1000)]
        await self._write(_PUBLISH, kv_root, node_id, args, keys)

    async def withdraw(
        self, kv_root: bytes, node_id: str, epoch: int, keys: Sequence[bytes]
    ) -> None:
        """Announce that the node does not hold these blocks any more.

        Raises:
            FencedError: a newer incarnation of the node exists.
            UnavailableError: Redis cannot be reached.
        """
        await self._write(_WITHDRAW, kv_root, node_id, [node_id, epoch, 0], keys)

    async def renew(self, kv_root: bytes, node_id: str, epoch: int, lease_s: float) -> bool:
        """Renew the node's lease; False means Redis had none, so its entries may be lost.

        Raises:
            FencedError: a newer incarnation of the node exists.
            UnavailableError: Redis cannot be reached.
        """
        tag = self._tag(kv_root)
        lease_ms, ttl_ms = round(lease_s * 1000), round(ENTRY_TTL_S * 1000)
        had = await self._run(_RENEW, [f"{tag}:leases"], [node_id, epoch, lease_ms, ttl_ms])
        _check_fence(had, node_id)
        return bool(had)

    async def lookup(self, kv_root: bytes, keys: Sequence[bytes]) -> dict[str, int]:
        """Return how many leading `keys` each live node holds; nodes with none are left out.

        One round trip per MAX_KEYS_PER_CALL keys.

        Raises:
            UnavailableError: Redis cannot be reached.
        """
        tag = self._tag(kv_root)
        found: dict[str, int] = {}
        for start in range(0, len(keys), MAX_KEYS_PER_CALL):
            chunk = keys[start : start + MAX_KEYS_PER_CALL]
            redis_keys = [f"{tag}:leases", *(f"{tag}:b:{key.hex()}" for key in chunk)]
            flat = await self._run(_LOOKUP, redis_keys, [])
            pairs = zip(flat[::2], flat[1::2], strict=True)
            counts = {node.decode(errors="replace"): int(count) for node, count in pairs}
            for node, count in counts.items():
                if found.get(node, 0) == start:
                    found[node] = start + count
            if max(counts.values(), default=0) < len(chunk):
                break
        return found

    async def clear(self, kv_root: bytes, node_id: str, epoch: int) -> None:
        """Remove the node's lease and everything it published under this root.

        Raises:
            FencedError: a newer incarnation of the node exists.
            UnavailableError: Redis cannot be reached.
        """
        tag = self._tag(kv_root)
        redis_keys = [f"{tag}:leases", f"{tag}:n:{node_id}"]
        while True:
            popped = await self._run(_CLEAR, redis_keys, [node_id, epoch, MAX_KEYS_PER_CALL])
            if not isinstance(popped, list | set):
                _check_fence(popped, node_id)
                return
            if not popped:
                return
            await self.withdraw(kv_root, node_id, epoch, list(popped))

    async def close(self) -> None:
        """Close the connections."""
        await self._link.close()

    def _tag(self, kv_root: bytes) -> str:
        return f"pl:{{{self._fleet}:{kv_root.hex()}}}"

    async def _write(
        self,
        script: Script,
        kv_root: bytes,
        node_id: str,
        args: Sequence[str | int],
        keys: Sequence[bytes],
    ) -> None:
        tag = self._tag(kv_root)
        for start in range(0, len(keys), MAX_KEYS_PER_CALL):
            chunk = keys[start : start + MAX_KEYS_PER_CALL]
            redis_keys = [f"{tag}:leases", f"{tag}:n:{node_id}"]
            redis_keys += [f"{tag}:b:{key.hex()}" for key in chunk]
            _check_fence(await self._run(script, redis_keys, [*args, *chunk]), node_id)

    async def _run(
        self, script: Script, keys: Sequence[str], args: Sequence[str | int | bytes]
    ) -> Any:
        self._breaker.enter(time.monotonic())
        is_ok: bool | None = None
        try:
            result = await self._link.run(script, keys, args)
            is_ok = True
        except UnavailableError:
            is_ok = False
            raise
        finally:
            self._breaker.leave(is_ok, time.monotonic())
        return result


class Breaker:
    """Fails calls at once for a while after a failure, then lets one through as a probe."""

    def __init__(self, break_s: float) -> None:
        self._break_s = break_s
        self._open_until_s: float | None = None
        self._is_probing = False

    def enter(self, now_s: float) -> None:
        """Let a call through, or raise UnavailableError."""
        if self._open_until_s is None:
            return
        if now_s < self._open_until_s or self._is_probing:
            raise UnavailableError("Redis failed a moment ago", reason=REASON)
        self._is_probing = True

    def leave(self, is_ok: bool | None, now_s: float) -> None:
        """Note how a call ended; None means it was cancelled and tells nothing."""
        self._is_probing = False
        if is_ok is True:
            self._open_until_s = None
        elif is_ok is False:
            self._open_until_s = now_s + self._break_s


def _check_fence(result: object, node_id: str) -> None:
    if result == -1:
        raise FencedError(f"{node_id} was registered again by another process")
