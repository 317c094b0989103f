"""Spans that are recorded, and how they leave the process. The only importer of opentelemetry.

Ended spans wait in a bounded queue for a thread that sends them in batches; what does not fit,
or cannot be sent, is dropped and counted. Nobody who serves ever waits for it. Imported by
`spans.create_tracer` where an endpoint is set, and by nobody else.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from contextvars import Token
from types import TracebackType
from typing import Self

from opentelemetry import trace as otel
from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan, SpanLimits, SpanProcessor, TracerProvider
from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult
from opentelemetry.sdk.trace.sampling import ParentBased, TraceIdRatioBased

from paceline.domain.errors import PacelineError
from paceline.process.spans import (
    FLUSH_TIMEOUT_S,
    Attributes,
    Kind,
    Span,
    TraceContext,
    Tracer,
    span_var,
)

logger = logging.getLogger(__name__)

QUEUE_SPANS = 4096
"""Ended spans kept at most: about 12 MiB."""

BATCH_SPANS = 256
"""Spans per message; encoding them takes about 8 ms, in which others run, too."""

SEND_EVERY_S = 1.0
SEND_TIMEOUT_S = 5.0
"""A collector that does not answer costs a batch, and the next one is tried."""

_KINDS = {
    "internal": otel.SpanKind.INTERNAL,
    "server": otel.SpanKind.SERVER,
    "client": otel.SpanKind.CLIENT,
}


class OtlpTracer(Tracer):
    """Records a share of the traces that begin here, and those that callers record."""

    def __init__(
        self,
        endpoint: str,
        sample_ratio: float,
        resource: Mapping[str, str],
        on_dropped: Callable[[int], None],
    ) -> None:
        # Whether sending works is said once by the queue, not per attempt.
        logging.getLogger("opentelemetry").setLevel(logging.CRITICAL)
        exporter = OTLPSpanExporter(endpoint=endpoint, timeout=SEND_TIMEOUT_S)
        self._queue = SpanQueue(exporter, endpoint, on_dropped)
        provider = TracerProvider(
            sampler=ParentBased(TraceIdRatioBased(sample_ratio)),
            resource=Resource.create(dict(resource)),
            span_limits=SpanLimits(max_events=256, max_span_attributes=64),
            shutdown_on_exit=False,
        )
        provider.add_span_processor(self._queue)
        self._tracer = provider.get_tracer("paceline")

    def begin(
        self,
        name: str,
        parent: TraceContext | None,
        attributes: Attributes | None = None,
        *,
        kind: Kind = "internal",
    ) -> Span:
        """Begin this process's part of a trace; one that is not sampled is not recorded."""
        offset_ns = time.time_ns() - time.monotonic_ns()
        begun = self._tracer.start_span(
            name,
            context=Context() if parent is None else _remote(parent),
            kind=_KINDS[kind],
            attributes=attributes,
            start_time=time.monotonic_ns() + offset_ns,
        )
        if not begun.is_recording():
            return Span(parent or _context_of(begun))
        return RecordedSpan(self._tracer, begun, offset_ns)

    def close(self, timeout_s: float = FLUSH_TIMEOUT_S) -> None:
        """Send what is not sent yet, within a time; blocks."""
        self._queue.close(timeout_s)


class RecordedSpan(Span):
    """A span that is sent once it has ended."""

    __slots__ = ("_offset_ns", "_span", "_token", "_tracer")

    is_recording = True

    def __init__(self, tracer: otel.Tracer, span: otel.Span, offset_ns: int) -> None:
        """`offset_ns` leads from monotonic to wall time; one for all spans of a request."""
        super().__init__(_context_of(span))
        self._tracer = tracer
        self._span = span
        self._offset_ns = offset_ns
        self._token: Token[Span] | None = None

    def child(
        self,
        name: str,
        attributes: Attributes | None = None,
        *,
        kind: Kind = "internal",
        start_s: float | None = None,
        links: Sequence[Span] = (),
    ) -> Span:
        """Begin a span under this one, now or at a time of time.monotonic()."""
        begun = self._tracer.start_span(
            name,
            context=otel.set_span_in_context(self._span, Context()),
            kind=_KINDS[kind],
            attributes=attributes,
            links=[otel.Link(link._span.get_span_context()) for link in _recorded(links)],
            start_time=self._time_ns(start_s),
        )
        return RecordedSpan(self._tracer, begun, self._offset_ns)

    def set(self, attributes: Attributes) -> None:
        """Add attributes."""
        self._span.set_attributes(attributes)

    def event(
        self, name: str, attributes: Attributes | None = None, *, at_s: float | None = None
    ) -> None:
        """Add something that happened at one moment."""
        self._span.add_event(name, attributes, self._time_ns(at_s))

    def fail(self, reason: str) -> None:
        """Mark it as ended by an error; `reason` is stable, lower-kebab."""
        self._span.set_attribute("error.type", reason)
        self._span.set_status(otel.Status(otel.StatusCode.ERROR, reason))

    def end(self, *, at_s: float | None = None) -> None:
        """End it; only the first end counts."""
        if self._span.is_recording():
            self._span.end(self._time_ns(at_s))

    def __enter__(self) -> Self:
        self._token = span_var.set(self)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._token is not None:
            span_var.reset(self._token)
        if isinstance(error, asyncio.CancelledError | GeneratorExit):
            self.set({"paceline.is_cancelled": True})
        elif error is not None:
            self.fail(error.reason if isinstance(error, PacelineError) else "internal")
        self.end()

    def _time_ns(self, at_s: float | None) -> int:
        """Return the wall time of a moment by the monotonic clock, by default of now."""
        now_ns = time.monotonic_ns() if at_s is None else int(at_s * 1e9)
        return now_ns + self._offset_ns


