"""One request through the whole gateway: what workers and clients get to see of it."""

from __future__ import annotations

import asyncio
import random
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import pytest

from paceline.domain.blocks import chain_keys, salt_key
from paceline.domain.errors import InvalidRequestError
from paceline.domain.member import Role
from paceline.gateway.steps.tokenise import TokeniseStep
from paceline.kvstore.index import BlockIndex
from paceline.v1 import worker_pb2
from paceline.v1.inference_pb2 import (
    FINISH_REASON_LENGTH,
    FINISH_REASON_STOP,
    GenerateRequest,
    Message,
    MessageList,
    SamplingParams,
)
from tests.redis_server import RedisServer
from tests.unit.gateway.scripted_worker import CARD, abort, answering, breaking, chunk_of, hang
from tests.unit.gateway.stack import (
    LONG_PROMPT,
    Stack,
    demo_tokenizer,
    refusal_of,
    request_for,
)
from tests.waiting import until


async def spec_of(stack: Stack, request: GenerateRequest) -> worker_pb2.GenerationSpec:
    """Send a request and return what the decode worker got of it."""
    await stack.generate(request)
    return next(w for w in stack.workers if w.decode_calls).decode_calls[-1].spec


async def test_workers_get_what_the_client_asked_for(redis: RedisServer) -> None:
    async with Stack(redis.url) as stack:
        await stack.add()
        sampling = SamplingParams(
            temperature=0.5,
            top_k=5,
            top_p=0.25,
            min_p=0.125,
            repetition_penalty=1.5,
            presence_penalty=-1,
            frequency_penalty=2,
            seed=(1 << 64) - 1,
        )
        request = request_for(
            sampling=sampling, stop_token_ids=[9, 3], ignore_eos=True, logprobs=3, n=2, priority=-7
        )
        spec = await spec_of(stack, request)
        assert spec.sampling == sampling
        assert list(spec.prompt_token_ids) == [5, 6, 7]
        assert (spec.max_tokens, spec.n, spec.logprobs) == (8, 2, 3)
        assert (spec.ignore_eos, spec.priority) == (True, -7)
        assert list(spec.stop_token_ids) == [3, 9]


async def test_training_is_allowed_unless_the_request_forbids_it(redis: RedisServer) -> None:
    async with Stack(redis.url) as stack:
        await stack.add()
        for wish, allowed in ((None, True), (True, True), (False, False)):
            spec = await spec_of(stack, request_for(domain="code", allow_training=wish))
            assert (spec.allow_training, spec.domain) == (allowed, "code")


async def test_a_tenants_policy_wins_over_its_requests(redis: RedisServer, tmp_path: Path) -> None:
    keys = tmp_path / "keys.json"
    keys.write_text(
        '{"open": {"tenant": "a", "allow_training": true}, "plain": {"tenant": "b"},'
        ' "closed": {"tenant": "c", "allow_training": false}, "same": {"tenant": "c"}}'
    )
    async with Stack(redis.url, api_keys=keys) as stack:
        worker = await stack.add()
        for key, allowed in (("open", True), ("plain", True), ("closed", False), ("same", False)):
            for wish in (None, True, False):
                request = request_for(allow_training=wish)
                metadata = [("authorization", f"Bearer {key}")]
                async for _ in stack.stub.Generate(request, timeout=20, metadata=metadata):
                    pass
                spec = worker.decode_calls[-1].spec
                assert spec.allow_training == (allowed and wish is not False)


async def test_a_seed_of_zero_is_a_seed(redis: RedisServer) -> None:
    async with Stack(redis.url) as stack:
        await stack.add()
        drawn = 7  # What the stack draws.
        for sampling, seed in [
            (SamplingParams(seed=0), 0),
            (SamplingParams(seed=5), 5),
            (SamplingParams(temperature=0), drawn),
            (None, drawn),
        ]:
            spec = await spec_of(stack, request_for(sampling=sampling))
            assert spec.sampling.HasField("seed")
            assert spec.sampling.seed == seed


@pytest.mark.parametrize(
    ("wanted", "prompt_tokens", "given"),
    [(None, 3, 256), (8, 3, 8), (2048, 3, 2045), (2048, 2047, 1), (None, 2000, 48), (1, 5, 1)],
)
async def test_max_tokens_ends_with_the_context(
    redis: RedisServer, wanted: int | None, prompt_tokens: int, given: int
) -> None:
    async with Stack(redis.url) as stack:
        await stack.add()
        stack.stage.decode_default = answering(step=500)
        spec = await spec_of(stack, request_for(range(5, 5 + prompt_tokens), max_tokens=wanted))
        assert spec.max_tokens == given


