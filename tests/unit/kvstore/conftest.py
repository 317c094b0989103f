"""Fixtures of the KV store's tests."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.redis_server import redis_server, redis_url
from tests.unit.kvstore.node_process import NodeProcess

__all__ = ["redis_server", "redis_url"]

NodeMaker = Callable[..., NodeProcess]


@pytest.fixture
def shm_dir() -> Iterator[Path]:
    """Return a directory in shared memory."""
    directory = Path(tempfile.mkdtemp(prefix="paceline-test-", dir="/dev/shm"))
    try:
        yield directory
    finally:
        shutil.rmtree(directory)


@pytest.fixture
def make_node(redis_url: str, shm_dir: Path) -> Iterator[NodeMaker]:
    """Return a maker of nodes that are killed at the end of the test."""
    nodes: list[NodeProcess] = []

    def make(node_id: str = "kv-0", *flags: str, **options: object) -> NodeProcess:
        settings: dict[str, object] = {"redis_url": redis_url, "directory": shm_dir, **options}
        nodes.append(NodeProcess(node_id=node_id, flags=flags, **settings))  # type: ignore[arg-type]
        return nodes[-1]

    yield make
    for node in nodes:
        node.kill()
