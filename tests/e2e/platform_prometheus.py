"""A real Prometheus that scrapes a platform as the shipped configuration says, only more often.

with PlatformPrometheus(platform, tmp_path) as prometheus:
    open(f"{prometheus.url}/api/v1/targets")
"""

from __future__ import annotations

import re
import shutil
import subprocess
import urllib.request
from pathlib import Path
from types import TracebackType
from typing import Self

from paceline.cli.ports import free_port
from tests.platform import Platform
from tests.waiting import until_sync

SHIPPED = Path(__file__).parents[2] / "deploy" / "prometheus"
PERIOD_S = 1
START_TIMEOUT_S = 60.0
STOP_TIMEOUT_S = 30.0


class PlatformPrometheus:
    """One server on one port; what it stores goes to a directory of the test's."""

    def __init__(self, platform: Platform, directory: Path, port: int | None = None) -> None:
        """Take a port, by default any free one."""
        self._directory = directory
        self._log = directory / "prometheus.log"
        self._port = port or free_port()
        self._file = directory / "prometheus.yml"
        self._file.write_text(configuration(platform.http, self._port))
        self.url = f"http://127.0.0.1:{self._port}"

    def __enter__(self) -> Self:
        executable = shutil.which("prometheus")
        assert executable is not None, "no prometheus on PATH (Debian package: prometheus)"
        command = [executable, f"--config.file={self._file}", "--log.level=warn"]
        command += [f"--web.listen-address=127.0.0.1:{self._port}"]
        command += [f"--storage.tsdb.path={self._directory / 'series'}"]
        with open(self._log, "wb") as log:
            self._process = subprocess.Popen(command, stdout=log, stderr=log)
        try:
            until_sync(self._is_ready, START_TIMEOUT_S)
        except BaseException:
            self._stop()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stop()

    def _is_ready(self) -> bool:
        assert self._process.poll() is None, self._log.read_text()
        try:
            with urllib.request.urlopen(f"{self.url}/-/ready", timeout=5) as response:
                return bool(response.status == 200)
        except OSError:
            return False

    def _stop(self) -> None:
        self._process.terminate()
        try:
            self._process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
            raise


def configuration(gateway_http: str, port: int) -> str:
    """Return the shipped configuration for a platform and a server on these ports."""
    text = (SHIPPED / "prometheus.yml").read_text()
    for pattern, value in (
        (r"127\.0\.0\.1:8080", gateway_http),
        (r"127\.0\.0\.1:9090", f"127.0.0.1:{port}"),
        (r"(_interval): \w+", rf"\1: {PERIOD_S}s"),
        (r"- (\w+\.yml)$", rf"- {SHIPPED}/\1"),
    ):
        text, count = re.subn(pattern, value, text, flags=re.MULTILINE)
        assert count, f"the shipped configuration has nothing like {pattern}"
    return text
