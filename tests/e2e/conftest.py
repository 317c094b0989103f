"""Platforms that several end-to-end modules share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.platform import Platform

KV_STORES = {
    "shm": ("--kv-nodes", "1"),
    "grpc": ("--kv-nodes", "2", "--kv-transport", "grpc"),
}

WHOLE_WAY = {"PACELINE_HOP_S": "0"}
"""Makes the hand-off look free to routing, so that short prompts take the whole way, too."""


@pytest.fixture(scope="session", params=list(KV_STORES))
def demo_platform(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Platform]:
    """Two prefill and two decode workers of the demo model, over each kind of KV store."""
    flags = ("--prefill", "2", "--decode", "2", *KV_STORES[request.param])
    with Platform(tmp_path_factory.mktemp(request.param), *flags, env=WHOLE_WAY) as up:
        yield up


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run the tests on shared platforms last, so that these run only while they are needed."""
    items.sort(key=lambda item: "demo_platform" in getattr(item, "fixturenames", ()))
