"""What a client must not send: each case a clear error, the platform none the worse for it."""

from __future__ import annotations

import os
import signal
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest

from paceline.v1 import inference_pb2, inference_pb2_grpc
from paceline.v1.inference_pb2 import (
    ChoiceList,
    GenerateRequest,
    Message,
    MessageList,
    SamplingParams,
    SpeculationParams,
    TokenIds,
)
from tests.e2e.probe import fleet_metric, members, metric, rss_mb, until_at_rest
from tests.e2e.side_gateway import side_gateway, write_keys
from tests.e2e.tcp_proxy import TcpProxy
from tests.platform import Platform
from tests.refusal import Refusal, refusal_of, refused, stub_of
from tests.waiting import until, until_sync

INVALID = grpc.StatusCode.INVALID_ARGUMENT
NAN = float("nan")
WORKER_CALLS = "paceline_rpc_requests_total"


@pytest.fixture(scope="module")
def platform(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Platform]:
    with Platform(tmp_path_factory.mktemp("bad-input"), "--prefill", "1", "--decode", "1") as up:
        yield up


@pytest.fixture
def channel(platform: Platform) -> Iterator[grpc.Channel]:
    options = [("grpc.max_send_message_length", -1)]
    with grpc.insecure_channel(platform.grpc, options=options) as opened:
        yield opened


def sampling(**fields: float) -> GenerateRequest:
    return GenerateRequest(prompt="x", sampling=SamplingParams(**fields))  # type: ignore[arg-type]


def answer(stub: Any, request: GenerateRequest, timeout_s: float = 30.0, **call: Any) -> list[Any]:
    return list(stub.Generate(request, timeout=timeout_s, **call))


# A small receive window: what a client buffers in its own memory is no business of ours.
CLIENT = """
import sys, grpc
from paceline.v1 import inference_pb2_grpc
from paceline.v1.inference_pb2 import GenerateRequest
options = [("grpc.http2.bdp_probe", 0), ("grpc.http2.lookahead_bytes", 65536)]
channel = grpc.insecure_channel(sys.argv[1], options=options)
stub = inference_pb2_grpc.InferenceServiceStub(channel)
request = GenerateRequest(prompt="x", n=8, max_tokens=1500, ignore_eos=True, logprobs=20)
for response in stub.Generate(request, timeout=300):
    print("got", flush=True)
"""


@contextmanager
def running_client(address: str) -> Iterator[subprocess.Popen[bytes]]:
    """Run a client in a process of its own, in the middle of a long answer."""
    with (
        open(os.devnull, "wb") as nowhere,
        subprocess.Popen(
            [sys.executable, "-c", CLIENT, address], stdout=subprocess.PIPE, stderr=nowhere
        ) as process,
    ):
        assert process.stdout is not None
        try:
            assert process.stdout.readline() == b"got\n"
            yield process
        finally:
            process.kill()


