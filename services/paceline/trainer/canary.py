"""How a version does on live sequences beside another one: on trial, and after it; pure.

Two versions draft for different sequences at the same time, so drift of the traffic meets both,
and they are compared within each domain, so that a domain which only one of them got much of
does not count for it. `Comparison` makes a pair of bundles of sequences of one domain as soon as
both versions have enough tried positions there; pairs are differences for confidence.py. A
sequence's share in a pair is by its tried positions. The trainer calls this with the outcomes
that workers report.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import Enum

from paceline.domain.draft_records import DraftScore
from paceline.domain.learnings import SequenceOutcome
from paceline.trainer.confidence import Bounds, RunningMean

MAX_DOMAINS = 256
"""Compared apart; sequences of later ones count together."""
_OTHERS = "\x00others"


@dataclass(frozen=True, slots=True)
class CanaryRules:
    """When a trial ends, and how."""

    alpha: float = 0.05
    """Probability at most, before `max_sequences`, of taking back one that is as good, or promoting
    one that loses `max_loss`, however often it is looked at."""
    max_loss: float = 0.02
    """Acceptance that counts as no loss: the gate has shown a gain already."""
    pair_positions: int = 32
    """Tried positions of either version that make a pair."""
    full_positions: int = 40
    """Of either, from which a pair has the full weight."""
    far_pairs: int = 6
    """Pairs from which a version that reaches less than `far_ratio` is taken back at once, and one
    that reaches so many times more is promoted."""
    far_ratio: float = 0.5
    """Of the other's acceptance."""
    max_sequences: int = 2_000
    """Of the version on trial; then its mean decides."""
    max_unused: int = 64
    """Sequences of the version on trial while the other has less than a tenth of that: engines
    draft with the one and not with the other."""
    max_starved: int = 10_000
    """Sequences of the other while the version on trial has less than a tenth of that: an engine
    that does not draft with it has judged it."""


class CanaryAction(Enum):
    """What to do with a version."""

    CONTINUE = "continue"
    PROMOTE = "promote"
    ROLL_BACK = "roll-back"


@dataclass(frozen=True, slots=True)
class CanaryVerdict:
    """What the outcomes say."""

    action: CanaryAction
    reason: str
    """Stable, lower-kebab."""
    scores: tuple[DraftScore, ...]
    """All domains together first, then by name."""
    detail: str


@dataclass(slots=True)
class _Count:
    num_sequences: int = 0
    num_tried: int = 0
    num_accepted: int = 0

    def note(self, outcome: SequenceOutcome) -> None:
        self.num_sequences += 1
        self.num_tried += outcome.num_tried
        self.num_accepted += outcome.num_accepted

    @property
    def acceptance(self) -> float:
        return self.num_accepted / self.num_tried if self.num_tried else 0.0


class _Domain:
    """One domain: counts of both versions, those not in a pair yet, and the pairs."""

    def __init__(self) -> None:
        self.all = (_Count(), _Count())
        self.open = (_Count(), _Count())
        self.mean = RunningMean()


class Comparison:
    """Two versions of a drafter side by side."""

    def __init__(self, first: str, second: str, rules: CanaryRules) -> None:
        self._sides = {first: 0, second: 1}
        self._rules = rules
        self._domains: dict[str, _Domain] = {}
        self.mean = RunningMean()
        self.num_pairs = 0
        self._paired = [0.0, 0.0]
        """Acceptance of either in pairs, times the pairs' weights."""

    def note(self, outcome: SequenceOutcome) -> None:
        """Take what a version brought; other versions and sequences without a try do not count."""
        side = self._sides.get(outcome.draft_version)
        if side is None or outcome.num_tried < 1:
            return
        if not 0 <= outcome.num_accepted <= outcome.num_tried:
            return
        name = outcome.domain
        if name not in self._domains and len(self._domains) >= MAX_DOMAINS:
            name = _OTHERS
        domain = self._domains.setdefault(name, _Domain())
        domain.all[side].note(outcome)
        domain.open[side].note(outcome)
        if min(count.num_tried for count in domain.open) >= self._rules.pair_positions:
            self._close_pair(name, domain)

    def num_sequences(self, version: str) -> int:
        """Return how many sequences of a version were counted."""
        side = self._sides[version]
        return sum(domain.all[side].num_sequences for domain in self._domains.values())

    @property
    def ratio(self) -> float:
        """Acceptance of the first over that of the second in pairs; 1 without any."""
        first, second = self._paired
        if not second:
            return math.inf if first else 1.0
        return first / second

    def scores(self, alpha: float) -> tuple[DraftScore, ...]:
        """Return acceptance of the first against the second, all domains together first.

        Of all together acceptance is that in pairs, so the mix of domains is the same; without a
        pair it is that of all that was tried.
        """
        weight, bounds = self.mean.weight, self.mean.bounds(alpha)
        first, second = (
            value / weight if weight else self._acceptance(side)
            for side, value in enumerate(self._paired)
        )
        tried = sum(domain.all[0].num_tried for domain in self._domains.values())
        together = DraftScore("", tried, first, second, bounds.low, bounds.high)
        each = alpha / max(1, len(self._domains))
        return (
            together,
            *(
                _score(name, domain, domain.mean.bounds(each))
                for name, domain in sorted(self._domains.items())
            ),
        )

    def _acceptance(self, side: int) -> float:
        counts = [domain.all[side] for domain in self._domains.values()]
        tried = sum(count.num_tried for count in counts)
        return sum(count.num_accepted for count in counts) / tried if tried else 0.0

    def _close_pair(self, name: str, domain: _Domain) -> None:
        rates = [count.acceptance for count in domain.open]
        smaller = min(count.num_tried for count in domain.open)
        weight = min(1.0, smaller / self._rules.full_positions)
        domain.open = (_Count(), _Count())
        domain.mean.note(rates[0] - rates[1], weight)
        self.mean.note(rates[0] - rates[1], weight, name)
        self.num_pairs += 1
        for side, rate in enumerate(rates):
            self._paired[side] += weight * rate