async def test_usage_says_who_did_what(redis: RedisServer) -> None:
    async with Stack(redis.url) as stack:
        await stack.add(Role.PREFILL, worker_id="p")
        await stack.add(worker_id="d")

        async def prefill(request: Any, context: Any) -> Any:
            yield worker_pb2.PrefillResponse(local_hit_tokens=100, store_hit_tokens=28)
            yield worker_pb2.PrefillResponse(is_last=True)

        stack.stage.prefill("split", prefill)
        answer = await stack.generate(request_for(LONG_PROMPT, request_id="split", n=2))
        for usage in answer.usage.values():
            assert (usage.prefill_worker, usage.decode_worker) == ("p", "d")
            assert (usage.prompt_tokens, usage.cached_prompt_tokens) == (600, 128)
            assert (usage.completion_tokens, usage.target_steps, usage.migrations) == (8, 8, 0)
            assert 0 < usage.ttft_s <= usage.e2e_s < 5

        async def decode(request: Any, context: Any) -> Any:
            first = chunk_of(request.spec, 0, 0, 1)
            yield worker_pb2.DecodeResponse(chunks=[first], local_hit_tokens=9999)
            yield worker_pb2.DecodeResponse(chunks=[chunk_of(request.spec, 0, 1, 8)])

        stack.stage.decode("alone", decode)
        usage = (await stack.generate(request_for(request_id="alone"))).usage[0]
        assert (usage.prefill_worker, usage.decode_worker) == ("d", "d")
        assert usage.cached_prompt_tokens == 3, "more than the prompt has"


async def test_work_is_counted_while_it_is_there(redis: RedisServer) -> None:
    async with Stack(redis.url) as stack:
        worker = await stack.add()
        stack.stage.decode("queued", breaking(0, hang))
        stack.stage.decode("running", breaking(1, hang))
        calls = [stack.call(request_for(request_id=name)) for name in ("queued", "running")]
        await calls[1].read()
        await until(lambda: worker.num_running == 2)
        assert stack.fleet.in_flight == {worker.member.id: 2}
        # The prompt of the running one is computed: its first token is there.
        assert stack.fleet.pending_tokens == {worker.member.id: 3}
        for call in calls:
            call.cancel()
        await stack.until_at_rest()
        assert not stack.fleet.in_flight and not stack.fleet.pending_tokens


async def test_a_duplicate_is_refused_while_the_first_runs(redis: RedisServer) -> None:
    async with Stack(redis.url) as stack:
        worker = await stack.add()
        stack.stage.decode("twice", breaking(1, hang))
        call = stack.call(request_for(request_id="twice"))
        await call.read()
        refusal = await stack.refused(request_for(request_id="twice"))
        assert refusal.code == grpc.StatusCode.ALREADY_EXISTS
        assert refusal.reason == "duplicate-request-id"
        assert "twice" in refusal.message
        assert len(worker.decode_calls) == 1 and worker.num_running == 1
        call.cancel()
        await stack.until_at_rest()
        assert await stack.generate(request_for(request_id="twice"))
        # Without ids nothing is a duplicate.
        await asyncio.gather(*(stack.generate(request_for()) for _ in range(5)))
        ids = [c.spec.request_id for c in worker.decode_calls]
        assert len(set(ids)) == len(ids), "workers are sent one id twice"


async def test_a_burst_is_bounded_and_told_when_to_come_back(redis: RedisServer) -> None:
    async with Stack(redis.url, max_in_flight=4) as stack:
        await stack.add()
        stack.stage.decode_default = answering(pause_s=0.05)
        results = await asyncio.gather(
            *(stack.generate(request_for()) for _ in range(40)), return_exceptions=True
        )
        failed = [refusal_of(r) for r in results if isinstance(r, BaseException)]
        assert len(failed) == 36
        for refusal in failed:
            assert refusal.code == grpc.StatusCode.RESOURCE_EXHAUSTED
            assert refusal.reason == "queue-full"
            assert refusal.retry_s == 1.0
            assert "4 requests" in refusal.message
        await stack.until_at_rest()
        assert await stack.generate(request_for())
        assert (stack.pipeline.admission.num_finished, stack.pipeline.admission.num_failed) == (
            5,
            0,
        )


