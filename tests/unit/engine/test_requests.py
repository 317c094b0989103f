"""The life of requests: how they end, in what order they run, what a step consists of."""

from __future__ import annotations

from dataclasses import replace

import pytest

from paceline.domain.errors import AlreadyExistsError, InvalidRequestError
from paceline.domain.request import FinishReason, GenerationSpec, SamplingParams
from paceline.engine.engine import Engine
from paceline.engine.events import EngineEvent, OutputEvent
from tests.unit.engine.fake_runner import (
    EOS,
    VOCAB,
    FakeRunner,
    expected_tokens,
    fake_engine,
    prompt_of,
)
from tests.unit.engine.memory_arena import run_until_idle, tokens_of


def spec_of(name: str = "r", length: int = 10, **fields: object) -> GenerationSpec:
    prompt = prompt_of(name, length)
    defaults: dict[str, object] = {"max_tokens": 8, "ignore_eos": True}
    return GenerationSpec(name, prompt, **{**defaults, **fields})  # type: ignore[arg-type]


def reasons_of(events: list[OutputEvent]) -> dict[int, FinishReason]:
    return {c.index: c.finish_reason for e in events for c in e.chunks if c.finish_reason}


def seed_whose_output(spec: GenerationSpec, has: int, at_least: int = 2) -> GenerationSpec:
    """Find a seed whose output contains a token not too early."""
    for seed in range(10_000):
        candidate = replace(spec, sampling=SamplingParams(seed=seed))
        output = expected_tokens(candidate, 0, context=1000)
        if has in output[at_least:] and has not in output[:at_least]:
            return candidate
    raise AssertionError("no such seed")


# -- ends ---------------------------------------------------------------------------------


def test_an_output_ends_with_the_first_stop_token() -> None:
    spec = seed_whose_output(spec_of(max_tokens=12), has=5)
    engine, _ = fake_engine()
    engine.submit(replace(spec, stop_token_ids=frozenset([5, 3000])))
    events = run_until_idle(engine)["r"]
    assert tokens_of(events)[-1] == 5
    assert 5 not in tokens_of(events)[:-1]
    assert reasons_of(events) == {0: FinishReason.STOP}


@pytest.mark.parametrize("ignore_eos", [False, True])
def test_the_end_token_ends_an_output_unless_ignored(ignore_eos: bool) -> None:
    spec = seed_whose_output(spec_of(max_tokens=12), has=EOS)
    engine, _ = fake_engine()
    engine.submit(replace(spec, ignore_eos=ignore_eos))
    events = run_until_idle(engine)["r"]
    output = tokens_of(events)
    if ignore_eos:
        assert len(output) == 12 and EOS in output
        assert reasons_of(events) == {0: FinishReason.LENGTH}
    else:
        assert output.index(EOS) == len(output) - 1
        assert reasons_of(events) == {0: FinishReason.STOP}


def test_a_stop_token_holds_also_when_the_end_token_is_ignored() -> None:
    spec = seed_whose_output(spec_of(max_tokens=12), has=EOS)
    engine, _ = fake_engine()
    engine.submit(replace(spec, ignore_eos=True, stop_token_ids=frozenset([EOS])))
    events = run_until_idle(engine)["r"]
    assert tokens_of(events)[-1] == EOS
    assert reasons_of(events) == {0: FinishReason.STOP}


def test_a_stop_token_in_the_last_place_is_a_stop() -> None:
    spec = spec_of(max_tokens=4)
    last = expected_tokens(spec, 0, context=1000)[-1]
    engine, _ = fake_engine()
    engine.submit(replace(spec, stop_token_ids=frozenset([last])))
    assert reasons_of(run_until_idle(engine)["r"])[0] is FinishReason.STOP


@pytest.mark.parametrize("max_tokens", [1, 2, 9])
def test_max_tokens_is_exact(max_tokens: int) -> None:
    engine, _ = fake_engine()
    engine.submit(spec_of(max_tokens=max_tokens))
    events = run_until_idle(engine)["r"]
    assert len(tokens_of(events)) == max_tokens
    assert reasons_of(events) == {0: FinishReason.LENGTH}


@pytest.mark.parametrize("length", [1, 10, 63])
def test_the_context_is_filled_to_its_last_token(length: int) -> None:
    engine, _ = fake_engine(num_pages=16, block_size=4)
    engine.submit(spec_of(length=length, max_tokens=10_000))
    events = run_until_idle(engine)["r"]
    assert len(tokens_of(events)) == 64 - length
    assert reasons_of(events) == {0: FinishReason.LENGTH}
    assert engine.check_integrity() == []


