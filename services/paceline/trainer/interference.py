"""Whether training slows the steps of a worker beside it, from what the worker tells; pure.

The last step's time over its prediction, as means of the time with training and without: the
prediction's own error is in both. A worker that is slowed is left alone while it is busy, for a
time that doubles as long as it happens again. spare.py calls this.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from paceline.domain.slack import Slack


@dataclass(frozen=True, slots=True)
class InterferenceRules:
    """How much is too much."""

    limit: float = 0.02
    """Part by which steps may take longer beside training."""
    rate: float = 0.02
    """Weight of the newest step in a mean."""
    min_steps: int = 30
    """Of either kind before anything is concluded."""
    doubt: float = 2.0
    """Standard errors that the excess must be above the limit: single steps vary by more."""
    back_off_s: float = 10.0
    """First time without training beside a worker that was slowed."""
    max_back_off_s: float = 600.0
    max_workers: int = 64
    """Remembered; the one that was heard of longest ago is forgotten."""


@dataclass(slots=True)
class _Mean:
    """A mean of the newest values, with the variance of one."""

    mean: float = 0.0
    variance: float = 0.0
    num: int = 0

    def note(self, value: float, rate: float) -> None:
        self.num += 1
        rate = max(rate, 1.0 / self.num)
        delta = value - self.mean
        self.mean += rate * delta
        self.variance = (1.0 - rate) * (self.variance + rate * delta * delta)

    def squared_error(self, rate: float) -> float:
        return self.variance * max(rate / (2.0 - rate), 1.0 / self.num)


@dataclass(slots=True)
class _Worker:
    alone: _Mean = field(default_factory=_Mean)
    beside: _Mean = field(default_factory=_Mean)
    last: tuple[float, float] = (0.0, 0.0)
    was_training: bool = False
    barred_until_s: float = -math.inf
    back_off_s: float = 0.0


class Interference:
    """What training costs each worker of the machine."""

    def __init__(self, rules: InterferenceRules) -> None:
        self._rules = rules
        self._workers: dict[str, _Worker] = {}

    def note(self, now_s: float, workers: Mapping[str, Slack], is_training: bool) -> None:
        """Take what workers tell now; whether training runs tells of the time since then."""
        for name, slack in workers.items():
            worker = self._workers.pop(name, None) or _Worker()
            self._workers[name] = worker
            while len(self._workers) > self._rules.max_workers:
                del self._workers[next(iter(self._workers))]
            self._note_step(now_s, worker, slack, is_training)

    def is_barred(self, worker_id: str, now_s: float) -> bool:
        """Whether training has to leave this worker alone while it is busy."""
        worker = self._workers.get(worker_id)
        return worker is not None and now_s < worker.barred_until_s

    def excess(self, worker_id: str) -> float | None:
        """Return the part by which steps take longer beside training; None while unknown."""
        worker = self._workers.get(worker_id)
        if worker is None or min(worker.alone.num, worker.beside.num) < self._rules.min_steps:
            return None
        return worker.beside.mean / worker.alone.mean - 1.0

    def _note_step(self, now_s: float, worker: _Worker, slack: Slack, is_training: bool) -> None:
        step = (slack.last_step_s, slack.predicted_step_s)
        is_new = step != worker.last and min(step) > 0.0
        # A step in which training began or ended tells nothing.
        is_clear = is_training == worker.was_training
        worker.last, worker.was_training = step, is_training
        if not (is_new and is_clear and slack.is_busy):
            return
        rules = self._rules
        kind = worker.beside if is_training else worker.alone
        kind.note(step[0] / step[1], rules.rate)
        if min(worker.alone.num, worker.beside.num) < rules.min_steps:
            return
        excess = worker.beside.mean / worker.alone.mean - 1.0
        squared = worker.alone.squared_error(rules.rate) + worker.beside.squared_error(rules.rate)
        error = math.sqrt(squared) / worker.alone.mean
        if excess - rules.doubt * error > rules.limit:
            worker.back_off_s = min(
                max(rules.back_off_s, 2.0 * worker.back_off_s), rules.max_back_off_s
            )
            worker.barred_until_s = now_s + worker.back_off_s
            worker.beside = _Mean()
        elif is_training and excess <= rules.limit and worker.beside.num >= 4 * rules.min_steps:
            worker.back_off_s = 0.0
