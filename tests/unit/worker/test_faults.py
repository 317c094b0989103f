"""Workers whose engine, node or time runs out: callers hear a retryable reason, nothing hangs."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import grpc
import pytest

from paceline.domain.errors import PacelineError, UnavailableError
from paceline.rpc.channel import map_rpc_error
from tests.redis_server import RedisServer
from tests.unit.kvstore.node_process import stats
from tests.unit.worker.conftest import NodeMaker, WorkerMaker
from tests.unit.worker.worker_process import (
    Caller,
    calling,
    children,
    make_prompt,
    make_spec,
    members,
    metric,
    num_fds,
    num_mappings,
)
from tests.waiting import until

ENDLESS_TOKENS = 1500
"""More than any test waits for."""


async def _failure(call: Any) -> PacelineError:
    """Read a call to its failing end."""
    with pytest.raises(grpc.aio.AioRpcError) as failure:
        await _read_all(call)
    return map_rpc_error(failure.value)


async def _read_all(call: Any) -> list[Any]:
    """Read a call to its end, also one whose first message was read before."""
    messages = []
    while (message := await call.read()) is not grpc.aio.EOF:
        messages.append(message)
    return messages


async def _open_streams(caller: Caller, count: int, max_tokens: int = ENDLESS_TOKENS) -> list[Any]:
    """Start calls and wait for the first message of each."""
    specs = [make_spec(make_prompt(20, seed), max_tokens) for seed in range(count)]
    calls = [caller.open_decode(spec) for spec in specs]
    for call in calls:
        await call.read()
    return calls


def _is_gone(redis: RedisServer, worker_id: str) -> Callable[[], Any]:
    async def check() -> bool:
        return worker_id not in [member.id for member in await members(redis.url)]

    return check


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
async def test_a_lost_engine_fails_its_streams_as_retryable_and_ends_the_worker(
    redis: RedisServer, make_worker: WorkerMaker, number: int
) -> None:
    worker = make_worker(f"lost-{int(number)}", "--engine-stall-s", "0.5")
    member = await worker.start()
    async with calling(member) as caller:
        calls = await _open_streams(caller, 3)
        os.kill(worker.engine_pid, number)
        started_s = time.monotonic()
        failures = await asyncio.gather(*(_failure(call) for call in calls))
        late = await _failure(caller.open_decode(make_spec([5])))
    for failure in [*failures, late]:
        assert isinstance(failure, UnavailableError)
    assert {failure.reason for failure in failures} == {"engine-died"}
    assert await worker.exit_code() == 1
    # A hung engine gets ten predicted steps.
    assert time.monotonic() - started_s < (3 if number == signal.SIGKILL else 15)
    await until(_is_gone(redis, worker.worker_id), 1)
    assert "Traceback" not in worker.log


async def test_sigterm_lets_streams_finish_and_refuses_new_ones(
    redis: RedisServer, make_worker: WorkerMaker
) -> None:
    worker = make_worker("drained")
    member = await worker.start()

    async def is_draining() -> bool:
        found = [m for m in await members(redis.url) if m.id == worker.worker_id]
        return any(m.is_draining for m in found)

    async with calling(member) as caller, calling(member) as other:
        calls = await _open_streams(caller, 2, max_tokens=300)
        watch = asyncio.create_task(_watch_health(member.address))
        worker.signal(signal.SIGTERM)
        await until(is_draining, 2)
        # Until the fleet has heard of it, calls are still welcome.
        await until(lambda: worker.events("draining"), 2)

        async def refusal() -> PacelineError | None:
            try:
                await other.decode(make_spec([7, 8], max_tokens=1))
            except grpc.aio.AioRpcError as error:
                return map_rpc_error(error)
            return None

        refused = await until(refusal, 2)  # type: ignore[arg-type]
        assert isinstance(refused, UnavailableError)
        answers = [await _read_all(call) for call in calls]
        num_tokens = [sum(len(c.token_ids) for m in a for c in m.chunks) for a in answers]
        assert all(n >= 290 for n in num_tokens)
        assert (await watch)[-1] == "NOT_SERVING"
    assert await worker.exit_code() == 0
    assert await _is_gone(redis, worker.worker_id)()
    assert len(worker.events("decode-finished", outcome="ok")) >= 2


async def test_streams_that_outlive_the_grace_end_as_retryable(make_worker: WorkerMaker) -> None:
    worker = make_worker("hurried", "--drain-grace-s", "0.3")
    member = await worker.start()
    async with calling(member) as caller:
        (call,) = await _open_streams(caller, 1)
        worker.signal(signal.SIGTERM)
        failure = await _failure(call)
    assert isinstance(failure, UnavailableError)
    assert failure.reason == "worker-stopping"
    assert await worker.exit_code(5) == 0


async def test_a_node_that_dies_and_returns_is_found_again(
    redis: RedisServer, directory: Path, make_node: NodeMaker, make_worker: WorkerMaker
) -> None:
    # The worker is there first: it serves without a node, and attaches when there is one.
    worker = make_worker("loyal", role="prefill", kv_node="kv-late")
    worker.launch()
    member = await worker.member(is_attached=False)
    async with calling(member) as caller:
        alone = await caller.prefill(make_spec(make_prompt(100, 1)))
        assert alone.messages[-1].is_last
        assert alone.messages[-1].published_tokens == 0

        node = make_node("kv-late", arena_mb=16)
        await node.start()
        await worker.member()
        assert await _published(caller, 2) == 99
        fds, pid = num_fds(worker.engine_pid), worker.engine_pid
        assert metric(member, "paceline_kv_link_up") == 1

        for seed in (3, 4):
            node.kill()
            # Requests go on while the node is away.
            assert (
                (await caller.prefill(make_spec(make_prompt(100, 10 * seed)))).messages[-1].is_last
            )
            await until(lambda: metric(member, "paceline_kv_link_up") == 0, 5)
            await node.start()
            await until(lambda: metric(member, "paceline_kv_link_up") == 1, 10)
            assert await _published(caller, seed) == 99
            # Blocks of before the crash are still there.
            assert await _published(caller, 2) == 99
        await caller.until_idle()
    assert worker.engine_pid == pid
    assert num_fds(pid) == fds
    assert num_mappings(pid, node.arena) == 1
    assert len(worker.events("kv-node-attached")) == 3


async def test_a_node_that_pauses_holds_nobody_up_and_keeps_nothing(
    make_node: NodeMaker, make_worker: WorkerMaker
) -> None:
    node = make_node("kv-paused", arena_mb=16)
    node_member = await node.start()
    worker = make_worker("patient", role="prefill", kv_node="kv-paused")
    member = await worker.start()
    async with calling(member) as caller:
        assert await _published(caller, 1) == 99
        reserved = (await stats(node_member)).num_reserved_slots
        os.kill(node.pid, signal.SIGSTOP)
        started_s = time.monotonic()
        await asyncio.gather(*(_published(caller, seed) for seed in range(20, 24)))
        # One deadline for the lookup, one or two for the commits behind each other.
        assert time.monotonic() - started_s < 9
        os.kill(node.pid, signal.SIGCONT)

        async def is_well() -> bool:
            state = await stats(node_member)
            is_calm = state.num_pinned_blocks == 0 and state.num_sessions == 1
            return is_calm and state.num_reserved_slots == reserved

        await until(is_well, 10)  # type: ignore[arg-type]
        assert await _published(caller, 1) == 99
        assert await _published(caller, 30) == 99


async def test_redis_may_come_later(tmp_path: Path, make_worker: WorkerMaker) -> None:
    late = RedisServer(tmp_path)
    worker = make_worker("early", redis_url=late.url)
    worker.launch()
    try:
        (ready,) = await until(lambda: worker.events("ready"), 60)
        assert worker.process is not None and worker.process.poll() is None
        # An engine with a kept step cost can be ready before the first connection fails.
        assert await until(lambda: worker.events("redis-lost"), 10)
        late.start()
        member = await worker.member()
        assert member.address == ready["address"]
        async with calling(member) as caller:
            assert len((await caller.decode(make_spec([5, 6, 7]))).tokens) == 8
        assert metric(member, "paceline_redis_up") == 1
        assert await worker.stop() == 0
    finally:
        late.kill()


@pytest.mark.parametrize("problem", ["model", "port"])
async def test_a_failed_start_says_why_in_one_line(make_worker: WorkerMaker, problem: str) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        if problem == "model":
            worker = make_worker("no-model", model=Path("/nowhere"))
        else:
            worker = make_worker("no-port", "--port", str(taken.getsockname()[1]))
        worker.launch()
        assert await worker.exit_code(60) == 1
    (error,) = [line for line in worker.log_lines if line["level"] == "error"]
    assert error["event"] == "start-failed"
    assert ("/nowhere" if problem == "model" else "in use") in error["error"]
    assert "Traceback" not in worker.log


async def test_sigterm_while_the_engine_loads_ends_at_once(make_worker: WorkerMaker) -> None:
    worker = make_worker("impatient")
    worker.launch()
    await until(lambda: children(worker.pid), 30)
    worker.signal(signal.SIGTERM)
    assert await worker.exit_code(5) == 0
    assert not worker.events("ready")


async def test_the_engine_survives_signals_to_the_group_and_dies_with_the_worker(
    make_worker: WorkerMaker,
) -> None:
    worker = make_worker("orphaned")
    member = await worker.start()
    engine_pid = worker.engine_pid
    for number in (signal.SIGINT, signal.SIGTERM):
        os.kill(engine_pid, number)
    async with calling(member) as caller:
        assert len((await caller.decode(make_spec([5, 6, 7]))).tokens) == 8
    worker.kill()

    def is_dead() -> bool:
        with suppress(FileNotFoundError):
            return "State:\tZ" in Path(f"/proc/{engine_pid}/status").read_text()
        return True

    await until(is_dead, 5)


async def _published(caller: Caller, seed: int) -> int:
    """Prefill a prompt of 100 tokens; return how many of them the store holds."""
    answer = await caller.prefill(make_spec(make_prompt(100, seed)))
    return int(answer.messages[-1].published_tokens)


async def _watch_health(address: str) -> list[str]:
    """Return the states that a health watch sees until it ends."""
    from grpc_health.v1 import health_pb2, health_pb2_grpc

    from paceline.rpc.channel import open_channel

    channel = open_channel(address)
    stub: Any = health_pb2_grpc.HealthStub(channel)
    try:
        watch = stub.Watch(health_pb2.HealthCheckRequest())
        names = health_pb2.HealthCheckResponse.ServingStatus.Name
        return [names(message.status) async for message in watch]
    finally:
        await channel.close()
