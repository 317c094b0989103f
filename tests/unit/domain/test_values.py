"""Costs add up, members survive JSON, ranges of requests read as they say."""

from __future__ import annotations

import json

import pytest

from paceline.domain.cost import StepCost
from paceline.domain.member import Load, Member, ModelCard, Role
from paceline.domain.request import SamplingParams

COST = StepCost(base_s=1e-3, row_s=1e-4, token_s=1e-5, context_s=1e-8)


@pytest.mark.parametrize(("tokens", "cached", "chunk"), [(1, 0, 16), (16, 5, 16), (100, 40, 16)])
def test_a_prefill_costs_what_its_steps_cost(tokens: int, cached: int, chunk: int) -> None:
    total, done = 0.0, 0
    while done < tokens:
        count = min(chunk, tokens - done)
        start = cached + done
        total += COST.step_s(1, count, count * start + count * (count + 1) // 2)
        done += count
    assert COST.prefill_s(tokens, cached, chunk) == pytest.approx(total)


def test_nothing_to_compute_costs_nothing() -> None:
    assert COST.prefill_s(0, 100, 16) == 0.0


def test_a_member_survives_json_and_newer_writers() -> None:
    card = ModelCard("demo", "d1", bytes(range(16)), 16, 131072, 2048, 4096)
    member = Member(
        "w1",
        Role.DECODE,
        "10.0.0.1:5",
        7,
        "0.1",
        model=card,
        step_cost=COST,
        load=Load(num_running=3),
    )
    data = json.loads(json.dumps(member.to_json()))
    assert Member.from_json(data) == member
    data["from_the_future"] = 1
    data["load"]["from_the_future"] = 1
    assert Member.from_json(data) == member
    assert member.with_load(Load()).load == Load()


@pytest.mark.parametrize("data", [{}, {"id": "x"}, {"id": "x", "role": "king"}])
def test_what_is_no_member_is_refused(data: dict[str, object]) -> None:
    with pytest.raises((KeyError, TypeError, ValueError)):
        Member.from_json(data)


def test_sampling_knows_when_it_is_greedy_and_when_it_looks_back() -> None:
    assert SamplingParams(temperature=0.0).is_greedy
    assert not SamplingParams(temperature=1e-30).is_greedy
    assert not SamplingParams().has_penalties
    for field in ("repetition_penalty", "presence_penalty", "frequency_penalty"):
        assert SamplingParams(**{field: 0.5}).has_penalties
