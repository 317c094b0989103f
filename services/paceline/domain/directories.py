"""Where this user keeps what processes write besides logs.

Two kinds: a cache can be made again at any time, state cannot without loss. Nothing is created
here.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path


def cache_directory(environ: Mapping[str, str]) -> Path:
    """Return where this user keeps what can be made again."""
    return _directory(environ, "PACELINE_CACHE_DIR", "XDG_CACHE_HOME", ".cache")


def state_directory(environ: Mapping[str, str]) -> Path:
    """Return where this user keeps what should last."""
    return _directory(environ, "PACELINE_STATE_DIR", "XDG_STATE_HOME", ".local/state")


def _directory(environ: Mapping[str, str], own: str, xdg: str, default: str) -> Path:
    if environ.get(own):
        return Path(environ[own])
    base = environ.get(xdg)
    return (Path(base) if base else Path.home() / default) / "paceline"
