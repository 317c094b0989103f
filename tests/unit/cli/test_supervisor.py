"""Supervision of real processes: restarts, order of the end, nothing left behind."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from paceline.cli.child import ChildSpec
from paceline.cli.supervisor import Supervisor
from tests.unit.cli.conftest import is_alive, python_child
from tests.waiting import until, until_sync

SLEEP = "import time; print('up', flush=True); time.sleep(600)"
NOTE_TERM = """
import signal, sys, time
def note(*_):
    with open(sys.argv[1], "a") as file:
        file.write(sys.argv[2] + " begins\\n")
        file.flush()
        time.sleep(0.1)
        file.write(sys.argv[2] + " ends\\n")
    sys.exit(0)
signal.signal(signal.SIGTERM, note)
print("up", flush=True)
time.sleep(600)
"""
STUBBORN = """
import signal, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
print("up", flush=True)
time.sleep(600)
"""
PARENT = """
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
print(child.pid, flush=True)
time.sleep(600)
"""


def log_of(tmp_path: Path, name: str) -> str:
    path = tmp_path / "logs" / f"{name}.log"
    return path.read_text() if path.exists() else ""


async def test_a_killed_child_comes_back_as_another_process(supervisor: Supervisor) -> None:
    child = supervisor.start(python_child("sleeper", SLEEP))
    await until(lambda: child.num_starts == 1)
    first = child.pid
    assert first is not None
    os.kill(first, signal.SIGKILL)
    await until(lambda: child.num_starts == 2)
    assert child.pid != first
    assert child.num_crashes == 1
    assert child.exit_code == -signal.SIGKILL
    assert supervisor.pids(["gateway", "decode"]) == {"gateway": [child.pid], "decode": []}


async def test_every_start_is_reported(tmp_path: Path, supervisor: Supervisor) -> None:
    starts: list[list[int]] = []
    supervisor._on_change = lambda: starts.append(supervisor.pids(["gateway"])["gateway"])
    child = supervisor.start(python_child("crasher", "raise SystemExit(3)"))
    await until(lambda: child.num_crashes >= 3)
    assert child.exit_code == 3
    assert len(starts) >= 3
    assert len({pids[0] for pids in starts}) == len(starts)


async def test_a_command_that_does_not_exist_is_a_crash_with_its_reason(
    supervisor: Supervisor,
) -> None:
    child = supervisor.start(ChildSpec("ghost", "gateway", ("/no/such/program",), {}))
    await until(lambda: child.num_crashes >= 1)
    assert any("No such file" in line for line in child.last_lines)


async def test_a_changed_spec_holds_from_the_next_start(
    tmp_path: Path, supervisor: Supervisor
) -> None:
    child = supervisor.start(python_child("printer", "print('one'); raise SystemExit(1)"))
    await until(lambda: child.num_crashes >= 1)
    child.spec = python_child("printer", "import time; print('two', flush=True); time.sleep(600)")
    await until(lambda: "two" in log_of(tmp_path, "printer"))


async def test_drain_ends_callers_before_those_they_call(
    tmp_path: Path, supervisor: Supervisor
) -> None:
    notes = tmp_path / "notes"
    for name, role in [
        ("redis", "redis"),
        ("kv-0", "kvstore"),
        ("prefill-0", "prefill"),
        ("decode-0", "decode"),
        ("gateway-0", "gateway"),
    ]:
        supervisor.start(python_child(name, NOTE_TERM, str(notes), name, role=role))
    for child in supervisor.children:
        name = child.spec.name
        await until(lambda name=name: "up" in log_of(tmp_path, name))  # type: ignore[misc]
    assert await supervisor.drain()
    lines = notes.read_text().splitlines()
    assert lines[:2] == ["gateway-0 begins", "gateway-0 ends"]
    assert {line.split()[0] for line in lines[2:6]} == {"prefill-0", "decode-0"}
    assert lines[6:] == ["kv-0 begins", "kv-0 ends", "redis begins", "redis ends"]
    assert all(child.num_crashes == 0 for child in supervisor.children)


async def test_a_stubborn_child_is_killed_after_its_grace(
    tmp_path: Path, supervisor: Supervisor
) -> None:
    child = supervisor.start(python_child("stubborn", STUBBORN, grace_s=0.2))
    await until(lambda: "up" in log_of(tmp_path, "stubborn"))
    assert child.pid is not None
    assert not await supervisor.drain()
    assert child.exit_code == -signal.SIGKILL
    assert not is_alive(child.pid)


async def test_stop_does_not_wait_for_a_back_off(supervisor: Supervisor) -> None:
    child = supervisor.start(python_child("crasher", "raise SystemExit(1)"))
    await until(lambda: child.num_crashes >= 3)
    async with asyncio.timeout(2.0):
        assert await child.stop()
    starts = child.num_starts
    await asyncio.sleep(0)
    assert child.num_starts == starts


async def test_stop_right_after_start_leaves_nothing(supervisor: Supervisor) -> None:
    child = supervisor.start(python_child("sleeper", SLEEP))
    async with asyncio.timeout(5.0):
        await child.stop()
    assert child.pid is None or not is_alive(child.pid)


async def test_descendants_of_a_crashed_child_do_not_outlive_it(
    tmp_path: Path, supervisor: Supervisor
) -> None:
    child = supervisor.start(python_child("parent", PARENT))
    grandchild = int(await until(lambda: log_of(tmp_path, "parent").strip()))
    assert is_alive(grandchild)
    assert child.pid is not None
    os.kill(child.pid, signal.SIGKILL)
    await until(lambda: not is_alive(grandchild))


async def test_kill_all_ends_everything_at_once(tmp_path: Path, supervisor: Supervisor) -> None:
    children = [
        supervisor.start(python_child(name, STUBBORN, grace_s=60)) for name in ("one", "two")
    ]
    await until(lambda: all("up" in log_of(tmp_path, c.spec.name) for c in children))
    async with asyncio.timeout(2.0):
        draining = asyncio.create_task(supervisor.drain())
        supervisor.kill_all()
        await draining
    assert not any(is_alive(child.pid) for child in children if child.pid is not None)


async def test_logs_keep_lines_whole_and_the_last_ones_at_hand(
    tmp_path: Path, supervisor: Supervisor
) -> None:
    code = """
