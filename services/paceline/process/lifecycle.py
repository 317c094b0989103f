"""How processes and tasks end: signals, dying with the parent, owned tasks."""

from __future__ import annotations

import asyncio
import ctypes
import logging
import os
import signal
import sys
from collections.abc import Coroutine
from typing import Any

from paceline.domain.errors import PacelineError

logger = logging.getLogger(__name__)

EXIT_WITH_PARENT_VAR = "PACELINE_EXIT_WITH_PARENT"
"""Environment variable by which a supervisor asks its children to end with it."""

_PR_SET_PDEATHSIG = 1


def exit_with_parent() -> None:
    """Ask Linux for SIGTERM when the parent dies, if the environment wants it; else do nothing."""
    if sys.platform == "linux" and os.environ.get(EXIT_WITH_PARENT_VAR) == "1":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def die_with_parent() -> None:
    """Ask Linux to kill this process when its parent dies; for children that hold no state."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def stop_event() -> asyncio.Event:
    """Return an event that SIGTERM and SIGINT set; call inside the running loop."""
    event = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, event.set)
    return event


class Tasks:
    """Owns background tasks: logs those that crash, cancels all at the end.

    A vital task that ends by an error sets the stop event, so that the process leaves in
    order instead of limping on.
    """

    def __init__(self, stop: asyncio.Event | None = None) -> None:
        self._stop = stop
        self._tasks: set[asyncio.Task[Any]] = set()
        self.has_vital_crash = False

    def spawn(
        self, coroutine: Coroutine[Any, Any, Any], name: str, *, is_vital: bool = False
    ) -> asyncio.Task[Any]:
        """Start a task and own it."""
        task = asyncio.create_task(coroutine, name=name)
        self._tasks.add(task)
        task.add_done_callback(lambda done: self._ended(done, is_vital))
        return task

    async def close(self) -> None:
        """Cancel all tasks and wait for them."""
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _ended(self, task: asyncio.Task[Any], is_vital: bool) -> None:
        self._tasks.discard(task)
        error = None if task.cancelled() else task.exception()
        if error is None:
            return
        fields = {"task": task.get_name(), "error": str(error)}
        # Errors of the contract say it all; only what nobody foresaw needs its trace.
        is_known = isinstance(error, PacelineError)
        logger.error("task-crashed", extra={"fields": fields}, exc_info=None if is_known else error)
        if is_vital:
            self.has_vital_crash = True
            if self._stop is not None:
                self._stop.set()
