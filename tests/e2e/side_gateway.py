"""A second gateway of a running platform, with settings of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from paceline.process.lifecycle import EXIT_WITH_PARENT_VAR
from tests.checkpoints import DEMO
from tests.e2e.probe import status
from tests.platform import Platform
from tests.waiting import until_sync


@contextmanager
def side_gateway(platform: Platform, name: str, *flags: str, log: Path) -> Iterator[str]:
    """Run it; yield its gRPC address."""
    command = [sys.executable, "-m", "paceline.gateway", "--member-id", name]
    command += ["--redis-url", platform.redis_url, "--fleet", platform.fleet]
    command += ["--model", str(DEMO), "--grpc-port", "0", "--http-port", "0", *flags]
    with open(log, "wb") as file:
        process = subprocess.Popen(command, stderr=file, env={EXIT_WITH_PARENT_VAR: "1"})
    try:
        yield until_sync(lambda: _address(platform, name, log), 20)
    finally:
        process.terminate()
        assert process.wait(timeout=20) == 0


def _address(platform: Platform, name: str, log: Path) -> str:
    if '"is_ready": true' not in log.read_text():
        return ""
    found = [m["address"] for m in status(platform)["members"] if m["id"] == name]
    return found[0] if found else ""


def write_keys(path: Path, keys: dict[str, dict[str, object]]) -> Path:
    """Write a key file."""
    path.write_text(json.dumps(keys))
    return path
