"""Workers and Redis that die, hang and come back: what happens to requests meanwhile."""

from __future__ import annotations

import asyncio
import time
from dataclasses import replace
from typing import Any

import grpc
import pytest

from paceline.domain.errors import ExhaustedError
from paceline.domain.member import Role
from paceline.gateway.fleet import VANISHED_S
from paceline.v1 import worker_pb2
from tests.redis_server import RedisServer
from tests.unit.gateway.scripted_worker import (
    LEASE_S,
    abort,
    answering,
    breaking,
    fail,
    hang,
)
from tests.unit.gateway.stack import LONG_PROMPT, Answer, Stack, request_for, value_of
from tests.unit.gateway.test_resume import expected, ids_of
from tests.waiting import stays, until

UNAVAILABLE = abort(grpc.StatusCode.UNAVAILABLE)


async def running(stack: Stack, *, num_tokens: int, **fields: Any) -> asyncio.Task[Answer]:
    """Start a request of 20 tokens per second and wait until it runs."""
    stack.stage.decode_default = answering(pause_s=0.05)
    task = asyncio.create_task(stack.generate(request_for(max_tokens=num_tokens, **fields)))
    await until(lambda: any(worker.num_running for worker in stack.workers))
    return task


async def test_the_only_worker_is_used_again_as_soon_as_it_answers(redis: RedisServer) -> None:
    async with Stack(redis.url) as stack:
        await stack.add()
        stack.stage.decode("r", breaking(3, UNAVAILABLE))
        request = request_for(request_id="r")
        started = time.monotonic()
        answer = await stack.generate(request)
        assert time.monotonic() - started < 1.0
        assert ids_of(answer) == expected(request, 8)
        # Trusted again: the next one does not wait either.
        assert not stack.fleet.is_suspect(stack.member(stack.workers[0]))


async def test_a_request_survives_the_restart_of_the_only_worker(redis: RedisServer) -> None:
    async with Stack(redis.url) as stack:
        worker = await stack.add(worker_id="decode")
        task = await running(stack, num_tokens=20)
        await until(lambda: value_of(stack.metrics.completion_tokens) >= 2)
        await worker.kill()
        late = asyncio.create_task(stack.generate(request_for(max_tokens=4)))
        # Long after the lease of the dead one and all belief in it.
        await stays(lambda: not task.done() and not late.done(), LEASE_S + VANISHED_S + 1.5)
        await stack.add(worker_id="decode")
        answer = await task
        assert ids_of(answer) == expected(request_for(), 20)
        assert answer.usage[0].migrations == 1
        assert len((await late).ids[0]) == 4
        await stack.until_at_rest()


async def test_a_dead_worker_with_a_record_costs_no_attempts(redis: RedisServer) -> None:
    async with Stack(redis.url, max_attempts=2) as stack:
        worker = await stack.add(worker_id="decode")
        await worker._server.drain(0.0)
        task = asyncio.create_task(stack.generate(request_for(max_tokens=4)))
        await stays(lambda: not task.done(), 2.5)
        await worker.fall_silent()
        await stack.add(worker_id="decode")
        assert len((await task).ids[0]) == 4


async def test_a_worker_back_on_its_old_port_is_found(redis: RedisServer) -> None:
    async with Stack(redis.url) as stack:
        worker = await stack.add()
        port = int(worker.member.address.rpartition(":")[2])
        task = await running(stack, num_tokens=20)
        await worker._server.drain(0.0)
        await stays(lambda: not task.done(), 0.5)
        await worker.serve(port, is_ready=False)
        # Not given work before it is ready.
        await stays(lambda: len(worker.decode_calls) == 1, 0.5)
        worker._server.set_ready(True)
        answer = await asyncio.wait_for(task, 5)
        assert ids_of(answer) == expected(request_for(), 20)


async def test_nobody_comes_in_time(redis: RedisServer) -> None:
    async with Stack(redis.url, wait_for_worker_s=0.3) as stack:
        refusal = await stack.refused(request_for())
        assert (refusal.code, refusal.reason) == (
            grpc.StatusCode.UNAVAILABLE,
            "no-ready-worker",
        )
        assert refusal.retry_s
        worker = await stack.add()
        task = await running(stack, num_tokens=20)
        await until(lambda: value_of(stack.metrics.completion_tokens) >= 2)
        await worker.kill()
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await task
        assert error.value.code() == grpc.StatusCode.UNAVAILABLE
        assert "the stream broke after" in str(error.value.details())
        await stack.until_at_rest()


