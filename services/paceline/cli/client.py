"""Talks to the public gRPC door. Only draft_client.py and fleet_control.py know gRPC, too."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import grpc
from google.rpc import code_pb2  # type: ignore[import-untyped]
from grpc_health.v1 import health_pb2, health_pb2_grpc

from paceline.domain.errors import InvalidRequestError, PacelineError
from paceline.process.spans import current_span
from paceline.rpc.channel import map_rpc_error, open_channel
from paceline.rpc.interceptors import CODES
from paceline.rpc.trace_metadata import TRACE_ID_KEY, trace_metadata
from paceline.v1 import inference_pb2, inference_pb2_grpc

DEFAULT_ENDPOINT = "127.0.0.1:50051"
SERVICE = "paceline.v1.InferenceService"


class InferenceClient:
    """Calls one gateway; every call has a deadline."""

    def __init__(self, channel: grpc.aio.Channel, api_key: str | None = None) -> None:
        self._stub: Any = inference_pb2_grpc.InferenceServiceStub(channel)
        self._metadata = (("authorization", f"Bearer {api_key}"),) if api_key else ()
        self.trace_id = ""
        """What the gateway said of the last call that ended; empty if it said nothing."""

    async def generate(
        self, request: inference_pb2.GenerateRequest, timeout_s: float
    ) -> AsyncIterator[inference_pb2.GenerateResponse]:
        """Stream an answer; closing the iterator cancels the request.

        Raises:
            PacelineError: what the gateway says, or what the transport met.
        """
        metadata = (*self._metadata, *trace_metadata(current_span().context))
        call = self._stub.Generate(request, metadata=metadata, timeout=timeout_s)
        try:
            async for response in call:
                yield response
            self.trace_id = _trace_id(await call.trailing_metadata())
        except grpc.aio.AioRpcError as error:
            self.trace_id = _trace_id(error.trailing_metadata())
            raise map_rpc_error(error) from error
        finally:
            call.cancel()


def _trace_id(trailers: Any) -> str:
    return next((str(value) for key, value in trailers or () if key == TRACE_ID_KEY), "")


@asynccontextmanager
async def open_client(endpoint: str, api_key: str | None = None) -> AsyncIterator[InferenceClient]:
    """Open a client for the length of a block."""
    channel = open_channel(endpoint)
    try:
        yield InferenceClient(channel, api_key)
    finally:
        await channel.close()


async def is_serving(address: str, service: str = SERVICE, timeout_s: float = 1.0) -> bool:
    """Tell whether the health of a service is SERVING."""
    channel = open_channel(address)
    try:
        request = health_pb2.HealthCheckRequest(service=service)
        reply = await health_pb2_grpc.HealthStub(channel).Check(request, timeout=timeout_s)
    except grpc.aio.AioRpcError:
        return False
    finally:
        await channel.close()
    return bool(reply.status == health_pb2.HealthCheckResponse.SERVING)


def describe_error(error: PacelineError) -> str:
    """Return one line: gRPC code, reason, field where there is one, message."""
    number = next((code for kind, code in CODES if isinstance(error, kind)), code_pb2.INTERNAL)
    field = f"{error.field}: " if isinstance(error, InvalidRequestError) and error.field else ""
    message = " ".join(error.message.split())
    return f"{code_pb2.Code.Name(number)} ({error.reason}): {field}{message}"
