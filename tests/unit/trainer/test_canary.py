"""Versions on trial and in use, on simulated sequences: what is promoted and what is taken back."""

from __future__ import annotations

import random
from collections import Counter

import pytest

from paceline.domain.learnings import SequenceOutcome
from paceline.trainer.canary import (
    MAX_DOMAINS,
    CanaryAction,
    CanaryRules,
    CanaryTrial,
    LiveWatch,
    WatchRules,
)

LEVELS = {"chat": 0.7, "code": 0.4, "": 0.2}
SHARES = {"chat": 0.6, "code": 0.3, "": 0.1}


def sequence(rng: random.Random, version: str, domain: str, level: float) -> SequenceOutcome:
    """A sequence of some difficulty whose chains of four end at the first refused token."""
    acceptance = min(0.98, max(0.0, rng.gauss(level, 0.12)))
    num_rounds = rng.randint(10, 60)
    num_tried = num_accepted = 0
    for _ in range(num_rounds):
        for _ in range(4):
            num_tried += 1
            if rng.random() >= acceptance:
                break
            num_accepted += 1
    emitted = num_accepted + num_rounds
    return SequenceOutcome(
        "model", version, b"", domain, num_rounds, num_tried, num_accepted, emitted
    )


def trial(
    gain: float | None, seed: int, mix: dict[str, float] | None = None, share: float = 0.2
) -> tuple[str, int]:
    """Try a version that gains this much (None: noise); return the reason and its sequences."""
    rng = random.Random(seed)
    trial = CanaryTrial(candidate="new", incumbent="old")
    num = 0
    while True:
        is_new = rng.random() < share
        weights = mix if is_new and mix else SHARES
        domain = rng.choices(list(LEVELS), [weights[name] for name in LEVELS])[0]
        level = LEVELS[domain]
        if is_new:
            level = 0.03 if gain is None else level + gain
            num += 1
        trial.note(sequence(rng, "new" if is_new else "old", domain, level))
        verdict = trial.verdict() if is_new else None
        if verdict is not None and verdict.action is not CanaryAction.CONTINUE:
            return verdict.reason, num


def test_noise_is_taken_back_within_twenty_sequences() -> None:
    found = [trial(None, seed) for seed in range(100)]
    assert {reason for reason, _ in found} == {"far-worse"}
    assert max(num for _, num in found) <= 20


def test_one_that_reaches_more_than_twice_as_much_is_promoted_at_once() -> None:
    for seed in range(20):
        rng = random.Random(seed)
        trial = CanaryTrial(candidate="new", incumbent="old")
        num = 0
        while trial.verdict().action is CanaryAction.CONTINUE:
            trial.note(sequence(rng, "old", "code", 0.08))
            trial.note(sequence(rng, "new", "code", 0.4))
            num += 1
        assert (trial.verdict().reason, num <= 12) == ("far-better", True)
    # Also beside one that has nothing accepted.
    trial = CanaryTrial(candidate="new", incumbent="old")
    for _ in range(6):
        trial.note(SequenceOutcome("model", "old", b"", "", 40, 40, 0, 40))
        trial.note(SequenceOutcome("model", "new", b"", "", 40, 40, 8, 48))
    assert trial.verdict().action is CanaryAction.PROMOTE


def test_what_loses_is_taken_back() -> None:
    found = [trial(-0.08, seed) for seed in range(6)]
    assert {reason for reason, _ in found} == {"worse"}
    assert max(num for _, num in found) <= 500


def test_what_gains_is_promoted() -> None:
    found = [trial(0.08, seed) for seed in range(10)]
    assert {reason for reason, _ in found} == {"not-worse"}
    assert max(num for _, num in found) <= 400


@pytest.mark.slow
def test_an_equal_version_is_promoted_in_the_end() -> None:
    reasons = Counter(trial(0.0, seed)[0] for seed in range(6))
    assert set(reasons) <= {"not-worse", "not-worse-on-average"}


def test_another_mix_of_domains_does_not_count() -> None:
    # The new version gets hard text only; pooled acceptance would be far below the old one's.
    hard = {"chat": 0.1, "code": 0.3, "": 0.6}
    easy = {"chat": 1.0, "code": 0.0, "": 0.0}
    assert [trial(0.08, seed, hard)[0] for seed in range(3)] == ["not-worse"] * 3
    assert [trial(-0.1, seed, easy)[0] for seed in range(3)] == ["worse"] * 3


def test_the_number_of_sequences_is_bounded() -> None:
    rules = CanaryRules(max_sequences=50, alpha=1e-6)
    for gain, reason in ((0.0, "not-worse-on-average"), (-0.2, "worse-on-average")):
        rng = random.Random(0)
        trial = CanaryTrial(rules, candidate="new", incumbent="old")
        for num in range(50):
            assert trial.verdict().action is CanaryAction.CONTINUE, num
            trial.note(sequence(rng, "old", "", 0.6))
            trial.note(sequence(rng, "new", "", 0.6 + gain))
        assert trial.verdict().reason == reason


