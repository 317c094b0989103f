"""One shared fleet for tests that leave it as they found it; makers for those that do not."""

from __future__ import annotations

import asyncio
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from paceline.domain.member import Member
from tests.redis_server import RedisServer
from tests.unit.kvstore.node_process import NodeProcess
from tests.unit.worker.worker_process import WorkerProcess

WorkerMaker = Callable[..., WorkerProcess]
NodeMaker = Callable[..., NodeProcess]


@dataclass
class Fleet:
    """Two nodes and four workers: `far` has a node of its own, without shm; `plain` none."""

    node: NodeProcess
    far_node: NodeProcess
    prefill: WorkerProcess
    decode: WorkerProcess
    far: WorkerProcess
    plain: WorkerProcess
    members: dict[str, Member]

    def __getitem__(self, member_id: str) -> Member:
        return self.members[member_id]


@pytest.fixture(scope="package")
def directory() -> Iterator[Path]:
    """Return a directory in shared memory for arenas and logs."""
    path = Path(tempfile.mkdtemp(prefix="paceline-test-", dir="/dev/shm"))
    try:
        yield path
    finally:
        shutil.rmtree(path)


@pytest.fixture(scope="package")
def redis(directory: Path) -> Iterator[RedisServer]:
    """Run a Redis for all tests of the package."""
    server = RedisServer(directory)
    server.start()
    try:
        yield server
    finally:
        server.kill()


@pytest.fixture(scope="package")
def fleet(redis: RedisServer, directory: Path) -> Iterator[Fleet]:
    """Run the shared fleet."""
    url = redis.url
    nodes = [
        NodeProcess(url, directory, "kv-0", arena_mb=64),
        NodeProcess(url, directory, "kv-1", arena_mb=64, flags=("--transport", "grpc")),
    ]
    workers = [
        WorkerProcess(url, directory, "prefill", "prefill", "kv-0"),
        WorkerProcess(url, directory, "decode", "decode", "kv-0"),
        WorkerProcess(url, directory, "far", "decode", "kv-1"),
        WorkerProcess(url, directory, "plain", "decode"),
    ]

    async def start() -> dict[str, Member]:
        for process in [*nodes, *workers]:
            process.launch()
        found = await asyncio.gather(*(process.member() for process in [*nodes, *workers]))
        return {member.id: member for member in found}

    try:
        yield Fleet(*nodes, *workers, members=asyncio.run(start()))
    finally:
        for process in [*workers, *nodes]:
            process.kill()


@pytest.fixture
def make_worker(redis: RedisServer, directory: Path) -> Iterator[WorkerMaker]:
    """Return a maker of workers that are killed at the end of the test."""
    workers: list[WorkerProcess] = []

    def make(worker_id: str, *flags: str, **options: object) -> WorkerProcess:
        settings: dict[str, object] = {"redis_url": redis.url, "directory": directory, **options}
        workers.append(WorkerProcess(worker_id=worker_id, flags=flags, **settings))  # type: ignore[arg-type]
        return workers[-1]

    yield make
    for worker in workers:
        worker.kill()


@pytest.fixture
def make_node(redis: RedisServer, directory: Path) -> Iterator[NodeMaker]:
    """Return a maker of nodes that are killed at the end of the test."""
    nodes: list[NodeProcess] = []

    def make(node_id: str, *flags: str, **options: object) -> NodeProcess:
        settings: dict[str, object] = {"redis_url": redis.url, "directory": directory, **options}
        nodes.append(NodeProcess(node_id=node_id, flags=flags, **settings))  # type: ignore[arg-type]
        return nodes[-1]

    yield make
    for node in nodes:
        node.kill()
