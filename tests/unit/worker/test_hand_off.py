"""KV from a prefill worker to decode workers, through real nodes: complete, exact, traceable."""

from __future__ import annotations

import asyncio
import json

import grpc
import pytest

from tests.unit.kvstore.node_process import flip, stats
from tests.unit.worker.conftest import Fleet
from tests.unit.worker.worker_process import (
    CHUNK_TOKENS,
    TRACE_ID,
    calling,
    make_prompt,
    make_spec,
    metric,
    num_fds,
)
from tests.waiting import until

PROMPT_TOKENS = 300
"""18 full blocks and a tail; more than four chunks."""


async def test_prefill_publishes_while_it_computes(fleet: Fleet) -> None:
    async with calling(fleet["prefill"]) as prefill:
        answer = await prefill.prefill(make_spec(make_prompt(PROMPT_TOKENS, 1)))
        await prefill.until_idle()
    published = [message.published_tokens for message in answer.messages]
    assert len([p for p in published if p]) >= PROMPT_TOKENS // CHUNK_TOKENS
    assert published == sorted(published)
    # The last token is computed by whoever draws from its logits.
    assert published[-1] == PROMPT_TOKENS - 1
    assert [message.is_last for message in answer.messages[-2:]] == [False, True]
    keys = [key for message in answer.messages for key in message.published_keys]
    assert len(keys) == len(set(keys)) == PROMPT_TOKENS // 16 + 1


async def test_blocks_are_readable_when_a_prefill_ends(fleet: Fleet) -> None:
    async with calling(fleet["prefill"]) as prefill, calling(fleet["decode"]) as decode:
        for seed in range(100, 110):
            spec = make_spec(make_prompt(100, seed), max_tokens=1)
            await prefill.prefill(spec)
            assert (await decode.decode(spec)).store_hit_tokens == 99


@pytest.mark.parametrize(("worker", "source"), [("decode", ""), ("far", "kv-0")])
async def test_decode_takes_all_but_one_token_from_the_store(
    fleet: Fleet, worker: str, source: str
) -> None:
    prompt = make_prompt(PROMPT_TOKENS, 2 if source else 3)
    spec = make_spec(prompt, max_tokens=20, request_id=f"hand-off-{worker}")
    sources = (fleet[source].kv_uri,) if source else ()
    async with (
        calling(fleet["prefill"]) as prefill,
        calling(fleet[worker]) as decode,
        calling(fleet["plain"]) as plain,
    ):
        await prefill.prefill(spec)
        answer = await decode.decode(spec, sources)
        expected = await plain.decode(spec)
        await decode.until_idle()
    assert answer.store_hit_tokens == PROMPT_TOKENS - 1
    assert answer.local_hit_tokens == 0
    assert expected.store_hit_tokens == 0
    assert answer.tokens == expected.tokens
    assert len(answer.tokens) == 20


async def test_blocks_came_over_the_network_to_the_far_node(fleet: Fleet) -> None:
    prompt = make_prompt(PROMPT_TOKENS, 4)
    spec = make_spec(prompt, max_tokens=1)
    async with calling(fleet["prefill"]) as prefill, calling(fleet["far"]) as far:
        before = await stats(fleet["kv-1"])
        await prefill.prefill(spec)
        await far.decode(spec, (fleet["kv-0"].kv_uri,))
        after = await stats(fleet["kv-1"])
    assert after.pulled_blocks - before.pulled_blocks == PROMPT_TOKENS // 16 + 1


async def test_a_flipped_bit_costs_time_and_nothing_else(fleet: Fleet) -> None:
    prompt = make_prompt(PROMPT_TOKENS, 5)
    spec = make_spec(prompt, max_tokens=12)
    async with (
        calling(fleet["prefill"]) as prefill,
        calling(fleet["decode"]) as decode,
        calling(fleet["plain"]) as plain,
    ):
        answer = await prefill.prefill(spec)
        keys = [key for message in answer.messages for key in message.published_keys]
        before = metric(fleet["decode"], "paceline_kv_corrupt_blocks_total")
        node_before = (await stats(fleet["kv-0"])).corrupt_blocks
        _corrupt(fleet, keys[4])
        damaged = await decode.decode(spec)
        expected = await plain.decode(spec)
        await decode.until_idle()
        assert damaged.tokens == expected.tokens
        assert damaged.store_hit_tokens == 4 * 16
        assert metric(fleet["decode"], "paceline_kv_corrupt_blocks_total") == before + 1
        assert (await stats(fleet["kv-0"])).corrupt_blocks == node_before + 1
        # The decode worker wrote what it had to compute: the block is whole again.
        repaired = make_spec(prompt, request_id=spec.request_id)
        assert (await prefill.prefill(repaired)).messages[-1].published_tokens == 299


