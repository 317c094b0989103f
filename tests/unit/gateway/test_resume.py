"""Broken streams go on elsewhere: no token lost, none repeated, whatever broke and when."""

from __future__ import annotations

import asyncio
import random
from contextlib import suppress
from typing import Any

import grpc
import pytest

from paceline.domain.errors import InternalError, InvalidRequestError, UnavailableError
from paceline.domain.member import Role
from paceline.v1 import inference_pb2, worker_pb2
from paceline.v1.inference_pb2 import FINISH_REASON_LENGTH, FINISH_REASON_STOP
from tests.redis_server import RedisServer
from tests.unit.gateway.scripted_worker import (
    abort,
    answering,
    breaking,
    chunk_of,
    early_end,
    fail,
    token_at,
)
from tests.unit.gateway.stack import (
    LONG_PROMPT,
    Answer,
    Stack,
    demo_tokenizer,
    request_for,
    value_of,
)

NUM_TOKENS = 12

ENDINGS = {
    "unavailable": abort(grpc.StatusCode.UNAVAILABLE),
    "cancelled": abort(grpc.StatusCode.CANCELLED),
    "aborted": abort(grpc.StatusCode.ABORTED),
    "unknown": abort(grpc.StatusCode.UNKNOWN),
    "internal": abort(grpc.StatusCode.INTERNAL),
    "unimplemented": abort(grpc.StatusCode.UNIMPLEMENTED),
    "early-end": early_end,
    "ours": fail(UnavailableError("the engine process ended", reason="engine-died")),
}


def ids_of(answer: Answer) -> dict[int, list[int]]:
    return dict(sorted(answer.ids.items()))


def expected(request: inference_pb2.GenerateRequest, num_tokens: int, n: int = 1) -> Any:
    spec = worker_pb2.GenerationSpec(
        prompt_token_ids=request.token_ids.ids, sampling=request.sampling
    )
    return {i: [token_at(spec, i, p) for p in range(num_tokens)] for i in range(n)}


async def test_a_stream_broken_anywhere_equals_an_unbroken_one(redis: RedisServer) -> None:
    async with Stack(redis.url) as stack:
        await stack.add(count=3)
        requests = {}
        for after in range(NUM_TOKENS):
            for step in (1, 5):
                if after * step < NUM_TOKENS:
                    name = f"at-{after}-{step}"
                    stack.stage.decode(name, breaking(after, ENDINGS["unavailable"], step))
                    requests[name] = request_for(max_tokens=NUM_TOKENS, request_id=name, logprobs=1)
        answers = await asyncio.gather(*map(stack.generate, requests.values()))
        for request, answer in zip(requests.values(), answers, strict=True):
            assert ids_of(answer) == expected(request, NUM_TOKENS), request.request_id
            assert answer.text[0] == demo_tokenizer().tokenizer.decode(answer.ids[0])
            assert answer.logprobs[0] == [-float(p) for p in range(NUM_TOKENS)]
            assert answer.finish_reason == {0: FINISH_REASON_LENGTH}
            has_moved = not request.request_id.startswith("at-0-")
            assert answer.usage[0].migrations == has_moved
            assert answer.usage[0].completion_tokens == NUM_TOKENS
        await stack.until_at_rest()


@pytest.mark.parametrize("ending", ENDINGS)
async def test_whatever_status_a_dying_worker_leaves_the_stream_goes_on(
    redis: RedisServer, ending: str
) -> None:
    async with Stack(redis.url) as stack:
        await stack.add(count=2)
        stack.stage.decode("r", breaking(3, ENDINGS[ending]))
        request = request_for(max_tokens=NUM_TOKENS, request_id="r")
        answer = await stack.generate(request)
        assert ids_of(answer) == expected(request, NUM_TOKENS)
        assert answer.usage[0].migrations == 1
        await stack.until_at_rest()


def ending_of(answer: Answer) -> dict[int, tuple[str, list[int], int]]:
    """Return what must not depend on where a stream was broken."""
    return {i: (answer.text[i], answer.ids[i], answer.finish_reason[i]) for i in answer.ids}


