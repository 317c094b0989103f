"""What all tests share."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.fixture(scope="session", autouse=True)
def cache_of_the_tests(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Keep measured step costs away from the user's, also in processes that tests start."""
    directory = tmp_path_factory.mktemp("cache")
    before = os.environ.get("PACELINE_CACHE_DIR")
    os.environ["PACELINE_CACHE_DIR"] = str(directory)
    yield directory
    if before is None:
        del os.environ["PACELINE_CACHE_DIR"]
    else:
        os.environ["PACELINE_CACHE_DIR"] = before
