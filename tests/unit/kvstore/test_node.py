"""One node process: storing, reading, corruption, sessions, validation."""

from __future__ import annotations

import asyncio
import os
import stat
from dataclasses import replace
from typing import Any

import grpc
import pytest

from paceline.domain.errors import UnavailableError
from paceline.kvstore import wire
from paceline.kvstore.client import KvNodeClient
from paceline.kvstore.values import ArenaInfo, Slot
from paceline.v1 import kvstore_pb2
from tests.unit.kvstore.conftest import NodeMaker
from tests.unit.kvstore.node_process import (
    LAYOUT,
    attached,
    blocks,
    flip,
    node_stub,
    stats,
    until_stats,
)
from tests.waiting import until

PROTO_LAYOUT = wire.layout_to_proto(LAYOUT)


async def test_one_worker_reads_what_another_wrote(make_node: NodeMaker) -> None:
    member = await make_node().start()
    written, tail = blocks(5), blocks(1, seed=9)
    keys, tail_key = list(written), next(iter(tail))
    async with attached(member) as writer:
        assert await writer.write(written) == keys
        assert await writer.write(tail, is_tail=True) == [tail_key]
        async with attached(member) as reader:
            assert await reader.read_all(keys, tail_key=tail_key) == written | tail
            pinned = await reader.client.acquire(keys, (), tail_key)
            assert [block.num_tokens for block in pinned] == [16] * 5 + [5]
            assert (await stats(member)).num_pinned_blocks == 6
        usage = await until_stats(member, num_pinned_blocks=0, num_sessions=1)
    assert (usage.num_blocks, usage.committed_blocks) == (6, 6)
    assert (usage.acquired_blocks, usage.acquired_bytes) == (12, 12 * LAYOUT.block_bytes)


async def test_an_answer_stops_at_the_first_missing_key(make_node: NodeMaker) -> None:
    member = await make_node().start()
    written = blocks(4)
    keys = list(written)
    async with attached(member) as worker:
        await worker.write({key: written[key] for key in (keys[0], keys[1], keys[3])})
        assert list(await worker.read_all(keys)) == keys[:2]
        assert (await stats(member)).num_pinned_blocks == 0


async def test_a_second_writer_of_a_key_finds_it_readable(make_node: NodeMaker) -> None:
    member = await make_node().start()
    written = blocks(2)
    async with attached(member) as one, attached(member) as two:
        assert await one.write(written) == await two.write(written) == list(written)
    usage = await until_stats(member, num_sessions=0)
    assert usage.num_blocks == 2


async def test_a_flipped_bit_in_the_arena_is_a_miss(make_node: NodeMaker) -> None:
    node = make_node()
    member = await node.start()
    written = blocks(3)
    keys = list(written)
    async with attached(member) as worker:
        await worker.write(written)
        flip(node.arena, written[keys[1]])
        first = await worker.read_all(keys)
        assert first == {**written, keys[1]: None}
        assert list(await worker.read_all(keys)) == keys[:1], "the block is gone"
        assert await worker.write({keys[1]: written[keys[1]]}) == [keys[1]]
        assert await worker.read_all(keys) == written
    assert (await stats(member)).corrupt_blocks == 1


async def test_a_full_arena_evicts_but_not_what_is_pinned(make_node: NodeMaker) -> None:
    member = await make_node().start()
    pinned = blocks(10)
    async with attached(member) as worker:
        await worker.write(pinned)
        held = await worker.client.acquire(list(pinned), ())
        assert len(held) == 10
        for seed in range(1, 9):
            assert len(await worker.write(blocks(50, seed=seed))) == 50
        assert all(worker.read(block) == pinned[block.key] for block in held)
        usage = await stats(member)
        assert usage.evicted_blocks > 0
        assert usage.used_bytes <= usage.capacity_bytes


async def test_one_session_cannot_reserve_the_whole_arena(make_node: NodeMaker) -> None:
    member = await make_node().start()
    async with attached(member) as worker:
        slots = await worker.client.reserve(4096)
        assert 0 < len(slots) <= (4 << 20) // LAYOUT.block_bytes // 4
        assert await worker.client.reserve(1) == []
        await worker.client.release((), (), slots[:3])
        assert len(await worker.client.reserve(10)) == 3


async def test_a_vanished_worker_leaves_nothing_behind(make_node: NodeMaker) -> None:
    member = await make_node().start()
    written = blocks(3)
    async with attached(member) as worker:
        await worker.write(written)
        await worker.client.reserve(5)
        await worker.client.acquire(list(written), ())
    usage = await until_stats(member, num_sessions=0)
    assert (usage.num_reserved_slots, usage.num_pinned_blocks) == (0, 0)


