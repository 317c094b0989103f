"""Trace ids and spans as all code sees them; nothing here is recorded.

Every request has a trace id: the client's (W3C traceparent) or a drawn one. It is in the logs
and travels with calls whether or not spans are exported. While they are not, one `Span` without
state of its own stands for all spans of a request, so that a span costs some 0.2 µs and tokens
cost nothing. tracing.py, imported only where an endpoint is set, makes spans that are recorded.
Times are those of time.monotonic(), which all processes of a machine share.
"""

from __future__ import annotations

import importlib.util
import os
import re
from collections.abc import Callable, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from types import TracebackType
from typing import Literal, Self
from urllib.parse import urlsplit

Attributes = Mapping[str, str | bool | int | float | Sequence[str]]
Kind = Literal["internal", "server", "client"]

FLUSH_TIMEOUT_S = 2.0
"""How long the end of a process may wait for its last spans to be sent."""

_TRACEPARENT = re.compile(r"([0-9a-f]{2})-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})(-.*)?")
_MAX_STATE_CHARS = 512
_SAMPLED = 1
_EXPORTER = "opentelemetry.exporter.otlp.proto.grpc"


@dataclass(frozen=True, slots=True)
class TraceContext:
    """Where in which trace something happens, as W3C trace context tells it."""

    trace_id: str = ""
    """32 hexadecimal digits; empty outside any request."""
    span_id: str = ""
    """16 hexadecimal digits."""
    is_sampled: bool = False
    state: str = ""
    """Other vendors' entries, passed on as they came."""

    @property
    def traceparent(self) -> str:
        """The header that hands it on."""
        return f"00-{self.trace_id}-{self.span_id}-0{int(self.is_sampled)}"


NO_CONTEXT = TraceContext()


def parse_traceparent(text: str, state: str = "") -> TraceContext | None:
    """Return the context of a header; None for one that is malformed, which is to be ignored."""
    match = _TRACEPARENT.fullmatch(text)
    if match is None:
        return None
    version, trace_id, span_id, flags, rest = match.groups()
    if version == "ff" or (version == "00" and rest) or not (trace_id.strip("0")):
        return None
    if not span_id.strip("0"):
        return None
    if len(state) > _MAX_STATE_CHARS or not (state.isascii() and state.isprintable()):
        state = ""
    return TraceContext(trace_id, span_id, bool(int(flags, 16) & _SAMPLED), state)


def draw_context() -> TraceContext:
    """Return the beginning of a trace that nobody records."""
    ids = os.urandom(24).hex()
    return TraceContext(ids[:32], ids[32:])


class Span:
    """A place in a trace that is not recorded: its children are itself.

    As a context manager a span is the current one within the block and ends with it. In a
    generator, whose caller would see it as current, `end` is called instead.
    """

    __slots__ = ("context",)

    is_recording = False
    """Whether it is of use to tell it something; guards what takes time to find out."""

    def __init__(self, context: TraceContext) -> None:
        self.context = context

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
        return self

    def set(self, attributes: Attributes) -> None:
        """Add attributes."""

    def event(
        self, name: str, attributes: Attributes | None = None, *, at_s: float | None = None
    ) -> None:
        """Add something that happened at one moment."""

    def fail(self, reason: str) -> None:
        """Mark it as ended by an error; `reason` is stable, lower-kebab."""

    def end(self, *, at_s: float | None = None) -> None:
        """End it; only the first end counts."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        return None


NO_SPAN = Span(NO_CONTEXT)

span_var: ContextVar[Span] = ContextVar("span", default=NO_SPAN)
"""Span that the current task works for; set by the servers' interceptor and by blocks."""


def current_span() -> Span:
    """Return the span that the current task works for."""
    return span_var.get()


def span(name: str, attributes: Attributes | None = None, *, kind: Kind = "internal") -> Span:
    """Begin a span under the current one, to be used as a block."""
    return span_var.get().child(name, attributes, kind=kind)


class Tracer:
    """Begins traces that nobody records."""

    def begin(
        self,
        name: str,
        parent: TraceContext | None,
        attributes: Attributes | None = None,
        *,
        kind: Kind = "internal",
    ) -> Span:
        """Begin this process's part of a trace, or a trace where there is no parent."""
        return Span(parent or draw_context())

    def close(self, timeout_s: float = FLUSH_TIMEOUT_S) -> None:
        """Send what is not sent yet, within a time; blocks."""


NO_TRACER = Tracer()


def check_endpoint(url: str) -> None:
    """Check that spans could be sent to an endpoint; empty is fine.

    Raises:
        ValueError: it is no http(s) URL, or the packages of the extra are missing.
    """
    if not url:
        return
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError("must be http://host:port or https://host:port")
    try:
        is_there = importlib.util.find_spec(_EXPORTER) is not None
    except ModuleNotFoundError:
        is_there = False
    if not is_there:
        raise ValueError("needs the extra `tracing`: pip install 'paceline[tracing]'")


def create_tracer(
    endpoint: str,
    sample_ratio: float,
    resource: Mapping[str, str],
    on_dropped: Callable[[int], None] = lambda num_spans: None,
) -> Tracer:
    """Return a tracer that sends to an OTLP endpoint over gRPC; without one nothing is recorded.

    Args:
        endpoint: what `check_endpoint` accepts.
        sample_ratio: share of the traces begun here that are recorded.
        resource: what is said of this process with all of its spans.
        on_dropped: hears, from any thread, how many spans were given up.
    """
    if not endpoint:
        return NO_TRACER
    from paceline.process.tracing import OtlpTracer

    return OtlpTracer(endpoint, sample_ratio, resource, on_dropped)
