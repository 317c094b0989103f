"""Whatever an HTTP server says instead of an answer becomes a problem with a reason."""

from __future__ import annotations

import asyncio
import json
import socket
from pathlib import Path
from typing import Any

import pytest

from paceline.autoscaler.problems import SOURCE_REASONS, reason_of
from paceline.autoscaler.sources.prometheus import (
    AnswerClock,
    PrometheusRules,
    PrometheusSource,
    Signals,
)
from paceline.autoscaler.sources.prometheus_api import (
    MAX_BODY_BYTES,
    PrometheusApi,
    QueryError,
    parse_answer,
)
from paceline.autoscaler.sources.queries import queries
from tests.unit.autoscaler.scripted_http import Answer, always, scripted

RULES = PrometheusRules(window_s=60, stale_s=30, ttft_s=1.0, itl_s=0.1)


async def read(url: str, timeout_s: float = 5.0, **options: Any) -> Signals:
    api = PrometheusApi(url, timeout_s, **options)
    try:
        return await PrometheusSource(api, RULES).read(1.0)
    finally:
        await api.close()


def vector(*values: str, at_s: float = 100.0, **more: object) -> bytes:
    result = [{"metric": {}, "value": [at_s, value]} for value in values]
    data = {"resultType": "vector", "result": result}
    return json.dumps({"status": "success", "data": data, **more}).encode()


async def cut_off(_: str, writer: asyncio.StreamWriter) -> None:
    writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n{")
    await writer.drain()


async def silence(_: str, writer: asyncio.StreamWriter) -> None:
    await asyncio.Event().wait()


async def drip(_: str, writer: asyncio.StreamWriter) -> None:
    writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n")
    while True:
        writer.write(b" ")
        await writer.drain()
        await asyncio.sleep(0.05)


async def endless(_: str, writer: asyncio.StreamWriter) -> None:
    writer.write(b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n")
    while True:
        writer.write(b" " * 65536)
        await writer.drain()


async def no_http(_: str, writer: asyncio.StreamWriter) -> None:
    writer.write(b"SSH-2.0-OpenSSH_9.2\r\n\r\n")
    await writer.drain()


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (always("200 OK", b"<html>Sign in</html>"), "prometheus-garbage"),
        (always("200 OK", b""), "prometheus-garbage"),
        (always("200 OK", b"[" * 100_000), "prometheus-garbage"),
        (always("200 OK", b"null"), "prometheus-garbage"),
        (always("200 OK", b'"success"'), "prometheus-garbage"),
        (always("200 OK", b'{"status": "success"}'), "prometheus-garbage"),
        (always("200 OK", b'{"status": "success", "data": null}'), "prometheus-garbage"),
        (always("200 OK", vector("1").replace(b"vector", b"matrix")), "prometheus-garbage"),
        (always("200 OK", vector("many")), "prometheus-garbage"),
        (always("200 OK", vector("1", "2")), "prometheus-garbage"),
        (always("200 OK", b"\xff\xfe\x00"), "prometheus-garbage"),
        (always("200 OK", vector("NaN")), "prometheus-not-finite"),
        (always("200 OK", vector("+Inf")), "prometheus-not-finite"),
        (always("200 OK", vector("-1")), "prometheus-negative"),
        (always("200 OK", vector()), "prometheus-missing"),
        (always("200 OK", vector("1", warnings=["a store is away"])), "prometheus-partial"),
        (
            always("200 OK", b'{"status": "error", "error": "query timed out"}'),
            "prometheus-refused",
        ),
        (always("400 Bad Request", b'{"error": "parse error"}'), "prometheus-refused"),
        (always("422 Unprocessable", b'{"error": "too many samples"}'), "prometheus-refused"),
        (always("401 Unauthorized", b"no"), "prometheus-http"),
        (always("404 Not Found", b"no such page"), "prometheus-http"),
        (always("500 Oh", b"\x00\x01"), "prometheus-http"),
        (always("503 Service Unavailable", b""), "prometheus-http"),
        (
            always("302 Found", b"", "Location: https://login.example/"),
            "prometheus-redirect",
        ),
        (always("301 Moved", b""), "prometheus-redirect"),
        (always("200 OK", b" " * (MAX_BODY_BYTES + 1)), "prometheus-too-large"),
        (endless, "prometheus-too-large"),
        (cut_off, "prometheus-unreachable"),
        (no_http, "prometheus-unreachable"),
        (
            always("200 OK", b"not gzip at all", "Content-Encoding: gzip"),
            "prometheus-unreachable",
        ),
    ],
)
async def test_what_is_no_answer_has_a_reason(answer: Answer, reason: str) -> None:
    async with scripted(answer) as url:
        signals = await read(url)
    assert signals.traffic is None
    assert reason in {reason_of(line, SOURCE_REASONS) for line in signals.problems}
    assert all(reason_of(line, SOURCE_REASONS) for line in signals.problems)
    assert all("\n" not in line and len(line) < 400 for line in signals.problems)