def test_a_version_that_engines_do_not_draft_with_is_taken_back() -> None:
    rules = CanaryRules(max_starved=100)
    trial = CanaryTrial(rules, candidate="new", incumbent="old")
    outcome = SequenceOutcome("model", "old", b"", "", 10, 20, 10, 20)
    idle = SequenceOutcome("model", "new", b"", "", 0, 0, 0, 0)
    for _ in range(99):
        trial.note(outcome)
        trial.note(idle)
    assert trial.verdict().action is CanaryAction.CONTINUE
    trial.note(outcome)
    assert trial.verdict().reason == "starved"


def test_a_version_that_engines_draft_with_and_with_the_other_not_is_promoted() -> None:
    trial = CanaryTrial(CanaryRules(max_unused=40), candidate="new", incumbent="old")
    for number in range(40):
        assert trial.verdict().action is CanaryAction.CONTINUE
        trial.note(SequenceOutcome("model", "new", b"", "", 10, 20, 10, 20))
        trial.note(SequenceOutcome("model", "old", b"", "", 10, number == 0, 0, 10))
    verdict = trial.verdict()
    assert verdict.reason == "other-unused"
    assert (verdict.scores[0].acceptance, verdict.scores[0].incumbent_acceptance) == (0.5, 0.0)


def test_impossible_outcomes_and_other_versions_do_not_count() -> None:
    trial = CanaryTrial(candidate="new", incumbent="old")
    for version, tried, accepted in (("other", 10, 5), ("new", 5, 6), ("new", 5, -1)):
        trial.note(SequenceOutcome("model", version, b"", "", 1, tried, accepted, 1))
    assert trial.verdict().scores[0].num_positions == 0


def test_memory_is_bounded_in_the_number_of_domains() -> None:
    trial = CanaryTrial(candidate="new", incumbent="old")
    for number in range(3 * MAX_DOMAINS):
        for version in ("new", "old"):
            trial.note(SequenceOutcome("model", version, b"", f"d{number}", 40, 50, 25, 60))
    assert len(trial.verdict().scores) == 1 + MAX_DOMAINS + 1
    assert trial.verdict().scores[0].num_positions == 3 * MAX_DOMAINS * 50


def watch(
    rng: random.Random,
    watch: LiveWatch,
    gain: float,
    num: int,
    drift: float = 0.0,
    share: float = 0.1,
) -> str:
    """Let traffic come by; return the reason of a rollback, or nothing."""
    for step in range(num):
        domain = rng.choices(list(LEVELS), list(SHARES.values()))[0]
        level = LEVELS[domain] - drift * step / num
        is_control = rng.random() < share
        version = "old" if is_control else "new"
        watch.note(sequence(rng, version, domain, level + (0.0 if is_control else gain)))
        if is_control:
            verdict = watch.verdict()
            if verdict.action is CanaryAction.ROLL_BACK:
                return verdict.reason
    return ""


def test_falling_acceptance_of_the_traffic_takes_nothing_back() -> None:
    rng = random.Random(0)
    live = LiveWatch(active="new", control="old")
    assert watch(rng, live, gain=0.02, num=3000, drift=0.3) == ""


def test_a_version_that_falls_below_its_control_is_taken_back() -> None:
    rng = random.Random(1)
    live = LiveWatch(WatchRules(window_pairs=256), active="new", control="old")
    assert watch(rng, live, gain=0.05, num=1000, share=0.3) == ""
    # What it gained before does not hide the loss: 256 pairs are seen in each window.
    assert watch(rng, live, gain=-0.15, num=1800, share=0.3) == "live-worse"
    broken = LiveWatch(active="new", control="old")
    assert watch(rng, broken, gain=-1.0, num=200) == "live-far-worse"


def test_equal_versions_are_left_alone_window_after_window() -> None:
    reasons = [
        watch(
            random.Random(seed),
            LiveWatch(WatchRules(window_pairs=64), active="new", control="old"),
            gain=0.0,
            num=1200,
            share=0.3,
        )
        for seed in range(4)
    ]
    assert reasons == [""] * 4


def test_without_a_control_nothing_is_taken_back() -> None:
    live = LiveWatch(active="new", control="old")
    for _ in range(1000):
        live.note(SequenceOutcome("model", "new", b"", "", 10, 20, 0, 10))
    verdict = live.verdict()
    assert (verdict.action, verdict.reason) == (CanaryAction.CONTINUE, "no-control")
