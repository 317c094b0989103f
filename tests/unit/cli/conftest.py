"""A supervisor over real processes, with a back-off fit for tests."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from paceline.cli.backoff import BackoffPolicy
from paceline.cli.child import ChildSpec
from paceline.cli.child_logs import DirectorySink
from paceline.cli.supervisor import Supervisor
from paceline.process.lifecycle import Tasks

FAST = BackoffPolicy(first_s=0.05, max_s=0.2)


def python_child(
    name: str, code: str, *args: str, role: str = "gateway", grace_s: float = 5.0
) -> ChildSpec:
    """Return a child that runs a few lines of Python."""
    argv = (sys.executable, "-I", "-S", "-c", code, *args)
    return ChildSpec(name, role, argv, dict(os.environ), grace_s)


def is_alive(pid: int) -> bool:
    """Tell whether a process runs; one that only waits to be reaped does not."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except FileNotFoundError:
        return False
    return stat.rpartition(")")[2].split()[0] != "Z"


@pytest.fixture
async def supervisor(tmp_path: Path) -> AsyncIterator[Supervisor]:
    """Return a supervisor that logs to tmp_path/logs; its children are gone afterwards."""
    tasks = Tasks()
    sink = DirectorySink(tmp_path / "logs")
    supervisor = Supervisor(tasks, sink, FAST)
    yield supervisor
    supervisor.kill_all()
    await asyncio.gather(*(child.stop() for child in supervisor.children))
    await tasks.close()
    sink.close()