async def test_outputs_that_ended_stay_ended_when_the_others_go_on(redis: RedisServer) -> None:
    async with Stack(redis.url) as stack:
        await stack.add(count=3)
        request = request_for(max_tokens=NUM_TOKENS, n=3)
        whole = await stack.generate(request)
        # Cuts output 1 in the middle of its tokens, mostly in the middle of a chunk.
        request.stop.append(whole.text[1][8:11])
        stopped = await stack.generate(request)
        assert ids_of(whole) == expected(request, NUM_TOKENS, n=3)
        reasons = [stopped.finish_reason[i] for i in range(3)]
        assert reasons == [FINISH_REASON_LENGTH, FINISH_REASON_STOP, FINISH_REASON_LENGTH]
        assert stopped.text[1] == whole.text[1][: whole.text[1].index(request.stop[0])]
        assert 0 < len(stopped.ids[1]) < NUM_TOKENS

        async def run(after: int, step: int) -> None:
            broken = type(request)()
            broken.CopyFrom(request)
            broken.request_id = f"{after}-{step}"
            scripts = [breaking(after, ENDINGS["early-end"], step), answering(step)]
            stack.stage.decode(broken.request_id, *scripts)
            assert ending_of(await stack.generate(broken)) == ending_of(stopped), (after, step)

        runs = [(a, s) for s in (1, 3, 7) for a in range(NUM_TOKENS) if a * s < NUM_TOKENS]
        await asyncio.gather(*(run(*each) for each in runs))
        resumed = [c for w in stack.workers for c in w.decode_calls if c.finished_indices]
        assert resumed, "no stream broke behind the end of output 1"
        for call in resumed:
            assert list(call.finished_indices) == [1]
            assert sorted(entry.index for entry in call.resumed) == [0, 2]
        await stack.until_at_rest()


async def test_a_stream_may_break_several_times(redis: RedisServer) -> None:
    async with Stack(redis.url) as stack:
        await stack.add(count=2)
        stack.stage.decode("r", *[breaking(2, ENDINGS["unavailable"])] * 3)
        request = request_for(max_tokens=NUM_TOKENS, request_id="r", n=2)
        answer = await stack.generate(request)
        assert ids_of(answer) == expected(request, NUM_TOKENS, n=2)
        assert answer.usage[0].migrations == answer.usage[1].migrations == 3
        assert value_of(stack.metrics.migrations) == 3


@pytest.mark.parametrize("after", [0, 2])
async def test_too_many_breaks_end_it_with_the_number_of_tokens(
    redis: RedisServer, after: int
) -> None:
    async with Stack(redis.url, max_attempts=3) as stack:
        await stack.add(count=3)
        stack.stage.decode("r", *[breaking(after, ENDINGS["unavailable"])] * 3)
        refusal = await stack.refused(request_for(max_tokens=NUM_TOKENS, request_id="r"))
        assert refusal.code == grpc.StatusCode.UNAVAILABLE
        assert refusal.reason == "migration-limit"
        assert f"3 decode workers broke the stream after {3 * after} tokens" in refusal.message
        assert refusal.retry_s
        await stack.until_at_rest()


def bad_chunk(**fields: Any) -> Any:
    """Return a script whose second message cannot be right."""

    async def script(request: worker_pb2.DecodeRequest, context: Any) -> Any:
        yield worker_pb2.DecodeResponse(chunks=[chunk_of(request.spec, 0, 0, 2)])
        yield worker_pb2.DecodeResponse(chunks=[worker_pb2.TokenChunk(**fields)])
        await asyncio.Event().wait()

    return script


BAD_CHUNKS: dict[str, dict[str, Any]] = {
    "unknown-output": dict(index=9, token_ids=[5]),
    "token-outside": dict(index=0, token_ids=[4096]),
    "too-many": dict(index=0, token_ids=[5] * 50),
    "cancelled": dict(index=0, finish_reason=inference_pb2.FINISH_REASON_CANCELLED),
    "failed": dict(index=0, finish_reason=inference_pb2.FINISH_REASON_ERROR),
    "no-logprobs": dict(index=0, token_ids=[5]),
}


@pytest.mark.parametrize("case", BAD_CHUNKS)
async def test_chunks_that_cannot_be_right_never_reach_the_client(
    redis: RedisServer, case: str
) -> None:
    async with Stack(redis.url) as stack:
        await stack.add(count=2)
        stack.stage.decode("r", bad_chunk(**BAD_CHUNKS[case]))
        request = request_for(max_tokens=NUM_TOKENS, request_id="r", logprobs=1)
        answer = await stack.generate(request)
        assert ids_of(answer) == expected(request, NUM_TOKENS)
        assert answer.finish_reason == {0: FINISH_REASON_LENGTH}
        await stack.until_at_rest()


@pytest.mark.parametrize("ending", ["unavailable", "hang", "more"])
async def test_a_worker_that_breaks_behind_the_last_token_does_no_harm(
    redis: RedisServer, ending: str
) -> None:
    async def script(request: worker_pb2.DecodeRequest, context: Any) -> Any:
        yield worker_pb2.DecodeResponse(chunks=[chunk_of(request.spec, 0, 0, NUM_TOKENS)])
        if ending == "unavailable":
            await context.abort(grpc.StatusCode.UNAVAILABLE, "scripted")
        while True:
            await asyncio.sleep(0.01 if ending == "more" else 60)
            yield worker_pb2.DecodeResponse(chunks=[chunk_of(request.spec, 0, 0, 2)])

    async with Stack(redis.url) as stack:
        worker = await stack.add()
        stack.stage.decode("r", script)
        request = request_for(max_tokens=NUM_TOKENS, request_id="r")
        answer = await asyncio.wait_for(stack.generate(request), 3)
        assert ids_of(answer) == expected(request, NUM_TOKENS)
        assert answer.usage[0].migrations == 0
        assert len(worker.decode_calls) == 1
        assert not stack.fleet.is_suspect(stack.member(worker))
        await stack.until_at_rest()


