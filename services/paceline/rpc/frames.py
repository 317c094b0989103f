"""Length-prefixed protobuf frames over a socket; no gRPC, so that the engine can use it.

A frame is a 4-byte little-endian length and that many bytes of one message. `FrameReader` is
for event loops, `FrameSocket` for the engine's synchronous loop.
"""

from __future__ import annotations

import asyncio
import select
import socket
import struct
from typing import TypeVar

from google.protobuf.message import Message

M = TypeVar("M", bound=Message)

MAX_FRAME_BYTES = 64 << 20
_LENGTH = struct.Struct("<I")
_CHUNK_BYTES = 1 << 18


class ConnectionClosedError(ConnectionError):
    """The other end closed the socket."""


def encode(message: Message) -> bytes:
    """Return the frame of a message."""
    data = message.SerializeToString()
    return _LENGTH.pack(len(data)) + data


class FrameReader:
    """Reads frames from an asyncio stream."""

    async def read(self, reader: asyncio.StreamReader, kind: type[M]) -> M:
        """Read one message.

        Raises:
            ConnectionClosedError: the stream ended.
        """
        try:
            (length,) = _LENGTH.unpack(await reader.readexactly(_LENGTH.size))
            data = await reader.readexactly(_checked(length))
        except asyncio.IncompleteReadError as error:
            raise ConnectionClosedError("the stream ended") from error
        return kind.FromString(data)


class FrameSocket:
    """Reads and writes frames on a blocking socket without ever blocking in a read."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._buffer = bytearray()

    def send(self, message: Message) -> None:
        """Write a frame; waits while the peer's buffer is full.

        Raises:
            ConnectionClosedError: the peer is gone.
        """
        try:
            self._sock.sendall(encode(message))
        except OSError as error:
            raise ConnectionClosedError("the peer is gone") from error

    def wait(self, timeout_s: float | None) -> None:
        """Return when something can be read or the time is over; None waits without end."""
        if timeout_s != 0.0:
            select.select([self._sock], [], [], timeout_s)

    def recv_ready(self, kind: type[M]) -> list[M]:
        """Return all complete messages that have arrived.

        Raises:
            ConnectionClosedError: the peer is gone.
        """
        while select.select([self._sock], [], [], 0)[0]:
            try:
                data = self._sock.recv(_CHUNK_BYTES)
            except OSError as error:
                raise ConnectionClosedError("the peer is gone") from error
            if not data:
                raise ConnectionClosedError("the peer closed the socket")
            self._buffer += data
        return list(self._take(kind))

    def _take(self, kind: type[M]) -> list[M]:
        messages, at = [], 0
        while len(self._buffer) - at >= _LENGTH.size:
            (length,) = _LENGTH.unpack_from(self._buffer, at)
            end = at + _LENGTH.size + _checked(length)
            if len(self._buffer) < end:
                break
            messages.append(kind.FromString(bytes(self._buffer[at + _LENGTH.size : end])))
            at = end
        del self._buffer[:at]
        return messages


def _checked(length: int) -> int:
    if length > MAX_FRAME_BYTES:
        raise ConnectionClosedError(f"frame of {length} bytes, at most {MAX_FRAME_BYTES}")
    return length
