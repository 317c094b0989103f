"""Every bad field is refused before any work, with its name, its value and what is permitted."""

from __future__ import annotations

import time

import pytest

from paceline.domain.errors import InvalidRequestError
from paceline.gateway.steps.validate import (
    Limits,
    check_against_model,
    check_length,
    check_request,
    check_speculation,
)
from paceline.v1.inference_pb2 import (
    ChoiceList,
    GenerateRequest,
    Message,
    MessageList,
    SamplingParams,
    TokenIds,
)
from tests.unit.gateway.scripted_worker import CARD

LIMITS = Limits(max_outputs=16)
NAN, INF = float("nan"), float("inf")


def sampling(**fields: float) -> GenerateRequest:
    return GenerateRequest(prompt="x", sampling=SamplingParams(**fields))  # type: ignore[arg-type]


def messages(*pairs: tuple[str, str]) -> GenerateRequest:
    return GenerateRequest(
        messages=MessageList(messages=[Message(role=r, content=c) for r, c in pairs])
    )


def ids(*token_ids: int, **fields: object) -> GenerateRequest:
    return GenerateRequest(token_ids=TokenIds(ids=token_ids), **fields)  # type: ignore[arg-type]


REFUSED: dict[str, tuple[GenerateRequest, str, list[str]]] = {
    "no-input": (GenerateRequest(), "input", ["prompt", "messages", "token_ids"]),
    "empty-prompt": (GenerateRequest(prompt=""), "prompt", ["empty"]),
    "no-messages": (messages(), "messages.messages", ["0 messages", "1"]),
    "many-messages": (messages(*[("u", "x")] * 5000), "messages.messages", ["5000", "4096"]),
    "no-role": (messages(("user", "x"), ("", "y")), "messages.messages[1].role", ["0", "1"]),
    "long-role": (messages(("u" * 100, "x")), "messages.messages[0].role", ["100", "64"]),
    "no-ids": (ids(), "token_ids.ids", ["empty"]),
    "nan-temperature": (sampling(temperature=NAN), "sampling.temperature", ["nan", "100"]),
    "negative-temperature": (sampling(temperature=-0.5), "sampling.temperature", ["-0.5", "0"]),
    "hot": (sampling(temperature=101), "sampling.temperature", ["101", "100"]),
    "infinite": (sampling(temperature=INF), "sampling.temperature", ["inf", "100"]),
    "top-k": (sampling(top_k=-1), "sampling.top_k", ["-1", "0"]),
    "top-p-2": (sampling(top_p=2), "sampling.top_p", ["2", "(0, 1]"]),
    "top-p-0": (sampling(top_p=0), "sampling.top_p", ["0", "(0, 1]"]),
    "top-p-nan": (sampling(top_p=NAN), "sampling.top_p", ["nan"]),
    "min-p": (sampling(min_p=1.5), "sampling.min_p", ["1.5", "[0, 1]"]),
    "repetition": (sampling(repetition_penalty=0), "sampling.repetition_penalty", ["(0, 100]"]),
    "presence": (sampling(presence_penalty=-101), "sampling.presence_penalty", ["-101", "-100"]),
    "frequency": (sampling(frequency_penalty=NAN), "sampling.frequency_penalty", ["nan"]),
    "n-0": (GenerateRequest(prompt="x", n=0), "n", ["0 is not in [1, 16]"]),
    "n-17": (GenerateRequest(prompt="x", n=17), "n", ["17 is not in [1, 16]"]),
    "n-4-billion": (GenerateRequest(prompt="x", n=4294967295), "n", ["4294967295", "16"]),
    "max-tokens-0": (GenerateRequest(prompt="x", max_tokens=0), "max_tokens", ["0", "1"]),
    "logprobs": (GenerateRequest(prompt="x", logprobs=21), "logprobs", ["21", "[0, 20]"]),
    "priority": (GenerateRequest(prompt="x", priority=-101), "priority", ["-101", "-100"]),
    "stops": (GenerateRequest(prompt="x", stop=["a"] * 10_000), "stop", ["10000", "64"]),
    "empty-stop": (GenerateRequest(prompt="x", stop=["a", ""]), "stop[1]", ["0", "1"]),
    "long-stop": (GenerateRequest(prompt="x", stop=["a" * 1025]), "stop[0]", ["1025", "1024"]),
    "stop-ids": (ids(1, stop_token_ids=[1] * 2000), "stop_token_ids", ["2000", "1024"]),
    "long-id": (ids(1, request_id="a" * 129), "request_id", ["129", "128"]),
    "control-id": (ids(1, request_id="a\nb"), "request_id", ["printable"]),
    "unicode-id": (ids(1, request_id="\u00e9"), "request_id", ["ASCII"]),
    "long-domain": (ids(1, domain="\u00e9" * 65), "domain", ["65", "64"]),
    "control-domain": (ids(1, domain="a\tb"), "domain", ["printable"]),
    "regex": (GenerateRequest(prompt="x", regex="(a+)+$" * 1000), "regex", ["not offered"]),
    "grammar": (GenerateRequest(prompt="x", grammar="root ::= root"), "grammar", ["not offered"]),
    "schema": (GenerateRequest(prompt="x", json_schema="{"), "json_schema", ["not offered"]),
    "choice": (GenerateRequest(prompt="x", choice=ChoiceList()), "choice", ["not offered"]),
}

