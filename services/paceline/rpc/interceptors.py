"""What happens around every call on our servers: request id, error mapping, metrics.

Holds the one table from our errors to gRPC codes. Unknown errors reach the client as a fixed
text with the request id: Python's own text would leak internals.
"""

from __future__ import annotations

import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import grpc
from google.protobuf import any_pb2, duration_pb2
from google.rpc import code_pb2, error_details_pb2, status_pb2
from grpc_status import rpc_status

from paceline.domain.errors import (
    AlreadyExistsError,
    DeadlineError,
    ExhaustedError,
    InternalError,
    InvalidRequestError,
    NotFoundError,
    PacelineError,
    PermissionDeniedError,
    RequestCancelledError,
    UnauthenticatedError,
    UnavailableError,
    UnimplementedError,
)
from paceline.process.logs import request_id_var
from paceline.process.metrics import Metrics

logger = logging.getLogger(__name__)

REQUEST_ID_KEY = "x-request-id"
ERROR_DOMAIN = "paceline"

CODES: tuple[tuple[type[PacelineError], int], ...] = (
    (InvalidRequestError, code_pb2.INVALID_ARGUMENT),
    (UnauthenticatedError, code_pb2.UNAUTHENTICATED),
    (PermissionDeniedError, code_pb2.PERMISSION_DENIED),
    (NotFoundError, code_pb2.NOT_FOUND),
    (AlreadyExistsError, code_pb2.ALREADY_EXISTS),
    (ExhaustedError, code_pb2.RESOURCE_EXHAUSTED),
    (UnavailableError, code_pb2.UNAVAILABLE),
    (DeadlineError, code_pb2.DEADLINE_EXCEEDED),
    (RequestCancelledError, code_pb2.CANCELLED),
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


class CallInterceptor(grpc.aio.ServerInterceptor):  # type: ignore[misc,unused-ignore]
    """Wraps unary and response-streaming handlers."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler]],
        details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler:
        """Return the handler with our behaviour around it."""
        handler: Any = await continuation(details)
        if handler is None or handler.request_streaming:
            return handler
        method = details.method
        metadata = {k: v for k, v in details.invocation_metadata or () if isinstance(v, str)}
        request_id = metadata.get(REQUEST_ID_KEY, "")
        if handler.response_streaming:
            return grpc.unary_stream_rpc_method_handler(
                self._around_stream(handler.unary_stream, method, request_id),
                handler.request_deserializer,
                handler.response_serializer,
            )
        return grpc.unary_unary_rpc_method_handler(
            self._around_unary(handler.unary_unary, method, request_id),
            handler.request_deserializer,
            handler.response_serializer,
        )

    def _around_unary(self, call: Any, method: str, request_id: str) -> Any:
        async def handle(request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> Any:
            request_id_var.set(request_id)
            started = time.perf_counter()
            try:
                response = await call(request, context)
            except Exception as error:
                await self._abort(context, method, started, error)
                raise
            self._count(method, started, "OK", "")
            return response

        return handle

    def _around_stream(self, call: Any, method: str, request_id: str) -> Any:
        async def handle(
            request: Any, context: grpc.aio.ServicerContext[Any, Any]
        ) -> AsyncIterator[Any]:
            request_id_var.set(request_id)
            started = time.perf_counter()
            responses = call(request, context)
            try:
                async for response in responses:
                    yield response
            except Exception as error:
                await self._abort(context, method, started, error)
                raise
            finally:
                await responses.aclose()
            self._count(method, started, "OK", "")

        return handle

    async def _abort(
        self,
        context: grpc.aio.ServicerContext[Any, Any],
        method: str,
        started: float,
        error: Exception,
    ) -> None:
        if isinstance(error, grpc.aio.AbortError):
            return
        if not isinstance(error, PacelineError):
            logger.error("unexpected-error", exc_info=error, extra={"fields": {"method": method}})
            error = InternalError(str(error))
        elif isinstance(error, InternalError):
            fields = {"method": method, "reason": error.reason, "error": error.message}
            logger.error("internal-error", extra={"fields": fields})
        status = status_of(error)
        self._count(method, started, code_pb2.Code.Name(status.code), error.reason)
        wire = rpc_status.to_status(status)
        await context.abort(wire.code, wire.details, wire.trailing_metadata)

    def _count(self, method: str, started: float, code: str, reason: str) -> None:
        self._metrics.rpc_requests.labels(method, code, reason).inc()
        self._metrics.rpc_seconds.labels(method).observe(time.perf_counter() - started)