async def test_a_good_worker_sees_its_calls_end_not_cancelled(redis: RedisServer) -> None:
    async with Stack(redis.url) as stack:
        worker = await stack.add()
        await asyncio.gather(*(stack.generate(request_for(max_tokens=3)) for _ in range(30)))
        await stack.until_at_rest()
        assert len(worker.decode_calls) == 30
        assert worker.num_cancelled == 0


async def test_a_bug_in_a_worker_is_told_as_one_and_not_tried_elsewhere(
    redis: RedisServer,
) -> None:
    async with Stack(redis.url) as stack:
        await stack.add(count=2)
        error = InternalError("nan at layer 3", reason="nan-logits")
        stack.stage.decode("r", breaking(1, fail(error)))
        refusal = await stack.refused(request_for(request_id="r"))
        assert (refusal.code, refusal.reason) == (grpc.StatusCode.INTERNAL, "nan-logits")
        assert "layer" not in refusal.message
        assert sum(len(w.decode_calls) for w in stack.workers) == 1
        await stack.until_at_rest()


async def test_what_a_worker_refuses_is_our_fault_not_the_clients(redis: RedisServer) -> None:
    async with Stack(redis.url) as stack:
        await stack.add()
        stack.stage.decode("r", breaking(0, fail(InvalidRequestError("spec", "token 9"))))
        refusal = await stack.refused(request_for(request_id="r"))
        assert refusal.code == grpc.StatusCode.INTERNAL
        assert "token 9" not in refusal.message


async def test_a_storm_of_breaks_cancels_and_deadlines(redis: RedisServer) -> None:
    draw = random.Random(4)
    async with Stack(redis.url, max_attempts=6) as stack:
        await stack.add(Role.PREFILL, count=2)
        await stack.add(count=4)
        stack.stage.decode_default = answering(pause_s=0.003)

        async def broken_prefill(request: Any, context: Any) -> Any:
            yield worker_pb2.PrefillResponse(published_tokens=16)
            await context.abort(grpc.StatusCode.UNAVAILABLE, "scripted")

        async def client(number: int) -> None:
            name, n = f"storm-{number}", draw.choice([1, 1, 3])
            endings = draw.choices(list(ENDINGS.values()), k=draw.randrange(4))
            scripts = [breaking(draw.randrange(6), e, draw.choice([1, 4])) for e in endings]
            stack.stage.decode(name, *scripts)
            if draw.random() < 0.3:
                stack.stage.prefill(name, broken_prefill)
            prompt = LONG_PROMPT if draw.random() < 0.4 else [5, number]
            request = request_for(prompt, max_tokens=NUM_TOKENS, n=n, request_id=name)
            fate = draw.random()
            if fate < 0.6:
                answer = await stack.generate(request)
                assert ids_of(answer) == expected(request, NUM_TOKENS, n), name
            elif fate < 0.8:
                call = stack.call(request)
                reading = asyncio.ensure_future(call.read())
                await asyncio.wait({reading}, timeout=draw.random() * 0.2)
                call.cancel()
                await asyncio.gather(reading, return_exceptions=True)
            else:
                with suppress(grpc.aio.AioRpcError):
                    await stack.generate(request, timeout=draw.random() * 0.2)

        for start in range(0, 160, 40):
            await asyncio.gather(*map(client, range(start, start + 40)))
        await stack.until_at_rest()
        assert not stack.fleet.in_flight and not stack.fleet.pending_tokens


async def test_a_broken_prefill_costs_time_only(redis: RedisServer) -> None:
    async with Stack(redis.url) as stack:
        await stack.add(Role.PREFILL, count=2)
        await stack.add()

        async def half(request: Any, context: Any) -> Any:
            yield worker_pb2.PrefillResponse(published_tokens=16, local_hit_tokens=99)
            await context.abort(grpc.StatusCode.UNAVAILABLE, "scripted")

        stack.stage.prefill("r", half)
        request = request_for(LONG_PROMPT, request_id="r")
        answer = await stack.generate(request)
        assert ids_of(answer) == expected(request, 8)
        assert answer.usage[0].cached_prompt_tokens == 0
        assert answer.usage[0].migrations == 0
        prefills = [w for w in stack.workers if w.prefill_calls]
        assert len(prefills) == 2
        assert answer.usage[0].prefill_worker == next(
            w.member.id for w in prefills if not stack.fleet.is_suspect(stack.member(w))
        )
        await stack.until_at_rest()
