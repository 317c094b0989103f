"""W3C trace context in the metadata of calls, and what clients are told of their trace."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from paceline.process.spans import TraceContext, parse_traceparent

TRACE_ID_KEY = "paceline-trace-id"
"""Trailing metadata of every call of a client: its trace id, 32 hexadecimal digits."""

PARENT_KEY = "traceparent"
STATE_KEY = "tracestate"

Metadata = tuple[tuple[str, str], ...]


def trace_metadata(context: TraceContext) -> Metadata:
    """Return the metadata that hands a trace on; none outside a trace."""
    if not context.trace_id:
        return ()
    parent = (PARENT_KEY, context.traceparent)
    return (parent, (STATE_KEY, context.state)) if context.state else (parent,)


def trace_context(metadata: Iterable[tuple[str, Any]] | None) -> TraceContext | None:
    """Return the caller's trace; None without one, or with one that makes no sense."""
    parents: list[str] = []
    states: list[str] = []
    for key, value in metadata or ():
        if key == PARENT_KEY and isinstance(value, str):
            parents.append(value)
        elif key == STATE_KEY and isinstance(value, str):
            states.append(value)
    return parse_traceparent(parents[0], ",".join(states)) if len(parents) == 1 else None


def trace_trailers(context: TraceContext, *, has_parent: bool) -> Metadata:
    """Return what a client is told: its trace id, and where in its own trace the call was."""
    trace_id = (TRACE_ID_KEY, context.trace_id)
    return (trace_id, (PARENT_KEY, context.traceparent)) if has_parent else (trace_id,)
