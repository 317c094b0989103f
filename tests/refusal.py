"""Reads the errors a client gets, with the public google.rpc types only."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import grpc
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from paceline.v1 import inference_pb2_grpc
from paceline.v1.inference_pb2 import GenerateRequest


@dataclass(frozen=True)
class Refusal:
    """What a failed call told its client."""

    code: grpc.StatusCode
    message: str
    reason: str = ""
    field: str = ""
    retry_s: float | None = None


def refusal_of(error: Any) -> Refusal:
    """Unpack a failed call."""
    reason, field, retry_s = "", "", None
    status = rpc_status.from_call(error)
    for detail in status.details if status is not None else ():
        info = error_details_pb2.ErrorInfo()
        bad = error_details_pb2.BadRequest()
        retry = error_details_pb2.RetryInfo()
        if detail.Unpack(info):
            reason = info.reason
        elif detail.Unpack(bad):
            field = bad.field_violations[0].field
        elif detail.Unpack(retry):
            retry_s = retry.retry_delay.ToMilliseconds() / 1000
    return Refusal(error.code(), error.details(), reason, field, retry_s)


def refused(
    channel: grpc.Channel,
    request: GenerateRequest | bytes,
    *,
    timeout_s: float = 20.0,
    metadata: tuple[tuple[str, str], ...] = (),
) -> Refusal:
    """Send a request that must fail before any token; return why it did."""
    serialise: Callable[[Any], bytes] = (
        bytes if isinstance(request, bytes) else GenerateRequest.SerializeToString
    )
    call = channel.unary_stream(
        "/paceline.v1.InferenceService/Generate", request_serializer=serialise
    )
    received = []
    try:
        for response in call(request, timeout=timeout_s, metadata=metadata):
            received.append(response)
    except grpc.RpcError as error:
        assert received == [], "tokens before the error"
        return refusal_of(error)
    raise AssertionError("the request was answered")


def stub_of(channel: grpc.Channel) -> Any:
    """Return the public service on a channel."""
    return inference_pb2_grpc.InferenceServiceStub(channel)
