"""Who may go from which stage to which, and what that does to the others; pure.

registry.py keeps what these functions return. One drafter has one active version, at most one on
trial (canary), the one to go back to (previous), the one that always stays (floor), and perhaps
one that an operator pinned.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from paceline.domain.draft_records import DraftDecision, DraftRecord, DraftScore, DraftStage
from paceline.domain.drafts import MAX_DRAFTERS, MODEL_DRAFTER
from paceline.domain.errors import ExhaustedError, PreconditionError

_S = DraftStage
TRANSITIONS: Mapping[DraftStage, frozenset[DraftStage]] = {
    _S.CANDIDATE: frozenset({_S.REFUSED, _S.CANARY, _S.ACTIVE}),
    _S.REFUSED: frozenset({_S.ACTIVE}),
    # Back to CANDIDATE where the trial ended without a verdict.
    _S.CANARY: frozenset({_S.ACTIVE, _S.ROLLED_BACK, _S.CANDIDATE}),
    # RETIRED only follows from another becoming active.
    _S.ACTIVE: frozenset({_S.ROLLED_BACK}),
    _S.RETIRED: frozenset({_S.ACTIVE}),
    _S.ROLLED_BACK: frozenset({_S.ACTIVE}),
}
"""What may be decided of a version that stands there."""

_MAX_DECISIONS = 64
"""Kept of a version, the newest."""

Records = Mapping[str, DraftRecord]


@dataclass(frozen=True, slots=True)
class Standing:
    """Versions of one drafter that stand out; empty for none."""

    active: str = ""
    canary: str = ""
    previous: str = ""
    floor: str = ""
    pinned: str = ""

    @property
    def versions(self) -> set[str]:
        """All of them: what must stay on disk."""
        return {self.active, self.canary, self.previous, self.floor, self.pinned} - {""}


@dataclass(frozen=True, slots=True)
class Verdict:
    """What is decided of a version, and why."""

    stage: DraftStage
    reason: str
    detail: str = ""
    scores: tuple[DraftScore, ...] = ()


@dataclass(frozen=True, slots=True)
class Change:
    """What follows from a decision: the drafter's standing and the records that differ."""

    standing: Standing
    records: Mapping[str, DraftRecord]


def decide(
    records: Records,
    standing: Standing,
    version: str,
    verdict: Verdict,
    at_s: float,
    successor: str = "",
) -> Change:
    """Return what a decision of the trainer does; `successor` follows an active one taken back.

    Raises:
        PreconditionError: the version may not go there, or another holds the place.
    """
    record, stage = records[version], verdict.stage
    if stage not in TRANSITIONS[record.stage]:
        raise PreconditionError(
            f"{version} is {record.stage.value} and cannot become {stage.value}",
            reason="draft-stage",
        )
    if standing.pinned and stage in (_S.CANARY, _S.ACTIVE, _S.ROLLED_BACK):
        raise PreconditionError(f"{standing.pinned} is pinned; unpin it", reason="draft-pinned")
    if stage is _S.CANARY and standing.canary:
        raise PreconditionError(f"{standing.canary} is on trial", reason="draft-on-trial")
    if stage is _S.CANARY and not standing.active:
        raise PreconditionError("nothing to try it against", reason="no-active-draft")
    if stage is _S.ACTIVE:
        return activate(records, standing, version, verdict, at_s)
    changed = {version: _decided(record, verdict, at_s)}
    if version == standing.active:
        return take_back(records, standing, verdict, at_s, successor)
    if version == standing.canary:
        standing = replace(standing, canary="")
    elif stage is _S.CANARY:
        standing = replace(standing, canary=version)
    return Change(standing, changed)


def activate(
    records: Records, standing: Standing, version: str, verdict: Verdict, at_s: float
) -> Change:
    """Return what it does to make a version active: the old one retires, a trial is void."""
    changed = {version: _decided(records[version], verdict, at_s)}
    old = standing.active
    if old and old != version:
        retired = Verdict(_S.RETIRED, "superseded", f"by {version}")
        changed[old] = _decided(records[old], retired, at_s)
        standing = replace(standing, previous=old)
    changed |= _void_trial(records, standing, version, at_s)
    return Change(replace(standing, active=version, canary=""), changed)


def take_back(
    records: Records, standing: Standing, verdict: Verdict, at_s: float, successor: str
) -> Change:
    """Return what it does to take the active version back for a successor.

    Raises:
        PreconditionError: there is no other version to go back to.
    """
    old = standing.active
    if not successor or successor == old:
        raise PreconditionError("there is no version to go back to", reason="no-earlier-draft")
    returned = Verdict(_S.ACTIVE, "rolled-back-to", f"from {old}: {verdict.reason}")
    changed = {
        old: _decided(records[old], verdict, at_s),
        successor: _decided(records[successor], returned, at_s),
    }
    changed |= _void_trial(records, standing, successor, at_s)
    after = {**records, **changed}
    previous = _last_retired(after.values(), records[old].drafter) or standing.floor
    if previous == successor:
        previous = ""
    return Change(replace(standing, active=successor, canary="", previous=previous), changed)


