"""One request is one trace over all processes, as a real collector receives it."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import grpc
import pytest

from paceline.v1.inference_pb2 import GenerateRequest, SamplingParams, TokenIds
from tests.checkpoints import DEMO
from tests.e2e.client import Answer, Client, assert_greedy
from tests.e2e.probe import fleet_metric, members, metric, until_at_rest
from tests.otlp_receiver import ERROR, OtlpReceiver, ReceivedSpan
from tests.platform import Platform
from tests.waiting import until, until_sync

TRACE_ID = "4bf92f3577b34da6a3ce929d0e0e4736"
CALLER_ID = "00f067aa0ba902b7"
GATEWAY_CALL = "paceline.v1.InferenceService/Generate"
PREFILL_CALL = "paceline.v1.PrefillService/Prefill"
DECODE_CALL = "paceline.v1.DecodeService/Decode"
ACQUIRE_CALL = "paceline.v1.KvNodeService/Acquire"
FETCH_CALL = "paceline.v1.KvNodeService/Fetch"

COMPLETION = "paceline_completion_tokens_total"

FLAGS = ("--prefill", "1", "--decode", "2", "--no-trainer")
FAR = ("--kv-nodes", "2", "--kv-transport", "grpc")
"""Blocks go over the network, as between machines."""


def prompt_ids(number: int, num_tokens: int = 700) -> list[int]:
    return [5 + (number * 37 + i * i * 7) % 4000 for i in range(num_tokens)]


def request_for(number: int, **fields: Any) -> GenerateRequest:
    return GenerateRequest(
        token_ids=TokenIds(ids=prompt_ids(number)),
        sampling=SamplingParams(temperature=0.0),
        ignore_eos=True,
        **{"max_tokens": 48, **fields},
    )


async def ask(
    client: Client, request: GenerateRequest, *metadata: tuple[str, str]
) -> tuple[Answer, dict[str, str]]:
    """Return the answer and the trailers."""
    answer, call = Answer(), client.stub.Generate(request, timeout=90, metadata=metadata)
    async for response in call:
        answer.add(response)
    return answer, dict(await call.trailing_metadata())


@pytest.fixture(scope="module")
def receiver() -> Iterator[OtlpReceiver]:
    with OtlpReceiver() as receiver:
        yield receiver


@pytest.fixture(scope="module")
def platform(
    tmp_path_factory: pytest.TempPathFactory, receiver: OtlpReceiver
) -> Iterator[Platform]:
    env = {"PACELINE_OTLP_ENDPOINT": receiver.endpoint, "PACELINE_HOP_S": "0"}
    with Platform(tmp_path_factory.mktemp("tracing"), *FLAGS, *FAR, env=env) as up:
        yield up


class Tree:
    """The spans of one trace, by name and parent."""

    def __init__(self, spans: list[ReceivedSpan]) -> None:
        self.spans = spans
        self._by_id = {span.span_id: span for span in spans}

    def all(self, name: str, service: str = "") -> list[ReceivedSpan]:
        return [s for s in self.spans if s.name == name and (not service or s.service == service)]

    def one(self, name: str, service: str = "") -> ReceivedSpan:
        (span,) = self.all(name, service)
        return span

    def parent(self, span: ReceivedSpan) -> ReceivedSpan | None:
        return self._by_id.get(span.parent_id)

    def way(self, span: ReceivedSpan) -> list[str]:
        """Return the names from the root to a span."""
        parent = self.parent(span)
        return [*(self.way(parent) if parent else []), span.name]


def has(*names: str) -> Any:
    """Return a condition: spans of these names have arrived."""
    return lambda spans: set(names) <= {span.name for span in spans}


async def test_a_request_is_one_trace_from_the_client_to_the_engines(
    platform: Platform, receiver: OtlpReceiver
) -> None:
    parent = ("traceparent", f"00-{TRACE_ID}-{CALLER_ID}-01")
    async with Client(platform.grpc) as client:
        answer, trailers = await ask(client, request_for(1), parent, ("x-request-id", "traced"))
    assert_greedy(DEMO, prompt_ids(1), answer.ids[0])
    assert trailers["paceline-trace-id"] == TRACE_ID
    spans = await asyncio.to_thread(
        receiver.wait_for,
        TRACE_ID,
        # Publishing may end behind the call that it belongs to.
        has(GATEWAY_CALL, PREFILL_CALL, DECODE_CALL, FETCH_CALL, "kv.publish", "kv.load"),
    )
    tree = Tree(spans)
    root = tree.one(GATEWAY_CALL, "paceline-gateway")
    assert root.parent_id == CALLER_ID
    assert trailers["traceparent"] == f"00-{TRACE_ID}-{root.span_id}-01"
    for name in ("tokenise", "lookup", "route", "prefill", "decode"):
        assert tree.parent(tree.one(name, "paceline-gateway")) is root
    prefill = tree.one(PREFILL_CALL, "paceline-prefill")
    decode = tree.one(DECODE_CALL, "paceline-decode")
    assert tree.way(prefill) == [GATEWAY_CALL, "prefill", PREFILL_CALL]
    assert tree.way(decode) == [GATEWAY_CALL, "decode", DECODE_CALL]
    for call, names in (
        (prefill, ("queue", "engine.prefill", "kv.publish")),
        (decode, ("queue", "kv.load", "engine.prefill", "engine.decode")),
    ):
        for name in names:
            assert tree.parent(tree.one(name, call.service)) is call
    for fetch in tree.all(FETCH_CALL):
        assert tree.way(fetch)[-2] == "kv.transfer"
    # Every span but that of the client has its parent here.
    assert [s.name for s in spans if tree.parent(s) is None] == [GATEWAY_CALL]
    check_attributes(tree, answer)
    check_times(tree)
    wanted = {"request-finished", "prefill-finished", "decode-finished", "blocks-acquired"}

    def lines() -> list[dict[str, Any]]:
        return [line for line in platform.log_lines() if line.get("trace_id") == TRACE_ID]

    # Logs reach their files a moment behind the answer.
    await until(lambda: {line["event"] for line in lines()} >= wanted)
    assert {line["request_id"] for line in lines()} == {"traced"}


def check_attributes(tree: Tree, answer: Answer) -> None:
    """Compare what spans say with what the client was told."""
    usage = answer.usage[0]
    root = tree.one(GATEWAY_CALL).attributes
    assert root["gen_ai.request.model"] == "demo"
    assert root["gen_ai.usage.input_tokens"] == usage.prompt_tokens == 700
    assert root["gen_ai.usage.output_tokens"] == usage.completion_tokens == 48
    assert root["gen_ai.response.finish_reasons"] == ["length"]
    assert root["paceline.request_id"] == "traced"
    route = tree.one("route").attributes
    assert route["paceline.kind"] == "split"
    assert route["paceline.predicted_ttft_s"] > 0
    assert route["paceline.decode_worker"] == usage.decode_worker
    chunks = tree.one("engine.prefill", "paceline-prefill").events_named("chunk")
    assert sum(chunk.attributes["paceline.tokens"] for chunk in chunks) == 699
    publish, load = tree.one("kv.publish", "paceline-prefill"), tree.one("kv.load")
    assert publish.attributes["paceline.blocks"] == load.attributes["paceline.blocks"] == 44
    moved = sum(span.attributes["paceline.bytes"] for span in tree.all("kv.transfer"))
    assert moved == load.attributes["paceline.bytes"] > 0
    decode = tree.one("engine.decode")
    assert decode.attributes["paceline.tokens"] == 48
    assert decode.attributes["paceline.steps"] == usage.target_steps
    drafts = decode.events_named("drafts")
    assert sum(e.attributes["paceline.drafted_tokens"] for e in drafts) == usage.drafted_tokens
    assert sum(e.attributes["paceline.rounds"] for e in drafts) == len(decode.events_named("draft"))


def check_times(tree: Tree) -> None:
    """Check that the engines' own clock readings lie within the calls that caused them."""
    slack_ns = 5_000_000
    for name in ("queue", "engine.prefill", "engine.decode", "kv.load"):
        for span in tree.all(name):
            call = tree.parent(span)
            assert call is not None
            assert call.start_ns - slack_ns <= span.start_ns <= span.end_ns
            assert span.end_ns <= call.end_ns + slack_ns
    first = tree.one("engine.decode").events_named("first-token")[0].time_ns
    seen = tree.one(GATEWAY_CALL).events_named("first-token")[0].time_ns
    assert first <= seen + slack_ns


