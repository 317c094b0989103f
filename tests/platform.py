"""A whole platform as real processes for end-to-end tests: `paceline up` and its children.

    with Platform(tmp_path, "--decode", "2") as platform:
        channel = open_channel(platform.grpc)
        platform.kill("decode", 0)

On an exception in the block the last log lines are shown, so that a failure explains itself.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import uuid
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from paceline.process.lifecycle import EXIT_WITH_PARENT_VAR
from tests.waiting import until_sync

START_TIMEOUT_S = 120.0
STOP_TIMEOUT_S = 60.0
"""Longer than the drain grace of gateway and workers together with their margins."""

_SHOWN_LINES = 60


class Platform:
    """One `paceline up` on free ports, ready when the constructor returns."""

    def __init__(
        self,
        tmp_path: Path,
        *flags: str,
        env: Mapping[str, str] | None = None,
        start_timeout_s: float = START_TIMEOUT_S,
    ) -> None:
        """Start it; files go to a directory of their own under `tmp_path`."""
        self.fleet = f"test-{uuid.uuid4().hex[:8]}"
        self.directory = tmp_path / self.fleet
        self.log_dir = self.directory / "logs"
        self.log_dir.mkdir(parents=True)
        self.ready_file = self.directory / "ready.json"
        command = [sys.executable, "-m", "paceline.cli", "up", "--grpc-port", "0"]
        command += ["--http-port", "0", "--ready-file", str(self.ready_file)]
        command += ["--log-dir", str(self.log_dir), "--fleet", self.fleet, *flags]
        with open(self.log_dir / "up.log", "wb") as log:
            self.process = subprocess.Popen(
                command,
                env={**os.environ, EXIT_WITH_PARENT_VAR: "1", **(env or {})},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        try:
            until_sync(self._has_answered, start_timeout_s)
            assert self.ready_file.exists(), f"up ended with {self.process.returncode}"
        except BaseException:
            self.show_logs()
            self.end()
            raise

    @property
    def grpc(self) -> str:
        """host:port of the gateway's gRPC."""
        return str(self.ready()["grpc"])

    @property
    def http(self) -> str:
        """host:port of the gateway's HTTP."""
        return str(self.ready()["http"])

    @property
    def redis_url(self) -> str:
        """URL of the platform's Redis."""
        return str(self.ready()["redis"])

    def ready(self) -> dict[str, Any]:
        """Return the ready file as it is now."""
        content: dict[str, Any] = json.loads(self.ready_file.read_text())
        return content

    def processes(self) -> dict[str, list[int]]:
        """Return process ids by role as they are now."""
        processes: dict[str, list[int]] = self.ready()["processes"]
        return processes

    def pid(self, role: str, index: int = 0) -> int:
        """Return the present process id of one child."""
        return self.processes()[role][index]

    def kill(self, role: str, index: int = 0) -> int:
        """End a child by SIGKILL and return the process id it had."""
        pid = self.pid(role, index)
        os.kill(pid, signal.SIGKILL)
        return pid

    def wait_replaced(self, role: str, index: int, old_pid: int, timeout_s: float = 30.0) -> int:
        """Wait until the ready file shows another process; return its id."""
        until_sync(lambda: self.pid(role, index) != old_pid, timeout_s)
        return self.pid(role, index)

    def log_lines(self, child: str | None = None) -> list[dict[str, Any]]:
        """Return the JSON log lines of one child ("up" is the supervisor), or of all."""
        names = sorted(self.log_dir.glob(f"{child or '*'}.log"))
        texts = [line for name in names for line in name.read_text().splitlines()]
        return [json.loads(line) for line in texts if line.startswith("{")]

    def stop(self) -> int:
        """Ask for an orderly end by SIGTERM and return the exit code."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        return self.process.wait(STOP_TIMEOUT_S)

    def end(self) -> None:
        """Stop it, by force if it does not listen."""
        try:
            self.stop()
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            raise

    def show_logs(self) -> None:
        """Print the last lines of every log."""
        for path in sorted(self.log_dir.glob("*.log")):
            print(f"---- {path.name}", file=sys.stderr)
            lines = path.read_text(errors="replace").splitlines()
            print("\n".join(lines[-_SHOWN_LINES:]), file=sys.stderr)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is not None:
            self.show_logs()
        self.end()

    def _has_answered(self) -> bool:
        return self.ready_file.exists() or self.process.poll() is not None