@pytest.mark.parametrize("answer", [silence, drip])
async def test_an_answer_that_does_not_come_costs_one_deadline(answer: Answer) -> None:
    begun_s = asyncio.get_running_loop().time()
    async with scripted(answer) as url:
        signals = await read(url, timeout_s=0.3)
    assert signals.problems == ("prometheus-timeout: all queries: no answer within 0.3 s",)
    # One after the other they would take five seconds.
    assert asyncio.get_running_loop().time() - begun_s < 4.0


async def test_nobody_listens() -> None:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        signals = await read(f"http://127.0.0.1:{sock.getsockname()[1]}")
    (line,) = signals.problems
    assert line.startswith("prometheus-unreachable: all queries: ")


async def test_one_failing_query_does_not_spoil_the_others() -> None:
    good, bad = always("200 OK", vector("0")), always("500 Oh", b"")

    async def answer(line: str, writer: asyncio.StreamWriter) -> None:
        await (bad if "request_output_tokens" in line else good)(line, writer)

    async with scripted(answer) as url:
        signals = await read(url)
    assert signals.traffic is not None
    assert any(
        line.startswith("prometheus-http: output_tokens: answers 500") for line in signals.problems
    )


async def test_a_token_file_and_a_path_are_used(tmp_path: Path) -> None:
    seen: list[str] = []
    token = tmp_path / "token"
    token.write_text("s3cret\n")

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        seen.append((await reader.readuntil(b"\r\n\r\n")).decode())
        await always("200 OK", vector("1"))("", writer)
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    await read(f"http://127.0.0.1:{port}/prometheus/", token_file=token)
    server.close()
    assert len(seen) == len(queries(60, 30))
    assert all(head.startswith("GET /prometheus/api/v1/query?query=") for head in seen)
    assert all("Authorization: Bearer s3cret\r\n" in head for head in seen)


async def test_a_token_file_that_is_gone_is_a_problem(tmp_path: Path) -> None:
    async with scripted(always("200 OK", vector("1"))) as url:
        signals = await read(url, token_file=tmp_path / "gone")
    (line,) = signals.problems
    assert "gone" in line


@pytest.mark.parametrize("url", ["127.0.0.1:9090", "ftp://prometheus", ""])
async def test_an_url_that_cannot_be_asked_is_refused(url: str) -> None:
    with pytest.raises(ValueError, match="no http"):
        PrometheusApi(url, 1.0)


async def test_a_ca_file_that_has_no_certificate_is_refused(tmp_path: Path) -> None:
    empty = tmp_path / "ca.pem"
    empty.write_text("")
    with pytest.raises(ValueError, match="no certificates"):
        PrometheusApi("https://prometheus", 1.0, ca_file=empty)


def test_scalars_are_answers_too() -> None:
    body = b'{"status": "success", "data": {"resultType": "scalar", "result": [5, "2.5"]}}'
    (sample,) = parse_answer(body)
    assert (sample.value, sample.at_s) == (2.5, 5.0)


@pytest.mark.parametrize(
    "result",
    [[{"metric": {}}], [{"value": [1, "2"]}], [{"metric": [], "value": [1, "2"]}], [5], {}, "x"],
)
def test_items_of_another_shape_are_garbage(result: Any) -> None:
    data = {"resultType": "vector", "result": result}
    body = json.dumps({"status": "success", "data": data}).encode()
    if result == {}:
        assert parse_answer(body) == []
        return
    with pytest.raises(QueryError) as caught:
        parse_answer(body)
    assert caught.value.reason == "prometheus-garbage"


def test_answers_of_a_clock_that_stands_still_grow_old() -> None:
    clock = AnswerClock()
    assert clock.lag_s(100.0, 1.0) == 0
    assert clock.lag_s(100.0, 31.0) == 30
    assert clock.lag_s(101.0, 32.0) == 0
    # The server's clock was set back: it moves all the same.
    assert clock.lag_s(50.0, 33.0) == 0


async def test_a_cache_that_repeats_an_answer_is_stale() -> None:
    async with scripted(always("200 OK", vector("1", at_s=1000.0))) as url:
        api = PrometheusApi(url, 5.0)
        source = PrometheusSource(api, RULES)
        first = await source.read(10.0)
        later = await source.read(10.0 + 600.0)
        await api.close()
    assert not any(line.startswith("prometheus-stale") for line in first.problems)
    assert "prometheus-stale: the newest sample is 601 s old" in later.problems
