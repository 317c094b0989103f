"""One supervised process: started, restarted with back-off when it crashes, ended in order.

Children die with us, also when we are killed: a few lines of Python ask Linux for that and
become the child by exec, so that no moment is left in which it could stay behind. Each has a
session of its own, so that Ctrl-C in a terminal reaches only us and the order of the end
is ours. cli/supervisor.py owns all children of a platform.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field

from paceline.cli.backoff import BackoffPolicy, next_restart
from paceline.cli.child_logs import TAIL_LINES, LogPipe, LogSink

logger = logging.getLogger(__name__)

_EXEC = """
import os, signal, sys
if sys.platform == "linux":
    import ctypes
    ctypes.CDLL(None).prctl(1, int(signal.SIGTERM))  # PR_SET_PDEATHSIG
if os.getppid() != int(sys.argv[1]):
    sys.exit("the supervisor is gone")
os.execvp(sys.argv[2], sys.argv[2:])
"""


def dying_with_us(argv: tuple[str, ...]) -> list[str]:
    """Return a command that becomes `argv` and gets SIGTERM when the calling process dies."""
    return [sys.executable, "-I", "-S", "-c", _EXEC, str(os.getpid()), *argv]


@dataclass(frozen=True, slots=True)
class ChildSpec:
    """What to run."""

    name: str
    """Name in the fleet, in logs and in messages."""
    role: str
    """Key of the ready file: gateway, prefill, decode, kvstore, trainer, autoscaler, prometheus,
    redis."""
    argv: tuple[str, ...]
    env: Mapping[str, str] = field(default_factory=dict)
    """The whole environment."""
    grace_s: float = 10.0
    """Seconds between SIGTERM and SIGKILL."""


class SupervisedChild:
    """Keeps one process running until `stop`. `spec` may be replaced between two starts."""

    def __init__(
        self,
        spec: ChildSpec,
        sink: LogSink,
        policy: BackoffPolicy,
        on_start: Callable[[], None] = lambda: None,
    ) -> None:
        self.spec = spec
        self.pid: int | None = None
        """Of the running or the last process; None before the first."""
        self.num_starts = 0
        self.num_crashes = 0
        """Crashes in a row."""
        self.exit_code: int | None = None
        """Of the last process that ended; negative for a signal."""
        self._sink = sink
        self._policy = policy
        self._on_start = on_start
        self._tail: deque[bytes] = deque(maxlen=TAIL_LINES)
        self._last_tail: list[bytes] = []
        """Of the process before, if it printed something."""
        self._process: asyncio.subprocess.Process | None = None
        self._stopping = asyncio.Event()
        self._ended = asyncio.Event()

    @property
    def last_lines(self) -> list[str]:
        """The last lines that the present process printed, or the one before until it prints."""
        return [line.decode(errors="replace") for line in self._tail or self._last_tail]

    async def run(self) -> None:
        """Start the process, and again after each crash, until `stop`."""
        try:
            while not self.is_stopping:
                started_s = time.monotonic()
                await self._run_once()
                if not self.is_stopping:
                    await self._back_off(time.monotonic() - started_s)
        finally:
            self.kill()
            self._ended.set()

    @property
    def is_stopping(self) -> bool:
        """Whether it was told to end."""
        return self._stopping.is_set()

    def terminate(self) -> None:
        """Ask the process to end by SIGTERM, once; it is not started again."""
        if not self.is_stopping:
            self._stopping.set()
            self._signal(signal.SIGTERM)

    async def stop(self) -> bool:
        """End the process: SIGTERM, the grace, SIGKILL. Tell whether it ended by itself."""
        self.terminate()
        try:
            async with asyncio.timeout(self.spec.grace_s):
                await self._ended.wait()
            return True
        except TimeoutError:
            fields = {"child": self.spec.name, "grace_s": self.spec.grace_s}
            logger.warning("child-killed", extra={"fields": fields})
            self.kill()
            await self._ended.wait()
            return False

    def kill(self) -> None:
        """End the process and its descendants at once; it is not started again."""
        self._stopping.set()
        if self._process is not None:
            _kill_group(self._process.pid)

    async def _run_once(self) -> None:
        self._last_tail = list(self._tail) or self._last_tail
        self._tail.clear()
        pipe = LogPipe(self.spec.name, self._sink, self._tail)
        try:
            self._process = await asyncio.create_subprocess_exec(
                *dying_with_us(self.spec.argv),
                env=dict(self.spec.env),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=pipe.write_fd,
                stderr=pipe.write_fd,
                start_new_session=True,
            )
        except OSError as error:
            pipe.discard()
            self._tail.append(str(error).encode())
            self.exit_code = None
            return
        await pipe.open()
        self.pid = self._process.pid
        self.num_starts += 1
        fields = {"child": self.spec.name, "pid": self.pid, "start": self.num_starts}
        logger.info("child-started", extra={"fields": fields})
        self._on_start()
        if self.is_stopping:
            self._signal(signal.SIGTERM)
        try:
            self.exit_code = await self._process.wait()
        finally:
            # What a killed child started must not go on computing beside its successor.
            _kill_group(self._process.pid)
            self._process = None
            await pipe.close()

    async def _back_off(self, ran_s: float) -> None:
        restart = next_restart(self._policy, self.num_crashes, ran_s)
        self.num_crashes = restart.num_crashes
        fields = {
            "child": self.spec.name,
            "pid": self.pid,
            "exit_code": self.exit_code,
            "ran_s": round(ran_s, 3),
            "crashes": restart.num_crashes,
            "restart_in_s": restart.delay_s,
        }
        logger.warning("child-crashed", extra={"fields": fields})
        with suppress(TimeoutError):
            async with asyncio.timeout(restart.delay_s):
                await self._stopping.wait()

    def _signal(self, number: signal.Signals) -> None:
        if self._process is not None and self._process.returncode is None:
            with suppress(ProcessLookupError):
                self._process.send_signal(number)


def _kill_group(leader: int) -> None:
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(leader, signal.SIGKILL)