import sys, time
for i in range(1000):
    sys.stderr.write("x" * (i % 50))
    sys.stderr.write(f" {i}\\n")
sys.stderr.write("no end")
"""
    child = supervisor.start(python_child("writer", code))
    await until(lambda: child.num_crashes >= 1)
    lines = log_of(tmp_path, "writer").splitlines()
    assert lines[:1001] == [*("x" * (i % 50) + f" {i}" for i in range(1000)), "no end"]


SUPERVISOR = """
import asyncio, os, sys
from pathlib import Path
from paceline.cli.child_logs import DirectorySink
from paceline.cli.child import ChildSpec
from paceline.cli.supervisor import Supervisor
from paceline.process.lifecycle import Tasks

async def run():
    supervisor = Supervisor(Tasks(), DirectorySink(Path(sys.argv[1])))
    code = "import time; time.sleep(600)"
    argv = (sys.executable, "-I", "-S", "-c", code)
    child = supervisor.start(ChildSpec("sleeper", "gateway", argv, dict(os.environ)))
    while child.pid is None:
        await asyncio.sleep(0.01)
    print(child.pid, flush=True)
    await asyncio.sleep(600)

asyncio.run(run())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the parent's death is a Linux signal")
def test_children_do_not_outlive_a_killed_supervisor(tmp_path: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", SUPERVISOR, str(tmp_path)], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        child = int(process.stdout.readline())
        assert is_alive(child)
        process.kill()
        until_sync(lambda: not is_alive(child))