@pytest.mark.parametrize("length", [0, 64, 65])
def test_a_prompt_without_room_for_a_token_is_refused(length: int) -> None:
    engine, _ = fake_engine(num_pages=16, block_size=4)
    with pytest.raises(InvalidRequestError):
        engine.submit(spec_of(length=length))
    assert engine.num_requests == 0


@pytest.mark.parametrize("token", [-1, VOCAB, 1 << 31, (1 << 32) - 1])
def test_a_token_outside_the_vocabulary_is_refused_alone(token: int) -> None:
    engine, _ = fake_engine()
    engine.submit(spec_of("good"))
    with pytest.raises(InvalidRequestError):
        engine.submit(GenerationSpec("bad", (1, 2, token, 3)))
    with pytest.raises(InvalidRequestError):
        engine.submit(spec_of("worse"), resumed={0: (token,)})
    assert len(tokens_of(run_until_idle(engine)["good"])) == 8


def test_an_id_in_use_is_refused_and_free_again_afterwards() -> None:
    engine, _ = fake_engine()
    engine.submit(spec_of())
    with pytest.raises(AlreadyExistsError):
        engine.submit(spec_of())
    run_until_idle(engine)
    engine.submit(spec_of())
    assert len(tokens_of(run_until_idle(engine)["r"])) == 8


def test_every_output_is_over_once_and_the_request_says_so_last() -> None:
    engine, _ = fake_engine()
    engine.submit(spec_of(n=3))
    events = run_until_idle(engine)["r"]
    ends = [c.index for e in events for c in e.chunks if c.finish_reason]
    assert sorted(ends) == [0, 1, 2]
    assert [e.is_finished for e in events] == [False] * (len(events) - 1) + [True]


# -- resumed outputs ----------------------------------------------------------------------


def test_resumed_outputs_go_on_and_finished_ones_stay_finished() -> None:
    spec = spec_of(n=4, max_tokens=9)
    whole = {i: expected_tokens(spec, i, context=128) for i in range(4)}
    engine, _ = fake_engine()
    engine.submit(
        spec,
        resumed={0: tuple(whole[0][:3]), 2: tuple(whole[2][:8]), 3: tuple(whole[3])},
        finished_indices=frozenset([1, 3]),
    )
    events = run_until_idle(engine)["r"]
    assert tokens_of(events, 0) == whole[0][3:]
    assert tokens_of(events, 2) == whole[2][8:]
    assert set(reasons_of(events)) == {0, 2}


@pytest.mark.parametrize("n", [1, 3])
def test_a_resumed_output_that_had_ended_gets_no_further_token(n: int) -> None:
    spec = spec_of(n=n, max_tokens=9)
    engine, _ = fake_engine()
    engine.submit(spec, resumed={0: tuple(expected_tokens(spec, 0, context=128))})
    events = run_until_idle(engine)["r"]
    assert tokens_of(events, 0) == []
    assert reasons_of(events) == dict.fromkeys(range(n), FinishReason.LENGTH)
    for index in range(1, n):
        assert tokens_of(events, index) == expected_tokens(spec, index, context=128)
    assert events[-1].is_finished
    assert engine.check_integrity() == []


def test_a_resumed_output_that_fills_the_context_is_over() -> None:
    engine, _ = fake_engine(num_pages=16, block_size=4)
    spec = spec_of(length=60, max_tokens=100)
    engine.submit(spec, resumed={0: tuple(expected_tokens(spec, 0, context=64))})
    assert reasons_of(run_until_idle(engine)["r"]) == {0: FinishReason.LENGTH}


def test_a_finished_output_may_be_of_any_length() -> None:
    engine, _ = fake_engine(num_pages=16, block_size=4)
    spec = spec_of(length=40, max_tokens=100, n=2)
    engine.submit(spec, resumed={1: (1,) * 24}, finished_indices=frozenset([1]))
    assert len(tokens_of(run_until_idle(engine)["r"], 0)) == 24


# -- cancellation -------------------------------------------------------------------------


def test_one_output_can_be_cancelled_before_the_fork() -> None:
    engine, _ = fake_engine()
    spec = spec_of(length=30, n=3)
    engine.submit(spec)
    engine.step()
    engine.cancel("r", 0)
    engine.cancel("r", 7)
    events = run_until_idle(engine)["r"]
    assert tokens_of(events, 0) == []
    for index in (1, 2):
        assert tokens_of(events, index) == expected_tokens(spec, index, context=128)


def test_outputs_can_all_be_cancelled_before_the_fork() -> None:
    engine, _ = fake_engine()
    engine.submit(spec_of(length=30, n=2))
    engine.step()
    engine.cancel("r", 1)
    engine.cancel("r", 0)
    assert engine.num_requests == 0
    assert run_until_idle(engine)["r"][-1].is_finished
    assert engine.load().free_blocks == 32


