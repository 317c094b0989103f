"""`paceline status` against a real HTTP server."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from rich.console import Console

from paceline.cli.errors import CommandError
from paceline.cli.ports import free_port
from paceline.cli.status import fetch_status, render

LOAD = {
    "num_waiting": 2,
    "num_running": 5,
    "pending_prefill_tokens": 321,
    "free_blocks": 75,
    "total_blocks": 100,
    "context_tokens": 4567,
}
STATUS: dict[str, Any] = {
    "version": "0.1.0",
    "model": {"name": "demo"},
    "has_redis": True,
    "requests": {"running": 7, "parked": 3, "finished": 40, "failed": 1},
    "members": [
        {
            "id": "decode-0",
            "role": "decode",
            "address": "127.0.0.1:40001",
            "pid": 4711,
            "version": "0.1.0",
            "node_id": "kv-0",
            "is_draining": False,
            "is_suspect": True,
            "load": LOAD,
        },
        {
            "id": "gateway-0",
            "role": "gateway",
            "address": "127.0.0.1:50051",
            "pid": 4712,
            "version": "0.1.0",
            "node_id": "",
            "is_draining": True,
            "is_suspect": False,
            "load": {},
        },
    ],
}


@contextmanager
def http_server(status: int, body: bytes) -> Iterator[str]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            is_known = self.path == "/status"
            self.send_response(status if is_known else 404)
            self.end_headers()
            self.wfile.write(body if is_known else b"")

        def log_message(self, *args: object) -> None:
            """Keep quiet."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield f"127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def command(*args: str) -> subprocess.CompletedProcess[str]:
    argv = [sys.executable, "-m", "paceline.cli", "status", *args]
    return subprocess.run(argv, capture_output=True, text=True, timeout=30)


def shown(status: dict[str, Any]) -> list[list[str]]:
    console = Console(width=80, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(render(status))
    console.file.close()
    return [line.split() for line in console.export_text().splitlines()]


def test_the_table_fits_a_terminal_and_says_who_does_what() -> None:
    head, requests, _, *rows, _ = shown(STATUS)
    assert head == ["paceline", "0.1.0", "model", "demo", "redis", "up"]
    assert " ".join(requests) == "requests: 7 running (3 parked), 40 finished, 1 failed"
    assert rows == [
        ["decode-0", "127.0.0.1:40001", "4711", "kv-0", "suspect", "5", "2", "321", "25%", "4567"],
        ["gateway-0", "127.0.0.1:50051", "4712", "draining"],
    ]


def test_a_worker_that_drafts_tells_what_was_accepted() -> None:
    assert "accepted:" not in [word for line in shown(STATUS) for word in line]
    drafts = {**LOAD, "drafted_tokens": 800, "accepted_tokens": 496}
    members = [{**STATUS["members"][0], "load": drafts}, STATUS["members"][1]]
    *_, line, _ = shown({**STATUS, "members": members})
    assert line == ["drafts", "accepted:", "decode-0", "62%"]


def test_a_fleet_without_anything_still_shows() -> None:
    head, *_ = shown({"version": "0.1.0", "model": None, "has_redis": False, "members": []})
    assert head == ["paceline", "0.1.0", "model", "none", "redis", "down"]


def test_once_and_json() -> None:
    with http_server(200, json.dumps(STATUS).encode()) as endpoint:
        once = command("--endpoint", endpoint, "--once")
        as_json = command("--endpoint", endpoint, "--json")
    assert once.returncode == 0
    assert "decode-0" in once.stdout
    assert json.loads(as_json.stdout) == STATUS


def test_nobody_there_is_a_clear_error() -> None:
    port = free_port()
    done = command("--endpoint", f"127.0.0.1:{port}")
    assert done.returncode == 1
    assert done.stderr.startswith(f"paceline status: no gateway answers at http://127.0.0.1:{port}")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("status", "body", "message"),
    [
        (404, b"", "answers 404"),
        (200, b"<html>", "no gateway answers"),
        (200, b"[]", "does not answer with a status"),
    ],
)
def test_another_server_is_not_taken_for_a_gateway(status: int, body: bytes, message: str) -> None:
    with http_server(status, body) as endpoint, pytest.raises(CommandError, match=message):
        fetch_status(endpoint)
