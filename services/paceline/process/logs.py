"""Structured logs: one JSON line per event on stderr, with request and trace id of the context."""

from __future__ import annotations

import asyncio
import json
import logging
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar

from paceline.domain.errors import PacelineError
from paceline.process.spans import current_span

request_id_var: ContextVar[str] = ContextVar("request_id", default="")
"""Id of the request that the current task works for; set by the servers' interceptor."""


class JsonFormatter(logging.Formatter):
    """Formats a record as one JSON object; `extra={"fields": {...}}` adds fields."""

    def __init__(self, service: str) -> None:
        super().__init__()
        self._service = service

    def format(self, record: logging.LogRecord) -> str:
        """Return the line."""
        line: dict[str, object] = {
            "ts": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
            + f".{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "service": self._service,
            "logger": record.name,
            "event": record.getMessage(),
        }
        request_id = request_id_var.get()
        if request_id:
            line["request_id"] = request_id
        trace_id = current_span().context.trace_id
        if trace_id:
            line["trace_id"] = trace_id
        line.update(getattr(record, "fields", {}))
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


def setup_logging(service: str, level: str = "INFO") -> None:
    """Send all logs of the process to stderr as JSON lines. Called once, from a main.

    `level` is that of our own loggers; libraries stay at INFO, since their DEBUG is per frame.
    """
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter(service))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(max(logging.INFO, logging.getLevelNamesMapping()[level.upper()]))
    logging.getLogger("paceline").setLevel(level.upper())


@contextmanager
def logged_call(logger: logging.Logger, event: str) -> Iterator[dict[str, object]]:
    """Log one INFO line when the block ends: its fields, its duration and how it ended.

    The current span gets the fields as attributes.
    The outcome is "ok", "cancelled", or the reason of the error that left the block.
    """
    fields: dict[str, object] = {}
    outcome, started_s = "ok", time.perf_counter()
    try:
        yield fields
    except (asyncio.CancelledError, GeneratorExit):
        outcome = "cancelled"
        raise
    except Exception as error:
        outcome = error.reason if isinstance(error, PacelineError) else "internal"
        raise
    finally:
        duration_s = round(time.perf_counter() - started_s, 6)
        fields |= {"duration_s": duration_s, "outcome": outcome}
        logger.info(event, extra={"fields": fields})
        note_fields(fields)


def note_fields(fields: Mapping[str, object]) -> None:
    """Make the fields of a log line attributes of the current span; those without value not."""
    span = current_span()
    if span.is_recording:
        kinds = (str, bool, int, float, list)
        span.set({f"paceline.{k}": v for k, v in fields.items() if isinstance(v, kinds)})
