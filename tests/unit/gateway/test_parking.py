"""Requests that wait for workers: in order, bounded in number and time, freed when they end."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace

import grpc
import pytest

from paceline.domain.errors import DeadlineError, ExhaustedError, UnavailableError
from paceline.domain.member import Role
from paceline.gateway.parking import Parking
from paceline.v1.inference_pb2 import GenerateRequest, SamplingParams, SpeculationParams
from tests.redis_server import RedisServer
from tests.unit.gateway.scripted_worker import CARD, ScriptedWorker, abort, breaking
from tests.unit.gateway.stack import LONG_PROMPT, Stack, request_for, value_of
from tests.waiting import stays, until


class Place:
    """A parking with a clock, an autoscaler and a worker that tests command."""

    def __init__(self, max_parked: int = 8) -> None:
        self.now_s = 0.0
        self.can_wake = False
        self.has_worker = False
        self.is_reached = True
        self.gone_on: list[str] = []
        self.parking = Parking(
            lambda: self.can_wake,
            lambda: self.is_reached,
            max_parked=max_parked,
            park_s=100.0,
            restart_s=10.0,
            monotonic=lambda: self.now_s,
        )

    async def park(self, name: str, timeout_s: float = 30.0) -> None:
        await self.parking.wait(lambda: self.has_worker, timeout_s)
        self.gone_on.append(name)

    async def parked(self, *names: str, timeout_s: float = 30.0) -> list[asyncio.Task[None]]:
        """Park one after the other and return their tasks."""
        before = self.parking.num_parked
        tasks = [asyncio.create_task(self.park(name, timeout_s)) for name in names]
        await until(lambda: self.parking.num_parked == before + len(names))
        return tasks


async def test_nobody_waits_for_what_is_there() -> None:
    place = Place(max_parked=0)
    place.has_worker = True
    await place.park("a")
    assert place.parking.num_parked == 0


async def test_first_parked_go_on_first_and_nobody_overtakes() -> None:
    place = Place()
    tasks = await place.parked("a", "b", "c")
    place.has_worker = True
    place.parking.release()
    # Told to go on, but not on their way yet: whoever comes now comes behind.
    late = asyncio.create_task(place.park("late"))
    await asyncio.gather(*tasks)
    place.parking.release()
    await late
    assert place.gone_on == ["a", "b", "c", "late"]
    assert place.parking.num_parked == 0


async def test_who_waits_for_something_else_holds_nobody_up() -> None:
    place = Place()
    stuck = asyncio.create_task(place.parking.wait(lambda: False, 30.0))
    await until(lambda: place.parking.num_parked == 1)
    (task,) = await place.parked("a")
    place.has_worker = True
    place.parking.release()
    await task
    assert place.parking.num_parked == 1
    stuck.cancel()
    await asyncio.gather(stuck, return_exceptions=True)
    assert place.parking.num_parked == 0


async def test_nobody_goes_on_before_a_worker_is_reached() -> None:
    place = Place()
    (task,) = await place.parked("a")
    place.has_worker, place.is_reached = True, False
    place.parking.release()
    assert place.parking.num_parked == 1 and not task.done()
    place.is_reached = True
    place.parking.release()
    await task


async def test_no_more_are_parked_than_fit_and_a_place_is_freed_by_a_cancel() -> None:
    place = Place(max_parked=2)
    first, _ = await place.parked("a", "b")
    with pytest.raises(ExhaustedError) as refusal:
        await place.park("c")
    assert refusal.value.reason == "parking-full"
    assert refusal.value.retry_after_s > 0
    first.cancel()
    await asyncio.gather(first, return_exceptions=True)
    (third,) = await place.parked("c")
    place.has_worker = True
    place.parking.release()
    await third
    assert place.gone_on == ["b", "c"]


@pytest.mark.parametrize(("can_wake", "limit_s"), [(False, 10.0), (True, 100.0)])
async def test_a_wait_ends_sooner_where_nobody_can_wake_workers(
    can_wake: bool, limit_s: float
) -> None:
    place = Place()
    place.can_wake = can_wake
    (task,) = await place.parked("a")
    place.now_s = limit_s - 0.1
    place.parking.release()
    assert place.parking.num_parked == 1 and not task.done()
    place.now_s = limit_s
    place.parking.release()
    with pytest.raises(UnavailableError, match="no decode worker is ready"):
        await task


async def test_an_autoscaler_that_comes_prolongs_a_wait_and_one_that_goes_does_not_end_it() -> None:
    place = Place()
    (task,) = await place.parked("a")
    place.can_wake = True
    place.parking.release()
    place.can_wake = False
    place.now_s = 99.0
    place.parking.release()
    place.has_worker = True
    place.parking.release()
    await task
    assert place.gone_on == ["a"]


async def test_the_deadline_of_the_request_ends_its_wait() -> None:
    place = Place()
    with pytest.raises(DeadlineError):
        await place.park("a", timeout_s=0.01)
    assert place.parking.num_parked == 0


async def test_a_gateway_that_ends_lets_nobody_wait() -> None:
    place = Place()
    (task,) = await place.parked("a")
    place.parking.close()
    for wait in (task, place.park("b")):
        with pytest.raises(UnavailableError) as refusal:
            await wait
        assert refusal.value.reason == "gateway-stopping"
    place.has_worker = True
    await place.park("c")
    assert place.gone_on == ["c"]


# -- through the whole gateway ------------------------------------------------------------


@asynccontextmanager
async def asleep(redis: RedisServer, **settings: object) -> AsyncIterator[Stack]:
    """Run a gateway whose only worker has left, and an autoscaler that could start others."""
    async with Stack(redis.url, **settings) as stack:
        await stack.add(Role.AUTOSCALER)
        worker = await stack.add(drafters=("trie",))
        await stack.generate(request_for())
        await leave(stack, worker)
        yield stack


async def leave(stack: Stack, worker: ScriptedWorker) -> None:
    """Take a worker out of the fleet and wait until the gateway knows."""
    await worker.__aexit__()
    stack.workers.remove(worker)
    await until(lambda: not stack.fleet.is_served)


async def test_parked_requests_are_served_in_order_once_a_worker_is_there(
    redis: RedisServer,
) -> None:
    async with asleep(redis, wait_for_worker_s=0.0) as stack:
        tasks = []
        for i in range(12):
            request = request_for([5 + i, 6, 7] * (1 + i % 4 * 10), request_id=f"r{i}")
            tasks.append(asyncio.create_task(stack.generate(request)))
            await until(lambda i=i: stack.parking.num_parked == i + 1)  # type: ignore[misc]
        assert value_of(stack.metrics.requests_parked) == 12
        assert stack.fleet.is_ready
        worker = await stack.add()
        answers = await asyncio.gather(*tasks)
        assert all(len(answer.ids[0]) == 8 for answer in answers)
        served = [call.spec.request_id.partition(".")[0] for call in worker.decode_calls]
        assert served == [f"r{i}" for i in range(12)]
        assert value_of(stack.metrics.requests_parked) == 0
        await stack.until_at_rest()


async def test_what_cannot_be_served_wakes_nobody(redis: RedisServer) -> None:
    async with asleep(redis) as stack:
        first = asyncio.create_task(stack.generate(request_for()))
        await until(lambda: stack.parking.num_parked == 1)
        too_long = request_for([5] * CARD.max_context_tokens)
        refusal = await stack.refused(too_long)
        assert (refusal.code.name, refusal.reason) == ("INVALID_ARGUMENT", "context-too-long")
        unknown = request_for(speculation=SpeculationParams(mode="medusa"))
        refusal = await stack.refused(unknown)
        assert (refusal.code.name, refusal.field) == ("INVALID_ARGUMENT", "speculation.mode")
        assert "trie" in refusal.message
        named = request_for(speculation=SpeculationParams(mode="trie"))
        second = asyncio.create_task(stack.generate(named))
        await until(lambda: stack.parking.num_parked == 2)
        await stack.add(drafters=("trie",))
        await asyncio.gather(first, second)


async def test_a_request_beyond_the_bound_is_told_when_to_come_back(redis: RedisServer) -> None:
    async with asleep(redis, max_parked=1) as stack:
        call = stack.call(request_for())
        await until(lambda: stack.parking.num_parked == 1)
        refusal = await stack.refused(request_for())
        assert (refusal.code.name, refusal.reason) == ("RESOURCE_EXHAUSTED", "parking-full")
        assert refusal.retry_s is not None and refusal.retry_s > 0
        call.cancel()
        await until(lambda: stack.parking.num_parked == 0)
        await stack.until_at_rest()
        assert (await stack.refused(request_for(), timeout=0.3)).code.name == "DEADLINE_EXCEEDED"


@pytest.mark.parametrize("has_autoscaler", [False, True])
async def test_the_limit_depends_on_who_could_start_workers(
    redis: RedisServer, has_autoscaler: bool
) -> None:
    settings = {"park_s": 0.6, "wait_for_worker_s": 0.2}
    async with Stack(redis.url, **settings) as stack:
        if has_autoscaler:
            await stack.add(Role.AUTOSCALER)
        call = asyncio.create_task(stack.refused(request_for()))
        await until(lambda: stack.parking.num_parked == 1)
        if has_autoscaler:
            await stays(lambda: not call.done(), 0.3)
        refusal = await call
        assert (refusal.code.name, refusal.reason) == ("UNAVAILABLE", "no-ready-worker")


async def test_a_gateway_that_never_saw_a_worker_waits_for_the_first(redis: RedisServer) -> None:
    async with Stack(redis.url, wait_for_worker_s=0.0) as stack:
        await stack.add(Role.AUTOSCALER)
        text = GenerateRequest(
            prompt="Tom has 3 apples.", max_tokens=4, sampling=SamplingParams(temperature=0)
        )
        tasks = [asyncio.create_task(stack.generate(r)) for r in (text, request_for())]
        await until(lambda: stack.parking.num_parked == 2)
        await stack.add()
        answers = await asyncio.gather(*tasks)
        assert [len(answer.ids[0]) for answer in answers] == [4, 8]


async def test_what_wakes_may_serve_another_model_than_before(redis: RedisServer) -> None:
    smaller = replace(CARD, kv_root=bytes(16), max_context_tokens=256)
    async with asleep(redis) as stack:
        fitting = request_for(sampling=SamplingParams(temperature=1))
        tasks = [
            asyncio.create_task(stack.generate(fitting)),
            asyncio.create_task(stack.refused(request_for(LONG_PROMPT))),
        ]
        await until(lambda: stack.parking.num_parked == 2)
        worker = await stack.add(card=smaller)
        answer, refusal = await asyncio.gather(*tasks)
        assert len(answer.ids[0]) == 8  # type: ignore[union-attr]
        assert refusal.reason == "context-too-long"  # type: ignore[union-attr]
        (call,) = worker.decode_calls
        assert call.spec.is_seed_drawn
        await stack.until_at_rest()


async def test_a_stream_whose_last_worker_leaves_is_parked_until_another_comes(
    redis: RedisServer,
) -> None:
    async with Stack(redis.url, wait_for_worker_s=0.0) as stack:
        await stack.add(Role.AUTOSCALER)
        worker = await stack.add()
        stack.stage.decode("r", breaking(3, abort(grpc.StatusCode.UNAVAILABLE)))
        whole = await stack.generate(request_for(request_id="other"))
        task = asyncio.create_task(stack.generate(request_for(request_id="r")))
        await until(lambda: len(worker.decode_calls) == 2)
        await leave(stack, worker)
        await until(lambda: stack.parking.num_parked == 1)
        await stack.add()
        answer = await task
        assert answer.ids == whole.ids
        assert answer.usage[0].migrations == 1