def test_an_index_that_does_not_exist_ends_nothing() -> None:
    engine, _ = fake_engine()
    engine.submit(spec_of(n=2, length=30))
    engine.step()
    engine.cancel("r", 5)
    engine.cancel("r", 1)
    assert len(tokens_of(run_until_idle(engine)["r"], 0)) == 8


def test_outputs_cancelled_right_after_the_fork_harm_no_sibling() -> None:
    """Pages of a pending copy stay valid although whoever had them is gone."""
    for victim in (0, 1):
        engine, runner = fake_engine(chunk_tokens=64)
        spec = spec_of(length=11, n=3)
        engine.submit(spec)
        while len(runner.plans) < 1:
            engine.step()
        engine.cancel("r", victim)
        # Newcomers take every page that the cancellation set free, and write to it.
        for i in range(6):
            engine.submit(spec_of(f"x{i}", length=9))
        outputs = run_until_idle(engine)
        for index in {0, 1, 2} - {victim}:
            assert tokens_of(outputs["r"], index) == expected_tokens(spec, index, context=128)
        assert engine.check_integrity() == []


# -- order --------------------------------------------------------------------------------


def first_tokens(engine: Engine) -> list[str]:
    """Run to the end and return the requests in order of their first token."""
    order: list[str] = []
    for _ in range(10_000):
        if engine.num_requests == 0:
            return order
        for event in engine.step():
            if isinstance(event, OutputEvent) and event.chunks and event.request_id not in order:
                order.append(event.request_id)
    raise AssertionError("the engine did not come to rest")


def test_requests_run_by_priority_then_arrival() -> None:
    engine, _ = fake_engine(max_num_seqs=1)
    for name, priority in [("a", 0), ("b", 5), ("c", -3), ("d", 5), ("e", 100)]:
        engine.submit(spec_of(name, priority=priority))
    assert first_tokens(engine) == ["e", "b", "d", "a", "c"]


def test_a_higher_priority_takes_the_place_of_a_running_lower_one() -> None:
    engine, _ = fake_engine(max_num_seqs=2)
    low = {name: spec_of(name, max_tokens=40) for name in ("low1", "low2")}
    for spec in low.values():
        engine.submit(spec)
    for _ in range(10):
        engine.step()
    engine.submit(spec_of("high", priority=1))
    seen: dict[str, list[OutputEvent]] = {}
    for _ in range(12):
        for event in engine.step():
            assert isinstance(event, OutputEvent)
            seen.setdefault(event.request_id, []).append(event)
    assert seen["high"][-1].is_finished
    assert not seen["low1"][-1].is_finished
    assert engine.load().num_preemptions == 1
    seen = {**seen, **run_until_idle(engine)}
    assert engine.check_integrity() == []


def test_an_equal_priority_displaces_nobody() -> None:
    engine, _ = fake_engine(max_num_seqs=2, num_pages=8)
    for i in range(6):
        engine.submit(spec_of(f"r{i}", length=6, max_tokens=4))
    run_until_idle(engine)
    assert engine.load().num_preemptions == 0


def test_a_displaced_request_loses_no_token() -> None:
    engine, _ = fake_engine(max_num_seqs=1)
    low = spec_of("low", max_tokens=20)
    engine.submit(low)
    events: list[EngineEvent] = []
    for i in range(5):
        for _ in range(4):
            events += engine.step()
        engine.submit(spec_of(f"high{i}", priority=1, max_tokens=2))
    while engine.num_requests:
        events += engine.step()
    mine = [e for e in events if isinstance(e, OutputEvent) and e.request_id == "low"]
    assert tokens_of(mine) == expected_tokens(low, 0, context=128)
    assert engine.load().num_preemptions == 5


# -- what a step consists of --------------------------------------------------------------


def rows_of(runner: FakeRunner) -> list[dict[int, int]]:
    return [{r.sequence_id: len(r.token_ids) for r in p.rows} for p in runner.plans]


def test_decode_rows_are_in_every_step_while_a_long_prompt_is_computed() -> None:
    engine, runner = fake_engine(num_pages=128, chunk_tokens=16)
    for i in range(4):
        engine.submit(spec_of(f"d{i}", length=3, max_tokens=200))
    for _ in range(3):
        engine.step()
    runner.plans.clear()
    engine.submit(spec_of("long", length=200, max_tokens=4))
    for _ in range(16):
        engine.step()
    steps = rows_of(runner)
    assert all({1, 2, 3, 4} <= set(step) for step in steps)
    assert [step.get(5) for step in steps] == [12] * 16


