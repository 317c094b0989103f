"""Logs are one JSON object per line; metrics say what the process itself does."""

from __future__ import annotations

import asyncio
import io
import json
import logging
from collections.abc import Iterator
from urllib.request import urlopen

import pytest

from paceline import __version__
from paceline.domain.errors import UnavailableError
from paceline.process.lifecycle import Tasks
from paceline.process.logs import JsonFormatter, logged_call, request_id_var
from paceline.process.metrics import Metrics, serve_metrics
from paceline.process.spans import NO_TRACER, span_var

logger = logging.getLogger("paceline.test")


@pytest.fixture
def lines() -> Iterator[io.StringIO]:
    """Collect what our loggers write."""
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(JsonFormatter("test"))
    ours = logging.getLogger("paceline")
    level = ours.level
    ours.addHandler(handler)
    ours.setLevel(logging.INFO)
    yield stream
    ours.removeHandler(handler)
    ours.setLevel(level)


def _only(lines: io.StringIO) -> dict[str, object]:
    (line,) = lines.getvalue().splitlines()
    parsed: dict[str, object] = json.loads(line)
    return parsed


@pytest.mark.parametrize(
    ("error", "outcome"),
    [
        (None, "ok"),
        (UnavailableError("gone", reason="engine-died"), "engine-died"),
        (asyncio.CancelledError(), "cancelled"),
        (GeneratorExit(), "cancelled"),
        (ValueError("bug"), "internal"),
    ],
)
def test_a_call_is_one_line_however_it_ends(
    lines: io.StringIO, error: BaseException | None, outcome: str
) -> None:
    token = request_id_var.set("r-1")
    try:
        with logged_call(logger, "work-finished") as fields:
            fields["tokens"] = 3
            if error is not None:
                raise error
    except BaseException as raised:
        assert raised is error
    finally:
        request_id_var.reset(token)
    line = _only(lines)
    assert (line["event"], line["outcome"], line["tokens"]) == ("work-finished", outcome, 3)
    assert (line["level"], line["service"], line["request_id"]) == ("info", "test", "r-1")
    assert isinstance(line["duration_s"], float)


async def test_a_crashed_vital_task_stops_the_process_and_traces_only_surprises(
    lines: io.StringIO,
) -> None:
    async def fail(error: Exception) -> None:
        raise error

    for error, is_traced in ((UnavailableError("gone"), False), (ValueError("bug"), True)):
        lines.truncate(lines.seek(0))
        stop = asyncio.Event()
        tasks = Tasks(stop)
        tasks.spawn(fail(error), "work", is_vital=True)
        await asyncio.wait_for(stop.wait(), 2)
        assert tasks.has_vital_crash
        assert ("exception" in _only(lines)) == is_traced
        await tasks.close()


def test_metrics_tell_the_process_and_its_build() -> None:
    metrics = Metrics("test", model="m")
    metrics.redis_up.set(True)
    server = serve_metrics(metrics, "127.0.0.1", 0)
    try:
        with urlopen(f"http://127.0.0.1:{server.port}/metrics", timeout=5) as page:
            text = page.read().decode()
        with pytest.raises(OSError, match=f"127.0.0.1:{server.port}.*in use"):
            serve_metrics(metrics, "127.0.0.1", server.port)
    finally:
        server.close()
    info = f'paceline_build_info{{model_name="m",service="test",version="{__version__}"}} 1.0'
    assert info in text
    assert "paceline_redis_up 1.0" in text
    for name in ("process_open_fds", "process_resident_memory_bytes", "process_cpu_seconds_total"):
        assert f"\n{name} " in text


def test_a_line_of_a_request_has_its_trace_id(lines: io.StringIO) -> None:
    logger.info("outside")
    assert "trace_id" not in _only(lines)
    lines.truncate(lines.seek(0))
    root = NO_TRACER.begin("call", None)
    token = span_var.set(root)
    try:
        logger.info("inside")
    finally:
        span_var.reset(token)
    assert _only(lines)["trace_id"] == root.context.trace_id
