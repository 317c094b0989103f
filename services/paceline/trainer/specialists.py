"""Which domains deserve a draft of their own; pure.

A domain does that is drafted clearly worse than the rest under the draft that everybody uses, once
there is enough of it to learn from. It is asked again when its samples have doubled: what brought
nothing before may then, and what did is old by then. One that the trainer made goes when its domain
is drafted about as well as the others without it; between the two margins all stays as it is. What
operators offered is theirs. specialising.py asks, and does what this file says.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from paceline.domain.drafts import MODEL_DRAFTER, is_label
from paceline.domain.learnings import SequenceOutcome

_MAX_DOMAINS = 64
_MAX_TRIED = 65_536
"""Positions after which the older ones count half, so that figures follow the traffic."""


@dataclass(frozen=True, slots=True)
class SpecialistRules:
    """When specialists are made, and how."""

    max_specialists: int = 0
    """Domains that may have one at a time; 0 makes none."""
    rank: int = 8
    """Of the differences that are learned."""
    num_steps: int = 128
    """Optimiser steps that one is trained for, at most."""
    margin: float = 0.05
    """Acceptance by which a domain must lie below the others to get one."""
    keep_margin: float = 0.02
    """By which it must to keep it."""
    min_samples: int = 256
    """Of a domain, to learn and to judge from."""
    min_tried: int = 2_048
    """Drafted positions put to the test, of a domain and of all others, to compare them."""


@dataclass(frozen=True, slots=True)
class DomainView:
    """What is known of a domain."""

    domain: str
    """Its label; empty for what has none."""
    num_tried: int
    """Positions at which the draft that everybody uses was put to the test."""
    num_accepted: int
    num_samples: int = 0
    """Taken in since the learner's first start."""
    num_samples_asked: int = 0
    """When a specialist was last asked for; 0 for never."""
    has_specialist: bool = False
    """Made by the trainer."""
    has_other: bool = False
    """Offered by an operator, or on trial or pinned: not to be touched."""


@dataclass(frozen=True, slots=True)
class Choice:
    """What to do."""

    make: str = ""
    """The domain that is to get one, or a newer one; empty for none."""
    drop: tuple[str, ...] = ()
    """Domains that are to have none any more."""


def choose(domains: Sequence[DomainView], rules: SpecialistRules) -> Choice:
    """Return which domain is next, the one that lies lowest first, and which need none."""
    gaps = {view.domain: _gap(view, domains, rules) for view in domains}
    drop = tuple(
        view.domain
        for view in domains
        if view.has_specialist
        and not view.has_other
        and (gap := gaps[view.domain]) is not None
        and gap < rules.keep_margin
    )
    num_kept = sum(view.has_specialist for view in domains) - len(drop)
    found: list[tuple[float, str]] = []
    for view in domains:
        gap = gaps[view.domain]
        if gap is None or view.has_other or view.domain in drop:
            continue
        least = rules.keep_margin if view.has_specialist else rules.margin
        has_room = view.has_specialist or num_kept < rules.max_specialists
        if gap >= least and has_room and _has_enough(view, rules):
            found.append((-gap, view.domain))
    return Choice(min(found)[1] if found and rules.max_specialists else "", drop)


def _has_enough(view: DomainView, rules: SpecialistRules) -> bool:
    enough = max(rules.min_samples, 2 * view.num_samples_asked)
    return is_label(view.domain) and view.num_samples >= enough


def _gap(view: DomainView, domains: Sequence[DomainView], rules: SpecialistRules) -> float | None:
    """Return the acceptance of all other traffic less a domain's; None where too little is known.

    Traffic counts by its positions.
    """
    num_tried = sum(v.num_tried for v in domains) - view.num_tried
    num_accepted = sum(v.num_accepted for v in domains) - view.num_accepted
    if min(num_tried, view.num_tried) < rules.min_tried:
        return None
    return num_accepted / num_tried - view.num_accepted / view.num_tried


class Ledger:
    """What the draft that everybody uses brings, domain by domain."""

    def __init__(self) -> None:
        self._counts: dict[str, tuple[int, int]] = {}
        """Positions tried and accepted."""

    def note(self, outcomes: Sequence[SequenceOutcome]) -> None:
        """Take what drafts brought; those of other drafters do not count."""
        for outcome in outcomes:
            if outcome.drafter != MODEL_DRAFTER or not outcome.num_tried:
                continue
            tried, accepted = self._counts.pop(outcome.domain, (0, 0))
            if tried >= _MAX_TRIED:
                tried, accepted = tried // 2, accepted // 2
            self._counts[outcome.domain] = (
                tried + outcome.num_tried,
                accepted + outcome.num_accepted,
            )
            if len(self._counts) > _MAX_DOMAINS:
                # Labels are the clients' choice; the one unheard of for longest goes.
                del self._counts[next(iter(self._counts))]

    def views(
        self,
        samples: Mapping[str, int],
        asked: Mapping[str, int],
        specialists: Collection[str],
        others: Collection[str],
    ) -> list[DomainView]:
        """Return all domains; counts and members are by domain."""
        return [
            DomainView(
                domain=domain,
                num_tried=tried,
                num_accepted=accepted,
                num_samples=samples.get(domain, 0),
                num_samples_asked=asked.get(domain, 0),
                has_specialist=domain in specialists,
                has_other=domain in others,
            )
            for domain, (tried, accepted) in sorted(self._counts.items())
        ]
