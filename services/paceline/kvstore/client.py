"""A worker's side of a KV node: one session, and the calls made under it.

Bytes do not pass here; the engine process copies them from and to the arena. Used by
worker/kv_link.py on its event loop, and by transport/shm.py between nodes.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import grpc

from paceline.domain.errors import InvalidRequestError, PacelineError, UnavailableError
from paceline.kvstore import wire
from paceline.kvstore.values import ArenaInfo, KvLayoutInfo, PinnedBlock, Slot, WrittenBlock
from paceline.rpc.channel import map_rpc_error, open_channel, request_metadata
from paceline.v1 import kvstore_pb2

logger = logging.getLogger(__name__)

CALL_TIMEOUT_S = 2.0
"""Deadline of calls that only touch the node's books."""

ACQUIRE_TIMEOUT_S = 3.0
"""Deadline of an acquire: the node's own pull deadline (2 s) and the way there and back."""

SILENCE_S = 10.0
"""A node whose session stream is silent for ten heartbeats is taken for lost."""

GIVE_UP_S = 3.0
"""How long `run` tries one address; a restarted node may have another."""

_BACKOFF_S = (0.05, 0.1, 0.2, 0.5)

REASON = "kvstore-unavailable"
NOT_HERE_REASON = "kvstore-on-other-machine"


