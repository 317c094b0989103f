"""Rows about online training on the dashboard of speculation: samples, steps, spare capacity."""

from __future__ import annotations

from deploy.grafana.dashboards.panels import (
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    RED,
    Panel,
    curves,
    quantiles,
    rates,
)
from deploy.grafana.dashboards.queries import CHOSEN, FLEET, Query, ratio

SPARE_GIVEN = ratio(
    FLEET.rate("paceline_trainer_spare_granted_core_seconds_total"),
    FLEET.rate("paceline_trainer_spare_offered_core_seconds_total"),
)
"""Share of the core seconds that workers leave which training is granted."""


def samples() -> list[Panel]:
    """Return the panels about what is learned from."""
    return [
        rates(
            "Samples",
            "Captured by decode workers, dropped because Redis was away, and taken in by the "
            "trainer. Taken in below captured for long: the trainer does not keep up.",
            "suffix: /s",
            {
                "captured": "paceline_capture_samples_total",
                "dropped": "paceline_capture_dropped_total",
                "taken in": "paceline_trainer_samples_total",
                "corrupt": "paceline_trainer_corrupt_samples_total",
            },
            scope=FLEET,
            colors={"dropped": RED, "corrupt": RED},
        ),
        curves(
            "Cost of capturing",
            "Share of the engines' time that capturing takes; bounded by --capture-share.",
            "percentunit",
            Query(_capture_cost(), "cost"),
            steps=[(0.02, ORANGE)],
        ),
        rates(
            "Tokens captured",
            "Tokens in captured samples, and outcomes of sequences that no trainer heard of in "
            "time.",
            "suffix: /s",
            {
                "tokens": "paceline_capture_tokens_total",
                "outcomes dropped": "paceline_draft_outcomes_dropped_total",
            },
            scope=CHOSEN,
        ),
    ]


def training() -> list[Panel]:
    """Return the panels about learning and what it may use."""
    return [
        curves(
            "Loss",
            "Of the last optimiser step. Jumps where traffic changes; rising for hours is not "
            "learning.",
            "none",
            Query(FLEET.max("paceline_trainer_loss"), "loss"),
        ),
        rates(
            "Steps",
            "Micro-steps and optimiser steps per second.",
            "suffix: /s",
            {
                "micro-steps": "paceline_trainer_micro_steps_total",
                "steps": "paceline_trainer_steps_total",
            },
            scope=FLEET,
        ),
        rates(
            "Tokens learned",
            "Tokens that the draft learned from, each time.",
            "suffix: tok/s",
            {"tokens": "paceline_trainer_tokens_total"},
            scope=FLEET,
        ),
        curves(
            "Spare cores",
            "Cores that workers leave, those granted to training, and those spent in micro-steps.",
            "suffix: cores",
            Query(FLEET.rate("paceline_trainer_spare_offered_core_seconds_total"), "offered"),
            Query(FLEET.rate("paceline_trainer_spare_granted_core_seconds_total"), "granted"),
            Query(FLEET.rate("paceline_trainer_trained_seconds_total"), "in micro-steps"),
            colors={"offered": GREY, "granted": BLUE, "in micro-steps": GREEN},
        ),
        curves(
            "Share of the spare",
            "Granted of offered core seconds.",
            "percentunit",
            Query(SPARE_GIVEN, "granted"),
            max_value=1,
        ),
        curves(
            "Threads granted",
            "Threads that training may use now; 0 while serving needs the machine.",
            "none",
            Query(FLEET.sum("paceline_trainer_granted_threads"), "threads"),
            is_stepped=True,
        ),
        rates(
            "Grants taken back",
            "Times per second that serving wanted its cores back from a running grant.",
            "suffix: /s",
            {"yields": "paceline_trainer_yields_total"},
            scope=FLEET,
        ),
        quantiles(
            "Time to yield",
            "Processor time that the learner still used after a grant was taken back; bounded by "
            "one micro-step.",
            "paceline_trainer_yield_seconds",
            scope=FLEET,
        ),
        curves(
            "Duration of a micro-step",
            "The last one: what serving waits for at most.",
            "s",
            Query(FLEET.max("paceline_trainer_micro_step_seconds"), "micro-step"),
            steps=[(0.05, ORANGE)],
        ),
        curves(
            "What went wrong",
            "Batches dropped for numbers that were not finite, times that good weights came back, "
            "and failed saves, since the trainer's start. All should stay 0.",
            "none",
            Query(FLEET.sum("paceline_trainer_skipped_batches_total"), "batches dropped"),
            Query(FLEET.sum("paceline_trainer_restored_weights_total"), "weights restored"),
            Query(FLEET.sum("paceline_trainer_save_failures_total"), "saves failed"),
            width=12,
            is_stepped=True,
        ),
        curves(
            "Memory of samples",
            "What the trainer keeps to learn from again and to judge by.",
            "bytes",
            Query(FLEET.sum("paceline_trainer_replay_bytes"), "samples"),
            width=12,
        ),
    ]


def _capture_cost() -> str:
    return ratio(
        CHOSEN.rate("paceline_capture_seconds_total"),
        CHOSEN.rate("paceline_engine_step_seconds_sum"),
    )
