"""Which domains get drafts of their own: tables, and what holds for any traffic."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paceline.domain.learnings import SequenceOutcome
from paceline.trainer.specialists import (
    Choice,
    DomainView,
    Ledger,
    SpecialistRules,
    choose,
)

RULES = SpecialistRules(max_specialists=2)


def view(domain: str, acceptance: float, **fields: object) -> DomainView:
    tried = 10_000
    known = DomainView(domain, tried, round(acceptance * tried), num_samples=1000)
    return replace(known, **fields)  # type: ignore[arg-type]


PROSE, JSON = (view(name, at, num_samples=0) for name, at in (("prose", 0.6), ("json", 0.7)))


@pytest.mark.parametrize(
    ("code", "made"),
    [
        (view("code", 0.5), "code"),
        (view("code", 0.61), ""),
        (view("code", 0.5, num_samples=255), ""),
        (view("code", 0.5, num_tried=2_047, num_accepted=1_000), ""),
        (view("", 0.5), ""),
        (view("to be named", 0.5), ""),
        (view("code", 0.5, num_samples_asked=501), ""),
        (view("code", 0.5, num_samples_asked=500), "code"),
        (view("code", 0.5, has_other=True), ""),
        # It has one: a newer one as long as it lies below the others at all.
        (view("code", 0.62, has_specialist=True, num_samples_asked=100), "code"),
        (view("code", 0.62, has_specialist=True, num_samples_asked=900), ""),
    ],
)
def test_a_domain_that_lies_below_the_others_gets_one(code: DomainView, made: str) -> None:
    assert choose([code, PROSE, JSON], RULES) == Choice(make=made)
    assert choose([JSON, PROSE, code], RULES).make == made


def test_the_lowest_comes_first_and_not_more_than_may_be() -> None:
    low, lower = view("low", 0.5), view("lower", 0.4)
    assert choose([low, lower, PROSE, JSON], RULES).make == "lower"
    has = replace(lower, has_specialist=True, num_samples_asked=900)
    assert choose([low, has, PROSE, JSON], RULES).make == "low"
    assert choose([low, has, PROSE, JSON], replace(RULES, max_specialists=1)).make == ""
    assert choose([low, lower, PROSE, JSON], SpecialistRules()) == Choice(), "off by default"


def test_traffic_of_one_kind_has_nothing_to_lie_below() -> None:
    assert choose([view("code", 0.1)], RULES) == Choice()


def test_one_goes_when_its_domain_needs_it_no_more() -> None:
    has = replace(PROSE, has_specialist=True, num_samples_asked=900)
    for acceptance, drop in ((0.64, ()), (0.69, ("prose",)), (0.9, ("prose",))):
        tried = round(acceptance * 10_000)
        assert choose([replace(has, num_accepted=tried), JSON], RULES).drop == drop
    # It stays where an operator or a trial has a hand on it, or too little is known.
    kept = replace(has, num_accepted=9_000, has_other=True)
    assert choose([kept, JSON], RULES).drop == ()
    assert choose([replace(has, num_tried=100, num_accepted=90), JSON], RULES).drop == ()
    # The place that it leaves is free at once.
    full = [replace(has, num_accepted=9_000), view("code", 0.5), JSON]
    assert choose(full, replace(RULES, max_specialists=1)) == Choice("code", ("prose",))


VIEWS = st.lists(
    st.builds(
        lambda domain, acceptance, tried, samples, asked, specialist: DomainView(
            domain, tried, int(acceptance * tried), samples, min(asked, samples), specialist
        ),
        domain=st.sampled_from(["a", "b", "c", "d", "e"]),
        acceptance=st.floats(0, 1),
        tried=st.integers(1, 100_000),
        samples=st.integers(0, 2_000),
        asked=st.integers(0, 2_000),
        specialist=st.booleans(),
    ),
    max_size=5,
    unique_by=lambda view: view.domain,
)


@settings(max_examples=200, deadline=None)
@given(views=VIEWS, more=st.integers(0, 3))
def test_what_was_just_made_is_not_dropped_at_the_same_figures(
    views: list[DomainView], more: int
) -> None:
    rules = replace(RULES, max_specialists=more)
    choice = choose(views, rules)
    assert choice.make not in choice.drop or not choice.make
    after = [
        replace(
            v,
            has_specialist=(v.has_specialist or v.domain == choice.make)
            and v.domain not in choice.drop,
            num_samples_asked=v.num_samples if v.domain == choice.make else v.num_samples_asked,
        )
        for v in views
    ]
    again = choose(after, rules)
    assert again.drop == ()
    assert not choice.make or again.make != choice.make
    had, has = (sum(v.has_specialist for v in some) for some in (views, after))
    assert has <= max(had, more)


def test_the_ledger_follows_the_draft_that_everybody_uses() -> None:
    ledger = Ledger()

    def outcome(domain: str, accepted: int, drafter: str = "model") -> SequenceOutcome:
        return SequenceOutcome(drafter, "v1", b"", domain, 10, 100, accepted, 0)

    ledger.note([outcome("a", 90), outcome("a", 0, "model:a"), outcome("b", 10)])
    a, b = ledger.views({"a": 7}, {"a": 3}, {"a"}, {"b"})
    assert a == DomainView("a", 100, 90, 7, 3, True, False)
    assert b == DomainView("b", 100, 10, 0, 0, False, True)
    # New traffic outweighs old.
    ledger.note([outcome("a", 90)] * 2_000)
    ledger.note([outcome("a", 10)] * 1_500)
    a, _ = ledger.views({}, {}, (), ())
    assert a.num_tried <= 65_636 and a.num_accepted / a.num_tried < 0.3
    # Labels are bounded, and what is heard of stays.
    for i in range(200):
        ledger.note([outcome(f"x{i}", 1), outcome("b", 10)])
    names = [view.domain for view in ledger.views({}, {}, (), ())]
    assert len(names) == 64 and "b" in names and "a" not in names
