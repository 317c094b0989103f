"""Spans reach a collector; one that is slow, away or full costs spans, never time."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Iterator, Sequence

import pytest
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult

from paceline.domain.errors import UnavailableError
from paceline.process import tracing
from paceline.process.spans import Span, Tracer, create_tracer, current_span, parse_traceparent
from paceline.process.tracing import QUEUE_SPANS, SpanQueue
from tests.otlp_receiver import ERROR, OtlpReceiver

RESOURCE = {"service.name": "paceline-test"}
CALLER = "4bf92f3577b34da6a3ce929d0e0e4736"


@pytest.fixture
def receiver() -> Iterator[OtlpReceiver]:
    with OtlpReceiver() as receiver:
        yield receiver


@pytest.fixture
def tracer(receiver: OtlpReceiver) -> Iterator[Tracer]:
    tracer = create_tracer(receiver.endpoint, 1.0, RESOURCE)
    yield tracer
    tracer.close()


def test_a_trace_arrives_as_it_was_told(receiver: OtlpReceiver, tracer: Tracer) -> None:
    now_s = time.monotonic()
    with tracer.begin("call", None, kind="server") as root:
        assert current_span() is root
        with root.child("step", {"paceline.blocks": 3}) as step:
            assert current_span() is step
            step.event("chunk", {"paceline.tokens": 7})
        # Told of later, by somebody else's clock readings.
        past = root.child("engine", start_s=now_s - 2.0, links=[step])
        past.event("first-token", at_s=now_s - 1.5)
        past.end(at_s=now_s - 1.0)
        past.end()
    tracer.close()
    by_name = {span.name: span for span in receiver.spans}
    assert {span.trace_id for span in receiver.spans} == {root.context.trace_id}
    assert by_name["call"].parent_id == ""
    for name in ("step", "engine"):
        assert by_name[name].parent_id == by_name["call"].span_id
    assert by_name["step"].attributes == {"paceline.blocks": 3}
    assert by_name["step"].events[0].attributes == {"paceline.tokens": 7}
    engine = by_name["engine"]
    assert engine.links == [by_name["step"].span_id]
    assert engine.end_ns - engine.start_ns == pytest.approx(1e9, rel=1e-6)
    assert engine.events[0].time_ns - engine.start_ns == pytest.approx(0.5e9, rel=1e-6)
    assert by_name["call"].start_ns - engine.start_ns == pytest.approx(2e9, abs=1e9)
    assert by_name["call"].service == "paceline-test"


def test_an_error_is_a_status_with_its_reason(receiver: OtlpReceiver, tracer: Tracer) -> None:
    for error in (UnavailableError("gone", reason="worker-lost"), ValueError("bug")):
        with pytest.raises(type(error)), tracer.begin(type(error).__name__, None):
            raise error
    with pytest.raises(asyncio.CancelledError), tracer.begin("cancelled", None):
        raise asyncio.CancelledError
    tracer.close()
    by_name = {span.name: span for span in receiver.spans}
    lost, bug = by_name["UnavailableError"], by_name["ValueError"]
    assert (lost.status, lost.attributes["error.type"]) == (ERROR, "worker-lost")
    assert (bug.status, bug.attributes["error.type"]) == (ERROR, "internal")
    assert by_name["cancelled"].status != ERROR
    assert by_name["cancelled"].attributes["paceline.is_cancelled"] is True
    assert current_span().context.trace_id == ""


@pytest.mark.parametrize(("flags", "ratio", "is_there"), [("01", 0.0, True), ("00", 1.0, False)])
def test_a_caller_decides_whether_its_trace_is_recorded(
    receiver: OtlpReceiver, flags: str, ratio: float, is_there: bool
) -> None:
    tracer = create_tracer(receiver.endpoint, ratio, RESOURCE)
    parent = parse_traceparent(f"00-{CALLER}-00f067aa0ba902b7-{flags}", "vendor=1")
    with tracer.begin("call", parent) as root:
        assert root.context.trace_id == CALLER
        assert root.context.state == "vendor=1"
        assert root.is_recording is is_there
        if not is_there:
            assert root.context == parent
    tracer.close()
    assert [span.trace_id for span in receiver.spans] == [CALLER] * is_there


def test_a_ratio_of_zero_records_nothing_and_still_draws_ids(receiver: OtlpReceiver) -> None:
    tracer = create_tracer(receiver.endpoint, 0.0, RESOURCE)
    ids = set()
    for _ in range(20):
        with tracer.begin("call", None) as root:
            assert type(root) is Span
            assert not root.context.is_sampled
            ids.add(root.context.trace_id)
    tracer.close()
    assert len(ids) == 20
    assert receiver.spans == []


class StuckExporter(SpanExporter):
    """Takes as long as it is told to."""

    def __init__(self) -> None:
        self.has_begun = threading.Event()
        self.go = threading.Event()
        self.num_exported = 0

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        self.has_begun.set()
        self.go.wait()
        self.num_exported += len(spans)
        return SpanExportResult.SUCCESS

    def shutdown(self) -> None:
        self.go.set()


def test_a_full_queue_drops_and_counts() -> None:
    dropped: list[int] = []
    exporter = StuckExporter()
    queue = SpanQueue(exporter, "http://nowhere", dropped.append)
    try:
        queue.on_end(ReadableSpan("first"))
        # The thread has taken the first one and does not come back for more.
        assert exporter.has_begun.wait(30)
        for number in range(QUEUE_SPANS + 100):
            queue.on_end(ReadableSpan(str(number)))
        assert sum(dropped) == 100
    finally:
        exporter.go.set()
        queue.close(30.0)
    assert exporter.num_exported == 1 + QUEUE_SPANS
    queue.on_end(ReadableSpan("late"))
    assert sum(dropped) == 101


def test_a_collector_that_hangs_does_not_hold_the_end(receiver: OtlpReceiver) -> None:
    receiver.hang()
    dropped: list[int] = []
    tracer = create_tracer(receiver.endpoint, 1.0, RESOURCE, dropped.append)
    for _ in range(10):
        with tracer.begin("call", None):
            pass
    started_s = time.monotonic()
    tracer.close(0.2)
    # The library alone would wait for half a minute.
    assert time.monotonic() - started_s < 10.0
    for thread in threading.enumerate():
        if thread.name == "trace-export":
            thread.join(30)
            assert not thread.is_alive()
    assert sum(dropped) == 10


def test_a_collector_that_is_away_is_one_line_in_the_log(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tracing, "BATCH_SPANS", 1)
    monkeypatch.setattr(tracing, "SEND_TIMEOUT_S", 0.2)
    dropped: list[int] = []
    caplog.set_level(logging.INFO)
    tracer = create_tracer("http://127.0.0.1:9", 1.0, RESOURCE, dropped.append)
    for _ in range(5):
        with tracer.begin("call", None):
            pass
    tracer.close(60.0)
    assert sum(dropped) == 5
    assert [record.message for record in caplog.records] == ["traces-not-sent"]