BAD_REQUESTS = {
    "no-input": (GenerateRequest(), "input"),
    "empty-prompt": (GenerateRequest(prompt=""), "prompt"),
    "no-messages": (GenerateRequest(messages=MessageList()), "messages.messages"),
    "no-role": (
        GenerateRequest(messages=MessageList(messages=[Message(content="x")])),
        "messages.messages[0].role",
    ),
    "no-token-ids": (GenerateRequest(token_ids=TokenIds()), "token_ids.ids"),
    "token-outside": (GenerateRequest(token_ids=TokenIds(ids=[5, 4096])), "token_ids.ids"),
    "nan-temperature": (sampling(temperature=NAN), "sampling.temperature"),
    "negative-temperature": (sampling(temperature=-0.1), "sampling.temperature"),
    "infinite-temperature": (sampling(temperature=float("inf")), "sampling.temperature"),
    "top-p-2": (sampling(top_p=2.0), "sampling.top_p"),
    "top-p-0": (sampling(top_p=0.0), "sampling.top_p"),
    "nan-top-p": (sampling(top_p=NAN), "sampling.top_p"),
    "negative-top-k": (sampling(top_k=-1), "sampling.top_k"),
    "min-p-2": (sampling(min_p=2.0), "sampling.min_p"),
    "nan-min-p": (sampling(min_p=NAN), "sampling.min_p"),
    "repetition-penalty-0": (sampling(repetition_penalty=0.0), "sampling.repetition_penalty"),
    "presence-1000": (sampling(presence_penalty=1000.0), "sampling.presence_penalty"),
    "nan-frequency": (sampling(frequency_penalty=NAN), "sampling.frequency_penalty"),
    "n-100000": (GenerateRequest(prompt="x", n=100_000), "n"),
    "n-0": (GenerateRequest(prompt="x", n=0), "n"),
    "max-tokens-0": (GenerateRequest(prompt="x", max_tokens=0), "max_tokens"),
    "max-tokens-2-31": (GenerateRequest(prompt="x", max_tokens=1 << 31), "max_tokens"),
    "logprobs-1000": (GenerateRequest(prompt="x", logprobs=1000), "logprobs"),
    "priority-1000": (GenerateRequest(prompt="x", priority=1000), "priority"),
    "10000-stops": (GenerateRequest(prompt="x", stop=["a"] * 10_000), "stop"),
    "empty-stop": (GenerateRequest(prompt="x", stop=["a", ""]), "stop[1]"),
    "long-stop": (GenerateRequest(prompt="x", stop=["a" * 100_000]), "stop[0]"),
    "stop-token-outside": (GenerateRequest(prompt="x", stop_token_ids=[9999]), "stop_token_ids"),
    "many-stop-tokens": (
        GenerateRequest(prompt="x", stop_token_ids=[1] * 100_000),
        "stop_token_ids",
    ),
    "regex": (GenerateRequest(prompt="x", regex="(a+)+$" * 1000), "regex"),
    "grammar": (GenerateRequest(prompt="x", grammar="root ::= root root"), "grammar"),
    "json-schema": (GenerateRequest(prompt="x", json_schema="{"), "json_schema"),
    "choice": (GenerateRequest(prompt="x", choice=ChoiceList()), "choice"),
    "drafter": (
        GenerateRequest(prompt="x", speculation=SpeculationParams(mode="no-such")),
        "speculation.mode",
    ),
    "mode-in-small-letters": (
        GenerateRequest(prompt="x", speculation=SpeculationParams(mode="auto")),
        "speculation.mode",
    ),
    "long-mode": (
        GenerateRequest(prompt="x", speculation=SpeculationParams(mode="a" * 100_000)),
        "speculation.mode",
    ),
    "long-request-id": (GenerateRequest(prompt="x", request_id="a" * 1000), "request_id"),
    "control-in-request-id": (GenerateRequest(prompt="x", request_id="a\nb"), "request_id"),
}


@pytest.mark.parametrize("case", BAD_REQUESTS)
def test_a_bad_field_is_named(channel: grpc.Channel, platform: Platform, case: str) -> None:
    request, field = BAD_REQUESTS[case]
    calls = fleet_metric(platform, WORKER_CALLS, "prefill", "decode")
    refusal = refused(channel, request)
    assert (refusal.code, refusal.field) == (INVALID, field)
    assert refusal.reason and len(refusal.message) > len(field)
    assert fleet_metric(platform, WORKER_CALLS, "prefill", "decode") == calls


def test_a_prompt_over_the_context_is_refused_with_both_numbers(channel: grpc.Channel) -> None:
    refusal = refused(channel, GenerateRequest(token_ids=TokenIds(ids=[5] * 3000)))
    assert (refusal.code, refusal.reason) == (INVALID, "context-too-long")
    assert "3000" in refusal.message and "2047" in refusal.message
    refusal = refused(channel, GenerateRequest(prompt="one two " * 2000))
    assert (refusal.field, refusal.reason) == ("prompt", "context-too-long")


@pytest.mark.parametrize("text", ["a" * 1_000_000, "\u202e\u05d0" * 400_000, "\0" * 1_000_000])
def test_megabytes_of_prompt_are_refused_before_they_are_tokenised(
    channel: grpc.Channel, text: str
) -> None:
    started = time.monotonic()
    refusal = refused(channel, GenerateRequest(prompt=text))
    assert (refusal.code, refusal.reason) == (INVALID, "context-too-long")
    assert time.monotonic() - started < 2.0


def test_a_message_over_the_limit_is_refused_and_memory_stays_flat(
    channel: grpc.Channel, platform: Platform
) -> None:
    request = GenerateRequest(prompt="x" * (5 << 20))
    for _ in range(5):
        refused(channel, request)
    before = rss_mb(platform.pid("gateway"))
    for _ in range(40):
        assert refused(channel, request).code == grpc.StatusCode.RESOURCE_EXHAUSTED
    assert rss_mb(platform.pid("gateway")) - before < 20.0


@pytest.mark.parametrize(
    "data",
    [
        b"\x12\x03\xff\xfe\xfd",  # prompt: invalid UTF-8
        b"\x12\x03\xed\xa0\x80",  # prompt: a lone surrogate
        b"\xff" * 100,
        b"\x12\xff\xff\xff\xff\x0f",  # a length beyond the message
    ],
    ids=["utf-8", "surrogate", "garbage", "length"],
)
def test_bytes_that_are_no_request_are_refused(channel: grpc.Channel, data: bytes) -> None:
    refusal = refused(channel, data)
    assert (refusal.code, refusal.reason) == (INVALID, "undecodable-message")
    assert refusal.field == "request"