async def test_a_suspect_is_avoided_while_others_are_there(redis: RedisServer) -> None:
    async with Stack(redis.url) as stack:
        await stack.add(count=2)
        stack.stage.decode("r", breaking(0, UNAVAILABLE))
        await stack.generate(request_for(request_id="r"))
        broken = next(w for w in stack.workers if stack.fleet.is_suspect(stack.member(w)))
        await asyncio.gather(*(stack.generate(request_for()) for _ in range(5)))
        assert len(broken.decode_calls) == 1


async def test_a_full_worker_sends_the_request_to_another(redis: RedisServer) -> None:
    async with Stack(redis.url, max_attempts=3) as stack:
        await stack.add(count=2)
        full = breaking(0, fail(ExhaustedError("the worker carries 1024 requests")))
        stack.stage.decode("r", full)
        request = request_for(request_id="r")
        assert ids_of(await stack.generate(request)) == expected(request, 8)
        stack.stage.decode("all", full, full, full)
        refusal = await stack.refused(request_for(request_id="all"))
        assert refusal.code == grpc.StatusCode.RESOURCE_EXHAUSTED
        assert refusal.retry_s
        # A stream that has begun is not ended by a full worker.
        stack.stage.decode("begun", breaking(2, UNAVAILABLE), full, answering())
        request = request_for(request_id="begun")
        answer = await stack.generate(request)
        assert ids_of(answer) == expected(request, 8)
        assert answer.usage[0].migrations == 1


async def test_a_hung_decode_worker_is_left_when_its_lease_ends(redis: RedisServer) -> None:
    async with Stack(redis.url) as stack:
        await stack.add(count=2)
        stack.stage.decode("r", breaking(3, hang))
        request = request_for(request_id="r")
        task = asyncio.create_task(stack.generate(request))
        await until(lambda: any(w.num_running for w in stack.workers))
        hung = next(w for w in stack.workers if w.num_running)
        await hung.fall_silent()
        started = time.monotonic()
        await until(lambda: hung.member.id in stack.fleet._vanished)
        # New requests go elsewhere at once, though it is still believed in.
        await asyncio.gather(*(stack.generate(request_for()) for _ in range(4)))
        assert len(hung.decode_calls) == 1
        answer = await task
        assert ids_of(answer) == expected(request, 8)
        assert answer.usage[0].migrations == 1
        assert time.monotonic() - started < LEASE_S + VANISHED_S + 1.5
        # It goes on: the same incarnation is welcome again, without suspicion.
        await hung.join()
        await until(lambda: stack.knows(hung))
        assert not stack.fleet.is_suspect(stack.member(hung))
        await stack.until_at_rest()


async def test_a_hung_prefill_worker_leaves_time_for_another(redis: RedisServer) -> None:
    async def hanging(request: Any, context: Any) -> Any:
        yield worker_pb2.PrefillResponse(published_tokens=16)
        await hang(context)

    async with Stack(redis.url) as stack:
        await stack.add(Role.PREFILL)
        await stack.add()
        # Its heart beats on, as when only its engine hangs.
        stack.stage.prefill("r", hanging)
        request = request_for(LONG_PROMPT, request_id="r")
        answer = await stack.generate(request, timeout=4.0)
        assert ids_of(answer) == expected(request, 8)
        assert answer.usage[0].e2e_s < 3.0
        assert answer.usage[0].prefill_worker == stack.workers[1].member.id
        await until(lambda: stack.workers[0].num_cancelled == 1)
        await stack.until_at_rest()


async def test_a_prefill_that_reports_is_given_its_time(redis: RedisServer) -> None:
    async def slow(request: Any, context: Any) -> Any:
        for _ in range(8):
            await asyncio.sleep(0.2)
            yield worker_pb2.PrefillResponse(published_tokens=16)
        yield worker_pb2.PrefillResponse(published_tokens=600, is_last=True)

    async with Stack(redis.url) as stack:
        await stack.add(Role.PREFILL)
        await stack.add()
        stack.stage.prefill("r", slow)
        answer = await stack.generate(request_for(LONG_PROMPT, request_id="r"), timeout=3.0)
        assert answer.usage[0].prefill_worker == stack.workers[0].member.id


