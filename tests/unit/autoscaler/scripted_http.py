"""A real TCP server that answers every request with bytes that a test chose."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

Answer = Callable[[str, asyncio.StreamWriter], Awaitable[None]]
"""Gets the request line and writes what comes back."""


@asynccontextmanager
async def scripted(answer: Answer) -> AsyncIterator[str]:
    """Yield the URL of a server; connections end after one answer."""
    tasks: set[asyncio.Task[None]] = set()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        tasks.add(task)
        try:
            head = await reader.readuntil(b"\r\n\r\n")
            await answer(head.split(b"\r\n", 1)[0].decode(), writer)
        except (ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
            pass
        finally:
            writer.close()
            tasks.discard(task)

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        server.close()
        for task in list(tasks):
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def always(status: str, body: bytes, *headers: str) -> Answer:
    """Return an answer of one status and body."""
    lines = [f"HTTP/1.1 {status}", f"Content-Length: {len(body)}", "Connection: close", *headers]
    data = "\r\n".join([*lines, "", ""]).encode() + body

    async def answer(_: str, writer: asyncio.StreamWriter) -> None:
        writer.write(data)
        await writer.drain()

    return answer
