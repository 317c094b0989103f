"""`paceline autoscaler explain` against a real HTTP server."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from paceline.autoscaler.journal import Journal, JournalFile
from paceline.cli.app import app
from paceline.cli.autoscaler import line_of
from paceline.cli.ports import free_port
from tests.unit.autoscaler.made import decided, observed

ENTRY: dict[str, Any] = {
    "number": 7,
    "at_s": 1_700_000_000.0,
    "kind": "grow",
    "reason": "2.0 requests/s need 2.4 decode workers",
    "pools": {
        "prefill": {"desired": 1, "requested": 1, "ready": 1, "starting": 0, "draining": 0},
        "decode": {"desired": 3, "requested": 2, "ready": 1, "starting": 1, "draining": 1},
    },
    "parked": 4,
    "inputs": {"requests_per_s": 2.0},
    "victims": {},
    "problems": [],
    "effects": [
        {"role": "decode", "replicas": 3, "outcome": "failed", "reason": "target-forbidden: no"}
    ],
}


@contextmanager
def site(pages: Mapping[str, bytes]) -> Iterator[str]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = pages.get(self.path)
            self.send_response(200 if body is not None else 404)
            self.end_headers()
            self.wfile.write(body or b"")

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


def explain(*flags: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["autoscaler", "explain", *flags])
    return result.exit_code, result.output


def decisions(*entries: dict[str, Any]) -> bytes:
    return json.dumps({"decisions": entries}).encode()


def members(*found: dict[str, Any]) -> bytes:
    return json.dumps({"members": found}).encode()


def test_a_line_has_the_sizes_the_numbers_and_what_came_of_it() -> None:
    line = line_of(ENTRY)
    assert line[20:] == (
        " grow     prefill 1 (1 ready)  decode 2 -> 3 (1 ready, 1 starting, 1 draining)  parked 4  "
        "2.0 requests/s need 2.4 decode workers  [decode failed: target-forbidden: no]"
    )
    assert "\n" not in line


def test_the_autoscaler_is_found_through_the_gateway() -> None:
    with site({"/decisions?last=20": decisions(ENTRY)}) as autoscaler:
        gateway = {"role": "gateway", "metrics_address": "127.0.0.1:1"}
        found = {"role": "autoscaler", "metrics_address": autoscaler}
        with site({"/status": members(gateway, found)}) as endpoint:
            code, output = explain("--endpoint", endpoint)
    assert (code, output.strip()) == (0, line_of(ENTRY))


def test_json_is_one_object_per_decision() -> None:
    with site({"/decisions?last=5": decisions(ENTRY, ENTRY)}) as address:
        code, output = explain("--autoscaler", address, "--last", "5", "--json")
    assert code == 0
    assert [json.loads(line) for line in output.splitlines()] == [ENTRY, ENTRY]


def test_what_is_missing_is_said() -> None:
    nobody = f"127.0.0.1:{free_port()}"
    assert "no gateway answers" in explain("--endpoint", nobody)[1]
    assert "no autoscaler answers" in explain("--autoscaler", nobody)[1]
    with site({"/status": members(), "/decisions?last=20": b"[]"}) as address:
        assert "no autoscaler is in the fleet" in explain("--endpoint", address)[1]
        assert "does not answer with decisions" in explain("--autoscaler", address)[1]
        assert "answers 404" in explain("--autoscaler", address, "--last", "3")[1]
    with site({"/decisions?last=20": decisions()}) as address:
        code, output = explain("--autoscaler", address)
    assert code == 1 and "has not decided anything yet" in output


@pytest.mark.parametrize(
    ("flags", "text"),
    [
        (("--policy", "static"), "--policy goes with --replay"),
        (("--replay", "{journal}", "--follow"), "--replay asks nobody"),
        (("--replay", "{journal}", "--policy", "guess"), "no scaling policy 'guess'; there are:"),
        (("--replay", "{broken}", "--policy", "static"), "broken:1: no line of a journal"),
    ],
)
def test_flags_that_do_not_go_together_are_refused(
    tmp_path: Path, flags: tuple[str, ...], text: str
) -> None:
    files = {"journal": tmp_path / "journal", "broken": tmp_path / "broken"}
    files["journal"].write_text("")
    files["broken"].write_text("x\n")
    code, output = explain(*(flag.format(**files) for flag in flags))
    assert code == 1 and text in output.replace("\n", " ")


def test_a_journal_is_decided_about_once_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "journal"
    written = Journal(9, JournalFile(path, 1 << 20))
    for at_s in (1.0, 2.0, 3.0):
        problems = ("prometheus-timeout: x",) if at_s == 3.0 else ()
        written.note_decision(observed(at_s=at_s, problems=problems), decided())
    written.close()
    monkeypatch.setenv("PACELINE_DECODE_MIN", "6")
    code, output = explain("--replay", str(path), "--policy", "static", "--last", "2")
    assert code == 0
    grown, held = output.splitlines()
    assert "decode 1 -> 6" in grown
    # The guard stands behind every policy.
    assert "hold" in held and "prometheus-timeout: x" in held