def remove(records: Records, standing: Standing, at_s: float) -> Change:
    """Return what it does to give a drafter up: none of its versions comes back by itself.

    Raises:
        PreconditionError: a version is pinned.
    """
    if standing.pinned:
        raise PreconditionError(f"{standing.pinned} is pinned; unpin it", reason="draft-pinned")
    removed = Verdict(_S.ROLLED_BACK, "removed")
    # Retired ones too: where standings are lost, one of them would be taken for the one before.
    used = (_S.ACTIVE, _S.CANARY, _S.RETIRED)
    changed = {v: _decided(r, removed, at_s) for v, r in records.items() if r.stage in used}
    return Change(Standing(), changed | flagged({**records, **changed}, Standing()))


def check_room(standings: Mapping[str, Standing], drafter: str) -> None:
    """Refuse a drafter that would be one too many for engines.

    Raises:
        ExhaustedError: it would.
    """
    members = {name for name, standing in standings.items() if standing.active}
    members.discard(MODEL_DRAFTER)
    if drafter not in (MODEL_DRAFTER, *members) and len(members) >= MAX_DRAFTERS - 1:
        raise ExhaustedError(
            f"{', '.join(sorted(members))}: no room for {drafter}; remove one", reason="bank-full"
        )


def pin(records: Records, standing: Standing, version: str, at_s: float) -> Change:
    """Return what it does to keep a version active whatever comes."""
    change = activate(records, standing, version, Verdict(_S.ACTIVE, "pinned"), at_s)
    pinned = replace(change.standing, pinned=version)
    flags = flagged({**records, **change.records}, pinned)
    return Change(pinned, {**change.records, **flags})


def unpin(records: Records, standing: Standing, at_s: float) -> Change:
    """Return what it does to let versions be exchanged again."""
    record = records[standing.pinned]
    after = replace(_decided(record, Verdict(record.stage, "unpinned"), at_s), is_pinned=False)
    return Change(replace(standing, pinned=""), {record.version: after})


def flagged(records: Records, standing: Standing) -> dict[str, DraftRecord]:
    """Return the records of a drafter whose flags do not say what its standing says, put right."""
    changed = {}
    for version, record in records.items():
        right = replace(
            record, is_floor=version == standing.floor, is_pinned=version == standing.pinned
        )
        if right != record:
            changed[version] = right
    return changed


def reconcile(records: Records, standing: Standing, at_s: float) -> Change:
    """Return a drafter's standing without versions that are lost, and records that agree with it.

    `records` are the drafter's. Losing the active version means the previous one, or the floor.
    """
    kept = Standing(
        *(v if v in records else "" for v in (standing.active, standing.canary)),
        *(v if v in records else "" for v in (standing.previous, standing.floor, standing.pinned)),
    )
    active = kept.active or kept.pinned or kept.previous or kept.floor
    previous = kept.previous if kept.previous != active else ""
    canary = kept.canary if active and kept.canary != active else ""
    kept = replace(kept, active=active, canary=canary, previous=previous)
    changed: dict[str, DraftRecord] = {}
    for version, record in records.items():
        stage = _stage_of(record, kept)
        if stage is not record.stage:
            changed[version] = _decided(record, Verdict(stage, "reconciled"), at_s)
    return Change(kept, changed | flagged({**records, **changed}, kept))


def standing_of(records: Iterable[DraftRecord], drafter: str) -> Standing:
    """Return the standing of a drafter that its records tell, newest first where several claim."""
    own = sorted((r for r in records if r.drafter == drafter), key=lambda r: -r.number)

    def first(versions: Iterable[str]) -> str:
        return next(iter(versions), "")

    return Standing(
        active=first(r.version for r in own if r.stage is _S.ACTIVE),
        canary=first(r.version for r in own if r.stage is _S.CANARY),
        previous=_last_retired(own, drafter),
        floor=first(r.version for r in own if r.is_floor),
        pinned=first(r.version for r in own if r.is_pinned),
    )


def _stage_of(record: DraftRecord, standing: Standing) -> DraftStage:
    if record.version == standing.active:
        return _S.ACTIVE
    if record.version == standing.canary:
        return _S.CANARY
    if record.stage is _S.ACTIVE:
        return _S.RETIRED
    return _S.CANDIDATE if record.stage is _S.CANARY else record.stage


def _void_trial(
    records: Records, standing: Standing, version: str, at_s: float
) -> dict[str, DraftRecord]:
    if standing.canary in ("", version):
        return {}
    void = Verdict(_S.CANDIDATE, "trial-void", f"{version} became active")
    return {standing.canary: _decided(records[standing.canary], void, at_s)}


def _last_retired(records: Iterable[DraftRecord], drafter: str) -> str:
    retired = [r for r in records if r.drafter == drafter and r.stage is _S.RETIRED]
    retired.sort(key=lambda r: (r.decisions[-1].at_s if r.decisions else 0.0, r.number))
    return retired[-1].version if retired else ""


def _decided(record: DraftRecord, verdict: Verdict, at_s: float) -> DraftRecord:
    decision = DraftDecision(at_s, verdict.stage, verdict.reason, verdict.detail)
    return replace(
        record,
        stage=verdict.stage,
        scores=verdict.scores or record.scores,
        decisions=(*record.decisions, decision)[-_MAX_DECISIONS:],
    )
