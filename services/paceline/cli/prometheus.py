"""Finds and runs a private Prometheus for one platform: loopback, in a directory that vanishes.

It learns from the gateway whom to scrape (/metrics/targets), so that workers which come and go
are followed within a second.
"""

from __future__ import annotations

import asyncio
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from paceline.cli.child import ChildSpec, SupervisedChild
from paceline.cli.errors import CommandError
from paceline.cli.http_get import http_get
from paceline.cli.ports import free_port
from paceline.cli.supervisor import Supervisor

SCRAPE_PERIOD = "1s"
"""All processes are on this machine, and a decision should not wait for its numbers."""
RETENTION = "6h"
RETENTION_SIZE = "256MB"

_MAX_PORTS = 3
"""Ports tried: a free port may be taken by somebody else before Prometheus binds it."""
_START_TIMEOUT_S = 30.0
_GRACE_S = 10.0
_POLL_S = 0.1


def find_prometheus(path: str | None = None) -> str:
    """Return the executable on PATH (or `path`).

    Raises:
        CommandError: there is none.
    """
    if found := shutil.which("prometheus", path=path):
        return found
    raise CommandError(
        "no Prometheus found: install it (apt install prometheus, brew install prometheus, or "
        "https://prometheus.io/download) so that it is on PATH, or name a running one that "
        "scrapes this platform with --prometheus-url"
    )


def prometheus_config(gateway_http: str) -> dict[str, Any]:
    """Return a configuration that scrapes whoever the gateway names."""
    discovery = {
        "url": f"http://{gateway_http}/metrics/targets",
        "refresh_interval": SCRAPE_PERIOD,
    }
    return {
        "global": {
            "scrape_interval": SCRAPE_PERIOD,
            "scrape_timeout": SCRAPE_PERIOD,
            "evaluation_interval": SCRAPE_PERIOD,
        },
        "scrape_configs": [{"job_name": "paceline", "http_sd_configs": [discovery]}],
    }


async def start_prometheus(
    supervisor: Supervisor,
    executable: str,
    gateway_http: str,
    directory: Path,
    env: Mapping[str, str],
) -> str:
    """Start a private Prometheus and return its URL once it answers; restarts keep the port.

    Raises:
        CommandError: it does not come up.
    """
    config = directory / "prometheus.yml"
    # YAML has JSON in it.
    config.write_text(json.dumps(prometheus_config(gateway_http), indent=2), encoding="utf-8")
    for _ in range(_MAX_PORTS):
        port = free_port()
        child = supervisor.start(prometheus_spec(executable, port, config, env))
        if await _answers(child, port):
            return f"http://127.0.0.1:{port}"
        lines = child.last_lines
        await supervisor.remove(child)
    raise CommandError("Prometheus does not start:\n" + "\n".join(lines))


def prometheus_spec(executable: str, port: int, config: Path, env: Mapping[str, str]) -> ChildSpec:
    """Return the command of a Prometheus that keeps its data beside its configuration."""
    argv = [executable, f"--config.file={config}", f"--web.listen-address=127.0.0.1:{port}"]
    argv += [f"--storage.tsdb.path={config.parent / 'data'}"]
    argv += [f"--storage.tsdb.retention.time={RETENTION}"]
    argv += [f"--storage.tsdb.retention.size={RETENTION_SIZE}", "--log.level=warn"]
    return ChildSpec("prometheus", "prometheus", tuple(argv), env, _GRACE_S)


async def _answers(child: SupervisedChild, port: int) -> bool:
    try:
        async with asyncio.timeout(_START_TIMEOUT_S):
            while child.num_crashes == 0:
                if child.num_starts > 0 and await asyncio.to_thread(_is_ready, port):
                    return child.num_crashes == 0
                await asyncio.sleep(_POLL_S)
    except TimeoutError:
        pass
    return False


def _is_ready(port: int) -> bool:
    try:
        http_get(f"http://127.0.0.1:{port}/-/ready", 1.0)
    except OSError:
        return False
    return True
