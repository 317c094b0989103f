"""Opens channels to other processes and reads their errors back into ours."""

from __future__ import annotations

from typing import Any

import grpc
from google.rpc import code_pb2, error_details_pb2  # type: ignore[import-untyped]
from grpc_status import rpc_status

from paceline.domain.errors import (
    ExhaustedError,
    InternalError,
    InvalidRequestError,
    PacelineError,
    UnavailableError,
)
from paceline.process.logs import request_id_var
from paceline.process.spans import Span, current_span
from paceline.rpc.interceptors import CODES, REQUEST_ID_KEY, sane_request_id
from paceline.rpc.trace_metadata import trace_metadata

_KINDS = {code: kind for kind, code in CODES}


def open_channel(address: str) -> grpc.aio.Channel:
    """Open a channel of its own connection; the caller closes it."""
    return grpc.aio.insecure_channel(
        address,
        options=[
            ("grpc.use_local_subchannel_pool", 1),
            ("grpc.max_receive_message_length", -1),
            ("grpc.max_send_message_length", -1),
            ("grpc.keepalive_time_ms", 10_000),
            ("grpc.keepalive_timeout_ms", 5_000),
            ("grpc.keepalive_permit_without_calls", 1),
            # A restarted peer should be found within a second, not after a minute.
            ("grpc.initial_reconnect_backoff_ms", 100),
            ("grpc.max_reconnect_backoff_ms", 1_000),
        ],
    )


def request_metadata(span: Span | None = None) -> tuple[tuple[str, str], ...]:
    """Return the metadata that carries the request's id and trace to the next hop.

    What happens there is part of `span`, by default of the current one.
    """
    request_id = sane_request_id(request_id_var.get())
    entries = ((REQUEST_ID_KEY, request_id),) if request_id else ()
    return (*entries, *trace_metadata((span or current_span()).context))


def map_rpc_error(error: grpc.aio.AioRpcError) -> PacelineError:
    """Return our error for a failed call; reason, field, delay and message survive the wire."""
    code = error.code().value[0]
    reason, field, retry_after_s = None, "", 1.0
    status: Any = rpc_status.from_call(error)
    for detail in status.details if status is not None else ():
        info, bad = error_details_pb2.ErrorInfo(), error_details_pb2.BadRequest()
        retry = error_details_pb2.RetryInfo()
        if detail.Unpack(info):
            reason = info.reason
        elif detail.Unpack(bad) and bad.field_violations:
            field = bad.field_violations[0].field
        elif detail.Unpack(retry):
            retry_after_s = retry.retry_delay.ToMilliseconds() / 1000
    message = error.details() or error.code().name
    if code == code_pb2.INVALID_ARGUMENT:
        return InvalidRequestError(field, message.removeprefix(f"{field}: "), reason=reason)
    # A server that stops cancels calls that have just arrived, without a reason of ours.
    was_cut_off = code == code_pb2.CANCELLED and reason is None
    if code == code_pb2.UNAVAILABLE or was_cut_off:
        reason = reason or "peer-unavailable"
        return UnavailableError(message, retry_after_s=retry_after_s, reason=reason)
    if code == code_pb2.RESOURCE_EXHAUSTED:
        return ExhaustedError(message, retry_after_s=retry_after_s, reason=reason)
    return _KINDS.get(code, InternalError)(message, reason=reason)
