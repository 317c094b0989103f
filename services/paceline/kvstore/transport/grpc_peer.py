"""Blocks over the network: the peer's Fetch call, raw bytes in pieces."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence

import grpc

from paceline.domain.errors import UnavailableError
from paceline.kvstore import wire
from paceline.kvstore.values import FetchedBlock, KvLayoutInfo
from paceline.rpc.channel import map_rpc_error, open_channel, request_metadata
from paceline.v1 import kvstore_pb2

REASON = "kv-peer-unavailable"


class GrpcTransport:
    """One channel to one peer."""

    def __init__(self, address: str) -> None:
        self._channel = open_channel(address)
        self._stub = wire.node_stub(self._channel)

    async def fetch(
        self, keys: Sequence[bytes], layout: KvLayoutInfo, timeout_s: float
    ) -> AsyncGenerator[FetchedBlock]:
        """Yield the blocks the peer has; a block that comes short or long is yielded so."""
        request = kvstore_pb2.FetchRequest(layout=wire.layout_to_proto(layout), keys=keys)
        call = self._stub.Fetch(request, timeout=timeout_s, metadata=request_metadata())
        first: kvstore_pb2.FetchResponse | None = None
        data = bytearray()
        try:
            async for piece in call:
                if piece.key:
                    if first is not None:
                        yield _block(first, data)
                    first, data = piece, bytearray()
                # A peer that never stops sending must not fill our memory.
                room = layout.block_bytes + 1 - len(data)
                data += piece.data[:room]
            if first is not None:
                yield _block(first, data)
        except grpc.aio.AioRpcError as error:
            message = map_rpc_error(error).message
            raise UnavailableError(message, reason=REASON) from error
        finally:
            call.cancel()

    async def close(self) -> None:
        """Close the channel."""
        await self._channel.close()


def _block(first: kvstore_pb2.FetchResponse, data: bytearray) -> FetchedBlock:
    return FetchedBlock(first.key, first.checksum, first.num_tokens, first.is_request_scoped, data)