async def test_a_commit_of_a_slot_of_somebody_else_is_ignored(make_node: NodeMaker) -> None:
    member = await make_node().start()
    async with attached(member) as one, attached(member) as two:
        slot = (await one.client.reserve(1))[0]
        key, data = next(iter(blocks(1).items()))
        for stale in (slot, Slot(slot.offset, slot.generation + 1), Slot(2**40, 1)):
            block = kvstore_pb2.CommittedBlock(
                key=key, slot=wire.slot_to_proto(stale), checksum=1, num_tokens=16
            )
            assert await two.client.commit([wire.written_from_proto(block)]) == []
        # Its owner, who has not sealed it, cannot make it readable either.
        block.slot.CopyFrom(wire.slot_to_proto(slot))
        assert await one.client.commit([wire.written_from_proto(block)]) == []
        assert len(data) and (await stats(member)).num_blocks == 0


async def test_many_sessions_leak_no_descriptors(make_node: NodeMaker) -> None:
    node = make_node()
    member = await node.start()

    async def attach_and_detach(count: int) -> None:
        client = KvNodeClient(member.address, "worker", LAYOUT)
        for _ in range(count):
            await client.attach()
            await client.reserve(1)
        await client.close()

    await attach_and_detach(10)
    await until_stats(member, num_sessions=0)
    before = len(os.listdir(f"/proc/{node.pid}/fd"))
    own_before = len(os.listdir("/proc/self/fd"))
    await asyncio.gather(*(attach_and_detach(100) for _ in range(5)))
    await until_stats(member, num_sessions=0)
    await until(lambda: len(os.listdir(f"/proc/{node.pid}/fd")) <= before + 2, 5)
    await until(lambda: len(os.listdir("/proc/self/fd")) <= own_before + 2, 5)


async def test_views_of_the_arena_leak_no_descriptors(make_node: NodeMaker) -> None:
    member = await make_node().start()
    async with attached(member):
        pass
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(20):
        async with attached(member):
            pass
    await until(lambda: len(os.listdir("/proc/self/fd")) <= before + 2, 5)


async def test_only_the_owner_may_open_the_arena(make_node: NodeMaker) -> None:
    node = make_node()
    await node.start()
    assert stat.S_IMODE(node.arena.stat().st_mode) == 0o600


async def test_run_follows_a_node_that_dies_and_gives_up(make_node: NodeMaker) -> None:
    node = make_node()
    member = await node.start()
    seen: list[ArenaInfo | None] = []

    async def note(info: ArenaInfo | None) -> None:
        seen.append(info)

    client = KvNodeClient(member.address, "worker", LAYOUT, give_up_s=0.5)
    client.on_arena = note
    task = asyncio.create_task(client.run())
    await until(lambda: len(seen) == 1, 5)
    assert seen[0] is not None and seen[0].node_id == "kv-0"
    node.kill()
    with pytest.raises(UnavailableError):
        await asyncio.wait_for(task, 10)
    assert seen[1:] == [None]
    assert await client.acquire([bytes(16)], ()) == []
    with pytest.raises(UnavailableError):
        await client.reserve(1)
    await client.close()


async def test_run_attaches_again_when_the_node_is_back(make_node: NodeMaker) -> None:
    node = make_node()
    member = await node.start()
    seen: list[ArenaInfo | None] = []

    async def note(info: ArenaInfo | None) -> None:
        seen.append(info)

    client = KvNodeClient(member.address, "worker", LAYOUT, give_up_s=30)
    client.on_arena = note
    task = asyncio.create_task(client.run())
    try:
        await until(lambda: len(seen) == 1, 5)
        node.kill()
        await until(lambda: len(seen) == 2, 5)
        node.port = int(member.address.rpartition(":")[2])
        await node.start()
        await until(lambda: len(seen) == 3, 15)
        old, lost, new = seen
        assert lost is None and old is not None and new is not None
        assert old.arena_path == new.arena_path and old.epoch < new.epoch
        assert len(await client.reserve(2)) == 2
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await client.close()


NO_SESSION = "0" * 32
SHORT = kvstore_pb2.CommittedBlock(key=b"short", num_tokens=1)
NO_TOKENS = kvstore_pb2.CommittedBlock(key=bytes(16))
TOO_LARGE = wire.layout_to_proto(replace(LAYOUT, kv_root=bytes(16), block_bytes=2**40))
OTHER_VERSION = wire.layout_to_proto(replace(LAYOUT, kv_root=bytes(16), layout_version=99))

