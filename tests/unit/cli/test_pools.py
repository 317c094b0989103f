"""Pools of workers over real processes, and the service by which they are scaled."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from hypothesis import given
from hypothesis import strategies as st

from paceline.cli.child import ChildSpec
from paceline.cli.fleet_control import serve_control
from paceline.cli.pools import WorkerPools, choose_victims, free_number
from paceline.cli.supervisor import Supervisor
from paceline.domain.errors import InvalidRequestError
from paceline.v1 import fleet_control_pb2 as pb
from paceline.v1 import fleet_control_pb2_grpc
from tests.refusal import refusal_of
from tests.unit.cli.conftest import is_alive, python_child
from tests.waiting import until

MAX_WORKERS = 5

DRAINING = """
import pathlib, signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: None)
print("up", flush=True)
while not pathlib.Path(sys.argv[1]).exists():
    time.sleep(0.02)
"""
"""Goes on after SIGTERM until a file tells that its work is done."""


class Pools:
    """Pools whose workers end once `finish` says so."""

    def __init__(self, supervisor: Supervisor, directory: Path) -> None:
        self.supervisor = supervisor
        self.directory = directory
        self.workers = WorkerPools(supervisor, self.spec, MAX_WORKERS)

    def spec(self, role: str, number: int) -> ChildSpec:
        name = f"{role}-{number}"
        end = str(self.directory / f"{name}.end")
        return python_child(name, DRAINING, end, role=role, grace_s=20.0)

    def finish(self, *names: str) -> None:
        for name in names:
            (self.directory / f"{name}.end").touch()

    async def up(self, name: str) -> int:
        """Wait until a worker listens to signals; return its process id."""
        (child,) = [c for c in self.supervisor.children if c.spec.name == name]
        await until(lambda: "up" in child.last_lines)
        assert child.pid is not None
        return child.pid

    async def until_gone(self, *names: str) -> None:
        """Wait until nobody has these names any more."""
        await until(lambda: {c.spec.name for c in self.supervisor.children}.isdisjoint(names))


@pytest.fixture
async def pools(tmp_path: Path, supervisor: Supervisor) -> AsyncIterator[Pools]:
    pools = Pools(supervisor, tmp_path)
    yield pools
    supervisor.kill_all()


async def test_a_pool_grows_by_the_lowest_free_numbers(pools: Pools) -> None:
    assert pools.workers.scale("decode", 2).member_ids == ("decode-0", "decode-1")
    assert pools.workers.scale("decode", 4).member_ids == tuple(f"decode-{i}" for i in range(4))
    assert pools.workers.scale("prefill", 1).member_ids == ("prefill-0",)
    assert pools.workers.state("decode").ending_ids == ()


async def test_asking_again_changes_nothing(pools: Pools) -> None:
    first = pools.workers.scale("decode", 2)
    children = list(pools.supervisor.children)
    assert pools.workers.scale("decode", 2, ["decode-0"]) == first
    assert pools.supervisor.children == children
    pools.workers.scale("decode", 1, ["decode-0"])
    again = pools.workers.scale("decode", 1, ["decode-0"])
    assert (again.member_ids, again.ending_ids) == (("decode-1",), ("decode-0",))


async def test_a_victim_drains_and_its_number_is_free_once_its_process_is_gone(
    pools: Pools,
) -> None:
    pools.workers.scale("decode", 3)
    pid = await pools.up("decode-1")
    state = pools.workers.scale("decode", 2, ["decode-1"])
    assert (state.member_ids, state.ending_ids) == (("decode-0", "decode-2"), ("decode-1",))
    # It still has work to do, so its name is taken.
    state = pools.workers.scale("decode", 3)
    assert (state.member_ids[-1], state.ending_ids) == ("decode-3", ("decode-1",))
    assert is_alive(pid)
    pools.finish("decode-1")
    await pools.until_gone("decode-1")
    assert not is_alive(pid)
    assert pools.workers.scale("decode", 4).member_ids[-1] == "decode-1"


async def test_a_victim_stays_away_and_a_crashed_worker_comes_back(pools: Pools) -> None:
    pools.workers.scale("decode", 2)
    for number in range(2):
        await pools.up(f"decode-{number}")
    pools.workers.scale("decode", 1, ["decode-0"])
    (victim, other) = pools.supervisor.of_role("decode")
    assert victim.pid is not None and other.pid is not None
    os.kill(victim.pid, signal.SIGKILL)
    os.kill(other.pid, signal.SIGKILL)
    await until(lambda: other.num_starts == 2)
    await pools.until_gone("decode-0")
    assert (victim.num_starts, victim.num_crashes) == (1, 0)
    assert pools.workers.state("decode").member_ids == ("decode-1",)


async def test_every_change_is_reported_with_the_processes_of_then(
    tmp_path: Path, pools: Pools
) -> None:
    seen: list[int] = []
    pools.supervisor._on_change = lambda: seen.append(
        len(pools.supervisor.pids(["decode"])["decode"])
    )
    pools.workers.scale("decode", 2)
    for number in range(2):
        await pools.up(f"decode-{number}")
    assert seen == [1, 2]
    pools.finish("decode-1")
    pools.workers.scale("decode", 1)
    await pools.until_gone("decode-1")
    assert seen == [1, 2, 1]


async def test_all_end_when_the_platform_ends_while_some_drain_and_some_start(
    pools: Pools,
) -> None:
    pools.workers.scale("decode", 3)
    pids = [await pools.up(f"decode-{number}") for number in range(3)]
    pools.workers.scale("decode", 1)
    pools.workers.scale("prefill", 2)
    pools.finish(*(f"decode-{i}" for i in range(3)), *(f"prefill-{i}" for i in range(2)))
    assert await pools.supervisor.drain()
    pids += [c.pid for c in pools.supervisor.of_role("prefill") if c.pid is not None]
    assert not any(map(is_alive, pids))


@pytest.mark.parametrize(
    ("role", "replicas", "field"),
    [("king", 1, "role"), ("gateway", 1, "role"), ("decode", 6, "replicas")],
)
async def test_what_cannot_be_is_refused(
    pools: Pools, role: str, replicas: int, field: str
) -> None:
    with pytest.raises(InvalidRequestError) as error:
        pools.workers.scale(role, replicas)
    assert error.value.field == field
    assert not pools.supervisor.children


@given(
    running=st.lists(st.sampled_from("abcdef"), unique=True),
    count=st.integers(-3, 8),
    named=st.lists(st.sampled_from("abcdefxyz")),
)
def test_named_ones_end_first_then_the_youngest(
    running: list[str], count: int, named: list[str]
) -> None:
    victims = choose_victims(running, count, named)
    assert victims <= set(running)
    assert len(victims) == min(max(0, count), len(running))
    order = [n for n in dict.fromkeys(named) if n in running]
    assert victims >= set(order[: max(0, count)])
    rest = [name for name in running if name not in order]
    spared = [name for name in rest if name not in victims]
    assert spared == rest[: len(spared)]


def test_the_lowest_number_is_taken() -> None:
    assert free_number("decode", ()) == 0
    assert free_number("decode", ["decode-0", "decode-2", "prefill-1"]) == 1


# -- over gRPC ----------------------------------------------------------------------------


@pytest.fixture
async def stub(pools: Pools) -> AsyncIterator[Any]:
    server = await serve_control(pools.workers)
    async with grpc.aio.insecure_channel(server.address) as channel:
        yield fleet_control_pb2_grpc.FleetControlServiceStub(channel)
    await server.drain(0.0)


async def test_every_pool_is_shown_as_it_is(pools: Pools, stub: Any) -> None:
    response = await stub.GetScale(pb.GetScaleRequest(), timeout=5)
    assert [(p.role, p.replicas) for p in response.pools] == [("prefill", 0), ("decode", 0)]
    await stub.SetScale(pb.SetScaleRequest(role="decode", replicas=2), timeout=5)
    await pools.up("decode-0")
    answer = await stub.SetScale(
        pb.SetScaleRequest(role="decode", replicas=1, victims=["ghost", "decode-0"]), timeout=5
    )
    assert answer.pool == pb.PoolScale(
        role="decode", replicas=1, member_ids=["decode-1"], ending_ids=["decode-0"]
    )
    response = await stub.GetScale(pb.GetScaleRequest(), timeout=5)
    assert response.pools[1] == answer.pool


async def test_calls_at_once_leave_a_pool_of_a_size_that_one_asked_for(
    pools: Pools, stub: Any
) -> None:
    sizes = [1, 4, 2, 5, 3, 3, 0, 4]
    answers = await asyncio.gather(
        *(stub.SetScale(pb.SetScaleRequest(role="decode", replicas=n), timeout=5) for n in sizes)
    )
    assert [len(a.pool.member_ids) for a in answers] == sizes
    state = pools.workers.state("decode")
    assert len(state.member_ids) in sizes
    names = [child.spec.name for child in pools.supervisor.children]
    assert len(names) == len(set(names))


@pytest.mark.parametrize(
    ("request_", "field", "what"),
    [
        (pb.SetScaleRequest(replicas=1), "role", "pools are prefill, decode"),
        (pb.SetScaleRequest(role="decode", replicas=6), "replicas", "at most 5"),
        (pb.SetScaleRequest(role="decode", replicas=2**32 - 1), "replicas", "at most 5"),
    ],
)
async def test_a_caller_hears_what_is_wrong(
    pools: Pools, stub: Any, request_: pb.SetScaleRequest, field: str, what: str
) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await stub.SetScale(request_, timeout=5)
    refusal = refusal_of(error.value)
    assert refusal.code is grpc.StatusCode.INVALID_ARGUMENT
    assert (refusal.field, refusal.reason) == (field, "invalid-argument")
    assert what in refusal.message