@pytest.mark.parametrize("chunk_tokens", [1, 4, 8])
def test_more_decode_rows_than_the_chunk_holds_all_go_on(chunk_tokens: int) -> None:
    engine, runner = fake_engine(num_pages=200, max_num_seqs=16, chunk_tokens=chunk_tokens)
    for i in range(12):
        engine.submit(spec_of(f"d{i:02}", length=2, max_tokens=40))
    for _ in range(24):
        engine.step()
    runner.plans.clear()
    engine.submit(spec_of("long", length=30, max_tokens=4))
    for _ in range(6):
        engine.step()
    # Everybody who can decode does, and the newcomer's prompt is not starved either.
    assert all(set(range(1, 13)) <= set(step) for step in rows_of(runner))
    assert [step.get(13) for step in rows_of(runner)] == [min(chunk_tokens, 4)] * 6


def test_a_chunk_never_exceeds_the_step_limit() -> None:
    engine, runner = fake_engine(chunk_tokens=8)
    for i in range(5):
        engine.submit(spec_of(f"r{i}", length=17))
    run_until_idle(engine)
    assert max(plan.num_tokens for plan in runner.plans) <= 8


def test_outputs_share_the_prompt() -> None:
    engine, runner = fake_engine(chunk_tokens=64, num_pages=64)
    spec = spec_of(length=27, n=5)
    engine.submit(spec)
    outputs = run_until_idle(engine)["r"]
    for index in range(5):
        assert tokens_of(outputs, index) == expected_tokens(spec, index, context=256)
    assert sum(plan.num_tokens for plan in runner.plans) == 26 + 5 * 8


def test_progress_of_a_prompt_is_reported_in_prompt_tokens() -> None:
    engine, _ = fake_engine(chunk_tokens=8)
    engine.submit(spec_of(length=20, max_tokens=3))
    computed = [event.computed_tokens for event in run_until_idle(engine)["r"]]
    assert computed == [8, 16, 20, 20, 20]


# -- many at a time -----------------------------------------------------------------------


def test_outputs_that_find_no_place_at_the_fork_come_later() -> None:
    engine, _ = fake_engine(num_pages=12, max_num_seqs=2)
    spec = spec_of(length=14, n=6)
    engine.submit(spec)
    outputs = run_until_idle(engine)["r"]
    for index in range(6):
        assert tokens_of(outputs, index) == expected_tokens(spec, index, context=48)
    assert engine.check_integrity() == []


def test_a_newcomer_leaves_the_running_ones_a_page_each() -> None:
    engine, _ = fake_engine(num_pages=8)
    specs = [spec_of(f"r{i}", length=11, max_tokens=6) for i in range(2)]
    for spec in specs:
        engine.submit(spec)
        engine.step()
    # Three pages each now and four later: the second starts, a third would displace it.
    engine.submit(spec_of("late", length=5, max_tokens=2))
    run_until_idle(engine)
    assert engine.load().num_preemptions == 0


def test_a_newcomer_leaves_the_pages_of_a_prompt_that_is_being_computed() -> None:
    engine, _ = fake_engine(num_pages=12, chunk_tokens=4)
    engine.submit(spec_of("long", length=38, max_tokens=2))
    engine.step()
    engine.submit(spec_of("late", length=6, max_tokens=4))
    run_until_idle(engine)
    assert engine.load().num_preemptions == 0


@pytest.mark.parametrize("num_pages", [13, 14, 15, 16])
def test_a_decode_row_gives_way_to_a_prompt_that_comes_first(num_pages: int) -> None:
    engine, _ = fake_engine(num_pages=num_pages, chunk_tokens=1, context=52)
    low = spec_of("low", length=3, max_tokens=40)
    high = spec_of("high", length=38, max_tokens=2, priority=1)
    engine.submit(low)
    for _ in range(4):
        engine.step()
    engine.submit(high)
    outputs = run_until_idle(engine)
    assert engine.load().num_preemptions == 1
    assert tokens_of(outputs["high"]) == expected_tokens(high, 0, context=52)
    assert tokens_of(outputs["low"])[-30:] == expected_tokens(low, 0, context=52)[-30:]


def test_a_pool_that_holds_one_sequence_serves_many() -> None:
    engine, _ = fake_engine(num_pages=8, block_size=4)
    specs = [spec_of(f"r{i}", length=10 + i, max_tokens=12) for i in range(8)]
    for spec in specs:
        engine.submit(spec)
    outputs = run_until_idle(engine)
    for spec in specs:
        assert tokens_of(outputs[spec.request_id]) == expected_tokens(spec, 0, context=32)
    assert engine.check_integrity() == []
    assert engine.load().free_blocks == 8
