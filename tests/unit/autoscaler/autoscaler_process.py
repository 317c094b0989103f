"""Real autoscaler processes and what they say over HTTP."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from prometheus_client.parser import text_string_to_metric_families

START_TIMEOUT_S = 60.0


@dataclass
class AutoscalerProcess:
    """One `python -m paceline.autoscaler`; its log lies in `directory`."""

    redis_url: str
    directory: Path
    flags: tuple[str, ...] = ()
    name: str = "first"
    process: subprocess.Popen[bytes] | None = field(default=None, init=False)

    def start(self) -> None:
        """Start it; returns at once."""
        command = [sys.executable, "-m", "paceline.autoscaler", "--fleet", "test"]
        command += ["--redis-url", self.redis_url, *self.flags]
        with open(self.log_path, "ab") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log)

    @property
    def log_path(self) -> Path:
        """Return the file of its log lines."""
        return self.directory / f"{self.name}.log"

    def events(self, name: str) -> list[dict[str, Any]]:
        """Return its log lines of one event."""
        if not self.log_path.exists():
            return []
        lines = map(json.loads, self.log_path.read_text().splitlines())
        return [line for line in lines if line["event"] == name]

    @property
    def address(self) -> str | None:
        """Return host:port of its HTTP port once it listens."""
        listening = self.events("listening")
        return f"127.0.0.1:{listening[-1]['http']}" if listening else None

    def get(self, path: str) -> tuple[int, str]:
        """Return status and text of a page; 0 while nobody answers."""
        try:
            with urllib.request.urlopen(f"http://{self.address}{path}", timeout=5) as reply:
                return reply.status, reply.read().decode()
        except urllib.error.HTTPError as error:
            with error:
                return error.code, error.read().decode()
        except (OSError, ValueError):
            return 0, ""

    def decisions(self) -> list[dict[str, Any]]:
        """Return its decisions, oldest first."""
        status, text = self.get("/decisions?last=1000")
        return list(json.loads(text)["decisions"]) if status == 200 else []

    def metric(self, name: str, /, **labels: str) -> float | None:
        """Return the value of a metric."""
        _, text = self.get("/metrics")
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                if sample.name == f"paceline_{name}" and labels.items() <= sample.labels.items():
                    return float(sample.value)
        return None

    def signal(self, number: int) -> None:
        """Send a signal."""
        assert self.process is not None
        os.kill(self.process.pid, number)

    def wait(self) -> int:
        """Return its exit code."""
        assert self.process is not None
        return self.process.wait(timeout=START_TIMEOUT_S)

    def kill(self) -> None:
        """End it at once, if it runs."""
        if self.process is not None:
            self.signal(signal.SIGCONT) if self.process.poll() is None else None
            self.process.kill()
            self.process.wait(timeout=10)
