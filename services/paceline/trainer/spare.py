"""The capacity governor: how many threads training may have at this moment, and how long; pure.

The trainer asks a `SpareCapacity` whenever a worker of its machine tells something new and when a
grant is about to end; the answer replaces the one before, so an event that claims the cores takes
a grant back at once. Grants are short: training ends by itself when nobody asks any more. The time
is an argument. spare_ledger.py counts what came of it, interference.py what training costs workers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

from paceline.domain.slack import Slack
from paceline.trainer.interference import Interference, InterferenceRules


@dataclass(frozen=True, slots=True)
class Moment:
    """What is known when a grant is asked for."""

    now_s: float
    """Of a clock that never goes back."""
    workers: Mapping[str, Slack]
    """By id, those of this machine."""
    num_cores: int
    """That this process may use."""
    idle_cores: float | None = None
    """Measured since the last moment that had a figure; see idle_cores.py."""
    training_threads: int = 0
    """That training uses now."""
    training_cores: float | None = None
    """Processor time of training over the time that `idle_cores` covers. It gets less than its
    threads where others compute; None takes the threads, and then hides them."""


@dataclass(frozen=True, slots=True)
class Grant:
    """What training may use."""

    threads: int
    """0 for nothing."""
    seconds: float
    """How long the answer holds without news; then training ends, and one asks again."""
    reason: str
    """Stable, lower-kebab."""


class SpareCapacity(Protocol):
    """Says what training may use."""

    def grant(self, moment: Moment) -> Grant:
        """Return what it may use from now on, instead of what it was granted before.

        A grant has no more threads than the machine has cores. Never a thread while a worker that
        claims all cores has a queue. Moments come in the order of time.
        """
        ...


@dataclass(frozen=True, slots=True)
class SpareRules:
    """What counts as spare."""

    grant_s: float = 0.2
    """Length of a grant; it is renewed while nothing changes."""
    micro_step_s: float = 0.025
    """Longest time that training takes to stop; a grant that ends sooner brought nothing."""
    queue_margin: int = 1
    """Cores that stay free while a worker has a queue: it is about to take more."""
    itl_share: float = 0.5
    """A step predicted to take no more than this part of the ITL target leaves room beside it."""
    settle_s: float = 0.005
    """Idle time before a first grant; doubles with each grant that brought nothing."""
    max_settle_s: float = 0.1
    foreign_after_s: float = 0.3
    """Workers idle for so long, measured idle cores tell of others: they also cover the time
    before."""
    interference: InterferenceRules = field(default_factory=InterferenceRules)


class IdleMachine:
    """Grants all cores while every worker of the machine is idle; the simplest there is."""

    def __init__(self, rules: SpareRules | None = None) -> None:
        self._rules = rules or SpareRules()

    def grant(self, moment: Moment) -> Grant:
        """See SpareCapacity."""
        if any(slack.is_busy for slack in moment.workers.values()):
            return Grant(0, self._rules.grant_s, "busy")
        return Grant(moment.num_cores, self._rules.grant_s, "idle")


class LeftoverCores:
    """Grants the cores that busy workers leave, and their slack where they have an ITL target."""

    def __init__(self, rules: SpareRules | None = None) -> None:
        self._rules = rules or SpareRules()
        self._interference = Interference(self._rules.interference)
        self._threads = 0
        self._begun_s = 0.0
        self._settle_s = self._rules.settle_s
        self._free_since_s: float | None = None
        """When cores became spare, after a time without."""
        self._idle_since_s: float | None = None
        self._foreign = 0.0
        """Cores that others than workers and training use."""

    def grant(self, moment: Moment) -> Grant:
        """See SpareCapacity."""
        self._interference.note(moment.now_s, moment.workers, moment.training_threads > 0)
        self._note_foreign(moment)
        threads, reason = self._spare(moment)
        if threads == 0:
            self._end(moment.now_s)
            return Grant(0, self._rules.grant_s, reason)
        if self._free_since_s is None:
            self._free_since_s = moment.now_s
        if self._threads == 0:
            left_s = self._free_since_s + self._settle_s - moment.now_s
            if left_s > 0:
                return Grant(0, left_s, "settling")
            self._begun_s = moment.now_s
        if moment.now_s - self._begun_s >= 2 * self._rules.micro_step_s:
            self._settle_s = self._rules.settle_s
        self._threads = threads
        return Grant(threads, self._rules.grant_s, reason)

    def _spare(self, moment: Moment) -> tuple[int, str]:
        rules = self._rules
        busy = {name: slack for name, slack in moment.workers.items() if slack.is_busy}
        free = moment.num_cores - round(self._foreign)
        if not busy:
            return (free, "idle") if free > 0 else (0, "others-busy")
        claimed = sum(max(1, slack.threads) for slack in busy.values())
        left = free - claimed
        has_queue = any(slack.num_waiting for slack in busy.values())
        if has_queue:
            left -= rules.queue_margin
        if left <= 0 and has_queue:
            return 0, "queue"
        if left <= 0 and not all(self._has_room(slack) for slack in busy.values()):
            return 0, "busy"
        if any(self._interference.is_barred(name, moment.now_s) for name in busy):
            return 0, "interferes"
        return (left, "cores-left") if left > 0 else (1, "itl-slack")

    def _has_room(self, slack: Slack) -> bool:
        return 0.0 < slack.predicted_step_s <= self._rules.itl_share * slack.itl_target_s

    def _end(self, now_s: float) -> None:
        """No cores are spare; a grant that ends before it brought a step makes the next wait."""
        if self._threads and now_s - self._begun_s < 2 * self._rules.micro_step_s:
            self._settle_s = min(2 * self._settle_s, self._rules.max_settle_s)
        self._threads = 0
        self._free_since_s = None

    def _note_foreign(self, moment: Moment) -> None:
        if any(slack.is_busy for slack in moment.workers.values()):
            self._idle_since_s = None
            return
        if self._idle_since_s is None:
            self._idle_since_s = moment.now_s
        is_settled = moment.now_s - self._idle_since_s >= self._rules.foreign_after_s
        if moment.idle_cores is not None and is_settled:
            own = moment.training_cores
            own = float(moment.training_threads) if own is None else own
            used = moment.num_cores - moment.idle_cores - own
            self._foreign = min(max(0.0, used), float(moment.num_cores))


POLICIES: Mapping[str, Callable[[SpareRules], SpareCapacity]] = {
    "leftover-cores": LeftoverCores,
    "idle-machine": IdleMachine,
}
"""By name, the default first."""
