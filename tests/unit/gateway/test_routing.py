"""Routing as pure decisions: tables of who should win, and what must hold for any fleet."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from paceline.domain.cost import StepCost, StepShape
from paceline.domain.member import Load, Member, Role
from paceline.gateway.routing import create_policy
from paceline.gateway.routing.base import Decision, FleetLoad, RoutingRequest

COST = StepCost(base_s=0.005, row_s=0.0005, token_s=0.0005, context_s=1e-8)
POLICY = create_policy("cost")


def worker(
    name: str,
    role: Role = Role.DECODE,
    node: str = "n0",
    cost: StepCost | None = COST,
    drafters: tuple[str, ...] = (),
    **load: int,
) -> Member:
    return Member(
        id=name,
        role=role,
        address="127.0.0.1:1",
        pid=1,
        version="0",
        node_id=node,
        step_cost=cost,
        prefill_chunk_tokens=256,
        drafters=drafters,
        load=Load(**load),
    )


def prefill(name: str, node: str = "n0", **load: int) -> Member:
    return worker(name, Role.PREFILL, node, COST, **load)


def decide(
    decode: list[Member],
    prefills: list[Member] | None = None,
    *,
    tokens: int = 500,
    holders: dict[str, int] | None = None,
    in_flight: dict[str, int] | None = None,
    pending: dict[str, int] | None = None,
    max_tokens: int = 0,
    fitting: tuple[str, ...] = (),
) -> Decision:
    request = RoutingRequest(
        num_tokens=tokens,
        block_size=16,
        block_bytes=1 << 20,
        holders=holders or {},
        max_tokens=max_tokens,
        fitting_drafters=frozenset(fitting),
    )
    fleet = FleetLoad(
        prefill=prefills or [],
        decode=decode,
        in_flight=in_flight or {},
        pending_tokens=pending or {},
        near_bytes_per_s=4e9,
        far_bytes_per_s=4e8,
        hop_s=0.01,
    )
    return POLICY.decide(request, fleet)


def chosen(decision: Decision) -> tuple[str, str]:
    return decision.prefill.id if decision.prefill else "-", decision.decode.id


P, D = prefill("p"), worker("d")

TABLE: dict[str, tuple[dict[str, Any], tuple[str, str]]] = {
    "only-decode": (dict(decode=[D]), ("-", "d")),
    "long-goes-to-prefill": (dict(decode=[D], prefills=[P], tokens=2000), ("p", "d")),
    "short-stays": (dict(decode=[D], prefills=[P], tokens=10), ("-", "d")),
    "one-token-stays": (dict(decode=[D], prefills=[P], tokens=1), ("-", "d")),
    "short-remainder-stays": (
        dict(decode=[D], prefills=[P], tokens=2000, holders={"n0": 124}),
        ("-", "d"),
    ),
    "busy-decode-keeps-free": (
        dict(decode=[worker("d", num_running=20)], prefills=[P], tokens=60),
        ("p", "d"),
    ),
    "queue-at-prefill": (
        dict(decode=[D], prefills=[prefill("p", pending_prefill_tokens=90_000)], tokens=2000),
        ("-", "d"),
    ),
    "idle-prefill": (
        dict(
            decode=[D],
            prefills=[prefill("p0", pending_prefill_tokens=5000), prefill("p1")],
            tokens=2000,
        ),
        ("p1", "d"),
    ),
    "own-count-of-pending": (
        dict(decode=[D], prefills=[prefill("p0"), prefill("p1")], tokens=2000, pending={"p0": 999}),
        ("p1", "d"),
    ),
    "idle-decode": (dict(decode=[worker("d0", num_running=9), worker("d1")]), ("-", "d1")),
    "own-count-of-running": (
        dict(decode=[worker("d0"), worker("d1")], in_flight={"d0": 5}),
        ("-", "d1"),
    ),
    "waiting": (dict(decode=[worker("d0", num_waiting=4), worker("d1")]), ("-", "d1")),
    "holder": (
        dict(decode=[worker("d0", node="n0"), worker("d1", node="n1")], holders={"n1": 20}),
        ("-", "d1"),
    ),
    "longer-holder": (
        dict(
            decode=[worker("d0", node="n0"), worker("d1", node="n1")],
            holders={"n0": 10, "n1": 20},
        ),
        ("-", "d1"),
    ),
    "near-pair": (
        dict(
            decode=[worker("d0", node="n0"), worker("d1", node="n1")],
            prefills=[prefill("p", node="n1")],
            tokens=2000,
        ),
        ("p", "d1"),
    ),
    "what-is-there-need-not-move": (
        dict(
            decode=[worker("d0", node="n0"), worker("d1", node="n1")],
            prefills=[prefill("p", node="n2")],
            tokens=2000,
            holders={"n1": 30},
        ),
        ("p", "d1"),
    ),
    "ties-by-id": (dict(decode=[worker("d1"), worker("d0")]), ("-", "d0")),
    "no-node-at-prefill": (
        dict(decode=[D], prefills=[prefill("p", node="")], tokens=2000),
        ("-", "d"),
    ),
    "no-node-at-decode": (
        dict(decode=[worker("d", node="")], prefills=[P], tokens=2000, holders={"n0": 9}),
        ("-", "d"),
    ),
    "unknown-cost": (dict(decode=[worker("d", cost=None)], prefills=[P], tokens=2000), ("p", "d")),
    "nan-cost": (
        dict(decode=[worker("d0", cost=replace(COST, base_s=math.nan)), worker("d1")]),
        ("-", "d1"),
    ),
    "only-nan-cost": (dict(decode=[worker("d0", cost=replace(COST, row_s=math.nan))]), ("-", "d0")),
}


@pytest.mark.parametrize("case", TABLE)
def test_who_is_chosen(case: str) -> None:
    arguments, wanted = TABLE[case]
    decision = decide(**arguments)
    assert chosen(decision) == wanted
    assert decision.predicted_ttft_s == decision.terms[">".join(wanted)]
    assert decision.predicted_ttft_s == min(decision.terms.values())


HAS, HAS_NOT = ("model", "model:code"), ("model",)
STEP_S = COST.step_s(StepShape(rows=1, attended=500))
CODE: dict[str, Any] = dict(fitting=("model:code",), max_tokens=200)


@pytest.mark.parametrize(
    ("running", "asked", "wanted"),
    [
        (0, CODE, "z-has"),
        (1, CODE, "z-has"),
        # Seconds of prompt that would be delayed twice count more than any drafter.
        (9, CODE, "a-has-not"),
        (0, CODE | dict(fitting=("model:prose",)), "a-has-not"),
        (0, CODE | dict(fitting=()), "a-has-not"),
        (0, CODE | dict(max_tokens=0), "a-has-not"),
    ],
)
def test_a_worker_with_a_drafter_for_the_domain_is_preferred(
    running: int, asked: dict[str, Any], wanted: str
) -> None:
    has = worker("z-has", drafters=HAS, num_running=running)
    decision = decide([worker("a-has-not", drafters=HAS_NOT), has], tokens=500, **asked)
    assert decision.decode.id == wanted
    assert decision.predicted_ttft_s == decision.terms[f"->{wanted}"]
    assert decision.saved_s == (pytest.approx(8 * STEP_S) if wanted == "z-has" else 0.0)


def test_what_a_drafter_saves_is_a_tenth_of_the_steps_of_a_short_answer() -> None:
    for tokens, steps in ((10, 1.0), (50, 5.0), (80, 8.0), (10_000, 8.0)):
        decision = decide([worker("d", drafters=HAS)], tokens=500, **CODE | {"max_tokens": tokens})
        assert decision.saved_s == pytest.approx(steps * STEP_S)


def test_names_of_policies() -> None:
    with pytest.raises(ValueError, match="known are cost"):
        create_policy("random")


LOADS = st.builds(
    Load,
    num_waiting=st.integers(0, 5),
    num_running=st.integers(0, 20),
    pending_prefill_tokens=st.integers(0, 3000),
    context_tokens=st.integers(0, 20_000),
)
COSTS = st.builds(
    StepCost,
    base_s=st.floats(0.001, 0.02),
    row_s=st.floats(0, 0.002),
    token_s=st.floats(0.0001, 0.002),
    context_s=st.floats(0, 1e-6),
)


@st.composite
def fleets(draw: st.DrawFn, role: Role, least: int) -> list[Member]:
    count = draw(st.integers(least, 4))
    return [
        replace(
            worker(f"{role.value}-{i}", role, draw(st.sampled_from(["n0", "n1", "n2"]))),
            load=draw(LOADS),
            step_cost=draw(COSTS),
        )
        for i in range(count)
    ]


@st.composite
def situations(draw: st.DrawFn) -> dict[str, Any]:
    return dict(
        decode=draw(fleets(Role.DECODE, 1)),
        prefills=draw(fleets(Role.PREFILL, 0)),
        tokens=draw(st.integers(1, 2000)),
        holders=draw(st.dictionaries(st.sampled_from(["n0", "n1", "n2"]), st.integers(1, 124))),
        in_flight=draw(st.dictionaries(st.just("decode-0"), st.integers(0, 9))),
        pending=draw(st.dictionaries(st.just("prefill-0"), st.integers(0, 999))),
    )


@settings(max_examples=200, deadline=None)
@given(situation=situations(), data=st.data())
def test_the_order_of_candidates_does_not_matter(
    situation: dict[str, Any], data: st.DataObject
) -> None:
    decision = decide(**situation)
    mixed = dict(situation)
    for name in ("decode", "prefills"):
        mixed[name] = data.draw(st.permutations(situation[name]))
    items = data.draw(st.permutations(list(situation["holders"].items())))
    mixed["holders"] = dict(items)
    again = decide(**mixed)
    assert chosen(again) == chosen(decision)
    assert again.terms == decision.terms


@settings(max_examples=200, deadline=None)
@given(situation=situations(), data=st.data(), more=LOADS)
def test_more_load_never_makes_a_worker_more_attractive(
    situation: dict[str, Any], data: st.DataObject, more: Load
) -> None:
    before = decide(**situation)
    name = data.draw(st.sampled_from(["decode", "prefills"]))
    assume(situation[name])
    at = data.draw(st.integers(0, len(situation[name]) - 1))
    old = situation[name][at]
    load = Load(
        num_waiting=old.load.num_waiting + more.num_waiting,
        num_running=old.load.num_running + more.num_running,
        pending_prefill_tokens=old.load.pending_prefill_tokens + more.pending_prefill_tokens,
        context_tokens=old.load.context_tokens + more.context_tokens,
    )
    members = list(situation[name])
    members[at] = old.with_load(load)
    after = decide(**{**situation, name: members})
    for pair, seconds in after.terms.items():
        assert seconds >= before.terms[pair] - 1e-12
    if old.id not in chosen(before):
        assert old.id not in chosen(after)


@settings(max_examples=200, deadline=None)
@given(
    tokens=st.integers(1, 2000),
    load=LOADS,
    cost=COSTS,
    blocks=st.integers(1, 124),
    has_prefill=st.booleans(),
)
def test_of_equal_workers_the_near_one_is_chosen(
    tokens: int, load: Load, cost: StepCost, blocks: int, has_prefill: bool
) -> None:
    near = replace(worker("z-near", node="n1"), load=load, step_cost=cost)
    far = replace(worker("a-far", node="n2"), load=load, step_cost=cost)
    prefills = [prefill("p", node="n1")] if has_prefill else []
    blocks = min(blocks, tokens // 16)
    assume(blocks or has_prefill)
    holders = {"n1": blocks} if blocks else {}
    decision = decide([far, near], prefills, tokens=tokens, holders=holders)
    if blocks or decision.prefill:
        assert decision.decode.id == "z-near"


@settings(max_examples=200, deadline=None)
@given(situation=situations(), data=st.data(), tokens=st.integers(0, 500))
def test_a_request_waits_for_a_drafter_no_longer_than_its_bound(
    situation: dict[str, Any], data: st.DataObject, tokens: int
) -> None:
    decode = [
        replace(member, drafters=data.draw(st.sampled_from([HAS, HAS_NOT])))
        for member in situation["decode"]
    ]
    situation = {**situation, "decode": decode}
    plain = decide(**situation)
    decision = decide(**situation, **CODE | {"max_tokens": tokens})
    assert decision.terms == plain.terms
    cost = decision.decode.step_cost
    assert cost is not None
    alone_s = cost.step_s(StepShape(rows=1, attended=situation["tokens"]))
    most_s = alone_s * min(0.1 * tokens, 8)
    assert decision.saved_s <= most_s + 1e-12
    assert decision.predicted_ttft_s <= plain.predicted_ttft_s + decision.saved_s + 1e-12
    if decision.decode.id != plain.decode.id:
        assert decision.decode.drafters == HAS


@settings(max_examples=200, deadline=None)
@given(situation=situations(), extra=st.integers(1, 50))
def test_a_longer_stored_prefix_on_a_node_never_hurts_its_workers(
    situation: dict[str, Any], extra: int
) -> None:
    # Fetching a block must be cheaper than computing it; the coefficients above make it so.
    tokens = situation["tokens"]
    before = decide(**{**situation, "holders": {}})
    blocks = min(extra, tokens // 16)
    assume(blocks)
    after = decide(**{**situation, "holders": {"n0": blocks}})
    for member in situation["decode"]:
        if member.node_id == "n0":
            assert after.terms[f"->{member.id}"] <= before.terms[f"->{member.id}"] + 1e-12