async def test_request_and_trace_id_are_in_one_line_of_every_hop(fleet: Fleet) -> None:
    spec = make_spec(make_prompt(50, 6), request_id="own-id")
    sources = (fleet["kv-0"].kv_uri,)
    async with calling(fleet["prefill"]) as prefill, calling(fleet["far"]) as far:
        await prefill.prefill(spec, log_id="trace-1")
        await far.decode(spec, sources, log_id="trace-1")
        await far.decode(make_spec(make_prompt(50, 7), request_id="no-metadata"))

    (prefilled,) = fleet.prefill.events("prefill-finished", request_id="trace-1")
    assert prefilled["published_tokens"] == 49
    assert prefilled["outcome"] == "ok"
    assert prefilled["duration_s"] > 0
    (decoded,) = fleet.far.events("decode-finished", request_id="trace-1")
    assert (decoded["tokens"], decoded["store_hit_tokens"]) == (8, 49)
    assert len(fleet.far.events("decode-finished", request_id="no-metadata")) == 1

    lines = [json.loads(line) for line in fleet.far_node.log.splitlines()]
    acquired = [x for x in lines if x["event"] == "blocks-acquired"]
    (line,) = [x for x in acquired if x.get("request_id") == "trace-1"]
    assert (line["asked"], line["found"], line["pulled"]) == (4, 4, 4)
    assert prefilled["trace_id"] == decoded["trace_id"] == line["trace_id"] == TRACE_ID


@pytest.mark.parametrize("request_id", ["line\nbreak", "\u00fc\u4e16", "x" * 300, ""])
async def test_request_ids_of_any_form_work(fleet: Fleet, request_id: str) -> None:
    spec = make_spec(make_prompt(50, len(request_id) + 40))
    spec.request_id = request_id
    async with calling(fleet["prefill"]) as prefill, calling(fleet["decode"]) as decode:
        await prefill.prefill(spec)
        assert (await decode.decode(spec)).store_hit_tokens == 49


async def test_tokens_outside_the_vocabulary_are_refused(fleet: Fleet) -> None:
    async with calling(fleet["plain"]) as plain:
        with pytest.raises(grpc.aio.AioRpcError) as failure:
            await plain.decode(make_spec([3, 4096]))
        assert failure.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        with pytest.raises(grpc.aio.AioRpcError) as failure:
            await plain.decode(make_spec(make_prompt(5000, 0), request_id="too-long"))
        assert failure.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert len((await plain.decode(make_spec([3, 4095]))).tokens) == 8
    (failed,) = fleet.plain.events("request-failed", request_id="too-long")
    assert (failed["service"], failed["reason"]) == ("plain-engine", "invalid-argument")


async def test_processes_report_themselves(fleet: Fleet) -> None:
    async with calling(fleet["decode"]) as decode:
        await decode.decode(make_spec(make_prompt(50, 8)))
    for member in fleet.members.values():
        assert metric(member, "paceline_redis_up") == 1
        assert metric(member, "paceline_tasks") > 1
        assert metric(member, "process_open_fds") > 1
    assert metric(fleet["decode"], "paceline_engine_total_blocks") == 256
    assert metric(fleet["decode"], "paceline_engine_step_seconds_count") > 8
    assert metric(fleet["decode"], "paceline_kv_link_up") == 1
    assert metric(fleet["plain"], "paceline_kv_link_up") == 0


async def test_cancelled_requests_leave_nothing_behind(fleet: Fleet) -> None:
    worker_ids = ("prefill", "decode", "far")
    processes = {w: getattr(fleet, w) for w in worker_ids}
    async with (
        calling(fleet["prefill"]) as prefill,
        calling(fleet["decode"]) as decode,
        calling(fleet["far"]) as far,
    ):
        await asyncio.gather(*(c.until_idle() for c in (prefill, decode, far)))
        fds = {w: (num_fds(p.pid), num_fds(p.engine_pid)) for w, p in processes.items()}

        async def abandon(i: int) -> None:
            spec = make_spec(make_prompt(40 + i, 1000 + i // 2), max_tokens=400)
            source = (fleet["kv-0"].kv_uri,)
            opens = (prefill.open_prefill, decode.open_decode, far.open_decode)
            call = opens[i % 3](spec, source)
            # Some before their first step, some in the middle of their tokens.
            if i % 2:
                await call.read()
            else:
                await asyncio.sleep(0.001 * (i % 50))
            call.cancel()

        await asyncio.gather(*(abandon(i) for i in range(300)))
        for caller in (prefill, decode, far):
            await caller.until_idle(20)
        now = {w: (num_fds(p.pid), num_fds(p.engine_pid)) for w, p in processes.items()}

    async def has_no_pins() -> bool:
        states = [await stats(fleet[node]) for node in ("kv-0", "kv-1")]
        return all(state.num_pinned_blocks == 0 for state in states)

    await until(has_no_pins)
    assert now == fds
    cancelled = fleet.decode.events("decode-finished", outcome="cancelled")
    assert len(cancelled) >= 50


def _corrupt(fleet: Fleet, key: bytes) -> None:
    """Flip a bit in the payload of a block in the arena of kv-0."""
    arena = fleet.node.arena
    content = arena.read_bytes()
    header = content.index(key)
    payload = header - 16 + 128
    flip(arena, content[payload : payload + 1024])
