"""Metrics of workers about drafts: what is captured for training, what the trainer sent."""

from __future__ import annotations

from paceline.process.metrics.declaration import Area, counter, gauge
from paceline.process.metrics.labelled import Label


class DraftArea(Area):
    """A worker's side of online training."""

    title = "Workers: samples and drafts"
    exported_by = frozenset({"worker"})

    capture_samples = counter("Samples captured for training.", "samples")
    capture_tokens = counter("Tokens captured, without context.", "tokens")
    capture_dropped = counter(
        "Captured samples that did not reach the stream.",
        "samples",
        Label("reason", "`backlog`: Redis was away for long", ("backlog",)),
    )
    capture_seconds = counter("Processor time that capturing took the engine.", "seconds")
    trainer_link_up = gauge("1 while attending at the trainer.", "")
    draft_fetches = counter("Drafts fetched from the trainer.", "drafts")
    draft_fetched_bytes = counter("Bytes of drafts fetched from the trainer.", "bytes")
    draft_fetch_failures = counter(
        "Fetches that brought no draft that can be used.",
        "drafts",
        Label(
            "reason",
            "why, as in the log",
            ("no-trainer", "too-slow", "wrong-digest", "too-large", "not-writable"),
            max_values=16,
        ),
    )
    draft_swaps = counter("Changes of what the engine drafts with.", "changes")
    draft_swap_stall_max_seconds = gauge(
        "Longest time that a change kept a step waiting.", "seconds"
    )
    draft_outcomes_dropped = counter(
        "Outcomes of sequences that no trainer heard of in time.", "sequences"
    )