async def test_a_stop_string_ends_an_output_and_its_work(redis: RedisServer) -> None:
    async with Stack(redis.url) as stack:
        worker = await stack.add()
        request = request_for(max_tokens=40, n=2)
        whole = await stack.generate(request)
        stop = whole.text[0][20:24]
        assert stop not in whole.text[1]
        request.stop.append(stop)
        request.request_id = "r"
        stack.stage.decode("r", answering(pause_s=0.01))
        answer = await stack.generate(request)
        assert answer.text[0] == whole.text[0][: whole.text[0].index(stop)]
        assert answer.ids[0] == whole.ids[0][: len(answer.ids[0])]
        assert stop in demo_tokenizer().tokenizer.decode(answer.ids[0])
        assert answer.text[1] == whole.text[1]
        assert answer.finish_reason == {0: FINISH_REASON_STOP, 1: FINISH_REASON_LENGTH}
        assert worker.stopped == [0]
        # The last output: the call itself ends.
        request.n, request.request_id = 1, "alone"
        stack.stage.decode("alone", answering(pause_s=0.01))
        alone = await stack.generate(request)
        assert (alone.text[0], alone.ids[0]) == (answer.text[0], answer.ids[0])
        await until(lambda: worker.num_cancelled == 1)
        assert worker.stopped == [0]


async def test_a_special_token_as_stop_string_stops(redis: RedisServer) -> None:
    async with Stack(redis.url) as stack:
        await stack.add()
        spec = await spec_of(stack, request_for(stop=["<|user|>", "x"], stop_token_ids=[77]))
        assert list(spec.stop_token_ids) == [2, 77]


async def test_logprobs_come_with_their_tokens(redis: RedisServer) -> None:
    async with Stack(redis.url) as stack:
        await stack.add()
        stack.stage.decode_default = answering(step=3)
        answer = await stack.generate(request_for(logprobs=1))
        assert answer.logprobs[0] == [-float(p) for p in range(8)]
        for response in answer.responses:
            assert [p.token_id for p in response.logprobs] == list(response.token_ids)
        assert (await stack.generate(request_for())).logprobs[0] == []


async def test_kv_sources_are_ordered_and_few(redis: RedisServer) -> None:
    async with Stack(redis.url) as stack:
        nodes = [f"node-{i}" for i in range(8)]
        for name in nodes:
            await stack.add(Role.KVSTORE, worker_id=name, node_id=name)
        await stack.add(node_id="node-0")
        uris = {w.member.id: w.member.kv_uri for w in stack.workers}
        prompt = list(range(5, 5 + 16 * 8 + 1))
        await hold(redis, stack, prompt, {name: i for i, name in enumerate(nodes)})
        await stack.generate(request_for(prompt))
        call = stack.workers[-1].decode_calls[-1]
        assert list(call.kv_sources) == [uris[f"node-{i}"] for i in (7, 6, 5, 4)]
        # What a prefill worker has just written comes first.
        await stack.add(Role.PREFILL, node_id="node-2")
        prompt = [*LONG_PROMPT[::-1]]
        await hold(redis, stack, prompt, {"node-5": 2, "node-3": 2, "node-6": 1})
        await stack.generate(request_for(prompt))
        prefill, decode = stack.workers[-1].prefill_calls[-1], stack.workers[-2].decode_calls[-1]
        held = [uris["node-3"], uris["node-5"], uris["node-6"]]
        assert list(prefill.kv_sources) == held
        assert list(decode.kv_sources) == [uris["node-2"], *held]


async def hold(redis: RedisServer, stack: Stack, prompt: list[int], blocks: Any) -> None:
    """Publish leading blocks of a prompt as held by nodes."""
    index = BlockIndex(redis.url, stack.name)
    keys = list(chain_keys(salt_key(b""), CARD.kv_root, prompt, CARD.block_size))
    for name, count in blocks.items():
        await index.renew(CARD.kv_root, name, 1, 30.0)
        await index.publish(CARD.kv_root, name, 1, keys[:count])
    await index.close()


