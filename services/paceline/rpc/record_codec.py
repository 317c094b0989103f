"""Records of draft versions between wire messages and domain values, both ways."""

from __future__ import annotations

from paceline.domain.draft_records import DraftDecision, DraftRecord, DraftScore, DraftStage
from paceline.v1 import drafts_pb2

_STAGES = {
    DraftStage.CANDIDATE: drafts_pb2.DRAFT_STAGE_CANDIDATE,
    DraftStage.REFUSED: drafts_pb2.DRAFT_STAGE_REFUSED,
    DraftStage.CANARY: drafts_pb2.DRAFT_STAGE_CANARY,
    DraftStage.ACTIVE: drafts_pb2.DRAFT_STAGE_ACTIVE,
    DraftStage.RETIRED: drafts_pb2.DRAFT_STAGE_RETIRED,
    DraftStage.ROLLED_BACK: drafts_pb2.DRAFT_STAGE_ROLLED_BACK,
}
_STAGES_BACK: dict[int, DraftStage] = {int(number): stage for stage, number in _STAGES.items()}


def record_to_proto(record: DraftRecord) -> drafts_pb2.DraftRecord:
    """Encode a record."""
    return drafts_pb2.DraftRecord(
        version=record.version,
        digest=record.digest,
        number=record.number,
        drafter=record.drafter,
        parent=record.parent,
        created_s=record.created_s,
        stage=_STAGES[record.stage],
        is_floor=record.is_floor,
        is_pinned=record.is_pinned,
        num_bytes=record.num_bytes,
        num_samples=record.num_samples,
        num_tokens=record.num_tokens,
        rank=record.rank,
        scores=[_score_to_proto(score) for score in record.scores],
        decisions=[_decision_to_proto(decision) for decision in record.decisions],
    )


def record_from_proto(message: drafts_pb2.DraftRecord) -> DraftRecord:
    """Decode a record.

    Raises:
        ValueError: it stands at a stage that this version does not know.
    """
    return DraftRecord(
        version=message.version,
        digest=message.digest,
        number=message.number,
        drafter=message.drafter,
        parent=message.parent,
        created_s=message.created_s,
        stage=_stage(message.stage),
        is_floor=message.is_floor,
        is_pinned=message.is_pinned,
        num_bytes=message.num_bytes,
        num_samples=message.num_samples,
        num_tokens=message.num_tokens,
        rank=message.rank,
        scores=tuple(map(_score_from_proto, message.scores)),
        decisions=tuple(map(_decision_from_proto, message.decisions)),
    )


def _stage(number: int) -> DraftStage:
    stage = _STAGES_BACK.get(number)
    if stage is None:
        raise ValueError(f"unknown stage {number}")
    return stage


def _score_to_proto(score: DraftScore) -> drafts_pb2.DraftScore:
    return drafts_pb2.DraftScore(
        domain=score.domain,
        num_positions=score.num_positions,
        acceptance=score.acceptance,
        incumbent_acceptance=score.incumbent_acceptance,
        difference_low=score.difference_low,
        difference_high=score.difference_high,
    )


def _score_from_proto(message: drafts_pb2.DraftScore) -> DraftScore:
    return DraftScore(
        domain=message.domain,
        num_positions=message.num_positions,
        acceptance=message.acceptance,
        incumbent_acceptance=message.incumbent_acceptance,
        difference_low=message.difference_low,
        difference_high=message.difference_high,
    )


def _decision_to_proto(decision: DraftDecision) -> drafts_pb2.DraftDecision:
    return drafts_pb2.DraftDecision(
        at_s=decision.at_s,
        stage=_STAGES[decision.stage],
        reason=decision.reason,
        detail=decision.detail,
    )


def _decision_from_proto(message: drafts_pb2.DraftDecision) -> DraftDecision:
    return DraftDecision(message.at_s, _stage(message.stage), message.reason, message.detail)
