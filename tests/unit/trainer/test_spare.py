"""Spare capacity: the contract of its policies, and what the default one makes of traffic."""

from __future__ import annotations

import itertools
import os
import random
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from paceline.domain.slack import Slack
from paceline.trainer.idle_cores import IdleCores
from paceline.trainer.interference import Interference, InterferenceRules
from paceline.trainer.spare import POLICIES, Grant, LeftoverCores, Moment, SpareRules
from paceline.trainer.spare_ledger import SpareLedger
from tests.unit.trainer.machine_simulated import MICRO_STEP_S, bursts, run, stepping

BUSY = Slack(num_running=2, threads=2, predicted_step_s=0.01)
IDLE = Slack(threads=2)
RULES = SpareRules()

SLACKS = st.builds(
    Slack,
    num_running=st.integers(0, 3),
    num_waiting=st.integers(0, 2),
    threads=st.integers(1, 4),
    predicted_step_s=st.sampled_from([0.0, 0.01, 0.05]),
    last_step_s=st.sampled_from([0.0, 0.01, 0.02, 0.06]),
    itl_target_s=st.sampled_from([0.0, 0.05]),
)
MOMENTS = st.lists(
    st.tuples(
        st.sampled_from([0.0, 0.001, 0.05, 0.5, 20.0]),
        st.dictionaries(st.sampled_from("abc"), SLACKS, max_size=3),
        st.one_of(st.none(), st.floats(0, 4)),
    ),
    max_size=40,
)


@pytest.mark.parametrize("name", sorted(POLICIES))
@given(moments=MOMENTS, num_cores=st.integers(1, 4))
def test_a_policy_grants_cores_that_there_are_and_none_beside_a_full_queue(
    name: str, moments: list[tuple[float, dict[str, Slack], float | None]], num_cores: int
) -> None:
    policy, again = POLICIES[name](RULES), POLICIES[name](RULES)
    now_s, threads = 0.0, 0
    for passed_s, workers, idle in moments:
        now_s += passed_s
        moment = Moment(now_s, workers, num_cores, idle, threads)
        grant = policy.grant(moment)
        assert again.grant(moment) == grant
        assert 0 <= grant.threads <= num_cores
        assert 0.0 < grant.seconds <= RULES.grant_s
        assert grant.reason == grant.reason.lower() and " " not in grant.reason
        busy = [slack for slack in workers.values() if slack.is_busy]
        claimed = sum(slack.threads for slack in busy)
        has_queue = any(slack.num_waiting for slack in busy)
        has_room = busy and all(
            0 < s.predicted_step_s <= RULES.itl_share * s.itl_target_s for s in busy
        )
        if has_queue:
            assert grant.threads <= max(0, num_cores - claimed - RULES.queue_margin)
        elif not has_room:
            assert grant.threads <= max(0, num_cores - claimed)
        else:
            assert grant.threads <= max(1, num_cores - claimed)
        threads = grant.threads


@pytest.mark.parametrize("name", sorted(POLICIES))
def test_a_policy_gives_a_silent_machine_to_training_and_takes_it_back_at_the_event(
    name: str,
) -> None:
    policy = POLICIES[name](RULES)
    grants = [policy.grant(Moment(t / 100, {"w": IDLE}, 2)) for t in range(10)]
    assert grants[-1].threads == 2
    assert policy.grant(Moment(0.0901, {"w": BUSY}, 2, None, 2)).threads == 0
    grants = [policy.grant(Moment(0.1 + t / 100, {"w": IDLE}, 2)) for t in range(30)]
    assert grants[-1].threads == 2


def settled(workers: dict[str, Slack], num_cores: int, rules: SpareRules = RULES) -> Grant:
    """Return what is granted once nothing changes any more."""
    policy = LeftoverCores(rules)
    for step in range(4):
        grant = policy.grant(Moment(step / 10, workers, num_cores))
    return grant


