"""Whether a candidate may be tried on live sequences: paired replay on held-out text; pure.

Both drafts are scored on the same positions of the same sequences, so what makes a sequence hard
cancels. The test is sequential: confidence.py's bounds hold after every batch, so the caller adds
sequences until there is a verdict. The trainer calls `judge` with all scores so far.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from paceline.domain.draft_records import DraftScore
from paceline.domain.errors import InvalidRequestError
from paceline.trainer.confidence import Bounds, RunningMean


@dataclass(frozen=True, slots=True)
class GateRules:
    """When a candidate is good enough."""

    min_gain: float = 0.005
    """Acceptance that it must gain over all traffic: a swap costs something."""
    max_forgetting: float = 0.03
    """Acceptance that it may lose on one domain."""
    alpha: float = 0.05
    """Probability at most of accepting one that gains `min_gain` or less, however often it is
    looked at; also of refusing one that gains it."""
    full_positions: int = 64
    """A sequence of so many positions or more has the full weight."""
    max_positions: int = 65_536
    """After so many without a verdict it is refused: a gain that takes longer to see is small."""
    enough_positions: int = 2_048
    """On a domain, from which its mean alone shows that it forgets."""


@dataclass(frozen=True, slots=True)
class PairedScore:
    """What both drafts would have brought on one held-out sequence."""

    num_positions: int
    candidate: float
    """Positions at which its token is accepted; expected ones, so a fraction is fine."""
    incumbent: float


@dataclass(frozen=True, slots=True)
class DomainScores:
    """Scores on one domain, in the order of the test."""

    domain: str
    scores: Sequence[PairedScore] = field(repr=False)
    weight: float = 1.0
    """Share of the domain in the traffic over its share in the held-out text, settled before the
    test; 1 where text is held out as it comes."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """What the scores say."""

    is_accepted: bool
    reason: str
    """`better`; refused: `no-gain`, `forgets`; neither yet: `undecided`."""
    scores: tuple[DraftScore, ...]
    """All domains together first, then by name."""
    detail: str = ""

    @property
    def is_final(self) -> bool:
        """Whether more scores cannot change it."""
        return self.reason != UNDECIDED


BETTER, NO_GAIN, FORGETS, UNDECIDED = "better", "no-gain", "forgets", "undecided"


def judge(domains: Sequence[DomainScores], rules: GateRules = GateRules()) -> Verdict:
    """Return the verdict on the scores so far.

    Raises:
        InvalidRequestError: a score has no positions, or more accepted ones than positions; a
            domain has no weight.
    """
    if any(domain.weight <= 0.0 for domain in domains):
        raise InvalidRequestError("weight", "must be above 0", reason="score-out-of-range")
    ordered = sorted((d for d in domains if d.scores), key=lambda d: d.domain)
    heaviest = max((d.weight for d in ordered), default=1.0)
    everything = RunningMean()
    by_domain = {}
    for domain in ordered:
        own = RunningMean()
        for score in domain.scores:
            _check(domain.domain, score)
            difference = (score.candidate - score.incumbent) / score.num_positions
            weight = min(1.0, score.num_positions / rules.full_positions)
            own.note(difference, weight)
            everything.note(difference, weight * domain.weight / heaviest, domain.domain)
        by_domain[domain.domain] = own
    overall = everything.bounds(rules.alpha)
    # All domains together err with probability alpha.
    each = {name: own.bounds(rules.alpha / len(by_domain)) for name, own in by_domain.items()}
    scores = (
        _score("", ordered, overall),
        *(_score(d.domain, [d], each[d.domain]) for d in ordered),
    )
    reason = _reason(overall, scores, rules)
    detail = (
        f"gain {overall.mean:+.4f} in [{overall.low:+.4f}, {overall.high:+.4f}] "
        f"on {scores[0].num_positions} positions of {sum(len(d.scores) for d in ordered)} sequences"
    )
    return Verdict(reason == BETTER, reason, scores, detail)


def _reason(overall: Bounds, scores: tuple[DraftScore, ...], rules: GateRules) -> str:
    is_over = scores[0].num_positions >= rules.max_positions
    losing = [
        s for s in scores[1:] if s.acceptance - s.incumbent_acceptance < -rules.max_forgetting
    ]
    if any(s.difference_high < -rules.max_forgetting for s in losing):
        return FORGETS
    if overall.high < rules.min_gain:
        return NO_GAIN
    if overall.low > rules.min_gain:
        if any(s.num_positions >= rules.enough_positions for s in losing):
            return FORGETS
        # A domain that seems to lose on little text gets more, while there is some.
        return BETTER if not losing or is_over else UNDECIDED
    return NO_GAIN if is_over else UNDECIDED


def _score(name: str, domains: Sequence[DomainScores], bounds: Bounds) -> DraftScore:
    """Return acceptance by position; each domain counts by its weight."""
    positions = candidate = incumbent = 0.0
    for domain in domains:
        positions += domain.weight * sum(s.num_positions for s in domain.scores)
        candidate += domain.weight * sum(s.candidate for s in domain.scores)
        incumbent += domain.weight * sum(s.incumbent for s in domain.scores)
    return DraftScore(
        domain=name,
        num_positions=sum(s.num_positions for d in domains for s in d.scores),
        acceptance=candidate / positions if positions else 0.0,
        incumbent_acceptance=incumbent / positions if positions else 0.0,
        difference_low=bounds.low,
        difference_high=bounds.high,
    )


def _check(domain: str, score: PairedScore) -> None:
    accepted = (score.candidate, score.incumbent)
    if score.num_positions < 1 or not all(0.0 <= a <= score.num_positions for a in accepted):
        raise InvalidRequestError("scores", f"{domain!r}: {score}", reason="score-out-of-range")