async def test_a_flushed_redis_moves_no_stream(redis_server: RedisServer) -> None:
    async with Stack(redis_server.url) as stack:
        await stack.add(Role.PREFILL)
        await stack.add(count=2)
        tasks = [await running(stack, num_tokens=60, request_id=f"r-{i}") for i in range(4)]
        while not all(task.done() for task in tasks):
            redis_server.command("FLUSHALL")
            assert await stack.generate(request_for(LONG_PROMPT, max_tokens=1))
            await stays(lambda: value_of(stack.metrics.migrations) == 0, 0.4)
        for task in tasks:
            answer = await task
            assert ids_of(answer) == expected(request_for(), 60)
            assert answer.usage[0].migrations == 0
        assert value_of(stack.metrics.migrations) == 0


async def test_a_silent_stream_outlives_a_flush(redis_server: RedisServer) -> None:
    async with Stack(redis_server.url) as stack:
        await stack.add()
        # Silent for longer than WATCH_S at a time, so that each look counts.
        stack.stage.decode_default = answering(pause_s=0.8)
        task = asyncio.create_task(stack.generate(request_for(max_tokens=4)))
        for _ in range(5):
            await stays(lambda: value_of(stack.metrics.migrations) == 0, 0.5)
            redis_server.command("FLUSHALL")
        assert (await task).usage[0].migrations == 0


async def test_a_restarted_redis_costs_no_request(redis_server: RedisServer) -> None:
    async with Stack(redis_server.url) as stack:
        await stack.add(Role.PREFILL)
        await stack.add()
        assert value_of(stack.metrics.redis_up) == 1
        task = await running(stack, num_tokens=140)
        redis_server.kill()
        await until(lambda: not stack.fleet.has_redis)
        assert value_of(stack.metrics.redis_up) == 0
        # Longer than any lease.
        for _ in range(4):
            assert await stack.generate(request_for(LONG_PROMPT, max_tokens=1))
            await stays(lambda: not task.done(), 0.7)
        redis_server.start()
        await until(lambda: stack.fleet.has_redis)
        for _ in range(3):
            assert await stack.generate(request_for(LONG_PROMPT, max_tokens=1))
            await stays(lambda: not task.done(), 0.7)
        await until(lambda: not stack.fleet._vanished)
        answer = await task
        assert answer.usage[0].migrations == 0
        assert value_of(stack.metrics.redis_up) == 1


async def test_a_hung_redis_costs_half_a_second_at_most(redis_server: RedisServer) -> None:
    async with Stack(redis_server.url) as stack:
        await stack.add()
        redis_server.pause()
        try:
            started = time.monotonic()
            for _ in range(5):
                assert await stack.generate(request_for(range(4, 40), max_tokens=1))
            assert time.monotonic() - started < 2.0
        finally:
            redis_server.resume()


async def test_a_stream_from_a_worker_that_left_the_fleet_ends_by_itself(
    redis: RedisServer,
) -> None:
    async with Stack(redis.url) as stack:
        worker = await stack.add()
        task = await running(stack, num_tokens=80)
        await stack.add()
        # Cut off from Redis only; it streams on.
        await worker.fall_silent()
        await worker._membership.deregister(stack.member(worker))
        answer = await task
        assert ids_of(answer) == expected(request_for(), 80)
        assert answer.usage[0].migrations == 0
        await until(lambda: worker.member.address not in stack.fleet._channels._channels)


async def test_a_draining_worker_gets_no_new_work_and_keeps_its_streams(
    redis: RedisServer,
) -> None:
    async with Stack(redis.url) as stack:
        first = await stack.add()
        task = await running(stack, num_tokens=30)
        second = await stack.add()
        first.member = replace(first.member, is_draining=True)
        await until(lambda: stack.member(first).is_draining)
        await asyncio.gather(*(stack.generate(request_for(max_tokens=2)) for _ in range(4)))
        assert len(first.decode_calls) == 1 and len(second.decode_calls) == 4
        assert (await task).usage[0].migrations == 0


async def test_a_replaced_incarnation_is_lost_and_its_successor_trusted(
    redis: RedisServer,
) -> None:
    async with Stack(redis.url) as stack:
        first = await stack.add(worker_id="decode")
        old = stack.member(first)
        stack.fleet.suspect(old)
        await first.fall_silent()
        second = await stack.add(worker_id="decode")
        assert stack.fleet.has_lost(old)
        assert not stack.fleet.is_suspect(stack.member(second))
        assert not stack.fleet.has_lost(stack.member(second))