@pytest.mark.parametrize(
    ("workers", "num_cores", "threads", "reason"),
    [
        ({}, 4, 4, "idle"),
        ({"a": IDLE, "b": IDLE}, 2, 2, "idle"),
        ({"a": BUSY}, 2, 0, "busy"),
        ({"a": BUSY}, 3, 1, "cores-left"),
        ({"a": BUSY, "b": BUSY}, 4, 0, "busy"),
        ({"a": BUSY, "b": IDLE}, 4, 2, "cores-left"),
        ({"a": replace(BUSY, num_waiting=1)}, 3, 0, "queue"),
        ({"a": replace(BUSY, num_waiting=1)}, 4, 1, "cores-left"),
        ({"a": Slack(num_waiting=1, threads=2)}, 2, 0, "queue"),
        # 10 ms of 50 ms: as much again fits. Not beside a queue, nor where no target is set.
        ({"a": replace(BUSY, itl_target_s=0.05)}, 2, 1, "itl-slack"),
        ({"a": replace(BUSY, itl_target_s=0.015)}, 2, 0, "busy"),
        ({"a": replace(BUSY, itl_target_s=0.05, num_waiting=1)}, 2, 0, "queue"),
        ({"a": replace(BUSY, itl_target_s=0.05), "b": BUSY}, 4, 0, "busy"),
        ({"a": replace(BUSY, itl_target_s=0.05, predicted_step_s=0.0)}, 2, 0, "busy"),
    ],
)
def test_what_is_spare(
    workers: dict[str, Slack], num_cores: int, threads: int, reason: str
) -> None:
    grant = settled(workers, num_cores)
    assert (grant.threads, grant.reason) == (threads, reason)


def test_bursty_traffic_leaves_most_of_its_idle_time_to_training() -> None:
    for seed, (idle_s, busy_s) in enumerate([(1.0, 1.0), (0.5, 2.0), (3.0, 0.3)]):
        events = bursts(seed, 300.0, idle_s, busy_s, BUSY)
        outcome = run(LeftoverCores(), events, 300.0)
        assert outcome.done_s >= 0.9 * outcome.idle_s
        assert outcome.longest_overrun_s <= MICRO_STEP_S
        assert outcome.ledger.spare_share >= 0.9
        for at_s, grant in outcome.answers:
            slack = next(s for t, s in reversed(events) if t <= at_s)
            assert not (grant.threads and slack.is_busy)


def test_gaps_of_a_few_micro_steps_are_used_as_well() -> None:
    outcome = run(LeftoverCores(), bursts(7, 60.0, 0.15, 0.15, BUSY), 60.0)
    assert outcome.done_s >= 0.7 * outcome.idle_s


def test_gaps_too_short_for_a_micro_step_are_left_alone() -> None:
    events = [(0.02 * step, BUSY if step % 2 else IDLE) for step in range(3000)]
    outcome = run(LeftoverCores(), events, 60.0)
    # One try in every gap would be 1500, each with a micro-step that runs into a busy time.
    assert outcome.num_grants <= 20
    recovered = run(LeftoverCores(), [*events, (60.0, IDLE)], 70.0)
    assert recovered.done_s >= 2 * 9.5


def test_a_grant_ends_by_itself_and_is_renewed() -> None:
    outcome = run(LeftoverCores(), [(0.0, IDLE)], 10.0)
    assert {grant.seconds for _, grant in outcome.answers if grant.threads} == {RULES.grant_s}
    assert outcome.num_grants == 1 and outcome.ledger.num_yields == 0
    assert outcome.done_s >= 2 * 9.9


@pytest.mark.parametrize("cost", [0.0, 0.1])
def test_a_worker_that_training_slows_is_left_alone_with_growing_pauses(cost: float) -> None:
    rng = random.Random(0)
    busy = replace(BUSY, threads=1)
    events = [(20.0 * n + (10.0 if n % 2 else 0.0), busy if n % 2 else IDLE) for n in range(40)]
    events = stepping([(0.0, busy), (10.0, IDLE), *[(a + 20.0, s) for a, s in events]], 0.02, rng)

    def slowed(slack: Slack, is_training: bool) -> Slack:
        return replace(slack, last_step_s=slack.last_step_s * (1 + cost * is_training))

    # Without training every other second, so that both kinds of steps are seen.
    class Pausing(LeftoverCores):
        def grant(self, moment: Moment) -> Grant:
            grant = super().grant(moment)
            return replace(grant, threads=0) if int(moment.now_s) % 2 else grant

    outcome = run(Pausing(), events, 700.0, slowed=slowed)
    reasons = outcome.ledger.seconds_by_reason
    beside_s = reasons.get("cores-left", 0.0)
    if cost:
        assert reasons["interferes"] > 5 * beside_s
        # It was tried again, less and less often.
        barred = [at_s for at_s, grant in outcome.answers if grant.reason == "interferes"]
        begins = [b for a, b in itertools.pairwise(barred) if b - a > 1.0]
        assert len(begins) >= 2
    else:
        assert "interferes" not in reasons and beside_s > 100
    assert reasons["idle"] > 200


