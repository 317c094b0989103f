"""Runs `paceline up` as a child of the demo, in a directory that vanishes with success."""

from __future__ import annotations

import asyncio
import json
import secrets
import signal
import sys
import tempfile
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from shutil import rmtree

from paceline.cli.child import dying_with_us
from paceline.cli.errors import CommandError
from paceline.domain.errors import UnavailableError
from paceline.domain.member import Member
from paceline.process.membership import Membership

_POLL_S = 0.05
_STOP_TIMEOUT_S = 70.0
"""Longer than an orderly end takes at most."""
_TAIL_LINES = 30


class DemoPlatform:
    """A running platform: where it is, who belongs to it."""

    def __init__(self, process: asyncio.subprocess.Process, directory: Path, fleet: str) -> None:
        self._process = process
        self._ready_file = directory / "ready.json"
        self._log = directory / "up.log"
        self._fleet = fleet
        self._membership: Membership | None = None

    async def wait_ready(self) -> str:
        """Return the gRPC address once everything is ready; `up` itself limits the time.

        Raises:
            CommandError: it ended instead, with its last lines.
        """
        while not self._ready_file.exists():
            if self._process.returncode is not None:
                lines = self._log.read_text(errors="replace").splitlines()[-_TAIL_LINES:]
                raise CommandError("the platform did not start:\n" + "\n".join(lines))
            await asyncio.sleep(_POLL_S)
        ready = json.loads(self._ready_file.read_text())
        self._membership = Membership(ready["redis"], self._fleet)
        return str(ready["grpc"])

    def pid(self, worker: str) -> int:
        """Return the process id of a worker such as "decode-1", from the ready file."""
        role, _, index = worker.rpartition("-")
        pids: list[int] = json.loads(self._ready_file.read_text())["processes"][role]
        return pids[int(index)]

    async def members(self) -> list[Member]:
        """Return the fleet; empty while Redis is away."""
        assert self._membership is not None
        try:
            return await self._membership.members()
        except UnavailableError:
            return []

    async def wait_for(self, condition: Callable[[list[Member]], bool], timeout_s: float) -> bool:
        """Wait until the fleet is as wanted; tell whether it became so."""
        with suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                while True:
                    if condition(await self.members()):
                        return True
                    await asyncio.sleep(_POLL_S)
        return False

    async def stop(self) -> int:
        """End the platform in order and return its exit code."""
        if self._membership is not None:
            await self._membership.close()
        if self._process.returncode is None:
            self._process.send_signal(signal.SIGTERM)
        try:
            async with asyncio.timeout(_STOP_TIMEOUT_S):
                return await self._process.wait()
        except TimeoutError:
            self._process.kill()
            return await self._process.wait()


@asynccontextmanager
async def running_platform(*flags: str) -> AsyncIterator[DemoPlatform]:
    """Run a platform for a block; its logs stay where they are if the block fails."""
    directory = Path(tempfile.mkdtemp(prefix="paceline-demo-"))
    fleet = f"demo-{secrets.token_hex(4)}"
    argv = [sys.executable, "-m", "paceline.cli", "up", "--grpc-port", "0", "--http-port", "0"]
    argv += ["--ready-file", str(directory / "ready.json"), "--fleet", fleet]
    argv += ["--log-dir", str(directory), *flags]
    with open(directory / "up.log", "wb") as log:  # noqa: ASYNC230 - an empty local file
        process = await asyncio.create_subprocess_exec(
            *dying_with_us(tuple(argv)),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    platform = DemoPlatform(process, directory, fleet)
    try:
        yield platform
    except BaseException:
        await platform.stop()
        print(f"logs of the platform: {directory}", file=sys.stderr)
        raise
    exit_code = await platform.stop()
    if exit_code != 0:
        raise CommandError(f"the platform ended with exit code {exit_code}; logs: {directory}")
    rmtree(directory)
