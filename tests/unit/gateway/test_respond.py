"""Chunks of any size become the same text, tokens and usage as single tokens would."""

from __future__ import annotations

import time
from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paceline.domain.request import FinishReason, GenerationSpec, TokenChunk, TokenLogprobs
from paceline.gateway.context import Output, RequestContext
from paceline.gateway.steps.respond import Responder
from paceline.gateway.tokenizer import ModelTokenizer
from paceline.process.metrics import Metrics
from paceline.v1 import inference_pb2
from paceline.v1.inference_pb2 import FINISH_REASON_LENGTH, FINISH_REASON_STOP
from tests.unit.gateway.stack import demo_tokenizer, value_of

TEXT = "So 3 + 4 = 7. \u00e9\u00e8 \U0001f600\U0001f680 \u4f60\u597d! Ann has 3 pens\u2026"


@dataclass
class Told:
    """What the client got of one output."""

    ids: list[int]
    text: str
    logprobs: list[int]
    finish_reason: int
    usage: inference_pb2.Usage


def respond(
    chunks: list[TokenChunk], stop: tuple[str, ...] = (), metrics: Metrics | None = None
) -> Told:
    """Push chunks until the output ends."""
    now = time.monotonic()
    request = inference_pb2.GenerateRequest(stop=stop)
    ctx = RequestContext(request, "r", arrival_s=now, deadline_s=now + 60)
    ctx.spec, ctx.outputs = GenerationSpec("r", (1, 2, 3)), [Output(0)]
    responder = Responder(ctx, demo_tokenizer(), metrics or Metrics("test"))
    told = Told([], "", [], 0, inference_pb2.Usage())
    for chunk in chunks:
        response = responder.push(chunk)
        assert len(response.logprobs) in (0, len(response.token_ids))
        told.ids += response.token_ids
        told.text += response.text
        told.logprobs += [entry.token_id for entry in response.logprobs]
        if response.finish_reason:
            told.finish_reason, told.usage = response.finish_reason, response.usage
            break
    return told


def passes_of(ids: list[int], sizes: list[int], ends_with_path: bool) -> list[list[bool]]:
    """Return whether each token was accepted (else drawn behind the path), pass by pass."""
    left, passes = len(ids), []
    while left:
        size = min(left, sizes[len(passes) % len(sizes)])
        left -= size
        is_cut = left == 0 and ends_with_path
        passes.append([*[True] * (size - 1), is_cut])
    return passes


def chunks_of(ids: list[int], passes: list[list[bool]]) -> list[TokenChunk]:
    """Return one chunk per pass; the last one ends the output."""
    chunks, at = [], 0
    for i, accepted in enumerate(passes):
        part = ids[at : at + len(accepted)]
        at += len(accepted)
        chunks.append(
            TokenChunk(
                0,
                tuple(part),
                tuple(TokenLogprobs(token, -1.0) for token in part),
                FinishReason.LENGTH if at == len(ids) else None,
                target_steps=1,
                drafted_tokens=8,
                accepted_tokens=sum(accepted),
                draft_version=f"v{i // 2}",
            )
        )
    return chunks


def merged(chunks: list[TokenChunk]) -> TokenChunk:
    """Return what a slow reader gets of several chunks."""
    return TokenChunk(
        0,
        sum((c.token_ids for c in chunks), ()),
        sum((c.logprobs for c in chunks), ()),
        chunks[-1].finish_reason,
        sum(c.target_steps for c in chunks),
        sum(c.drafted_tokens for c in chunks),
        sum(c.accepted_tokens for c in chunks),
        chunks[-1].draft_version,
    )


IDS = demo_tokenizer().encode(TEXT, add_special_tokens=False)
TOKENS = st.one_of(
    st.just(IDS),
    st.text(max_size=12).map(lambda t: demo_tokenizer().encode(t, add_special_tokens=False)),
    st.lists(st.integers(0, 4095), max_size=16),
).filter(bool)
STOPS = st.lists(st.text(min_size=1, max_size=3) | st.sampled_from(["\U0001f680", "=", "pen"]))


def test_the_text_has_characters_of_several_tokens(demo_tokenizer: ModelTokenizer) -> None:
    assert demo_tokenizer.tokenizer.decode(IDS) == TEXT
    assert len(demo_tokenizer.encode("\U0001f680", add_special_tokens=False)) > 1


