"""Carries what children print to stderr or files, line by line, and keeps the last lines."""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
from collections import deque
from pathlib import Path
from typing import Protocol

TAIL_LINES = 20
_READ_BYTES = 1 << 16
_MAX_LINE_BYTES = 1 << 20


class LogSink(Protocol):
    """Takes whole lines of one child. Never raises: logs must not end the platform."""

    def write(self, child: str, lines: bytes) -> None:
        """Write lines, each with its end."""
        ...

    def close(self) -> None:
        """Let go of files."""
        ...


class StderrSink:
    """Passes lines through to stderr, except those of `quiet` children."""

    def __init__(self, quiet: frozenset[str] = frozenset()) -> None:
        self._quiet = quiet

    def write(self, child: str, lines: bytes) -> None:
        """Write lines to stderr."""
        if child not in self._quiet:
            with contextlib.suppress(OSError, ValueError):
                sys.stderr.buffer.write(lines)
                sys.stderr.flush()

    def close(self) -> None:
        """Leave stderr open."""


class DirectorySink:
    """Appends lines to DIR/<child>.log."""

    def __init__(self, directory: Path) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self._directory = directory
        self._fds: dict[str, int] = {}

    def write(self, child: str, lines: bytes) -> None:
        """Append lines to the child's file."""
        with contextlib.suppress(OSError):
            if child not in self._fds:
                path = self._directory / f"{child}.log"
                self._fds[child] = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
            os.write(self._fds[child], lines)

    def close(self) -> None:
        """Close all files."""
        for fd in self._fds.values():
            os.close(fd)


class LogPipe:
    """The pipe that one incarnation of a child writes to.

    A pipe of our own, because asyncio's ends a child's `wait` only after the last of its
    descendants closed the pipe, and a killed worker may leave one for a moment.
    """

    def __init__(self, child: str, sink: LogSink, tail: deque[bytes]) -> None:
        self._child = child
        self._sink = sink
        self._tail = tail
        self._read_fd, self.write_fd = os.pipe()

    async def open(self) -> None:
        """Start reading; call after the child got its end."""
        os.close(self.write_fd)
        reader = asyncio.StreamReader()
        self._transport, _ = await asyncio.get_running_loop().connect_read_pipe(
            lambda: asyncio.StreamReaderProtocol(reader), os.fdopen(self._read_fd, "rb")
        )
        self._pump = asyncio.create_task(self._carry(reader), name=f"logs-{self._child}")

    async def close(self, timeout_s: float = 1.0) -> None:
        """Carry what is left, then stop reading."""
        await asyncio.wait({self._pump}, timeout=timeout_s)
        self._pump.cancel()
        await asyncio.gather(self._pump, return_exceptions=True)
        self._transport.close()

    def discard(self) -> None:
        """Close both ends of a pipe that no child got."""
        os.close(self.write_fd)
        os.close(self._read_fd)

    async def _carry(self, reader: asyncio.StreamReader) -> None:
        rest = b""
        while data := await reader.read(_READ_BYTES):
            lines, end, rest = (rest + data).rpartition(b"\n")
            if len(rest) > _MAX_LINE_BYTES:
                lines, end, rest = lines + end + rest, b"\n", b""
            if end:
                self._write(lines + end)
        if rest:
            self._write(rest + b"\n")

    def _write(self, lines: bytes) -> None:
        self._tail.extend(lines.splitlines())
        self._sink.write(self._child, lines)
