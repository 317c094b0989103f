"""Where the command line prints: text for people, wherever it leads to."""

from __future__ import annotations

from contextlib import suppress


def say(text: str) -> None:
    """Print a line on stdout at once; a closed stdout is no error."""
    with suppress(OSError):
        print(text, flush=True)
