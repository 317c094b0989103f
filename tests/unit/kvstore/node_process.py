"""Real node processes and a stand-in for a worker's engine, for tests of the KV store."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from paceline.domain.blocks import LAYOUT_VERSION
from paceline.domain.errors import UnavailableError
from paceline.domain.member import Member
from paceline.kvstore import wire
from paceline.kvstore.arena import ArenaView
from paceline.kvstore.arena_file import arena_path
from paceline.kvstore.client import KvNodeClient
from paceline.kvstore.values import KvLayoutInfo, PinnedBlock, WrittenBlock
from paceline.process.membership import Membership
from paceline.rpc.channel import open_channel
from paceline.v1 import kvstore_pb2
from tests.waiting import until

FLEET = "test"
LAYOUT = KvLayoutInfo(bytes(range(16)), LAYOUT_VERSION, "f32", 16, 2, 2, 64, 16 * 1024)


@dataclass
class NodeProcess:
    """One `python -m paceline.kvstore`; files and logs in `directory`."""

    redis_url: str
    directory: Path
    node_id: str = "kv-0"
    arena_mb: int = 4
    port: int = 0
    flags: tuple[str, ...] = ()
    environment: dict[str, str] = field(default_factory=dict)
    process: subprocess.Popen[bytes] | None = field(default=None, init=False)

    @property
    def arena(self) -> Path:
        """Return the path of the arena file."""
        return Path(arena_path(str(self.directory), FLEET, self.node_id))

    @property
    def log(self) -> str:
        """Return what the node wrote on stderr."""
        return (self.directory / f"{self.node_id}.log").read_text()

    @property
    def pid(self) -> int:
        """Return the process id."""
        assert self.process is not None
        return self.process.pid

    def launch(self) -> None:
        """Start the process."""
        command = [sys.executable, "-m", "paceline.kvstore", "--redis-url", self.redis_url]
        command += ["--fleet", FLEET, "--member-id", self.node_id, "--port", str(self.port)]
        command += ["--arena-mb", str(self.arena_mb), "--arena-dir", str(self.directory)]
        with open(self.directory / f"{self.node_id}.log", "ab") as log:
            self.process = subprocess.Popen(
                [*command, *self.flags], stderr=log, env={**os.environ, **self.environment}
            )

    async def start(self) -> Member:
        """Start the process and return its record once it is a member."""
        self.launch()
        return await self.member()

    async def member(self) -> Member:
        """Wait for the running process to be a member."""
        membership = Membership(self.redis_url, FLEET)

        async def find() -> Member | None:
            assert self.process is not None
            assert self.process.poll() is None, self.log
            try:
                members = await membership.members()
            except UnavailableError:
                return None
            return next((m for m in members if m.pid == self.process.pid), None)

        try:
            return await until(find, 15)  # type: ignore[arg-type]
        finally:
            await membership.close()

    async def exit_code(self) -> int:
        """Wait for the process to end by itself."""
        process = self.process
        assert process is not None
        await until(lambda: process.poll() is not None, 10)
        assert process.returncode is not None
        return process.returncode

    def kill(self) -> None:
        """End the process at once."""
        if self.process is not None:
            self.process.kill()
            self.process.wait(timeout=10)

    async def stop(self) -> int:
        """End the process in order; return its exit code."""
        os.kill(self.pid, signal.SIGTERM)
        return await self.exit_code()


@dataclass
class Worker:
    """One session, with the arena mapped."""

    client: KvNodeClient
    view: ArenaView
    layout: KvLayoutInfo

    async def write(self, contents: dict[bytes, bytes], *, is_tail: bool = False) -> list[bytes]:
        """Store blocks; return the keys that are readable."""
        slots = await self.client.reserve(len(contents))
        written: list[WrittenBlock] = []
        for slot, (key, data) in zip(slots, contents.items(), strict=False):
            self.view.payload(slot.offset, len(data))[:] = data
            num_tokens = 5 if is_tail else self.layout.block_size
            checksum = self.view.seal(
                slot.offset,
                generation=slot.generation,
                key=key,
                kv_root=self.layout.kv_root,
                length=len(data),
                num_tokens=num_tokens,
                is_request_scoped=is_tail,
            )
            written.append(WrittenBlock(key, slot, checksum, num_tokens, is_tail))
        return await self.client.commit(written)

    def read(self, block: PinnedBlock) -> bytes | None:
        """Copy a pinned block; None if its bytes are not what was written."""
        data = bytes(self.view.payload(block.slot.offset, self.layout.block_bytes))
        is_good = self.view.check(
            block.slot.offset,
            generation=block.slot.generation,
            key=block.key,
            kv_root=self.layout.kv_root,
            length=len(data),
            checksum=block.checksum,
            data=memoryview(data),
        )
        return data if is_good else None

    async def read_all(
        self, keys: list[bytes], sources: tuple[str, ...] = (), tail_key: bytes = b""
    ) -> dict[bytes, bytes | None]:
        """Acquire, copy and release blocks."""
        blocks = await self.client.acquire(keys, sources, tail_key)
        contents = {block.key: self.read(block) for block in blocks}
        corrupt = [key for key, data in contents.items() if data is None]
        await self.client.release([block.key for block in blocks], corrupt)
        return contents


@asynccontextmanager
async def attached(member: Member, layout: KvLayoutInfo = LAYOUT) -> AsyncIterator[Worker]:
    """Attach a worker to a node."""
    client = KvNodeClient(member.address, "worker", layout)
    try:
        info = await client.attach()
        view = ArenaView(info.arena_path, info.arena_bytes)
        try:
            yield Worker(client, view, layout)
        finally:
            view.close()
    finally:
        await client.close()


@asynccontextmanager
async def node_stub(address: str) -> AsyncIterator[Any]:
    """Return the bare stub of a node."""
    channel = open_channel(address)
    try:
        yield wire.node_stub(channel)
    finally:
        await channel.close()


async def until_stats(member: Member, **expected: int) -> kvstore_pb2.GetStatsResponse:
    """Wait until the node's counters are as expected; return them."""

    async def are_met() -> kvstore_pb2.GetStatsResponse | None:
        now = await stats(member)
        is_met = all(getattr(now, name) == value for name, value in expected.items())
        return now if is_met else None

    return await until(are_met, 10)  # type: ignore[arg-type]


async def stats(member: Member) -> kvstore_pb2.GetStatsResponse:
    """Ask a node for its counters."""
    async with node_stub(member.address) as stub:
        request = kvstore_pb2.GetStatsRequest()
        answer: kvstore_pb2.GetStatsResponse = await stub.GetStats(request, timeout=5)
        return answer


def blocks(count: int, seed: int = 0) -> dict[bytes, bytes]:
    """Return distinct blocks of LAYOUT by key."""
    draw = random.Random(seed)
    return {draw.randbytes(16): draw.randbytes(LAYOUT.block_bytes) for _ in range(count)}


def flip(path: Path, data: bytes) -> None:
    """Flip a bit in the middle of the one place in a file where `data` lies."""
    content = path.read_bytes()
    assert content.count(data) == 1
    at = content.index(data) + len(data) // 2
    with open(path, "r+b") as file:
        file.seek(at)
        file.write(bytes([content[at] ^ 1]))