BAD_CALLS: list[tuple[str, Any]] = [
    ("Reserve", kvstore_pb2.ReserveRequest(session_id="fetch-1", num_slots=1)),
    ("Reserve", kvstore_pb2.ReserveRequest(session_id=NO_SESSION, num_slots=0)),
    ("Reserve", kvstore_pb2.ReserveRequest(session_id=NO_SESSION, num_slots=10**6)),
    ("Commit", kvstore_pb2.CommitRequest(session_id=NO_SESSION, blocks=[SHORT])),
    ("Commit", kvstore_pb2.CommitRequest(session_id=NO_SESSION, blocks=[NO_TOKENS])),
    ("Acquire", kvstore_pb2.AcquireRequest(session_id=NO_SESSION, keys=[b"short"])),
    ("Acquire", kvstore_pb2.AcquireRequest(session_id=NO_SESSION, tail_key=b"short")),
    ("Acquire", kvstore_pb2.AcquireRequest(session_id=NO_SESSION, sources=["file:/etc/x"])),
    ("Acquire", kvstore_pb2.AcquireRequest(session_id=NO_SESSION, sources=["grpc:a:1"] * 99)),
    ("Acquire", kvstore_pb2.AcquireRequest(session_id=NO_SESSION, keys=[bytes(16)] * 20_000)),
    ("Release", kvstore_pb2.ReleaseRequest(session_id=NO_SESSION, corrupt_keys=[b""])),
    ("Pull", kvstore_pb2.PullRequest(layout=PROTO_LAYOUT, source="grpc:nowhere")),
    ("Pull", kvstore_pb2.PullRequest(source="grpc:127.0.0.1:1")),
    ("Fetch", kvstore_pb2.FetchRequest(keys=[bytes(16)])),
    ("Attach", kvstore_pb2.AttachRequest(worker_id="", layout=PROTO_LAYOUT)),
    ("Attach", kvstore_pb2.AttachRequest(worker_id="w" * 1000, layout=PROTO_LAYOUT)),
    ("Attach", kvstore_pb2.AttachRequest(worker_id="w")),
    ("Attach", kvstore_pb2.AttachRequest(worker_id="w", layout=TOO_LARGE)),
    ("Attach", kvstore_pb2.AttachRequest(worker_id="w", layout=OTHER_VERSION)),
]


async def test_bad_input_is_refused_and_the_node_lives(make_node: NodeMaker) -> None:
    member = await make_node().start()
    async with node_stub(member.address) as stub:
        for method, request in BAD_CALLS:
            code = await status_of(getattr(stub, method), request)
            assert code is grpc.StatusCode.INVALID_ARGUMENT, (method, str(request)[:100])
        gone = kvstore_pb2.ReserveRequest(session_id=NO_SESSION, num_slots=1)
        assert await status_of(stub.Reserve, gone) is grpc.StatusCode.NOT_FOUND
    async with attached(member) as worker:
        assert len(await worker.write(blocks(2))) == 2


async def test_another_layout_under_the_same_root_is_refused(make_node: NodeMaker) -> None:
    member = await make_node().start()
    other = wire.layout_to_proto(replace(LAYOUT, block_bytes=LAYOUT.block_bytes // 2))
    async with attached(member), node_stub(member.address) as stub:
        attach = kvstore_pb2.AttachRequest(worker_id="w", layout=other)
        assert await status_of(stub.Attach, attach) is grpc.StatusCode.INVALID_ARGUMENT
        fetch = kvstore_pb2.FetchRequest(layout=other, keys=[bytes(16)])
        assert await status_of(stub.Fetch, fetch) is grpc.StatusCode.INVALID_ARGUMENT


async def test_layouts_share_the_arena_and_never_mix(make_node: NodeMaker) -> None:
    member = await make_node().start()
    small = replace(LAYOUT, kv_root=bytes(16), block_bytes=1000)
    async with attached(member) as large, attached(member, small) as other:
        for seed in range(8):
            assert len(await large.write(blocks(50, seed=seed))) == 50
        mine = {key: data[:1000] for key, data in blocks(40, seed=7).items()}
        assert len(await other.write(mine)) == 40, "a full arena makes room for a new layout"
        assert await other.read_all(list(mine)) == mine
        theirs = blocks(50, seed=7)
        assert set((await large.read_all(list(theirs))).items()) <= set(theirs.items())


async def status_of(method: Any, request: Any) -> grpc.StatusCode:
    """Make a call of any kind and return its status code."""
    call = method(request, timeout=5)
    try:
        if hasattr(call, "read"):
            await call.read()
            call.cancel()
        else:
            await call
    except grpc.aio.AioRpcError as error:
        return error.code()
    return grpc.StatusCode.OK
