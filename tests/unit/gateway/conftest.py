"""One Redis for all tests of the package that leave it alone; a fleet of its own for each."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from paceline.gateway.tokenizer import ModelTokenizer
from tests.redis_server import RedisServer, redis_server
from tests.unit.gateway.stack import DEMO

__all__ = ["redis_server"]


@pytest.fixture(scope="session")
def redis(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    server = RedisServer(tmp_path_factory.mktemp("redis"))
    server.start()
    try:
        yield server
    finally:
        server.kill()


@pytest.fixture(scope="session")
def demo_tokenizer() -> ModelTokenizer:
    return ModelTokenizer(DEMO)
