"""Talks to the trainer's draft registry over gRPC, for `paceline draft`."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc

from paceline.domain.draft_records import DraftRecord
from paceline.rpc.channel import map_rpc_error, open_channel
from paceline.rpc.record_codec import record_from_proto
from paceline.v1 import drafts_pb2, drafts_pb2_grpc

CALL_TIMEOUT_S = 60.0
"""Changes verify and copy files."""

OFFER_TIMEOUT_S = 600.0
"""Sending a checkpoint, and a gate that replays traffic with it."""

_PIECE_BYTES = 256 * 1024


class DraftClient:
    """Calls one trainer; every call has a deadline and raises PacelineError."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self._stub: Any = drafts_pb2_grpc.DraftServiceStub(channel)

    async def list(self, drafter: str = "") -> list[DraftRecord]:
        """Return the versions, newest first."""
        request = drafts_pb2.ListDraftsRequest(drafter=drafter)
        response = await self._call(self._stub.ListDrafts, request)
        return [record_from_proto(record) for record in response.drafts]

    async def get(self, version: str) -> DraftRecord:
        """Return one version."""
        return await self._record(self._stub.GetDraft, drafts_pb2.GetDraftRequest(version=version))

    async def rollback(self, drafter: str, version: str) -> DraftRecord:
        """Go back; return who is active now."""
        request = drafts_pb2.RollbackDraftRequest(drafter=drafter, version=version)
        return await self._record(self._stub.RollbackDraft, request)

    async def pin(self, drafter: str, version: str) -> DraftRecord:
        """Pin a version, or unpin; return who is active now."""
        request = drafts_pb2.PinDraftRequest(drafter=drafter, version=version)
        return await self._record(self._stub.PinDraft, request)

    async def remove(self, drafter: str) -> DraftRecord:
        """Take a drafter out of the bank; return the version that was active."""
        request = drafts_pb2.RemoveDrafterRequest(drafter=drafter)
        return await self._record(self._stub.RemoveDrafter, request)

    async def offer(self, paths: Sequence[Path], drafter: str, is_forced: bool) -> DraftRecord:
        """Send a checkpoint's files; return its record.

        Raises:
            OSError: a file cannot be read.
        """

        async def pieces() -> AsyncIterator[drafts_pb2.OfferDraftRequest]:
            yield drafts_pb2.OfferDraftRequest(drafter=drafter, is_forced=is_forced)
            for path in paths:
                for data in _read(path):
                    yield drafts_pb2.OfferDraftRequest(file=path.name, data=data)

        return await self._record(self._stub.OfferDraft, pieces(), OFFER_TIMEOUT_S)

    async def _record(
        self, method: Any, request: Any, timeout_s: float = CALL_TIMEOUT_S
    ) -> DraftRecord:
        response = await self._call(method, request, timeout_s)
        return record_from_proto(response.draft)

    async def _call(self, method: Any, request: Any, timeout_s: float = CALL_TIMEOUT_S) -> Any:
        try:
            return await method(request, timeout=timeout_s)
        except grpc.aio.AioRpcError as error:
            raise map_rpc_error(error) from error


@asynccontextmanager
async def open_draft_client(address: str) -> AsyncIterator[DraftClient]:
    """Open a client for the length of a block."""
    channel = open_channel(address)
    try:
        yield DraftClient(channel)
    finally:
        await channel.close()


def _read(path: Path) -> Iterator[bytes]:
    """Yield a file's bytes, at least one piece."""
    with open(path, "rb") as file:
        yield file.read(_PIECE_BYTES)
        while data := file.read(_PIECE_BYTES):
            yield data
