"""Whether a candidate may be tried on live sequences: paired replay on text it never saw; pure.

Both drafts are scored on the same positions of the same sequences, so what makes a sequence hard
cancels. The test is sequential: confidence.py's bounds hold after every batch, so the caller adds
sequences until there is a verdict. The trainer calls `judge` with all scores so far.

A candidate of the learner's own has scores of new traffic, made before it was learned from
(first_sight.py): they tell what it gains on traffic as it is now, in two windows, and held-out
text tells what it forgets. Others are judged by held-out text alone.
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
    full_positions: int = 48
    """A sequence of so many positions or more has the full weight."""
    max_positions: int = 65_536
    """After so many without a verdict it is refused: a gain that takes longer to see is small."""
    enough_positions: int = 2_048
    """On a domain, from which its mean alone shows that it forgets."""
    windows: tuple[int, ...] = (64, 512)
    """Newest sequences that a gain on new traffic may show on: few where it is large, as after
    traffic has changed, many where it is small. They share alpha, which holds for each time that
    windows are looked at."""
    doubt_sequences: float = 8.0
    """Sequences without a difference that a domain is taken to have had: a few unlucky ones do
    not make it seem forgotten."""


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
class NewScore:
    """Scores of a sequence at first sight."""

    domain: str
    score: PairedScore


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


def judge(
    domains: Sequence[DomainScores],
    rules: GateRules = GateRules(),
    new: Sequence[NewScore] | None = None,
) -> Verdict:
    """Return the verdict on the scores so far.

    Args:
        domains: of held-out text.
        rules: what is asked.
        new: of new traffic, oldest first; None for a candidate that was not made here, whose
            gain is judged by held-out text.

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
            difference, weight = _difference(domain.domain, score, rules)
            own.note(difference, weight)
            everything.note(difference, weight * domain.weight / heaviest, domain.domain)
        by_domain[domain.domain] = own
    # All domains together err with probability alpha.
    each = {name: own.bounds(rules.alpha / len(by_domain)) for name, own in by_domain.items()}
    scores = tuple(_score(d.domain, [d], each[d.domain]) for d in ordered)
    if new is None:
        overall = _score("", ordered, everything.bounds(rules.alpha))
        num_sequences = sum(len(d.scores) for d in ordered)
        is_over = overall.num_positions >= rules.max_positions
    else:
        overall, num_sequences = _best_window(new, rules)
        is_over = False
    losing = [s for s in scores if _doubted(s, by_domain[s.domain], rules) < -rules.max_forgetting]
    reason = _reason(overall, losing, rules, is_over=is_over)
    detail = (
        f"gain {overall.acceptance - overall.incumbent_acceptance:+.4f} in "
        f"[{overall.difference_low:+.4f}, {overall.difference_high:+.4f}] "
        f"on {overall.num_positions} positions of {num_sequences} sequences"
    )
    if losing:
        detail += f"; loses on {', '.join(repr(s.domain) for s in losing)}"
    return Verdict(reason == BETTER, reason, (overall, *scores), detail)


def _reason(
    overall: DraftScore, losing: Sequence[DraftScore], rules: GateRules, *, is_over: bool
) -> str:
    if any(s.difference_high < -rules.max_forgetting for s in losing):
        return FORGETS
    if overall.difference_high < rules.min_gain:
        return NO_GAIN
    if overall.difference_low > rules.min_gain:
        if any(s.num_positions >= rules.enough_positions for s in losing):
            return FORGETS
        # A domain that seems to lose on little text gets more, while there is some.
        return BETTER if not losing or is_over else UNDECIDED
    return NO_GAIN if is_over else UNDECIDED


def _best_window(new: Sequence[NewScore], rules: GateRules) -> tuple[DraftScore, int]:
    """Return the score of the window that shows most, and its number of sequences."""
    found: list[tuple[DraftScore, int]] = []
    for size in rules.windows:
        window = new[-size:]
        mean = RunningMean()
        for each in window:
            mean.note(*_difference(each.domain, each.score, rules), each.domain)
        everything = DomainScores("", [each.score for each in window])
        bounds = mean.bounds(rules.alpha / len(rules.windows))
        found.append((_score("", [everything], bounds), len(window)))
    return max(found, key=lambda score_and_size: score_and_size[0].difference_low)


def _doubted(score: DraftScore, mean: RunningMean, rules: GateRules) -> float:
    """Return a domain's difference, nearer to none the less is known of it."""
    difference = score.acceptance - score.incumbent_acceptance
    return difference * mean.weight / (mean.weight + rules.doubt_sequences)


def _difference(name: str, score: PairedScore, rules: GateRules) -> tuple[float, float]:
    """Return what a sequence says, and its weight.

    Raises:
        InvalidRequestError: it has no positions, or more accepted ones than positions.
    """
    _check(name, score)
    difference = (score.candidate - score.incumbent) / score.num_positions
    return difference, min(1.0, score.num_positions / rules.full_positions)


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
