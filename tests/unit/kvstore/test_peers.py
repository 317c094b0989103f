"""Blocks between nodes: over the network, by shared memory, and from peers that misbehave."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import grpc
import pytest
from xxhash import xxh3_64_intdigest

from paceline.kvstore import wire
from paceline.v1 import kvstore_pb2, kvstore_pb2_grpc
from tests.unit.kvstore.conftest import NodeMaker
from tests.unit.kvstore.node_process import LAYOUT, attached, blocks, flip, node_stub, stats

Answer = Callable[[kvstore_pb2.FetchRequest], list[kvstore_pb2.FetchResponse] | None]
SCHEMES = ("grpc", "shm")


@pytest.mark.parametrize("scheme", SCHEMES)
async def test_acquire_pulls_missing_blocks_from_a_peer(make_node: NodeMaker, scheme: str) -> None:
    there = await make_node("kv-0", "--transport", scheme).start()
    here = await make_node("kv-1", "--transport", scheme).start()
    assert there.kv_uri == f"{scheme}:{there.address}"
    written, tail = blocks(20), blocks(1, seed=9)
    keys, tail_key = list(written), next(iter(tail))
    async with attached(there) as writer, attached(here) as reader:
        await writer.write(written)
        await writer.write(tail, is_tail=True)
        assert await reader.read_all(keys) == {}
        sources = ("grpc:127.0.0.1:1", here.kv_uri, there.kv_uri)
        assert await reader.read_all(keys, sources, tail_key) == written | tail
        assert await reader.read_all(keys, (), tail_key) == written | tail
    after = await stats(here)
    assert (after.pulled_blocks, after.pulled_bytes) == (21, 21 * LAYOUT.block_bytes)


@pytest.mark.parametrize("scheme", SCHEMES)
async def test_blocks_from_several_peers_are_joined(make_node: NodeMaker, scheme: str) -> None:
    one = await make_node("kv-0", "--transport", scheme).start()
    two = await make_node("kv-1", "--transport", scheme).start()
    here = await make_node("kv-2", "--transport", scheme).start()
    written = blocks(9)
    keys = list(written)
    async with attached(one) as first, attached(two) as second, attached(here) as reader:
        await first.write({key: written[key] for key in keys[:4]})
        await second.write({key: written[key] for key in keys[4:8]})
        got = await reader.read_all(keys, (one.kv_uri, two.kv_uri))
        assert got == {key: written[key] for key in keys[:8]}


async def test_pull_makes_a_later_acquire_local(make_node: NodeMaker) -> None:
    there, here = await make_node("kv-0").start(), await make_node("kv-1").start()
    written = blocks(8)
    async with attached(there) as writer, attached(here) as reader, node_stub(here.address) as stub:
        await writer.write(written)
        request = kvstore_pb2.PullRequest(
            layout=wire.layout_to_proto(LAYOUT), keys=[*written, bytes(16)], source=there.kv_uri
        )
        assert (await stub.Pull(request, timeout=5)).num_readable == 8
        assert (await stub.Pull(request, timeout=5)).num_readable == 8
        assert await reader.read_all(list(written)) == written
    assert (await stats(here)).pulled_blocks == 8


async def test_concurrent_pulls_of_a_block_transfer_it_once(make_node: NodeMaker) -> None:
    here = await make_node("kv-0").start()
    written = blocks(6)
    asked: list[bytes] = []

    def answer(request: kvstore_pb2.FetchRequest) -> list[kvstore_pb2.FetchResponse]:
        asked.extend(request.keys)
        return [piece_of(key, written[key]) for key in request.keys]

    async with peer(answer) as source, attached(here) as one, attached(here) as two:
        keys = list(written)
        reads = [worker.read_all(keys, (source,)) for worker in (one, two) for _ in range(5)]
        assert all(got == written for got in await asyncio.gather(*reads))
    assert sorted(asked) == sorted(keys)
    assert (await stats(here)).pulled_blocks == 6


async def test_a_block_that_rotted_at_the_peer_is_a_miss(make_node: NodeMaker) -> None:
    node = make_node("kv-0", "--transport", "grpc")
    there, here = await node.start(), await make_node("kv-1", "--transport", "grpc").start()
    written = blocks(3)
    keys = list(written)
    async with attached(there) as writer, attached(here) as reader:
        await writer.write(written)
        flip(node.arena, written[keys[2]])
        got = await reader.read_all(keys, (there.kv_uri,))
        assert got == {key: written[key] for key in keys[:2]}
    assert (await stats(there)).corrupt_blocks == 1


@pytest.mark.parametrize(
    "spoil",
    [
        lambda data: data[:-1],
        lambda data: b"",
        lambda data: data + b"x",
        lambda data: bytes([data[0] ^ 1]) + data[1:],
    ],
    ids=["truncated", "empty", "too-long", "flipped"],
)
async def test_a_block_spoilt_on_the_way_is_a_miss(
    make_node: NodeMaker, spoil: Callable[[bytes], bytes]
) -> None:
    here = await make_node("kv-0").start()
    written = blocks(3)
    keys = list(written)

    def answer(request: kvstore_pb2.FetchRequest) -> list[kvstore_pb2.FetchResponse]:
        pieces = [piece_of(key, written[key]) for key in request.keys]
        pieces[1].data = spoil(pieces[1].data)
        return pieces

    async with peer(answer) as source, attached(here) as reader:
        assert await reader.read_all(keys, (source,)) == {keys[0]: written[keys[0]]}
        assert await reader.read_all([keys[2]]) == {keys[2]: written[keys[2]]}
    after = await stats(here)
    assert (after.corrupt_blocks, after.pulled_blocks, after.num_reserved_slots) == (1, 2, 0)


async def test_blocks_nobody_asked_for_are_not_stored(make_node: NodeMaker) -> None:
    here = await make_node("kv-0").start()
    asked, other = blocks(1), blocks(1, seed=5)

    def answer(request: kvstore_pb2.FetchRequest) -> list[kvstore_pb2.FetchResponse]:
        return [piece_of(key, data) for key, data in (other | asked).items()]

    async with peer(answer) as source, attached(here) as reader:
        assert await reader.read_all(list(asked), (source,)) == asked
    assert (await stats(here)).num_blocks == 1


async def test_a_silent_peer_costs_no_more_than_the_deadline(make_node: NodeMaker) -> None:
    there = await make_node("kv-0").start()
    here = await make_node("kv-1", "--pull-timeout-s", "0.5").start()
    written = blocks(2)
    keys = list(written)
    async with peer(lambda request: None) as silent, attached(here) as reader:
        await reader.write({keys[0]: written[keys[0]]})
        start_s = time.monotonic()
        got = await reader.read_all(keys, (silent, there.kv_uri))
        assert got == {keys[0]: written[keys[0]]}
        assert time.monotonic() - start_s < 1.5
    after = await stats(here)
    assert (after.num_reserved_slots, after.num_pinned_blocks) == (0, 0)


async def test_a_dead_peer_is_passed_over(make_node: NodeMaker) -> None:
    node = make_node("kv-0")
    there, here = await node.start(), await make_node("kv-1").start()
    node.kill()
    written = blocks(2)
    async with attached(here) as reader:
        await reader.write(written)
        got = await reader.read_all([*written, bytes(16)], (there.kv_uri,))
        assert got == written


async def test_forced_grpc_never_touches_the_peers_arena(make_node: NodeMaker) -> None:
    node = make_node("kv-0", "--transport", "shm")
    there, here = await node.start(), await make_node("kv-1", "--transport", "grpc").start()
    written = blocks(4)
    async with attached(there) as writer, attached(here) as reader:
        await writer.write(written)
        node.arena.rename(node.arena.with_suffix(".elsewhere"))
        assert await reader.read_all(list(written), (there.kv_uri,)) == written


async def test_shm_falls_back_where_the_arena_is_elsewhere(make_node: NodeMaker) -> None:
    node = make_node("kv-0", "--transport", "shm")
    there, here = await node.start(), await make_node("kv-1", "--transport", "shm").start()
    written = blocks(4)
    async with attached(there) as writer, attached(here) as reader:
        await writer.write(written)
        node.arena.rename(node.arena.with_suffix(".elsewhere"))
        assert await reader.read_all(list(written), (there.kv_uri,)) == written


def piece_of(key: bytes, data: bytes) -> kvstore_pb2.FetchResponse:
    """Return a block as one message."""
    return kvstore_pb2.FetchResponse(
        key=key, checksum=xxh3_64_intdigest(data), num_tokens=16, data=data
    )


@asynccontextmanager
async def peer(answer: Answer) -> AsyncIterator[str]:
    """Serve Fetch with any answer; None never answers. Yields the URI."""

    class Servicer(kvstore_pb2_grpc.KvNodeServiceServicer):
        async def Fetch(self, request: Any, context: Any) -> Any:
            pieces = answer(request)
            if pieces is None:
                await asyncio.Event().wait()
                return
            for piece in pieces:
                yield piece

    server = grpc.aio.server()
    add: Callable[..., None] = kvstore_pb2_grpc.add_KvNodeServiceServicer_to_server
    add(Servicer(), server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        yield f"grpc:127.0.0.1:{port}"
    finally:
        await server.stop(None)