def test_a_negative_token_id_is_refused(channel: grpc.Channel) -> None:
    minus_one = b"\xff" * 9 + b"\x01"
    data = b"\x22" + bytes([len(minus_one) + 2]) + b"\x0a" + bytes([len(minus_one)]) + minus_one
    refusal = refused(channel, data)
    assert (refusal.code, refusal.field) == (INVALID, "token_ids.ids")


@pytest.mark.parametrize(
    "text", ["a\0b", "\u05e9\u05dc\u05d5\u05dd", "\U0001f600" * 50, "\u202eabc"]
)
def test_odd_but_legal_text_is_answered(channel: grpc.Channel, text: str) -> None:
    request = GenerateRequest(prompt=text, max_tokens=4, ignore_eos=True)
    responses = answer(stub_of(channel), request)
    assert sum(len(r.token_ids) for r in responses) == 4


@pytest.mark.parametrize("name", ["nobody", "../../etc", "/etc/passwd", "demo/../demo", "x" * 5000])
def test_an_unknown_model_is_not_found(channel: grpc.Channel, name: str) -> None:
    refusal = refused(channel, GenerateRequest(prompt="x", model=name))
    assert (refusal.code, refusal.reason) == (grpc.StatusCode.NOT_FOUND, "model-not-found")
    assert name not in refusal.message


def test_keys_decide_who_may_call(platform: Platform, tmp_path: Path) -> None:
    keys = {
        "good": {"tenant": "a"},
        "narrow": {"tenant": "b", "models": ["other"]},
        "old": {"tenant": "a", "expires": "2020-01-01T00:00:00+00:00"},
    }
    path = write_keys(tmp_path / "keys.json", keys)
    flags = ("--api-keys", str(path))
    with (
        side_gateway(platform, "gateway-keys", *flags, log=tmp_path / "gateway.log") as address,
        grpc.insecure_channel(address) as channel,
    ):
        request = GenerateRequest(prompt="x", max_tokens=2, ignore_eos=True)
        bearers: list[tuple[tuple[str, str], ...]] = [()]
        bearers += [(("authorization", f"Bearer {key}"),) for key in ("wrong", "old", "")]
        bearers += [(("authorization", "good"),)]
        refusals = {refused(channel, request, metadata=bearer) for bearer in bearers}
        assert len(refusals) == 1, "the text tells keys apart"
        assert refusals.pop().code == grpc.StatusCode.UNAUTHENTICATED
        narrow = (("authorization", "Bearer narrow"),)
        hidden = refused(channel, GenerateRequest(prompt="x", model="demo"), metadata=narrow)
        absent = refused(channel, GenerateRequest(prompt="x", model="nobody"), metadata=narrow)
        assert hidden == absent
        assert hidden.code == grpc.StatusCode.PERMISSION_DENIED
        good = (("authorization", "Bearer good"),)
        assert answer(stub_of(channel), request, metadata=good)
        with pytest.raises(grpc.RpcError) as error:
            stub_of(channel).CountTokens(inference_pb2.CountTokensRequest(prompt="x"), timeout=5)
        assert refusal_of(error.value).code == grpc.StatusCode.UNAUTHENTICATED


def test_an_unknown_method_is_unimplemented(channel: grpc.Channel) -> None:
    call = channel.unary_unary("/paceline.v1.InferenceService/NoSuch")
    with pytest.raises(grpc.RpcError) as error:
        call(b"", timeout=5)
    assert error.value.code() == grpc.StatusCode.UNIMPLEMENTED


def test_bytes_that_are_no_grpc_do_not_hurt(platform: Platform, channel: grpc.Channel) -> None:
    host, port = platform.grpc.split(":")
    for garbage in (
        b"GET / HTTP/1.1\r\n\r\n",
        os.urandom(4096),
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    ):
        with socket.create_connection((host, int(port)), timeout=5) as sock:
            sock.sendall(garbage)
            sock.shutdown(socket.SHUT_WR)
            while sock.recv(4096):
                pass
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    with (
        socket.create_connection((host, int(port)), timeout=5) as sock,
        pytest.raises(OSError),
    ):
        context.wrap_socket(sock)
    assert answer(stub_of(channel), GenerateRequest(prompt="x", max_tokens=2))


def test_a_running_request_id_is_refused(channel: grpc.Channel, platform: Platform) -> None:
    request = GenerateRequest(prompt="x", request_id="twice", max_tokens=500, ignore_eos=True)
    call = stub_of(channel).Generate(request, timeout=30)
    next(call)
    refusal = refused(channel, request)
    assert refusal.code == grpc.StatusCode.ALREADY_EXISTS
    assert refusal.reason == "duplicate-request-id"
    call.cancel()
    until_at_rest(platform)
    request.max_tokens = 2
    assert answer(stub_of(channel), request)


