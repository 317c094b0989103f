"""Deadlines, cancellations and slow clients in every phase: told right, nothing left behind."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Any

import grpc
import pytest

from paceline.domain.member import Role
from paceline.v1 import worker_pb2
from paceline.v1.inference_pb2 import GenerateRequest, Message, MessageList
from tests.redis_server import RedisServer
from tests.unit.gateway.scripted_worker import abort, answering, breaking, hang
from tests.unit.gateway.stack import LONG_PROMPT, Stack, refusal_of, request_for
from tests.waiting import stays, until


async def no_worker(stack: Stack) -> GenerateRequest:
    """Wait for a worker to appear."""
    return request_for()


async def in_prefill(stack: Stack) -> GenerateRequest:
    """Hang while the prompt is computed."""

    async def script(request: Any, context: Any) -> Any:
        yield worker_pb2.PrefillResponse(published_keys=[b"k" * 16], published_tokens=16)
        await hang(context)

    await stack.add(Role.KVSTORE, worker_id="near", node_id="near")
    await stack.add(Role.KVSTORE, worker_id="far", node_id="far")
    await stack.add(Role.PREFILL, node_id="near")
    await stack.add(node_id="far")
    stack.stage.prefill("r", script)
    return request_for(LONG_PROMPT, request_id="r")


async def before_the_first_token(stack: Stack) -> GenerateRequest:
    """Hang in the decode worker's queue."""
    await stack.add()
    stack.stage.decode("r", breaking(0, hang))
    return request_for(request_id="r")


async def between_tokens(stack: Stack) -> GenerateRequest:
    """Hang in the middle of the output."""
    await stack.add()
    stack.stage.decode("r", breaking(3, hang))
    return request_for(request_id="r", n=2)


async def between_workers(stack: Stack) -> GenerateRequest:
    """Wait for a worker to go on with a broken stream."""
    worker = await stack.add()
    unavailable = abort(grpc.StatusCode.UNAVAILABLE)

    async def leaving(context: Any) -> None:
        worker._server.set_ready(False)
        await unavailable(context)

    stack.stage.decode("r", breaking(3, leaving))
    return request_for(request_id="r")


PHASES: list[Callable[[Stack], Awaitable[GenerateRequest]]] = [
    no_worker,
    in_prefill,
    before_the_first_token,
    between_tokens,
    between_workers,
]


def name_of(phase: Any) -> str:
    return str(phase.__name__)


def assert_workers_were_told(stack: Stack) -> None:
    """Each hanging call saw its cancellation."""
    hanging = [w for w in stack.workers if w.decode_calls or w.prefill_calls]
    assert not any(w.num_running for w in stack.workers)
    assert sum(w.num_cancelled for w in hanging) <= 1


@pytest.mark.parametrize("phase", PHASES, ids=name_of)
async def test_a_clients_deadline_ends_it(redis: RedisServer, phase: Any) -> None:
    async with Stack(redis.url) as stack:
        request = await phase(stack)
        started = time.monotonic()
        refusal = await stack.refused(request, timeout=0.4)
        assert refusal.code == grpc.StatusCode.DEADLINE_EXCEEDED
        assert time.monotonic() - started < 1.4
        await stack.until_at_rest(2)
        assert_workers_were_told(stack)


@pytest.mark.parametrize("phase", PHASES, ids=name_of)
async def test_the_default_deadline_ends_it(redis: RedisServer, phase: Any) -> None:
    async with Stack(redis.url, default_deadline_s=0.4) as stack:
        request = await phase(stack)
        refusal = await stack.refused(request, timeout=None)
        assert (refusal.code, refusal.reason) == (
            grpc.StatusCode.DEADLINE_EXCEEDED,
            "deadline-exceeded",
        )
        await stack.until_at_rest(2)
        assert_workers_were_told(stack)


@pytest.mark.parametrize("phase", PHASES, ids=name_of)
async def test_a_client_may_cancel(redis: RedisServer, phase: Any) -> None:
    async with Stack(redis.url) as stack:
        request = await phase(stack)
        call = stack.call(request)
        reading = asyncio.ensure_future(_read_all(call))
        await until(lambda: stack.pipeline.admission.num_running == 1)
        await stays(lambda: not reading.done(), 0.3)
        call.cancel()
        # Within an engine step, were there one.
        await stack.until_at_rest(1)
        await asyncio.gather(reading, return_exceptions=True)
        assert_workers_were_told(stack)
        assert stack.pipeline.admission.num_failed == 0
        # The id is free again.
        if phase is not no_worker:
            stack.workers[-1]._server.set_ready(True)
            assert await stack.generate(request)


async def _read_all(call: Any) -> list[Any]:
    return [response async for response in call]


async def test_many_cancelled_at_random_leave_nothing(redis: RedisServer) -> None:
    async with Stack(redis.url) as stack:
        await stack.add(Role.PREFILL)
        await stack.add(count=2)
        stack.stage.decode_default = answering(pause_s=0.01)

        async def cancelled(number: int) -> None:
            prompt = LONG_PROMPT if number % 3 else [5, number]
            call = stack.call(request_for(prompt, max_tokens=50, n=1 + number % 2))
            reading = asyncio.ensure_future(_read_all(call))
            await asyncio.sleep((number % 17) * 0.01)
            call.cancel()
            await asyncio.gather(reading, return_exceptions=True)

        for _ in range(4):
            await asyncio.gather(*map(cancelled, range(50)))
        await stack.until_at_rest()
        assert not any(stack.fleet.is_suspect(stack.member(w)) for w in stack.workers)
        assert not stack.fleet.in_flight and not stack.fleet.pending_tokens
        assert not stack.fleet._channels._num_users


async def test_a_passed_deadline_is_refused_before_any_work(redis: RedisServer) -> None:
    async with Stack(redis.url) as stack:
        worker = await stack.add()
        refusal = await stack.refused(request_for(), timeout=0)
        assert refusal.code == grpc.StatusCode.DEADLINE_EXCEEDED
        assert not worker.decode_calls


async def test_a_deadline_ends_tokenising(redis: RedisServer) -> None:
    async with Stack(redis.url, default_deadline_s=0.005) as stack:
        await stack.add()
        messages = MessageList(messages=[Message(role="user", content="a b ")] * 2000)
        refusal = await stack.refused(GenerateRequest(messages=messages), timeout=None)
        assert refusal.code == grpc.StatusCode.DEADLINE_EXCEEDED
        await stack.until_at_rest()


async def test_a_client_that_stops_reading_is_ended_and_its_worker_freed(
    redis: RedisServer,
) -> None:
    options = [("grpc.http2.bdp_probe", 0), ("grpc.http2.lookahead_bytes", 65_536)]
    async with Stack(redis.url, slow_client_timeout_s=0.5, max_outputs=16) as stack:
        await stack.add()
        stack.stage.decode("slow", answering(step=8))
        request = request_for(max_tokens=2000, n=16, request_id="slow", logprobs=1)
        async with grpc.aio.insecure_channel(stack.address, options=options) as channel:
            call = type(stack.stub)(channel).Generate(request, timeout=30)
            await call.read()
            # Others are served meanwhile.
            assert await stack.generate(request_for())
            await stack.until_at_rest(15)
            with pytest.raises(grpc.aio.AioRpcError) as error:
                while await call.read() is not grpc.aio.EOF:
                    pass
            assert refusal_of(error.value).code == grpc.StatusCode.ABORTED
