"""Metrics of every process: what it is, its event loop, its calls and its link to Redis."""

from __future__ import annotations

from paceline.process.metrics.declaration import SERVICES, Area, counter, gauge, seconds
from paceline.process.metrics.labelled import Label

_CODES = (
    "OK", "CANCELLED", "UNKNOWN", "INVALID_ARGUMENT", "DEADLINE_EXCEEDED", "NOT_FOUND",
    "ALREADY_EXISTS", "PERMISSION_DENIED", "RESOURCE_EXHAUSTED", "FAILED_PRECONDITION", "ABORTED",
    "OUT_OF_RANGE", "UNIMPLEMENTED", "INTERNAL", "UNAVAILABLE", "DATA_LOSS", "UNAUTHENTICATED",
)  # fmt: skip

_METHOD = Label("method", "full name of the gRPC method", max_values=24)
_GENERATION = Label("generation", "of the collector, 2 is the whole heap", ("0", "1", "2"))


class PlatformArea(Area):
    """What all processes have."""

    title = "Every process"
    exported_by = frozenset(SERVICES)

    build_info = gauge(
        "Constant 1; the labels tell the process.",
        "",
        Label("service", "kind of process", max_values=1),
        Label("model_name", "served model, empty where the process serves none", max_values=1),
        Label("version", "of paceline", max_values=1),
    )
    tasks = gauge("Live tasks of the event loop.", "tasks")
    event_loop_delay_seconds = seconds("How late the event loop calls what is due, ten per second.")
    gc_collections = counter("Garbage collections.", "collections", _GENERATION)
    gc_seconds = counter("Time in garbage collections.", "seconds", _GENERATION)
    redis_up = gauge("1 while Redis answers this process.", "")
    redis_seconds = seconds("Duration of calls to Redis, failed ones included.")
    rpc_requests = counter(
        "Finished gRPC calls.",
        "calls",
        _METHOD,
        Label("code", "gRPC status code", _CODES),
        Label("reason", "reason of the error, empty without one", max_values=64),
        # A server makes those of its methods when it is built.
        zeros=(),
        limit=256,
    )
    rpc_seconds = seconds("Duration of gRPC calls.", _METHOD)
    trace_spans_dropped = counter("Spans that did not reach the collector.", "spans")
    metrics_label_overflow = counter(
        "Observations counted as `other` since a label had its most values.",
        "observations",
        Label("metric", "the metric", max_values=64),
    )
