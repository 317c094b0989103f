"""Samples, outcomes, drafts and slack between wire messages and domain values, both ways."""

from __future__ import annotations

from collections.abc import Iterable

from paceline.domain.drafts import DraftEntry, DraftFile, DraftState, HeldDraft, StagedDraft
from paceline.domain.learnings import Sample, SequenceOutcome
from paceline.domain.slack import Slack
from paceline.v1 import drafts_pb2, engine_pb2, samples_pb2


def sample_to_proto(sample: Sample) -> samples_pb2.Sample:
    """Encode a sample."""
    return samples_pb2.Sample(
        tenant=sample.tenant,
        domain=sample.domain,
        draft_version=sample.draft_version,
        temperature=sample.temperature,
        first_position=sample.first_position,
        token_ids=sample.token_ids,
        num_context=sample.num_context,
        top=sample.top,
        top_ids=sample.top_ids,
        top_probs=sample.top_probs,
        tail_mass=sample.tail_mass,
        origins=sample.origins,
        hidden=sample.hidden,
    )


def sample_from_proto(message: samples_pb2.Sample) -> Sample:
    """Decode a sample.

    Raises:
        ValueError: its parts do not fit together; says which.
    """
    count = len(message.token_ids) - message.num_context
    if message.num_context < 1 or count < 1 or message.top < 1:
        raise ValueError("a sample without context, captured tokens or a distribution")
    for name, size in (
        ("top_ids", 4 * count * message.top),
        ("top_probs", 2 * count * message.top),
        ("tail_mass", 2 * count),
        ("origins", count),
    ):
        if len(getattr(message, name)) != size:
            raise ValueError(f"{name}: {len(getattr(message, name))} bytes, expected {size}")
    if len(message.hidden) % (2 * count):
        raise ValueError(f"hidden: {len(message.hidden)} bytes for {count} tokens")
    return Sample(
        tenant=message.tenant,
        domain=message.domain,
        draft_version=message.draft_version,
        temperature=message.temperature,
        first_position=message.first_position,
        token_ids=tuple(message.token_ids),
        num_context=message.num_context,
        top=message.top,
        top_ids=message.top_ids,
        top_probs=message.top_probs,
        tail_mass=message.tail_mass,
        origins=message.origins,
        hidden=message.hidden,
    )


def outcome_to_proto(outcome: SequenceOutcome) -> samples_pb2.SequenceOutcome:
    """Encode an outcome."""
    return samples_pb2.SequenceOutcome(
        drafter=outcome.drafter,
        draft_version=outcome.draft_version,
        tenant=outcome.tenant,
        domain=outcome.domain,
        num_rounds=outcome.num_rounds,
        num_tried=outcome.num_tried,
        num_accepted=outcome.num_accepted,
        num_emitted=outcome.num_emitted,
    )


def outcome_from_proto(message: samples_pb2.SequenceOutcome) -> SequenceOutcome:
    """Decode an outcome."""
    return SequenceOutcome(
        drafter=message.drafter,
        draft_version=message.draft_version,
        tenant=message.tenant,
        domain=message.domain,
        num_rounds=message.num_rounds,
        num_tried=message.num_tried,
        num_accepted=message.num_accepted,
        num_emitted=message.num_emitted,
    )


def slack_to_proto(slack: Slack) -> drafts_pb2.Slack:
    """Encode slack."""
    return drafts_pb2.Slack(
        num_running=slack.num_running,
        num_waiting=slack.num_waiting,
        threads=slack.threads,
        predicted_step_s=slack.predicted_step_s,
        last_step_s=slack.last_step_s,
        itl_target_s=slack.itl_target_s,
    )


def slack_from_proto(message: drafts_pb2.Slack) -> Slack:
    """Decode slack."""
    return Slack(
        num_running=message.num_running,
        num_waiting=message.num_waiting,
        threads=message.threads,
        predicted_step_s=message.predicted_step_s,
        last_step_s=message.last_step_s,
        itl_target_s=message.itl_target_s,
    )


def entry_to_proto(entry: DraftEntry) -> drafts_pb2.DraftEntry:
    """Encode what a drafter is to use."""
    message = drafts_pb2.DraftEntry(
        drafter=entry.drafter, active=_file_to_proto(entry.active), canary_share=entry.canary_share
    )
    if entry.canary is not None:
        message.canary.CopyFrom(_file_to_proto(entry.canary))
    return message


def entry_from_proto(message: drafts_pb2.DraftEntry) -> DraftEntry:
    """Decode what a drafter is to use."""
    return DraftEntry(
        drafter=message.drafter,
        active=_file_from_proto(message.active),
        canary=_file_from_proto(message.canary) if message.HasField("canary") else None,
        canary_share=message.canary_share,
    )


def change_to_proto(drafts: Iterable[StagedDraft]) -> engine_pb2.DraftChange:
    """Encode what an engine is to draft with."""
    return engine_pb2.DraftChange(
        drafts=[
            engine_pb2.StagedDraft(
                drafter=draft.drafter,
                version=draft.version,
                directory=draft.directory,
                share=draft.share,
            )
            for draft in drafts
        ]
    )


def change_from_proto(message: engine_pb2.DraftChange) -> tuple[StagedDraft, ...]:
    """Decode what an engine is to draft with."""
    return tuple(
        StagedDraft(draft.drafter, draft.version, draft.directory, draft.share)
        for draft in message.drafts
    )


def state_to_proto(state: DraftState) -> drafts_pb2.DraftState:
    """Encode what an engine drafts with."""
    return drafts_pb2.DraftState(
        held=[drafts_pb2.HeldDraft(drafter=h.drafter, version=h.version) for h in state.held],
        num_swaps=state.num_swaps,
        max_swap_stall_s=state.max_swap_stall_s,
        error=state.error,
    )


def state_from_proto(message: drafts_pb2.DraftState) -> DraftState:
    """Decode what an engine drafts with."""
    return DraftState(
        held=tuple(HeldDraft(held.drafter, held.version) for held in message.held),
        num_swaps=message.num_swaps,
        max_swap_stall_s=message.max_swap_stall_s,
        error=message.error,
    )


def _file_to_proto(file: DraftFile) -> drafts_pb2.DraftFile:
    return drafts_pb2.DraftFile(version=file.version, digest=file.digest, num_bytes=file.num_bytes)


def _file_from_proto(message: drafts_pb2.DraftFile) -> DraftFile:
    return DraftFile(message.version, message.digest, message.num_bytes)
