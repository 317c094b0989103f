"""Opens channels to other processes and reads their errors back into ours."""

from __future__ import annotations

from typing import Any

import grpc
from google.rpc import code_pb2, error_details_pb2
from grpc_status import rpc_status

from paceline.domain.errors import (
    ExhaustedError,
    InternalError,
    InvalidRequestError,
    PacelineError,
    UnavailableError,
)
from paceline.rpc.interceptors import CODES

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


def map_rpc_error(error: grpc.aio.AioRpcError) -> PacelineError:
    """Return our error for a failed call; reason, field and message survive the wire."""
    code = error.code().value[0]
    reason, field = None, ""
    status: Any = rpc_status.from_call(error)
    for detail in status.details if status is not None else ():
        info, bad = error_details_pb2.ErrorInfo(), error_details_pb2.BadRequest()
        if detail.Unpack(info):
            reason = info.reason
        elif detail.Unpack(bad) and bad.field_violations:
            field = bad.field_violations[0].field
    message = error.details() or error.code().name
    if code == code_pb2.INVALID_ARGUMENT:
        return InvalidRequestError(field, message.removeprefix(f"{field}: "), reason=reason)
    if code == code_pb2.UNAVAILABLE:
        return UnavailableError(message, reason=reason or "peer-unavailable")
    if code == code_pb2.RESOURCE_EXHAUSTED:
        return ExhaustedError(message, reason=reason)
    return _KINDS.get(code, InternalError)(message, reason=reason)
