"""Speculation as clients see it: modes, who serves them, accepted paths in streams, usage."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest

from paceline.v1 import worker_pb2
from paceline.v1.inference_pb2 import (
    FINISH_REASON_LENGTH,
    FINISH_REASON_STOP,
    GenerateRequest,
    SamplingParams,
    SpeculationParams,
)
from tests.redis_server import RedisServer
from tests.unit.gateway.scripted_worker import DecodeScript, abort, chunk_of
from tests.unit.gateway.stack import Stack, request_for, value_of

NUM_TOKENS = 12


def asking(mode: str, **fields: Any) -> GenerateRequest:
    return request_for(speculation=SpeculationParams(mode=mode), **fields)


def drafting(size: int, breaks_after: int | None = None, version: str = "") -> DecodeScript:
    """Return a worker that accepts `size - 1` of 4 drafted tokens per pass, or breaks."""

    async def script(
        request: worker_pb2.DecodeRequest, context: Any
    ) -> AsyncIterator[worker_pb2.DecodeResponse]:
        spec = request.spec
        resumed = {entry.index: len(entry.token_ids) for entry in request.resumed}
        at = {i: resumed.get(i, 0) for i in range(spec.n) if i not in request.finished_indices}
        num_passes = 0
        while at:
            if num_passes == breaks_after:
                await abort(grpc.StatusCode.UNAVAILABLE)(context)
            num_passes += 1
            chunks = [chunk_of(spec, i, start, start + size) for i, start in at.items()]
            for chunk in chunks:
                chunk.target_steps, chunk.drafted_tokens = 1, 4
                chunk.accepted_tokens = len(chunk.token_ids) - 1
                chunk.draft_version = version
            at = {c.index: at[c.index] + size for c in chunks if not c.finish_reason}
            yield worker_pb2.DecodeResponse(chunks=chunks)

    return script


async def test_a_mode_that_nobody_serves_is_refused_with_those_that_somebody_does(
    redis: RedisServer,
) -> None:
    async with Stack(redis.url) as stack:
        bare = await stack.add()
        refusal = await stack.refused(asking("trie"))
        assert refusal.message.endswith("no such drafter; known are AUTO, OFF")
        await stack.add(drafters=("trie", "model"))
        await stack.add(drafters=("trie", "medusa"))
        refusal = await stack.refused(asking("no-such"))
        assert (refusal.code, refusal.reason) == (
            grpc.StatusCode.INVALID_ARGUMENT,
            "invalid-argument",
        )
        assert refusal.field == "speculation.mode"
        assert refusal.message.endswith("known are AUTO, OFF, medusa, model, trie")
        assert not any(worker.decode_calls for worker in stack.workers)
        await bare.vanish()
        assert await stack.generate(asking("medusa"))


async def test_a_named_drafter_is_used_by_a_worker_that_has_it(redis: RedisServer) -> None:
    async with Stack(redis.url) as stack:
        plain = await stack.add(count=3)
        drafter = await stack.add(drafters=("trie",))
        await asyncio.gather(*(stack.generate(asking("trie")) for _ in range(8)))
        assert len(drafter.decode_calls) == 8 and not plain.decode_calls
        assert {call.spec.speculation for call in drafter.decode_calls} == {"trie"}
        # One that breaks is not the only one that can answer.
        stack.stage.decode("r", drafting(3, breaks_after=1))
        answer = await stack.generate(asking("trie", request_id="r"))
        assert answer.usage[0].migrations == 1


async def test_a_domain_goes_to_a_worker_that_holds_its_drafter(redis: RedisServer) -> None:
    async with Stack(redis.url) as stack:
        plain = await stack.add(drafters=("trie", "model"))
        holder = await stack.add(drafters=("trie", "model", "model:code"))
        for _ in range(4):
            await stack.generate(request_for(domain="code"))
        assert not plain.decode_calls
        assert [call.spec.domain for call in holder.decode_calls] == ["code"] * 4


async def test_who_names_a_mode_has_chosen(redis: RedisServer) -> None:
    # The holder comes second: alike workers are taken in the order of their names.
    async with Stack(redis.url) as stack:
        plain = await stack.add(drafters=("trie", "model"))
        await stack.add(drafters=("trie", "model", "model:code"))
        await stack.generate(asking("OFF", domain="code"))
        assert len(plain.decode_calls) == 1


@pytest.mark.parametrize(("mode", "sent"), [("", "AUTO"), ("AUTO", "AUTO"), ("OFF", "OFF")])
async def test_workers_are_told_the_mode_and_whose_the_seed_is(
    redis: RedisServer, mode: str, sent: str
) -> None:
    async with Stack(redis.url) as stack:
        worker = await stack.add()
        await stack.generate(asking(mode, sampling=SamplingParams(seed=0)))
        await stack.generate(asking(mode, sampling=SamplingParams()))
        specs = [call.spec for call in worker.decode_calls]
        assert [spec.speculation for spec in specs] == [sent, sent]
        assert [spec.is_seed_drawn for spec in specs] == [False, True]


@pytest.mark.parametrize("size", [1, 2, 3, 5, 12, 20])
async def test_accepted_paths_stream_like_single_tokens(redis: RedisServer, size: int) -> None:
    async with Stack(redis.url) as stack:
        await stack.add()
        request = request_for(max_tokens=NUM_TOKENS, n=3, logprobs=1)
        plain = await stack.generate(request)
        stack.stage.decode_default = drafting(size, version="v7")
        answer = await stack.generate(request)
        assert (answer.ids, answer.text) == (plain.ids, plain.text)
        assert answer.logprobs == plain.logprobs
        for usage in answer.usage.values():
            passes = -(-NUM_TOKENS // size)
            assert (usage.target_steps, usage.drafted_tokens) == (passes, 4 * passes)
            assert usage.accepted_tokens == NUM_TOKENS - passes
            assert usage.draft_version == "v7"
        assert all(u.drafted_tokens == u.accepted_tokens == 0 for u in plain.usage.values())


async def test_counts_add_up_over_the_workers_of_a_broken_stream(redis: RedisServer) -> None:
    async with Stack(redis.url) as stack:
        await stack.add(count=3)
        request = request_for(max_tokens=NUM_TOKENS, request_id="r", n=2)
        plain = await stack.generate(request)
        stack.stage.decode("r", drafting(3, 2, "v1"), drafting(2, 1, "v2"), drafting(4, None))
        answer = await stack.generate(request)
        assert answer.ids == plain.ids
        for usage in answer.usage.values():
            # 3 + 3, 2, 4: the workers had 2, 1 and 1 passes.
            assert usage.migrations == 2
            assert (usage.target_steps, usage.drafted_tokens) == (4, 16)
            assert usage.accepted_tokens == NUM_TOKENS - 4
            assert usage.draft_version == "v2", "the last worker had none"
        await stack.until_at_rest()


async def test_a_stop_string_inside_a_path_ends_one_output_and_no_token_too_many(
    redis: RedisServer,
) -> None:
    async with Stack(redis.url) as stack:
        worker = await stack.add()
        request = request_for(max_tokens=40, n=2)
        whole = await stack.generate(request)
        stop = whole.text[0][20:24]
        assert stop not in whole.text[1]
        request.stop.append(stop)
        single = await stack.generate(request)
        for size in (3, 7, 40):
            sent_before = value_of(stack.metrics.completion_tokens)
            request.request_id = f"r{size}"
            stack.stage.decode(request.request_id, drafting(size))
            answer = await stack.generate(request)
            assert (answer.text, answer.ids) == (single.text, single.ids)
            assert answer.finish_reason == {0: FINISH_REASON_STOP, 1: FINISH_REASON_LENGTH}
            usage, used = answer.usage[0], len(single.ids[0])
            assert usage.completion_tokens == used
            assert usage.target_steps == -(-used // size)
            assert usage.accepted_tokens == used - used // size
            sent = value_of(stack.metrics.completion_tokens) - sent_before
            assert sent == used + 40
        assert set(worker.stopped) <= {0}
        await stack.until_at_rest()


async def test_a_stop_token_in_front_of_a_chunks_end_is_a_broken_worker(
    redis: RedisServer,
) -> None:
    async with Stack(redis.url) as stack:
        await stack.add(count=2)
        request = request_for(max_tokens=NUM_TOKENS)
        stop = (await stack.generate(request)).ids[0][4]

        async def ending(request: worker_pb2.DecodeRequest, context: Any) -> Any:
            start = sum(len(entry.token_ids) for entry in request.resumed)
            chunk = chunk_of(request.spec, 0, start, 5)
            chunk.finish_reason = FINISH_REASON_STOP
            yield worker_pb2.DecodeResponse(chunks=[chunk])

        request.stop_token_ids.append(stop)
        request.request_id = "r"
        stack.stage.decode("r", drafting(3), ending)
        answer = await stack.generate(request)
        assert len(answer.ids[0]) == 5 and answer.ids[0][-1] == stop
        assert answer.finish_reason == {0: FINISH_REASON_STOP}
        assert answer.usage[0].migrations == 1
