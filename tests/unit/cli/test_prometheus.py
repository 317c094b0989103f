"""A private Prometheus: found or asked for, configured as it understands, gone afterwards."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import subprocess
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from paceline.cli.errors import CommandError
from paceline.cli.http_get import http_get
from paceline.cli.prometheus import find_prometheus, prometheus_config, start_prometheus
from paceline.cli.supervisor import Supervisor
from tests.unit.cli.conftest import is_alive
from tests.waiting import until

needs_prometheus = pytest.mark.skipif(
    shutil.which("prometheus") is None or shutil.which("promtool") is None,
    reason="Prometheus is not installed",
)


class Site(BaseHTTPRequestHandler):
    """A gateway that knows one member: itself."""

    def do_GET(self) -> None:
        port = self.server.server_address[1]
        target = {"targets": [f"127.0.0.1:{port}"], "labels": {"member": "gateway-0"}}
        is_discovery = self.path == "/metrics/targets"
        body = json.dumps([target]) if is_discovery else "# TYPE some gauge\nsome 7\n"
        self.send_response(200)
        kind = "application/json" if is_discovery else "text/plain; version=0.0.4"
        self.send_header("content-type", kind)
        self.end_headers()
        self.wfile.write(body.encode())

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def site() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Site) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"127.0.0.1:{server.server_address[1]}"
        server.shutdown()
        thread.join()


def test_who_has_none_is_told_how_to_get_one(tmp_path: Path) -> None:
    with pytest.raises(CommandError, match=r"apt install prometheus.*--prometheus-url"):
        find_prometheus(str(tmp_path))


@needs_prometheus
def test_the_configuration_is_one_that_prometheus_takes(tmp_path: Path) -> None:
    path = tmp_path / "prometheus.yml"
    path.write_text(json.dumps(prometheus_config("127.0.0.1:8080")))
    done = subprocess.run(
        ["promtool", "check", "config", str(path)], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stdout + done.stderr


@needs_prometheus
async def test_it_scrapes_whom_the_gateway_names_and_leaves_nothing(
    tmp_path: Path, supervisor: Supervisor, site: str
) -> None:
    directory = tmp_path / "prometheus"
    directory.mkdir()
    url = await start_prometheus(supervisor, find_prometheus(), site, directory, dict(os.environ))

    async def value() -> str:
        body = await asyncio.to_thread(http_get, f"{url}/api/v1/query?query=some", 5.0)
        found = json.loads(body)["data"]["result"]
        return str(found[0]["value"][1]) if found else ""

    assert await until(value, 30) == "7"
    (child,) = supervisor.of_role("prometheus")
    assert child.pid is not None
    assert await supervisor.drain()
    assert not is_alive(child.pid)
    assert sorted(p.name for p in directory.iterdir()) == ["data", "prometheus.yml"]


async def test_a_program_that_does_not_come_up_is_told_with_its_last_words(
    tmp_path: Path, supervisor: Supervisor
) -> None:
    fake = tmp_path / "prometheus"
    fake.write_text("#!/bin/sh\necho no memory left\nexit 1\n")
    fake.chmod(0o755)
    with pytest.raises(CommandError, match=r"(?s)Prometheus does not start.*no memory left"):
        await start_prometheus(supervisor, str(fake), "127.0.0.1:1", tmp_path, dict(os.environ))
    assert supervisor.children == []
