"""Speculation as clients and operators see it: same answers, told how, metered."""

from __future__ import annotations

from collections.abc import Iterator

import grpc
import pytest

from paceline.v1.inference_pb2 import GenerateRequest, SamplingParams, SpeculationParams
from tests.e2e.client import Client, greedy, request_for
from tests.e2e.conftest import WHOLE_WAY
from tests.e2e.probe import fleet_metric
from tests.platform import Platform
from tests.waiting import until_sync

PROMPT = "Count: one two three four five six. Again: one two three four five six. Again:"


@pytest.fixture(scope="module")
def platform(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Platform]:
    flags = ("--prefill", "1", "--decode", "2")
    with Platform(tmp_path_factory.mktemp("speculation"), *flags, env=WHOLE_WAY) as up:
        yield up


def with_mode(request: GenerateRequest, mode: str) -> GenerateRequest:
    request.speculation.CopyFrom(SpeculationParams(mode=mode))
    return request


async def test_modes_change_the_way_and_not_the_answer(platform: Platform) -> None:
    kinds = {
        "greedy": SamplingParams(temperature=0.0),
        "sampled": SamplingParams(temperature=0.8, top_p=0.95, seed=11),
        "penalised": SamplingParams(temperature=0.6, repetition_penalty=1.1, seed=5),
    }
    async with Client(platform.grpc) as client:
        for name, sampling in kinds.items():
            answers = {}
            for mode in ("OFF", "", "AUTO", "trie", "recycling", "trie+recycling"):
                request = request_for(
                    PROMPT, sampling=sampling, max_tokens=80, n=2, logprobs=2, ignore_eos=True
                )
                answers[mode] = await client.generate(with_mode(request, mode))
            off = answers["OFF"]
            for mode, answer in answers.items():
                assert answer.ids == off.ids and answer.text == off.text, (name, mode)
                assert answer.logprobs == off.logprobs, (name, mode)
                for index, usage in answer.usage.items():
                    assert len(answer.ids[index]) == usage.completion_tokens == 80
                    # Every pass brings one token of its own.
                    assert usage.target_steps + usage.accepted_tokens == 80
                    assert usage.drafted_tokens >= usage.accepted_tokens
            assert all(usage.drafted_tokens == 0 for usage in off.usage.values())
            assert any(u.accepted_tokens for u in answers["trie+recycling"].usage.values())


async def test_an_unknown_drafter_is_refused_and_known_ones_are_named(platform: Platform) -> None:
    async with Client(platform.grpc) as client:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await client.generate(with_mode(greedy(PROMPT), "no-such"))
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    details = caught.value.details() or ""
    assert "no-such" in details or "speculation.mode" in details
    assert "trie" in details and "recycling" in details


async def test_drafts_are_metered_by_drafter(platform: Platform) -> None:
    async with Client(platform.grpc) as client:
        answer = await client.generate(
            with_mode(greedy(PROMPT, max_tokens=60, ignore_eos=True), "trie")
        )
    usage = answer.usage[0]
    assert usage.drafted_tokens > 0

    def total(name: str, **labels: str) -> float:
        return fleet_metric(platform, name, "decode", **labels)

    drafted = "paceline_speculation_drafted_tokens_total"
    until_sync(lambda: total(drafted, drafter="trie") >= usage.drafted_tokens)
    assert total("paceline_speculation_accepted_tokens_total", drafter="trie") >= (
        usage.accepted_tokens
    )
    assert total("paceline_speculation_decisions_total", drafter="trie", reason="forced") > 0
    assert total("paceline_speculation_state_bytes", drafter="trie") > 0
