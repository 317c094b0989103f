"""What happens around every call on our servers: request id, trace, decoding, errors, metrics.

A streaming call ends when its client stops reading, so that nothing is held for nobody. Holds
the one table from our errors to gRPC codes. Unknown errors reach the client as a fixed text
with the request id: Python's own text would leak internals.
"""

from __future__ import annotations

import asyncio
import inspect
import logging
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import aclosing, asynccontextmanager, contextmanager, suppress
from typing import Any

import grpc
from google.protobuf import any_pb2, duration_pb2
from google.rpc import (  # type: ignore[import-untyped]
    code_pb2,
    error_details_pb2,
    status_pb2,
)
from grpc_status import rpc_status

from paceline.domain.errors import (
    AlreadyExistsError,
    CorruptDraftError,
    DeadlineError,
    ExhaustedError,
    InternalError,
    InvalidRequestError,
    NotFoundError,
    PacelineError,
    PermissionDeniedError,
    PreconditionError,
    RequestCancelledError,
    UnauthenticatedError,
    UnavailableError,
    UnimplementedError,
)
from paceline.process.logs import request_id_var
from paceline.process.metrics import Metrics
from paceline.process.spans import NO_SPAN, NO_TRACER, Span, Tracer, span_var
from paceline.rpc.trace_metadata import trace_context, trace_trailers

logger = logging.getLogger(__name__)

REQUEST_ID_KEY = "x-request-id"
ERROR_DOMAIN = "paceline"
SLOW_CLIENT_REASON = "slow-client"

WRITE_TIMEOUT_S = 30.0
"""A client that reads nothing for this long is taken for gone: its work ends."""

_MAX_REQUEST_ID_CHARS = 128
_HEALTH_PREFIX = "/grpc.health.v1."
_REFLECTION_PREFIX = "/grpc.reflection."

_DEADLINE_SLACK_S = 0.05
"""A client whose own timer fires first cancels this much before the deadline it sent."""

CODES: tuple[tuple[type[PacelineError], int], ...] = (
    (InvalidRequestError, code_pb2.INVALID_ARGUMENT),
    (UnauthenticatedError, code_pb2.UNAUTHENTICATED),
    (PermissionDeniedError, code_pb2.PERMISSION_DENIED),
    (NotFoundError, code_pb2.NOT_FOUND),
    (AlreadyExistsError, code_pb2.ALREADY_EXISTS),
    (PreconditionError, code_pb2.FAILED_PRECONDITION),
    (ExhaustedError, code_pb2.RESOURCE_EXHAUSTED),
    (UnavailableError, code_pb2.UNAVAILABLE),
    (DeadlineError, code_pb2.DEADLINE_EXCEEDED),
    (RequestCancelledError, code_pb2.CANCELLED),
    (CorruptDraftError, code_pb2.DATA_LOSS),
    (UnimplementedError, code_pb2.UNIMPLEMENTED),
    (InternalError, code_pb2.INTERNAL),
)


def status_of(error: PacelineError) -> status_pb2.Status:
    """Return the google.rpc status of an error, with its details."""
    code = next((code for kind, code in CODES if isinstance(error, kind)), code_pb2.INTERNAL)
    message = error.message
    metadata = {"request_id": request_id_var.get()}
    if code == code_pb2.INTERNAL:
        message = "internal error"
    details = [
        error_details_pb2.ErrorInfo(reason=error.reason, domain=ERROR_DOMAIN, metadata=metadata)
    ]
    if isinstance(error, InvalidRequestError):
        violation = error_details_pb2.BadRequest.FieldViolation(
            field=error.field, description=message
        )
        details.append(error_details_pb2.BadRequest(field_violations=[violation]))
        message = f"{error.field}: {message}"
    if isinstance(error, ExhaustedError | UnavailableError):
        delay = duration_pb2.Duration()
        delay.FromMilliseconds(int(error.retry_after_s * 1000))
        details.append(error_details_pb2.RetryInfo(retry_delay=delay))
    packed = []
    for detail in details:
        packed.append(any_pb2.Any())
        packed[-1].Pack(detail)
    return status_pb2.Status(code=code, message=message, details=packed)