class CanaryTrial:
    """A version on trial beside the one that is active."""

    def __init__(self, rules: CanaryRules | None = None, *, candidate: str, incumbent: str) -> None:
        self._rules = rules or CanaryRules()
        self._candidate, self._incumbent = candidate, incumbent
        self._comparison = Comparison(candidate, incumbent, self._rules)

    def note(self, outcome: SequenceOutcome) -> None:
        """Take an outcome of either version; others are passed over."""
        self._comparison.note(outcome)

    def verdict(self) -> CanaryVerdict:
        """Return what to do by the outcomes so far."""
        return _verdict(*self._decide(), self._comparison, self._rules.alpha)

    def _decide(self) -> tuple[CanaryAction, str]:
        rules, comparison = self._rules, self._comparison
        bounds = comparison.mean.bounds(rules.alpha)
        num_own = comparison.num_sequences(self._candidate)
        num_other = comparison.num_sequences(self._incumbent)
        if comparison.num_pairs >= rules.far_pairs and comparison.ratio < rules.far_ratio:
            return CanaryAction.ROLL_BACK, "far-worse"
        if comparison.num_pairs >= rules.far_pairs and comparison.ratio > 1.0 / rules.far_ratio:
            return CanaryAction.PROMOTE, "far-better"
        if bounds.high < 0.0:
            return CanaryAction.ROLL_BACK, "worse"
        if bounds.low > -rules.max_loss:
            return CanaryAction.PROMOTE, "not-worse"
        if num_own >= rules.max_sequences:
            if comparison.num_pairs and bounds.mean >= -rules.max_loss:
                return CanaryAction.PROMOTE, "not-worse-on-average"
            return CanaryAction.ROLL_BACK, "worse-on-average"
        if num_own >= rules.max_unused and num_other < num_own / 10:
            return CanaryAction.PROMOTE, "other-unused"
        if num_other >= rules.max_starved and num_own < rules.max_starved / 10:
            return CanaryAction.ROLL_BACK, "starved"
        return CanaryAction.CONTINUE, "undecided"


@dataclass(frozen=True, slots=True)
class WatchRules:
    """When a version in use is taken back."""

    alpha: float = 0.01
    """Probability at most, in each window, of taking back one that loses `max_loss` or less."""
    max_loss: float = 0.02
    window_pairs: int = 512
    """Pairs after which the comparison begins anew, so that a good past does not hide a bad
    present."""


class LiveWatch:
    """The active version beside an earlier one that keeps a small share of the sequences.

    Without such a control nothing is ever taken back: acceptance that falls may be the traffic's
    doing, and only a version that meets the same traffic can tell.
    """

    def __init__(self, rules: WatchRules | None = None, *, active: str, control: str) -> None:
        self._rules = rules or WatchRules()
        self._pairing = CanaryRules()
        self._active, self._control = active, control
        self._comparison = self._begin()

    def note(self, outcome: SequenceOutcome) -> None:
        """Take an outcome of either version; others are passed over."""
        self._comparison.note(outcome)

    def verdict(self) -> CanaryVerdict:
        """Return CONTINUE, or ROLL_BACK where the active version is worse than the control."""
        rules, comparison = self._rules, self._comparison
        pairing, bounds = self._pairing, comparison.mean.bounds(rules.alpha)
        action, reason = CanaryAction.CONTINUE, "holds"
        if comparison.num_pairs >= pairing.far_pairs and comparison.ratio < pairing.far_ratio:
            action, reason = CanaryAction.ROLL_BACK, "live-far-worse"
        elif bounds.high < -rules.max_loss:
            action, reason = CanaryAction.ROLL_BACK, "live-worse"
        elif not comparison.num_pairs:
            reason = "no-control"
        verdict = _verdict(action, reason, comparison, rules.alpha)
        if action is CanaryAction.CONTINUE and comparison.num_pairs >= rules.window_pairs:
            self._comparison = self._begin()
        return verdict

    def _begin(self) -> Comparison:
        return Comparison(self._active, self._control, self._pairing)


def _score(name: str, domain: _Domain, bounds: Bounds) -> DraftScore:
    first, second = domain.all
    return DraftScore(
        domain=name.lstrip("\x00"),
        num_positions=first.num_tried,
        acceptance=first.acceptance,
        incumbent_acceptance=second.acceptance,
        difference_low=bounds.low,
        difference_high=bounds.high,
    )


def _verdict(
    action: CanaryAction, reason: str, comparison: Comparison, alpha: float
) -> CanaryVerdict:
    scores = comparison.scores(alpha)
    total = scores[0]
    detail = (
        f"acceptance {total.acceptance:.4f} against {total.incumbent_acceptance:.4f}, "
        f"difference in [{total.difference_low:+.4f}, {total.difference_high:+.4f}], "
        f"{comparison.num_pairs} pairs"
    )
    return CanaryVerdict(action, reason, scores, detail)
