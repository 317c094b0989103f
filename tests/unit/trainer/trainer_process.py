"""A real trainer process; its log lies in a directory of the test."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from paceline.domain.errors import UnavailableError
from paceline.domain.member import Member
from paceline.process.membership import Membership
from tests.checkpoints import DEMO
from tests.unit.kvstore.node_process import FLEET
from tests.waiting import until

START_TIMEOUT_S = 60.0


@dataclass
class TrainerProcess:
    """One `python -m paceline.trainer` of the demo model."""

    redis_url: str
    directory: Path
    flags: tuple[str, ...] = ()
    name: str = "trainer"
    process: subprocess.Popen[bytes] | None = field(default=None, init=False)

    def launch(self) -> None:
        """Start the process."""
        command = [sys.executable, "-m", "paceline.trainer", "--model", str(DEMO)]
        command += ["--redis-url", self.redis_url, "--fleet", FLEET, "--member-id", self.name]
        with open(self.directory / f"{self.name}.log", "ab") as log:
            self.process = subprocess.Popen([*command, *self.flags], stderr=log)

    async def start(self) -> Member:
        """Start the process and return its record once it is a member."""
        self.launch()
        membership = Membership(self.redis_url, FLEET)

        async def find() -> Member | None:
            assert self.process is not None
            assert self.process.poll() is None, self.log_lines
            try:
                members = await membership.members()
            except UnavailableError:
                return None
            return next((m for m in members if m.pid == self.process.pid), None)

        try:
            return await until(find, START_TIMEOUT_S)  # type: ignore[arg-type]
        finally:
            await membership.close()

    @property
    def log_lines(self) -> list[dict[str, Any]]:
        """Return what it logged."""
        text = (self.directory / f"{self.name}.log").read_text()
        return [json.loads(line) for line in text.splitlines()]

    def kill(self) -> None:
        """End the process at once."""
        if self.process is not None:
            self.process.kill()
            self.process.wait(timeout=10)

    def stop(self) -> int:
        """End the process in order; return its exit code."""
        assert self.process is not None
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(timeout=20)

    def wait(self) -> int:
        """Return the exit code once it ended by itself."""
        assert self.process is not None
        return self.process.wait(timeout=START_TIMEOUT_S)

    def has_torch(self) -> bool:
        """Tell whether the running process has mapped torch."""
        assert self.process is not None
        return "torch" in Path(f"/proc/{self.process.pid}/maps").read_text()