async def test_requests_without_a_trace_get_one_each(
    platform: Platform, receiver: OtlpReceiver
) -> None:
    async with Client(platform.grpc) as client:
        answers = await asyncio.gather(*(ask(client, request_for(10 + i)) for i in range(3)))
        with pytest.raises(grpc.aio.AioRpcError) as refusal:
            await ask(client, GenerateRequest(prompt=""))
    ids = {trailers["paceline-trace-id"] for _, trailers in answers}
    assert len(ids) == 3
    for trace_id in ids:
        spans = await asyncio.to_thread(
            receiver.wait_for, trace_id, has(GATEWAY_CALL, "engine.decode")
        )
        assert len(Tree(spans).all(GATEWAY_CALL)) == 1
    trailers = dict(refusal.value.trailing_metadata() or ())
    refused = str(trailers["paceline-trace-id"])
    spans = await asyncio.to_thread(receiver.wait_for, refused, has(GATEWAY_CALL))
    root = Tree(spans).one(GATEWAY_CALL)
    assert (root.status, root.attributes["error.type"]) == (ERROR, "invalid-argument")


async def test_a_caller_that_does_not_trace_is_not_traced(
    platform: Platform, receiver: OtlpReceiver
) -> None:
    quiet, after = "a" * 32, "b" * 32
    async with Client(platform.grpc) as client:
        for trace_id, flags in ((quiet, "00"), (after, "01")):
            parent = ("traceparent", f"00-{trace_id}-{CALLER_ID}-{flags}")
            _, trailers = await ask(client, request_for(20), parent)
            assert trailers["paceline-trace-id"] == trace_id
    # Spans of one process arrive in order: what was to come of the first is here by now.
    await asyncio.to_thread(receiver.wait_for, after, has(GATEWAY_CALL, DECODE_CALL))
    assert receiver.trace(quiet) == []
    assert any(line.get("trace_id") == quiet for line in platform.log_lines("gateway-0"))


