"""What the demo concludes from what it saw."""

from __future__ import annotations

from dataclasses import replace

import pytest
from prometheus_client import generate_latest

from paceline.cli.demo.asking import Answer
from paceline.cli.demo.kv_tally import Moved, parse_moved
from paceline.cli.demo.learning import Learning
from paceline.cli.demo.report import Replacement, Report, find_prefix_hit
from paceline.process.metrics import Metrics
from paceline.v1 import inference_pb2


def answer(prefill: str, decode: str, cached: int = 0, prompt: int = 100) -> Answer:
    usage = inference_pb2.Usage(
        prompt_tokens=prompt,
        cached_prompt_tokens=cached,
        completion_tokens=10,
        accepted_tokens=6,
        target_steps=4,
        prefill_worker=prefill,
        decode_worker=decode,
    )
    return Answer("question", "text", usage, ttft_s=0.5, is_complete=True)


FIRST = answer("prefill-0", "decode-0")
HIT = answer("prefill-1", "decode-1", cached=80)
TURN = answer("prefill-0", "decode-0", prompt=40)
NEXT_TURN = answer("decode-1", "decode-1", cached=64)
REPLACEMENT = Replacement("decode-0", TURN, NEXT_TURN, replaced_in_s=4.0)
GOOD = Report(
    answers=(FIRST, HIT, TURN, NEXT_TURN),
    tok_s=100.0,
    prefix_first=FIRST,
    prefix_hit=HIT,
    replacement=REPLACEMENT,
    moved=Moved(12, 12_000),
    elapsed_s=20.0,
)
BROKEN = Answer("question", "te", error="UNAVAILABLE (peer-unavailable): gone")


def test_a_good_run_has_no_failures_and_all_figures() -> None:
    assert GOOD.failures() == []
    assert GOOD.to_json() == {
        "requests": 4,
        "completed": 4,
        "kv_blocks_moved": 12,
        "kv_bytes_moved": 12_000,
        "prefix_hit_tokens": 144,
        "ttft_p50_s": 0.5,
        "tok_s": 100.0,
        "accepted_tokens": 24,
        "tokens_per_pass": 2.5,
        "split_requests": 3,
        "replaced_in_s": 4.0,
        "learning": None,
        "elapsed_s": 20.0,
        "failures": [],
    }


def guessed(accepted: int, version: str) -> Answer:
    usage = inference_pb2.Usage(drafted_tokens=10, accepted_tokens=accepted, draft_version=version)
    return Answer("a sum", "7", usage, 0.1, is_complete=True)


def test_learning_is_told_by_its_ends() -> None:
    learning = Learning()
    for number in range(60):
        learning.note(guessed(1 if number < 20 else 8, "a" if number < 30 else "b"))
    report = replace(GOOD, learning=learning)
    assert report.failures() == []
    assert report.to_json()["learning"] == {
        "requests": 60,
        "acceptance_first": 0.1,
        "acceptance_last": 0.8,
        "versions": 2,
    }
    learning.note(BROKEN)
    assert "gone" in report.failures()[0]
    assert Learning().first == 0.0


@pytest.mark.parametrize(
    ("report", "message"),
    [
        (replace(GOOD, answers=(FIRST, BROKEN)), "not every request completed ('question': UNAVA"),
        (replace(GOOD, moved=Moved()), "no KV moved"),
        (replace(GOOD, answers=(NEXT_TURN,)), "no request was prefilled on one worker"),
        (replace(GOOD, prefix_hit=None), "no shared prefix"),
        (
            replace(GOOD, replacement=replace(REPLACEMENT, replaced_in_s=None)),
            "the killed worker decode-0 was not replaced",
        ),
        (
            replace(GOOD, replacement=replace(REPLACEMENT, second_turn=answer("d", "d"))),
            "the turn after the kill found nothing in the store",
        ),
    ],
)
def test_each_broken_promise_is_named(report: Report, message: str) -> None:
    (failure,) = report.failures()
    assert failure.startswith(message)


@pytest.mark.parametrize(
    ("later", "is_hit"),
    [
        (answer("prefill-1", "decode-0", cached=80), True),
        (answer("decode-1", "decode-1", cached=80), True),
        (answer("prefill-0", "decode-1", cached=80), False),
        (answer("decode-0", "decode-0", cached=80), False),
        (answer("decode-1", "decode-1", cached=16), False),
    ],
    ids=["other prefill", "other decode", "same prefill", "got it for decoding", "too little"],
)
def test_a_hit_counts_only_where_no_own_cache_explains_it(later: Answer, is_hit: bool) -> None:
    assert (find_prefix_hit(FIRST, [later]) is not None) == is_hit


@pytest.mark.parametrize(
    ("second", "has_reused_store"),
    [
        (answer("decode-1", "decode-1", cached=16), True),
        (answer("decode-1", "decode-1", cached=0), False),
        (answer("prefill-0", "decode-1", cached=32), False),
        (answer("prefill-0", "decode-1", cached=64), True),
    ],
    ids=["another worker", "nothing", "own cache explains it", "more than its own cache had"],
)
def test_the_turn_after_the_kill_counts_only_what_the_store_kept(
    second: Answer, has_reused_store: bool
) -> None:
    assert Replacement("decode-0", TURN, second, 1.0).has_reused_store == has_reused_store


def test_counters_are_read_under_their_real_names() -> None:
    metrics = Metrics("worker")
    assert parse_moved(generate_latest(metrics.registry).decode()) == Moved(0, 0)
    metrics.kv_loaded_blocks.inc(5)
    metrics.kv_loaded_bytes.inc(5 * 131_072)
    assert parse_moved(generate_latest(metrics.registry).decode()) == Moved(5, 655_360)
