"""A real Prometheus process for tests, and a small process page for it to scrape."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry, start_http_server

from tests.waiting import until_sync

needs_prometheus = pytest.mark.skipif(
    shutil.which("prometheus") is None, reason="no Prometheus is installed"
)


@dataclass(frozen=True)
class Target:
    """A page to scrape, and labels that its series get."""

    address: str
    labels: Mapping[str, str] = field(default_factory=dict)


class PrometheusServer:
    """One server on one port, which scrapes what `scrape` names; can die, hang and come back."""

    def __init__(self, directory: Path, scrape_interval: str = "200ms") -> None:
        self._directory = directory
        self._interval = scrape_interval
        self._targets = directory / "targets.json"
        self.port = _free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self._process: subprocess.Popen[bytes] | None = None
        self.scrape([])

    def scrape(self, targets: Sequence[Target]) -> None:
        """Name the targets from now on; the server reads them again by itself."""
        groups = [{"targets": [t.address], "labels": dict(t.labels)} for t in targets]
        fresh = self._targets.with_suffix(".new")
        fresh.write_text(json.dumps(groups))
        fresh.replace(self._targets)

    def start(self) -> None:
        """Start the server and wait until it answers."""
        discovery = {"files": [str(self._targets)], "refresh_interval": "200ms"}
        config = {
            "global": {"scrape_interval": self._interval, "scrape_timeout": self._interval},
            "scrape_configs": [{"job_name": "paceline", "file_sd_configs": [discovery]}],
        }
        path = self._directory / "prometheus.yml"
        path.write_text(json.dumps(config))
        command = ["prometheus", f"--config.file={path}", "--log.level=warn"]
        command += [f"--web.listen-address=127.0.0.1:{self.port}"]
        command += [f"--storage.tsdb.path={self._directory / 'data'}"]
        with open(self._directory / "prometheus.log", "ab") as log:
            self._process = subprocess.Popen(command, stdout=log, stderr=log)
        until_sync(self._is_ready, timeout_s=60)

    def kill(self) -> None:
        """End the server at once."""
        if self._process is not None:
            self._process.kill()
            self._process.wait(timeout=10)
            self._process = None

    def pause(self) -> None:
        """Make the server hang with its port open."""
        assert self._process is not None
        os.kill(self._process.pid, signal.SIGSTOP)

    def resume(self) -> None:
        """Let a paused server go on."""
        assert self._process is not None
        os.kill(self._process.pid, signal.SIGCONT)

    def _is_ready(self) -> bool:
        assert self._process is not None and self._process.poll() is None, self._log()
        try:
            with urllib.request.urlopen(f"{self.url}/-/ready", timeout=1) as reply:
                return bool(reply.status == 200)
        except OSError:
            return False

    def _log(self) -> str:
        return (self._directory / "prometheus.log").read_text()


class Page:
    """A registry behind an HTTP port of its own."""

    def __init__(self, registry: CollectorRegistry, port: int = 0) -> None:
        self._server, self._thread = start_http_server(port, "127.0.0.1", registry)
        self.address = f"127.0.0.1:{self._server.server_port}"

    def close(self) -> None:
        """Stop serving."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


def _free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port: int = sock.getsockname()[1]
        return port
