"""The stream of captured samples in Redis: bounded, soft, read by position.

Workers add, the trainer reads; both pass bytes that only they understand. The stream ends by
itself: what is older than the retention, by the server's clock, and what is too much are removed
oldest first. A payload may be there twice when the connection broke while it was added.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from paceline.process.membership import RedisLink, Script

START = "0-0"
"""The position in front of everything."""

# Each script gets  KEYS = the stream,  ARGV = retention in ms, ...

_TRIM = """
local t = redis.call('TIME')
local now = t[1] * 1000 + math.floor(t[2] / 1000)
redis.call('XTRIM', KEYS[1], 'MINID', string.format('%.0f', now - ARGV[1]))
"""

_ADD = Script.of(
    _TRIM
    + """
for i = 3, #ARGV do
  redis.call('XADD', KEYS[1], 'MAXLEN', ARGV[2], '*', 'sample', ARGV[i])
end
redis.call('PEXPIRE', KEYS[1], ARGV[1])
return 1
"""
)

_READ = Script.of(
    _TRIM
    + """
local out = {}
for _, entry in ipairs(redis.call('XRANGE', KEYS[1], '(' .. ARGV[2], '+', 'COUNT', ARGV[3])) do
  out[#out + 1] = entry[1]
  out[#out + 1] = entry[2][2]
end
return out
"""
)

_LAST_ID = Script.of(
    """
if redis.call('EXISTS', KEYS[1]) == 0 then return '0-0' end
local info = redis.call('XINFO', 'STREAM', KEYS[1])
for i = 1, #info, 2 do
  if info[i] == 'last-generated-id' then return info[i + 1] end
end
"""
)

_LENGTH = Script.of(_TRIM + "return redis.call('XLEN', KEYS[1])")


class SampleStream:
    """Adds and reads the samples of one fleet and model."""

    def __init__(
        self,
        redis_url: str,
        fleet: str,
        model_digest: str,
        *,
        max_samples: int = 4096,
        retention_s: float = 3600,
        timeout_s: float = 1.0,
        on_call: Callable[[float], None] | None = None,
    ) -> None:
        """`max_samples` and `retention_s` bound the stream, `timeout_s` each call."""
        self._link = RedisLink(redis_url, timeout_s, on_call)
        self._keys = [f"pl:{{{fleet}}}:samples:{model_digest}"]
        self._max_samples = max_samples
        self._retention_ms = round(retention_s * 1000)

    async def add(self, payloads: Sequence[bytes]) -> None:
        """Add samples at the end, and remove what is too old or too much.

        Raises:
            UnavailableError: Redis cannot be reached, or has no memory left.
        """
        if payloads:
            args = [self._retention_ms, self._max_samples, *payloads]
            await self._link.run(_ADD, self._keys, args)

    async def read(self, after: str, count: int) -> list[tuple[str, bytes]]:
        """Return up to `count` samples behind a position, with the position of each.

        Where those behind it were removed, the oldest that are there come.

        Raises:
            UnavailableError: Redis cannot be reached, or `after` is no position.
        """
        flat = await self._link.run(_READ, self._keys, [self._retention_ms, after, count])
        return [(flat[i].decode(), flat[i + 1]) for i in range(0, len(flat), 2)]

    async def last_id(self) -> str:
        """Return the position behind everything that was added so far.

        Raises:
            UnavailableError: Redis cannot be reached.
        """
        last: bytes = await self._link.run(_LAST_ID, self._keys, [])
        return last.decode()

    async def length(self) -> int:
        """Return how many samples there are.

        Raises:
            UnavailableError: Redis cannot be reached.
        """
        return int(await self._link.run(_LENGTH, self._keys, [self._retention_ms]))

    async def close(self) -> None:
        """Close the connections."""
        await self._link.close()