class CallGate:
    """Counts the calls that run on a server, and refuses new ones once it is closed."""

    def __init__(self) -> None:
        self.is_closed = False
        self.is_idle = asyncio.Event()
        """Set while no call runs."""
        self.is_idle.set()
        self._num_running = 0

    @contextmanager
    def entered(self) -> Iterator[None]:
        """Count the block as a running call."""
        self._num_running += 1
        self.is_idle.clear()
        try:
            yield
        finally:
            self._num_running -= 1
            if self._num_running == 0:
                self.is_idle.set()

    def check(self, method: str) -> None:
        """Refuse a new call, unless it asks for the server's health.

        Raises:
            UnavailableError: the gate is closed.
        """
        if self.is_closed and not method.startswith(_HEALTH_PREFIX):
            raise UnavailableError("the server is draining", reason="draining")


class CallInterceptor(grpc.aio.ServerInterceptor):
    """Wraps all handlers but those of reflection, whose streams would hold a drain."""

    def __init__(
        self,
        metrics: Metrics,
        *,
        write_timeout_s: float = WRITE_TIMEOUT_S,
        tracer: Tracer = NO_TRACER,
        is_door: bool = False,
    ) -> None:
        """Count on `metrics`; end streams whose client reads nothing for `write_timeout_s`.

        Calls that bring a trace are part of it; at a door all others begin one, and clients are
        told its id.
        """
        self.gate = CallGate()
        self._metrics = metrics
        self._write_timeout_s = write_timeout_s
        self._tracer = tracer
        self._is_door = is_door

    async def intercept_service(self, continuation: Any, handler_call_details: Any) -> Any:
        """Return the handler with our behaviour around it."""
        handler = await continuation(handler_call_details)
        if handler is None or handler_call_details.method.startswith(_REFLECTION_PREFIX):
            return handler
        call = _Call(
            self._metrics,
            self.gate,
            handler_call_details.method,
            _request_id(handler_call_details.invocation_metadata),
            handler.request_deserializer,
            self._write_timeout_s,
            self._begin_span,
        )
        # No deserializer here: messages are decoded inside, where a bad one can be answered.
        wrap, method = _WRAPPERS[handler.request_streaming, handler.response_streaming]
        accept = call.accept_all if handler.request_streaming else call.accept
        around = call.around_stream if handler.response_streaming else call.around_unary
        return wrap(around(getattr(handler, method), accept), None, handler.response_serializer)

    def _begin_span(self, method: str, context: Any) -> Span:
        """Begin the span of a call, and have the client told of its trace."""
        parent = trace_context(context.invocation_metadata())
        begins_trace = self._is_door and not method.startswith(_HEALTH_PREFIX)
        if parent is None and not begins_trace:
            return NO_SPAN
        attributes = {"rpc.system.name": "grpc", "rpc.method": method[1:]}
        span = self._tracer.begin(method[1:], parent, attributes, kind="server")
        if begins_trace:
            has_parent = parent is not None
            context.set_trailing_metadata(trace_trailers(span.context, has_parent=has_parent))
        return span


_WRAPPERS: dict[tuple[bool, bool], tuple[Callable[..., Any], str]] = {
    (False, False): (grpc.unary_unary_rpc_method_handler, "unary_unary"),
    (False, True): (grpc.unary_stream_rpc_method_handler, "unary_stream"),
    (True, False): (grpc.stream_unary_rpc_method_handler, "stream_unary"),
    (True, True): (grpc.stream_stream_rpc_method_handler, "stream_stream"),
}
"""By whether request and response stream: what wraps a handler, and its attribute."""


class _SlowClientError(Exception):
    """The client did not read for too long."""


