"""Frames arrive whole and in order, however the bytes are cut; oversize and torn ones end it."""

from __future__ import annotations

import asyncio
import socket
import struct
from contextlib import suppress

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paceline.rpc.frames import (
    MAX_FRAME_BYTES,
    ConnectionClosedError,
    FrameReader,
    FrameSocket,
    encode,
)
from paceline.v1 import engine_pb2, kvstore_pb2

MESSAGES = st.lists(st.binary(max_size=300), max_size=8).map(
    lambda bodies: [engine_pb2.ArenaChange(path=body.hex()) for body in bodies]
)


def _cut(data: bytes, sizes: list[int]) -> list[bytes]:
    """Cut into pieces of these sizes, the rest in one."""
    pieces, at = [], 0
    for size in sizes:
        pieces.append(data[at : at + size])
        at += size
    return [piece for piece in [*pieces, data[at:]] if piece]


@settings(max_examples=50)
@given(MESSAGES, st.lists(st.integers(1, 40), max_size=40))
def test_sockets_put_pieces_together(
    messages: list[engine_pb2.ArenaChange], sizes: list[int]
) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        reader, received = FrameSocket(theirs), []
        for piece in _cut(b"".join(map(encode, messages)), sizes):
            ours.sendall(piece)
            received += reader.recv_ready(engine_pb2.ArenaChange)
    assert received == messages


@settings(max_examples=50)
@given(MESSAGES, st.lists(st.integers(1, 40), max_size=40))
def test_streams_put_pieces_together(
    messages: list[engine_pb2.ArenaChange], sizes: list[int]
) -> None:
    async def read() -> list[engine_pb2.ArenaChange]:
        stream, received = asyncio.StreamReader(), []
        for piece in _cut(b"".join(map(encode, messages)), sizes):
            stream.feed_data(piece)
        stream.feed_eof()
        with pytest.raises(ConnectionClosedError):
            while True:
                received.append(await FrameReader().read(stream, engine_pb2.ArenaChange))
        return received

    assert asyncio.run(read()) == messages


def test_sockets_carry_frames_larger_than_their_buffers() -> None:
    message = kvstore_pb2.FetchResponse(data=bytes(3 << 20))
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.setblocking(False)
        reader, data, received = FrameSocket(theirs), memoryview(encode(message)), []
        while not received:
            with suppress(BlockingIOError):
                data = data[ours.send(data) :]
            received = reader.recv_ready(kvstore_pb2.FetchResponse)
    assert received == [message]


def test_nothing_to_read_is_no_message() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        reader = FrameSocket(theirs)
        reader.wait(0.01)
        assert reader.recv_ready(engine_pb2.Ping) == []


def test_a_closed_peer_ends_reading_and_writing() -> None:
    ours, theirs = socket.socketpair()
    with theirs:
        end = FrameSocket(theirs)
        ours.close()
        with pytest.raises(ConnectionClosedError):
            end.recv_ready(engine_pb2.Ping)
        with pytest.raises(ConnectionClosedError):
            end.send(engine_pb2.ArenaChange(path="x"))


@pytest.mark.parametrize("length", [MAX_FRAME_BYTES + 1, 2**32 - 1])
async def test_oversize_frames_end_the_connection_before_their_bytes(length: int) -> None:
    head = struct.pack("<I", length)
    stream = asyncio.StreamReader()
    stream.feed_data(head)
    with pytest.raises(ConnectionClosedError, match="at most"):
        await FrameReader().read(stream, engine_pb2.Ping)
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.sendall(head)
        with pytest.raises(ConnectionClosedError, match="at most"):
            FrameSocket(theirs).recv_ready(engine_pb2.Ping)