REFUSED_BY_MODEL: dict[str, tuple[GenerateRequest, str, list[str]]] = {
    "token-outside": (ids(5, 4096), "token_ids.ids", ["4096", "[0, 4096)"]),
    "largest-token": (ids(4294967295), "token_ids.ids", ["4294967295", "4096"]),
    "stop-token-outside": (ids(5, stop_token_ids=[9999]), "stop_token_ids", ["9999", "4096"]),
    "max-tokens-2-31": (ids(5, max_tokens=1 << 31), "max_tokens", ["2147483648", "2048"]),
    "max-tokens-2049": (ids(5, max_tokens=2049), "max_tokens", ["2049", "[1, 2048]"]),
    "too-long": (ids(*[5] * 2048), "token_ids.ids", ["2048 tokens", "2047"]),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_bad_field_is_refused_by_name_and_number(case: str) -> None:
    request, field, words = REFUSED[case]
    with pytest.raises(InvalidRequestError) as error:
        check_request(request, LIMITS)
    assert error.value.field == field
    for word in words:
        assert word in error.value.message
    constraints = {"regex", "grammar", "json_schema", "choice"}
    reason = "constraint-unsupported" if field in constraints else "invalid-argument"
    assert error.value.reason == reason


@pytest.mark.parametrize("case", REFUSED_BY_MODEL)
def test_what_does_not_fit_the_model_is_refused(case: str) -> None:
    request, field, words = REFUSED_BY_MODEL[case]
    check_request(request, LIMITS)
    with pytest.raises(InvalidRequestError) as error:
        check_against_model(request, CARD)
    assert error.value.field == field
    for word in words:
        assert word in error.value.message
    assert error.value.reason == ("context-too-long" if case == "too-long" else "invalid-argument")


ACCEPTED = {
    "least": GenerateRequest(prompt="x"),
    "edges": GenerateRequest(
        prompt="\0",
        sampling=SamplingParams(
            temperature=100,
            top_k=(1 << 31) - 1,
            top_p=1,
            min_p=1,
            repetition_penalty=100,
            presence_penalty=-100,
            frequency_penalty=100,
            seed=0,
        ),
        n=16,
        logprobs=20,
        priority=100,
        max_tokens=2048,
        stop=["a" * 1024] * 64,
        stop_token_ids=[4095] * 1024,
        request_id="~" * 128,
        domain="\u00e9 " * 32,
    ),
    "greedy": sampling(temperature=0),
    "tiny": sampling(temperature=1e-30, top_p=1e-30),
    "tool-role": messages(("tool", ""), ("user", "x")),
    "longest": ids(*[0] * 2047),
}


@pytest.mark.parametrize("case", ACCEPTED)
def test_what_is_in_range_is_accepted(case: str) -> None:
    check_request(ACCEPTED[case], LIMITS)
    check_against_model(ACCEPTED[case], CARD)


@pytest.mark.parametrize("mode", ["no-such", "auto", "off", "Off", "tri", "trie ", "medusa", "\0"])
def test_a_drafter_that_nobody_has_is_refused_with_those_there_are(mode: str) -> None:
    with pytest.raises(InvalidRequestError) as error:
        check_speculation(mode, ["model", "trie"])
    assert (error.value.field, error.value.reason) == ("speculation.mode", "invalid-argument")
    assert error.value.message == "no such drafter; known are AUTO, OFF, model, trie"


@pytest.mark.parametrize("mode", ["", "AUTO", "OFF", "trie", "model"])
def test_known_speculation_modes_are_accepted(mode: str) -> None:
    check_speculation(mode, ["model", "trie"])
    if mode in ("", "AUTO", "OFF"):
        check_speculation(mode, [])


def test_a_length_is_told_with_both_numbers() -> None:
    check_length("prompt", 2047, CARD)
    with pytest.raises(InvalidRequestError, match="2048 tokens, at most 2047 fit"):
        check_length("prompt", 2048, CARD)
    with pytest.raises(InvalidRequestError, match="is empty"):
        check_length("prompt", 0, CARD)


def test_checks_take_no_time_whatever_the_size() -> None:
    started = time.process_time()
    for request in (
        GenerateRequest(prompt="x", stop=["ab"] * 1_000_000),
        messages(*[("user", "x")] * 200_000),
    ):
        with pytest.raises(InvalidRequestError):
            check_request(request, LIMITS)
    with pytest.raises(InvalidRequestError):
        check_against_model(ids(*[9999] * 1_000_000), CARD)
    assert time.process_time() - started < 2.0, "most of it makes the messages"