async def test_both_workers_of_a_moved_stream_are_in_its_trace(
    platform: Platform, receiver: OtlpReceiver
) -> None:
    async with Client(platform.grpc) as client:
        sent = fleet_metric(platform, COMPLETION, "gateway")
        task = asyncio.create_task(ask(client, request_for(30, max_tokens=900)))
        await until(lambda: fleet_metric(platform, COMPLETION, "gateway") > sent, 30)
        index = running_worker(platform)
        assert index is not None, "the stream ended before its worker could be killed"
        old = platform.kill("decode", index)
        answer, trailers = await task
    assert answer.usage[0].migrations == 1
    trace_id = trailers["paceline-trace-id"]
    tree = Tree(
        await asyncio.to_thread(
            receiver.wait_for, trace_id, has(GATEWAY_CALL, DECODE_CALL, "engine.decode")
        )
    )
    first, second = tree.all("decode", "paceline-gateway")
    assert first.attributes["paceline.worker"] == f"decode-{index}"
    assert first.status == ERROR
    assert second.attributes["paceline.worker"] == f"decode-{1 - index}"
    assert second.attributes["paceline.attempt"] == 2
    assert second.attributes["paceline.resumed_tokens"] > 0
    assert second.status != ERROR
    assert second.links == [first.span_id]
    root = tree.one(GATEWAY_CALL)
    assert tree.parent(first) is tree.parent(second) is root
    (broken,) = root.events_named("decode-broken")
    assert broken.attributes["paceline.worker"] == f"decode-{index}"
    assert broken.attributes["error.type"] == first.attributes["error.type"]
    assert tree.parent(tree.all(DECODE_CALL)[-1]) is second
    assert [s.attributes["paceline.kind"] for s in tree.all("route")] == ["split", "resumed"]
    await asyncio.to_thread(platform.wait_replaced, "decode", index, old)
    until_at_rest(platform)


def running_worker(platform: Platform) -> int | None:
    """Return the number of the decode worker that runs something; None while none does."""
    for member in members(platform, "decode"):
        if metric(member["metrics_address"], "paceline_engine_running"):
            return int(member["id"].rpartition("-")[2])
    return None


@pytest.mark.parametrize("is_away", [True, False])
async def test_a_collector_that_is_away_or_hangs_changes_nothing(
    tmp_path_factory: pytest.TempPathFactory, is_away: bool
) -> None:
    with OtlpReceiver() as stuck:
        stuck.hang()
        endpoint = "http://127.0.0.1:9" if is_away else stuck.endpoint
        env = {"PACELINE_OTLP_ENDPOINT": endpoint}
        directory = tmp_path_factory.mktemp("stuck")
        with Platform(directory, "--prefill", "1", "--decode", "1", "--no-trainer", env=env) as up:
            async with Client(up.grpc) as client:
                answer, trailers = await ask(client, request_for(1))
                assert len(trailers["paceline-trace-id"]) == 32
                assert_greedy(DEMO, prompt_ids(1), answer.ids[0])
                dropped = "paceline_trace_spans_dropped_total"
                until_sync(lambda: fleet_metric(up, dropped, "gateway") > 0, 60)
                again, _ = await ask(client, request_for(1))
            assert again.ids == answer.ids
            until_at_rest(up)
            assert up.stop() == 0
            events = [line["event"] for line in up.log_lines("gateway-0")]
        assert events.count("traces-not-sent") == 1
        assert bool(stuck.num_calls) is not is_away
