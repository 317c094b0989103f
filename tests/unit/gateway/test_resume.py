"""Broken streams go on elsewhere: no token lost, none repeated, whatever broke and when."""

from __future__ import annotations

import asyncio
from typing import Any

import grpc
import pytest

from paceline.domain.errors import InternalError, UnavailableError
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
from tests.unit.gateway.stack import LONG_PROMPT, Answer, Stack, demo_tokenizer, request_for

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
                    requests[name] = request_for(
                        max_tokens=NUM_TOKENS, request_id=name, logprobs=1
                    )
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
