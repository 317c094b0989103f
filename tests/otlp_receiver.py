"""An OTLP collector as far as tests need one: takes spans over gRPC and keeps them.

with OtlpReceiver() as receiver:
    ... PACELINE_OTLP_ENDPOINT=receiver.endpoint ...
    spans = receiver.trace(trace_id)
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import grpc
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc
from opentelemetry.proto.common.v1 import common_pb2

from tests.waiting import until_sync

ERROR = 2
"""Status code of a span that ended by an error."""


@dataclass(frozen=True)
class Event:
    """Something that happened within a span."""

    name: str
    time_ns: int
    attributes: dict[str, Any]


@dataclass(frozen=True)
class ReceivedSpan:
    """A span as it arrived."""

    name: str
    trace_id: str
    span_id: str
    parent_id: str
    start_ns: int
    end_ns: int
    attributes: dict[str, Any]
    events: list[Event]
    links: list[str]
    """Span ids."""
    status: int
    resource: dict[str, Any]

    @property
    def service(self) -> str:
        return str(self.resource["service.name"])

    def events_named(self, name: str) -> list[Event]:
        return [event for event in self.events if event.name == name]


class OtlpReceiver:
    """A server on a free port; `hang` lets calls wait until it is cleared or closed."""

    def __init__(self) -> None:
        self._spans: list[ReceivedSpan] = []
        self._go = threading.Event()
        self._go.set()
        self.num_calls = 0
        self._server = grpc.server(ThreadPoolExecutor(max_workers=8))
        trace_service_pb2_grpc.add_TraceServiceServicer_to_server(self, self._server)
        port = self._server.add_insecure_port("127.0.0.1:0")
        self.endpoint = f"http://127.0.0.1:{port}"

    def __enter__(self) -> Self:
        self._server.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._go.set()
        self._server.stop(None).wait()

    def hang(self) -> None:
        """Answer nobody from now on."""
        self._go.clear()

    def Export(
        self, request: trace_service_pb2.ExportTraceServiceRequest, context: object
    ) -> trace_service_pb2.ExportTraceServiceResponse:
        self.num_calls += 1
        self._go.wait()
        for resource in request.resource_spans:
            about = _attributes(resource.resource.attributes)
            for scope in resource.scope_spans:
                self._spans += [_span(span, about) for span in scope.spans]
        return trace_service_pb2.ExportTraceServiceResponse()

    @property
    def spans(self) -> list[ReceivedSpan]:
        """All that came so far."""
        return list(self._spans)

    def trace(self, trace_id: str) -> list[ReceivedSpan]:
        """Return the spans of a trace in the order of their start."""
        found = [span for span in self.spans if span.trace_id == trace_id]
        return sorted(found, key=lambda span: span.start_ns)

    def wait_for(
        self,
        trace_id: str,
        is_complete: Callable[[list[ReceivedSpan]], bool],
        timeout_s: float = 30.0,
    ) -> list[ReceivedSpan]:
        """Wait until a trace has what it should; return its spans."""
        try:
            until_sync(lambda: is_complete(self.trace(trace_id)), timeout_s)
        except AssertionError as error:
            names = [f"{span.service}:{span.name}" for span in self.trace(trace_id)]
            raise AssertionError(f"only {names} of {trace_id}") from error
        return self.trace(trace_id)


def _span(span: Any, resource: dict[str, Any]) -> ReceivedSpan:
    return ReceivedSpan(
        name=span.name,
        trace_id=span.trace_id.hex(),
        span_id=span.span_id.hex(),
        parent_id=span.parent_span_id.hex(),
        start_ns=span.start_time_unix_nano,
        end_ns=span.end_time_unix_nano,
        attributes=_attributes(span.attributes),
        events=[Event(e.name, e.time_unix_nano, _attributes(e.attributes)) for e in span.events],
        links=[link.span_id.hex() for link in span.links],
        status=span.status.code,
        resource=resource,
    )


def _attributes(pairs: Any) -> dict[str, Any]:
    return {pair.key: _value(pair.value) for pair in pairs}


def _value(value: common_pb2.AnyValue) -> Any:
    kind = value.WhichOneof("value")
    if kind == "array_value":
        return [_value(each) for each in value.array_value.values]
    return getattr(value, kind) if kind else None