class SpanQueue(SpanProcessor):
    """Ended spans on their way to the collector."""

    def __init__(
        self, exporter: SpanExporter, endpoint: str, on_dropped: Callable[[int], None]
    ) -> None:
        self._exporter = exporter
        self._endpoint = endpoint
        self._on_dropped = on_dropped
        self._spans: deque[ReadableSpan] = deque()
        self._is_due = threading.Event()
        self._is_closing = False
        self._is_failing = False
        self._thread = threading.Thread(target=self._run, name="trace-export", daemon=True)
        self._thread.start()

    def on_end(self, span: ReadableSpan) -> None:
        """Take a span, or count it as dropped; never waits."""
        if self._is_closing or len(self._spans) >= QUEUE_SPANS:
            self._on_dropped(1)
            return
        self._spans.append(span)
        if len(self._spans) >= BATCH_SPANS:
            self._is_due.set()

    def close(self, timeout_s: float) -> None:
        """Send the rest, as far as there is time, and count what is left as dropped."""
        self._is_closing = True
        self._is_due.set()
        self._thread.join(timeout_s)
        # Ends a call that still waits for its answer.
        self._exporter.shutdown()
        left = len(self._take(QUEUE_SPANS))
        if left:
            self._on_dropped(left)

    def _run(self) -> None:
        while not self._is_closing:
            self._is_due.wait(SEND_EVERY_S)
            self._is_due.clear()
            self._send_batch()
            if len(self._spans) >= BATCH_SPANS:
                self._is_due.set()
        while self._spans:
            self._send_batch()

    def _send_batch(self) -> None:
        batch = self._take(BATCH_SPANS)
        if not batch:
            return
        try:
            is_sent = self._exporter.export(batch) is SpanExportResult.SUCCESS
        except Exception:
            # Whatever it was, it must not end the thread; the log line below tells of it.
            is_sent = False
        if not is_sent:
            self._on_dropped(len(batch))
        if is_sent is self._is_failing:
            self._is_failing = not is_sent
            event, level = ("traces-sent-again", logging.INFO)
            if self._is_failing:
                event, level = ("traces-not-sent", logging.WARNING)
            logger.log(level, event, extra={"fields": {"endpoint": self._endpoint}})

    def _take(self, most: int) -> list[ReadableSpan]:
        taken: list[ReadableSpan] = []
        with suppress(IndexError):
            while len(taken) < most:
                taken.append(self._spans.popleft())
        return taken


def _recorded(spans: Sequence[Span]) -> list[RecordedSpan]:
    return [span for span in spans if isinstance(span, RecordedSpan)]


def _remote(parent: TraceContext) -> Context:
    """Return the library's form of a context that came from elsewhere."""
    flags = otel.TraceFlags.SAMPLED if parent.is_sampled else otel.TraceFlags.DEFAULT
    context = otel.SpanContext(
        int(parent.trace_id, 16),
        int(parent.span_id, 16),
        is_remote=True,
        trace_flags=otel.TraceFlags(flags),
        trace_state=otel.TraceState.from_header([parent.state] if parent.state else []),
    )
    return otel.set_span_in_context(otel.NonRecordingSpan(context), Context())


def _context_of(span: otel.Span) -> TraceContext:
    context = span.get_span_context()
    return TraceContext(
        otel.format_trace_id(context.trace_id),
        otel.format_span_id(context.span_id),
        context.trace_flags.sampled,
        context.trace_state.to_header(),
    )
