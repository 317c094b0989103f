"""Streams of the draft service: messages with a deadline each, files in pieces."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from paceline.domain.errors import DeadlineError, NotFoundError

PIECE_BYTES = 256 * 1024
"""Bytes per message of FetchDraft: large against the cost of a message, small against its limit."""

REFUSAL_S = 5.0
"""Longest time in which a client that is refused may go on sending."""


async def next_message(requests: AsyncIterator[Any], timeout_s: float) -> Any:
    """Return the next message, None at the end.

    Raises:
        DeadlineError: none came in time.
    """
    try:
        async with asyncio.timeout(timeout_s):
            return await anext(requests, None)
    except TimeoutError as error:
        raise DeadlineError(f"nothing came for {timeout_s:g} s", reason="silent-peer") from error


async def read_on(requests: AsyncIterator[Any]) -> None:
    """Let a client say the rest: one that is sending would not hear why it is refused."""
    with suppress(TimeoutError):
        async with asyncio.timeout(REFUSAL_S):
            async for _ in requests:
                pass


async def pieces(path: Path) -> AsyncIterator[bytes]:
    """Yield a file's bytes, at least one piece.

    Raises:
        NotFoundError: it is not there any more.
    """
    try:
        file = await asyncio.to_thread(open, path, "rb")
        try:
            data = await asyncio.to_thread(file.read, PIECE_BYTES)
            yield data
            while data := await asyncio.to_thread(file.read, PIECE_BYTES):
                yield data
        finally:
            await asyncio.to_thread(file.close)
    except FileNotFoundError as error:
        raise NotFoundError("the version was removed", reason="draft-not-found") from error