@settings(max_examples=200, deadline=None)
@given(
    ids=TOKENS,
    sizes=st.lists(st.integers(1, 9), min_size=1, max_size=5),
    stop=STOPS.map(tuple),
    ends_with_path=st.booleans(),
)
def test_accepted_paths_read_like_single_tokens(
    ids: list[int], sizes: list[int], stop: tuple[str, ...], ends_with_path: bool
) -> None:
    single = respond(chunks_of(ids, [[False]] * len(ids)), stop)
    passes = passes_of(ids, sizes, ends_with_path)
    chunks = chunks_of(ids, passes)
    told = respond(chunks, stop)
    assert (told.ids, told.text, told.finish_reason) == (
        single.ids,
        single.text,
        single.finish_reason,
    )
    assert told.logprobs == told.ids
    # Pass by pass, as far as the output goes.
    used, begun, accepted = len(told.ids), 0, 0
    for each in passes:
        if used > 0:
            begun += 1
            accepted += sum(each[:used])
        used -= len(each)
    usage = told.usage
    assert usage.completion_tokens == len(told.ids)
    assert (usage.target_steps, usage.accepted_tokens) == (begun, accepted)
    assert usage.drafted_tokens == 8 * begun
    assert usage.draft_version == chunks[begun - 1].draft_version

    late = respond([merged(chunks)], stop)
    assert (late.ids, late.text, late.finish_reason) == (told.ids, told.text, told.finish_reason)
    assert 1 <= late.usage.target_steps <= len(late.ids)
    assert 0 <= late.usage.accepted_tokens <= len(late.ids)
    if len(late.ids) == len(ids):
        assert late.usage.accepted_tokens == usage.accepted_tokens
        assert late.usage.target_steps == usage.target_steps


def test_a_character_inside_a_chunk_is_whole_and_one_at_its_end_waits() -> None:
    rocket = demo_tokenizer().encode("a\U0001f680", add_special_tokens=False)
    whole = respond([TokenChunk(0, tuple(rocket), finish_reason=FinishReason.LENGTH)])
    assert whole.text == "a\U0001f680"
    parts = [tuple(rocket[:-1]), (rocket[-1],)]
    chunks = [
        TokenChunk(0, parts[0]),
        TokenChunk(0, parts[1], finish_reason=FinishReason.LENGTH),
    ]
    split = respond(chunks)
    assert (split.text, split.finish_reason) == ("a\U0001f680", FINISH_REASON_LENGTH)


def test_a_stop_string_inside_an_accepted_path_ends_the_output_there() -> None:
    ids = demo_tokenizer().encode("So 3 + 4 = 7. Ann has 3 pens", add_special_tokens=False)
    path = TokenChunk(
        0,
        tuple(ids),
        finish_reason=FinishReason.STOP,
        target_steps=1,
        drafted_tokens=40,
        accepted_tokens=len(ids) - 1,
    )
    told = respond([path], (" = ",))
    assert (told.text, told.finish_reason) == ("So 3 + 4", FINISH_REASON_STOP)
    assert 0 < len(told.ids) < len(ids) - 1
    usage = told.usage
    assert (usage.accepted_tokens, usage.target_steps) == (len(told.ids), 1)
    assert usage.drafted_tokens == 40, "all of it was drafted"


def test_an_accepted_path_is_one_piece_of_the_latency_metrics() -> None:
    metrics = Metrics("test")
    chunks = chunks_of(IDS, passes_of(IDS, [4], False))
    respond(chunks, metrics=metrics)
    counts = {
        sample.name: sample.value
        for family in metrics.registry.collect()
        for sample in family.samples
    }
    assert counts["paceline_ttft_seconds_count"] == 1
    assert counts["paceline_itl_seconds_count"] == len(chunks) - 1
    assert value_of(metrics.completion_tokens) == len(IDS)


@pytest.mark.parametrize("versions", [("", "v1", ""), ("v0", "", "v1")])
def test_the_version_is_that_of_the_last_draft(versions: tuple[str, ...]) -> None:
    chunks = [TokenChunk(0, (5,), draft_version=version) for version in versions]
    chunks.append(TokenChunk(0, (), finish_reason=FinishReason.LENGTH))
    assert respond(chunks).usage.draft_version == "v1"