def test_a_deadline_ends_a_request_in_every_phase(
    channel: grpc.Channel, platform: Platform
) -> None:
    long_prompt = GenerateRequest(
        token_ids=TokenIds(ids=[7 + i % 4000 for i in range(1500)]),
        max_tokens=400,
        ignore_eos=True,
    )
    for timeout_s in (0.001, 0.02, 0.1, 0.3, 0.6, 1.0):
        started = time.monotonic()
        with pytest.raises(grpc.RpcError) as error:
            answer(stub_of(channel), long_prompt, timeout_s)
        assert error.value.code() == grpc.StatusCode.DEADLINE_EXCEEDED
        assert time.monotonic() - started < timeout_s + 1.0
    until_at_rest(platform)


def test_a_deadline_that_has_passed_is_refused_at_once(
    channel: grpc.Channel, platform: Platform
) -> None:
    calls = fleet_metric(platform, WORKER_CALLS, "prefill", "decode")
    refusal = refused(channel, GenerateRequest(prompt="x"), timeout_s=0.0)
    assert refusal.code == grpc.StatusCode.DEADLINE_EXCEEDED
    assert fleet_metric(platform, WORKER_CALLS, "prefill", "decode") == calls


def test_too_many_requests_are_told_when_to_come_back(platform: Platform, tmp_path: Path) -> None:
    flags = ("--max-in-flight", "2")
    with (
        side_gateway(platform, "gateway-small", *flags, log=tmp_path / "gateway.log") as address,
        grpc.insecure_channel(address) as channel,
    ):
        request = GenerateRequest(prompt="x", max_tokens=800, ignore_eos=True)
        calls = [stub_of(channel).Generate(request, timeout=60) for _ in range(2)]
        for call in calls:
            next(call)
        refusal = refused(channel, request)
        assert refusal.code == grpc.StatusCode.RESOURCE_EXHAUSTED
        assert refusal.reason == "queue-full"
        assert refusal.retry_s is not None and refusal.retry_s > 0
        for call in calls:
            call.cancel()
    until_at_rest(platform)


def test_a_client_that_stops_reading_is_dropped_and_hurts_nobody(
    platform: Platform, tmp_path: Path
) -> None:
    flags = ("--slow-client-timeout-s", "1")
    with (
        side_gateway(platform, "gateway-slow", *flags, log=tmp_path / "gateway.log") as address,
        grpc.insecure_channel(address) as channel,
        running_client(address) as client,
    ):
        client.send_signal(signal.SIGSTOP)
        assert answer(stub_of(channel), GenerateRequest(prompt="y", max_tokens=4, ignore_eos=True))
        until_at_rest(platform, timeout_s=40)
        metrics = next(m for m in members(platform, "gateway") if m["id"] == "gateway-slow")
        name = "paceline_rpc_requests_total"
        until_sync(lambda: metric(metrics["metrics_address"], name, reason="slow-client") == 1)


async def test_a_client_that_vanishes_is_noticed(platform: Platform) -> None:
    async with TcpProxy(platform.grpc) as proxy:
        channel = grpc.aio.insecure_channel(proxy.address)
        stub: Any = inference_pb2_grpc.InferenceServiceStub(channel)
        call = stub.Generate(GenerateRequest(prompt="x", n=8, max_tokens=1500), timeout=300)
        await call.read()
        proxy.go_silent()
        address = platform.http

        def count() -> float:
            return metric(address, "paceline_requests_running")

        assert count() == 1
        await until(lambda: count() == 0, 60)
        call.cancel()
        await channel.close()
    until_at_rest(platform)


def test_a_client_that_is_killed_frees_its_request(platform: Platform) -> None:
    with running_client(platform.grpc) as client:
        client.kill()
        client.wait(timeout=10)
        until_at_rest(platform)


def test_errors_name_the_request(channel: grpc.Channel, platform: Platform) -> None:
    refused(channel, GenerateRequest(prompt="x", n=99, request_id="find-me"))

    def lines() -> list[dict[str, Any]]:
        return [x for x in platform.log_lines("gateway-0") if x.get("request_id") == "find-me"]

    assert until_sync(lines)


def test_a_refusal_reads_back_as_sent(channel: grpc.Channel) -> None:
    refusal = refused(channel, sampling(top_p=2.0))
    assert refusal == Refusal(
        INVALID,
        "sampling.top_p: 2 is not in (0, 1]",
        "invalid-argument",
        "sampling.top_p",
    )
