"""Where files of the user go."""

from __future__ import annotations

from pathlib import Path

import pytest

from paceline.domain.directories import cache_directory, state_directory


@pytest.mark.parametrize(
    ("environ", "cache", "state"),
    [
        ({}, Path.home() / ".cache/paceline", Path.home() / ".local/state/paceline"),
        (
            {"XDG_CACHE_HOME": "/c", "XDG_STATE_HOME": "/s"},
            Path("/c/paceline"),
            Path("/s/paceline"),
        ),
        (
            {
                "PACELINE_CACHE_DIR": "/a",
                "PACELINE_STATE_DIR": "/b",
                "XDG_CACHE_HOME": "/c",
                "XDG_STATE_HOME": "/s",
            },
            Path("/a"),
            Path("/b"),
        ),
    ],
    ids=["nothing said", "by the desktop's rules", "by our own"],
)
def test_files_go_where_the_user_wants_them(
    environ: dict[str, str], cache: Path, state: Path
) -> None:
    assert cache_directory(environ) == cache
    assert state_directory(environ) == state