def test_single_slow_steps_prove_nothing() -> None:
    rng = random.Random(3)
    interference = Interference(InterferenceRules())
    slack = replace(BUSY, threads=1)
    for step in range(20_000):
        took_s = 0.01 * rng.lognormvariate(0.0, 0.15)
        told = replace(slack, last_step_s=took_s)
        interference.note(step * 0.01, {"w": told}, step // 50 % 2 == 0)
        assert not interference.is_barred("w", step * 0.01)
    excess = interference.excess("w")
    assert excess is not None and abs(excess) < 0.1


def test_the_memory_of_workers_is_bounded() -> None:
    rules = InterferenceRules(max_workers=3)
    interference = Interference(rules)
    for number in range(50):
        interference.note(0.0, {f"w{number}": BUSY}, False)
    assert len(interference._workers) == 3


def test_cores_that_others_use_are_not_spare() -> None:
    outcome = run(
        LeftoverCores(), [(0.0, IDLE)], 30.0, foreign=lambda now_s: 1.0 * (10 <= now_s < 20)
    )
    threads = {
        name: {grant.threads for at_s, grant in outcome.answers if low < at_s < high}
        for name, low, high in (("before", 1, 10), ("during", 10.5, 20), ("after", 20.5, 30))
    }
    assert threads == {"before": {2}, "during": {1}, "after": {2}}


def test_the_ledger_counts_core_seconds() -> None:
    ledger = SpareLedger()
    told = [
        (0.0, IDLE, Grant(0, 0.1, "settling")),
        (0.1, IDLE, Grant(2, 0.2, "idle")),
        (0.2, BUSY, Grant(0, 0.2, "busy")),
        (1.2, IDLE, Grant(1, 0.2, "idle")),
        (2.2, IDLE, Grant(1, 0.2, "idle")),
    ]
    for now_s, slack, grant in told:
        ledger.note(Moment(now_s, {"w": slack}, 2), grant)
    assert ledger.offered_s == pytest.approx(2 * (0.1 + 0.1 + 1.0))
    # The last grant ran out after 0.2 s, since nobody asked.
    assert ledger.used_s == pytest.approx(2 * 0.1 + 0.2)
    assert ledger.num_yields == 1
    assert ledger.spare_share == pytest.approx(0.4 / 2.4)
    assert ledger.seconds_by_reason == pytest.approx({"settling": 0.1, "idle": 1.1, "busy": 1.0})


def stat(*cores: tuple[int, int]) -> str:
    lines = ["cpu  1 2 3 4 5 6 7 8 9 10"]
    for number, (busy, idle) in enumerate(cores):
        lines.append(f"cpu{number} {busy} 0 0 {idle} 0 0 0 0 0 0")
    return "\n".join([*lines, "intr 1", "ctxt 5", ""])


def test_idle_cores_are_those_between_two_readings(tmp_path: Path) -> None:
    path = tmp_path / "stat"
    path.write_text(stat((100, 100), (100, 100), (0, 0)))
    idle = IdleCores({0, 1}, path)
    assert idle.read() is None
    assert idle.read() is None, "nothing has passed"
    path.write_text(stat((150, 150), (100, 200), (500, 0)))
    assert idle.read() == pytest.approx(1.5)
    path.write_text(stat((250, 150), (200, 200), (900, 0)))
    assert idle.read() == pytest.approx(0.0)


@pytest.mark.parametrize("content", ["", "cpu0 1 2", "cpu0 a b c d e", stat((1, 1))])
def test_what_cannot_be_read_tells_nothing(tmp_path: Path, content: str) -> None:
    path = tmp_path / "stat"
    path.write_text(content)
    idle = IdleCores({0, 1}, path)
    assert idle.read() is idle.read() is None
    assert IdleCores({0}, tmp_path / "missing").read() is None


@pytest.mark.skipif(sys.platform != "linux", reason="Linux counts cores' time in /proc/stat")
def test_this_machine_tells_its_idle_cores() -> None:
    cores = os.sched_getaffinity(0)
    idle = IdleCores(cores)
    idle.read()
    reading = None
    while reading is None:
        sum(range(100_000))
        reading = idle.read()
    assert 0.0 <= reading <= len(cores)
