"""A machine on a virtual clock: a worker that is busy at times, and training beside it."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from paceline.domain.slack import Slack
from paceline.trainer.spare import Grant, Moment, SpareCapacity
from paceline.trainer.spare_ledger import SpareLedger

MICRO_STEP_S = 0.025

Event = tuple[float, Slack]
"""From when on a worker has this slack."""


@dataclass(slots=True)
class Outcome:
    """What came of a run; core seconds."""

    idle_s: float = 0.0
    done_s: float = 0.0
    """Of micro-steps that came to their end."""
    overrun_s: float = 0.0
    """Of micro-steps that ran on after the cores were claimed, as seconds."""
    longest_overrun_s: float = 0.0
    num_grants: int = 0
    answers: list[tuple[float, Grant]] = field(default_factory=list)
    ledger: SpareLedger = field(default_factory=SpareLedger)


def bursts(seed: int, seconds: float, idle_s: float, busy_s: float, busy: Slack) -> list[Event]:
    """A worker whose idle and busy times are drawn exponentially with these means."""
    rng = random.Random(seed)
    events, now_s = [(0.0, Slack(threads=busy.threads))], 0.0
    while now_s < seconds:
        now_s += rng.expovariate(1 / idle_s)
        events.append((now_s, busy))
        now_s += rng.expovariate(1 / busy_s)
        events.append((now_s, Slack(threads=busy.threads)))
    return events


def run(
    policy: SpareCapacity,
    events: Sequence[Event],
    seconds: float,
    num_cores: int = 2,
    slowed: Callable[[Slack, bool], Slack] = lambda slack, training: slack,
    foreign: Callable[[float], float] = lambda now_s: 0.0,
) -> Outcome:
    """Ask the policy as the trainer does: at each event and whenever its answer ends."""
    outcome, slack, granted = Outcome(), Slack(), Grant(0, 0.0, "")
    now_s, step_s = 0.0, 0.0
    """`step_s`: how long the micro-step that runs has run."""
    pending = list(events)
    while now_s < seconds:
        while pending and pending[0][0] <= now_s:
            slack = pending.pop(0)[1]
        threads = granted.threads
        told = slowed(slack, threads > 0)
        others = foreign(now_s) + (slack.threads if slack.is_busy else 0)
        # Training has the lowest priority.
        own = min(threads, max(0.0, num_cores - others))
        idle = max(0.0, num_cores - own - others)
        moment = Moment(now_s, {"w": told}, num_cores, idle, threads, own)
        granted = policy.grant(moment)
        outcome.ledger.note(moment, granted)
        outcome.answers.append((now_s, granted))
        if threads and not granted.threads and step_s:
            left_s = MICRO_STEP_S - step_s
            outcome.overrun_s += left_s
            outcome.longest_overrun_s = max(outcome.longest_overrun_s, left_s)
        if not granted.threads:
            step_s = 0.0
        elif not threads:
            outcome.num_grants += 1
        until_s = min(
            now_s + max(granted.seconds, 1e-4), seconds, *[at_s for at_s, _ in pending[:1]]
        )
        passed_s = until_s - now_s
        if not slack.is_busy:
            outcome.idle_s += num_cores * passed_s
        if granted.threads:
            steps, step_s = divmod(step_s + passed_s, MICRO_STEP_S)
            outcome.done_s += granted.threads * steps * MICRO_STEP_S
        now_s = until_s
    return outcome


def stepping(events: Sequence[Event], step_s: float, rng: random.Random) -> list[Event]:
    """Busy times as their steps: each tells how long the last one took, give or take 10 %."""
    told: list[Event] = []
    for (at_s, slack), (end_s, _) in itertools.pairwise(events):
        told.append((at_s, slack))
        while slack.is_busy and at_s + step_s < end_s:
            at_s += step_s
            took_s = step_s * max(0.5, rng.gauss(1.0, 0.1))
            told.append((at_s, replace(slack, predicted_step_s=step_s, last_step_s=took_s)))
    return told