class KvNodeClient:
    """One session with one node. Set `on_arena` before `run` to follow the session."""

    def __init__(
        self,
        address: str,
        worker_id: str,
        layout: KvLayoutInfo,
        *,
        give_up_s: float = GIVE_UP_S,
        silence_s: float = SILENCE_S,
    ) -> None:
        self.on_arena: Callable[[ArenaInfo | None], Awaitable[None]] | None = None
        self._worker_id = worker_id
        self._layout = wire.layout_to_proto(layout)
        self._give_up_s = give_up_s
        self._silence_s = silence_s
        self._channel = open_channel(address)
        self._stub = wire.node_stub(self._channel)
        self._stream: Any = None
        self._arena: ArenaInfo | None = None

    @property
    def arena(self) -> ArenaInfo | None:
        """The running session, or None."""
        return self._arena

    async def attach(self) -> ArenaInfo:
        """Open a session; a former one of this client ends.

        Raises:
            UnavailableError: the node cannot be reached, or its arena is not on this machine.
            InvalidRequestError: the node refuses the layout.
        """
        self._end_session()
        request = kvstore_pb2.AttachRequest(worker_id=self._worker_id, layout=self._layout)
        stream = self._stub.Attach(request)
        try:
            async with asyncio.timeout(CALL_TIMEOUT_S):
                first = await _read(stream)
            info = wire.arena_from_proto(first)
            _check_file(info)
        except TimeoutError as error:
            stream.cancel()
            raise _unavailable("the node does not answer") from error
        except BaseException:
            stream.cancel()
            raise
        self._stream, self._arena = stream, info
        return info

    async def run(self) -> None:
        """Keep a session, telling `on_arena` each new one and None for each lost one.

        Raises:
            UnavailableError: the node was not reachable for a while; look up its address
                again and make another client.
        """
        failures, last_seen_s, is_told = 0, _now_s(), False
        while True:
            try:
                info = await self.attach()
                is_told = True
                await self._tell(info)
                failures = 0
                await self.follow()
            except InvalidRequestError as error:
                raise _unavailable(f"the node refuses the layout: {error.message}") from error
            except UnavailableError:
                if not is_told and _now_s() - last_seen_s > self._give_up_s:
                    raise
            finally:
                if is_told:
                    is_told, last_seen_s = False, _now_s()
                    self._end_session()
                    await self._tell(None)
            await asyncio.sleep(_BACKOFF_S[min(failures, len(_BACKOFF_S) - 1)])
            failures += 1

    async def follow(self) -> None:
        """Read the session's heartbeats until it is lost, which ends it here.

        Raises:
            UnavailableError: always; the session is over.
        """
        stream = self._stream
        try:
            while True:
                async with asyncio.timeout(self._silence_s):
                    await _read(stream)
        except TimeoutError as error:
            raise _unavailable("the node fell silent") from error
        finally:
            if stream is self._stream:
                self._end_session()

    async def reserve(self, num_slots: int) -> list[Slot]:
        """Reserve up to `num_slots` empty slots for this session; fewer if the arena is full.

        Raises:
            UnavailableError: no session, or the node does not answer.
        """
        request = kvstore_pb2.ReserveRequest(session_id=self._session(), num_slots=num_slots)
        response = await self._call(self._stub.Reserve, request)
        return [wire.slot_from_proto(slot) for slot in response.slots]

    async def commit(self, blocks: Sequence[WrittenBlock]) -> list[bytes]:
        """Make sealed slots readable; return the keys that are readable now.

        Raises:
            UnavailableError: no session, or the node does not answer.
        """
        request = kvstore_pb2.CommitRequest(
            session_id=self._session(), blocks=[wire.written_to_proto(b) for b in blocks]
        )
        response = await self._call(self._stub.Commit, request)
        return list(response.readable_keys)

    async def acquire(
        self, keys: Sequence[bytes], sources: Sequence[str], tail_key: bytes = b""
    ) -> list[PinnedBlock]:
        """Pin the leading blocks of `keys` that can be had, then the tail; never raises.

        `sources` are transport URIs of other nodes, best first, to pull missing blocks from.
        """
        if self._arena is None:
            return []
        request = kvstore_pb2.AcquireRequest(
            session_id=self._arena.session_id, keys=keys, sources=sources, tail_key=tail_key
        )
        try:
            response = await self._call(self._stub.Acquire, request, ACQUIRE_TIMEOUT_S)
        except PacelineError as error:
            logger.info("acquire-failed", extra={"fields": {"error": error.message}})
            return []
        return [wire.pinned_from_proto(block) for block in response.blocks]

    async def release(
        self,
        keys: Sequence[bytes],
        corrupt_keys: Sequence[bytes] = (),
        unused_slots: Sequence[Slot] = (),
    ) -> None:
        """End pins, report blocks whose bytes did not match, give back unwritten slots.

        Raises:
            UnavailableError: no session, or the node does not answer.
        """
        request = kvstore_pb2.ReleaseRequest(
            session_id=self._session(),
            keys=keys,
            corrupt_keys=corrupt_keys,
            unused_slots=[wire.slot_to_proto(slot) for slot in unused_slots],
        )
        await self._call(self._stub.Release, request)

    def restart(self) -> None:
        """End the session so that `run` opens another.

        For when an answer was lost: the node may hold slots that this side never heard of.
        """
        self._end_session()

    async def close(self) -> None:
        """End the session and the connection."""
        self._end_session()
        await self._channel.close()

    # -- session --------------------------------------------------------------------------

    def _end_session(self) -> None:
        stream, self._stream, self._arena = self._stream, None, None
        if stream is not None:
            stream.cancel()

    async def _tell(self, info: ArenaInfo | None) -> None:
        if self.on_arena is not None:
            await self.on_arena(info)

    def _session(self) -> str:
        if self._arena is None:
            raise _unavailable("no session with the node")
        return self._arena.session_id

    async def _call(self, method: Any, request: Any, timeout_s: float = CALL_TIMEOUT_S) -> Any:
        try:
            return await method(request, timeout=timeout_s, metadata=request_metadata())
        except grpc.aio.AioRpcError as error:
            raise _unavailable(map_rpc_error(error).message) from error


async def _read(stream: Any) -> kvstore_pb2.AttachResponse:
    try:
        message = await stream.read()
    except grpc.aio.AioRpcError as error:
        mapped = map_rpc_error(error)
        if isinstance(mapped, InvalidRequestError):
            raise mapped from error
        raise _unavailable(mapped.message) from error
    except asyncio.CancelledError:
        task = asyncio.current_task()
        if task is not None and task.cancelling():
            raise
        # The stream was cancelled, not its reader.
        raise _unavailable("the session was ended") from None
    if not isinstance(message, kvstore_pb2.AttachResponse):
        raise _unavailable("the node ended the session")
    return message


def _check_file(info: ArenaInfo) -> None:
    """Refuse an arena that lies on another machine."""
    try:
        size = os.stat(info.arena_path).st_size
    except OSError as error:
        message = "the node's arena is not on this machine"
        raise UnavailableError(message, reason=NOT_HERE_REASON) from error
    if size != info.arena_bytes:
        message = "another arena of this name is on this machine"
        raise UnavailableError(message, reason=NOT_HERE_REASON)


def _unavailable(message: str) -> UnavailableError:
    return UnavailableError(message, reason=REASON)


def _now_s() -> float:
    return asyncio.get_running_loop().time()
