"""What all tests share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest


@pytest.fixture(scope="session", autouse=True)
def files_of_the_tests(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keep caches and state away from the user's, also in processes that tests start."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("PACELINE_CACHE_DIR", "PACELINE_STATE_DIR"):
            patch.setenv(name, str(tmp_path_factory.mktemp(name.lower())))
        yield