async def test_published_blocks_are_moved_to_a_far_decode_worker(redis: RedisServer) -> None:
    async with Stack(redis.url) as stack:
        near = await stack.add(Role.KVSTORE, worker_id="near", node_id="near")
        far = await stack.add(Role.KVSTORE, worker_id="far", node_id="far")
        await stack.add(Role.PREFILL, node_id="near")
        await stack.add(node_id="far")

        async def slow(request: Any, context: Any) -> Any:
            for i in range(3):
                yield worker_pb2.PrefillResponse(published_keys=[bytes([i]) * 16])
                await asyncio.sleep(0.05)
            yield worker_pb2.PrefillResponse(is_last=True)

        stack.stage.prefill_default = slow
        await stack.generate(request_for(LONG_PROMPT))
        assert [list(p.keys) for p in far.pulls] == [[bytes([i]) * 16] for i in range(3)]
        assert {p.source for p in far.pulls} == {near.member.kv_uri}
        assert not near.pulls


@pytest.mark.parametrize(
    "text", ["x" * 4_000_000, "\u202e\u05d0" * 800_000, "\0" * 4_000_000, "ab " * 1_300_000]
)
async def test_four_megabytes_are_refused_in_no_time(redis: RedisServer, text: str) -> None:
    async with Stack(redis.url) as stack:
        worker = await stack.add()
        for request in (
            GenerateRequest(prompt=text),
            GenerateRequest(messages=MessageList(messages=[Message(role="user", content=text)])),
        ):
            started = time.monotonic()
            refusal = await stack.refused(request)
            assert (refusal.code, refusal.reason) == (
                grpc.StatusCode.INVALID_ARGUMENT,
                "context-too-long",
            )
            assert "2047" in refusal.message
            assert time.monotonic() - started < 1.0
        assert not worker.decode_calls and not worker.prefill_calls


async def test_the_largest_text_that_may_fit_is_tokenised_in_bounded_time(
    redis: RedisServer,
) -> None:
    async with Stack(redis.url) as stack:
        await stack.add()
        most = CARD.max_context_tokens * demo_tokenizer().longest_token_bytes - 1
        # Dashes come in tokens of 32: far more characters per token than text has.
        assert await _outcome(stack, GenerateRequest(prompt="-" * 32 * 2000, max_tokens=1)) == "ok"
        for text in ("-" * most, "a" * most, "\u05d0" * (most // 2)):
            started = time.monotonic()
            request = GenerateRequest(prompt=text, max_tokens=1)
            slow = asyncio.create_task(_outcome(stack, request))
            # The loop goes on meanwhile.
            await stack.generate(request_for(max_tokens=1))
            assert await slow in ("ok", "context-too-long")
            assert time.monotonic() - started < 3.0


async def test_a_large_context_does_not_make_a_large_text_cheap_to_send() -> None:
    step = TokeniseStep(demo_tokenizer(), 16, lambda: 0)
    card = replace(CARD, max_context_tokens=20_000)
    draw = random.Random(1)
    text = "".join(draw.choices("abcdefgh", k=1_000_000))
    with pytest.raises(InvalidRequestError) as error:
        await step.encode(GenerateRequest(prompt=text), card, 10.0)
    assert error.value.reason == "context-too-long"
    # Counted in the text's beginning only: all of it has seven times as many.
    number = int(error.value.message.split()[2])
    assert 20_000 <= number < 160_000


async def test_workers_of_two_checkpoints_are_never_mixed(redis: RedisServer) -> None:
    async with Stack(redis.url, wait_for_worker_s=0.3) as stack:
        await stack.add(card=replace(CARD, kv_root=bytes(16)))
        await stack.add(count=2)
        await stack.add(Role.PREFILL, card=replace(CARD, kv_root=bytes(16)))
        unavailable = abort(grpc.StatusCode.UNAVAILABLE)
        for number in range(6):
            stack.stage.decode(f"r-{number}", breaking(1, unavailable))
        await asyncio.gather(
            *(stack.generate(request_for(LONG_PROMPT, request_id=f"r-{i}")) for i in range(6))
        )
        other, *same, prefill = stack.workers
        assert not other.decode_calls and not prefill.prefill_calls
        assert all(worker.decode_calls for worker in same)


async def _outcome(stack: Stack, request: GenerateRequest) -> str:
    try:
        await stack.generate(request)
    except grpc.aio.AioRpcError as error:
        return refusal_of(error).reason
    return "ok"


async def test_a_million_token_ids_are_refused_by_their_number(redis: RedisServer) -> None:
    async with Stack(redis.url) as stack:
        await stack.add()
        refusal = await stack.refused(request_for([9999] * 1_300_000))
        assert refusal.field == "token_ids.ids"
        assert "1300000 tokens, at most 2047" in refusal.message