class _Call:
    """One call: from the bytes of its request to its counted end."""

    def __init__(
        self,
        metrics: Metrics,
        gate: CallGate,
        method: str,
        request_id: str,
        decode: Callable[[bytes], Any],
        write_timeout_s: float,
        begin_span: Callable[[str, Any], Span],
    ) -> None:
        self._metrics = metrics
        self._gate = gate
        self._method = method
        self._request_id = request_id
        self._decode = decode
        self._write_timeout_s = write_timeout_s
        self._begin_span = begin_span
        self._span = NO_SPAN
        self._started_s = time.perf_counter()

    def around_unary(self, method: Any, accept: Callable[[Any], Any]) -> Any:
        """Return a handler of bytes around a method that returns its response."""

        async def handle(data: Any, context: Any) -> Any:
            async with self._guard(context):
                return await method(accept(data), context)

        return handle

    def around_stream(self, method: Any, accept: Callable[[Any], Any]) -> Any:
        """Return a handler of bytes around a method that yields or writes its responses."""

        async def handle(data: Any, context: Any) -> None:
            async with self._guard(context):
                responses = method(accept(data), context)
                if inspect.isawaitable(responses):
                    await responses
                    return
                async with aclosing(responses):
                    async for response in responses:
                        await self._write(context, response)

        return handle

    def accept(self, data: bytes) -> Any:
        """Return the request, if the call may run."""
        self._gate.check(self._method)
        return self._decoded(data)

    def accept_all(self, stream: AsyncIterator[bytes]) -> AsyncIterator[Any]:
        """Return the stream of requests, if the call may run."""
        self._gate.check(self._method)
        return self._decoded_all(stream)

    async def _decoded_all(self, stream: AsyncIterator[bytes]) -> AsyncIterator[Any]:
        async for data in stream:
            yield self._decoded(data)

    def _decoded(self, data: bytes) -> Any:
        try:
            return self._decode(data)
        except Exception as error:
            raise InvalidRequestError(
                "request", "the message cannot be decoded", reason="undecodable-message"
            ) from error

    @asynccontextmanager
    async def _guard(self, context: Any) -> AsyncIterator[None]:
        """Set the request id and the span, map errors, count how the call ended."""
        request_id_var.set(self._request_id)
        self._span = self._begin_span(self._method, context)
        span_var.set(self._span)
        try:
            with self._gate.entered():
                yield
        except asyncio.CancelledError:
            left_s = context.time_remaining()
            is_late = left_s is not None and left_s < _DEADLINE_SLACK_S
            self._count("DEADLINE_EXCEEDED" if is_late else "CANCELLED", "")
            raise
        except grpc.aio.AbortError:
            self._count(getattr(context.code(), "name", "UNKNOWN"), "aborted")
            raise
        except _SlowClientError:
            self._count("ABORTED", SLOW_CLIENT_REASON)
            fields = {"method": self._method, "timeout_s": self._write_timeout_s}
            logger.warning(SLOW_CLIENT_REASON, extra={"fields": fields})
            await _end(context, grpc.StatusCode.ABORTED, SLOW_CLIENT_REASON)
        except Exception as error:
            await self._abort(context, error)
        else:
            self._count("OK", "")

    async def _write(self, context: Any, response: Any) -> None:
        try:
            async with asyncio.timeout(self._write_timeout_s):
                await context.write(response)
        except TimeoutError as error:
            raise _SlowClientError from error
        except grpc.aio.InternalError as error:
            # The client left; its cancellation is about to arrive as well.
            raise asyncio.CancelledError from error

    async def _abort(self, context: Any, error: Exception) -> None:
        if not isinstance(error, PacelineError):
            fields = {"method": self._method}
            logger.error("unexpected-error", exc_info=error, extra={"fields": fields})
            error = InternalError(str(error))
        elif isinstance(error, InternalError):
            fields = {"method": self._method, "reason": error.reason, "error": error.message}
            logger.error("internal-error", extra={"fields": fields})
        status = status_of(error)
        self._count(code_pb2.Code.Name(status.code), error.reason)
        wire: Any = rpc_status.to_status(status)
        trailing = (*(context.trailing_metadata() or ()), *wire.trailing_metadata)
        await _end(context, wire.code, wire.details, trailing)

    def _count(self, code: str, reason: str) -> None:
        """Count how the call ended, and end its span."""
        self._metrics.rpc_requests.labels(self._method, code, reason).inc()
        self._metrics.rpc_seconds.labels(self._method).observe(
            time.perf_counter() - self._started_s
        )
        self._span.set({"rpc.response.status_code": code})
        if code not in ("OK", "CANCELLED"):
            self._span.fail(reason or code.lower())
        self._span.end()


async def _end(context: Any, code: grpc.StatusCode, details: str, trailing: Any = ()) -> None:
    """Abort the call; its status waits behind unread data, and is lost if the client leaves."""
    with suppress(grpc.aio.InternalError):
        await context.abort(code, details, trailing)


def sane_request_id(text: str) -> str:
    """Return the id, or nothing where it is not fit for metadata and log lines."""
    is_sane = len(text) <= _MAX_REQUEST_ID_CHARS and text.isascii() and text.isprintable()
    return text if is_sane else ""


def _request_id(metadata: Any) -> str:
    for key, value in metadata or ():
        if key == REQUEST_ID_KEY and isinstance(value, str):
            return sane_request_id(value)
    return ""
