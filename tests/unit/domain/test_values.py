"""Costs add up, members survive JSON, ranges of requests read as they say."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from paceline.domain.cost import Curve, StepCost, StepCurves, StepShape
from paceline.domain.member import Load, Member, ModelCard, Role
from paceline.domain.request import SamplingParams

COST = StepCost(base_s=1e-3, row_s=1e-4, token_s=1e-5, context_s=1e-8)
CURVED = replace(
    COST,
    curves=StepCurves(
        tokens=Curve((1, 16, 64), (1e-3, 1.5e-3, 6e-3)),
        rows=Curve((0, 1, 4), (0.0, 1e-4, 2e-4)),
        contexts=Curve((0, 100, 1000), (0.0, 1e-5, 1e-3)),
        prefill_row_s=1e-4,
        prefill_read_s=1e-6,
        prefill_context_s=1e-8,
        nodes=Curve((0, 8), (0.0, 1e-4)),
        node_context_s=2e-8,
    ),
)


@pytest.mark.parametrize("cost", [COST, CURVED], ids=["linear", "curves"])
@pytest.mark.parametrize(("tokens", "cached", "chunk"), [(1, 0, 16), (16, 5, 16), (100, 40, 16)])
def test_a_prefill_costs_what_its_steps_cost(
    cost: StepCost, tokens: int, cached: int, chunk: int
) -> None:
    total, done = 0.0, 0
    while done < tokens:
        count = min(chunk, tokens - done)
        total += cost.step_s(StepShape().with_chunk(count, cached + done))
        done += count
    assert cost.prefill_s(tokens, cached, chunk) == pytest.approx(total)


def test_the_context_of_a_chunk_is_that_of_its_tokens() -> None:
    shape = StepShape(rows=2, attended=30).with_chunk(3, 10).with_chunk(1, 0)
    assert shape.prefill_attended == 11 + 12 + 13 + 1
    assert (shape.num_tokens, shape.prefill_rows, shape.prefill_context) == (6, 2, 14)
    assert (shape.rows, shape.attended) == (2, 30)


def test_a_curve_is_linear_between_its_points_and_behind_them() -> None:
    curve = Curve((2, 4, 8), (1.0, 3.0, 3.0))
    assert [curve.at(n) for n in (0, 2, 3, 4, 6, 8, 100)] == [1, 1, 2, 3, 3, 3, 3]
    rising = Curve((0, 10), (5.0, 6.0))
    assert [rising.at(n) for n in (0, 5, 10, 30)] == [5, 5.5, 6, 8]
    assert Curve((3,), (7.0,)).at(50) == 7.0


@pytest.mark.parametrize(
    ("counts", "seconds"), [((), ()), ((1, 2), (1.0,)), ((1, 1), (1.0, 2.0)), ((2, 1), (1.0, 2.0))]
)
def test_what_is_no_curve_is_refused(counts: tuple[int, ...], seconds: tuple[float, ...]) -> None:
    with pytest.raises(ValueError):
        Curve(counts, seconds)


def test_a_step_costs_the_sum_of_its_parts() -> None:
    shape = StepShape(rows=4, tree_nodes=8, attended=550, tree_attended=1100).with_chunk(4, 6)
    parts = [1.5e-3, 2e-4, 5.05e-4, 1e-4, 10 * 1e-6, 34 * 1e-8, 1e-4, 1100 * 2e-8]
    assert CURVED.step_s(shape) == pytest.approx(sum(parts))


def test_nothing_to_compute_costs_nothing() -> None:
    assert COST.prefill_s(0, 100, 16) == 0.0


@pytest.mark.parametrize("cost", [COST, CURVED], ids=["linear", "curves"])
def test_a_member_survives_json_and_newer_writers(cost: StepCost) -> None:
    card = ModelCard("demo", "d1", bytes(range(16)), 16, 131072, 2048, 4096)
    member = Member(
        "w1",
        Role.DECODE,
        "10.0.0.1:5",
        7,
        "0.1",
        model=card,
        step_cost=cost,
        drafters=("trie", "model"),
        draft_version="v3",
        load=Load(num_running=3),
    )
    data = json.loads(json.dumps(member.to_json()))
    assert Member.from_json(data) == member
    data["from_the_future"] = 1
    data["load"]["from_the_future"] = 1
    data["step_cost"]["from_the_future"] = 1
    assert Member.from_json(data) == member
    assert member.with_load(Load()).load == Load()
    del data["drafters"], data["draft_version"]
    assert Member.from_json(data) == replace(member, drafters=(), draft_version="")


def test_members_without_curves_and_with_them_understand_each_other() -> None:
    card = Member("w1", Role.DECODE, "10.0.0.1:5", 7, "0.1", step_cost=CURVED)
    data = json.loads(json.dumps(card.to_json()))["step_cost"]
    # An older version reads these four keys and ignores the rest.
    assert {k: v for k, v in data.items() if k not in ("curves", "floor_s")} == {
        "base_s": 1e-3,
        "row_s": 1e-4,
        "token_s": 1e-5,
        "context_s": 1e-8,
    }
    del data["curves"]
    assert StepCost.from_json(data) == COST


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
