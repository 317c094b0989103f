"""Waiting for a condition with a deadline, the only way tests wait."""

from __future__ import annotations

import asyncio
import inspect
import time
from collections.abc import Awaitable, Callable
from typing import TypeVar

T = TypeVar("T")
_POLL_S = 0.02


async def until(condition: Callable[[], T | Awaitable[T]], timeout_s: float = 10.0) -> T:
    """Return the first truthy value of `condition`; fail after `timeout_s`."""
    deadline = time.monotonic() + timeout_s
    while True:
        value = condition()
        if inspect.isawaitable(value):
            value = await value
        if value:
            return value
        assert time.monotonic() < deadline, f"condition not met within {timeout_s} s"
        await asyncio.sleep(_POLL_S)


def until_sync(condition: Callable[[], T], timeout_s: float = 10.0) -> T:
    """Return the first truthy value of `condition`; fail after `timeout_s`."""
    deadline = time.monotonic() + timeout_s
    while True:
        value = condition()
        if value:
            return value
        assert time.monotonic() < deadline, f"condition not met within {timeout_s} s"
        time.sleep(_POLL_S)


async def stays(condition: Callable[[], bool], duration_s: float) -> None:
    """Watch that something does not change for a while; fail as soon as it does."""
    end = time.monotonic() + duration_s
    while time.monotonic() < end:
        assert condition(), f"the condition did not hold for {duration_s} s"
        await asyncio.sleep(_POLL_S)
