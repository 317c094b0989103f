"""Metrics of the trainer: what it learns, decides and spends, and what its drafts bring."""

from __future__ import annotations

from itertools import chain

from paceline.process.metrics.declaration import Area, counter, gauge, seconds
from paceline.process.metrics.labelled import Label
from paceline.process.metrics.speculation import DRAFTER, MAX_VERSION_SERIES, VERSION

_DECISIONS = {
    "refused": ("no-gain", "forgets", "undecided"),
    "canary": ("better", "first", "forced"),
    "active": ("far-better", "not-worse", "not-worse-on-average", "other-unused"),
    "rolled-back": (
        "far-worse", "worse", "worse-on-average", "starved", "live-worse", "live-far-worse",
    ),
}  # fmt: skip
"""Where a version may go, and why."""

_DOMAIN = Label("domain", "the client's label of the traffic, empty without one", max_values=32)


class TrainerArea(Area):
    """Online training of drafts."""

    title = "Trainer"
    exported_by = frozenset({"trainer"})

    trainer_workers = gauge("Workers that attend.", "workers")
    trainer_plan_number = gauge(
        "Changes since the start of what workers are to draft with.", "changes"
    )
    trainer_sent_bytes = counter("Bytes of drafts sent.", "bytes")
    trainer_samples = counter("Samples taken in.", "samples")
    trainer_corrupt_samples = counter("Samples dropped as corrupt.", "samples")
    trainer_micro_steps = counter("Micro-steps of training.", "micro-steps")
    trainer_steps = counter("Optimiser steps.", "steps")
    trainer_tokens = counter("Tokens learned from, each time.", "tokens")
    trainer_trained_seconds = counter("Time spent in micro-steps.", "seconds")
    trainer_skipped_batches = counter(
        "Batches dropped for numbers that were not finite.", "batches"
    )
    trainer_restored_weights = counter("Times that the last good weights came back.", "times")
    trainer_save_failures = counter("Times that the learner's state could not be saved.", "times")
    trainer_loss = gauge("Loss of the last optimiser step.", "nats")
    trainer_micro_step_seconds = gauge("Duration of the last micro-step.", "seconds")
    trainer_replay_bytes = gauge("Memory of samples kept.", "bytes")
    trainer_granted_threads = gauge("Threads that training may use now.", "threads")
    trainer_spare_offered_core_seconds = counter("Core seconds that workers left.", "core seconds")
    trainer_spare_granted_core_seconds = counter(
        "Core seconds granted to training of those.", "core seconds"
    )
    trainer_yields = counter("Times that a running grant was taken back.", "times")
    trainer_yield_seconds = seconds(
        "Processor time that the learner still used after a grant was taken back."
    )
    draft_decisions = counter(
        "Decisions about versions of drafts.",
        "decisions",
        DRAFTER,
        Label("stage", "where the version went", tuple(_DECISIONS)),
        Label(
            "reason",
            "why, as in `paceline draft show`",
            tuple(chain.from_iterable(_DECISIONS.values())),
            max_values=24,
        ),
        zeros=(
            ("model", stage, reason) for stage, reasons in _DECISIONS.items() for reason in reasons
        ),
        limit=128,
    )
    draft_tried_tokens = counter(
        "Positions at which a version's token was put to the test.",
        "tokens",
        DRAFTER,
        VERSION,
        limit=MAX_VERSION_SERIES,
    )
    draft_accepted_tokens = counter(
        "Positions at which a version's token was accepted.",
        "tokens",
        DRAFTER,
        VERSION,
        limit=MAX_VERSION_SERIES,
    )
    draft_domain_tried_tokens = counter(
        "Positions at which drafts were put to the test, whatever the version.", "tokens", _DOMAIN
    )
    draft_domain_accepted_tokens = counter(
        "Positions at which drafts were accepted, whatever the version.", "tokens", _DOMAIN
    )
